"""The order of prompts: every pass over a data set is a permutation of its records.

The order is a pure function of the seed and of the data sets' sizes and weights. Batch size, loader processes and
data-parallel ranks only decide who reads which part of it, so they never change it, and a single number, the count of
prompts read so far, is the whole state of the loader.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from nemo_vopd.batch import RecordKey


class Order:
    """An endless sequence of records; `order[i]` is the record of the i-th prompt of the run."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        """Mix data sets of `sizes` records in proportion to `weights`; each of them is shuffled by `seed`."""
        self.sizes, self.seed = list(sizes), seed
        shares = [Fraction(weight) for weight in weights]
        self._shares = [share / sum(shares[i:]) for i, share in enumerate(shares)]
        self._permutations: dict[int, tuple[int, np.ndarray]] = {}

    def __getitem__(self, place: int) -> RecordKey:
        """The record at `place` >= 0."""
        data_set, drawn = self._choose(place)
        epoch, index = divmod(drawn, self.sizes[data_set])
        return RecordKey(data_set, int(self._permutation(data_set, epoch)[index]), epoch)

    def _choose(self, place: int) -> tuple[int, int]:
        """(data set, number of records drawn from it before) of the prompt at `place`.

        After any number of prompts the first data set has had its share of them, rounded down, and the others divide
        the rest in the same way. Exact fractions keep the shares right for runs of any length.
        """
        for data_set, share in enumerate(self._shares[:-1]):
            drawn = place * share.numerator // share.denominator
            if (place + 1) * share.numerator // share.denominator > drawn:
                return data_set, drawn
            place -= drawn
        return len(self._shares) - 1, place

    def _permutation(self, data_set: int, epoch: int) -> np.ndarray:
        """[records] int64: the order of one pass over a data set; the latest pass of each data set is kept."""
        known = self._permutations.get(data_set)
        if known is None or known[0] != epoch:
            key = hashlib.blake2b(f"{self.seed}/{data_set}/{epoch}".encode(), digest_size=16).digest()
            # NumPy promises that the raw numbers of a bit generator never change; `permutation` has no such promise
            numbers = np.random.Philox(key=np.frombuffer(key, dtype=np.uint64)).random_raw(self.sizes[data_set])
            known = self._permutations[data_set] = epoch, np.argsort(numbers, kind="stable")
        return known[1]

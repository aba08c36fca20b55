"""The order of prompts: whole epochs, one order for every way of reading it, any place found at once."""

from collections import Counter

import numpy as np
import pytest

from nemo_vopd.data.order import Order


def keys(order: Order, start: int, count: int) -> list:
    return [order[place] for place in range(start, start + count)]


@pytest.mark.parametrize("size", [1, 2, 24, 997])
def test_every_epoch_is_a_permutation(size):
    """With 24 records and Energon's shuffle buffer, 10 were not seen in the first 24 draws."""
    order = Order([size], [1.0], seed=3)
    epochs = [keys(order, size * epoch, size) for epoch in range(4)]
    for number, epoch in enumerate(epochs):
        assert sorted(key.record for key in epoch) == list(range(size))
        assert {(key.data_set, key.occurrence) for key in epoch} == {(0, number)}
    if size > 2:
        assert len({tuple(key.record for key in epoch) for epoch in epochs}) == 4, "each epoch has an order of its own"


def test_the_order_follows_from_the_seed_alone():
    first, again, other = (keys(Order([200], [1.0], seed), 0, 500) for seed in (1, 1, 2))
    assert first == again != other
    # the first records of this order, so that another version of NumPy cannot change a run that is resumed with it
    assert [key.record for key in first[:6]] == [153, 53, 154, 144, 152, 37]


def test_any_place_is_found_without_what_lies_before():
    order = [(50, 7, 20), (3.0, 1.0, 0.7)]
    whole = keys(Order(*order, seed=1), 0, 900)
    for place in (0, 1, 449, 450, 899):
        assert Order(*order, seed=1)[place] == whole[place]


@pytest.mark.parametrize("weights", [(1.0,), (3.0, 1.0), (0.1, 0.2, 0.7), (1e-3, 1.0, 1.0, 5.0), (1.0, 1.0)])
def test_a_blend_keeps_its_weights_and_every_data_set_its_epochs(weights):
    sizes, num = [7, 30, 11, 5][: len(weights)], 4000
    drawn = keys(Order(sizes, weights, seed=5), 0, num)
    shares = np.array(weights) / sum(weights)
    for length in (1, 10, 333, num):
        counts = np.bincount([key.data_set for key in drawn[:length]], minlength=len(weights))
        assert np.abs(counts - length * shares).max() < len(weights), (length, counts)
    assert len(set(drawn)) == num, "no two prompts share a key"
    for data_set, size in enumerate(sizes):
        mine = [key for key in drawn if key.data_set == data_set]
        for epoch in range(len(mine) // size):
            part = mine[epoch * size : (epoch + 1) * size]
            assert sorted(key.record for key in part) == list(range(size)) and {k.occurrence for k in part} == {epoch}


def test_the_records_of_an_epoch_are_well_mixed():
    """The place of a record in an epoch is uniform: a chi-square statistic of 16 places of 16 records."""
    order = Order([16], [1.0], seed=9)
    counts = Counter()
    for epoch in range(2000):
        counts.update((place, key.record) for place, key in enumerate(keys(order, 16 * epoch, 16)))
    statistic = sum((counts[place, record] - 125) ** 2 / 125 for place in range(16) for record in range(16))
    assert statistic < 320  # 225 degrees of freedom: exceeded by chance once in 30,000 seeds

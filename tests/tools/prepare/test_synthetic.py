import json
import re

import numpy as np
import pytest
from PIL import Image

from nemo_vopd.errors import OptionError
from nemo_vopd.tools.prepare.synthetic import COLOURS, write_digits


def records(path):
    return [json.loads(line) for line in (path / "data.jsonl").read_text().splitlines()]


def test_records_agree_with_their_images(digits):
    seen = set()
    for record in records(digits):
        image = np.asarray(Image.open(digits / record["image"]))
        answer = re.fullmatch(r"it is a (\w+) (\d) \.", record["answer"])
        colour, digit = answer.groups()
        assert record["question"] == f"what digit is {colour}?"
        seen.add((colour, digit))
        x1, y1, x2, y2 = record["bbox"]
        assert 0 <= x1 < x2 <= image.shape[1] and 0 <= y1 < y2 <= image.shape[0]
        if image.shape[0] == 112:
            assert (x2 - x1, y2 - y1) == (15, 21)
            # the asked colour is inside the box, reaches its edges or one pixel row of the font less, and nowhere else
            mask = (image == COLOURS[colour]).all(-1)
            assert mask.any() and mask.sum() == mask[y1:y2, x1:x2].sum()
            assert len(np.unique(image.reshape(-1, 3), axis=0)) == 4
        else:
            assert image.shape == (56, 56, 3)
            region = image[round(y1) : round(y2), round(x1) : round(x2)].reshape(-1, 3).astype(int)
            assert np.abs(region - COLOURS[colour]).sum(-1).min() < 60
    assert len({colour for colour, _ in seen}) == 6 and len({digit for _, digit in seen}) == 10


def test_close_ups_are_a_fraction_and_the_rest_is_unchanged(tmp_path, digits):
    sizes = [Image.open(digits / record["image"]).size[0] for record in records(digits)]
    assert 0.1 < sizes.count(56) / len(sizes) < 0.4
    write_digits(tmp_path / "plain", num_samples=96, seed=11)
    for plain, mixed, size in zip(records(tmp_path / "plain"), records(digits), sizes, strict=True):
        assert plain["answer"] == mixed["answer"]
        assert size == 56 or plain == mixed


def test_deterministic_and_a_longer_set_starts_like_a_shorter_one(tmp_path):
    write_digits(tmp_path / "a", num_samples=30, seed=3, close_up_fraction=0.5)
    write_digits(tmp_path / "b", num_samples=20, seed=3, close_up_fraction=0.5)
    assert records(tmp_path / "a")[:20] == records(tmp_path / "b")
    for record in records(tmp_path / "b"):
        assert (tmp_path / "a" / record["image"]).read_bytes() == (tmp_path / "b" / record["image"]).read_bytes()


def test_seeds_differ(tmp_path):
    for seed in (1, 2):
        write_digits(tmp_path / str(seed), num_samples=50, seed=seed)
    first, second = records(tmp_path / "1"), records(tmp_path / "2")
    assert {r["id"] for r in first}.isdisjoint(r["id"] for r in second)
    images = [{(tmp_path / s / r["image"]).read_bytes() for r in rs} for s, rs in (("1", first), ("2", second))]
    assert images[0].isdisjoint(images[1])


def test_existing_output_is_kept(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(OptionError):
        write_digits(tmp_path / "x", num_samples=1, seed=1)
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]

import math
import pickle
import random

import numpy as np
import pytest
from PIL import Image

from nemo_vopd.config import CropConfig
from nemo_vopd.images import DROP_REASONS, UnusableSample, check_box, crop_box, draw_box


def reason(function, *args, **kwargs):
    with pytest.raises(UnusableSample) as caught:
        function(*args, **kwargs)
    assert caught.value.reason in DROP_REASONS
    return caught.value.reason


@pytest.mark.parametrize(
    "bbox",
    [None, "1234", b"1234", [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, "3", 4], [0, 0, True, 1], {"x": 1}]
    + [[0, 0, value, 5] for value in (math.nan, math.inf, -math.inf, 10**400, None)],
)
def test_wrong_types_are_malformed(bbox):
    assert reason(check_box, bbox, (100, 50)) == "malformed_record"


@pytest.mark.parametrize("bbox", [[5, 5, 5, 9], [5, 5, 9, 5], [9, 5, 5, 9], [5, 9, 9, 5], [0, 0, 0, 0]])
def test_no_area_is_empty(bbox):
    assert reason(check_box, bbox, (100, 50)) == "empty_box"


@pytest.mark.parametrize("bbox", [[100, 0, 120, 9], [-9, 0, 0, 9], [0, 50, 9, 60], [0, -9, 9, 0]])
def test_outside_touching_edge_is_outside(bbox):
    assert reason(check_box, bbox, (100, 50)) == "box_outside_image"


def test_partly_outside_is_clipped():
    assert check_box((-5, -5, 200, 20.5), (100, 50)) == (0, 0, 100, 20.5)


def test_quickstart_crop_is_42_pixels_for_every_cell_and_jitter():
    for centre_x in (28, 56, 84):
        for centre_y in (28, 56, 84):
            for jitter in range(-3, 4):
                x, y = centre_x - 7 + jitter, centre_y - 10 + jitter
                left, top, right, bottom = crop_box(
                    [x, y, x + 15, y + 21], (112, 112), scale=2.0, min_side=28, square=True
                )
                assert (right - left, bottom - top) == (42, 42)
                # the glyph is at one place of the crop, whatever the parity of its corner
                assert (x - left, y - top) == (14, 11)


@pytest.mark.parametrize("square", [True, False])
def test_crop_lies_inside_and_holds_the_box(square):
    rng = random.Random(0)
    for _ in range(3000):
        width, height = rng.randint(1, 300), rng.randint(1, 300)
        x1, y1 = rng.uniform(-50, width - 0.01), rng.uniform(-50, height - 0.01)
        bbox = [x1, y1, max(x1, 0) + rng.uniform(0.01, 200), max(y1, 0) + rng.uniform(0.01, 200)]
        scale, min_side = rng.choice([1.0, 1.5, 2.0, 3.7]), rng.choice([1, 28, 56])
        left, top, right, bottom = crop_box(bbox, (width, height), scale=scale, min_side=min_side, square=square)
        assert all(isinstance(v, int) for v in (left, top, right, bottom))
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        bx1, by1, bx2, by2 = check_box(bbox, (width, height))
        assert left <= bx1 and top <= by1 and bx2 <= right and by2 <= bottom
        assert right - left >= min(min_side, width) and bottom - top >= min(min_side, height)
        if square and max(right - left, bottom - top) <= min(width, height):
            assert right - left == bottom - top


def test_crop_scales_with_the_longer_side_and_shifts_at_the_edge():
    assert crop_box([40, 40, 60, 50], (200, 200), scale=2.0, min_side=1, square=True) == (30, 25, 70, 65)
    assert crop_box([40, 40, 60, 50], (200, 200), scale=2.0, min_side=1, square=False) == (30, 35, 70, 55)
    assert crop_box([0, 190, 20, 200], (200, 200), scale=2.0, min_side=1, square=True) == (0, 160, 40, 200)


def test_draw_box_marks_a_copy_inside_the_image():
    image = Image.new("RGB", (20, 10))
    drawn = np.asarray(draw_box(image, [2, 3, 8, 30], width=1))
    assert not np.asarray(image).any()
    red = (drawn == (255, 0, 0)).all(-1)
    assert red[3, 2:8].all() and red[9, 2:8].all() and red[3:, 2].all() and red[3:, 7].all()
    assert red.sum() == 2 * 6 + 2 * 5
    assert reason(draw_box, image, [0, 0, 0, 0]) == "empty_box"


def test_unusable_sample_survives_a_process_boundary():
    copy = pickle.loads(pickle.dumps(UnusableSample("empty_box", "why")))
    assert (copy.reason, copy.detail) == ("empty_box", "why")


def test_details_quote_data_safely():
    for detail in ("\x1b[31mred\n" * 9, "x" * 10**6, "\ud800"):
        shown = UnusableSample("malformed_record", detail).detail
        assert shown.isprintable() and len(shown) <= 300


def window(bbox, size, **options):
    left, top, right, bottom = crop_box(bbox, size, **{"scale": 1.0, "min_side": 1, "square": False, **options})
    assert 0 <= left <= bbox[0] and bbox[2] <= right <= size[0] and 0 <= top <= bbox[1] and bbox[3] <= bottom <= size[1]
    return right - left, bottom - top


def test_margin_is_in_pixels_after_the_scale():
    assert window([400, 400, 420, 410], (1000, 1000), scale=2.0, margin=15) == (70, 50)
    assert window([400, 400, 420, 410], (1000, 1000), scale=2.0, margin=15, square=True) == (70, 70)
    assert window([400, 0, 420, 10], (1000, 30), scale=2.0, margin=15) == (70, 30)


def test_upscaling_is_bounded_as_far_as_the_image_allows():
    for limit in (1.0, 1.5, 3.0):
        for square in (True, False):
            width, height = window(
                [400, 400, 420, 410], (1000, 1000), max_upscale=limit, min_pixels=40_000, square=square
            )
            assert (40_000 / limit**2) <= width * height < (40_000 / limit**2) * 1.2
            assert square == (width == height)
    assert window([400, 400, 420, 410], (1000, 1000), max_upscale=20, min_pixels=40_000) == (20, 10)
    # where the image ends on one axis, the window grows along the other
    assert window([400, 5, 420, 15], (1000, 20), max_upscale=2.0, min_pixels=40_000) == (500, 20)
    assert window([5, 5, 15, 15], (20, 20), max_upscale=2.0, min_pixels=40_000) == (20, 20)


def test_aspect_is_bounded_as_far_as_the_image_allows():
    assert window([100, 100, 500, 110], (1000, 1000), max_aspect=4.0) == (400, 100)
    assert window([100, 100, 110, 500], (1000, 1000), max_aspect=4.0) == (100, 400)
    assert window([100, 100, 500, 110], (1000, 1000), max_aspect=4.0, square=True) == (400, 400)
    assert window([0, 10, 900, 20], (1000, 50), max_aspect=4.0) == (900, 50)
    assert window([0, 10, 1000, 20], (1000, 400), scale=3.0, max_aspect=4.0) == (1000, 250)


def test_defaults_of_the_policy_change_nothing():
    rng = random.Random(1)
    for _ in range(500):
        size = (rng.randint(50, 300), rng.randint(50, 300))
        x, y = rng.uniform(0, 40), rng.uniform(0, 40)
        bbox = [x, y, x + rng.uniform(1, 60), y + rng.uniform(1, 60)]
        options = {"scale": 2.0, "min_side": 28, "square": rng.random() < 0.5}
        policy = vars(CropConfig(**options))
        assert crop_box(bbox, size, **policy, min_pixels=3136) == crop_box(bbox, size, **options)

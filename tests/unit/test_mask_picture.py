"""The picture of predicted masks: which slice, and that what is wrong, unknown or uncertain is seen at its place."""

import io

import numpy as np
from PIL import Image

from draf_dist.evaluation.mask_picture import MaskSlice, drawn
from draf_dist.schema.label import IGNORED

SIDE = 16
STRUCTURES = ("background", "disc", "ring")


def of(truth: np.ndarray, predicted: np.ndarray, uncertainty: np.ndarray) -> np.ndarray:
    """The pixels, (height, width, 3), of a picture of two equal slices."""
    image = np.arange(SIDE * SIDE, dtype=np.int16).reshape(SIDE, SIDE)
    one = MaskSlice("test, study 1", image, truth, predicted, {"entropy": uncertainty.astype(np.float32)})
    return np.asarray(Image.open(io.BytesIO(drawn([one, one], STRUCTURES))).convert("RGB")).astype(int)


def panel(pixels: np.ndarray, column: int) -> np.ndarray:
    """The upper one of a column, cut out by the frames: rows and columns that are all dark."""
    upper = pixels[: pixels.shape[0] // 2]
    width = pixels.shape[1] // 5
    return upper[:, column * width : (column + 1) * width]


def share(pixels: np.ndarray, colour: tuple[int, int, int]) -> float:
    """Of pixels of a colour."""
    return float((np.abs(pixels - np.array(colour)).sum(-1) < 12).mean())


def blank() -> np.ndarray:
    return np.zeros((SIDE, SIDE), dtype=np.int16)


DISC, RING, UNKNOWN = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x9C, 0xA3, 0xAF)


def test_mask_and_prediction_have_the_colours_of_their_structures() -> None:
    truth, predicted = blank(), blank()
    truth[:8], predicted[:4], predicted[4:8] = 1, 1, 2
    pixels = of(truth, predicted.astype(np.int64), blank())
    mask, prediction = panel(pixels, 1), panel(pixels, 2)
    assert share(mask, DISC) > 0.2
    assert share(mask, RING) == 0
    assert 0.4 < share(prediction, DISC) / share(mask, DISC) < 0.6
    assert share(prediction, RING) > 0.1


def test_what_nobody_says_is_grey_and_never_wrong() -> None:
    truth = blank()
    truth[8:] = IGNORED
    pixels = of(truth, np.ones((SIDE, SIDE), dtype=np.int64), blank())
    assert share(panel(pixels, 1), UNKNOWN) > 0.2
    # White within black: the known half is wrong.
    wrong = panel(pixels, 3)
    right = panel(of(truth, np.zeros((SIDE, SIDE), dtype=np.int64), blank()), 3)
    assert share(wrong, (0, 0, 0)) > 0.2
    assert 0.3 < share(right, (0, 0, 0)) - share(wrong, (0, 0, 0)) < 0.4


def test_the_front_of_the_body_is_up() -> None:
    front = blank()
    front[-4:] = 1
    rows = np.abs(panel(of(front, front.astype(np.int64), blank()), 1) - np.array(DISC)).sum(-1) < 12
    dark = panel(of(front, front.astype(np.int64), blank()), 1).sum(-1) < 12
    assert np.argwhere(rows)[:, 0].mean() < np.argwhere(dark)[:, 0].mean()

"""Images of a raw export: broken, foreign, missing or huge ones are told; good ones become what the card says."""

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from two_hospitals import CARD, append, read, write_export, write_png

from draf_dist.errors import DataError
from draf_dist.schema.study import Rejection


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    write_export(tmp_path / "raw")
    return tmp_path / "raw"


def broken_image(raw: Path, content: bytes) -> Rejection:
    (raw / "north/img/a.png").write_bytes(content)
    studies, rejections = read(raw)
    assert [s.subject for s in studies] == ["P2", "Q1", "Q2"]
    (rejection,) = rejections
    assert rejection.where == "north/images.csv row 2"
    return rejection


def encoded(array: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_truncated_image_is_quarantined(raw: Path, kind: str) -> None:
    content = encoded(NOISE, kind)
    assert broken_image(raw, content[: len(content) // 2]).reason == "broken image"


def test_a_png_whose_check_sum_is_wrong_is_quarantined(raw: Path) -> None:
    # Stored without compression, a changed pixel breaks nothing but the check sum.
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, "PNG", compress_level=0)
    content = bytearray(buffer.getvalue())
    content[len(content) // 2] ^= 0xFF
    assert broken_image(raw, bytes(content)).reason == "broken image"


def test_other_formats_are_not_decoded(raw: Path) -> None:
    assert broken_image(raw, encoded(NOISE, "TIFF")).reason == "broken image"


def test_a_decompression_bomb_is_refused_before_it_is_decoded(raw: Path) -> None:
    bomb = encoded(np.zeros((64, 9001), np.uint8))
    assert broken_image(raw, bomb).reason == "image too large"
    # A header that promises 200,000 x 200,000 pixels, with its check sum right.
    huge = bytearray(encoded(np.zeros((16, 16), np.uint8)))
    huge[16:24] = (200_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    assert broken_image(raw, bytes(huge)).reason == "image too large"


def test_an_image_that_is_too_small_or_not_there_is_quarantined(raw: Path) -> None:
    assert broken_image(raw, encoded(np.zeros((4, 40), np.uint8))).reason == "image too small"
    (raw / "north/img/a.png").unlink()
    assert read(raw)[1][0].reason == "missing image"


@pytest.mark.parametrize(
    ("name", "reason"), [("../../../outside.png", "bad path"), ("link.png", "bad path"), ("/etc/passwd", "missing image")]
)
def test_no_path_leads_out_of_the_raw_folder(raw: Path, name: str, reason: str) -> None:
    write_png(raw.parent / "outside.png", 1)
    (raw / "north/img/link.png").symlink_to(raw.parent / "outside.png")
    append(raw / "north/images.csv", [["a", name, "2021-03-02 05:00:00"]])
    assert [r.reason for r in read(raw)[1]] == [reason]


def test_an_image_with_an_unreadable_time_is_quarantined(raw: Path) -> None:
    append(raw / "north/images.csv", [["a", "a.png", "31.02.2021"]])
    assert [(r.where, r.reason) for r in read(raw)[1]] == [("north/images.csv row 4", "bad time")]


def test_one_image_file_claimed_by_two_subjects_stops_everything(raw: Path) -> None:
    append(raw / "north/images.csv", [["b", "a.png", "2021-03-05 00:00:00"]])
    with pytest.raises(DataError) as caught:
        read(raw)
    assert (
        "north/images.csv row 4: expected an image file of one subject only, found another subject's in north/images.csv row 2."
        in str(caught.value)
    )
    assert "P1" not in str(caught.value)


def test_equal_image_files_have_equal_digests(raw: Path) -> None:
    studies = read(raw)[0]
    # Sites share pictures byte for byte here: prepare sees it by the digest.
    assert studies[0].image_digests["cxr"] == studies[2].image_digests["cxr"] != studies[1].image_digests["cxr"]


def test_deep_images_are_windowed_to_eight_bits(raw: Path) -> None:
    deep = np.array([[1000, 2000], [3000, 5000]], np.uint16).repeat(8, 0).repeat(8, 1)
    (raw / "north/img/a.png").write_bytes(encoded(deep))
    image = read(raw)[0][0].inputs["cxr"][0, ::8, ::8]
    np.testing.assert_array_equal(image, [[0, 64], [128, 255]])
    levels = CARD.replace("height: 32,", "height: 32, levels: [2000, 3000],")
    np.testing.assert_array_equal(read(raw, card=levels)[0][0].inputs["cxr"][0, ::8, ::8], [[0, 0], [255, 255]])


def test_colour_and_alpha_become_the_channels_of_the_card(raw: Path) -> None:
    colour = np.zeros((16, 16, 4), np.uint8)
    colour[..., 0], colour[..., 3] = 255, 255
    (raw / "north/img/a.png").write_bytes(encoded(colour))
    assert int(read(raw)[0][0].inputs["cxr"][0, 0, 0]) == 76
    three = read(raw, card=CARD.replace("height: 32,", "height: 32, channels: 3,"))[0][0].inputs["cxr"]
    np.testing.assert_array_equal(three[:, 0, 0], [255, 0, 0])

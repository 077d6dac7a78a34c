"""Decoding: only what the schema allows, checked before any pixel is decoded."""

import io
import pickle
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from draf_dist.data.decode import MAX_META_BYTES, UndecodableError, decode_image, decode_series, decode_study, max_member_bytes
from draf_dist.data.shards import SampleMeta, encode_meta
from draf_dist.schema.modality import ImageSpec, SeriesSpec, VariableSpec

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def room(*shape: int) -> np.ndarray:
    return np.zeros(shape, dtype=np.uint8)


def test_a_png_comes_back_bit_for_bit() -> None:
    out = room(1, 16, 24)
    decode_image(memoryview(png(PIXELS)), out)
    assert np.array_equal(out[0], PIXELS)


def test_colour_goes_to_the_channel_axis() -> None:
    colour = np.stack([PIXELS, PIXELS // 2, PIXELS // 3], axis=2)
    out = room(3, 16, 24)
    decode_image(png(colour), out)
    assert np.array_equal(out, colour.transpose(2, 0, 1))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_is_decoded_as_its_library_says(channels: int) -> None:
    pixels = np.repeat(PIXELS[:, :, None], channels, axis=2)
    name = {1: "GRAY", 3: "RGB"}[channels]
    data = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=95, colorspace=name, colorsubsampling="444" if channels == 3 else "Gray"
    )
    out = room(channels, 16, 24)
    decode_image(data, out)
    assert np.array_equal(out, simplejpeg.decode_jpeg(data, colorspace=name).transpose(2, 0, 1))


def test_an_image_of_two_channels_is_an_npy() -> None:
    values = np.stack([PIXELS, PIXELS.T.reshape(16, 24)])
    out = room(2, 16, 24)
    decode_image(npy(values), out)
    assert np.array_equal(out, values)


def test_a_series_comes_back_with_its_gaps() -> None:
    values = np.array([[1.5, np.nan], [np.nan, -2.0]], dtype=np.float32)
    out = np.zeros((2, 2), dtype=np.float32)
    decode_series(memoryview(npy(values)), out)
    assert np.array_equal(out, values, equal_nan=True)


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    with pytest.raises(UndecodableError, match="60000x60000"):
        decode_image(bomb, room(1, 16, 24))


@pytest.mark.parametrize("length", [0, 7, 20, 40, 200])
def test_a_truncated_png_is_refused(length: int) -> None:
    with pytest.raises(UndecodableError):
        decode_image(png(PIXELS)[:length], room(1, 16, 24))


def test_any_flipped_byte_is_refused_or_harmless() -> None:
    # The crc32 of the index comes first; this is what remains if a member was written broken.
    data, out = png(PIXELS), room(1, 16, 24)
    for position in range(len(data)):
        broken = bytearray(data)
        broken[position] ^= 0xFF
        try:
            decode_image(bytes(broken), out)
        except UndecodableError:
            continue
        assert out.shape == (1, 16, 24)


@pytest.mark.parametrize("size", [(32, 32), (128, 32), (65, 64), (4000, 4000)])
@pytest.mark.parametrize("last", [True, False])
def test_a_jpeg_of_another_size_is_refused_by_name_in_no_more_memory(size: tuple[int, int], last: bool) -> None:
    data = simplejpeg.encode_jpeg(np.zeros((*size, 3), np.uint8), colorspace="RGB")
    out = np.zeros((64, 64, 3), np.uint8).transpose(2, 0, 1) if last else np.zeros((3, 64, 64), np.uint8)
    tracemalloc.start()
    with pytest.raises(UndecodableError, match=f"a JPEG of {size[1]}x{size[0]} pixels, expected 64x64"):
        decode_image(data, out)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_truncated_jpeg_is_refused() -> None:
    data = simplejpeg.encode_jpeg(PIXELS[:, :, None], colorspace="GRAY", colorsubsampling="Gray")
    for length in (4, 100, len(data) - 40):
        with pytest.raises(UndecodableError):
            decode_image(data[:length], room(1, 16, 24))


@pytest.mark.parametrize("depth", ["I;16", "P", "LA", "1"])
def test_another_depth_or_palette_is_refused(depth: str) -> None:
    buffer = io.BytesIO()
    Image.new(depth, (24, 16)).save(buffer, format="PNG")
    with pytest.raises(UndecodableError, match="expected 24x16, depth 8, colour type 0"):
        decode_image(buffer.getvalue(), room(1, 16, 24))


def test_no_pickle_is_ever_loaded() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}, None], dtype=object), allow_pickle=True)
    for data in (buffer.getvalue(), pickle.dumps([1.0])):
        with pytest.raises(UndecodableError):
            decode_series(data, np.zeros((1, 2), dtype=np.float32))
        with pytest.raises(UndecodableError):
            decode_image(data, room(1, 1, 2))


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((2, 3), dtype=np.float32),
        np.zeros((2, 2), dtype=np.float64),
        np.asfortranarray(np.arange(4, dtype=np.float32).reshape(2, 2)),
        np.array([[np.inf, 0], [0, 0]], dtype=np.float32),
    ],
)
def test_a_series_that_is_not_what_the_schema_says_is_refused(values: np.ndarray) -> None:
    with pytest.raises(UndecodableError):
        decode_series(npy(values), np.zeros((2, 2), dtype=np.float32))


def test_a_series_with_missing_or_surplus_bytes_is_refused() -> None:
    data = npy(np.zeros((2, 2), dtype=np.float32))
    for broken in (data[:-1], data + b"\0", data[:9], data[:60]):
        with pytest.raises(UndecodableError):
            decode_series(broken, np.zeros((2, 2), dtype=np.float32))


def test_the_json_of_a_study_comes_back() -> None:
    meta = SampleMeta(uid=0xABC, subject="0" * 32, site="a", label="yes", quality={"cxr": 0.5})
    assert decode_study(memoryview(encode_meta(meta))) == meta


NO_QUALITY = b'{"uid":"0a","subject":"s","site":"a","label":"yes","quality":[1]}'


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"uid":1}', b"\xff", b"[" * 60_000, b"1" * 30_000, b" " * (MAX_META_BYTES + 1), NO_QUALITY]
)
def test_json_that_is_no_study_is_refused(data: bytes) -> None:
    with pytest.raises(UndecodableError):
        decode_study(data)


def test_the_bound_holds_whatever_an_honest_writer_makes() -> None:
    spec = ImageSpec(name="cxr", height=16, width=24)
    assert len(png(PIXELS)) <= max_member_bytes(spec)
    series = SeriesSpec(name="s", variables=(VariableSpec(name="v"),), num_steps=100_000, step_h=1)
    assert len(npy(np.zeros((100_000, 1), dtype=np.float32))) <= max_member_bytes(series)

"""Image files of an export: found at the anchor, bounded before they are decoded, decoded by an allow-listed decoder."""

import hashlib
import io
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from draf_dist.errors import DataError, explain, together
from draf_dist.sources import tables
from draf_dist.sources.card_model import Card, FileCard, ImageCard
from draf_dist.sources.study_rows import MatchedRows, StudyRows
from draf_dist.sources.tables import Table

_MAX_FILE_BYTES = 128 * 2**20
# The decoder is chosen by content, never by the name: exports with .jpg files that are PNG exist.
_FORMATS = ("PNG", "JPEG")
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "RGBX", "La", "RGBa")


class ImageError(Exception):
    """An image that can't be used: a few short words and what is known beyond them; no name of a file, which may name a subject."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class ImageChoice:
    """The image of one study: its file, relative to the raw folder, and the row that names it."""

    file: str
    row: int


def image_columns(card: Card, image: FileCard) -> set[str]:
    """Columns that a modality of images or volumes needs."""
    table = card.tables[image.table]
    return {name for name in (table.study or table.subject, table.time, image.file) if name is not None}


class FileNames(Protocol):
    """Where files are: the column with their names, and the path that `{site}` and `{file}` complete."""

    @property
    def file(self) -> str:
        """The column."""
        ...

    @property
    def path(self) -> str:
        """Below the raw folder."""
        ...


def choose_images(image: FileNames, table: Table, rows: MatchedRows, *, folder: str) -> dict[int, ImageChoice]:
    """By study, the latest image in its window; of equal times the one further down the file."""
    names = table.text(image.file).to_pylist()
    order = np.lexsort((rows.position, rows.age_us))
    chosen = {int(rows.study[i]): int(rows.position[i]) for i in order if names[rows.position[i]] is not None}
    return {study: ImageChoice(_path(image, names[position], folder), position) for study, position in chosen.items()}


@dataclass
class Claims:
    """Which subject claimed which file, over all sites; kept for one pass, never stored or printed."""

    owner: dict[str, tuple[str, str]]

    def check(self, image: FileNames, table: Table, studies: StudyRows, rows: MatchedRows, *, folder: str) -> None:
        """Notes the files of all rows that belong to a study, inside the window or not.

        Raises:
            DataError: a file that two subjects claim, with the rows that do.
        """
        names = table.text(image.file).to_pylist()
        subjects = studies.subject.to_pylist()
        problems = []
        for position, study in zip(rows.position.tolist(), rows.study.tolist(), strict=True):
            if names[position] is None:
                continue
            place = table.where(position)
            subject, first = self.owner.setdefault(_path(image, names[position], folder), (subjects[study], place))
            if subject != subjects[study]:
                found = f"another subject's in {first}"
                remedy = "The export mixes people up: correct it at the source; nothing was written."
                problems.append(explain(place, expected="an image file of one subject only", found=found, remedy=remedy))
        if problems:
            shown = problems[:20] + ([f"{table.file}: {len(problems) - 20} more of this kind"] if len(problems) > 20 else [])
            raise DataError(together(shown))


def load_image(raw: Path, choice: ImageChoice, card: ImageCard) -> tuple[NDArray[np.uint8], str]:
    """uint8 (C, H, W) and the sha256 of the file.

    Raises:
        ImageError: it is not there, lies outside the raw folder, is too large or small, or can't be decoded.
    """
    try:
        content = _content(raw, choice.file)
    except (OSError, RuntimeError) as error:
        # Their own text names the file. A loop of links is a RuntimeError.
        detail = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "its links form a loop"
        raise ImageError("unreadable image", f"the disk says: {detail}") from error
    return decode(content, card), hashlib.sha256(content).hexdigest()


def _content(raw: Path, file: str) -> bytes:
    path = tables.inside(raw, file)
    if path is None:
        raise ImageError("bad path", "the path leads out of the raw folder, or has a backslash or colon in it")
    if not path.is_file():
        raise ImageError("missing image", "there is no such file")
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise ImageError("image too large", f"the file has more than {_MAX_FILE_BYTES} bytes")
    return path.read_bytes()


def decode(content: bytes, card: ImageCard) -> NDArray[np.uint8]:
    """uint8 (C, H, W) from PNG or JPEG bytes; the size is bounded before any pixel is decoded.

    Raises:
        ImageError: too large, too small, broken, or of another format.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            _check_size(image.size, card)
            # Reads the pixels; a PNG's check sums are tested on the way.
            image.load()
            return _to_uint8(image, card)
    except Image.DecompressionBombError as error:
        raise ImageError("image too large", f"more pixels than {card.max_side_px} x {card.max_side_px}") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise ImageError("broken image", "it is truncated, damaged, or neither PNG nor JPEG") from error


def _check_size(size: tuple[int, int], card: ImageCard) -> None:
    width, height = size
    if max(size) > card.max_side_px:
        raise ImageError("image too large", f"{width} x {height} pixels, the card allows {card.max_side_px} a side")
    if min(size) < card.min_side_px:
        raise ImageError("image too small", f"{width} x {height} pixels, the card asks for {card.min_side_px} a side")


def _to_uint8(image: Image.Image, card: ImageCard) -> NDArray[np.uint8]:
    if image.mode in _EIGHT_BIT_MODES:
        # A palette goes through colour, or its indices would be taken for grey values.
        # By way of RGBA: straight to RGB, Pillow warns of a transparency that nobody asked about.
        colour = image.convert("RGBA").convert("RGB") if image.mode in ("P", "PA") else image
        pixels = np.asarray(colour.convert("L" if card.channels == 1 else "RGB"))
        pixels = pixels if card.levels is None else _levelled(pixels.astype(np.float64), *card.levels)
    else:
        deep = np.asarray(image, dtype=np.float64)
        low, high = card.levels if card.levels is not None else (float(deep.min()), float(deep.max()))
        pixels = _levelled(deep, low, high)
    planes = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)
    return np.ascontiguousarray(np.broadcast_to(planes, (card.channels, *planes.shape[1:])), dtype=np.uint8)


def _levelled(pixels: NDArray[np.float64], low: float, high: float) -> NDArray[np.uint8]:
    """[low, high] to [0, 255], rounded; a constant image is black."""
    scaled = (pixels - low) / (high - low) if high > low else np.zeros_like(pixels)
    return np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8)


def _path(image: FileNames, name: str, folder: str) -> str:
    return image.path.replace("{site}", folder).replace("{file}", name)

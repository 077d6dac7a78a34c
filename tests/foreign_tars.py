"""WebDataset tars as others write them: by webdataset's own writers, and by hand where these refuse."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import simplejpeg
from webdataset.writer import TarWriter

from draf_dist.config.spec import validate_spec
from draf_dist.data.foreign import ForeignTars
from draf_dist.sources.webdataset_card import WebDatasetCard

KEY = b"sixteen or more bytes of key"
HEIGHT, WIDTH = 16, 12
CARD = {
    "kind": "webdataset",
    "name": "wards",
    "licence": {"name": "none"},
    "sites": {"field": "hospital", "groups": {"north": ["n", 1], "south": "s"}},
    "subject": {"field": ["patient", "id"]},
    "label": "finding",
    "labels": {"finding": {"member": "cls", "classes": ["healthy", "ill"]}},
    "modalities": [
        {"kind": "image", "name": "cxr", "member": ["jpg", "png", "npy"], "channels": 3, "height": HEIGHT, "width": WIDTH},
        {"kind": "series", "name": "vitals", "member": "vitals.npy", "num_steps": 4, "step_h": 1, "variables": [
            {"name": "hr", "unit": "1/min", "range": [20, 250]}, {"name": "t"}]},
    ],
}  # fmt: skip
Members = Mapping[str, bytes]


def card(**changes: object) -> WebDatasetCard:
    return validate_spec({**CARD, **changes}, WebDatasetCard, where="card.yaml")


def source(url: Path | str, **changes: object) -> ForeignTars:
    return ForeignTars(card(**changes), str(url))


def picture(i: int) -> bytes:
    pixels = np.random.default_rng(i).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return simplejpeg.encode_jpeg(pixels, quality=90)


def values(i: int) -> np.ndarray:
    found = np.random.default_rng(i).normal(80, 5, (4, 2)).astype(np.float32)
    found[np.random.default_rng(i + 1).random((4, 2)) < 0.3] = np.nan
    return found


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def sample(i: int) -> dict[str, bytes]:
    """The i-th sample: of a patient who has two, at one of two sites; every third lacks the image, every fourth the series."""
    members = {
        "cls": str(i % 2).encode(),
        "json": json.dumps({"hospital": "ns"[i // 2 % 2], "patient": {"id": f"Jane Doe {i // 2}"}}).encode(),
    }
    if i % 3 or not i % 4:
        members["jpg"] = picture(i)
    if i % 4:
        members["vitals.npy"] = npy(values(i))
    return members


def name(i: int) -> str:
    return f"s{i:04d}"


def write(path: Path, samples: Mapping[str, Members]) -> Path:
    """By webdataset's own writer, which takes encoded bytes as they are."""
    with path.open("wb") as file:
        writer = TarWriter(file, encoder=False)
        for key, members in samples.items():
            writer.write({"__key__": key, **members})
        writer.close()
    return path


def write_tars(folder: Path, num_tars: int = 4, per_tar: int = 15) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for tar in range(num_tars):
        numbers = range(tar * per_tar, (tar + 1) * per_tar)
        write(folder / f"wards-{tar:03d}.tar", {name(i): sample(i) for i in numbers})
    return folder


def by_hand(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    """Members in any order, with any name."""
    with tarfile.open(path, "w", format=format) as tar:
        for member, content in members:
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def members_of(samples: Mapping[str, Members]) -> list[tuple[str, bytes]]:
    return [(f"{key}.{extension}", content) for key, members in samples.items() for extension, content in members.items()]

"""The data of the loader benchmark: synthetic JPEGs, the same ones as single files, as WebDataset tars, and joint with other parts.

raw/ one file an image, named by its number. wds/ tars of <key>.jpg, <key>.cls. joint/ tars of the same samples with
<key>.series.npy and <key>.codes.npy, of which (the image included) 30 % are missing, never all. data.json and fingerprints.npy say
what there is; data.json is written last.
"""

import io
import json
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from loader_job import CODES_SHAPE, SERIES_SHAPE, SHARD_BYTES, SIDE, image_fingerprints

MEAN_BYTES = 33_000
MISSING = 0.3
NUM_CLASSES = 8
# The amplitude of the noise decides with the quality how many bytes there are and how long they take to decode.
NOISE = 12.0
NUM_NOISE_FIELDS = 16
PARTS = ("raw", "wds", "joint")
IMAGE = f"  - {{name: image, kind: image, member: jpg, height: {SIDE}, width: {SIDE}, channels: 3}}\n"


@dataclass(frozen=True)
class DataFacts:
    """What data.json says. bytes_of: of all files of a part; joint_images: images of the joint variant."""

    num_images: int
    quality: int
    mean_jpeg_bytes: float
    num_shards: int
    joint_images: int
    bytes_of: dict[str, int]


def make_data(folder: Path, num_images: int) -> DataFacts:
    """Makes the data set, or finds it made."""
    if (folder / "data.json").exists():
        facts = DataFacts(**json.loads((folder / "data.json").read_text()))
        if facts.num_images == num_images:
            return facts
        raise SystemExit(f"{folder} holds {facts.num_images} images, not {num_images}. Name another folder.")
    maker = _Maker(num_images)
    for part in PARTS:
        (folder / part).mkdir(parents=True, exist_ok=True)
    fingerprints, joint_images = _write_all(maker, num_images, folder)
    if len(np.unique(fingerprints)) != num_images:
        raise SystemExit("Two images have the same fingerprint.")  # the check of what was read rests on it
    np.save(folder / "fingerprints.npy", fingerprints)
    bytes_of = {part: sum(path.stat().st_size for path in (folder / part).iterdir()) for part in PARTS}
    num_shards = len(list((folder / "wds").iterdir()))
    facts = DataFacts(num_images, maker.quality, bytes_of["raw"] / num_images, num_shards, joint_images, bytes_of)
    (folder / "data.json").write_text(json.dumps(asdict(facts), indent=1))
    return facts


def raw_name(index: int) -> str:
    return f"{index:06d}.jpg"


def card(*, joint: bool) -> str:
    """What our loader is told of the tars: the card of `draf prepare --from-webdataset`."""
    return (
        "kind: webdataset\n"
        "name: loader-benchmark\n"
        "licence: {name: CC0-1.0, terms: Generated; describes nobody.}\n"
        "sites: {constant: here}\n"
        "split: {files: {train: '*.tar'}, public_subject_key: true}\n"
        "label: class\n"
        f"labels: {{class: {{member: cls, classes: {[f'class_{i}' for i in range(NUM_CLASSES)]}}}}}\n"
        "modalities:\n" + IMAGE + (_other_modalities() if joint else "")
    )


def _other_modalities() -> str:
    (num_steps, num_series), (_, num_codes) = SERIES_SHAPE, CODES_SHAPE
    series = ", ".join(f"{{name: signal_{i}}}" for i in range(num_series))
    codes = ", ".join(f"{{name: code_{i}, type: binary}}" for i in range(num_codes))
    return (
        f"  - {{name: series, kind: series, member: series.npy, num_steps: {num_steps}, step_h: 1, variables: [{series}]}}\n"
        f"  - {{name: codes, kind: table, member: codes.npy, variables: [{codes}]}}\n"
    )


class _Maker:
    """Image i for any i, and the quality at which they have MEAN_BYTES."""

    def __init__(self, num_images: int) -> None:
        rng = np.random.Generator(np.random.Philox(key=1))
        fields = rng.normal(0, NOISE, (NUM_NOISE_FIELDS, SIDE, SIDE, 3)).astype(np.float32)
        # Noise of a pixel's size and of twice that, as of a camera.
        self._fields = fields + np.repeat(np.repeat(fields[:, ::2, ::2], 2, 1), 2, 2)
        self._basis = np.cos(np.pi * np.outer((np.arange(SIDE) + 0.5) / SIDE, np.arange(6))).astype(np.float32)
        sample = [self._pixels(i) for i in range(min(24, num_images))]
        sizes = {quality: np.mean([len(_encode(pixels, quality)) for pixels in sample]) for quality in range(70, 97, 2)}
        self.quality = min(sizes, key=lambda quality: abs(sizes[quality] - MEAN_BYTES))

    def jpeg(self, index: int) -> bytes:
        return _encode(self._pixels(index), self.quality)

    def _pixels(self, index: int) -> np.ndarray:
        """Low cosines with random weights, and a shifted field of noise: a function of the index alone."""
        rng = np.random.Generator(np.random.Philox(key=[2, index]))
        weights = rng.normal(0, 40, (3, 6, 6)).astype(np.float32) / (1 + np.add.outer(np.arange(6), np.arange(6)))
        smooth = np.stack([self._basis @ weights[channel] @ self._basis.T for channel in range(3)], -1)
        field = self._fields[rng.integers(NUM_NOISE_FIELDS)]
        noise = np.roll(field, tuple(rng.integers(0, SIDE, 2)), (0, 1)) * rng.uniform(0.6, 1.4)
        return np.clip(128 + smooth + noise, 0, 255).astype(np.uint8)


def _encode(pixels: np.ndarray, quality: int) -> bytes:
    return simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling="420")


def _write_all(maker: "_Maker", num_images: int, folder: Path) -> tuple[np.ndarray, int]:
    """Writes every part; fingerprints of the images, and how many of them the joint variant has."""
    fingerprints, joint_images = np.zeros(num_images, np.uint64), 0
    plain, joint = _Shards(folder / "wds"), _Shards(folder / "joint")
    for index in range(num_images):
        jpeg, label = maker.jpeg(index), str(index % NUM_CLASSES).encode()
        fingerprints[index] = image_fingerprints(simplejpeg.decode_jpeg(jpeg)[None])[0]
        (folder / "raw" / raw_name(index)).write_bytes(jpeg)
        plain.add(index, {"jpg": jpeg, "cls": label})
        parts = _some_parts(index, jpeg)
        joint_images += "jpg" in parts
        joint.add(index, {**parts, "cls": label})
    plain.close()
    joint.close()
    return fingerprints, joint_images


def _some_parts(index: int, jpeg: bytes) -> dict[str, bytes]:
    """Image, series and codes of a sample, each of them missing with probability MISSING, at least one of them there."""
    rng = np.random.Generator(np.random.Philox(key=[3, index]))
    parts = {
        "jpg": jpeg,
        "series.npy": _npy(rng.normal(0, 1, SERIES_SHAPE)),
        "codes.npy": _npy(rng.integers(0, 2, CODES_SHAPE)),
    }
    there = rng.random(len(parts)) >= MISSING
    there[rng.integers(len(parts))] |= not there.any()
    return {name: data for (name, data), kept in zip(parts.items(), there, strict=True) if kept}


def _npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values.astype(np.float32))
    return stream.getvalue()


class _Shards:
    """Tars of about SHARD_BYTES, one after the other."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._num, self._size = folder, 0, 0
        self._tar: tarfile.TarFile | None = None

    def add(self, index: int, members: dict[str, bytes]) -> None:
        if self._tar is None:
            path = self._folder / f"shard-{self._num:05d}.tar"
            self._tar, self._size = tarfile.TarFile(path, "w", format=tarfile.USTAR_FORMAT), 0
            self._num += 1
        for extension, data in members.items():
            entry = tarfile.TarInfo(f"{index:06d}.{extension}")
            entry.size = len(data)
            self._tar.addfile(entry, io.BytesIO(data))
            self._size += len(data)
        if self._size >= SHARD_BYTES:
            self.close()

    def close(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None

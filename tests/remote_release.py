"""Releases in many shards, quickly made and put into a bucket: an image, a series and codes, 30 % of the parts missing."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import obstore
from foreign_tars import CARD, npy, picture, source, values, write
from foreign_tars import KEY as FOREIGN_KEY
from memory_source import KEY, SCHEMA, MemorySource
from obstore.store import S3Store as Bucket
from PIL import Image

from draf_dist.data.foreign import prepare_foreign
from draf_dist.data.prepare import prepare
from draf_dist.data.release import Release
from draf_dist.data.splits import StudyRow
from draf_dist.schema.modality import DataSchema, ImageSpec
from draf_dist.schema.release import Split
from draf_dist.schema.study import Study
from draf_dist.storage import open_store

# Of the parts that MemorySource leaves, a sixth being missing already; one is left to each sample.
DROPPED = 0.18
UPLOADS = 8


def drop_parts(i: int, study: Study) -> Study:
    draws = np.random.default_rng([i, 7]).random(len(study.inputs))
    kept = {name: part for (name, part), draw in zip(study.inputs.items(), draws, strict=True) if draw >= DROPPED}
    return replace(study, inputs=kept or study.inputs)


def nearly_all_train(
    studies: Iterable[StudyRow], *, held_out_sites: frozenset[str], assigned: Mapping[str, Split] | None = None
) -> dict[str, Split]:
    """Every fiftieth subject validates."""
    subjects = sorted({study.subject for study in studies})
    return {subject: "train" if i % 50 else "val" for i, subject in enumerate(subjects)}


def schema(side: int) -> DataSchema:
    """As that of MemorySource, with square images."""
    image = ImageSpec(name="cxr", height=side, width=side)
    return SCHEMA.model_copy(update={"modalities": (image, *SCHEMA.modalities[1:])})


def own_release(folder: Path, num_samples: int, num_shards: int, side: int = 16) -> Release:
    """About so many samples in about so many shards."""
    made = MemorySource(num_studies=num_samples, image_shape=(1, side, side), schema=schema(side), change=drop_parts)
    # Of a tar: headers and padding of two to four members, and what they hold.
    sample_bytes = 3_500 + side * side
    return prepare(
        made,
        str(folder),
        subject_key=KEY,
        shard_size_bytes=-(-num_samples // num_shards) * sample_bytes,
        rule=nearly_all_train,
    )


def put(folder: Path, url: str) -> None:
    """Copies a data set into a bucket."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client = Bucket(bucket, prefix=prefix, client_options={"allow_http": True})
    paths = [path for path in folder.rglob("*") if path.is_file()]
    with ThreadPoolExecutor(UPLOADS) as pool:
        list(pool.map(lambda path: obstore.put(client, str(path.relative_to(folder)), path), paths))


FOREIGN = {
    **CARD,
    "modalities": [
        {"kind": "image", "name": "cxr", "member": ["jpg", "png"], "channels": 3, "height": 16, "width": 12},
        CARD["modalities"][1],
        {"kind": "table", "name": "codes", "member": "codes.npy", "variables": [
            {"name": "age"}, {"name": "icd", "type": "binary"}]},
    ],
}  # fmt: skip


def foreign_sample(i: int) -> dict[str, bytes]:
    """JPEG or PNG, series and codes, each missing in three of ten."""
    draws = np.random.default_rng([i, 5])
    parts = {"jpg": picture(i), "vitals.npy": npy(values(i)), "codes.npy": npy(np.array([[i % 90, i % 2]], dtype=np.float32))}
    if i % 2:
        parts["png"] = png(i)
        del parts["jpg"]
    kept = {name: part for name, part in parts.items() if draws.random() >= 0.3} or parts
    patient = f'{{"hospital": "{"ns"[i // 2 % 2]}", "patient": {{"id": "Jane Doe {i // 2}"}}}}'
    return {"cls": str(i % 2).encode(), "json": patient.encode(), **kept}


def png(i: int) -> bytes:
    buffer = BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 12, 3), dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def foreign_release(folder: Path, url: str, num_samples: int, num_tars: int) -> Release:
    """Tars in `url`/tars, indexed in place by a data set in `url`/wards."""
    folder.mkdir()
    store = open_store(f"{url}/tars")
    size = num_samples // num_tars
    for number in range(num_tars):
        samples = {f"s{i:05d}": foreign_sample(i) for i in range(number * size, (number + 1) * size)}
        store.upload(f"w-{number:03d}.tar", write(folder / f"w-{number:03d}.tar", samples))
    changes = {"modalities": FOREIGN["modalities"]}
    return prepare_foreign(source(f"{url}/tars", **changes), f"{url}/wards", subject_key=FOREIGN_KEY)

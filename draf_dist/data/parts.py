"""The small files of a release and what its manifest says of them."""

import hashlib
import io
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from draf_dist.data.gather import Row
from draf_dist.data.receipts import receipt
from draf_dist.data.release import SUBJECTS_SCHEMA, version_of
from draf_dist.data.splits import component_of
from draf_dist.schema.modality import DataSchema
from draf_dist.schema.record import Record
from draf_dist.schema.release import SPLITS, Quarantine, Receipt, ReleaseManifest, ReleaseStats, Split, TrainingSums

Counts = dict[str, dict[str, dict[str, int]]]
Parts = Mapping[str, bytes]


def encode_parts(
    schema: DataSchema, stats: ReleaseStats, subjects: pa.Table, quarantine: Quarantine, sums: TrainingSums | None = None
) -> dict[str, bytes]:
    """The files of a release but for release.json, by name. sums.json is only there where sums are given."""
    buffer = io.BytesIO()
    pq.write_table(subjects, buffer, compression="zstd")
    parts = {
        "schema.json": encode_record(schema),
        "stats.json": encode_record(stats),
        "subjects.parquet": buffer.getvalue(),
        "quarantine.json": encode_record(quarantine),
    }
    return parts if sums is None else parts | {"sums.json": encode_record(sums)}


def encode_record(record: Record) -> bytes:
    """A record as it is stored."""
    return record.model_dump_json(indent=2).encode() + b"\n"


def part_digests(parts: Parts) -> dict[str, str]:
    """The fields of a manifest that name its parts: "<stem>_sha256" -> digest."""
    return {f"{name.split('.')[0]}_sha256": hashlib.sha256(data).hexdigest() for name, data in parts.items()}


def finished(draft: ReleaseManifest) -> ReleaseManifest:
    """The manifest with the version that its content gives it."""
    return draft.model_copy(update={"version": version_of(draft)})


def subjects_table(rows: Sequence[Row], splits: Mapping[str, Split]) -> pa.Table:
    """One row a study, in the order of the rows given."""
    columns = {
        "subject": [row.subject for row in rows],
        "site": [row.site for row in rows],
        "split": [splits[component_of(row.subject)] for row in rows],
        "component": [component_of(row.subject) for row in rows],
        "uid": [row.uid for row in rows],
        "label": [row.label for row in rows],
    }
    return pa.table(columns, schema=SUBJECTS_SCHEMA)


def count(schema: DataSchema, rows_by_split: Mapping[Split, Sequence[Row]]) -> Counts:
    """Site -> split -> {"studies": n, "<modality>": n present, "<label>": n masks}, zeros included."""
    counts: Counts = {
        site: {split: dict.fromkeys(("studies", *schema.stored_names), 0) for split in SPLITS} for site in schema.sites
    }
    for split, rows in rows_by_split.items():
        for row in rows:
            for name in ("studies", *row.present):
                counts[row.site][split][name] += 1
    return counts


def receipts(rows_by_split: Mapping[Split, Sequence[Row]]) -> dict[Split, Receipt]:
    """The receipt of every split."""
    return {split: receipt(np.array([row.uid for row in rows], dtype=np.int64)) for split, rows in rows_by_split.items()}

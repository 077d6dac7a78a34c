"""A child release: its parent's shards, in the same order, and behind them those of one delivery."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from draf_dist.continual.fit import joined_held_out_sites, joined_schema
from draf_dist.data.gather import Row
from draf_dist.data.pack import by_split
from draf_dist.data.parent import Parent, find_parent
from draf_dist.data.parts import Counts, count, encode_parts, finished, part_digests, receipts, subjects_table
from draf_dist.data.receipts import add_receipts
from draf_dist.data.release import Release, load_release, what_is_there
from draf_dist.data.splits import StudyRow, assign_splits, component_of
from draf_dist.data.stats import StatsBuilder
from draf_dist.errors import SpecError, explain
from draf_dist.schema.label_text import read_label, stratum
from draf_dist.schema.modality import DataSchema
from draf_dist.schema.release import SPLITS, DeliveryRecord, Quarantine, ReleaseManifest, ShardRecord, Split
from draf_dist.sources.base import Source
from draf_dist.storage import Store


@dataclass(frozen=True)
class Base:
    """The release that a delivery builds on. schema, held_out_sites: those of the child."""

    parent: Parent
    release: Release
    schema: DataSchema
    held_out_sites: frozenset[str]

    def without_new_sites(self) -> "Base":
        """For a delivery that adds no study: then it adds no site either."""
        return replace(self, schema=self.release.schema, held_out_sites=frozenset(self.release.manifest.held_out_sites))


@dataclass(frozen=True)
class Addition:
    """What a delivery adds to a base. rows: in the order of their uids. splits: component -> split, of old and new.

    quarantine: of the delivery alone.
    """

    base: Base
    rows: Sequence[Row]
    splits: Mapping[str, Split]
    record: DeliveryRecord
    quarantine: Quarantine

    @property
    def rows_by_split(self) -> dict[Split, list[Row]]:
        """The new rows of every split."""
        return by_split(self.rows, self.splits)

    @property
    def counts(self) -> Counts:
        """Of the new rows."""
        return count(self.base.schema, self.rows_by_split)


def find_base(store: Store, url: str, source: Source, subject_key: bytes) -> Base:
    """The newest release, after the checks that need nothing but its small files.

    Raises:
        SpecError: there is none, or the card does not fit it.
        DataError: it is broken.
        GateError: it was made with another subject key.
    """
    parent = find_parent(store, url, source.name, subject_key)
    if parent.version is None:
        remedy = "Make the first one with draf prepare."
        raise SpecError(explain(url, expected="a release", found=what_is_there(store), remedy=remedy))
    release = load_release(url, store, parent.version)
    schema = joined_schema(release.schema, source.schema, f"card {source.name} for {release.pinned_url}")
    held_out = joined_held_out_sites(release.schema, release.manifest.held_out_sites, source)
    return Base(parent, release, schema, held_out)


def without_moves(base: Base, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Rows that can go in, and those of a subject who trains, validates or tests and was now seen at a held-out site.

    The subject's split stays for ever, and a held-out site is for `ood` alone, so such a study can go nowhere.
    """
    assigned = base.parent.assigned or {}
    fits: list[Row] = []
    moves: list[Row] = []
    for row in rows:
        stays = row.site not in base.held_out_sites or assigned.get(component_of(row.subject), "ood") == "ood"
        (fits if stays else moves).append(row)
    return fits, moves


def continued_splits(base: Base, rows: Sequence[Row]) -> dict[str, Split]:
    """Component -> split: old ones keep theirs, new ones go on from the counts of all."""
    studies = [*_old_studies(base), *(StudyRow(row.subject, row.site, row.stratum) for row in rows)]
    return assign_splits(studies, held_out_sites=base.held_out_sites, assigned=base.parent.assigned)


def child_release(
    added: Addition, shards: Sequence[ShardRecord], statistics: StatsBuilder
) -> tuple[ReleaseManifest, dict[str, bytes]]:
    """The manifest of the child and its small files, by name."""
    base, parent = added.base, added.base.release.manifest
    subjects = pa.concat_tables([base.release.subjects(), subjects_table(added.rows, added.splits)])
    quarantine = _together(base.release.quarantine(), added.quarantine, added.record.delivery_id)
    parts = encode_parts(base.schema, statistics.result(), subjects.sort_by("uid").combine_chunks(), quarantine, statistics.sums())
    added_receipts = receipts(added.rows_by_split)
    changes = {
        "parent": parent.version,
        **part_digests(parts),
        "held_out_sites": tuple(sorted(base.held_out_sites)),
        "counts": _sum_of_counts(parent.counts, added.counts),
        "quarantined": quarantine.reasons,
        "receipts": {split: add_receipts(parent.receipts[split], added_receipts[split]) for split in SPLITS},
        "shards": (*parent.shards, *shards),
        "deliveries": (*parent.deliveries, added.record),
    }
    return finished(parent.model_copy(update=changes)), parts


def _old_studies(base: Base) -> Iterator[StudyRow]:
    columns = base.release.subjects().select(["subject", "site", "label"]).to_pydict()
    for subject, site, label in zip(columns["subject"], columns["site"], columns["label"], strict=True):
        yield StudyRow(subject, site, stratum(read_label(base.schema.label, label)))


def _sum_of_counts(parent: Counts, added: Counts) -> Counts:
    """Site by site; the child has every site of the parent."""
    zeros = {split: dict.fromkeys(cell, 0) for splits in added.values() for split, cell in splits.items()}
    return {
        site: {
            split: {name: parent.get(site, zeros)[split][name] + number for name, number in cell.items()}
            for split, cell in splits.items()
        }
        for site, splits in added.items()
    }


def _together(parent: Quarantine, added: Quarantine, delivery_id: str) -> Quarantine:
    """What was left out so far and by this delivery, under whose id its places stand."""
    places = tuple(study.model_copy(update={"where": f"{delivery_id}: {study.where}"}) for study in added.studies)
    return Quarantine(
        num_studies=parent.num_studies + added.num_studies,
        limit=max(parent.limit, added.limit),
        reasons=dict(sorted((Counter(parent.reasons) + Counter(added.reasons)).items())),
        studies=(*parent.studies, *places),
        out_of_range=dict(sorted((Counter(parent.out_of_range) + Counter(added.out_of_range)).items())),
    )

"""Deliveries whose studies are computed: a sealed folder and the source that stands for it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from memory_source import KEY, SCHEMA, MemorySource

from draf_dist.continual.ingest import Ingested, ingest
from draf_dist.data.release import Release
from draf_dist.schema.identity import study_uid
from draf_dist.schema.modality import DataSchema
from draf_dist.schema.study import Rejection, Study
from draf_dist.sources.delivery import seal

EAST = SCHEMA.model_copy(update={"sites": ("east", "north", "south")})


@dataclass
class MemoryDelivery(MemorySource):
    """Studies [first, first + num_studies) of the same endless source; with its schema's sites, so EAST brings a new one."""

    first: int = 60
    num_studies: int = 20
    held_out_sites: frozenset[str] = frozenset()

    def studies(self) -> Iterator[Study | Rejection]:
        for i in range(self.first, self.first + self.num_studies):
            yield self.change(i, self._study(i))


def at(site: str) -> "MemoryDelivery":
    """A delivery of one site alone, old or new."""
    sites = (site, *(other for other in SCHEMA.sites if other != site))
    return MemoryDelivery(schema=SCHEMA.model_copy(update={"sites": sites}), change=lambda i, study: replace(study, site=site))


def sealed(folder: Path, delivery_id: str = "first", content: str = "raw", **about: object) -> Path:
    """A folder with one file, sealed. What the file holds stands for the studies of a MemoryDelivery."""
    (folder / "east").mkdir(parents=True)
    (folder / "east" / "stays.csv").write_text(content)
    seal(folder, delivery_id, **about)  # type: ignore[arg-type]
    return folder


def take_in(release: Release, source: MemorySource, folder: Path, **options: object) -> Ingested:
    return ingest(source, folder, release.url, subject_key=KEY, **options)  # type: ignore[arg-type]


def content(release: Release) -> dict[str, bytes]:
    root = Path(release.url)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def uid_of(study: Study) -> int:
    return study_uid(KEY, site=study.site, subject=study.subject, anchor=study.anchor)


def splits_of(release: Release) -> dict[int, str]:
    return dict(zip(release.subjects()["uid"].to_pylist(), release.subjects()["split"].to_pylist(), strict=True))


def changed_schema(**changes: object) -> DataSchema:
    """The schema with fields of its second modality, the vitals, replaced."""
    image, vitals, history = SCHEMA.modalities
    return SCHEMA.model_copy(update={"modalities": (image, vitals.model_copy(update=changes), history)})

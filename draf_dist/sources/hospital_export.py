"""Any folder of images and CSV tables that a card describes, as studies; one site at a time, so memory is bounded by one site."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from draf_dist.errors import DataError, SpecError, explain, together
from draf_dist.schema.modality import DataSchema
from draf_dist.schema.study import MaskLabel, RawVolume, Rejection, Study
from draf_dist.sources import records, site_column
from draf_dist.sources.base import SourceCounts, TableCounts, VariableCounts
from draf_dist.sources.card_checks import check_card
from draf_dist.sources.card_model import Card, FileCard, ImageCard, ModalityCard, SiteColumn, VolumeCard
from draf_dist.sources.find_columns import Columns, find_columns
from draf_dist.sources.images import Claims, ImageChoice, ImageError, choose_images, image_columns, load_image
from draf_dist.sources.study_masks import SiteMasks, mask_names, site_masks
from draf_dist.sources.study_rows import StudyRows, count_rows, in_window, join_rows, read_studies, study_columns
from draf_dist.sources.tables import NO_TIME, Table, TableFile, find_table, read_table


class HospitalExport:
    """The source of kind `hospital_export`: a card and the raw folder that it describes.

    recorded: what the release holds that the export goes into. Where the card takes columns by pattern or list, those of the
    release are taken; without one, those that the export has.

    Raises:
        SpecError: the card contradicts itself, or there is no such folder.
        DataError: columns that the card takes by pattern or list are not there as it says.
    """

    def __init__(self, card: Card, raw: Path, recorded: DataSchema | None = None) -> None:
        check_card(card, where=f"card {card.name}")
        if not raw.is_dir():
            raise SpecError(explain(str(raw), expected="a folder", found="none", remedy="Give the raw export's folder with --raw."))
        self.card = card
        self.raw = raw
        self.name = card.name
        self.columns = find_columns(card, raw, recorded)
        wide = {name: tuple(spec for one in taken for spec in one.specs()) for name, taken in self.columns.items()}
        self.schema = card.data_schema(wide)
        self.held_out_sites = frozenset(card.split.held_out_sites)
        self.public_subject_key = card.split.public_subject_key
        self.card_sha256 = card.sha256
        self.counts = self._no_counts()

    def _no_counts(self) -> SourceCounts:
        left_out = {f"{name}: {one.card.title()}": one.left_out for name, taken in self.columns.items() for one in taken}
        return SourceCounts(columns_left_out={title: number for title, number in left_out.items() if number})

    def studies(self) -> Iterator[Study | Rejection]:
        """Every study once: sites in the card's order, within a site in the order of the studies table.

        Raises:
            DataError: the export as a whole does not fit the card. Files and columns of all sites are checked before the first
                study is yielded; units and images claimed twice when their site is read.
        """
        self.counts = self._no_counts()
        reader = _Reader(self.card, self.raw, self.columns)
        reader.check()
        claims = Claims({})
        keys = _StudyKeys(self.card)
        for site in self.card.sites.names():
            studies, rejections = _studies_of_site(self.card, reader, site)
            yield from rejections
            keys.check(studies)
            yield from self._site_studies(reader, claims, studies)

    def _site_studies(self, reader: "_Reader", claims: Claims, studies: StudyRows) -> Iterator[Study | Rejection]:
        content = _SiteContent()
        problems = []
        for modality in self.card.modalities:
            if not _is_recorded(modality, studies.site, self.columns):
                continue
            try:
                self._read_modality(reader, claims, studies, modality, content)
            except DataError as error:
                problems.append(str(error))
        if problems:
            raise DataError(together(problems))
        subjects = studies.subject.to_pylist()
        num_masks = 0
        for i in range(len(studies)):
            study = self._study(studies, content, i, subjects[i])
            num_masks += isinstance(study, Study) and study.mask is not None
            yield study
        if content.masks is not None:
            self._count_masks(content.masks.card.modality, studies.site, num_masks)

    def _count_masks(self, modality: str, site: str, num_masks: int) -> None:
        """A wrong path looks as if nobody had outlined anything, so that is told."""
        counts = self.counts.variables.setdefault(f"{modality}.{self.card.label}", VariableCounts())
        counts.observed += num_masks
        if not num_masks:
            counts.empty_at.append(site)

    def _read_modality(
        self, reader: "_Reader", claims: Claims, studies: StudyRows, modality: ModalityCard, content: "_SiteContent"
    ) -> None:
        table = reader.table(modality.table, studies.site)
        rows = join_rows(self.card, modality.table, table, studies)
        tally = self.counts.tables.setdefault(f"{modality.name}.{modality.table}", TableCounts())
        count_rows(rows, table, tally, shared=reader.is_shared(modality.table))
        inside = in_window(rows, modality.window_h, tally)
        if not isinstance(modality, ImageCard | VolumeCard):
            wide = self.columns.get(modality.name, ())
            parts = records.Extract(self.card, studies.site, modality, table, inside, len(studies), wide)
            content.values[modality.name] = records.extract(parts, self.counts.variables)
            return
        folder = self.card.sites.folder(studies.site)
        claims.check(modality, table, studies, rows, folder=folder)
        chosen = choose_images(modality, table, inside, folder=folder)
        content.images[modality.name] = (modality, table, chosen)
        content.masks = site_masks(self.card, modality, table, studies, inside, chosen, claims) or content.masks
        # Whether an image with an unreadable time is from before the anchor can't be known, and it may be the one that counts.
        undated = rows.select(rows.age_us == NO_TIME)
        content.undated |= dict(zip(undated.study.tolist(), map(table.where, undated.position.tolist()), strict=True))

    def _study(self, studies: StudyRows, content: "_SiteContent", i: int, subject: str) -> Study | Rejection:
        if i in content.undated:
            return Rejection(studies.site, content.undated[i], "bad time", "the time of an image is missing or unreadable")
        inputs: dict[str, NDArray[np.uint8] | NDArray[np.float32]] = {}
        volumes: dict[str, RawVolume] = {}
        digests: dict[str, str] = {}
        mask: RawVolume | None = None
        for modality in self.card.modalities:
            values = content.values.get(modality.name)
            if values is not None and not np.isnan(values[i]).all():
                inputs[modality.name] = values[i]
            if isinstance(modality, ImageCard | VolumeCard) and modality.name in content.images:
                _, table, chosen = content.images[modality.name]
                if i not in chosen:
                    continue
                try:
                    if isinstance(modality, VolumeCard):
                        volumes[modality.name], digests[modality.name] = _load_volume(self.raw, chosen[i], modality)
                        if content.masks is not None and content.masks.card.modality == modality.name:
                            mask = content.masks.read(self.raw, i, volumes[modality.name])
                    else:
                        inputs[modality.name], digests[modality.name] = load_image(self.raw, chosen[i], modality)
                except ImageError as error:
                    return Rejection(studies.site, table.where(chosen[i].row), error.reason, error.detail)
        if not inputs and not volumes:
            return Rejection(studies.site, studies.where(i), "no input", "no modality has anything in its window")
        anchor, label = studies.anchor_text[i], studies.label[i]
        assert label is not None, "rejected when the studies were read"
        return Study(
            subject,
            studies.site,
            anchor,
            inputs,
            label if mask is None else MaskLabel(drawn=True),
            image_digests=digests,
            where=studies.where(i),
            volumes=volumes,
            mask=mask,
        )


class HospitalExportCard(Card):
    """The card of kind `hospital_export`."""

    def build(self, raw: Path, recorded: DataSchema | None = None) -> HospitalExport:
        """The source that reads a raw folder by this card. recorded: see HospitalExport.

        Raises:
            SpecError: there is no such folder.
            DataError: columns that the card takes by pattern or list are not there as it says.
        """
        return HospitalExport(self, raw, recorded)


@dataclass
class _SiteContent:
    """What one site holds. values: modality -> (n, T, F).

    images: modality of images or volumes -> its card, table, choice by study.
    undated: study -> the place of an image whose time is not known. masks: of the modality that the label is about.
    """

    values: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    images: dict[str, tuple[FileCard, Table, dict[int, ImageChoice]]] = field(default_factory=dict)
    undated: dict[int, str] = field(default_factory=dict)
    masks: SiteMasks | None = None


class _Reader:
    """Tables of an export: each read once per site with all columns that anything needs; files of all sites are kept."""

    def __init__(self, card: Card, raw: Path, columns: Columns) -> None:
        self._card = card
        self._raw = raw
        self._columns = columns
        self._site = ""
        self._tables: dict[str, Table] = {}

    def is_shared(self, name: str) -> bool:
        """Whether one file serves all sites."""
        return "{site}" not in self._card.tables[name].path

    def check(self) -> None:
        """Looks for the files and columns of all sites.

        Raises:
            DataError: what is missing, all files together.
        """
        problems: dict[str, None] = {}
        seen: set[tuple[str, str]] = set()
        for site in self._card.sites.names():
            for name in self._needed(site):
                # A file of all sites is one file, and may have thousands of columns.
                key = (name, "" if self.is_shared(name) else site)
                if key in seen:
                    continue
                seen.add(key)
                try:
                    self._find(name, site)
                except DataError as error:
                    problems[str(error)] = None
        if problems:
            raise DataError(together(problems))

    def table(self, name: str, site: str) -> Table:
        """A table of a site; what earlier sites alone needed is dropped."""
        if site != self._site:
            self._tables = {kept: table for kept, table in self._tables.items() if self.is_shared(kept)}
            self._site = site
        if name not in self._tables:
            self._tables[name] = read_table(self._find(name, site), self._card.table(name), missing=self._card.missing)
        return self._tables[name]

    def _find(self, name: str, site: str) -> TableFile:
        sites = self._card.sites.names() if self.is_shared(name) else (site,)
        columns = set().union(*(self._needed(one).get(name, set()) for one in sites))
        folder = self._card.sites.folder(site)
        return find_table(self._raw, self._card.table(name), site=site, folder=folder, columns=columns)

    def _needed(self, site: str) -> dict[str, set[str]]:
        """Table -> columns that a site needs."""
        card = self._card
        needed = {card.studies.table: study_columns(card)}
        if isinstance(card.sites, SiteColumn):
            needed[card.studies.table].add(card.sites.column)
        for modality in card.modalities:
            if not _is_recorded(modality, site, self._columns):
                continue
            if isinstance(modality, ImageCard | VolumeCard):
                columns = image_columns(card, modality)
                if (names := mask_names(card, modality)) is not None:
                    columns.add(names.file)
            else:
                columns = records.record_columns(card, modality, site, self._columns.get(modality.name, ()))
            needed.setdefault(modality.table, set()).update(columns)
        return needed


class _StudyKeys:
    """Study ids of earlier sites, where a file that all sites share is joined by them: there the same id would mix two sites up."""

    def __init__(self, card: Card) -> None:
        joined = [card.tables[modality.table] for modality in card.modalities if modality.table != card.studies.table]
        self._matter = any(table.study is not None and "{site}" not in table.path for table in joined)
        self._seen: set[str] = set()

    def check(self, studies: StudyRows) -> None:
        """Notes the ids of a site.

        Raises:
            DataError: an id that an earlier site used.
        """
        if not self._matter or studies.study_key is None:
            return
        new = set(studies.study_key.to_pylist())
        if again := len(new & self._seen):
            found = f"{again} that another site uses too"
            remedy = "Give every site its own files ({site} in paths), or make the ids unique."
            raise DataError(
                explain(f"{studies.table.file}: site {studies.site}", expected="study ids of its own", found=found, remedy=remedy)
            )
        self._seen |= new


def _load_volume(raw: Path, choice: ImageChoice, card: VolumeCard) -> tuple[RawVolume, str]:
    # pydicom and nibabel take seconds to import, and most exports have no volumes.
    from draf_dist.sources.volume_files import load_volume

    return load_volume(raw, choice.file, card)


def _is_recorded(modality: ModalityCard, site: str, columns: Columns) -> bool:
    if isinstance(modality, ImageCard | VolumeCard):
        return site not in modality.absent_at
    return records.is_recorded(modality, site, columns.get(modality.name, ()))


def _studies_of_site(card: Card, reader: _Reader, site: str) -> tuple[StudyRows, list[Rejection]]:
    table = reader.table(card.studies.table, site)
    if not isinstance(card.sites, SiteColumn):
        return read_studies(card, table, site, np.arange(table.num_rows, dtype=np.int64))
    index = site_column.site_index(card.sites, table)
    place = card.sites.names().index(site)
    studies, rejections = read_studies(card, table, site, np.flatnonzero(index == place))
    # Rows of no site are told once, with the first.
    return studies, (site_column.unknown_sites(table, index) if place == 0 else []) + rejections

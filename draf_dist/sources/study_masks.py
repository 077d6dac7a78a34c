"""The masks of one site's studies: of each study that of the very image that was chosen for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from draf_dist.schema.study import RawVolume
from draf_dist.sources.card_model import Card, FileCard
from draf_dist.sources.card_segmentation import SegmentationCard
from draf_dist.sources.images import Claims, ImageChoice, choose_images
from draf_dist.sources.study_rows import MatchedRows, StudyRows
from draf_dist.sources.tables import Table


@dataclass(frozen=True)
class MaskNames:
    """Where the card says that masks are. file: the column; path: with `{site}` and `{file}`."""

    file: str
    path: str


@dataclass(frozen=True)
class SiteMasks:
    """Study -> its mask's file, which may not be there, and the row that names it and its image."""

    card: SegmentationCard
    chosen: Mapping[int, ImageChoice]

    def read(self, raw: Path, study: int, image: RawVolume) -> RawVolume | None:
        """The mask of a study whose volume is `image`; None where there is none.

        Raises:
            ImageError: see load_mask.
        """
        if study not in self.chosen:
            return None
        # As volume_files in hospital_export: nibabel takes seconds to import.
        from draf_dist.sources.mask_files import load_mask

        return load_mask(raw, self.chosen[study].file, self.card, image)


def mask_names(card: Card, modality: FileCard) -> MaskNames | None:
    """Where the masks of a modality are; None where the label is not about it."""
    label = card.chosen_label
    if not isinstance(label, SegmentationCard) or label.modality != modality.name:
        return None
    return MaskNames(label.file or modality.file, label.path)


def site_masks(
    card: Card,
    modality: FileCard,
    table: Table,
    studies: StudyRows,
    inside: MatchedRows,
    images: Mapping[int, ImageChoice],
    claims: Claims,
) -> SiteMasks | None:
    """The masks of a modality's images at one site; None where the label is not about it.

    Raises:
        DataError: a file that two subjects claim.
    """
    names, label = mask_names(card, modality), card.chosen_label
    if names is None or not isinstance(label, SegmentationCard):
        return None
    folder = card.sites.folder(studies.site)
    claims.check(names, table, studies, inside, folder=folder)
    found = choose_images(names, table, inside, folder=folder)
    return SiteMasks(label, {i: one for i, one in found.items() if i in images and images[i].row == one.row})

"""Splits of foreign tars: ours by subject, or those that the names of the tars tell."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from draf_dist.data.foreign_tars import LISTED_TARS, ForeignTar
from draf_dist.data.gather import Row
from draf_dist.data.splits import SplitRule, StudyRow, assign_splits, component_of
from draf_dist.errors import DataError, SpecError, explain, together
from draf_dist.schema.release import Split
from draf_dist.sources.webdataset_card import FixedSplit, WebDatasetCard, repeats


def check_names(card: WebDatasetCard, tars: Sequence[ForeignTar]) -> None:
    """Raises SpecError for a tar of no split or of two, and for two of one name where the name is a part of the key."""
    problems = []
    for tar in tars if card.split.files else ():
        if len(splits := splits_of_name(card, tar.name)) != 1:
            found = f"it under {' and '.join(splits)}" if splits else "none"
            problems.append(explain(tar.url, expected="one pattern of the card's split.files", found=found, remedy="Mend them."))
    if card.keys == "per_tar" and (repeated := repeats(tar.name for tar in tars)):
        expected, found = "tars with names of their own, for `keys: per_tar`", ", ".join(repeated[:LISTED_TARS])
        problems.append(explain(card.name, expected=expected, found=f"{found} twice", remedy="Rename them."))
    if problems:
        raise SpecError(together(problems[:LISTED_TARS]))


def splits_of_name(card: WebDatasetCard, name: str) -> list[FixedSplit]:
    """The splits whose patterns the name of a tar fits."""
    patterns = ((split, pattern) for split in card.split.files for pattern in card.split.patterns(split))
    return list(dict.fromkeys(split for split, pattern in patterns if fnmatchcase(name, pattern)))


def split_rule(card: WebDatasetCard, tars: Sequence[ForeignTar], rows: Sequence[Sequence[Row | None]]) -> SplitRule:
    """Ours, or that of the names of the tars. rows: of each tar.

    Raises:
        DataError: a subject in tars of two splits.
    """
    if not card.split.files:
        return assign_splits
    fixed: dict[str, Split] = {}
    num_torn = 0
    for tar, of_tar in zip(tars, rows, strict=True):
        split = splits_of_name(card, tar.name)[0]
        num_torn += sum(fixed.setdefault(component_of(row.subject), split) != split for row in of_tar if row is not None)
    if num_torn:
        found_text = f"{num_torn} samples whose subject is also in a tar of another split"
        remedy = "Leave out split.files: subjects are then divided anew."
        raise DataError(
            explain(f"{card.name}: split.files", expected="every subject in one split", found=found_text, remedy=remedy)
        )
    return _FixedSplits(fixed)


@dataclass(frozen=True)
class _FixedSplits:
    """The rule of data/splits.py for subjects whose split is given; held-out sites go before it."""

    fixed: Mapping[str, Split]

    def __call__(
        self, studies: Iterable[StudyRow], *, held_out_sites: frozenset[str], assigned: Mapping[str, Split] | None = None
    ) -> dict[str, Split]:
        """See SplitRule.

        Raises:
            DataError: an earlier release put a subject into another split.
        """
        splits = dict(self.fixed)
        for study in studies:
            if study.site in held_out_sites:
                splits[component_of(study.subject)] = "ood"
        num_moved = sum((assigned or {}).get(component, split) != split for component, split in splits.items())
        if num_moved:
            expected, found = "every subject in the split that an earlier release gave it", f"{num_moved} that would move"
            raise DataError(explain("split.files", expected=expected, found=found, remedy="Prepare to a new URL."))
        return splits

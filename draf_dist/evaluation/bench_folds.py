"""The folds of a benchmark: every site is held out once, and each fold is a release of its own."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from draf_dist.config.spec import fingerprint
from draf_dist.data.parent import key_check
from draf_dist.data.prepare import prepare
from draf_dist.data.release import HEAD, Release, open_release
from draf_dist.data.splits import StudyRow, component_of, strata
from draf_dist.errors import DataError, SpecError, explain
from draf_dist.evaluation.bench_missing import KEY, LossLaw, MissingFromStart, MissingSource, fit_loss
from draf_dist.noise import chain
from draf_dist.schema.label_text import num_strata, stratum
from draf_dist.schema.record import Record
from draf_dist.schema.release import Split
from draf_dist.schema.study import Study
from draf_dist.sources.base import Source
from draf_dist.sources.card import AnyCard
from draf_dist.storage import Store, open_store

PLAN, RELEASES = "folds.json", "releases"
# Of the subjects that are not held out, in twentieths: the fold itself is the test set, so none is spent on another.
VALIDATION_SHARE, WHOLE = 3, 20
Integers = NDArray[np.int64]


class Fold(Record):
    """The sites that one fold holds out, and how many of their studies are of each class."""

    sites: tuple[str, ...]
    class_counts: tuple[int, ...]


class FoldPlan(Record):
    """folds.json. identity: sha256 of what decides the folds and their releases."""

    identity: str
    folds: tuple[Fold, ...]

    @property
    def num_studies(self) -> int:
        """Studies of all folds."""
        return sum(sum(fold.class_counts) for fold in self.folds)


@dataclass(frozen=True)
class Export:
    """A raw export and how it is read. missing: what its studies lose first."""

    card: AnyCard
    raw: Path
    missing: MissingFromStart | None = None

    def source(self, held_out_sites: tuple[str, ...] = ()) -> Source:
        """Its studies."""
        split = self.card.split.model_copy(update={"held_out_sites": held_out_sites})
        source = self.card.model_copy(update={"split": split}).build(self.raw)
        return source if self.missing is None or self._law is None else MissingSource(source, self.missing, self._law)

    @cached_property
    def _law(self) -> LossLaw | None:
        """One for all folds."""
        return None if self.missing is None else fit_loss(self.card.build(self.raw), self.missing)


def identity_of(card: AnyCard, missing: MissingFromStart | None, num_folds: int, seed: int, subject_key: bytes) -> str:
    """What decides the folds and their releases but for the raw files: 64 hex digits."""
    decides = {"card": card.sha256, "folds": num_folds, "seed": seed, "key": key_check(subject_key)}
    return fingerprint(decides if missing is None else {**decides, KEY: missing.model_dump()})


def count_sites(source: Source) -> dict[str, Integers]:
    """Site -> studies of every class (of other labels: stratum), int64 (K,)."""
    counts: dict[str, Integers] = defaultdict(lambda: np.zeros(num_strata(source.schema.label), dtype=np.int64))
    for study in source.studies():
        if isinstance(study, Study):
            counts[study.site][stratum(study.label)] += 1
    return dict(counts)


def divide_sites(counts: Mapping[str, Integers], num_folds: int, seed: int) -> tuple[Fold, ...]:
    """Every site in one fold, the folds even in each class.

    Sites are taken with the most of the rarest class first, ties by keyed hash; each goes where the sum over folds and classes of
    (share of the class)^2 grows least, the first such fold.

    Raises:
        SpecError: fewer sites than folds.
    """
    if len(counts) < num_folds:
        remedy = "Lower `folds`; as many folds as sites leave one site out at a time."
        expected = f"at most {len(counts)}, the sites with studies"
        raise SpecError(explain("folds", expected=expected, found=str(num_folds), remedy=remedy))
    totals = np.maximum(np.sum(list(counts.values()), axis=0), 1)
    rarest_first = np.argsort(totals, kind="stable")

    def place(site: str) -> tuple[int, ...]:
        return (*(-int(counts[site][label]) for label in rarest_first), chain(seed, "bench", "fold", site))

    loads = np.zeros((num_folds, len(totals)))
    sites: list[list[str]] = [[] for _ in range(num_folds)]
    for site in sorted(counts, key=place):
        share = counts[site] / totals
        chosen = int(np.argmin((2 * loads * share).sum(axis=1)))
        loads[chosen] += share
        sites[chosen].append(site)
    return tuple(_fold(sorted(names), counts) for names in sites)


def split_of_fold(
    studies: Iterable[StudyRow], *, held_out_sites: frozenset[str], assigned: Mapping[str, Split] | None = None
) -> dict[str, Split]:
    """The rule of a fold's release: components at its sites are `ood`, 15 % of the others `val`, the rest `train`, none `test`.

    Within a class (whether the outcome ever occurred) components are taken in keyed-hash order over all sites: with a few studies
    of the rare class a site, shares within each site would leave it out of validation. `assigned` is not looked at: the fold of a
    benchmark is made once, from one export.
    """
    studies = list(studies)
    held_out = {component_of(study.subject) for study in studies if study.site in held_out_sites}
    splits: dict[str, Split] = dict.fromkeys(held_out, "ood")
    seen: dict[int, int] = defaultdict(int)
    for component, (_, label) in sorted(strata(studies).items()):
        if component not in held_out:
            before, seen[label] = seen[label], seen[label] + 1
            is_due = VALIDATION_SHARE * seen[label] // WHOLE > VALIDATION_SHARE * before // WHOLE
            splits[component] = "val" if is_due else "train"
    return splits


def make_plan(export: Export, identity: str, num_folds: int, seed: int, store: Store) -> FoldPlan:
    """The plan in the benchmark's folder, written there at the first call; afterwards the raw export is not read again.

    Raises:
        SpecError: the folder holds a benchmark of another card, other folds or another subject key; fewer sites than folds.
        DataError: folds.json is damaged.
    """
    if store.exists(PLAN):
        return _read_plan(store, identity)
    plan = FoldPlan(identity=identity, folds=divide_sites(count_sites(export.source()), num_folds, seed))
    store.write(PLAN, plan.model_dump_json(indent=1).encode() + b"\n")
    return plan


def fold_url(store: Store, number: int) -> str:
    """URL of the data set of one fold."""
    return f"{store.url.rstrip('/')}/{RELEASES}/fold-{number}"


def fold_release(export: Export, plan: FoldPlan, number: int, store: Store, subject_key: bytes) -> Release:
    """The release of one fold, prepared unless it is there."""
    url = fold_url(store, number)
    if open_store(url).exists(HEAD):
        return open_release(url)
    return prepare(export.source(plan.folds[number].sites), url, subject_key=subject_key, rule=split_of_fold)


def check_fold(release: Release, fold: Fold) -> Integers:
    """The uids that this fold predicts: studies at its sites, all of them in `ood`, as is every other study of their subjects.

    A subject with studies at several sites is `ood` in the fold of each; every fold counts only the studies at its own sites, so
    each study is predicted once, by a model that saw none of its subject's.

    Raises:
        DataError: a subject of the fold takes part in training or validation.
    """
    table = release.subjects()
    site, split = np.array(table["site"].to_pylist()), np.array(table["split"].to_pylist())
    component = np.array(table["component"].to_pylist())
    mine = np.isin(site, fold.sites)
    touched = np.isin(component, component[mine])
    if (split[touched] != "ood").any():
        found = f"{int((split[touched] != 'ood').sum())} of their studies elsewhere"
        remedy = "Remove the fold's release and run the same command again."
        raise DataError(explain(release.pinned_url, expected="all subjects of the fold in ood", found=found, remedy=remedy))
    uids: Integers = table["uid"].to_numpy()[mine]
    return uids


def all_uids(releases: Sequence[Release]) -> Integers:
    """The studies that all folds share, sorted.

    Raises:
        DataError: two folds were made from different exports.
    """
    every = [np.sort(release.subjects()["uid"].to_numpy()) for release in releases]
    for release, uids in zip(releases, every, strict=True):
        if not np.array_equal(uids, every[0]):
            remedy = "Remove the benchmark's folder releases/ and run the same command again."
            raise DataError(explain(release.pinned_url, expected="the studies of the other folds", found="others", remedy=remedy))
    return every[0]


def _fold(names: Sequence[str], counts: Mapping[str, Integers]) -> Fold:
    return Fold(sites=tuple(names), class_counts=tuple(int(n) for n in np.sum([counts[name] for name in names], axis=0)))


def _read_plan(store: Store, identity: str) -> FoldPlan:
    where, remedy = store.where(PLAN), "Choose another --out."
    try:
        plan = FoldPlan.model_validate_json(store.read(PLAN))
    except ValidationError as error:
        raise DataError(explain(where, expected="a plan of folds", found="something else", remedy=remedy)) from error
    if plan.identity != identity:
        found = "one of another card, other folds, another missing_from_start or another DRAF_SUBJECT_KEY"
        raise SpecError(explain(where, expected="the plan of this benchmark", found=found, remedy=remedy))
    return plan

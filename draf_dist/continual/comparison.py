"""Champion and challenger on the same studies: what the challenger costs, overall and per site, with bounds over subjects."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
from pydantic import Field

from draf_dist.continual.policy import GatePolicy
from draf_dist.evaluation.follow_up import FollowUp
from draf_dist.evaluation.predictions import Predictions
from draf_dist.evaluation.scoring import TASKS, AnyScores, scores_of, task_of
from draf_dist.evaluation.statistics import Estimate, Floats, Resamples, Rows, estimate
from draf_dist.evaluation.task_scores import TaskName
from draf_dist.schema.record import Record

NO_AUROC = Estimate(value=None, reason="times have no AUROC")
# Replicates held in memory at once.
_CHUNK = 256
# Standard errors below these are rounding: of a slice in nats, of a resample as a share of the slice's.
_NO_SPREAD, _NO_SPREAD_IN_RESAMPLE = 1e-9, 1e-6


class Slice(Record):
    """Champion and challenger on the studies of one site, or on all (site None). Everything in nats is a mean over studies.

    harm: NLL(challenger) - NLL(champion). lower: bound that true harm exceeds with confidence 1 - alpha / tests, tests being the
    slices with enough subjects; upper: bound that it stays below with confidence 1 - alpha; upper_shared: the same with alpha
    shared among the slices that may show an improvement. All null where fewer than two subjects are, each where so few subjects
    differ from the others that the holdout does not bound the harm. sd: of what one subject adds
    to harm: sd / sqrt(subjects) is the standard error of harm. is_new: the champion was not trained on the site. champion,
    challenger: metrics by name, null where not defined. auroc_difference: challenger - champion, with its two-sided 95 %
    interval; c_index_difference: the same, of times. negative_flips: share of studies that the champion gets right and the
    challenger wrong; positive_flips: the reverse; null of times, which are neither.
    """

    site: str | None
    is_new: bool
    num_studies: int
    num_subjects: int
    margin: float
    harm: float | None = None
    lower: float | None = None
    upper: float | None = None
    upper_shared: float | None = None
    sd: float | None = None
    champion: dict[str, float | None] = {}
    challenger: dict[str, float | None] = {}
    auroc_difference: Estimate = Estimate(value=None, reason="no studies")
    negative_flips: float | None = None
    positive_flips: float | None = None
    c_index_difference: Estimate | None = Field(None, exclude_if=lambda found: found is None)


class Comparison(Record):
    """All studies of the holdout, then every site in alphabetical order. Unlabelled studies take no part.

    num_tests: slices that are tested for harm. num_improvements: slices that may show an improvement.
    """

    num_unlabelled: int
    num_tests: int
    num_improvements: int
    overall: Slice
    sites: tuple[Slice, ...]
    task: TaskName = Field("class", exclude_if=lambda task: task == "class")

    @property
    def slices(self) -> tuple[Slice, ...]:
        """All of them, overall first."""
        return (self.overall, *self.sites)


@dataclass(frozen=True)
class _Pair:
    """Both models on n labelled studies. subject, site: (n,)."""

    champion: AnyScores
    challenger: AnyScores
    subject: Rows
    site: np.ndarray[tuple[int], np.dtype[np.str_]]

    @property
    def harm(self) -> Floats:
        """NLL of the challenger less that of the champion, by study, (n,)."""
        return self.challenger.pointwise_nll() - self.champion.pointwise_nll()

    def rows(self, index: Rows) -> "_Pair":
        """Some of the studies."""
        return _Pair(self.champion.rows(index), self.challenger.rows(index), self.subject[index], self.site[index])


def compare(
    champion: Predictions,
    challenger: Predictions,
    subjects: Mapping[int, int],
    policy: GatePolicy,
    *,
    champion_sites: Collection[str] | None = None,
    trained_sites: Collection[str] = (),
    follow_up: FollowUp | None = None,
) -> Comparison:
    """Paired differences on the labelled studies, bootstrapped over subjects with the same resamples on both sides.

    Studentised bounds (Efron and Tibshirani, An Introduction to the Bootstrap, 12.5): where few studies carry most of the harm,
    percentiles would call it small too often. Alpha of harm is divided by the number of slices tested (Bonferroni). The levels
    hold for harm that the holdout shows: what happens to no subject in it, no resampling bounds.

    Args:
        champion: temperature-scaled predictions of the holdout.
        challenger: those of the same studies.
        subjects: uid -> number of the subject.
        policy: levels, replicates, margins.
        champion_sites: sites that the champion was trained on, None for all.
        trained_sites: sites that are listed even where the holdout has no study of them.
        follow_up: of the champion's training subjects, where times are predicted: the scores reported of both are corrected by it.

    Raises:
        ValueError: the two sides are not of the same studies.
    """
    pair, num_unlabelled = _paired(champion, challenger, subjects, follow_up)
    names = sorted(set(pair.site.tolist()) | set(trained_sites))
    rows = {name: np.flatnonzero(pair.site == name) for name in names}
    parts = {name: pair.rows(index) for name, index in rows.items()}
    enough = [name for name, part in parts.items() if len(np.unique(part.subject)) >= policy.min_subjects]
    new = {name for name in names if champion_sites is not None and name not in champion_sites}
    num_tests, num_improvements = 1 + len(enough), 1 + len(new.intersection(enough))
    levels, task = _Levels(policy, num_tests, num_improvements), task_of(champion)
    return Comparison(
        num_unlabelled=num_unlabelled,
        num_tests=num_tests,
        num_improvements=num_improvements,
        overall=_slice(pair, levels, task, site=None, is_new=False),
        sites=tuple(_slice(part, levels, task, site=name, is_new=name in new) for name, part in parts.items()),
        task=task,
    )


@dataclass(frozen=True)
class _Levels:
    policy: GatePolicy
    num_tests: int
    num_improvements: int

    def bounds(self, harm: float, standard_error: float, studentised: Floats) -> dict[str, float | None]:
        """The three bounds of a slice, None for one at infinity.

        studentised: (harm of a resample - harm) / its own standard error, (R,); infinite where a resample has no spread.
        """
        if standard_error < _NO_SPREAD:
            return dict.fromkeys(("lower", "upper", "upper_shared"), harm)
        alpha = self.policy.alpha
        # Order statistics: between two infinite ones nothing can be interpolated.
        lower = np.quantile(studentised, 1 - alpha / self.num_tests, method="higher")
        upper, shared = np.quantile(studentised, (alpha, alpha / self.num_improvements), method="lower")
        bounds = {
            name: harm - float(t) * standard_error for name, t in (("lower", lower), ("upper", upper), ("upper_shared", shared))
        }
        return {name: bound if np.isfinite(bound) else None for name, bound in bounds.items()}


class _BySubject:
    """Harm as a ratio of sums over subjects: d_i summed harm and n_i studies of subject i; harm = sum d_i / sum n_i.

    Linearised (Cochran, Sampling Techniques, 2.11) subject i adds (d_i - harm n_i) / mean(n) to it, so the standard error is
    sqrt(sum_i (d_i - harm n_i)^2) / sum n_i. With one study a subject d_i is the paired difference.
    """

    def __init__(self, harm: Floats, subject: Rows) -> None:
        _, self.first_row, index = np.unique(subject, return_index=True, return_inverse=True)
        self.count = np.bincount(index).astype(np.float64)
        # About the mean: where subjects hardly differ, squares of d itself would be lost to rounding.
        self.excess = np.bincount(index, weights=harm - harm.mean())

    def excess_harm(self, drawn: Floats) -> tuple[Floats, Floats]:
        """Harm less that of the slice, and its standard error, when subject i is drawn so often, drawn (R, subjects); (R,) each."""
        d, n = self.excess, self.count
        studies = drawn @ n
        mean = drawn @ d / studies
        squares = drawn @ d**2 - 2 * mean * (drawn @ (d * n)) + mean**2 * (drawn @ n**2)
        return mean, np.sqrt(np.maximum(squares, 0)) / studies

    def studentised(self, drawn: Floats, standard_error: float) -> Floats:
        """Excess harm over its standard error in every resample; as far off as can be where a resample has no spread."""
        mean, error = self.excess_harm(drawn)
        has_spread = error > _NO_SPREAD_IN_RESAMPLE * standard_error
        return np.divide(mean, error, out=np.copysign(np.inf, mean), where=has_spread)


def _paired(
    champion: Predictions, challenger: Predictions, subjects: Mapping[int, int], follow_up: FollowUp | None
) -> tuple[_Pair, int]:
    """Both sides in the order of uids, so that the order of shards plays no part; and how many studies have no label."""
    before, after = (side.rows(np.argsort(side.uid, kind="stable")) for side in (champion, challenger))
    if not (np.array_equal(before.uid, after.uid) and np.array_equal(before.target, after.target)):
        raise ValueError("a paired comparison needs the same studies with the same labels on both sides")
    known_before, known_after = before.labelled(), after.labelled()
    subject = np.array([subjects[int(uid)] for uid in known_before.uid], dtype=np.int64)
    pair = _Pair(scores_of(known_before, follow_up), scores_of(known_after, follow_up), subject, known_before.site)
    return pair, before.num_studies - known_before.num_studies


def _slice(pair: _Pair, levels: _Levels, task: TaskName, *, site: str | None, is_new: bool) -> Slice:
    policy, harm = levels.policy, pair.harm
    resamples = Resamples(pair.subject, replicates=policy.replicates, seed=policy.seed)
    about = Slice(
        site=site,
        is_new=is_new,
        num_studies=len(harm),
        num_subjects=resamples.num_subjects,
        margin=policy.overall_margin if site is None else policy.site_margin,
    )
    if not len(harm):
        return about
    found = {
        "harm": float(harm.mean()),
        "champion": _metrics(pair.champion),
        "challenger": _metrics(pair.challenger),
        **_flips(pair),
    }
    if resamples.num_subjects >= 2:
        by_subject = _BySubject(harm, pair.subject)
        error = float(by_subject.excess_harm(np.ones((1, resamples.num_subjects)))[1][0])
        studentised, replicates = _replicates(pair, by_subject, error, resamples)
        primary = TASKS[task].primary
        value = pair.challenger.short()[primary] - pair.champion.short()[primary]
        sd = error * resamples.num_subjects / np.sqrt(resamples.num_subjects - 1)
        found |= {**levels.bounds(float(harm.mean()), error, studentised), "sd": sd}
        found |= {"auroc_difference": NO_AUROC, f"{primary}_difference": estimate(value, replicates)}
    return about.model_copy(update=found)


def _metrics(scored: AnyScores) -> dict[str, float | None]:
    return {name: Estimate.of(value).value for name, value in scored.short().items()}


def _flips(pair: _Pair) -> dict[str, float]:
    """Both kinds; none where a prediction is neither right nor wrong."""
    before, after = pair.champion.right(), pair.challenger.right()
    if before is None or after is None:
        return {}
    return {"negative_flips": float(np.mean(before & ~after)), "positive_flips": float(np.mean(~before & after))}


def _replicates(pair: _Pair, by_subject: _BySubject, standard_error: float, resamples: Resamples) -> tuple[Floats, Floats]:
    """Studentised harm and difference of the primary metric in every resample, (R,) each."""
    studentised, differences = [], []
    for counts in _counts(resamples):
        # All studies of a subject are drawn together.
        studentised.append(by_subject.studentised(counts[:, by_subject.first_row], standard_error))
        differences.append(pair.challenger.primary_of_resamples(counts) - pair.champion.primary_of_resamples(counts))
    return np.concatenate(studentised), np.concatenate(differences)


def _counts(resamples: Resamples) -> Iterator[Floats]:
    """How often each study occurs, (replicates, n), a bounded number of replicates at a time."""
    drawn = iter(resamples)
    while chunk := list(islice(drawn, _CHUNK)):
        yield np.array([np.bincount(rows, minlength=resamples.num_rows) for rows in chunk], dtype=np.float64)

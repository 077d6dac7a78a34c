"""Scores of labels and times: what is not observed plays no part, resamples are the plain ones, censoring is that of training."""

import numpy as np
import pytest
from task_predictions import EDGES, of_labels, of_times

from draf_dist.evaluation.answers import TimeAnswers
from draf_dist.evaluation.follow_up import FollowUp
from draf_dist.evaluation.label_scores import METRICS as LABEL_METRICS
from draf_dist.evaluation.label_scores import LabelScores
from draf_dist.evaluation.scoring import TASKS, scores_of
from draf_dist.evaluation.time_scores import METRICS as TIME_METRICS
from draf_dist.evaluation.time_scores import TimeScores
from draf_dist.metrics import multilabel
from draf_dist.metrics.classification import auroc
from draf_dist.metrics.survival import (
    Censoring,
    brier_score,
    concordance_index,
    concordance_index_ipcw,
    concordance_of_resamples,
    integrated_brier_score,
    survival_at,
)


def followed() -> FollowUp:
    """Other subjects with the hazards of `of_times`, as training subjects."""
    train = of_times(3000, seed=9).answers
    assert isinstance(train, TimeAnswers)
    return FollowUp(Censoring.of(train.time.astype(np.float64), train.event), EDGES, 16.0)


def labels(**changes: float) -> LabelScores:
    found = scores_of(of_labels(**changes).labelled(), None)
    assert isinstance(found, LabelScores)
    return found


def times(n: int = 200, follow_up: FollowUp | None = None, **changes: float) -> TimeScores:
    found = scores_of(of_times(n, **changes).labelled(), follow_up or followed())
    assert isinstance(found, TimeScores)
    return found


def counts(n: int, replicates: int = 20) -> tuple[np.ndarray, np.ndarray]:
    drawn = np.random.default_rng(3).integers(0, n, (replicates, n))
    return drawn, np.array([np.bincount(rows, minlength=n) for rows in drawn], dtype=np.float64)


def test_every_metric_of_a_task_is_named_and_computed() -> None:
    for scored, metrics in ((labels(), LABEL_METRICS), (times(), TIME_METRICS)):
        found = scored.all(threshold=0.5, risk=0.1)
        assert list(found) == list(metrics)
        assert np.isfinite(list(found.values())).all()
        assert set(scored.short()) <= set(metrics)
    for task in TASKS.values():
        assert {task.primary, *task.columns} <= set(task.metrics)


def test_means_over_labels_are_those_of_the_metrics() -> None:
    scored = labels()
    short, each = scored.short(), (scored.probability, scored.label, scored.observed)
    assert short["auroc"] == multilabel.auroc(*each).mean
    assert short["auroc"] == pytest.approx(np.mean([scored.only(k).short()["auroc"] for k in range(3)]))
    assert short["brier"] == pytest.approx(np.mean([scored.only(k).short()["brier"] for k in range(3)]))
    assert scored.all(threshold=0.5, risk=0.1)["nll_macro"] == multilabel.negative_log_likelihood(*each).mean


def test_what_was_not_observed_plays_no_part() -> None:
    scored = labels()
    garbage = np.where(scored.observed, scored.probability, 0.999)
    turned = LabelScores(garbage, np.where(scored.observed, scored.label, True), scored.observed, scored.epistemic)
    assert turned.all(threshold=0.5, risk=0.1) == pytest.approx(scored.all(threshold=0.5, risk=0.1))
    assert (turned.right() == scored.right()).all()


def test_the_nll_of_a_study_is_the_mean_over_its_known_labels() -> None:
    scored = LabelScores(
        np.array([[0.8, 0.3], [0.9, 0.5]]),
        np.array([[True, False], [True, False]]),
        np.array([[True, True], [True, False]]),
        np.zeros(2),
    )
    assert scored.pointwise_nll() == pytest.approx([-(np.log(0.8) + np.log(0.7)) / 2, -np.log(0.9)])
    assert scored.short()["nll"] == pytest.approx(scored.pointwise_nll().mean())


def test_fast_resamples_are_the_plain_ones() -> None:
    for scored in (labels(), times()):
        n = len(scored.pointwise_nll())
        drawn, counted = counts(n)
        name = "auroc" if isinstance(scored, LabelScores) else "c_index"
        plain = [scored.rows(rows).short()[name] for rows in drawn]
        assert scored.primary_of_resamples(counted) == pytest.approx(plain)


def test_resampled_concordance_counts_ties_like_the_plain_one() -> None:
    generator = np.random.default_rng(0)
    time, risk = generator.integers(1, 6, 600).astype(np.float64), generator.integers(0, 4, 600).astype(np.float64)
    event = generator.random(600) < 0.5
    drawn, counted = counts(600, 5)
    plain = [concordance_index(time[rows], event[rows], risk[rows]) for rows in drawn]
    assert concordance_of_resamples(time, event, risk, counted) == pytest.approx(plain)
    nobody = concordance_of_resamples(time, np.zeros(600, dtype=np.bool_), risk, counted)
    assert np.isnan(nobody).all()


def test_scores_of_times_are_those_of_the_metrics() -> None:
    follow_up, scored = followed(), times()
    short, grid = scored.short(), follow_up.grid
    predicted = survival_at(scored.hazard, np.array(EDGES), grid)
    each = (scored.time, scored.event)
    assert short["c_index"] == concordance_index(*each, scored.risk)
    assert short["c_index_ipcw"] == concordance_index_ipcw(*each, scored.risk, follow_up.censoring, tau=16.0)
    assert short["ibs"] == pytest.approx(integrated_brier_score(*each, predicted, grid, follow_up.censoring))
    at_the_end = brier_score(*each, predicted, grid, follow_up.censoring)[-1]
    assert scored.all(threshold=0.5, risk=0.1)["brier_horizon"] == pytest.approx(at_the_end)


def test_the_true_hazards_score_best() -> None:
    """Planted truth: bent hazards rank alike, and are worse by every score that asks for probabilities."""
    true, bent = times(4000).short(), times(4000, sharpness=2.5).short()
    assert bent["c_index"] == pytest.approx(true["c_index"], abs=0.02)
    assert true["nll"] < bent["nll"] - 0.05
    assert true["ibs"] < bent["ibs"] - 0.005


def test_uno_s_index_does_not_depend_on_how_the_studies_were_censored() -> None:
    """Long and short follow-up of the same subjects: reweighted each by its own censoring the numbers agree, Harrell's do not."""
    long, short = (_two_of_one_truth(leaving) for leaving in (1e6, 6.0))
    assert short["c_index_ipcw"] == pytest.approx(long["c_index_ipcw"], abs=0.015)
    assert short["ibs"] == pytest.approx(long["ibs"], abs=0.01)
    assert abs(short["c_index"] - long["c_index"]) > 0.02


def _two_of_one_truth(leaving: float) -> dict[str, float]:
    """The risk says much of the first months and nothing of later ones."""
    generator = np.random.default_rng(2)
    n = 12_000
    early, late = generator.exponential(1 / np.exp(generator.normal(-2.5, 1.5, n))), 3 + generator.exponential(8, n)
    risk = -np.log(early) + generator.normal(0, 1, n)
    death = np.minimum(early, late)
    leaves = generator.exponential(leaving, n)
    time, event = np.minimum(death, leaves), death < leaves
    halves = slice(0, n // 2), slice(n // 2, n)
    follow_up = FollowUp(Censoring.of(time[halves[0]], event[halves[0]]), (2.0, 5.0, 9.0), 9.0)
    test = halves[1]
    hazard = 1 / (1 + np.exp(-(risk[test, None] - 2 + np.zeros(4))))
    interval = np.searchsorted(follow_up.edges, time[test], side="right")
    return TimeScores.of(hazard, time[test], event[test], interval, follow_up).short()


def test_without_a_horizon_survival_has_no_score_but_the_ranking_has() -> None:
    blind = FollowUp(Censoring.of(np.array([0.0]), np.array([False])), EDGES, 0.0)
    short = times(follow_up=blind).short()
    assert np.isnan([short["ibs"], short["c_index_ipcw"]]).all()
    assert np.isfinite([short["c_index"], short["nll"]]).all()


def test_times_are_neither_right_nor_wrong() -> None:
    assert times().right() is None
    assert labels().right().dtype == np.bool_


def test_one_label_as_a_class_is_ranked_alike() -> None:
    scored = labels()
    one = scored.as_classes(1)
    assert auroc(one.probability, one.label) == scored.only(1).short()["auroc"]
    assert one.probability.sum(1) == pytest.approx(1)

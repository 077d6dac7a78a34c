from dataclasses import replace

import numpy as np
import pytest
from hand_made_predictions import studies

from draf_dist.errors import DataError
from draf_dist.evaluation.bench_scores import (
    Pooled,
    differences_of,
    floor_of,
    metrics_of,
    over_seeds,
    pool,
    primary_by_fold,
    primary_by_seed,
    replicate,
    seed_test,
)
from draf_dist.evaluation.predictions import concatenate
from draf_dist.evaluation.statistics import Resamples
from draf_dist.metrics.classification import auroc


def pooled(probability: np.ndarray, label: np.ndarray, fold: np.ndarray | None = None) -> Pooled:
    n = len(label)
    both = np.stack([1 - probability, probability], axis=1)
    return Pooled(np.arange(n), np.zeros(n, dtype=np.int64) if fold is None else fold, label, both)


@pytest.fixture
def labels() -> np.ndarray:
    return (np.random.default_rng(1).random(200) < 0.3).astype(np.int64)


@pytest.fixture
def scores(labels: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.random.default_rng(2).normal(labels * 1.5 - 1, 1)))


def resamples(n: int) -> Resamples:
    return Resamples(np.arange(n) // 2, replicates=100, seed=0)


def test_a_system_that_loses_the_same_on_every_study_differs_by_exactly_that(labels: np.ndarray, scores: np.ndarray) -> None:
    # The probability of the label is multiplied by e^-0.1, so NLL rises by .1 nats on every study, whoever is drawn.
    right = np.where(labels == 1, scores, 1 - scores) * np.exp(-0.1)
    worse = np.where(labels == 1, right, 1 - right)
    both = pooled(worse, labels)
    both.probability[np.arange(len(labels)), 1 - labels] = 0
    found = replicate({"ours": (both,), "reference": (pooled(scores, labels),)}, resamples(len(labels)))
    nll = differences_of(found["ours"], found["reference"])["nll"]
    assert (nll.value, nll.low, nll.high) == pytest.approx((0.1, 0.1, 0.1), abs=1e-12)


def test_a_monotone_change_leaves_the_ranking_without_a_difference(labels: np.ndarray, scores: np.ndarray) -> None:
    found = replicate({"a": (pooled(scores**2, labels),), "b": (pooled(scores, labels),)}, resamples(len(labels)))
    auroc_difference = differences_of(found["a"], found["b"])["auroc"]
    assert (auroc_difference.value, auroc_difference.low, auroc_difference.high) == (0, 0, 0)
    assert metrics_of(found["a"])["auroc"].value == pytest.approx(auroc(pooled(scores, labels).probability, labels))


def test_numbers_are_the_mean_over_seeds_and_not_those_of_an_ensemble(labels: np.ndarray, scores: np.ndarray) -> None:
    seeds = (pooled(scores, labels), pooled(1 - scores, labels))
    found = metrics_of(replicate({"both": seeds}, resamples(len(labels)))["both"])
    assert found["auroc"].value == pytest.approx(0.5)
    assert sum(primary_by_seed(seeds)) == pytest.approx(1)


def test_the_interval_is_over_training_seeds_too() -> None:
    # Two seeds that differ by 1 on every study: a resample holds none, one or two of the second with chance 1/4, 1/2, 1/4.
    found = over_seeds(np.stack([np.zeros(4001), np.ones(4001)]), seed=0)
    assert found[0] == 0.5
    assert [np.mean(found[1:] == share) for share in (0, 0.5, 1)] == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


def test_one_seed_leaves_the_subjects_alone() -> None:
    values = np.random.default_rng(0).random((1, 50))
    assert np.array_equal(over_seeds(values, seed=5), values[0])


def test_systems_meet_the_same_seeds_so_that_what_they_share_cancels(labels: np.ndarray, scores: np.ndarray) -> None:
    seeds = [pooled(scores, labels), pooled(scores**2, labels)]
    shifted = [
        replace(each, probability=np.stack([1 - each.probability[:, 1] / 2, each.probability[:, 1] / 2], 1)) for each in seeds
    ]
    found = replicate({"a": seeds, "b": shifted}, resamples(len(labels)))
    auroc_difference = differences_of(found["a"], found["b"])["auroc"]
    assert (auroc_difference.value, auroc_difference.low, auroc_difference.high) == (0, 0, 0)


def test_a_seed_that_is_not_drawn_may_be_undefined() -> None:
    values = np.stack([np.zeros(41), np.full(41, np.nan)])
    found = over_seeds(values, seed=0)
    assert np.isnan(found[0])
    assert 0 < np.isnan(found[1:]).sum() < 40


def test_the_interval_is_over_subjects_whose_studies_stay_together(labels: np.ndarray, scores: np.ndarray) -> None:
    """Copies of every study under the same subject add nothing: the interval stays as wide as that of one copy."""
    once = replicate({"s": (pooled(scores, labels),)}, Resamples(np.arange(200), replicates=400, seed=0))
    copies = (pooled(np.tile(scores, 4), np.tile(labels, 4)),)
    kept = replicate({"s": copies}, Resamples(np.tile(np.arange(200), 4), replicates=400, seed=0))
    loose = replicate({"s": copies}, Resamples(np.arange(800), replicates=400, seed=0))
    widths = [float(np.ptp(np.quantile(found["s"]["auroc"][1:], [0.025, 0.975]))) for found in (once, kept, loose)]
    assert widths[1] == pytest.approx(widths[0])
    assert widths[2] < 0.7 * widths[0]


def test_folds_are_scored_apart(labels: np.ndarray, scores: np.ndarray) -> None:
    fold = np.arange(200) % 2
    by_fold = primary_by_fold((pooled(scores, labels, fold),), 2)
    both = pooled(scores, labels).probability
    assert by_fold == pytest.approx([auroc(both[fold == k], labels[fold == k]) for k in (0, 1)])


def test_perfect_calibration_lies_at_the_floor() -> None:
    generator = np.random.default_rng(3)
    probability = generator.uniform(0.05, 0.95, 2000)
    system = (pooled(probability, (generator.random(2000) < probability).astype(np.int64)),)
    floor = floor_of(system, 0)
    ece = metrics_of(replicate({"s": system}, Resamples(np.arange(2000), replicates=0, seed=0))["s"])["ece"]
    assert 0 < floor.mean < floor.high < 0.05
    assert ece.value is not None
    assert ece.value < 1.3 * floor.high


def test_a_study_predicted_by_two_folds_counts_in_its_own_alone() -> None:
    first, _ = studies(100, seed=0)
    second, _ = studies(100, seed=1)
    # Ten of the second fold's subjects have a study at a site of the first too, so both folds' models predict it.
    travellers = second.rows(np.arange(10))
    wrong = replace(travellers, probability=1 - travellers.probability)
    parts = [concatenate([wrong, first]), second]
    found = pool(parts, [1.0, 1.0], [first.uid, second.uid], everything=np.concatenate([first.uid, second.uid]))
    assert np.array_equal(found.uid, np.sort(np.concatenate([first.uid, second.uid])))
    assert np.allclose(found.probability[found.fold == 1], second.probability)
    assert np.bincount(found.fold).tolist() == [100, 100]


@pytest.mark.parametrize("keep", [slice(0, 99), slice(0, 100)])
def test_a_study_that_is_missing_or_predicted_twice_is_refused(keep: slice) -> None:
    first, _ = studies(100, seed=0)
    part = first.rows(np.arange(100)[keep])
    parts = [part, part] if part.num_studies == 100 else [part]
    with pytest.raises(DataError, match="100 studies, each once"):
        pool(parts, [1.0] * len(parts), [first.uid] * len(parts), everything=first.uid)


def test_each_fold_is_scaled_by_its_own_temperature() -> None:
    first, _ = studies(50, seed=0)
    second, _ = studies(50, seed=1)
    found = pool([first, second], [1.0, 2.0], [first.uid, second.uid], everything=np.concatenate([first.uid, second.uid]))
    odds = second.probability[:, 1].astype(np.float64) / second.probability[:, 0]
    assert np.allclose(found.probability[50:, 1] / found.probability[50:, 0], np.sqrt(odds), rtol=1e-5)
    assert np.allclose(found.probability[:50], first.probability)


def test_seeds_are_compared_in_pairs() -> None:
    """t = mean / (sd / sqrt(n)) of the differences .01, .02, .03: 2 sqrt(3), and t(2) at .975 is 4.303."""
    found = seed_test((0.81, 0.72, 0.93), (0.80, 0.70, 0.90))
    assert found is not None
    assert found.mean == pytest.approx(0.02)
    assert found.high - found.mean == pytest.approx(4.303 * 0.01 / np.sqrt(3), rel=1e-3)
    assert found.p == pytest.approx(0.0742, abs=1e-4)


@pytest.mark.parametrize(("row", "reference"), [((0.8,), (0.7,)), ((0.8, 0.8), (0.7,)), ((0.8, None), (0.7, 0.6))])
def test_what_is_no_pair_of_seeds_is_not_tested(row: tuple[float | None, ...], reference: tuple[float | None, ...]) -> None:
    assert seed_test(row, reference) is None

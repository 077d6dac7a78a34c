"""Counts of masks and maps: the same in one piece and in many, and as good as their stated resolution."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from draf_dist.metrics.segmentation import BIN_WIDTH, NUM_BINS, ErrorDetection, Overlap
from draf_dist.metrics.selective import risk_coverage


def masks() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    true = generator.integers(0, 3, (6, 8, 10))
    return np.where(generator.random(true.shape) < 0.7, true, generator.integers(0, 3, true.shape)), true


def maps(n: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Most voxels are almost certain, as in a real map."""
    generator = np.random.default_rng(1)
    uncertainty = np.exp(generator.normal(-12, 4, n)).astype(np.float32)
    return uncertainty, generator.random(n) < uncertainty / (uncertainty + 1e-4)


def test_dice_of_two_squares() -> None:
    predicted, true = np.zeros((2, 4, 4), dtype=np.int64)
    predicted[:2, :2], true[1:3, :2] = 1, 1
    assert Overlap.of(predicted, true, 3).dice.tolist()[:2] == pytest.approx([2 * 10 / 24, 2 * 2 / 8])
    assert np.isnan(Overlap.of(predicted, true, 3).dice[2])


def test_dice_structure_by_structure() -> None:
    predicted, true = masks()
    found = Overlap.of(predicted.astype(np.uint8), true.astype(np.int16), 4).dice
    for k in range(3):
        both = np.sum((predicted == k) & (true == k))
        assert found[k] == 2 * both / (np.sum(predicted == k) + np.sum(true == k))
    assert np.isnan(found[3])


def test_a_structure_that_is_only_seen_or_only_there_has_a_dice_of_zero() -> None:
    seen, there = Overlap.of(np.ones(5, int), np.zeros(5, int), 3), Overlap.of(np.zeros(5, int), np.ones(5, int), 3)
    assert seen.dice[1] == there.dice[1] == 0.0


def test_parts_of_a_volume_add_up_to_the_whole() -> None:
    predicted, true = masks()
    whole = Overlap.of(predicted, true, 3)
    parts = [Overlap.of(predicted[part], true[part], 3) for part in (slice(4, 6), slice(0, 1), slice(1, 4))]
    summed = parts[0] + parts[1] + parts[2]
    assert summed.dice.tolist() == whole.dice.tolist()
    assert sum(part.dice for part in parts).tolist() != whole.dice.tolist()


def test_the_auroc_of_a_map_is_that_of_its_values_within_the_stated_resolution() -> None:
    uncertainty, error = maps()
    found = ErrorDetection.of(uncertainty, error)
    exact = roc_auc_score(error, uncertainty)
    assert 0 < found.resolution < 0.002
    assert abs(found.auroc - exact) <= found.resolution
    # Of values that the bins can't tell apart, nothing but the bound is left.
    close = (1 + uncertainty / uncertainty.max() * BIN_WIDTH / 2).astype(np.float32)
    coarse = ErrorDetection.of(close, error)
    assert coarse.auroc == coarse.resolution == 0.5
    assert abs(coarse.auroc - roc_auc_score(error, close)) <= coarse.resolution


def test_values_that_stand_in_one_bin_make_the_auroc_exact() -> None:
    """Of a few values far apart, ties and all."""
    generator = np.random.default_rng(2)
    uncertainty = generator.choice([0.0, 0.01, 0.2, 0.3, np.log(2)], 300)
    error = generator.random(300) < 0.2 + uncertainty
    assert ErrorDetection.of(uncertainty, error).auroc == pytest.approx(roc_auc_score(error, uncertainty), abs=1e-12)


def test_bins_are_as_wide_as_they_say() -> None:
    values = np.geomspace(2e-38, 3e38, 20_000).astype(np.float32)
    place = [int(np.flatnonzero(ErrorDetection.of(value[None], np.array([False])).right)[0]) for value in values[::50]]
    assert sorted(place) == place
    assert place[-1] < NUM_BINS
    low = np.float32(0.75)
    together = ErrorDetection.of(np.array([low, low * (1 + 0.99 * BIN_WIDTH * 2 / 3)]), np.array([False, True]))
    apart = ErrorDetection.of(np.array([low, low * (1 + BIN_WIDTH)]), np.array([False, True]))
    assert (together.auroc, together.resolution) == (0.5, 0.5)
    assert (apart.auroc, apart.resolution) == (1.0, 0.0)


def test_voxels_may_come_in_any_parts() -> None:
    uncertainty, error = maps()
    whole = ErrorDetection.of(uncertainty.reshape(20, 20, 10), error.reshape(20, 20, 10))
    summed = ErrorDetection.of(uncertainty[2500:], error[2500:]) + ErrorDetection.of(uncertainty[:2500], error[:2500])
    assert (summed.auroc, summed.resolution) == (whole.auroc, whole.resolution)


def test_what_rounding_put_below_zero_counts_as_zero() -> None:
    found = ErrorDetection.of(np.array([-0.0, -1e-9, 0.0]), np.array([True, False, True]))
    assert (found.right[0], found.wrong[0]) == (1, 2)


def test_a_map_without_an_error_has_no_auroc_and_one_with_nan_is_refused() -> None:
    assert np.isnan(ErrorDetection.of(np.ones(3), np.zeros(3, dtype=bool)).auroc)
    with pytest.raises(ValueError, match="NaN"):
        ErrorDetection.of(np.array([1.0, np.nan]), np.array([True, False]))


def test_risk_among_the_most_certain_voxels_is_that_of_selective_prediction() -> None:
    """Of values far apart, ties and all, at any coverage."""
    generator = np.random.default_rng(3)
    uncertainty = generator.choice([0.0, 0.01, 0.2, 0.3, np.log(2)], 300)
    error = generator.random(300) < 0.1 + uncertainty
    found = ErrorDetection.of(uncertainty, error)
    coverage, risk = risk_coverage(-uncertainty, error)
    assert [found.risk(kept) for kept in coverage] == pytest.approx(risk.tolist())
    assert found.num_voxels == 300
    assert found.risk(1) == pytest.approx(error.mean())
    assert found.risk(0.3) < found.risk(1)


def test_an_uncertainty_that_says_nothing_leaves_the_risk_as_it_is() -> None:
    error = np.arange(40) % 4 == 0
    found = ErrorDetection.of(np.full(40, 0.3), error)
    assert [found.risk(kept) for kept in (0.1, 0.5, 1.0)] == pytest.approx([0.25] * 3)


def test_without_voxels_there_is_no_risk() -> None:
    assert np.isnan(ErrorDetection.of(np.zeros(0), np.zeros(0, dtype=bool)).risk(0.5))

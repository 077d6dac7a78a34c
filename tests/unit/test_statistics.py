"""The subject-level bootstrap covers, keeps subjects together and repeats itself; correlations say when they do not exist."""

import numpy as np
import pytest

from draf_dist.evaluation.statistics import Estimate, Resamples, estimate_all


def test_the_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(150):
        values = generator.normal(size=60)
        interval = estimate_all(
            lambda rows, v=values: {"mean": v[rows].mean()}, Resamples(np.arange(60), replicates=200, seed=trial)
        )
        covered += interval["mean"].low <= 0.0 <= interval["mean"].high
    assert covered / 150 == pytest.approx(0.94, abs=0.05)


def test_studies_of_one_subject_are_drawn_together() -> None:
    subject = np.array([5, 9, 5, 9, 7])
    for rows in Resamples(subject, replicates=20, seed=0):
        counts = np.bincount(rows, minlength=5)
        assert counts[0] == counts[2]
        assert counts[1] == counts[3]
        assert counts[0] + counts[1] + counts[4] == 3


def test_repeating_every_study_does_not_narrow_the_interval() -> None:
    values = np.random.default_rng(1).normal(size=40)
    once = estimate_all(lambda rows: {"mean": values[rows].mean()}, Resamples(np.arange(40), replicates=500, seed=0))["mean"]
    doubled, subject = np.repeat(values, 2), np.repeat(np.arange(40), 2)
    twice = estimate_all(lambda rows: {"mean": doubled[rows].mean()}, Resamples(subject, replicates=500, seed=0))["mean"]
    naive = estimate_all(lambda rows: {"mean": doubled[rows].mean()}, Resamples(np.arange(80), replicates=500, seed=0))["mean"]
    assert twice.high - twice.low == pytest.approx(once.high - once.low, rel=1e-9)
    assert naive.high - naive.low < 0.85 * (once.high - once.low)


def test_the_same_seed_gives_the_same_resamples() -> None:
    first, second = (list(Resamples(np.arange(9), replicates=5, seed=3)) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))


def test_a_number_that_rarely_exists_gets_no_interval_but_a_reason() -> None:
    label = np.array([1] + [0] * 9)

    def both_classes(rows: np.ndarray) -> dict[str, float]:
        return {"share": label[rows].mean() if label[rows].any() else float("nan")}

    estimate = estimate_all(both_classes, Resamples(np.arange(10), replicates=300, seed=0))["share"]
    assert estimate.value == pytest.approx(0.1)
    assert estimate.low is None
    assert estimate.reason
    assert estimate.undefined_replicates == pytest.approx(300 * 0.9**10, abs=30)


def test_nan_becomes_null_with_a_reason() -> None:
    assert Estimate.of(float("nan"), reason="one class").model_dump()["value"] is None
    assert Estimate.of(float("nan"), reason="one class").reason == "one class"
    empty = estimate_all(lambda rows: {"mean": float("nan")}, Resamples(np.zeros(0, dtype=np.int64), replicates=10, seed=0))
    assert empty["mean"].value is None

"""Accuracy, F1, AUROC, AUPRC: edge cases, and agreement with an independent implementation."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from draf_dist.metrics import classification


def draw(seed: int, num_classes: int, n: int = 200) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    # Rounding makes ties, which is where rank metrics go wrong.
    probability = np.round(generator.dirichlet(np.ones(num_classes), n), 1) + 1e-3
    probability /= probability.sum(axis=1, keepdims=True)
    return probability, generator.integers(0, num_classes, n)


@pytest.mark.parametrize("seed", range(5))
def test_binary_metrics_agree_with_sklearn_under_ties(seed: int) -> None:
    probability, label = draw(seed, 2)
    assert classification.auroc(probability, label) == pytest.approx(roc_auc_score(label, probability[:, 1]), abs=1e-12)
    assert classification.auprc(probability, label) == pytest.approx(average_precision_score(label, probability[:, 1]), abs=1e-12)
    assert classification.f1(probability, label) == pytest.approx(f1_score(label, probability[:, 1] >= 0.5), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_multiclass_metrics_agree_with_sklearn(seed: int) -> None:
    probability, label = draw(seed, 4)
    assert classification.auroc(probability, label) == pytest.approx(
        roc_auc_score(label, probability, multi_class="ovr"), abs=1e-12
    )
    assert classification.f1(probability, label) == pytest.approx(
        f1_score(label, classification.predicted_class(probability), average="macro"), abs=1e-12
    )


def test_one_class_has_no_auroc() -> None:
    probability, _ = draw(0, 2, n=10)
    ones = np.ones(10, dtype=np.int64)
    assert np.isnan(classification.auroc(probability, ones))
    assert np.isnan(classification.auprc(probability, ones))
    assert classification.num_undefined_classes(ones, 2) == 1


def test_a_class_without_studies_is_skipped_and_counted() -> None:
    probability, label = draw(0, 3)
    label = np.where(label == 2, 1, label)
    expected = np.mean([roc_auc_score(label == k, probability[:, k]) for k in range(2)])
    assert classification.num_undefined_classes(label, 3) == 1
    assert classification.auroc(probability, label) == pytest.approx(expected, abs=1e-12)


def test_no_study_gives_no_number() -> None:
    nothing, none = np.zeros((0, 2)), np.zeros(0, dtype=np.int64)
    for metric in (classification.accuracy, classification.f1, classification.auroc, classification.auprc):
        assert np.isnan(metric(nothing, none))


def test_ppv_and_recall_at_a_threshold() -> None:
    score, positive = np.array([0.9, 0.6, 0.4, 0.2]), np.array([True, False, True, False])
    assert classification.positive_predictive_value(score, positive, threshold=0.5) == 0.5
    assert classification.recall(score, positive, threshold=0.5) == 0.5
    assert classification.recall(score, positive, threshold=0.4) == 1.0
    assert np.isnan(classification.positive_predictive_value(score, positive, threshold=0.95))


@pytest.mark.parametrize("num_classes", [2, 3])
def test_auroc_of_resamples_is_that_of_the_resampled_rows(num_classes: int) -> None:
    probability, label = draw(7, num_classes, n=25)
    rows = np.random.default_rng(8).integers(0, 25, (40, 25))
    rows[0] = np.flatnonzero(label == 1)[0]
    counts = np.stack([np.bincount(drawn, minlength=25) for drawn in rows]).astype(float)
    expected = [classification.auroc(probability[drawn], label[drawn]) for drawn in rows]
    assert np.isnan(expected[0])
    assert classification.auroc_of_resamples(probability, label, counts) == pytest.approx(expected, abs=1e-12, nan_ok=True)

"""Labels that are known in part: each is scored on what was observed of it, and labels without a score are counted."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score

from draf_dist.metrics import multilabel

METRICS = (
    multilabel.auroc,
    multilabel.auprc,
    multilabel.expected_calibration_error,
    multilabel.brier,
    multilabel.negative_log_likelihood,
)


def draw(n: int = 120, labels: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    # Rounded, as ties are where rank metrics go wrong.
    probability = np.round(generator.uniform(0.05, 0.95, (n, labels)), 1) + 0.013
    return probability, generator.random((n, labels)) < probability, generator.random((n, labels)) < 0.7


def test_every_label_is_scored_on_what_was_observed_of_it() -> None:
    probability, label, observed = draw()
    found = {metric.__name__: metric(probability, label, observed) for metric in METRICS}
    for k in range(4):
        p, y = probability[observed[:, k], k], label[observed[:, k], k]
        assert found["auroc"].values[k] == pytest.approx(roc_auc_score(y, p), abs=1e-12)
        assert found["auprc"].values[k] == pytest.approx(average_precision_score(y, p), abs=1e-12)
        assert found["brier"].values[k] == pytest.approx(brier_score_loss(y, p), abs=1e-12)
        assert found["negative_log_likelihood"].values[k] == pytest.approx(log_loss(y, p), abs=1e-12)
        # Bins (lo, hi]; no probability stands on an edge.
        place = np.ceil(15 * p)
        inside = [place == b for b in np.unique(place)]
        by_hand = sum(abs(p[these].mean() - y[these].mean()) * these.mean() for these in inside)
        assert found["expected_calibration_error"].values[k] == pytest.approx(by_hand, abs=1e-12)
    for by_label in found.values():
        assert by_label.num_left_out == 0
        assert by_label.mean == pytest.approx(by_label.values.mean())


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.__name__)
def test_what_was_not_observed_plays_no_part(metric: object) -> None:
    assert callable(metric)
    probability, label, observed = draw()
    other = np.where(observed, probability, np.nan), np.where(observed, label, ~label)
    assert metric(*other, observed).values.tolist() == metric(probability, label, observed).values.tolist()


def test_labels_with_one_value_have_no_auroc_but_a_calibration() -> None:
    probability, label, observed = draw()
    label[:, 1] = False
    label[:, 2] = np.where(observed[:, 2], True, label[:, 2])
    found = multilabel.auroc(probability, label, observed)
    assert np.isnan(found.values).tolist() == [False, True, True, False]
    assert found.num_left_out == multilabel.auprc(probability, label, observed).num_left_out == 2
    assert found.mean == pytest.approx((found.values[0] + found.values[3]) / 2)
    assert multilabel.brier(probability, label, observed).num_left_out == 0


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.__name__)
def test_a_label_that_was_never_observed_is_left_out_and_counted(metric: object) -> None:
    assert callable(metric)
    probability, label, observed = draw()
    observed[:, 0] = False
    found = metric(probability, label, observed)
    assert found.num_left_out == 1
    assert np.isfinite(found.mean)
    assert np.isnan(metric(probability, label, np.zeros_like(observed)).mean)


def test_calibration_asks_about_the_label_and_not_about_the_answer() -> None:
    """A label that is always absent and given .1 is off by .1; as confidence in the answer it would be .9 against 1."""
    nothing = np.zeros((50, 1), dtype=bool)
    found = multilabel.expected_calibration_error(np.full((50, 1), 0.3), nothing, ~nothing)
    assert found.mean == pytest.approx(0.3)
    half = np.arange(50)[:, None] < 25
    assert multilabel.expected_calibration_error(np.full((50, 1), 0.5), half, ~nothing).mean == pytest.approx(0.0)

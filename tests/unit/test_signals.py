"""What the uncertainty goes with, and what the report warns of."""

import numpy as np
import pytest
from hand_made_predictions import Applied, context, evaluation, studies

from draf_dist.evaluation.describe import describe_split
from draf_dist.evaluation.job import EvaluateJob
from draf_dist.evaluation.predictions import Predictions
from draf_dist.evaluation.signals import find_warnings, measure_signals
from draf_dist.metrics.temperature import Temperature

FITTED = Temperature(value=1.2, nll_raw=0.5, nll_scaled=0.49)


def changed(predictions: Predictions, **columns: np.ndarray) -> Predictions:
    return type(predictions)(**{**vars(predictions), **columns})


def test_an_uncertainty_that_is_a_risk_score_is_warned_of() -> None:
    validation, _ = studies(seed=3)
    signals = measure_signals(validation, None, ())
    assert signals[0].uncertainty_risk["used"] == pytest.approx(1.0)
    warnings = find_warnings(EvaluateJob(), FITTED, (), signals, None)
    assert sum("goes with its risk" in warning for warning in warnings) == 2
    assert any("raises the alarm" in warning for warning in warnings)


def test_an_uncertainty_without_risk_is_not() -> None:
    validation, _ = studies(seed=3)
    noise = np.random.default_rng(0).random((120, 2)).astype(np.float32)
    signals = measure_signals(changed(validation, uncertainty={"used": noise}), None, ())
    assert find_warnings(EvaluateJob(), FITTED, (), signals, None) == ()


def test_signals_pool_the_cells_that_hit_the_modality_alone() -> None:
    clean, _ = studies(seed=1)
    hit = [studies(seed=1, applied=Applied("gaussian", index, "cxr"))[0] for index in (1, 2)]
    falling = [changed(part, reliability=part.present * np.float32(0.5 - 0.2 * part.applied.index)) for part in hit]
    others = [studies(seed=1, applied=Applied("gaussian", 2, "labs"))[0]]
    clean = changed(clean, reliability=clean.present * np.float32(0.5))
    first, second = measure_signals(clean, clean, [*falling, *others])
    assert first.severity_reliability == pytest.approx(-1.0)
    assert second.severity_reliability is not None
    assert measure_signals(clean, clean, falling)[1].severity_reliability is None


def test_a_calibrated_split_is_not_called_miscalibrated_and_a_sharpened_one_is() -> None:
    for sharpness, expected in ((1.0, False), (6.0, True)):
        test, _ = studies(600, seed=4, sharpness=sharpness)
        split = describe_split(test, context(None, bootstrap=0))
        warnings = find_warnings(EvaluateJob(), FITTED, [split], (), None)
        assert any("miscalibrated" in warning for warning in warnings) is expected


def test_few_studies_of_a_class_and_bad_temperatures_are_named() -> None:
    noted = Temperature(value=20, nll_raw=0.7, nll_scaled=0.7, note="at the upper end of its range")
    warnings = find_warnings(EvaluateJob(), noted, evaluation(bootstrap=0).splits, (), None)
    assert warnings[0] == "Temperature: at the upper end of its range."
    assert any("rarest class has" in warning for warning in warnings)


def test_an_interval_without_width_is_called_too_few_subjects_and_one_of_nine_studies_is_not_given() -> None:
    made, _ = studies(12, seed=3)
    target = (np.arange(12) % 3 == 0).astype(np.int64)
    perfect = np.stack([np.where(target, 0.2, 0.8), np.where(target, 0.8, 0.2)], axis=1).astype(np.float32)
    separated = changed(made, target=target, probability=perfect)
    split = describe_split(separated, context(None))
    assert (split.scaled["auroc"].value, split.scaled["auroc"].low, split.scaled["auroc"].high) == (1, 1, 1)
    assert any("too few to bound it" in warning for warning in find_warnings(EvaluateJob(), FITTED, [split], (), None))
    fewer = describe_split(separated.rows(np.arange(9)), context(None))
    assert (fewer.scaled["nll"].low, fewer.num_subjects) == (None, 9)
    assert not any("too few" in warning for warning in find_warnings(EvaluateJob(), FITTED, [fewer], (), None))

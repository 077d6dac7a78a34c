"""Cox's regression with a ridge: closed forms, its gradient, and that width costs nothing."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from draf_dist.errors import DataError
from draf_dist.evaluation.cox_regression import (
    CoxRegressionConfig,
    FollowedUp,
    best_penalty,
    breslow,
    hazards,
    partial_nll,
    ridge_cox,
)
from draf_dist.losses.cox import Risks, cox


def followed_up(n: int, width: int, *, seed: int = 0, weights: "NDArray[np.float64] | None" = None) -> FollowedUp:
    """Times on a grid, so that many are the same; a third is censored."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(n, width))
    log_risk = features @ (np.zeros(width) if weights is None else weights)
    time = np.ceil(generator.exponential(10 * np.exp(-log_risk)))
    return FollowedUp(features, time, generator.random(n) < 0.67)


def torch_loss(data: FollowedUp, weights: torch.Tensor) -> torch.Tensor:
    """The same loss by the objective's own code."""
    rows = Risks(
        (torch.tensor(data.features) @ weights)[:, None],
        torch.tensor(data.time),
        torch.tensor(data.event),
        torch.ones(len(data.time), dtype=torch.bool),
    )
    term = cox(rows, ties="breslow")
    return term.numerator / term.weight


def test_three_patients_by_hand() -> None:
    """Deaths at 1 and 2, one outlives both: log(e^1 + e^2 + e^0) - 1 and log(e^2 + e^0) - 2, over two events."""
    found = partial_nll(np.array([1.0, 2.0, 0.0]), np.array([1.0, 2.0, 5.0]), np.array([True, True, False]))
    assert found == pytest.approx((np.log(np.e + np.e**2 + 1) - 1 + np.log(np.e**2 + 1) - 2) / 2, abs=1e-12)


def test_the_loss_is_that_of_the_objective() -> None:
    data, weights = followed_up(60, 4), np.array([0.3, -0.2, 0.5, 0.0])
    assert partial_nll(data.features @ weights, data.time, data.event) == pytest.approx(
        float(torch_loss(data, torch.tensor(weights))), abs=1e-9
    )


@pytest.mark.parametrize("width", [3, 200])
def test_at_the_minimum_the_gradient_of_loss_and_ridge_is_zero(width: int) -> None:
    data = followed_up(80, width)
    for penalty, found in zip((0.05, 0.5), ridge_cox(data, (0.05, 0.5)), strict=True):
        weights = torch.tensor(found, requires_grad=True)
        (torch_loss(data, weights) + penalty / 2 * weights.square().sum()).backward()
        assert weights.grad is not None
        assert weights.grad.abs().max() < 1e-5
        assert np.abs(found).max() > 1e-3


def test_a_column_twice_shares_its_coefficient_and_a_constant_one_has_none() -> None:
    data = followed_up(80, 2)
    wide = FollowedUp(np.column_stack([data.features[:, :1], data.features, np.zeros(80)]), data.time, data.event)
    (found,) = ridge_cox(wide, (0.1,))
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert found[3] == 0


def test_validation_chooses_a_small_penalty_where_all_columns_matter_and_a_large_one_where_none_does() -> None:
    penalties = (0.01, 1.0, 100.0)
    weights = np.array([1.0, -1.0, 0.5])
    signal, coefficients = best_penalty(
        followed_up(300, 3, weights=weights), followed_up(300, 3, seed=1, weights=weights), penalties
    )
    assert signal == 0.01
    np.testing.assert_allclose(coefficients, weights, atol=0.25)
    noise, _ = best_penalty(followed_up(60, 50), followed_up(60, 50, seed=1), penalties)
    assert noise == 100.0


def test_without_events_nothing_is_fitted_and_nothing_is_chosen() -> None:
    data = followed_up(20, 2)
    nothing = FollowedUp(data.features, data.time, np.zeros(20, dtype=bool))
    with pytest.raises(DataError, match="studies with an event"):
        ridge_cox(nothing, (1.0,))
    assert np.isnan(partial_nll(data.features[:, 0], data.time, nothing.event))
    assert best_penalty(data, nothing, (0.1, 1.0))[0] == 0.1


def test_without_a_risk_the_baseline_is_that_of_nelson_and_aalen() -> None:
    """Five patients: deaths at 1, 3 (two of them), 6; one censored at 4. 1/5, then 2/4, then 1/1."""
    time, event = np.array([3.0, 1.0, 3.0, 6.0, 4.0]), np.array([True, True, True, True, False])
    found = breslow(np.zeros(5), time, event, np.array([2.0, 5.0]))
    np.testing.assert_allclose(found, [1 / 5, 2 / 4, 1 / 1], atol=1e-12)


def test_a_time_at_an_edge_belongs_to_the_interval_that_begins_there() -> None:
    found = breslow(np.zeros(2), np.array([2.0, 9.0]), np.array([True, False]), np.array([2.0, 5.0]))
    np.testing.assert_allclose(found, [0, 1 / 2, 0], atol=1e-12)


def test_hazards_give_back_the_survival_of_exponential_times() -> None:
    generator = np.random.default_rng(3)
    log_risk = generator.normal(size=4000)
    time = generator.exponential(10 * np.exp(-log_risk))
    edges = np.array([2.0, 6.0, 12.0])
    baseline = breslow(log_risk, time, np.ones(4000, dtype=bool), edges)
    survival = np.cumprod(1 - hazards(np.array([-1.0, 0.0, 1.0]), baseline), axis=1)[:, :3]
    np.testing.assert_allclose(survival, np.exp(-edges / 10 * np.exp([[-1.0], [0.0], [1.0]])), atol=0.03)


def test_a_huge_risk_has_a_finite_hazard() -> None:
    np.testing.assert_array_equal(hazards(np.array([1e4, -1e4]), np.array([0.1, 0.0])), [[1, 0], [0, 0]])


def test_rows_of_a_table_are_named_after_what_they_see() -> None:
    assert CoxRegressionConfig().name == "cox_regression"
    assert CoxRegressionConfig(modalities=("clinical", "cnv")).name == "cox_clinical_cnv"

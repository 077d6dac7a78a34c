"""O5 and the gradient of the corruption detector's loss."""

import math

import pytest
import torch

from draf_dist.losses.acd import acd
from draf_dist.models.layers import ModalityLinear

CORRUPTED = torch.tensor([[True, False, True]])
LOGITS = torch.logit(torch.tensor([[0.8, 0.3, 0.6]], dtype=torch.float64))
ONE = torch.ones(1, dtype=torch.float64)


def mean_of(present: torch.Tensor, weight: torch.Tensor = ONE, logits: torch.Tensor = LOGITS) -> float:
    rows = present.shape[0]
    term = acd(logits.expand(rows, -1), CORRUPTED.expand(rows, -1), present, weight)
    return (term.numerator / term.weight).item()


def test_full_presence_gives_the_literal_sum() -> None:
    assert mean_of(torch.tensor([[True, True, True]])) == pytest.approx(1.0906441, abs=1e-6)


def test_an_absent_modality_has_no_part() -> None:
    expected = -math.log(0.8) - math.log(0.7)
    assert expected == pytest.approx(0.5798184, abs=1e-6)
    assert mean_of(torch.tensor([[True, True, False]])) == pytest.approx(expected, abs=1e-12)


def test_samples_are_averaged_and_modalities_summed() -> None:
    present = torch.tensor([[True, True, True], [True, True, False]])
    weight = torch.ones(2, dtype=torch.float64)
    assert mean_of(present, weight) == pytest.approx((1.0906441 + 0.5798184) / 2, abs=1e-6)


def test_padding_has_no_part() -> None:
    present = torch.tensor([[True, True, True], [True, False, False]])
    assert mean_of(present, torch.tensor([1.0, 0.0], dtype=torch.float64)) == pytest.approx(1.0906441, abs=1e-6)


def test_what_the_logits_of_absent_modalities_are_changes_nothing() -> None:
    broken = LOGITS.clone()
    broken[0, 2] = float("nan")
    assert mean_of(torch.tensor([[True, True, False]]), logits=broken) == pytest.approx(0.5798184, abs=1e-6)


def test_gradient_matches_finite_differences() -> None:
    present = torch.tensor([[True, True, False], [True, True, True]])
    corrupted = torch.tensor([[True, False, True], [False, False, True]])
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([1.0, 0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda values: acd(values, corrupted, present, weight).numerator, logits)


def test_detector_has_one_vector_and_one_bias_per_modality() -> None:
    detector = ModalityLinear(3, 7, 1)
    assert sum(parameter.numel() for parameter in detector.parameters()) == 3 * (7 + 1)
    features = torch.randn(2, 3, 7)
    by_hand = torch.stack([features[:, m] @ detector.weight[m, 0] + detector.bias[m, 0] for m in range(3)], dim=1)
    torch.testing.assert_close(detector(features).squeeze(-1), by_hand)

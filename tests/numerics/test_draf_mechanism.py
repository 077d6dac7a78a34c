"""DRAF on planted truth: does U rise with the noise of a modality, do the weights follow, and which U does it (spec 1.4 item 5)?

It is not guaranteed: under a corruption that saturates the network its passes agree again, and the epistemic part falls.
"""

from typing import Any

import pytest
import torch
from model_inputs import SMALL_ENCODERS, pass_keys, small_batch, small_schema
from planted_tables import NAMES, SCHEMA, TABLES, corrupt, planted_batch, train
from scipy.stats import spearmanr
from torch import Tensor, nn

from draf_dist.models.build import build_model
from draf_dist.models.fusion.draf import Draf, DrafConfig
from draf_dist.models.fusion.mean import MeanConfig
from draf_dist.models.reliability import masked_softmax
from draf_dist.schema.batch import FusionOutput

SIGMAS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)


def trained(*shifts: float, **options: Any) -> Draf:
    """Every table is noise in three rows of ten."""
    model = build_model(DrafConfig(width=16, encoders=TABLES, **options), SCHEMA, seed=0)
    assert isinstance(model, Draf)
    train(model, shifts, steps=120, corruption=0.3, rate=1e-2)
    return model


@torch.no_grad()
def under_noise(model: nn.Module, *shifts: float, passes: int = 30) -> list[FusionOutput]:
    """What a model says of 400 studies whose first table has more and more noise."""
    clean = planted_batch(shifts, rows=400, seed=10_000)
    return [model(corrupt(clean, NAMES[0], sigma), pass_keys(clean, passes)) for sigma in SIGMAS]


def of_first(outputs: list[FusionOutput], name: str) -> list[float]:
    """Mean over studies."""
    return [float(output.uncertainty[name][:, 0].mean()) for output in outputs]


@pytest.fixture(scope="module")
def by_total() -> list[FusionOutput]:
    """The first table alone says something of the label; weights by the total uncertainty."""
    shifts = (1.0, 0.0, 0.0)
    return under_noise(trained(*shifts, uncertainty="total", reliability_alpha=16.0), *shifts)


def test_total_uncertainty_rises_with_noise_and_the_weight_of_the_modality_falls(by_total: list[FusionOutput]) -> None:
    total = of_first(by_total, "total")
    weight = [float(output.reliability[:, 0].mean()) for output in by_total]
    print("total", total, "weight", weight)
    assert spearmanr(SIGMAS, total).statistic > 0.9
    assert spearmanr(SIGMAS, weight).statistic < -0.9
    assert weight[0] > weight[-1] + 0.1


def test_the_corruption_head_sees_the_noise(by_total: list[FusionOutput]) -> None:
    seen = [float(logits_of(output).sigmoid()[:, 0].mean()) for output in by_total]
    assert seen == sorted(seen)
    assert seen[0] < 0.2
    assert seen[-1] > 0.9


def test_the_epistemic_part_falls_again_where_corruption_saturates() -> None:
    """The literal U, here of three tables that say equally much: the worst noise looks more certain than none."""
    outputs = under_noise(trained(0.5, 0.5, 0.5), 0.5, 0.5, 0.5)
    epistemic, total = of_first(outputs, "epistemic"), of_first(outputs, "total")
    print("epistemic", epistemic, "total", total)
    assert max(epistemic) > 1.3 * epistemic[0]
    assert epistemic[-1] < 0.7 * max(epistemic)
    assert total == sorted(total)


def test_at_alpha_one_weights_do_nothing_and_the_signal_says_so(by_total: list[FusionOutput]) -> None:
    """Spec 1.1 row 4: U is at most 1/4, so no weight can be far from 1 / n."""
    literal = under_noise(trained(1.0, 0.0, 0.0), 1.0, 0.0, 0.0)[-1]
    assert (literal.reliability - 1 / 3).abs().max() < 0.06
    assert literal.signals["reliability_entropy"].min() > 0.99
    assert by_total[-1].signals["reliability_entropy"].mean() < 0.95


def logits_of(output: FusionOutput) -> Tensor:
    assert output.corruption_logits is not None
    return output.corruption_logits


# Signals.


def test_the_noise_of_weights_is_their_spread_over_estimates_that_are_repeated() -> None:
    """Spec 1.1 row 12: against the standard deviation over 200 draws of as many other passes."""
    schema = small_schema()
    batch = small_batch(schema)
    model = build_model(DrafConfig(width=8, encoders=SMALL_ENCODERS, reliability_alpha=20.0), schema, seed=0).eval()
    with torch.no_grad():
        drawn = [model(batch, pass_keys(batch, 10, seed=seed)) for seed in range(200)]
    weights = torch.stack([output.reliability for output in drawn])
    expected = weights.std(0).sum(1) / batch.present.sum(1)
    found = torch.stack([output.signals["reliability_noise"] for output in drawn]).mean(0)
    several = batch.present.sum(1) > 1
    assert (expected[several] > 1e-3).all()
    torch.testing.assert_close(found[several], expected[several], rtol=0.3, atol=0)
    # Nothing to weigh: nothing that could be uncertain.
    assert (found[~several] == 0).all()


def test_the_noise_of_weights_by_hand() -> None:
    schema = small_schema()
    batch = small_batch(schema)
    model = build_model(DrafConfig(width=8, encoders=SMALL_ENCODERS, reliability_alpha=20.0), schema, seed=0).eval()
    with torch.no_grad():
        output = model(batch, pass_keys(batch, 6))
    assert output.modality_logits is not None
    variances = [half.softmax(-1)[..., 1].var(0, correction=0) for half in output.modality_logits.chunk(2)]
    first, second = (masked_softmax(-20 * variance, batch.present) for variance in variances)
    by_hand = (torch.pi / 8) ** 0.5 * (first - second).abs().sum(1) / batch.present.sum(1)
    torch.testing.assert_close(output.signals["reliability_noise"], by_hand)


@pytest.mark.parametrize(("passes", "known"), [(1, False), (3, False), (4, True)])
def test_two_estimates_need_four_passes(passes: int, known: bool) -> None:
    schema = small_schema()
    batch = small_batch(schema)
    model = build_model(DrafConfig(width=8, encoders=SMALL_ENCODERS, u_ema=0.9), schema, seed=0).train()
    signals = model(batch, pass_keys(batch, passes)).signals
    assert ("reliability_noise" in signals) is known
    assert not any(value.requires_grad for value in signals.values())


def test_halving_the_passes_moves_no_running_mean() -> None:
    schema = small_schema()
    batch = small_batch(schema)
    model = build_model(DrafConfig(width=8, encoders=SMALL_ENCODERS, u_ema=0.9), schema, seed=0).train()
    used = model(batch, pass_keys(batch)).uncertainty["used"]
    count = batch.present.sum(0)
    torch.testing.assert_close(model.weights.running_u, 0.1 * used.sum(0).detach() / count)
    torch.testing.assert_close(model.weights.running_weight, torch.full((3,), 0.1))


def test_what_draf_adds_to_mean_fusion_is_a_detector_and_a_head_a_modality() -> None:
    """Spec 1.2: M (d + 1) and M (d K + K)."""
    with torch.device("meta"):
        draf, mean = (kind(width=128).build(small_schema(3)) for kind in (DrafConfig, MeanConfig))
    beside = sum(p.numel() for p in draf.parameters()) - sum(p.numel() for p in mean.parameters())
    assert beside == 3 * (128 + 1) + 3 * (128 * 3 + 3)

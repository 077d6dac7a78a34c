"""O1, O4, the masks of spec 1.1 row 5, and alpha = 0 as the equal-weight ablation."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_inputs import SMALL_ENCODERS, pass_keys, small_batch, small_schema
from torch import Tensor

from draf_dist.models.build import build_model
from draf_dist.models.calibration import calibrate, set_prevalence
from draf_dist.models.fusion.draf import DrafConfig, ReliabilityWeights
from draf_dist.models.fusion.mean import MeanConfig
from draf_dist.models.reliability import equal_weights, fuse, inverse_logits, learned_logits, masked_softmax, softmax_logits
from draf_dist.models.uncertainty import decompose

U = torch.tensor([[0.01, 0.04, 0.09]], dtype=torch.float64)
ALL = torch.ones(1, 3, dtype=torch.bool)
SCHEMA = small_schema()


def softmax_u(uncertainty: Tensor, alpha: float, present: Tensor | None = None) -> list[float]:
    present = torch.ones_like(uncertainty, dtype=torch.bool) if present is None else present
    weights: list[float] = masked_softmax(softmax_logits(uncertainty, alpha), present)[0].tolist()
    return weights


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0, (1 / 3, 1 / 3, 1 / 3)),
        (1, (0.34559482, 0.33538095, 0.31902423)),
        (10, (0.45659032, 0.33825043, 0.20515925)),
        (50, (0.80551241, 0.17973411, 0.01475347)),
        (100, (0.95226983, 0.04741072, 0.00031945)),
    ],
)
def test_weights_are_those_of_the_closed_form(alpha: float, expected: tuple[float, ...]) -> None:
    assert softmax_u(U, alpha) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(("alpha", "expected"), [(1, (0.5621765, 0.4378235)), (10, (0.92414182, 0.07585818))])
def test_the_largest_possible_difference_confines_the_weights_at_alpha_one(alpha: float, expected: tuple[float, ...]) -> None:
    assert softmax_u(torch.tensor([[0.0, 0.25]], dtype=torch.float64), alpha) == pytest.approx(expected, abs=1e-7)


def test_an_absent_modality_gets_exactly_nothing_and_the_rest_is_renormalised() -> None:
    weights = softmax_u(U, 10, torch.tensor([[True, False, True]]))
    assert weights == pytest.approx((0.68997448, 0, 0.31002552), abs=1e-8)
    assert weights[1] == 0


def test_a_zero_input_would_win_without_the_mask() -> None:
    constant = torch.full((5, 1, 2), 0.5, dtype=torch.float64)
    varying = torch.stack([torch.tensor([[1 - p, p]], dtype=torch.float64) for p in (0.1, 0.3, 0.5, 0.7, 0.9)])
    uncertainty = torch.stack([decompose(constant)["epistemic"], decompose(varying)["epistemic"]], dim=1)
    assert uncertainty[0, 0] == 0
    literal = softmax_u(uncertainty, 50)
    assert literal[0] == max(literal) > 0.9
    assert softmax_u(uncertainty, 50, torch.tensor([[False, True]])) == [0, 1]


def test_inverse_weights_are_precisions() -> None:
    assert masked_softmax(inverse_logits(U), ALL)[0].tolist() == pytest.approx((0.73469388, 0.18367347, 0.08163265), abs=1e-8)


def test_fusion_is_the_weighted_sum_of_features() -> None:
    features = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]], dtype=torch.float64)
    fused = fuse(features, masked_softmax(softmax_logits(U, 10), ALL))
    assert fused[0].tolist() == pytest.approx((0.86690883, 0.74856894), abs=1e-8)


def test_two_to_one_odds_need_alpha_sixty_nine_at_a_difference_of_a_hundredth() -> None:
    weights = softmax_u(torch.tensor([[0.01, 0.02]], dtype=torch.float64), math.log(2) / 0.01)
    assert math.log(2) / 0.01 == pytest.approx(69.314718)
    assert weights[0] / weights[1] == pytest.approx(2)


def test_learned_weights_are_the_formula_of_the_findings() -> None:
    corruption = torch.tensor([[0.1, 0.5, 0.9]], dtype=torch.float64)
    a, e = torch.tensor(-0.5, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    weights = masked_softmax(learned_logits(U, corruption, a, e), ALL)
    unnormalised = U**-0.5 * torch.exp(-2 * corruption)
    torch.testing.assert_close(weights, unnormalised / unnormalised.sum())


def test_weights_follow_a_permutation_of_the_modalities() -> None:
    order = torch.tensor([2, 0, 1])
    present = torch.tensor([[True, True, False]])
    for logits in (softmax_logits, lambda u, _: inverse_logits(u)):
        weights = masked_softmax(logits(U, 10), present)
        torch.testing.assert_close(masked_softmax(logits(U[:, order], 10), present[:, order]), weights[:, order])


def test_nothing_present_gives_zeros_and_no_nan() -> None:
    assert masked_softmax(U, torch.zeros(1, 3, dtype=torch.bool)).tolist() == [[0, 0, 0]]


def test_large_logits_neither_overflow_nor_lose_the_sum() -> None:
    weights = masked_softmax(torch.tensor([[1e6, -1e6, 3e38]]), torch.tensor([[True, True, False]]))
    assert weights.tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("logits", [lambda u: softmax_logits(u, 10.0), inverse_logits], ids=["softmax_u", "inverse"])
def test_gradients_of_the_weights_match_finite_differences(logits: Any) -> None:
    present = torch.tensor([[True, True, True], [True, False, True]])
    uncertainty = torch.tensor([[0.01, 0.04, 0.09], [0.2, 0.1, 0.05]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u: masked_softmax(logits(u), present), uncertainty)


def test_gradients_of_the_learned_weights_match_finite_differences() -> None:
    def weights(uncertainty: Tensor, corruption: Tensor, prior: Tensor, a: Tensor, e: Tensor) -> Tensor:
        return masked_softmax(learned_logits(uncertainty, corruption, a, e) + prior, ALL)

    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(1, 3), (1, 3), (3,), (), ()]
    inputs = [torch.rand(shape, generator=generator, dtype=torch.float64).add(0.1).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(weights, inputs)


@pytest.mark.parametrize("num_modalities", [1, 2, 3, 5, 6, 7])
def test_alpha_zero_gives_equal_weights_to_the_last_bit(num_modalities: int) -> None:
    generator = torch.Generator().manual_seed(0)
    uncertainty = torch.rand(200, num_modalities, generator=generator)
    present = torch.rand(200, num_modalities, generator=generator) < 0.6
    weights = masked_softmax(softmax_logits(uncertainty, 0.0), present)
    assert torch.equal(weights, equal_weights(present))
    count = present.sum(1, keepdim=True)
    assert torch.equal(weights, torch.where(present, 1 / count.float(), 0.0))


@pytest.mark.parametrize("predict", ["mc", "mean_feature"])
@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize("zero", [{"reliability_alpha": 0.0}, {"alpha_mode": "scaled", "kappa": 0.0}])
def test_alpha_zero_is_the_plain_mean_with_the_same_parameters_bit_for_bit(predict: Any, bits: bool, zero: dict[str, Any]) -> None:
    shared = {"width": 8, "encoders": SMALL_ENCODERS, "predict": predict, "presence_bits": bits}
    draf = build_model(DrafConfig(**shared, **zero), SCHEMA, seed=0)
    mean = build_model(MeanConfig(**shared), SCHEMA, seed=1)
    missing, _ = mean.load_state_dict(draf.state_dict(), strict=False)
    assert missing == []
    batch = small_batch(SCHEMA)
    keys = pass_keys(batch)
    left, right = draf(batch, keys), mean(batch, keys)
    assert torch.equal(left.logits, right.logits)
    assert torch.equal(left.reliability, right.reliability)
    left.logits.square().sum().backward()
    right.logits.square().sum().backward()
    draf_gradients = {name: parameter.grad for name, parameter in draf.named_parameters()}
    for name, parameter in mean.named_parameters():
        assert torch.equal(parameter.grad, draf_gradients[name]), name  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [DrafConfig, MeanConfig])
def test_mean_feature_is_one_point_prediction_and_mc_a_distribution(kind: Any) -> None:
    shared = {"width": 8, "encoders": SMALL_ENCODERS}
    literal, sampled = (build_model(kind(**shared, predict=predict), SCHEMA, seed=0) for predict in ("mean_feature", "mc"))
    batch = small_batch(SCHEMA)
    keys = pass_keys(batch)
    point, passes = literal(batch, keys), sampled(batch, keys)
    by_hand = literal.head.classify(fuse(point.features, point.reliability))
    torch.testing.assert_close(point.logits, by_hand.expand(4, -1, -1))
    features = sampled.backbones(batch, keys)
    each = torch.stack([sampled.head.classify(fuse(features[t], passes.reliability)) for t in range(4)])
    torch.testing.assert_close(passes.logits, each)
    assert not torch.allclose(passes.logits.mean(0), by_hand, atol=1e-4)


def test_one_seed_gives_draf_and_the_mean_the_same_start() -> None:
    draf = build_model(DrafConfig(width=8, encoders=SMALL_ENCODERS), SCHEMA, seed=0).state_dict()
    mean = build_model(MeanConfig(width=8, encoders=SMALL_ENCODERS), SCHEMA, seed=0).state_dict()
    assert all(torch.equal(tensor, draf[name]) for name, tensor in mean.items())


def weights_module(num_modalities: int = 3, **options: Any) -> ReliabilityWeights:
    return ReliabilityWeights(DrafConfig(**options), num_modalities)


def test_corruption_gate_multiplies_by_the_exponential_of_minus_eta_c() -> None:
    corruption = torch.tensor([[0.0, 0.5, 1.0]])
    module = weights_module(acd_gate=2.0, reliability_alpha=10.0)
    weights = module(U.float(), corruption, ALL, torch.ones(1))
    unnormalised = torch.exp(-10 * U.float() - 2 * corruption)
    torch.testing.assert_close(weights, unnormalised / unnormalised.sum())


def test_prior_weighs_a_modality_whatever_its_uncertainty() -> None:
    module = weights_module(modality_prior=True, reliability_alpha=0.0)
    with torch.no_grad():
        module.prior.copy_(torch.tensor([0.5, 0.25, 0.25]).log())
    torch.testing.assert_close(module(U.float(), torch.zeros(1, 3), ALL, torch.ones(1)), torch.tensor([[0.5, 0.25, 0.25]]))


def test_learned_weights_start_equal() -> None:
    weights = weights_module(reliability="learned")(U.float(), torch.rand(1, 3), ALL, torch.ones(1))
    assert torch.equal(weights, equal_weights(ALL))


@pytest.mark.parametrize("detach", [True, False])
def test_detached_weights_carry_no_gradient_to_the_uncertainty_but_learn(detach: bool) -> None:
    batch = small_batch(SCHEMA)
    config = DrafConfig(width=8, encoders=SMALL_ENCODERS, reliability="learned", detach_r=detach)
    model = build_model(config, SCHEMA, seed=0)
    with torch.no_grad():
        model.weights.log_weight.fill_(-0.5)
        model.weights.corruption_weight.fill_(0.5)
    # Through the fused logits the unimodal and corruption heads are reached by way of the weights only.
    model(batch, pass_keys(batch)).logits.square().sum().backward()
    reached = [head.weight.grad is not None for head in (model.modality_heads, model.corruption_head)]
    assert reached == [not detach] * 2
    assert model.weights.prior.grad.any()
    assert model.weights.log_weight.grad.any()


def test_scale_is_the_spread_of_u_over_present_pairs_of_rows_that_count() -> None:
    config = DrafConfig(width=8, encoders=SMALL_ENCODERS, alpha_mode="scaled", kappa=2.0)
    model = build_model(config, SCHEMA, seed=0).train()
    batch = small_batch(SCHEMA)
    padded = replace(small_batch(SCHEMA, seed=1), weight=torch.tensor([1.0] * 5 + [0.0] * 3))
    data = [(batch, pass_keys(batch)), (padded, pass_keys(padded))]
    kept = [(batch.present, slice(0, 8)), (padded.present, slice(0, 5))]
    pairs = [
        model(one, keys).uncertainty["used"][rows][present[rows]] for (one, keys), (present, rows) in zip(data, kept, strict=True)
    ]
    calibrate(model, data)
    assert model.training
    scale = torch.cat(pairs).std(correction=0)
    torch.testing.assert_close(model.weights.u_scale, scale.detach())
    torch.testing.assert_close(model.weights.alpha(), 2.0 / scale.detach())
    assert "weights.u_scale" in model.state_dict()


def test_measuring_the_scale_leaves_the_running_means_of_training_alone() -> None:
    config = DrafConfig(width=8, encoders=SMALL_ENCODERS, alpha_mode="scaled", u_ema=0.9)
    model = build_model(config, SCHEMA, seed=0).train()
    batch = small_batch(SCHEMA)
    calibrate(model, [(batch, pass_keys(batch))])
    assert not model.weights.running_u.any()


def test_scaled_weights_do_not_depend_on_the_unit_of_u() -> None:
    module = weights_module(alpha_mode="scaled")
    module.u_scale.fill_(0.03)
    weights = module(U.float(), torch.zeros(1, 3), ALL, torch.ones(1))
    module.u_scale.fill_(0.3)
    torch.testing.assert_close(module(10 * U.float(), torch.zeros(1, 3), ALL, torch.ones(1)), weights)


def test_models_without_a_scale_leave_the_validation_data_unread() -> None:
    def unread() -> Any:
        raise AssertionError("read")
        yield

    calibrate(build_model(DrafConfig(width=8, encoders=SMALL_ENCODERS), SCHEMA, seed=0), unread())
    calibrate(build_model(MeanConfig(width=8, encoders=SMALL_ENCODERS), SCHEMA, seed=0), unread())


def test_prevalence_is_the_share_of_each_training_class() -> None:
    model = build_model(DrafConfig(width=8, encoders=SMALL_ENCODERS, u_space="prior_shifted"), SCHEMA, seed=0)
    set_prevalence(model, torch.tensor([90, 10]), torch.tensor([100, 100]))
    torch.testing.assert_close(model.log_prevalence.exp(), torch.tensor([0.9, 0.1]))
    set_prevalence(model, torch.tensor([100, 0]), torch.tensor([100, 100]))
    assert model.log_prevalence.isfinite().all()


def test_running_mean_replaces_u_in_training_only_and_is_free_of_its_start() -> None:
    module = weights_module(num_modalities=2, u_ema=0.5, reliability_alpha=10.0)
    everything = torch.ones(2, 2, dtype=torch.bool)
    nothing = torch.zeros(2, 2)
    first = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    smoothed = module.train()(first, nothing, everything, torch.ones(2))
    expected = masked_softmax(softmax_logits(torch.tensor([[0.2, 0.3]] * 2), 10.0), everything)
    torch.testing.assert_close(smoothed, expected)
    # The second row is padding; modality 1 is absent in the first, so its mean must stay as it is.
    module(torch.tensor([[0.5, 9.0], [7.0, 7.0]]), nothing, torch.tensor([[True, False], [True, True]]), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(module.running_u / module.running_weight, torch.tensor([(0.2 * 0.25 + 0.5 * 0.5) / 0.75, 0.3]))
    evaluated = module.eval()(first, nothing, everything, torch.ones(2))
    torch.testing.assert_close(evaluated, masked_softmax(softmax_logits(first, 10.0), everything))


@pytest.mark.parametrize(
    "options",
    [
        {"u_space": "logit", "uncertainty": "entropy"},
        {"reliability": "learned", "acd_gate": 1.0},
        {"reliability": "inverse", "alpha_mode": "scaled"},
    ],
)
def test_options_that_contradict_one_another_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="u_space|reliability|alpha"):
        DrafConfig(**options)

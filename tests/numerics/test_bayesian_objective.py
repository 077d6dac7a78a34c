"""L_total of the Bayesian stage: every term by hand, and nothing but the plain ELBO where the lambdas are 0 (spec 3.4-3.6, 3.8)."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from bayesian_inputs import DEATH, FINDINGS, MASK, SIDE_OF, TASKS, disc_batch, model_keys, schema_of
from torch import Tensor, nn

from draf_dist.errors import SpecError
from draf_dist.losses.alignment import anatomical, clinical_alignment, uncertainty_alignment
from draf_dist.losses.kl import kl_term
from draf_dist.losses.segmentation import segmentation_terms
from draf_dist.losses.task import task_loss
from draf_dist.models.segmentation import BayesianUnet, BayesianUnetConfig
from draf_dist.models.variational import weight_keys
from draf_dist.objectives.adversarial import AdversarialConfig, uncertainty_weights
from draf_dist.objectives.annotations import annotation
from draf_dist.objectives.bayesian import BayesianObjective, BayesianObjectiveConfig, row_losses
from draf_dist.schema.batch import Batch, MultiLabelTarget, SegmentationTarget, Term
from draf_dist.schema.label import TaskSpec

PLAIN = {"lambda_adv": 0.0, "lambda_att": 0.0, "lambda_clinical": 0.0, "lambda_anat": 0.0}
ATTACK = AdversarialConfig(steps=2, samples=2, epsilon=0.1)
NUM_TRAIN, NUM_STEPS = 40, 50


def small_model(task: TaskSpec = MASK, *, annotated: bool = False, seed: int = 0, **options: Any) -> BayesianUnet:
    torch.manual_seed(seed)
    return BayesianUnetConfig(widths=(4, 6), groups=2, modality="scan", **options).build(schema_of(task, annotated=annotated))


def objective(step: int = 30, **options: Any) -> BayesianObjective:
    config = BayesianObjectiveConfig(**options)
    return config.build(modality="scan", num_train=NUM_TRAIN, num_steps=NUM_STEPS, seed=3).at(step)


def batch_of(task: TaskSpec = MASK, *, annotated: bool = False, rows: int = 6) -> Batch:
    return disc_batch(schema_of(task, annotated=annotated), rows)


def total(terms: dict[str, Term]) -> Tensor:
    return torch.stack([term.scale * term.numerator / term.weight for term in terms.values()]).sum()


def value(term: Term) -> float:
    return (term.numerator / term.weight).item()


def divergence_by_torch(model: nn.Module, prior: float) -> float:
    named = dict(model.named_parameters())
    found = 0.0
    for name, mean in named.items():
        if name.endswith(".mean"):
            sigma = nn.functional.softplus(named[name.removesuffix("mean") + "rho"].double())
            posterior = torch.distributions.Normal(mean.double(), sigma)
            found += torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, prior)).sum().item()
    return found


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
@pytest.mark.parametrize("estimator", ["local", "weights"])
def test_without_lambdas_the_loss_is_the_plain_elbo_bit_for_bit(task: TaskSpec, estimator: str) -> None:
    batch, model = batch_of(task), small_model(task)
    keys = model_keys(batch)
    step = objective(adversarial=ATTACK, clinical_map="expert", body_mask="body", estimator=estimator, **PLAIN)
    terms = {name: term for name, term in step(model, batch, keys).items() if not name.startswith("signal_")}
    output = model(batch, keys, *([weight_keys(3, 30, 2)] if estimator == "weights" else []))
    counted = batch.weight * batch.present[:, 0]
    if task is MASK:
        expected = segmentation_terms(output.logits, batch.target, counted)
    else:
        expected = {"task": task_loss(output.logits, batch.target, counted)}
    assert terms.keys() == {*expected, "kl"}
    for name, term in expected.items():
        assert torch.equal(term.numerator, terms[name].numerator)
        assert (terms[name].weight.item(), terms[name].scale) == (term.weight.item(), 1)
    assert value(terms["kl"]) == pytest.approx(divergence_by_torch(model, 0.1), rel=1e-5)
    voxels = 16 * 16 if task is MASK else 1
    assert terms["kl"].scale == pytest.approx(1 / (NUM_TRAIN * voxels))
    divergence = kl_term(output.parts["posterior"], batch.weight, prior_sigma=0.1, scale=terms["kl"].scale)
    plain = total({**expected, "kl": divergence})
    assert torch.equal(total(terms), plain)
    gradient, wanted = (torch.autograd.grad(loss, list(model.decoder.parameters())) for loss in (total(terms), plain))
    assert all(torch.equal(a, b) for a, b in zip(gradient, wanted, strict=True))


def test_a_lambda_adds_its_term_and_leaves_the_others_as_they_are() -> None:
    batch, model = batch_of(annotated=True), small_model(annotated=True)
    keys = model_keys(batch)
    plain = objective(**PLAIN)(model, batch, keys)
    every = objective(
        lambda_att=0.01, lambda_clinical=0.2, clinical_map="expert", lambda_anat=0.3, body_mask="body", adversarial=ATTACK
    )(model, batch, keys)
    for name, term in plain.items():
        assert torch.equal(every[name].numerator, term.numerator)
        assert every[name].scale == term.scale
    assert every.keys() - plain.keys() == {
        *("attention", "clinical", "anatomical", "adversarial_dice", "adversarial_cross_entropy"),
        *("adversarial_clean_dice", "adversarial_clean_cross_entropy"),
    }
    assert [every[name].scale for name in ("attention", "clinical", "anatomical")] == [0.01, 0.2, 0.3]


def test_terms_of_the_maps_are_those_of_the_models_own_attention_and_uncertainty() -> None:
    batch, model = batch_of(annotated=True), small_model(annotated=True)
    batch = replace(batch, present=batch.present & torch.tensor([[True, True, True, True]] * 5 + [[True, False, False, True]]))
    keys = model_keys(batch)
    terms = objective(clinical_map="expert", body_mask="body", clinical_scaling="density")(model, batch, keys)
    output = model(batch, keys)
    attention, counted = output.parts["attention"], batch.present[:, 0].float()
    expected = {
        "attention": uncertainty_alignment(attention, output.parts["epistemic_map"], counted, target="uncertainty"),
        "clinical": clinical_alignment(attention, batch.inputs["expert"][:, 0], batch.present[:, 1], counted, scaling="density"),
        "anatomical": anatomical(attention, batch.inputs["body"][:, 0] > 0.5, batch.present[:, 2], counted),
    }
    for name, term in expected.items():
        assert value(terms[name]) == pytest.approx(value(term), rel=1e-6), name
    # Five scans of six, four of them annotated.
    assert [terms[name].weight.item() for name in ("attention", "clinical", "anatomical")] == [5, 4, 4]


def test_annotations_survive_normalisation_and_those_of_one_value_say_nothing() -> None:
    batch = batch_of(annotated=True)
    body = batch.inputs["body"].clone()
    body[0] = 1.0
    changed = replace(batch, inputs={**batch.inputs, "body": (body - 0.7) / 0.4, "expert": 3 * batch.inputs["expert"] - 5})
    expert, known = annotation(changed, "expert")
    torch.testing.assert_close(expert, batch.inputs["expert"][:, 0])
    assert known.all()
    terms = objective(clinical_map="expert", body_mask="body")(small_model(annotated=True), changed, model_keys(batch))
    assert (terms["clinical"].weight.item(), terms["anatomical"].weight.item()) == (5, 4)


def test_an_annotation_that_is_not_there_is_named() -> None:
    batch = batch_of()
    with pytest.raises(SpecError, match="objective: expected an image of the release, found 'expert'. Images: scan"):
        objective(clinical_map="expert")(small_model(), batch, model_keys(batch))


def test_the_divergence_is_scaled_by_what_training_looks_at_and_comes_in_slowly() -> None:
    batch, model = batch_of(), small_model()
    keys = model_keys(batch)
    row = objective(kl_per="row", lambda_kl=0.5)(model, batch, keys)["kl"]
    assert row.scale == pytest.approx(0.5 / NUM_TRAIN)
    assert objective(4, kl_per="row")(model, batch, keys)["kl"].scale == pytest.approx(0.5 / NUM_TRAIN)
    assert objective(0, kl_per="row")(model, batch, keys)["kl"].scale == pytest.approx(0.1 / NUM_TRAIN)
    assert value(objective(prior_sigma=1.0)(model, batch, keys)["kl"]) == pytest.approx(divergence_by_torch(model, 1.0), rel=1e-5)


def test_the_adversarial_term_is_the_weighted_loss_of_the_attacked_images() -> None:
    batch, model = batch_of(SIDE_OF), small_model(SIDE_OF)
    keys, step = model_keys(batch), objective(adversarial=ATTACK, lambda_adv=0.5)
    terms = step(model, batch, keys)
    attacked = step.attack(model, batch, keys, ATTACK)
    output = model(attacked, keys)
    counted = batch.present[:, 0].float()
    weights = uncertainty_weights(output.uncertainty["epistemic"][:, 0], counted, lambda values: values)
    assert ((weights >= 0.5) & (weights <= 2)).all()
    assert weights[counted > 0].unique().numel() > 1
    expected = (counted * weights * row_losses(output, batch.target)).sum() / (counted * batch.target.observed).sum()
    assert value(terms["adversarial_task"]) == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(terms["adversarial_clean_task"].numerator, terms["task"].numerator)
    # .5 (1 - .5), and .5 * .5: the clean loss counts 1.25 in all.
    assert [terms[name].scale for name in ("task", "adversarial_task", "adversarial_clean_task")] == [1, 0.25, 0.25]
    assert not weights.requires_grad


def test_a_is_the_share_of_the_clean_loss() -> None:
    """L_adv = a L(x) + (1 - a) w L(x_adv): .2 and .8, each times lambda_adv."""
    batch, model = batch_of(SIDE_OF), small_model(SIDE_OF)
    attack = ATTACK.model_copy(update={"clean_weight": 0.2})
    terms = objective(adversarial=attack, lambda_adv=0.5)(model, batch, model_keys(batch))
    assert [terms[name].scale for name in ("adversarial_clean_task", "adversarial_task")] == pytest.approx([0.1, 0.4])


def test_the_clean_part_can_be_left_out() -> None:
    batch, model = batch_of(SIDE_OF), small_model(SIDE_OF)
    attack = ATTACK.model_copy(update={"include_clean": False})
    terms = objective(adversarial=attack)(model, batch, model_keys(batch))
    assert "adversarial_task" in terms
    assert "adversarial_clean_task" not in terms


@pytest.mark.parametrize("task", [MASK, FINDINGS], ids=lambda task: task.name)
@pytest.mark.parametrize("estimator", ["local", "weights"])
def test_an_attack_stays_near_the_image_and_raises_its_loss(task: TaskSpec, estimator: str) -> None:
    batch, model = batch_of(task), small_model(task)
    keys, step = model_keys(batch, 8), objective(adversarial=ATTACK, estimator=estimator)
    found = step.attack(model, batch, keys, ATTACK).inputs["scan"]
    there = batch.present[:, 0]
    clean = batch.inputs["scan"]
    reach = 0.1 * (clean.flatten(1).amax(1) - clean.flatten(1).amin(1))
    moved = (found - clean).flatten(1).abs().amax(1)
    assert (moved[there] <= reach[there] + 1e-6).all()
    assert (moved[there] > 0).all()
    assert not found[~there].any()
    known = there & (batch.target.observed.any(1) if isinstance(batch.target, MultiLabelTarget) else batch.target.observed)
    chosen = [weight_keys(3, 30, 8)] if estimator == "weights" else []
    with torch.no_grad():
        before, after = (
            row_losses(model(replace(batch, inputs={**batch.inputs, "scan": image}), keys, *chosen), batch.target)[known].mean()
            for image in (clean, found)
        )
    assert after > before
    assert all(parameter.grad is None for parameter in model.parameters())
    again = step.attack(model, batch, keys, ATTACK).inputs["scan"]
    part = step.attack(model, batch.rows(2, 4), keys[:, 2:4], ATTACK).inputs["scan"]
    assert torch.equal(again, found)
    # Rounding of smaller products may turn the sign of a gradient that is as good as 0.
    assert ((part - found[2:4]).abs() < 1e-6).float().mean() > 0.97


def test_an_attack_has_draws_of_its_own_however_many_passes_there_are() -> None:
    batch, model = batch_of(), small_model()
    attack, step = ATTACK.model_copy(update={"samples": 3}), objective()
    few, many = (step.attack(model, batch, model_keys(batch, passes), attack).inputs["scan"] for passes in (1, 8))
    assert torch.equal(few, many)
    one = step.attack(model, batch, model_keys(batch), attack.model_copy(update={"samples": 1})).inputs["scan"]
    assert not torch.equal(one, many)


def test_sampled_weights_change_with_the_step_and_local_draws_do_not() -> None:
    batch, model = batch_of(SIDE_OF), small_model(SIDE_OF)
    keys = model_keys(batch)
    for estimator, same in (("local", True), ("weights", False)):
        first, later = (value(objective(step, estimator=estimator, **PLAIN)(model, batch, keys)["task"]) for step in (3, 4))
        assert (first == later) is same


def test_one_pass_is_refused_where_an_uncertainty_is_needed() -> None:
    batch, model = batch_of(), small_model()
    keys = model_keys(batch, 1)
    with pytest.raises(SpecError, match="passes_train: expected at least 2, found 1"):
        objective()(model, batch, keys)
    with pytest.raises(SpecError, match="passes_train"):
        objective(**{**PLAIN, "lambda_adv": 0.5}, adversarial=ATTACK)(model, batch, keys)
    objective(**PLAIN)(model, batch, keys)


def several_heads() -> tuple[BayesianUnet, Batch]:
    """The label is the mask; beside it a class, of which two rows are known, and three findings, of which none is."""
    model = small_model(heads={"side": SIDE_OF, "findings": FINDINGS})
    batch, side, findings = (batch_of(task) for task in (MASK, SIDE_OF, FINDINGS))
    only = torch.arange(6) < 2
    unknown = torch.zeros(6, 3, dtype=torch.bool)
    targets: Any = {
        "organ": batch.target,
        "side": replace(side.target, observed=only, label=side.target.label * only),
        "findings": replace(findings.target, observed=unknown, label=unknown),
    }
    return model, replace(batch, target=targets)


def test_every_head_has_its_own_terms_over_the_rows_that_it_knows() -> None:
    model, batch = several_heads()
    keys = model_keys(batch)
    terms = objective(**PLAIN)(model, batch, keys)
    counts = {name: term.weight.item() for name, term in terms.items() if term.scale == 1}
    assert counts == {"dice": 4, "cross_entropy": 4, "side_task": 2, "findings_task": 0}
    output = model(batch, keys)
    side = output.parts["logits/side"].transpose(0, 1)
    expected = task_loss(side, batch.target["side"], batch.present[:, 0].float())
    assert torch.equal(terms["side_task"].numerator, expected.numerator)
    assert terms["findings_task"].numerator.item() == 0


def test_a_target_of_an_unknown_head_is_refused() -> None:
    model, batch = several_heads()
    targets: Any = {**batch.target, "grade": batch.target["side"]}
    with pytest.raises(SpecError, match="one for the label, found organ, grade. Heads besides the label: side, findings"):
        objective(**PLAIN)(model, replace(batch, target=targets), model_keys(batch))


@pytest.mark.parametrize("cut", [(6,), (2, 4), (1, 0, 5)])
@pytest.mark.parametrize("task", [MASK, DEATH], ids=lambda task: task.name)
def test_terms_do_not_depend_on_how_rows_are_split(task: TaskSpec, cut: tuple[int, ...]) -> None:
    batch, model = batch_of(task, annotated=True), small_model(task, annotated=True)
    batch = replace(batch, weight=torch.tensor([1.0, 1, 1, 0, 1, 1]))
    keys = model_keys(batch)
    step = objective(clinical_map="expert", body_mask="body")
    whole = step(model, batch, keys)
    starts = [sum(cut[:number]) for number in range(len(cut))]
    parts = [
        step(model, batch.rows(start, start + size), keys[:, start : start + size])
        for start, size in zip(starts, cut, strict=True)
        if size
    ]
    for name, term in whole.items():
        assert sum(part[name].numerator.item() for part in parts) == pytest.approx(term.numerator.item(), rel=1e-4, abs=1e-6), name
        assert sum(part[name].weight.item() for part in parts) == pytest.approx(term.weight.item())
        assert {part[name].scale for part in parts} == {term.scale}


def test_voxels_are_those_of_the_mask_that_was_delivered() -> None:
    batch = batch_of()
    target = batch.target
    assert isinstance(target, SegmentationTarget)
    cropped = replace(
        batch,
        inputs={**batch.inputs, "scan": batch.inputs["scan"][..., :12, :8]},
        target=replace(target, mask=target.mask[:, :12, :8]),
    )
    assert objective()(small_model(), cropped, model_keys(batch))["kl"].scale == pytest.approx(1 / (NUM_TRAIN * 12 * 8))

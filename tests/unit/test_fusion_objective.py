"""Terms of the fusion objective: weights, observed labels, and that parts of a batch add up to the whole."""

import math
from dataclasses import replace

import pytest
import torch
from model_inputs import SMALL_ENCODERS, pass_keys, small_batch, small_schema

from draf_dist.errors import SpecError
from draf_dist.losses.task import task_loss, unimodal_task_loss
from draf_dist.models.build import build_model
from draf_dist.models.calibration import fit_on_clean
from draf_dist.models.fusion import FusionConfig
from draf_dist.models.fusion.concat import ConcatConfig
from draf_dist.models.fusion.draf import DrafConfig
from draf_dist.models.fusion.late_mean import LateMeanConfig
from draf_dist.models.fusion.mean import MeanConfig
from draf_dist.models.fusion.severity_rejection import SeverityRejectionConfig
from draf_dist.objectives.fusion import FusionObjectiveConfig
from draf_dist.schema.batch import ClassTarget, SeriesInput

SCHEMA = small_schema()
BATCH = small_batch(SCHEMA)
P = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
TARGET = ClassTarget(torch.tensor([0, 1]), torch.tensor([True, True]))


def test_cross_entropy_is_the_weighted_mean_over_rows_and_the_mean_over_passes() -> None:
    logits = torch.stack([P.log(), P.flip(1).log()])
    term = task_loss(logits, TARGET, torch.tensor([1.0, 3.0]))
    first, second = -(math.log(0.9) + math.log(0.1)) / 2, -(math.log(0.6) + math.log(0.4)) / 2
    assert term.numerator.item() == pytest.approx(first + 3 * second, rel=1e-6)
    assert term.weight.item() == 4


def test_rows_without_a_label_count_nowhere() -> None:
    target = ClassTarget(torch.tensor([0, 0]), torch.tensor([True, False]))
    term = task_loss(P.log().unsqueeze(0), target, torch.ones(2))
    assert (term.numerator / term.weight).item() == pytest.approx(-math.log(0.9), rel=1e-6)
    assert term.weight.item() == 1


def test_unimodal_loss_is_the_mean_over_present_modalities_of_each_row() -> None:
    modalities = torch.tensor([[[0.5, 0.5], [0.9, 0.1]], [[0.4, 0.6], [0.2, 0.8]]])
    present = torch.tensor([[True, True], [False, True]])
    term = unimodal_task_loss(modalities.log().unsqueeze(0), TARGET, present, torch.ones(2))
    expected = -(math.log(0.5) + math.log(0.9)) / 2 - math.log(0.8)
    assert term.numerator.item() == pytest.approx(expected, rel=1e-6)
    assert term.weight.item() == 2


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (DrafConfig(), {"task", "acd", "unimodal"}),
        # With the shared head the proposal has no unimodal loss.
        (DrafConfig(uni_head="shared"), {"task", "acd"}),
        (MeanConfig(), {"task"}),
        (ConcatConfig(), {"task"}),
        (LateMeanConfig(), {"task", "unimodal"}),
    ],
)
def test_terms_are_those_the_model_has_heads_for(config: FusionConfig, names: set[str]) -> None:
    model = build_model(config.model_copy(update={"width": 8, "encoders": SMALL_ENCODERS}), SCHEMA, seed=0)
    terms = FusionObjectiveConfig(lambda_acd=0.2, lambda_uni=0.7).build()(model, BATCH, pass_keys(BATCH))
    trained = {name: term.scale for name, term in terms.items() if not name.startswith("signal_")}
    scales = {"task": 1.0, "acd": 0.2, "unimodal": 0.7}
    assert trained == {name: scales[name] for name in names}
    assert all(term.scale == 0 for name, term in terms.items() if name not in trained)


def test_what_a_model_rejected_is_missing_in_the_losses_too() -> None:
    """Its features are zeros: with a loss on them the heads of a modality would learn from those instead."""
    inner = DrafConfig(width=8, encoders=SMALL_ENCODERS)
    model = build_model(SeverityRejectionConfig(fusion=inner), SCHEMA, seed=0)
    train, validation = ([small_batch(SCHEMA, rows=64, seed=seed)] for seed in (1, 2))
    fit_on_clean(model, lambda: train, lambda: validation, seed=0)
    labs = BATCH.inputs["labs"]
    assert isinstance(labs, SeriesInput)
    noisy = replace(BATCH, inputs=BATCH.inputs | {"labs": replace(labs, values=labs.values * 1000)})
    keys, objective = pass_keys(noisy), FusionObjectiveConfig().build()
    kept = model(noisy, keys).parts["present"]
    rejected = noisy.present & ~kept
    assert rejected[:, noisy.modalities.index("labs")].any()
    found, expected = objective(model, noisy, keys), objective(model.fusion, replace(noisy, present=kept), keys)
    for name in ("task", "acd", "unimodal"):
        assert torch.equal(found[name].numerator, expected[name].numerator), name
        assert torch.equal(found[name].weight, expected[name].weight), name


def test_terms_of_the_parts_of_a_batch_add_up_to_those_of_the_whole() -> None:
    model = build_model(DrafConfig(width=8, encoders=SMALL_ENCODERS), SCHEMA, seed=0)
    objective = FusionObjectiveConfig().build()
    keys = pass_keys(BATCH)
    whole = objective(model, BATCH, keys)
    parts = [objective(model, BATCH.rows(a, b), keys[:, a:b]) for a, b in ((0, 3), (3, 8))]
    for name, term in whole.items():
        torch.testing.assert_close(parts[0][name].numerator + parts[1][name].numerator, term.numerator)
        torch.testing.assert_close(parts[0][name].weight + parts[1][name].weight, term.weight)


def test_the_corruption_target_is_what_was_applied() -> None:
    model = build_model(DrafConfig(width=8, encoders=SMALL_ENCODERS), SCHEMA, seed=0)
    objective, keys = FusionObjectiveConfig().build(), pass_keys(BATCH)
    other = replace(BATCH, corrupted=~BATCH.corrupted)
    left, right = objective(model, BATCH, keys), objective(model, other, keys)
    assert torch.equal(left["task"].numerator, right["task"].numerator)
    # -log c - log(1 - c) does not depend on the target: both targets together give the sum of both logs.
    logits = model(BATCH, keys).corruption_logits
    both = -(logits.sigmoid().log() + (-logits).sigmoid().log())[BATCH.present].sum()
    torch.testing.assert_close(left["acd"].numerator + right["acd"].numerator, both)


def test_an_objective_that_trains_nothing_is_refused() -> None:
    model = build_model(LateMeanConfig(width=8, encoders=SMALL_ENCODERS), SCHEMA, seed=0)
    objective = FusionObjectiveConfig(lambda_uni=0).build()
    with pytest.raises(SpecError, match="objective.lambda_uni above 0"):
        objective(model, BATCH, pass_keys(BATCH))
    with torch.no_grad():
        objective(model, BATCH, pass_keys(BATCH))

"""O8 and MUSE's contrastive pair, against loops over pairs; what its embeddings carry through a loop that cuts their graph."""

import math
from dataclasses import replace

import pytest
import torch
from model_inputs import SMALL_ENCODERS, pass_keys, small_batch, small_schema
from torch import Tensor, nn

from draf_dist.errors import SpecError
from draf_dist.losses.gather import Embeddings, one_process
from draf_dist.losses.patient_contrast import Labels, labels_of, num_labels, patient_contrast, with_labels
from draf_dist.models.build import build_model
from draf_dist.models.fusion.aum import AumConfig, ContrastHead
from draf_dist.models.fusion.mean import MeanConfig
from draf_dist.objectives.aum import AumObjectiveConfig
from draf_dist.schema.batch import Batch, ClassTarget, MultiLabelTarget, SegmentationTarget, SurvivalTarget, Target
from draf_dist.schema.label import LabelSpec, MultiLabelSpec, SurvivalSpec
from draf_dist.schema.modality import DataSchema
from draf_dist.training.loop import CoupledObjective, StepRules, train_steps
from draf_dist.training.schedule import EarlyStopping
from draf_dist.training.state import TrainState
from draf_dist.training.torch_engine import TorchEngine

SCHEMA = small_schema()
CONFIG = AumConfig(width=8, encoders=SMALL_ENCODERS, warm_epochs=0)


def rows(
    first: Tensor, second: Tensor, label: list[int], uid: list[int] | None = None, known: list[bool] | None = None
) -> Embeddings:
    count = len(first)
    there = Embeddings(first, second, torch.tensor(uid or list(range(count))), torch.ones(count, dtype=torch.bool))
    observed = torch.tensor(known or [True] * count)
    return with_labels(there, labels_of(ClassTarget(torch.tensor(label), observed)))


def means(embeddings: Embeddings, count: int = 1) -> dict[str, float]:
    return {name: (term.numerator / term.weight).item() for name, term in patient_contrast(embeddings, count).items()}


@pytest.mark.parametrize(("tau", "expected"), [(0.5, 0.5130153), (0.07, 0.0558439)])
def test_oracle_of_symmetric_info_nce(tau: float, expected: float) -> None:
    root = tau**-0.5
    u, v = torch.eye(2) * root, torch.tensor([[0.8, 0.6], [0.6, 0.8]]) * root
    assert means(rows(u, v, [0, 1]))["contrastive"] == pytest.approx(expected, abs=1e-6)


def random_rows(count: int) -> tuple[Tensor, Tensor]:
    first, second = torch.randn(2, count, 5, generator=torch.Generator().manual_seed(2))
    return first, second


def test_both_terms_are_those_of_a_loop_over_pairs() -> None:
    u, v = random_rows(6)
    label, known, uid = [0, 1, 1, 2, 0, 0], [True, True, True, True, True, False], [5, 6, 7, 8, 9, 6]
    same_study = [[uid[i] == uid[j] for j in range(6)] for i in range(6)]
    expected = 0.0
    for anchors, others in ((u, v), (v, u)):
        for i in range(6):
            others_of_i = [j for j in range(6) if j == i or not same_study[i][j]]
            total = sum(math.exp(float(anchors[i] @ others[j])) for j in others_of_i)
            expected += (math.log(total) - float(anchors[i] @ others[i])) / 12
    pairs = [(i, j) for i in range(5) for j in range(5)]
    supervised = 0.0
    for share, anchors, others in ((0.5, u, u), (0.25, u, v), (0.25, v, u)):
        for i, j in pairs:
            p = 1 / (1 + math.exp(-float(anchors[i] @ others[j])))
            supervised -= share * math.log(p if label[i] == label[j] else 1 - p) / len(pairs)
    found = means(rows(u, v, label, uid, known))
    assert found["contrastive"] == pytest.approx(expected, rel=1e-5)
    assert found["supervised"] == pytest.approx(supervised, rel=1e-4)


def test_rows_that_are_not_valid_change_neither_value_nor_gradient() -> None:
    u, v = random_rows(4)
    plain = [values.clone().requires_grad_() for values in (u, v)]
    filler = torch.full((2, 5), float("nan"))
    padded = [torch.cat([values, filler]).requires_grad_() for values in (u, v)]
    short = rows(plain[0], plain[1], [0, 1, 0, 1])
    long = rows(padded[0], padded[1], [0, 1, 0, 1, 0, 1], uid=[0, 1, 2, 3, -1, -1])
    terms = [patient_contrast(each, 1) for each in (short, replace(long, valid=torch.arange(6) < 4))]
    for name in ("contrastive", "supervised"):
        assert terms[0][name].weight == terms[1][name].weight
        torch.testing.assert_close(terms[0][name].numerator, terms[1][name].numerator)
    mine, theirs = (
        torch.autograd.grad(each["contrastive"].numerator + each["supervised"].numerator, leaves)
        for each, leaves in zip(terms, (plain, padded), strict=True)
    )
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(other[:4], one)
        assert not other[4:].any()


def test_a_batch_without_a_pair_is_zero_with_a_gradient() -> None:
    u, v = (values.requires_grad_() for values in random_rows(2))
    terms = patient_contrast(replace(rows(u, v, [0, 1]), valid=torch.zeros(2, dtype=torch.bool)), 1)
    for term in terms.values():
        assert (term.numerator.item(), term.weight.item()) == (0, 0)
    sum(term.numerator for term in terms.values()).backward()
    assert not u.grad.any()


def test_what_two_studies_have_in_common() -> None:
    yes, no = True, False
    several = MultiLabelTarget(torch.tensor([[yes, yes], [yes, no], [no, no]]), torch.tensor([[yes, yes], [yes, yes], [no, yes]]))
    labels = labels_of(several)
    assert labels.value.tolist() == [[1, 1], [1, 0], [0, 0]]
    assert labels.known.tolist() == [[1, 1], [1, 1], [0, 1]]
    interval = torch.tensor([2, 2, 1])
    seen = SurvivalTarget(torch.ones(3), torch.tensor([yes, no, yes]), interval, torch.tensor([yes, yes, yes]))
    assert labels_of(seen).value.tolist() == [[2], [0], [1]]
    assert labels_of(seen).known.tolist() == [[1], [0], [1]]
    with pytest.raises(TypeError, match="SegmentationTarget has no label"):
        labels_of(SegmentationTarget(torch.zeros(1, 2, 2, dtype=torch.int64), torch.ones(1, dtype=torch.bool)))


def test_of_several_labels_the_share_that_agrees_counts() -> None:
    """Two rows, of which one of two labels agrees: BCE towards 1/2 off the diagonal, towards 1 on it."""
    u = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    there = Embeddings(u, u, torch.tensor([0, 1]), torch.ones(2, dtype=torch.bool))
    found = means(with_labels(there, Labels(torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.ones(2, 2))), count=2)

    def bce(similarity: float, target: float) -> float:
        p = 1 / (1 + math.exp(-similarity))
        return -target * math.log(p) - (1 - target) * math.log(1 - p)

    assert found["supervised"] == pytest.approx((2 * bce(1.0, 1) + 2 * bce(0.6, 0.5)) / 4, rel=1e-5)


def test_the_temperature_is_learned_through_the_embeddings() -> None:
    head = ContrastHead(5)
    assert head.log_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-6)
    z, other = random_rows(4)
    first, second = head(z), head(other)
    torch.testing.assert_close(first.square().sum(1), torch.full((4,), 1 / 0.07))
    term = patient_contrast(rows(first, second, [0, 1, 0, 1]), 1)["contrastive"]
    (found,) = torch.autograd.grad(term.numerator, head.log_scale)
    unit = [nn.functional.normalize(values, dim=1).detach() for values in (first, second)]
    scale = head.log_scale.detach().clone().requires_grad_()
    logits = unit[0] @ unit[1].T * scale.exp()
    own = torch.arange(4)
    loss = nn.functional.cross_entropy(logits, own, reduction="sum") + nn.functional.cross_entropy(logits.T, own, reduction="sum")
    (expected,) = torch.autograd.grad(loss / 2, scale)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# The objective.

TARGETS: dict[str, tuple[LabelSpec | MultiLabelSpec | SurvivalSpec, Target]] = {
    "class": (LabelSpec(name="y", classes=("a", "b")), small_batch(SCHEMA).target),
    "multilabel": (
        MultiLabelSpec(name="y", labels=("a", "b", "c")),
        MultiLabelTarget(torch.arange(24).view(8, 3) * 7 % 5 < 2, torch.ones(8, 3, dtype=torch.bool)),
    ),
    "survival": (
        SurvivalSpec(name="y", edges=(1.0, 2.0)),
        SurvivalTarget(torch.ones(8), torch.arange(8) % 2 == 0, torch.arange(8) % 3, torch.ones(8, dtype=torch.bool)),
    ),
}


def task(kind: str) -> tuple[DataSchema, Batch]:
    label, target = TARGETS[kind]
    return SCHEMA.model_copy(update={"label": label}), replace(small_batch(SCHEMA), target=target)


@pytest.mark.parametrize("kind", TARGETS)
def test_every_task_trains_every_parameter(kind: str) -> None:
    schema, batch = task(kind)
    model = build_model(CONFIG, schema, seed=0).train()
    terms = AumObjectiveConfig(lambda_cl=0.7, beta=0.2).build(schema)(model, batch, pass_keys(batch, 2))
    scales = {name: term.scale for name, term in terms.items() if not name.startswith("signal_")}
    assert scales == {"task": 1.0, "vib": 0.2, "contrastive": 0.7, "supervised": 0.7}
    assert {name for name in terms if name.startswith("signal_")} == {
        f"signal_{name}"
        for name in ("attention_entropy", "log_variance", "log_variance_spread", "absent_attention", "independent", "mixture")
    }
    sum(term.scale * term.numerator / term.weight for term in terms.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert num_labels(schema.label) == (3 if kind == "multilabel" else 1)


def test_terms_of_no_weight_reach_every_parameter_too() -> None:
    schema, batch = task("class")
    model = build_model(CONFIG, schema, seed=0).train()
    terms = AumObjectiveConfig(lambda_cl=0, beta=0).build(schema)(model, batch, pass_keys(batch, 2))
    sum(term.scale * term.numerator for term in terms.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_another_model_is_refused() -> None:
    model = build_model(MeanConfig(width=8, encoders=SMALL_ENCODERS), SCHEMA, seed=0)
    batch = small_batch(SCHEMA)
    with pytest.raises(SpecError, match="expected the model aum"):
        AumObjectiveConfig().build(SCHEMA)(model, batch, pass_keys(batch))


def trained(kind: str, accumulation: int) -> tuple[list[float], dict[str, Tensor]]:
    schema, batch = task(kind)
    model = build_model(CONFIG, schema, seed=0)
    engine = TorchEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), clip_norm=None)
    objective = AumObjectiveConfig(beta=0.1).build(schema, one_process)
    assert isinstance(objective, CoupledObjective)
    rules = StepRules(lambda b: b, lambda b: pass_keys(b, 2), lambda step: 0.1, accumulation=accumulation)
    steps = [(step, batch) for step in range(3)]
    reports = list(train_steps(TrainState(0, EarlyStopping(patience=1)), engine, steps, objective, rules))
    return [report.loss for report in reports], {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("accumulation", [3, 9])
def test_micro_batches_change_nothing_not_even_those_without_a_row(kind: str, accumulation: int) -> None:
    whole, parts = trained(kind, 1), trained(kind, accumulation)
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    for name, value in whole[1].items():
        torch.testing.assert_close(parts[1][name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")

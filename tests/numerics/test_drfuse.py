"""DrFuse: the published counts, O13, and the core and its losses written out as loops (spec 4.6)."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_inputs import SMALL_ENCODERS, pass_keys, small_batch, small_schema
from torch import Tensor, nn

from draf_dist.losses.drfuse import orthogonality, output_losses, ranking, shared_divergence
from draf_dist.losses.task import task_losses
from draf_dist.models.build import build_model
from draf_dist.models.drfuse_trunks import TrunksConfig
from draf_dist.models.fusion.drfuse import Drfuse, DrfuseConfig, DrfuseCore, modality_share, pool_logits
from draf_dist.models.link import Link
from draf_dist.objectives.drfuse import DrfuseObjectiveConfig
from draf_dist.schema.batch import Batch, ClassTarget, MultiLabelTarget, SurvivalTarget, Term
from draf_dist.schema.label import MultiLabelSpec
from draf_dist.schema.modality import DataSchema, ImageSpec, SeriesSpec, VariableSpec

LABELS = MultiLabelSpec(name="phenotypes", labels=tuple(f"p{index}" for index in range(25)))
PAPER = DataSchema(
    modalities=(
        # 38 values and 38 observed bits, where the paper has 59 values and 17 bits: 76 both.
        SeriesSpec(name="ehr", variables=tuple(VariableSpec(name=f"v{i}") for i in range(38)), num_steps=350, step_h=1.0),
        ImageSpec(name="cxr", channels=3, height=224, width=224),
    ),
    label=LABELS,
    sites=("north",),
)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_are_the_published_ones() -> None:
    with torch.device("meta"):
        model: Any = DrfuseConfig(width=256, trunks=TrunksConfig()).build(PAPER)
    assert count(model) == 54_240_932
    series, image = (model.encoders.trunks[f"m_{name}"] for name in PAPER.names)
    head = 256 * 25 + 25
    assert count(series) + head == 4_060_953
    assert count(image.stem) + count(image.norm) == 9_536
    assert count(image.shared) + count(image.shared_output) == 24_023_040
    assert count(model.core.projection) == 328_704
    assert count(model.core.attention) == 1_776_384
    assert count(model.core.distinct_heads) + count(model.core.shared_head) + count(model.core.head) == 4 * head


# O13


def test_pooled_logits_are_the_logit_of_the_mean_probability() -> None:
    values = torch.tensor([[[[0.0], [2.0]]]], dtype=torch.float64)
    both = torch.ones(1, 2, dtype=torch.bool)
    assert pool_logits(values, both).item() == pytest.approx(0.8019831, abs=1e-6)
    values = 3 * torch.randn(2, 5, 3, 4, dtype=torch.float64)
    every = torch.ones(5, 3, dtype=torch.bool)
    torch.testing.assert_close(pool_logits(values, every), values.sigmoid().mean(2).logit())
    first = every & torch.tensor([True, False, False])
    torch.testing.assert_close(pool_logits(values, first), values[:, :, 0])
    assert not pool_logits(values, ~every).any()


def test_pooling_far_from_zero_is_finite_with_its_gradient() -> None:
    values = torch.tensor([[[[200.0], [-300.0]], [[-400.0], [0.0]]]], requires_grad=True)
    present = torch.tensor([[True, True], [True, False]])
    pooled = pool_logits(values, present)
    assert pooled.flatten().tolist() == pytest.approx([0.0, -400.0], abs=1e-5)
    pooled.sum().backward()
    assert values.grad is not None
    assert values.grad.isfinite().all()


def as_features(*rows: tuple[float, ...]) -> Tensor:
    """(1, 1, M, Z) whose sigmoids are the given rows."""
    return torch.tensor(rows, dtype=torch.float64).logit().view(1, 1, len(rows), -1)


@pytest.mark.parametrize(("reading", "expected"), [("published", 0.0812983), ("bernoulli", 0.1880539)])
def test_divergence_is_that_of_the_oracle(reading: Any, expected: float) -> None:
    both = torch.ones(1, 2, dtype=torch.bool)
    term = shared_divergence(as_features((0.2, 0.9), (0.6, 0.5)), both, torch.ones(1), reading)
    assert (term.numerator / term.weight).item() == pytest.approx(expected, abs=1e-6)


def test_published_divergence_counts_unpaired_rows_and_ours_does_not() -> None:
    shared = as_features((0.2, 0.9), (0.6, 0.5)).expand(2, -1, -1, -1)
    present, weight = torch.tensor([[True, True], [True, False]]), torch.ones(2)
    ours, theirs = (shared_divergence(shared, present, weight, reading) for reading in ("bernoulli", "published"))
    assert (ours.numerator / ours.weight).item() == pytest.approx(0.1880539, abs=1e-6)
    assert (theirs.numerator / theirs.weight).item() == pytest.approx(2 * 0.0812983, abs=1e-6)


def test_attention_is_ranked_as_in_the_oracle() -> None:
    """Losses ehr .2, cxr .5, shared .3; attention .5, .3, .2: terms 0, 0, .1 of (cxr, ehr), (shared, ehr), (shared, cxr)."""
    terms = ranking_of([0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [True, True, True])
    assert [term.numerator.item() for term in terms] == pytest.approx([0, 0, 0.1], abs=1e-6)
    assert [term.weight.item() for term in terms] == [0, 0, 1]
    mean = sum(value(term) for term in terms) / 3
    assert mean == pytest.approx(0.0333333, abs=1e-6)


@pytest.mark.parametrize("there", [[True, False, True], [False, True, True], [False, False, False]])
def test_without_a_pair_nothing_is_ranked(there: list[bool]) -> None:
    assert all(term.numerator == 0 and term.weight == 0 for term in ranking_of([0.1, 0.2, 0.7], [0.2, 0.5, 0.9], there))


def test_equal_attention_is_never_penalised() -> None:
    """Margin 0: spec 4.6 defect d."""
    assert not any(value(term) for term in ranking_of([1 / 3, 1 / 3, 1 / 3], [0.2, 0.5, 0.3], [True, True, True]))


def ranking_of(attention: list[float], losses: list[float], there: list[bool]) -> list[Term]:
    """Of one study, one pass and one label."""
    known, weight = torch.ones(1, 1, dtype=torch.bool), torch.ones(1)
    return ranking(torch.tensor([[[attention]]]), torch.tensor([[[losses]]]), torch.tensor([there]), known, weight)


def value(term: Term) -> float:
    return (term.numerator / term.weight.clamp_min(1e-12)).item()


# The equations again, one number at a time: no tensor operation but indexing.


def linear(row: list[float], weight: Any, bias: Any) -> list[float]:
    return [sum(w * x for w, x in zip(ws, row, strict=True)) + b for ws, b in zip(weight, bias, strict=True)]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def logsumexp(*values: float) -> float:
    return math.log(sum(math.exp(x) for x in values))


def project(core: DrfuseCore, row: list[float]) -> list[float]:
    for index in (0, 2, 4):
        layer: Any = core.projection[index]
        row = linear(row, layer.weight.tolist(), layer.bias.tolist())
        row = row if index == 4 else [max(x, 0.0) for x in row]
    return row


def reference(core: DrfuseCore, shared: list[list[float]], distinct: list[list[float]], paired: bool) -> dict[str, Any]:
    """The published forward of one study: (EHR, CXR), of which EHR is always there."""
    width, num_labels = len(shared[0]), core.shared_head.out_features
    h1, h2 = (project(core, row) for row in shared)
    pooled = [logsumexp(a + b, a + b, a, b) - logsumexp(0, 0, a, b) if paired else a for a, b in zip(h1, h2, strict=True)]
    tokens = [distinct[0], distinct[1], pooled]
    there = [0, 1, 2] if paired else [0, 2]
    layer = core.attention.linear
    parts = [linear(row, layer.weight.tolist(), layer.bias.tolist()) for row in tokens]
    slot = [[part[i * width : (i + 1) * width] for i in range(num_labels + 2)] for part in parts]
    query = [sum(slot[t][0][z] for t in there) / len(there) for z in range(width)]
    attention, logits = [], []
    for label in range(num_labels):
        scores = {t: sum(q * k for q, k in zip(query, slot[t][2 + label], strict=True)) / math.sqrt(width) for t in there}
        total = sum(math.exp(score) for score in scores.values())
        shares = [math.exp(scores[t]) / total if t in there else 0.0 for t in range(3)]
        features = [sum(shares[t] * slot[t][1][z] for t in there) for z in range(width)]
        row, bias = core.head.weight[label, 0].tolist(), core.head.bias[label, 0].item()
        attention.append(shares)
        logits.append(sum(w * x for w, x in zip(row, features, strict=True)) + bias)
    heads = core.distinct_heads
    return {
        "logits": logits,
        "attention": attention,
        "shared": [h1, h2],
        "shared_logits": linear(pooled, core.shared_head.weight.tolist(), core.shared_head.bias.tolist()),
        "distinct_logits": [linear(distinct[m], heads.weight[m].tolist(), heads.bias[m].tolist()) for m in (0, 1)],
    }


def bce(logit: float, label: bool) -> float:
    return -math.log(sigmoid(logit) if label else sigmoid(-logit))


def average(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def hinges(found: list[dict[str, Any]], labels: list[list[bool]], paired: list[bool], x: int, y: int) -> float:
    """One of the three ranking losses; tokens 0 EHR, 1 CXR, 2 shared."""
    costs = []
    for row, truth, both in zip(found, labels, paired, strict=True):
        for label, answer in enumerate(truth):
            logits = [*row["distinct_logits"], row["shared_logits"]]
            t = 1 if bce(logits[x][label], answer) < bce(logits[y][label], answer) else -1
            costs.append(max(0.0, -t * (row["attention"][label][x] - row["attention"][label][y])) if both else 0.0)
    return sum(costs) / max(1, sum(cost > 0 for cost in costs))


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return abs(dot) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def jsd(a: list[float], b: list[float], *, whole: bool) -> float:
    total = 0.0
    for x, y in zip(a, b, strict=True):
        sides = [(sigmoid(x), sigmoid(y)), (sigmoid(-x), sigmoid(-y))] if whole else [(sigmoid(x), sigmoid(y))]
        total += sum(0.5 * (p * math.log(2 * p / (p + q)) + q * math.log(2 * q / (p + q))) for p, q in sides)
    return total


def reference_loss(
    found: list[dict[str, Any]], distinct: list[list[list[float]]], labels: list[list[bool]], paired: list[bool], *, whole: bool
) -> float:
    """The published loss, all weights 1; `whole`: with both halves of the divergence, over paired rows."""

    def of(name: str, rows: list[bool], axis: int | None = None) -> float:
        chosen = [(r[name] if axis is None else r[name][axis], t) for r, t, use in zip(found, labels, rows, strict=True) if use]
        return average([bce(logit, answer) for logits, truth in chosen for logit, answer in zip(logits, truth, strict=True)])

    def apart(axis: int, rows: list[bool]) -> float:
        return average([cosine(r["shared"][axis], d[axis]) for r, d, use in zip(found, distinct, rows, strict=True) if use])

    every = [True] * len(found)
    loss = of("logits", every) + of("distinct_logits", every, 0) + of("distinct_logits", paired, 1) + of("shared_logits", every)
    loss += apart(0, every) + apart(1, paired)
    counted = paired if whole else every
    loss += sum(jsd(*r["shared"], whole=whole) for r, use in zip(found, counted, strict=True) if use) / sum(paired)
    return loss + sum(hinges(found, labels, paired, x, y) for x, y in ((1, 0), (2, 0), (2, 1))) / 3


PAIR = DataSchema(
    modalities=(
        SeriesSpec(name="ehr", variables=(VariableSpec(name="hr"), VariableSpec(name="map")), num_steps=4, step_h=1.0),
        ImageSpec(name="cxr", channels=1, height=12, width=12),
    ),
    label=MultiLabelSpec(name="phenotypes", labels=("a", "b", "c")),
    sites=("north",),
)


def pair_batch(rows: int = 5) -> Batch:
    """EHR always there, every other study without an image, all labels known."""
    batch = small_batch(replace_label(PAIR), rows)
    label = torch.rand(rows, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    present = torch.stack([torch.ones(rows, dtype=torch.bool), torch.arange(rows) % 2 == 0], dim=1)
    return replace(batch, present=present, corrupted=present & False, target=MultiLabelTarget(label, torch.ones_like(label)))


def replace_label(schema: DataSchema) -> DataSchema:
    """The same with classes, of which small_batch draws its target."""
    return schema.model_copy(update={"label": small_schema(3).label})


def pair_model(**options: Any) -> Drfuse:
    model = build_model(DrfuseConfig(width=8, encoders=SMALL_ENCODERS, **options), PAIR, seed=4)
    assert isinstance(model, Drfuse)
    return model


TRUNKS = TrunksConfig(heads=2, feed_forward=8, blocks=(1, 1), channels=4)


@pytest.mark.parametrize("reading", ["bernoulli", "published"])
@pytest.mark.parametrize("trunks", [None, TRUNKS], ids=["encoders", "trunks"])
def test_with_two_modalities_forward_and_loss_are_those_of_the_equations(trunks: TrunksConfig | None, reading: Any) -> None:
    batch, model = pair_batch(), pair_model(trunks=trunks)
    keys = pass_keys(batch, passes=1)
    output = model(batch, keys)
    shared, distinct = (part[0].tolist() for part in model.encoders(batch, keys))
    paired = batch.present[:, 1].tolist()
    found = [reference(model.core, s, d, p) for s, d, p in zip(shared, distinct, paired, strict=True)]
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(output.logits[0], torch.tensor([row["logits"] for row in found]), **close)
    torch.testing.assert_close(output.parts["attention"][:, 0], torch.tensor([row["attention"] for row in found]), **close)
    assert isinstance(batch.target, MultiLabelTarget)
    terms = DrfuseObjectiveConfig(jsd=reading).build()(model, batch, keys)
    total = sum(term.scale * value(term) for term in terms.values())
    expected = reference_loss(found, distinct, batch.target.label.tolist(), paired, whole=reading == "bernoulli")
    assert total == pytest.approx(expected, abs=1e-5)


def test_a_third_modality_that_is_absent_leaves_what_two_give() -> None:
    torch.manual_seed(0)
    two, three = DrfuseCore(2, 8, 3), DrfuseCore(3, 8, 3)
    state = dict(two.state_dict())
    for name in ("distinct_heads.weight", "distinct_heads.bias"):
        state[name] = torch.cat([state[name], three.state_dict()[name][2:]])
    three.load_state_dict(state)
    shared, distinct = torch.randn(2, 2, 5, 3, 8)
    present = torch.tensor([[True, True, False], [True, False, False]])[[0, 1, 0, 1, 0]]
    small, large = two(shared[:, :, :2], distinct[:, :, :2], present[:, :2]), three(shared, distinct, present)
    torch.testing.assert_close(small.logits, large.logits)
    torch.testing.assert_close(small.attention, large.attention[..., [0, 1, 3]])
    assert not large.attention[..., 2].any()


def test_the_images_of_unpaired_studies_change_nothing() -> None:
    batch, model = pair_batch(), pair_model(trunks=TRUNKS)
    keys = pass_keys(batch)
    shuffled = batch.inputs["cxr"].clone()
    shuffled[[1, 3]] = shuffled[[3, 1]] * torch.nan
    other = replace(batch, inputs=batch.inputs | {"cxr": shuffled})
    for jsd_reading in ("bernoulli", "published"):
        objective = DrfuseObjectiveConfig(jsd=jsd_reading).build()
        first, second = ({n: t.numerator for n, t in objective(model, b, keys).items()} for b in (batch, other))
        assert first == second
    assert torch.equal(model(batch, keys).logits, model(other, keys).logits)


def test_the_attention_of_a_modality_is_its_own_and_a_part_of_the_shared() -> None:
    attention = torch.tensor([[[[0.2, 0.3, 0.5], [0.6, 0.0, 0.4]]], [[[0.2, 0.3, 0.5], [0.6, 0.0, 0.4]]]])
    assert modality_share(attention, torch.ones(1, 2, dtype=torch.bool))[0].tolist() == pytest.approx([0.625, 0.375])
    alone = torch.tensor([[[[0.7, 0.0, 0.3]]]])
    assert modality_share(alone, torch.tensor([[True, False]]))[0].tolist() == pytest.approx([1.0, 0.0])


def test_orthogonality_is_the_cosine_without_its_sign() -> None:
    shared = torch.tensor([[[[1.0, 0.0], [1.0, 1.0]]], [[[1.0, 0.0], [0.0, 0.0]]]], requires_grad=True)
    distinct = torch.tensor([[[[0.0, 2.0], [-3.0, -3.0]]], [[[2.0, 0.0], [0.0, 0.0]]]], requires_grad=True)
    terms = orthogonality(shared, distinct, torch.tensor([[True, True], [True, False]]), torch.tensor([1.0, 3.0]))
    assert [value(term) for term in terms] == pytest.approx([0.75, 1.0])
    torch.stack([term.numerator for term in terms]).sum().backward()
    assert all(part.grad is not None and part.grad.isfinite().all() for part in (shared, distinct))


def test_losses_of_outputs_are_those_of_the_task() -> None:
    logits = torch.randn(2, 4, 3)
    label, flags = torch.rand(4, 3) < 0.5, torch.ones(4, 3, dtype=torch.bool)
    labels = MultiLabelTarget(label, flags)
    torch.testing.assert_close(output_losses(logits, labels)[0].mean(-1), task_losses(logits, labels))

    interval, event = torch.tensor([0, 1, 2, 1]), torch.tensor([True, False, True, True])
    times = SurvivalTarget(interval.float(), event, interval, flags[:, 0])
    losses, known = output_losses(logits, times)
    censored = torch.where(event, 1.0, 0.6)
    torch.testing.assert_close((losses * known).sum(-1) * censored, task_losses(logits, times))

    two = ClassTarget(interval % 2, flags[:, 0])
    losses, known = output_losses(logits[..., :2], two)
    assert known.all()
    torch.testing.assert_close(losses, task_losses(logits[..., :2], two).unsqueeze(-1).expand(-1, -1, 2))


def test_unknown_labels_have_no_part_in_any_loss() -> None:
    batch, model = pair_batch(), pair_model()
    keys = pass_keys(batch)
    assert isinstance(batch.target, MultiLabelTarget)
    observed = batch.target.observed & torch.tensor([True, False, True])
    first, second = (
        {
            name: value(term)
            for name, term in DrfuseObjectiveConfig()
            .build()(model, replace(batch, target=MultiLabelTarget(batch.target.label ^ flipped, observed)), keys)
            .items()
        }
        for flipped in (torch.zeros(3, dtype=torch.bool), torch.tensor([False, True, False]))
    )
    assert first == second


def test_labels_are_answered_one_by_one() -> None:
    batch, model = pair_batch(), pair_model()
    output = model(batch, pass_keys(batch))
    assert model.link == Link(exclusive=False)
    gradient = torch.autograd.grad(output.logits[..., 1].sum(), model.core.head.weight)[0]
    assert gradient[1].any()
    assert not gradient[[0, 2]].any()

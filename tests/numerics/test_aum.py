"""AUM: counts, MUSE's mean path, stages, what is missing, what couples patients, and whether a variance learns what noise is."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from model_inputs import SMALL_ENCODERS, pass_keys, small_batch, small_schema, variables
from scipy.stats import spearmanr
from torch import Tensor, nn

from draf_dist import noise
from draf_dist.models.aum_graph import Edges, PatientGraph
from draf_dist.models.build import build_model
from draf_dist.models.encoders import EncoderChoice, TabularConfig
from draf_dist.models.fusion.aum import Aum, AumConfig, dropped, readings
from draf_dist.models.gaussian import Gaussian
from draf_dist.objectives.aum import AumObjectiveConfig
from draf_dist.schema.batch import Batch, ClassTarget, SeriesInput
from draf_dist.schema.label import LabelSpec, MultiLabelSpec
from draf_dist.schema.modality import DataSchema, TableSpec

SCHEMA = small_schema()
BATCH = small_batch(SCHEMA)
KEYS = pass_keys(BATCH)
WIDTH = 8


def small_aum(**options: Any) -> Aum:
    config = AumConfig.model_validate({"width": WIDTH, "encoders": SMALL_ENCODERS, **options})
    model = build_model(config, SCHEMA, seed=3)
    assert isinstance(model, Aum)
    return model.eval()


def moved(model: Aum, scale: float = 0.5) -> Aum:
    """With variances that differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.gaussians.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def graph_of(layers: int, *, width: int = WIDTH, modalities: int = 3, dropout: float = 0.0, **options: Any) -> PatientGraph:
    chosen: dict[str, Any] = {"nodes": "none", "var_rule": "independent", "relu": "ignored", **options}
    torch.manual_seed(5)
    return PatientGraph(modalities, width, layers, dropout=dropout, **chosen)


def edges_of(rows: int = 8, *, variance: float | None = 1.0, seed: int = 0, counted: Tensor | None = None) -> Edges:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(1, rows, 3, WIDTH, generator=generator)
    spread = torch.rand(mean.shape, generator=generator) + 0.1 if variance is None else torch.full_like(mean, variance)
    exists = torch.rand(rows, 3, generator=generator) < 0.6
    exists[torch.arange(rows), torch.arange(rows) % 3] = True
    logits = 1 / spread.mean(-1)
    return Edges(Gaussian(mean, spread), logits, exists, torch.ones(rows, dtype=torch.bool) if counted is None else counted)


def rows_of(edges: Edges, rows: slice | Tensor) -> Edges:
    value = Gaussian(edges.value.mean[:, rows], edges.value.variance[:, rows])
    return Edges(value, edges.logits[:, rows], edges.exists[rows], edges.counted[rows])


def no_keys(rows: int = 8) -> Tensor:
    return torch.zeros(1, rows, dtype=torch.int64)


# Counts.


def count(*parts: nn.Module) -> int:
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


@pytest.mark.parametrize(("layers", "expected"), [(2, 214_402), (3, 329_474)])
def test_the_block_has_the_parameters_of_muse(layers: int, expected: int) -> None:
    schema = small_schema().model_copy(update={"label": MultiLabelSpec(name="death", labels=("death",))})
    with torch.device("meta"):
        model = AumConfig(width=128, num_layers=layers).build(schema)
    assert count(model.graph, model.head, model.contrast) == expected
    # 66,048 a modality.
    assert count(model.gaussians) == 3 * 66_048
    assert count(model) == expected + 3 * 66_048 + count(model.backbones)


# MUSE's mean path, node by node and edge by edge.


def muse(graph: PatientGraph, edges: Edges, *, update_modalities: bool) -> Tensor:
    """Patients' nodes (B, d): message passing over a list of undirected edges, mean aggregation, ReLU."""
    weights = {name: parameter.detach() for name, parameter in graph.named_parameters()}

    def linear(name: str, *parts: Tensor) -> Tensor:
        return (weights[f"{name}.weight"] @ torch.cat(parts) + weights[f"{name}.bias"]).clamp_min(0)

    rows, modalities = edges.exists.shape
    patients = [torch.ones(WIDTH) for _ in range(rows)]
    nodes = list(weights["modality_nodes.weight"])
    attribute = {(i, m): edges.value.mean[0, i, m] for i in range(rows) for m in range(modalities) if edges.exists[i, m]}
    for layer in range(len(graph.update)):
        to_patient: list[list[Tensor]] = [[] for _ in range(rows)]
        to_modality: list[list[Tensor]] = [[] for _ in range(modalities)]
        for (i, m), edge in attribute.items():
            to_patient[i].append(linear(f"message.{layer}", nodes[m], edge))
            to_modality[m].append(linear(f"message.{layer}", patients[i], edge))
        patients = [linear(f"update.{layer}", sum(to) / len(to), x) for to, x in zip(to_patient, patients, strict=True)]
        if update_modalities:
            nodes = [linear(f"update.{layer}", sum(to) / len(to), x) for to, x in zip(to_modality, nodes, strict=True)]
        if layer + 1 < len(graph.update):
            attribute = {(i, m): linear(f"edge_update.{layer}", patients[i], nodes[m], e) for (i, m), e in attribute.items()}
    return torch.stack(patients)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("nodes", ["none", "batch", "sync"])
@pytest.mark.parametrize("var_rule", ["independent", "mixture"])
def test_with_variances_of_one_means_are_those_of_muse(layers: int, nodes: str, var_rule: str) -> None:
    graph, edges = graph_of(layers, nodes=nodes, var_rule=var_rule), edges_of()
    found = graph(edges, no_keys()).node.mean[0]
    torch.testing.assert_close(found, muse(graph, edges, update_modalities=nodes != "none"), rtol=0, atol=1e-6)


def test_muse_that_updates_modalities_is_another_model_from_the_second_layer_on() -> None:
    for layers, differs in ((1, False), (2, True)):
        graph, edges = graph_of(layers), edges_of()
        ways = [muse(graph, edges, update_modalities=update) for update in (False, True)]
        assert torch.equal(*ways) is not differs


def test_the_whole_model_begins_as_muse() -> None:
    """Zero-initialised variances: what the encoders give goes through the graph with weights 1 / n."""
    model = small_aum(dropout=0.0)
    features = model.backbones(BATCH, KEYS[:1])
    mean, log_variance = model.gaussians(features)
    assert not log_variance.any()
    edges = Edges(Gaussian(mean, torch.ones_like(mean)), torch.ones(1, 8, 3), BATCH.present, BATCH.weight > 0)
    node = muse(model.graph, edges, update_modalities=False)
    logits = model.head(node[None], BATCH.present)
    torch.testing.assert_close(model(BATCH, KEYS[:1]).logits, logits, rtol=0, atol=1e-6)


# The variance path, one edge at a time.


def test_the_variance_of_one_layer_by_hand() -> None:
    graph, edges = graph_of(1), edges_of(variance=None)
    found = graph(edges, no_keys()).node.variance[0]
    weight = graph.update[0].weight.detach()
    for row in range(8):
        a = (edges.logits[0, row].exp() * edges.exists[row]) / (edges.logits[0, row].exp() * edges.exists[row]).sum()
        arrived = sum(a[m] ** 2 * edges.value.variance[0, row, m] for m in range(3))
        expected = weight.square() @ torch.cat([arrived, torch.zeros(WIDTH)]) + 1e-4
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-7)


def test_exact_moments_of_one_layer_are_those_of_samples() -> None:
    """One edge, so nothing is lost but the covariance of components, of which no mean depends."""
    graph, edges = graph_of(1, relu="exact"), edges_of(variance=None)
    edges = replace(edges, exists=torch.tensor([[True, False, False]]).expand(8, -1))
    patients = graph(edges, no_keys())
    generator = torch.Generator().manual_seed(0)
    mean, deviation = edges.value.mean[0, :, 0], edges.value.variance[0, :, 0].sqrt()
    samples = mean + deviation * torch.randn(200_000, 8, WIDTH, generator=generator)
    node = graph.modality_nodes.weight[0].detach().expand(samples.shape)
    message = nn.functional.linear(torch.cat([node, samples], -1), graph.message[0].weight, graph.message[0].bias).relu()
    torch.testing.assert_close(patients.messages.mean[0, :, 0], message.mean(0), rtol=0, atol=5e-3)
    torch.testing.assert_close(patients.messages.variance[0, :, 0], message.var(0), rtol=0.03, atol=1e-3)


def test_ignored_moments_leave_the_means_as_without_variances_and_exact_ones_do_not() -> None:
    edges = edges_of(variance=None)
    halved = replace(edges, value=Gaussian(edges.value.mean, edges.value.variance / 2))
    for relu, same in (("ignored", True), ("exact", False)):
        graph = graph_of(2, relu=relu)
        means = [graph(each, no_keys()).node.mean for each in (edges, halved)]
        assert torch.equal(*means) is same


def test_two_layers_by_hand_with_dropout_between_them() -> None:
    """A mask that is known multiplies means by the factor and variances by its square."""
    graph, edges = graph_of(2, dropout=0.5), edges_of(variance=None)
    keys = noise.sample_keys(0, "model", None, torch.arange(8), 1)
    found = graph(edges, keys).node
    assert not torch.equal(found.mean, graph_of(2)(edges, keys).node.mean)
    a, mean, variance = edges.attention.unsqueeze(-1), edges.value.mean, edges.value.variance
    nodes = graph.modality_nodes().expand(1, 8, -1, -1)
    patient, spread = torch.ones(1, 8, WIDTH), torch.zeros(1, 8, WIDTH)
    for layer in range(2):
        message = graph.message[layer](torch.cat([nodes, mean], -1)).relu()
        arrived, arrived_spread = (a * message).sum(2), (a.square() * variance).sum(2)
        update, square = graph.update[layer], graph.update[layer].weight.square()
        patient = (torch.cat([arrived, patient], -1) @ update.weight.T + update.bias).relu()
        spread = torch.cat([arrived_spread, spread], -1) @ square.T + 1e-4
        if layer == 0:
            mask = graph.dropout[0](torch.ones(1, 8, WIDTH), keys)
            patient, spread = patient * mask, spread * mask.square()
            edge, square = graph.edge_update[0], graph.edge_update[0].weight.square()
            ends, ends_spread = (values.unsqueeze(2).expand(-1, -1, 3, -1) for values in (patient, spread))
            mean = (torch.cat([ends, nodes, mean], -1) @ edge.weight.T + edge.bias).relu()
            variance = torch.cat([ends_spread, torch.zeros_like(nodes), variance], -1) @ square.T + 1e-4
    torch.testing.assert_close(found.mean, patient, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.variance, spread, rtol=1e-5, atol=1e-7)


# Attention.


@pytest.mark.parametrize("attention", ["softmax_inv", "precision"])
def test_before_any_variance_is_learned_attention_is_exactly_equal(attention: str) -> None:
    output = small_aum(attention=attention)(BATCH, KEYS)
    exact = BATCH.present / BATCH.present.sum(1, keepdim=True)
    assert torch.equal(output.reliability, exact)
    assert torch.equal(output.uncertainty["variance"], BATCH.present.float())
    assert torch.equal(output.signals["attention_entropy"], torch.ones(8))
    assert not output.signals["log_variance"].any()
    assert not output.signals["log_variance_spread"].any()


def test_a_high_temperature_makes_attention_equal_and_a_low_one_follows_the_smallest_variance() -> None:
    whole = replace(BATCH, present=torch.ones(8, 3, dtype=torch.bool))
    flat, usual, sharp = (moved(small_aum(theta=theta))(whole, KEYS[:1]) for theta in (1e9, 1.0, 1e-4))
    torch.testing.assert_close(flat.reliability, torch.full((8, 3), 1 / 3), rtol=0, atol=1e-6)
    assert (usual.reliability - 1 / 3).abs().max() > 0.01
    assert torch.equal(sharp.reliability.argmax(1), sharp.uncertainty["variance"].argmin(1))
    assert (flat.signals["attention_entropy"] > 0.9999).all()
    assert (sharp.signals["attention_entropy"] < 1e-3).all()
    # A saturated weight is still the weight of something present.
    assert (sharp.reliability > 0).all()


def test_the_model_weighs_as_its_equation_says() -> None:
    for attention in ("softmax_inv", "precision"):
        model = moved(small_aum(attention=attention, theta=0.5))
        output = model(BATCH, KEYS[:1])
        u = output.uncertainty["variance"]
        raw = ((1 / (u + 1e-3)) / 0.5).exp() if attention == "softmax_inv" else 1 / u.clamp_min(1e-9)
        raw = torch.where(BATCH.present, raw, 0.0)
        torch.testing.assert_close(output.reliability, raw / raw.sum(1, keepdim=True), rtol=1e-5, atol=1e-7)


# What is missing.


def test_what_is_missing_and_has_a_high_variance_takes_part_all_the_same() -> None:
    """The paper's claim does not hold of the literal attention: with v = 1 where present, exp(7) where absent, e^(1/1.001) : 1."""
    present = torch.tensor([[True, True, False]]).expand(8, -1)
    output = small_aum(missing="high_var")(replace(BATCH, present=present), KEYS)
    expected = 1 / (1 + 2 * torch.tensor(1 / 1.001 - 1 / (torch.e**7 + 1e-3)).exp())
    torch.testing.assert_close(output.signals["absent_attention"], expected.expand(8), rtol=1e-5, atol=0)
    assert expected > 0.15
    assert torch.equal(output.reliability, present / 2)
    precise = small_aum(missing="high_var", attention="precision")(replace(BATCH, present=present), KEYS)
    assert (precise.signals["absent_attention"] < 1e-3).all()
    assert not small_aum()(replace(BATCH, present=present), KEYS).signals["absent_attention"].any()


# The shares of variance.


@pytest.mark.parametrize("var_rule", ["independent", "mixture"])
def test_the_shares_of_the_modalities_add_up_to_the_variance_that_arrives(var_rule: str) -> None:
    model = moved(small_aum(var_rule=var_rule, num_layers=1))
    output = model(BATCH, KEYS[:1])
    shares = output.uncertainty[var_rule].sum(1)
    torch.testing.assert_close(shares, output.signals[var_rule])
    # Back from the node: (W * W) [arrived | 0] + floor, summed over outputs, is linear in what arrived.
    mean, log_variance = model.gaussians(model.backbones(BATCH, KEYS[:1]))
    edges = model.edges(Gaussian(mean, log_variance.exp()), BATCH.present, BATCH.weight)
    patients = model.graph(edges, KEYS[:1])
    half = model.graph.update[0].weight.square()[:, :WIDTH]
    arrived = torch.linalg.solve(half.double(), (patients.node.variance[0].double() - 1e-4).T).T
    torch.testing.assert_close(shares.double(), arrived.mean(1), rtol=1e-3, atol=1e-5)


def test_contradiction_shows_in_the_mixture_alone() -> None:
    """Two modalities that agree, and two that do not, with the same variances."""
    agree = Gaussian(torch.zeros(1, 1, 2, WIDTH), torch.ones(1, 1, 2, WIDTH))
    contradict = Gaussian(torch.tensor([0.0, 10.0]).view(1, 1, 2, 1).expand(1, 1, 2, WIDTH), agree.variance)
    a, both = torch.full((1, 1, 2), 0.5), torch.ones(1, 2, dtype=torch.bool)
    found = [readings(value.variance, a, value, both) for value in (agree, contradict)]
    assert found[0]["independent"].sum() == found[1]["independent"].sum() == 0.5
    assert (found[0]["mixture"].sum(), found[1]["mixture"].sum()) == (1.0, 26.0)


# Patients and batches.


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_no_patient_sees_another_unless_modality_nodes_are_updated(layers: int) -> None:
    """Rule D4: the same patients in a batch of 8 and of 4."""
    edges = edges_of(variance=None)
    for nodes in ("none", "batch"):
        graph = graph_of(layers, nodes=nodes)
        whole, part = graph(edges, no_keys()).node, graph(rows_of(edges, slice(0, 4)), no_keys(4)).node
        difference = max(float((a[:, :4] - b).abs().max()) for a, b in ((whole.mean, part.mean), (whole.variance, part.variance)))
        if nodes == "none" or layers == 1:
            assert difference < 1e-6
        else:
            assert difference > 1e-4


@pytest.mark.parametrize("sizes", [(8,), (1, 7), (3, 0, 5), (2, 2, 2, 2)])
def test_any_split_of_a_batch_gives_the_same_logits(sizes: tuple[int, ...]) -> None:
    model = moved(small_aum(num_layers=3)).train()
    whole = model(BATCH, KEYS).logits
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    parts = [model(BATCH.rows(a, a + n), KEYS[:, a : a + n]).logits for a, n in zip(starts, sizes, strict=True)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-6)


def test_padding_never_speaks_to_modalities() -> None:
    graph = graph_of(2, nodes="batch")
    edges = edges_of(variance=None, counted=torch.arange(8) < 5)
    whole, alone = graph(edges, no_keys()).node, graph(rows_of(edges, slice(0, 5)), no_keys(5)).node
    torch.testing.assert_close(whole.mean[:, :5], alone.mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("var_rule", ["independent", "mixture"])
def test_a_modality_that_no_patient_has_keeps_everything_finite(var_rule: str) -> None:
    graph = graph_of(3, nodes="batch", var_rule=var_rule)
    edges = replace(edges_of(variance=None), exists=torch.tensor([[True, True, False]]).expand(8, -1))
    node = graph(edges, no_keys()).node
    (node.mean.sum() + node.variance.sum()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in graph.parameters() if parameter.grad is not None)
    assert torch.isfinite(node.mean).all()


# The draw of z.


def test_z_is_drawn_in_training_once_a_pass_and_study_and_is_the_mean_in_evaluation() -> None:
    model = moved(small_aum())
    node = Gaussian(torch.zeros(4, 8, 1000), torch.full((4, 8, 1000), 4.0))
    assert torch.equal(model.drawn(node, KEYS), node.mean)
    drawn = model.train().drawn(node, KEYS)
    assert drawn.mean().abs() < 0.05
    assert drawn.std() == pytest.approx(2, rel=0.02)
    assert torch.equal(model.drawn(node, KEYS), drawn)
    assert len({float(z[0]) for z in drawn.flatten(0, 1)}) == 32
    # The same study draws the same in another batch.
    assert torch.equal(model.drawn(Gaussian(node.mean[:, 3:5], node.variance[:, 3:5]), KEYS[:, 3:5]), drawn[:, 3:5])


def test_nothing_but_z_depends_on_the_mode() -> None:
    """What the loop computes of embeddings without a gradient, in evaluation mode, is what it computes again in training."""
    model = moved(small_aum())
    evaluated, trained = model(BATCH, KEYS), model.train()(BATCH, KEYS)
    assert not torch.equal(evaluated.logits, trained.logits)
    for name in ("kl", "first", "second"):
        assert torch.equal(evaluated.parts[name], trained.parts[name])
    assert torch.equal(evaluated.reliability, trained.reliability)


# Stage 1.


def trained_on(model: Aum, batch: Batch, steps: int, *, weight_decay: float = 0.0) -> torch.optim.AdamW:
    objective = AumObjectiveConfig(beta=0.1).build(SCHEMA)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2, weight_decay=weight_decay)
    for _ in range(steps):
        optimizer.zero_grad()
        terms = objective(model, batch, pass_keys(batch, 2))
        sum(term.scale * term.numerator / term.weight for term in terms.values()).backward()
        optimizer.step()
    return optimizer


def test_in_stage_one_every_parameter_has_a_gradient_and_that_of_variances_is_zero() -> None:
    model = moved(small_aum(warm_epochs=20))
    for epoch, learns in ((0, False), (19, False), (20, True)):
        model.zero_grad()
        trained_on(model, replace(BATCH, epoch=torch.full((8,), epoch)), 1)
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert all(gradient is not None for gradient in gradients.values())
        variance = [gradient for name, gradient in gradients.items() if "log_variance" in name]
        assert len(variance) == 4
        assert all(bool(gradient.any()) is learns for gradient in variance if gradient is not None)


def test_in_stage_one_variances_stay_exactly_one_and_adam_keeps_moments_of_zero() -> None:
    model = small_aum(warm_epochs=20)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = trained_on(model, BATCH, 5, weight_decay=0.1)
    changed = dict(model.named_parameters())
    for name, parameter in changed.items():
        if "log_variance" in name:
            assert not optimizer.state[parameter]["exp_avg"].any()
            assert not optimizer.state[parameter]["exp_avg_sq"].any()
            torch.testing.assert_close(parameter.detach(), start[name] * (1 - 1e-2 * 0.1) ** 5)
        else:
            assert not torch.equal(parameter, start[name]), name
    output = model.eval()(BATCH, KEYS)
    assert torch.equal(output.uncertainty["variance"], BATCH.present.float())
    assert torch.equal(output.reliability, BATCH.present / BATCH.present.sum(1, keepdim=True))


def test_stages_are_of_rows_and_change_no_output() -> None:
    """A mixture of sources draws rows of different epochs into one batch."""
    model = moved(small_aum(warm_epochs=3))
    mixed = replace(BATCH, epoch=torch.tensor([2, 3] * 4))
    variance = torch.rand(1, 8, 3, WIDTH, requires_grad=True)
    staged = model.stage(variance, mixed.epoch)
    assert torch.equal(staged, variance)
    (gradient,) = torch.autograd.grad(staged.sum(), variance)
    assert gradient.flatten(2).any(2)[0].tolist() == [False, True] * 4
    assert torch.equal(model(mixed, KEYS).logits, model(replace(mixed, epoch=torch.zeros(8, dtype=torch.int64)), KEYS).logits)


def test_after_the_switch_adam_makes_longer_steps_than_a_fresh_one() -> None:
    """The price of having no state, as the docstring states it: for a constant gradient."""
    waiting, fresh = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    late, new = (torch.optim.AdamW([parameter], lr=1.0, weight_decay=0.0) for parameter in (waiting, fresh))
    for _ in range(20_000):
        waiting.grad = torch.zeros_like(waiting)
        late.step()
    assert waiting.item() == 0
    ratio = []
    for _ in range(300):
        before = waiting.item(), fresh.item()
        for parameter, optimizer in ((waiting, late), (fresh, new)):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        ratio.append((waiting.item() - before[0]) / (fresh.item() - before[1]))
    assert ratio[0] == pytest.approx(3.16, abs=0.01)
    assert max(ratio) == pytest.approx(6.57, abs=0.02)
    assert ratio.index(max(ratio)) + 1 == 12
    assert sum(value > 2 for value in ratio) == 287


# Dropped edges.


def test_edges_are_dropped_as_muse_drops_them() -> None:
    present = torch.tensor([[True, True, True, False], [True, False, False, False]]).repeat(4000, 1)
    keys = noise.sample_keys(0, "mc", None, torch.arange(8000), 1)[0]
    kept = dropped(present, keys)
    assert not (kept & ~present).any()
    counts = kept.sum(1)
    assert (counts[1::2] == 1).all()
    shares = [float((counts[::2] == n).float().mean()) for n in (1, 2, 3)]
    assert shares == pytest.approx([0.25, 0.25, 0.5], abs=0.03)
    assert kept[::2].float().mean(0)[:3].tolist() == pytest.approx([0.75] * 3, abs=0.03)


def test_which_edges_are_dropped_depends_on_the_study_alone() -> None:
    present = torch.ones(50, 5, dtype=torch.bool)
    keys = noise.sample_keys(0, "mc", torch.zeros(50, dtype=torch.int64), torch.arange(50), 1)[0]
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dropped(present, keys[order]), dropped(present, keys)[order])
    other = noise.sample_keys(0, "mc", torch.ones(50, dtype=torch.int64), torch.arange(50), 1)[0]
    assert not torch.equal(dropped(present, other), dropped(present, keys))


# Mechanism on planted truth.


NOISE = torch.tensor([0.3, 4.0])
READINGS = 6


def planted(rows: int, seed: int) -> tuple[Batch, Tensor]:
    """Two tables of six readings of one sign, each with a noise of its own; the noise (rows, 2) comes along."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 2, (rows,), generator=generator)
    level = torch.randint(0, 2, (rows, 2), generator=generator)
    sigma = NOISE[level]
    values = (2.0 * label - 1).view(-1, 1, 1) + sigma.unsqueeze(2) * torch.randn(rows, 2, READINGS, generator=generator)
    both = torch.ones(rows, 2, dtype=torch.bool)
    observed = torch.ones(rows, 1, READINGS, dtype=torch.bool)
    one = torch.ones(rows, dtype=torch.int64)
    inputs = {name: SeriesInput(values[:, m, None], observed, one) for m, name in enumerate(PLANTED.names)}
    zeros = torch.zeros(rows, 2)
    target = ClassTarget(label, one.bool())
    uid = torch.arange(rows) + 10_000 * seed
    batch = Batch(PLANTED.names, inputs, both, zeros.bool(), zeros, zeros, zeros.bool(), target, 0 * one, uid, 0 * one, one.float())
    return batch, sigma


PLANTED = DataSchema(
    modalities=tuple(TableSpec(name=name, variables=variables(READINGS)) for name in ("first", "second")),
    label=LabelSpec(name="sign", classes=("minus", "plus")),
    sites=("north",),
)


def train_planted(attention: str, lambda_cl: float, steps: int = 300) -> Aum:
    config = AumConfig.model_validate(
        {"width": 16, "encoders": EncoderChoice(table=TabularConfig(hidden=32)), "attention": attention, "warm_epochs": 2}
    )
    model = build_model(config, PLANTED, seed=1)
    assert isinstance(model, Aum)
    objective = AumObjectiveConfig(lambda_cl=lambda_cl).build(PLANTED)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for step in range(steps):
        batch, _ = planted(64, seed=step + 1)
        batch = replace(batch, epoch=torch.full((64,), step // 50))
        optimizer.zero_grad()
        terms = objective(model, batch, pass_keys(batch, 2, seed=step))
        sum(term.scale * term.numerator / term.weight for term in terms.values()).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def noise_seen(model: Aum) -> tuple[float, list[float]]:
    """Spearman's correlation of variances with the noise of their modality, and the mean weight at either noise."""
    batch, sigma = planted(1000, seed=99_999)
    output = model(batch, pass_keys(batch, 4))
    right = (output.logits.softmax(-1).mean(0).argmax(-1) == batch.classes.label).float().mean()
    rank = float(spearmanr(output.uncertainty["variance"].flatten(), sigma.flatten()).statistic)
    weight = [float(output.reliability[sigma == level].mean()) for level in NOISE]
    print(f"Spearman of variance with noise {rank:.2f}, mean weight {weight}, accuracy {right:.3f}")
    return rank, weight


@pytest.mark.parametrize("attention", ["precision", "softmax_inv"])
def test_variances_that_learn_from_the_task_rise_with_noise_and_attention_leaves_it(attention: str) -> None:
    rank, weight = noise_seen(train_planted(attention, lambda_cl=0))
    assert rank > 0.5
    assert weight[0] > weight[1] + 0.05


def test_the_contrastive_pair_works_against_that() -> None:
    """What tells a patient from all others is noise above all: with MUSE's weight of .5 the mechanism does not show here."""
    rank, weight = noise_seen(train_planted("precision", lambda_cl=0.5))
    assert rank < 0.3
    assert weight[0] < weight[1] + 0.05

"""AUM's graph: MUSE's means, the variances beside them, and who sees whom (rule D4)."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from model_inputs import SMALL_ENCODERS, pass_keys, small_batch, small_schema
from torch import Tensor, nn

from draf_dist import noise
from draf_dist.models.aum_graph import Edges, PatientGraph
from draf_dist.models.build import build_model
from draf_dist.models.fusion.aum import AumConfig
from draf_dist.models.gaussian import Gaussian

WIDTH = 8


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
    schema = small_schema()
    batch = small_batch(schema)
    keys = pass_keys(batch, 1)
    model = build_model(AumConfig(width=WIDTH, encoders=SMALL_ENCODERS, dropout=0), schema, seed=3).eval()
    features = model.backbones(batch, keys)
    mean, log_variance = model.gaussians(features)
    assert not log_variance.any()
    edges = Edges(Gaussian(mean, torch.ones_like(mean)), torch.ones(1, 8, 3), batch.present, batch.weight > 0)
    node = muse(model.graph, edges, update_modalities=False)
    logits = model.head(node[None], batch.present)
    torch.testing.assert_close(model(batch, keys).logits, logits, rtol=0, atol=1e-6)


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


@pytest.mark.parametrize("var_rule", ["independent", "mixture"])
def test_two_layers_by_hand_with_dropout_between_them(var_rule: str) -> None:
    """A mask that is known multiplies means by the factor and variances by its square."""
    graph, edges = graph_of(2, dropout=0.5, var_rule=var_rule), edges_of(variance=None)
    keys = noise.sample_keys(0, "model", None, torch.arange(8), 1)
    found = graph(edges, keys).node
    assert not torch.equal(found.mean, graph_of(2, var_rule=var_rule)(edges, keys).node.mean)
    a, mean, variance = edges.attention.unsqueeze(-1), edges.value.mean, edges.value.variance
    nodes = graph.modality_nodes().expand(1, 8, -1, -1)
    patient, spread = torch.ones(1, 8, WIDTH), torch.zeros(1, 8, WIDTH)
    for layer in range(2):
        message = graph.message[layer](torch.cat([nodes, mean], -1)).relu()
        arrived, arrived_spread = (a * message).sum(2), (a.square() * variance).sum(2)
        if var_rule == "mixture":
            arrived_spread = (a * (variance + message.square())).sum(2) - arrived.square()
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


# Patients and batches.


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_no_patient_sees_another_unless_modality_nodes_are_updated(layers: int) -> None:
    """Rule D4: the same patients in a batch of 8 and of 4."""
    edges = edges_of(variance=None)
    for nodes in ("none", "batch"):
        graph = graph_of(layers, nodes=nodes)
        with torch.no_grad():
            whole, part = graph(edges, no_keys()).node, graph(rows_of(edges, slice(0, 4)), no_keys(4)).node
        difference = max(float((a[:, :4] - b).abs().max()) for a, b in ((whole.mean, part.mean), (whole.variance, part.variance)))
        if nodes == "none" or layers == 1:
            assert difference < 1e-6
        else:
            assert difference > 1e-4


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

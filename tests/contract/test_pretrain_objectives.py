"""What every objective of pre-training must hold: a new member of the union inherits these tests by a line in MODALITY."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from model_inputs import SMALL_ENCODERS, pass_keys, small_batch, small_schema, with_absent_slots
from torch import Tensor, nn

from draf_dist.errors import SpecError
from draf_dist.models.mc import MCDropout
from draf_dist.objectives.pretrain import PretrainObjectiveConfig, build_network
from draf_dist.schema.batch import Batch, Term

SCHEMA = small_schema()
MODALITY = {"simclr": "cxr", "masked_values": "vitals"}
CONFIGS = [
    member(modality=MODALITY[member.model_fields["kind"].default]) for member in get_args(get_args(PretrainObjectiveConfig)[0])
]
every_objective = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)


def network(config: Any, seed: int = 0) -> nn.Module:
    spec = next(spec for spec in SCHEMA.modalities if spec.name == config.modality)
    return build_network(config, SCHEMA, SMALL_ENCODERS.of(spec), 16, seed)


def batch_of(rows: int = 12, padding: int = 3) -> Batch:
    batch = small_batch(SCHEMA, rows)
    weight = torch.ones(rows)
    weight[rows - padding :] = 0
    return replace(batch, weight=weight, uid=torch.where(weight > 0, batch.uid, -1), site=torch.arange(rows) % 2)


def loss(terms: dict[str, Term]) -> Tensor:
    return torch.stack([term.scale * term.numerator / term.weight for term in terms.values()]).sum()


@every_objective
def test_every_parameter_is_trained_so_that_all_of_the_encoder_is_worth_exporting(config: Any) -> None:
    net, batch = network(config), batch_of()
    loss(config.build(0)(net, batch, pass_keys(batch, 1))).backward()
    assert not [name for name, parameter in net.named_parameters() if parameter.grad is None or not parameter.grad.any()]


@every_objective
@pytest.mark.parametrize("filler", [float("nan"), 1e6])
def test_what_is_absent_or_padding_changes_nothing(config: Any, filler: float) -> None:
    net, batch = network(config), batch_of()
    padded = replace(batch, present=batch.present & (batch.weight > 0)[:, None])
    other = replace(with_absent_slots(padded, filler), present=batch.present)
    results = [config.build(0)(net, one, pass_keys(one, 1)) for one in (batch, other)]
    for name, term in results[0].items():
        assert torch.equal(term.numerator, results[1][name].numerator), name
        assert torch.equal(term.weight, results[1][name].weight), name
    ours, theirs = (torch.autograd.grad(loss(terms), list(net.parameters())) for terms in results)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@every_objective
def test_labels_play_no_part(config: Any) -> None:
    net, batch = network(config), batch_of()
    unlike = replace(batch, target=replace(batch.target, label=1 - batch.target.label, observed=~batch.target.observed))
    left, right = (config.build(0)(net, one, pass_keys(one, 1)) for one in (batch, unlike))
    assert all(torch.equal(term.numerator, right[name].numerator) for name, term in left.items())


@every_objective
def test_a_second_forward_meets_the_same_noise_and_another_epoch_another(config: Any) -> None:
    net, batch = network(config), batch_of()
    objective = config.build(0)
    first, again, later = (
        loss(objective(net, one, pass_keys(one, 1))).item() for one in (batch, batch, replace(batch, epoch=batch.epoch + 1))
    )
    assert first == again != later
    assert loss(config.build(1)(net, batch, pass_keys(batch, 1))).item() != first


@every_objective
def test_starting_parameters_depend_on_the_seed_alone_and_every_dropout_has_its_own_stream(config: Any) -> None:
    state = torch.get_rng_state()
    left, right, other = network(config, 1), network(config, 1), network(config, 2)
    assert torch.equal(torch.get_rng_state(), state)
    names = dict(left.named_parameters())
    assert all(torch.equal(value, names[name]) for name, value in right.named_parameters())
    assert any(not torch.equal(value, names[name]) for name, value in other.named_parameters())
    streams = [module.stream for module in left.modules() if isinstance(module, MCDropout)]
    assert len(set(streams)) == len(streams) > 1


@every_objective
def test_training_lowers_the_loss_of_validation(config: Any) -> None:
    net, batch, objective = network(config), batch_of(24, padding=0), config.build(0)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    history: list[float] = []
    for _ in range(25):
        terms = objective(net, batch, pass_keys(batch, 1))
        means = {name: (term.numerator / term.weight).item() for name, term in terms.items()}
        history.append(objective.numbers(means)["loss"])
        optimizer.zero_grad()
        loss(terms).backward()
        optimizer.step()
    assert history[-1] < 0.85 * history[0]


@every_objective
def test_a_modality_of_another_kind_is_refused(config: Any) -> None:
    for name in (*SCHEMA.names, "ct"):
        if name != config.modality:
            with pytest.raises(SpecError, match=f"objective.modality: .*found '{name}'. Choose one of {config.modality}"):
                config.model_copy(update={"modality": name}).network(SCHEMA, None, 16)

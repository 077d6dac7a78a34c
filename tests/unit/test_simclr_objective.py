"""The objective of contrastive pre-training on a small image encoder."""

from dataclasses import replace

import pytest
import torch
from model_inputs import pass_keys, small_batch, small_schema
from torch import Tensor, nn

from draf_dist import noise
from draf_dist.augment import CxrPreset, ViewsConfig
from draf_dist.errors import SpecError
from draf_dist.losses.gather import Embeddings
from draf_dist.losses.nt_xent import nt_xent
from draf_dist.models.contrastive import ContrastiveNet
from draf_dist.models.encoders import Image2dConfig
from draf_dist.objectives.pretrain_simclr import ACCURACIES, SimclrConfig
from draf_dist.schema.batch import Batch, Term

CONFIG = SimclrConfig(modality="cxr")
OBJECTIVE = CONFIG.build(seed=0)


def small_net(dropout: float = 0.1, config: SimclrConfig = CONFIG) -> ContrastiveNet:
    torch.manual_seed(0)
    encoder = Image2dConfig(widths=(4, 8), groups=2, dropout=dropout, projection_dropout=dropout)
    return config.network(small_schema(), encoder, 16)


def batch_of(rows: int = 8) -> Batch:
    return replace(small_batch(small_schema(), rows), site=torch.arange(rows) % 2)


def mean(term: Term) -> Tensor:
    return term.numerator / term.weight


def test_terms_their_scales_and_their_weights() -> None:
    batch = batch_of()
    terms = OBJECTIVE(small_net(), batch, pass_keys(batch, 1))
    seen = int(batch.present[:, 0].sum())
    assert 0 < seen < 8
    scales = {"region": 0.2, "protocol": 0.2, "probe_f": 1.0, "probe_g": 1.0}
    accuracies = dict.fromkeys(ACCURACIES, 0.0)
    assert {name: (term.scale, term.weight.item()) for name, term in terms.items()} == {
        "contrastive": (1.0, 2.0 * seen),
        **{name: (scale, float(seen)) for name, scale in (scales | accuracies).items()},
    }


@pytest.mark.parametrize("adversarial", [False, True])
def test_every_parameter_is_reached(adversarial: bool) -> None:
    net, batch = small_net(config=CONFIG.model_copy(update={"protocol_adversarial": adversarial})), batch_of()
    sum(term.scale * mean(term) for term in OBJECTIVE(net, batch, pass_keys(batch, 1)).values()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())


def test_heads_read_the_features_alone_and_probes_train_nothing_but_themselves() -> None:
    net, batch = small_net(), batch_of()
    terms = OBJECTIVE(net, batch, pass_keys(batch, 1))
    shared = {"encoder": net.encoder, "projection": net.projection}
    heads = {"region": net.region, "protocol": net.protocol, "probe_f": net.probe_f, "probe_g": net.probe_g}
    reached = {"contrastive": {"encoder", "projection"}} | {name: {name} for name in heads}
    reached["region"].add("encoder")
    reached["protocol"].add("encoder")
    for name, modules in reached.items():
        found = {part for part, module in (shared | heads).items() if any(g is not None for g in gradients_of(terms[name], module))}
        assert found == modules, name


def gradients_of(term: Term, module: nn.Module) -> list[Tensor | None]:
    return list(torch.autograd.grad(term.numerator, list(module.parameters()), retain_graph=True, allow_unused=True))


def test_an_adversary_pulls_the_encoder_the_other_way_and_learns_as_before() -> None:
    config, batch = CONFIG.model_copy(update={"protocol_adversarial": True}), batch_of()
    with_it, against_it = (
        (net, chosen.build(seed=0)(net, batch, pass_keys(batch, 1))["protocol"])
        for chosen, net in ((CONFIG, small_net()), (config, small_net(config=config)))
    )
    for part, sign in (("encoder", -1), ("protocol", 1)):
        ours, theirs = (gradients_of(term, getattr(net, part)) for net, term in (with_it, against_it))
        assert all(
            a is not None and b is not None and a.any() and torch.equal(sign * a, b) for a, b in zip(ours, theirs, strict=True)
        )


def test_protocol_accuracy_counts_rows_that_are_there() -> None:
    """A probe that always says site 0 is right on the rows of site 0, whatever the padding and the absent rows say."""
    net, batch = small_net(), batch_of(12)
    with torch.no_grad():
        net.probe_f.weight.zero_()
        net.probe_f.bias.copy_(torch.tensor([1.0, 0.0]))
    batch = replace(batch, weight=torch.cat([torch.ones(10), torch.zeros(2)]))
    counted = batch.present[:, 0] & (batch.weight > 0)
    terms = OBJECTIVE(net, batch, pass_keys(batch, 1))
    expected = (batch.site[counted] == 0).float().mean()
    assert 0 < expected < 1
    assert mean(terms["protocol_accuracy_f"]) == pytest.approx(expected.item())


def test_the_number_of_protocols_is_the_number_of_sites() -> None:
    schema = small_schema().model_copy(update={"sites": ("a", "b", "c", "d", "e")})
    assert CONFIG.network(schema, Image2dConfig(widths=(4,)), 8).protocol.out_features == 5


def test_validation_leaves_out_of_the_loss_what_the_encoder_does_not_lower() -> None:
    means = {"contrastive": 2.0, "region": 1.0, "protocol": 0.5, "probe_f": 9.0, "probe_g": 9.0}
    means |= dict.fromkeys(ACCURACIES, 0.5)
    assert OBJECTIVE.numbers(means)["loss"] == pytest.approx(2.0 + 0.2 * 1.0 + 0.2 * 0.5)
    adversarial = SimclrConfig(modality="cxr", protocol_adversarial=True).build(seed=0)
    assert adversarial.numbers(means)["loss"] == pytest.approx(2.2)


def test_absent_images_and_padding_change_nothing() -> None:
    net, batch = small_net(), batch_of()
    image = batch.inputs["cxr"]
    assert isinstance(image, Tensor)
    weight = batch.weight.clone()
    weight[-1] = 0
    batch = replace(batch, weight=weight)
    unseen = ~batch.present[:, 0] | (weight == 0)
    broken = replace(batch, inputs={**batch.inputs, "cxr": torch.where(unseen.view(-1, 1, 1, 1), float("nan"), image)})
    unlike = replace(broken, site=torch.where(unseen, 1 - batch.site, batch.site))
    found, other = (OBJECTIVE(net, each, pass_keys(batch, 1)) for each in (batch, unlike))
    assert {name: term.numerator.item() for name, term in found.items()} == {n: term.numerator.item() for n, term in other.items()}
    ours, theirs = (
        torch.autograd.grad(sum(t.numerator for t in terms.values()), list(net.parameters())) for terms in (found, other)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_two_views_have_their_own_dropout() -> None:
    batch = batch_of()
    plain = SimclrConfig(modality="cxr", views=ViewsConfig(transforms=())).build(seed=0)
    with torch.no_grad():
        same, _ = plain.embed(small_net(dropout=0.0), batch, pass_keys(batch, 1))
        apart, _ = plain.embed(small_net(dropout=0.3), batch, pass_keys(batch, 1))
    assert torch.equal(same.first, same.second)
    assert not torch.equal(apart.first, apart.second)


def test_embeddings_first_then_the_loss_on_all_gives_the_gradient_of_the_whole_batch() -> None:
    """What accumulation needs (gradient caching): possible because a second forward meets the same views and dropout."""
    net, batch = small_net(), batch_of(9)
    parameters = [*net.encoder.parameters(), *net.projection.parameters()]
    whole = torch.autograd.grad(mean(OBJECTIVE(net, batch, pass_keys(batch, 1))["contrastive"]), parameters)
    parts = [batch.rows(start, stop) for start, stop in ((0, 4), (4, 6), (6, 9))]
    with torch.no_grad():
        cached = [OBJECTIVE.embed(net, part, pass_keys(part, 1))[0] for part in parts]
    leaves = [torch.cat([getattr(one, view) for one in cached]).requires_grad_() for view in ("first", "second")]
    valid = torch.cat([one.valid for one in cached])
    term = nt_xent(Embeddings(leaves[0], leaves[1], batch.uid, valid), tau=OBJECTIVE.config.tau)
    wanted = [gradient.split([4, 2, 3]) for gradient in torch.autograd.grad(mean(term), leaves)]
    summed = [torch.zeros_like(parameter) for parameter in parameters]
    for number, part in enumerate(parts):
        again, _ = OBJECTIVE.embed(net, part, pass_keys(part, 1))
        pieces = torch.autograd.grad((again.first, again.second), parameters, (wanted[0][number], wanted[1][number]))
        summed = [total + piece for total, piece in zip(summed, pieces, strict=True)]
    ours, theirs = (torch.cat([gradient.flatten() for gradient in gradients]) for gradients in (summed, whole))
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_both_terms_fall_when_trained() -> None:
    net, batch = small_net(), small_batch(small_schema(), 16)
    batch = replace(batch, present=torch.ones_like(batch.present))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    history: list[dict[str, float]] = []
    for _ in range(15):
        terms = OBJECTIVE(net, batch, pass_keys(batch, 1))
        optimizer.zero_grad()
        sum(term.scale * mean(term) for term in terms.values()).backward()
        optimizer.step()
        history.append({name: mean(term).item() for name, term in terms.items()})
    assert history[-1]["contrastive"] < 0.8 * history[0]["contrastive"]
    assert history[-1]["region"] < history[0]["region"]


@pytest.mark.parametrize("modality", ["vitals", "ct"])
def test_a_modality_that_is_no_image_is_refused(modality: str) -> None:
    batch = batch_of()
    with pytest.raises(SpecError, match="one of kind image or volume in the release"):
        SimclrConfig(modality=modality).build(seed=0)(small_net(), batch, pass_keys(batch, 1))


def test_a_preset_changes_stored_values() -> None:
    config = SimclrConfig.model_validate({"modality": "cxr", "views": {"kind": "cxr"}})
    scale, batch = (torch.tensor(120.0), torch.tensor(40.0)), batch_of()
    assert isinstance(config.views, CxrPreset)
    image, _ = config.build(seed=0)._image(batch)
    seen = config.views.make(image, scale=scale, stream="cxr", seed=0, epoch=batch.epoch, uid=batch.uid)
    net = small_net(config=config)
    expected = net(torch.cat([seen.first.image, seen.second.image]), own_keys(batch)).embedding.chunk(2)
    rows, _ = config.build(seed=0, scale=scale).embed(net, batch, pass_keys(batch, 1))
    assert torch.equal(rows.first, expected[0])
    assert torch.equal(rows.second, expected[1])
    other, _ = config.build(seed=0).embed(net, batch, pass_keys(batch, 1))
    assert not torch.equal(rows.first, other.first)


def own_keys(batch: Batch) -> Tensor:
    keys = pass_keys(batch, 1)[0]
    return torch.cat([noise.hash64(keys, torch.full_like(keys, view)) for view in (0, 1)])

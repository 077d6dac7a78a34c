"""The objective of contrastive pre-training on a small image encoder."""

from dataclasses import replace

import pytest
import torch
from model_inputs import pass_keys, small_batch, small_schema
from torch import Tensor

from draf_dist.augment import ViewsConfig
from draf_dist.errors import SpecError
from draf_dist.losses.gather import Embeddings
from draf_dist.losses.nt_xent import nt_xent
from draf_dist.models.contrastive import ContrastiveNet
from draf_dist.models.encoders import Image2dConfig
from draf_dist.objectives.pretrain import SimclrConfig
from draf_dist.schema.batch import Batch, Term
from draf_dist.schema.modality import ImageSpec

OBJECTIVE = SimclrConfig(modality="cxr").build(seed=0)


def small_net(dropout: float = 0.1) -> ContrastiveNet:
    torch.manual_seed(0)
    spec = small_schema().modalities[0]
    assert isinstance(spec, ImageSpec)
    config = Image2dConfig(widths=(4, 8), groups=2, dropout=dropout, projection_dropout=dropout)
    return ContrastiveNet(config.build(spec, 16), 16, ViewsConfig().crop.num_regions)


def batch_of(rows: int = 8) -> Batch:
    return small_batch(small_schema(), rows)


def mean(term: Term) -> Tensor:
    return term.numerator / term.weight


def test_terms_their_scales_and_their_weights() -> None:
    batch = batch_of()
    terms = OBJECTIVE(small_net(), batch, pass_keys(batch, 1))
    seen = int(batch.present[:, 0].sum())
    assert 0 < seen < 8
    assert {name: (term.scale, term.weight.item()) for name, term in terms.items()} == {
        "contrastive": (1.0, 2.0 * seen),
        "region": (0.2, float(seen)),
    }


def test_every_parameter_is_reached() -> None:
    net, batch = small_net(), batch_of()
    sum(term.scale * mean(term) for term in OBJECTIVE(net, batch, pass_keys(batch, 1)).values()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())


def test_the_region_term_does_not_reach_the_projection_nor_the_contrastive_term_the_region_head() -> None:
    net, batch = small_net(), batch_of()
    terms = OBJECTIVE(net, batch, pass_keys(batch, 1))
    for name, other in (("region", net.projection), ("contrastive", net.region)):
        gradients = torch.autograd.grad(terms[name].numerator, list(other.parameters()), retain_graph=True, allow_unused=True)
        assert all(gradient is None for gradient in gradients)


def test_absent_images_and_padding_change_nothing() -> None:
    net, batch = small_net(), batch_of()
    image = batch.inputs["cxr"]
    assert isinstance(image, Tensor)
    weight = batch.weight.clone()
    weight[-1] = 0
    batch = replace(batch, weight=weight)
    unseen = ~batch.present[:, 0] | (weight == 0)
    broken = replace(batch, inputs={**batch.inputs, "cxr": torch.where(unseen.view(-1, 1, 1, 1), float("nan"), image)})
    for name, term in OBJECTIVE(net, batch, pass_keys(batch, 1)).items():
        other = OBJECTIVE(net, broken, pass_keys(batch, 1))[name]
        ours, theirs = (torch.autograd.grad(t.numerator, list(net.encoder.parameters()), retain_graph=True) for t in (term, other))
        assert term.numerator.item() == other.numerator.item()
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
    history = []
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
    with pytest.raises(SpecError, match="an image of the release"):
        SimclrConfig(modality=modality).build(seed=0)(small_net(), batch, pass_keys(batch, 1))

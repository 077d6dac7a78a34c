"""Rule D3 for Cox's partial likelihood: over ranks and over micro-batches it is that of one process, in value and gradient."""

import tempfile
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked_ranks import run_on_ranks
from torch import Tensor

from draf_dist.losses.cox import Risks, Ties, cox
from draf_dist.losses.gather import AllGather, Gather, carry, leaves, one_process

WORLD, ROWS, FEATURES, PASSES = 3, 11, 5, 2
# Rows of each rank: unequal cuts, one rank with nothing but padding, and one that has no row at all.
CUTS = {"1": (11,), "2": (4, 7), "3": (5, 4, 2), "3 with an empty rank": (7, 0, 4)}
TIES: tuple[Ties, ...] = ("efron", "breslow")


def whole_batch() -> tuple[Risks, Tensor]:
    """Inputs of rows with tied times, of which the last two are padding, and the weights of a linear encoder."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(ROWS, FEATURES, generator=generator)
    time = torch.tensor([1, 2, 2, 3, 2, 3, 4, 1, 3, 2, 1], dtype=torch.float32)
    event = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1], dtype=torch.bool)
    valid = torch.arange(ROWS) < ROWS - 2
    return Risks(inputs, time, event, valid), torch.randn(FEATURES, PASSES, generator=generator)


def cut(batch: Risks, start: int, stop: int) -> Risks:
    return replace(batch, **{field.name: getattr(batch, field.name)[start:stop] for field in fields(batch)})


def of_rank(batch: Risks, sizes: tuple[int, ...], rank: int) -> Risks:
    return cut(batch, sum(sizes[:rank]), sum(sizes[: rank + 1]))


def encoded(batch: Risks, encoder: Tensor) -> Risks:
    return replace(batch, log_risk=batch.log_risk @ encoder)


def value_and_gradient(batch: Risks, encoder: Tensor, ties: Ties, gather: Gather) -> Tensor:
    """Of the local numerator, with the gradient of the encoder behind it and the weight last: all to be summed over ranks."""
    encoder = encoder.clone().requires_grad_()
    term = cox(encoded(batch, encoder), ties=ties, gather=gather)
    (gradient,) = torch.autograd.grad(term.numerator, encoder)
    return torch.cat([term.numerator.detach()[None], gradient.flatten(), term.weight[None]]).double()


def run_rank(rank: int, world: int, folder: str) -> None:
    groups = {size: dist.new_group(list(range(size))) for size in range(1, world + 1)}
    batch, encoder = whole_batch()
    results = {}
    for name, sizes in CUTS.items():
        if rank >= len(sizes):
            continue
        group = groups[len(sizes)]
        gathered = AllGather(group)
        for ties in TIES:
            for way, gather in {"gathered": gathered, "local": one_process}.items():
                summed = value_and_gradient(of_rank(batch, sizes, rank), encoder, ties, gather)
                dist.all_reduce(summed, group=group)
                results[name, ties, way] = summed
        seen = gathered(of_rank(batch, sizes, rank))
        order = seen.valid.nonzero()[:, 0]
        results[name, "rows"] = {field.name: getattr(seen, field.name)[order] for field in fields(seen)}
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")


@pytest.fixture(scope="module")
def over_ranks() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(run_rank, WORLD, folder)
        loaded: dict = torch.load(Path(folder, "results.pt"))
    return loaded


def mean(summed: Tensor) -> Tensor:
    return summed[:-1] / summed[-1]


def difference(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Relative, of the value and of the gradient."""
    value = abs(found[0] - expected[0]) / abs(expected[0])
    return float(value), float((found[1:] - expected[1:]).norm() / expected[1:].norm())


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("world", CUTS)
def test_gathered_is_one_process_in_value_and_gradient(world: str, ties: Ties, over_ranks: dict) -> None:
    alone = mean(value_and_gradient(*whole_batch(), ties, one_process))
    value, gradient = difference(mean(over_ranks[world, ties, "gathered"]), alone)
    assert value < 1e-6
    assert gradient < 1e-6


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("world", ["2", "3"])
def test_risk_sets_of_one_rank_give_another_loss(world: str, ties: Ties, over_ranks: dict) -> None:
    alone = mean(value_and_gradient(*whole_batch(), ties, one_process))
    value, gradient = difference(mean(over_ranks[world, ties, "local"]), alone)
    assert value > 0.05
    assert gradient > 0.05


@pytest.mark.parametrize("world", CUTS)
def test_every_row_and_what_is_known_of_it_arrives_to_the_bit(world: str, over_ranks: dict) -> None:
    whole = cut(whole_batch()[0], 0, ROWS - 2)
    for field in fields(whole):
        expected = getattr(whole, field.name)
        found = over_ranks[world, "rows"][field.name]
        assert found.dtype is expected.dtype
        assert torch.equal(found, expected), field.name


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("sizes", [(11,), (4, 7), (5, 0, 6), (3, 3, 3, 2)])
def test_gradient_caching_over_micro_batches_changes_nothing(sizes: tuple[int, ...], ties: Ties) -> None:
    batch, encoder = whole_batch()
    expected = value_and_gradient(batch, encoder, ties, one_process)[1:-1]
    encoder.requires_grad_()
    parts = [of_rank(batch, sizes, part) for part in range(len(sizes))]
    with torch.no_grad():
        first = [encoded(part, encoder) for part in parts]
    rows = leaves(first)
    wanted = torch.autograd.grad(cox(rows, ties=ties).numerator, [getattr(rows, name) for name in rows.carried])
    pieces = zip(*(torch.split(gradient, list(sizes)) for gradient in wanted), strict=True)
    for part, gradients in zip(parts, pieces, strict=True):
        carry(encoded(part, encoder), gradients).backward()
    assert encoder.grad is not None
    torch.testing.assert_close(encoder.grad.flatten().double(), expected, rtol=1e-5, atol=1e-6)

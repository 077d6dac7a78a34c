"""Rule D3: NT-Xent over ranks is NT-Xent of one process, in value and gradient, and what goes wrong otherwise."""

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked_ranks import run_on_ranks
from torch import Tensor

from draf_dist.losses.gather import AllGather, Embeddings, Gather, one_process
from draf_dist.losses.nt_xent import nt_xent

WORLD, ROWS, TAU = 3, 8, 0.5
# Rows of each rank by world size: unequal cuts, and one rank that has none.
CUTS = {"1": (8,), "2": (3, 5), "3": (4, 1, 3), "3 with an empty rank": (5, 0, 3)}
NUM_RANKS = {name: len(cut) for name, cut in CUTS.items()}


def whole_batch() -> tuple[Embeddings, Tensor]:
    """Inputs of both views, one uid twice and one row of padding, and the weights of a linear encoder."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, ROWS, 6, generator=generator)
    uid = torch.tensor([10, 11, 12, 13, 10, 15, 16, -1])
    return Embeddings(first, second, uid, uid >= 0), torch.randn(6, 4, generator=generator)


def value_and_gradient(batch: Embeddings, encoder: Tensor, gather: Gather) -> Tensor:
    """Of the local numerator, with the gradient of the encoder behind it and the weight last: all to be summed over ranks."""
    encoder = encoder.clone().requires_grad_()
    term = nt_xent(Embeddings(batch.first @ encoder, batch.second @ encoder, batch.uid, batch.valid), tau=TAU, gather=gather)
    (gradient,) = torch.autograd.grad(term.numerator, encoder)
    return torch.cat([term.numerator.detach()[None], gradient.flatten(), term.weight[None]]).double()


def cut(batch: Embeddings, sizes: tuple[int, ...], rank: int) -> Embeddings:
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    return Embeddings(batch.first[mine], batch.second[mine], batch.uid[mine], batch.valid[mine])


def detached(gather: Gather) -> Gather:
    def without_gradient(local: Embeddings) -> Embeddings:
        rows = gather(local)
        return Embeddings(rows.first.detach(), rows.second.detach(), rows.uid, rows.valid)

    return without_gradient


def run_rank(rank: int, world: int, folder: str) -> None:
    groups = {size: dist.new_group(list(range(size))) for size in range(1, world + 1)}
    batch, encoder = whole_batch()
    results = {}
    for name, sizes in CUTS.items():
        group = groups[NUM_RANKS[name]]
        if rank >= NUM_RANKS[name]:
            continue
        gather = AllGather(group)
        for way, chosen in {"gathered": gather, "detached": detached(gather), "local": one_process}.items():
            summed = value_and_gradient(cut(batch, sizes, rank), encoder, chosen)
            dist.all_reduce(summed, group=group)
            results[name, way] = summed
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")


@pytest.fixture(scope="module")
def over_ranks() -> dict[tuple[str, str], Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(run_rank, WORLD, folder)
        loaded: dict[tuple[str, str], Tensor] = torch.load(Path(folder, "results.pt"))
    return {key: summed[:-1] / summed[-1] for key, summed in loaded.items()}


@pytest.fixture(scope="module")
def alone() -> Tensor:
    summed = value_and_gradient(*whole_batch(), one_process)
    return summed[:-1] / summed[-1]


def difference(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Relative, of the value and of the gradient."""
    value = abs(found[0] - expected[0]) / abs(expected[0])
    return float(value), float((found[1:] - expected[1:]).norm() / expected[1:].norm())


@pytest.mark.parametrize("world", CUTS)
def test_gathered_is_one_process_in_value_and_gradient(world: str, over_ranks: dict, alone: Tensor) -> None:
    value, gradient = difference(over_ranks[world, "gathered"], alone)
    assert value < 1e-6
    assert gradient < 1e-6


@pytest.mark.parametrize("world", ["2", "3", "3 with an empty rank"])
def test_detached_copies_give_the_value_but_another_gradient(world: str, over_ranks: dict, alone: Tensor) -> None:
    value, gradient = difference(over_ranks[world, "detached"], alone)
    assert value < 1e-6
    assert gradient > 0.01


@pytest.mark.parametrize("world", ["2", "3", "3 with an empty rank"])
def test_local_negatives_give_another_loss(world: str, over_ranks: dict, alone: Tensor) -> None:
    value, gradient = difference(over_ranks[world, "local"], alone)
    assert value > 0.05
    assert gradient > 0.05

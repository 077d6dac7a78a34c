"""Every fusion model on two ranks is that of one process, however the batch is cut: terms, and the gradient of every parameter.

One set of processes computes all models: starting them costs more than computing.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked_ranks import run_on_ranks
from fusion_members import SMALL, moved, name_of
from model_inputs import SMALL_ENCODERS, pass_keys, small_batch, small_schema
from torch import Tensor

from draf_dist.losses.gather import AllGather, Gather, one_process
from draf_dist.models.build import build_model
from draf_dist.models.fusion.drifa import DrifaConfig
from draf_dist.objectives.aum import AumObjectiveConfig
from draf_dist.objectives.drfuse import DrfuseObjectiveConfig
from draf_dist.objectives.fusion import FusionObjectiveConfig
from draf_dist.schema.batch import Batch
from draf_dist.training.repeatable import repeatable

SCHEMA = small_schema(num_classes=3)
WORLD, ROWS = 2, 9
# Rows of each rank: cut unequally, and one rank that has none. Of nine rows the last is padding.
CUTS = {"unequal": (7, 2), "none on one": (9, 0), "none on the other": (0, 9)}
CONFIGS = [config for member in SMALL.values() for config in member.configs]
# As the paper has it: statistics over the rows of all ranks.
CONFIGS += [DrifaConfig(widths=(2, 4), series=SMALL_ENCODERS.series, table=SMALL_ENCODERS.table)]


def global_batch() -> Batch:
    batch = small_batch(SCHEMA, rows=ROWS)
    weight = (torch.arange(ROWS) < ROWS - 1).float()
    batch = replace(batch, weight=weight, uid=torch.where(weight > 0, batch.uid, -1))
    return batch.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def objective_of(kind: str, gather: Gather) -> Any:
    if kind == "aum":
        return AumObjectiveConfig(beta=0.1).build(SCHEMA, gather)
    return DrfuseObjectiveConfig().build() if kind == "drfuse" else FusionObjectiveConfig(lambda_acd=0.5).build()


def local_sums(config: Any, rows: slice, gather: Gather) -> dict[str, Tensor]:
    """Numerator and weight of every term, and the gradient of all numerators, f64: to be summed over ranks."""
    model = moved(build_model(config, SCHEMA, seed=3).double())
    batch = global_batch().rows(rows.start, rows.stop)
    terms = objective_of(config.kind, gather)(model.train(), batch, pass_keys(batch))
    found = {name: torch.stack([term.numerator, term.weight]).detach().double() for name, term in terms.items()}
    # One backward for all, so that collectives meet in one order; what each term is divided by plays no part in the comparison.
    torch.stack([term.scale * term.numerator for term in terms.values()]).sum().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return found | {"gradient": torch.cat([gradient.flatten() for gradient in gradients])}


def run_rank(rank: int, world: int, out: str) -> None:
    results = {}
    with repeatable(1, torch.device("cpu")):
        for index, config in enumerate(CONFIGS):
            for cut, sizes in CUTS.items():
                start = sum(sizes[:rank])
                sums = local_sums(config, slice(start, start + sizes[rank]), AllGather())
                for values in sums.values():
                    dist.all_reduce(values)
                results[index, cut] = sums
    if rank == 0:
        torch.save(results, Path(out, "sums.pt"))


@pytest.fixture(scope="module")
def over_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], dict[str, Tensor]]:
    out = tmp_path_factory.mktemp("out")
    run_on_ranks(run_rank, WORLD, str(out))
    loaded: dict[tuple[int, str], dict[str, Tensor]] = torch.load(out / "sums.pt")
    return loaded


@pytest.mark.parametrize("index", range(len(CONFIGS)), ids=lambda index: name_of(CONFIGS[index]))
def test_terms_and_gradients_are_those_of_one_process(index: int, over_ranks: dict[tuple[int, str], dict[str, Tensor]]) -> None:
    with repeatable(1, torch.device("cpu")):
        expected = local_sums(CONFIGS[index], slice(0, ROWS), one_process)
    assert expected["gradient"].any()
    for cut in CUTS:
        found = over_ranks[index, cut]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            difference = float((found[name] - value).norm() / value.norm().clamp_min(1e-12))
            assert difference < 1e-6, (cut, name)

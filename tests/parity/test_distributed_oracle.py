"""O21, what test_nt_xent_ranks.py (D3) leaves of it: missing branches (D1), and metrics on two ranks (D7).

All cases share one set of processes: starting them costs more than computing.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from forked_ranks import run_on_ranks
from model_inputs import SMALL_ENCODERS, pass_keys, small_batch, small_schema
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from draf_dist.metrics.calibration import equal_width_bins, expected_calibration_error, top_label
from draf_dist.metrics.selective import aurc
from draf_dist.metrics.survival import concordance_index, risk
from draf_dist.models.build import build_model
from draf_dist.models.fusion.mean import MeanConfig
from draf_dist.objectives.fusion import FusionObjectiveConfig
from draf_dist.schema.batch import Batch, MultiLabelTarget, SurvivalTarget, Target
from draf_dist.schema.label import MultiLabelSpec, SurvivalSpec, TaskSpec
from draf_dist.training.deepspeed_config import DeepSpeedConfig
from draf_dist.training.deepspeed_engine import DeepSpeedRanks
from draf_dist.training.validate import evaluation_keys, validate
from draf_dist.training.validation_scores import columns_of

WORLD, EACH = 2, 4
WAYS = ("skipped", "skipped, unused ones looked for", "masked")


class TwoBranches(nn.Module):
    """A branch a modality and a head over their sum. skip: a branch runs only where some row of the rank has the modality."""

    def __init__(self, *, skip: bool) -> None:
        super().__init__()
        self.skip = skip
        self.branches = nn.ModuleList((nn.Linear(3, 4), nn.Linear(5, 4)))
        self.head = nn.Linear(4, 1)

    def forward(self, first: Tensor, second: Tensor, present: Tensor) -> Tensor:
        outputs = []
        for axis, values in enumerate((first, second)):
            there = present[:, axis, None]
            if not self.skip:
                outputs.append(torch.where(there, self.branches[axis](torch.where(there, values, 0.0)), 0.0))
            elif there.any():
                outputs.append(torch.where(there, self.branches[axis](values), 0.0))
        return self.head(torch.stack(outputs).sum(0))


def two_modalities() -> tuple[Tensor, Tensor, Tensor]:
    """Eight rows: the first half lacks the second modality, the second half the first."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(8, 3, generator=generator), torch.randn(8, 5, generator=generator)
    has_first = (torch.arange(8) < EACH)[:, None]
    return first, second, torch.cat([has_first, ~has_first], 1)


def gradient_of(module: nn.Module) -> Tensor:
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in module.parameters()])


def two_steps(way: str, rows: slice, *, ranks: bool) -> str | Tensor:
    """What went wrong in the second step, or the gradient of both together."""
    torch.manual_seed(0)
    module = TwoBranches(skip=way != "masked")
    model = DistributedDataParallel(module, find_unused_parameters="looked for" in way) if ranks else module
    try:
        for _ in range(2):
            model(*(values[rows] for values in two_modalities())).square().mean().backward()
    except RuntimeError as error:
        return str(error)
    return gradient_of(module)


# A model of the library, whose first rank has no images and whose second has nothing but images.
SCHEMA = small_schema()


def apart() -> Batch:
    batch = small_batch(SCHEMA)
    first = (torch.arange(8) < EACH)[:, None]
    return replace(batch, present=torch.cat([~first, first, first], 1))


def library_step(rows: slice, *, ranks: bool) -> Tensor:
    module = build_model(MeanConfig(width=8, encoders=SMALL_ENCODERS), SCHEMA, seed=0).train()
    model = DistributedDataParallel(module) if ranks else module
    batch = apart().rows(rows.start, rows.stop)
    for _ in range(2):
        term = FusionObjectiveConfig().build()(model, batch, pass_keys(batch))["task"]
        (term.numerator / term.weight).backward()
    return gradient_of(module)


# Metrics of 21 studies, which two ranks can't have equally many of.

STUDIES = 21


def tasks() -> dict[str, tuple[TaskSpec, Target]]:
    generator = torch.Generator().manual_seed(3)
    some = torch.rand(STUDIES, 3, generator=generator) < 0.5
    known = torch.rand(STUDIES, 3, generator=generator) < 0.8
    every = torch.ones(STUDIES, dtype=torch.bool)
    time = 3 * torch.rand(STUDIES, generator=generator)
    return {
        "classes": (SCHEMA.label, small_batch(SCHEMA, rows=STUDIES).target),
        "labels": (MultiLabelSpec(name="y", labels=("a", "b", "c")), MultiLabelTarget(some & known, known)),
        "times": (SurvivalSpec(name="y", edges=(1.0, 2.0)), SurvivalTarget(time, some[:, 0], time.long(), every)),
    }


def held_out(task: str) -> tuple[nn.Module, Batch]:
    label, target = tasks()[task]
    schema = SCHEMA.model_copy(update={"label": label})
    model = build_model(MeanConfig(width=8, encoders=SMALL_ENCODERS), schema, seed=0)
    return model, replace(small_batch(SCHEMA, rows=STUDIES), target=target)


def share_of(batch: Batch, rank: int, *, padded: bool) -> Iterator[Batch]:
    """Every second study, in batches of four; the shorter share ends with a study that was there already, and which is padding."""
    rows = torch.arange(rank, STUDIES, WORLD)
    mine = torch.cat([rows, rows[: (STUDIES + 1) // WORLD - len(rows)]])
    part = batch.map(lambda values: values[mine])
    weight = (torch.arange(len(mine)) < len(rows)).float() if padded else torch.ones(len(mine))
    part = replace(part, weight=weight)
    for start in range(0, len(mine), 4):
        yield part.rows(start, min(start + 4, len(mine)))


def metrics_of(task: str, batches: list[Batch], gather: Any) -> dict[str, float]:
    """Those of a validation, and of what it gathers some that are no means over studies."""
    model, _ = held_out(task)
    found = validate(model, batches, lambda batch: batch, 3, gather)
    with torch.no_grad():
        parts = [columns_of(model.eval()(batch, evaluation_keys(batch, 3)).logits, batch) for batch in batches]
    columns = [gather(torch.cat(column)).numpy() for column in zip(*parts, strict=True)]
    found["studies"] = float(len(columns[0]))
    if task == "classes":
        confidence, hit = top_label(np.exp(columns[0]), columns[1].astype(np.int64))
        found |= {"ece": expected_calibration_error(equal_width_bins(confidence, hit)), "aurc": aurc(confidence, ~hit)}
    if task == "times":
        found["harrell"] = concordance_index(columns[1], columns[2] > 0, risk(columns[0]))
    return found


def run_rank(rank: int, world: int, out: str) -> None:
    mine = slice(rank * EACH, (rank + 1) * EACH)
    found: dict[str, Any] = {way: two_steps(way, mine, ranks=True) for way in WAYS}
    found["library"] = library_step(mine, ranks=True)
    backend = DeepSpeedRanks(DeepSpeedConfig(), torch.device("cpu"))
    for task in tasks():
        _, batch = held_out(task)
        for padded in (True, False):
            found[f"metrics {task} {padded}"] = metrics_of(task, [*share_of(batch, rank, padded=padded)], backend.gather)
    dist.barrier()
    torch.save(found, Path(out, f"{rank}.pt"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("out")
    run_on_ranks(run_rank, WORLD, str(out))
    return [torch.load(out / f"{rank}.pt") for rank in range(WORLD)]


def test_a_branch_that_a_rank_leaves_out_breaks_the_next_step(ranks: list[dict[str, Any]]) -> None:
    for each in ranks:
        assert "Expected to have finished reduction" in each["skipped"]


@pytest.mark.parametrize("way", WAYS[1:])
def test_looking_for_unused_parameters_and_masks_give_the_gradient_of_one_process(way: str, ranks: list[dict[str, Any]]) -> None:
    expected = two_steps("masked", slice(0, 2 * EACH), ranks=False)
    assert isinstance(expected, Tensor)
    for each in ranks:
        torch.testing.assert_close(each[way], expected)


def test_a_model_of_ours_needs_no_search_where_a_rank_lacks_a_modality(ranks: list[dict[str, Any]]) -> None:
    expected = library_step(slice(0, 2 * EACH), ranks=False)
    for each in ranks:
        torch.testing.assert_close(each["library"], expected, rtol=1e-4, atol=1e-6)


def test_masks_of_outputs_alone_leave_nan_in_the_gradients() -> None:
    values, there = torch.tensor([[1.0, 2.0], [torch.nan, 3.0]]), torch.tensor([[True], [False]])
    for cleared in (False, True):
        layer = nn.Linear(2, 3)
        inputs = torch.where(there, values, 0.0) if cleared else values
        output = torch.where(there, layer(inputs), 0.0)
        output.square().sum().backward()
        assert output.isfinite().all()
        assert layer.weight.grad is not None
        assert bool(layer.weight.grad.isfinite().all()) is cleared


@pytest.mark.parametrize("task", ["classes", "labels", "times"])
def test_metrics_of_two_ranks_are_those_of_one_process(task: str, ranks: list[dict[str, Any]]) -> None:
    _, batch = held_out(task)
    expected = metrics_of(task, [batch], lambda rows: rows)
    assert STUDIES % WORLD
    assert expected["studies"] == STUDIES
    first, second = (each[f"metrics {task} True"] for each in ranks)
    assert first == second
    assert first == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("task", ["classes", "labels", "times"])
def test_a_repeated_study_that_counts_changes_them(task: str, ranks: list[dict[str, Any]]) -> None:
    padded, counted = (ranks[0][f"metrics {task} {padded}"] for padded in (True, False))
    assert counted["studies"] == padded["studies"] + 1
    assert abs(counted["nll"] - padded["nll"]) > 1e-4

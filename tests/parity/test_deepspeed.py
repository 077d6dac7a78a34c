"""DeepSpeed on several ranks gives the losses and weights of plain torch in one process, and continues bit for bit.

All cases of one world size share one set of processes: starting them costs more than training.
"""

import json
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from draf_dist.training.parts import Parts, build_parts, pin
from safetensors.torch import load_file
from torch import Tensor, nn

from draf_dist.data.order import rank_entries
from draf_dist.data.prepare import prepare
from draf_dist.errors import SpecError
from draf_dist.schema.batch import Batch
from draf_dist.sources.card import load_card
from draf_dist.sources.hospital_export import HospitalExport
from draf_dist.sources.synth import synthesise
from draf_dist.training import deepspeed_engine
from draf_dist.training.backend import Backend, EngineFiles
from draf_dist.training.deepspeed_config import DeepSpeedConfig
from draf_dist.training.deepspeed_engine import DeepSpeedRanks
from draf_dist.training.job import FinetuneJob, OptimizerConfig
from draf_dist.training.loop import StepReport, train_steps
from draf_dist.training.repeatable import repeatable
from draf_dist.training.schedule import EarlyStopping
from draf_dist.training.state import TrainState
from draf_dist.training.torch_engine import OneProcess

STEPS, HALF = 30, 13
STAGES = (0, 1, 2, 3)
WORLDS = (2, 3)
TOLERANCE = 1e-6
# Every gradient of the model is larger, so it is clipped at every step.
CLIP_NORM = 0.05


@dataclass(frozen=True)
class Case:
    """One training run of all ranks. start: a checkpoint to continue from at step HALF. whole_below: see WHOLE_BELOW."""

    stage: int
    accumulation: int = 1
    precision: str = "fp32"
    clip_norm: float | None = None
    whole_below: int = 0
    start: str | None = None

    @property
    def name(self) -> str:
        parts = (self.stage, self.accumulation, self.precision, self.clip_norm, self.whole_below, self.start)
        return "-".join(str(part).replace("/", "_") for part in parts)


def straight(world: int) -> list[Case]:
    return [Case(stage, accumulation) for stage in STAGES for accumulation in (1, 2)]


def variants(world: int) -> list[Case]:
    """What need not be seen with every stage on every number of ranks."""
    return [Case(3, whole_below=deepspeed_engine.WHOLE_BELOW)] if world == 2 else []


def clipped(world: int) -> list[Case]:
    return [Case(stage, clip_norm=CLIP_NORM) for stage in STAGES] if world == 2 else []


def in_bf16(world: int) -> list[Case]:
    return [Case(stage, precision="bf16") for stage in STAGES] if world == 2 else []


def resumed(world: int) -> list[Case]:
    return [Case(stage, start=f"{world}/{Case(stage).name}") for stage in STAGES]


def moved(world: int) -> list[Case]:
    """Continued from what another stage wrote on another number of ranks."""
    return [Case(stage, start=f"2/{Case(3 - stage).name}") for stage in STAGES] if world == 3 else []


def all_cases(world: int) -> list[Case]:
    kinds: list[Callable[[int], list[Case]]] = [straight, variants, clipped, in_bf16, resumed, moved]
    return [case for kind in kinds for case in kind(world)]


class Collected:
    """Batches that were loaded already."""

    def __init__(self, parts: Parts, backend: Backend) -> None:
        self.batches = list(parts.loader(backend).batches(0, STEPS))

    def since(self, step: int) -> Iterator[tuple[int, Batch]]:
        return iter(self.batches[step:])


def train(backend: Backend, job: FinetuneJob, batches: Collected, clip_norm: float | None, start: Path | None, out: Path) -> None:
    """Trains to the end; leaves a checkpoint of step HALF, one of the end, and the reports of rank 0 under `out`."""
    _, release = pin(job)
    parts = build_parts(job, release, backend.device)
    engine, files = backend.start(parts.model, OptimizerConfig(clip_norm=clip_norm))
    state = TrainState(0, EarlyStopping(patience=1))
    if start is not None:
        files.load(start)
        state.step = HALF
    reports: list[StepReport] = []
    for report in train_steps(state, engine, batches.since(state.step), parts.objective, parts.rules(backend)):
        reports.append(report)
        if report.step in (HALF, STEPS):
            save(files, backend, out / str(report.step))
    if backend.rank == 0:
        numbers = {"losses": [r.loss for r in reports], "norms": [r.gradient_norm for r in reports]}
        (out / "numbers.json").write_text(json.dumps(numbers))


def save(files: EngineFiles, backend: Backend, folder: Path) -> None:
    if backend.rank == 0:
        folder.mkdir(parents=True)
    files.save(folder)


def run_rank(rank: int, world: int, port: int, job_json: str, out: Path) -> None:
    """What every process does: all cases, one after the other."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    job = FinetuneJob.model_validate_json(job_json)
    cpu = torch.device("cpu")
    with repeatable(1, cpu):
        batches: Collected | None = None
        for case in all_cases(world):
            deepspeed_engine.WHOLE_BELOW = case.whole_below
            config = DeepSpeedConfig.model_validate(
                {"zero_stage": case.stage, "precision": case.precision, "accumulation": case.accumulation}
            )
            backend = DeepSpeedRanks(config, cpu)
            batches = batches or Collected(build_parts(job, pin(job)[1], cpu), backend)
            start = out / case.start / str(HALF) if case.start else None
            train(backend, job, batches, case.clip_norm, start, out / str(world) / case.name)
    if rank == 0:
        compiled = [name for name in sys.modules if "deepspeed_shm_comm" in name]
        (out / str(world) / "compiled.json").write_text(json.dumps(compiled))
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> FinetuneJob:
    folder = tmp_path_factory.mktemp("data")
    synthesise(folder / "export", num_sites=2, num_subjects=60, seed=1)
    source = HospitalExport(load_card(folder / "export" / "card.yaml"), folder / "export" / "raw")
    release = prepare(source, str(folder / "release"), subject_key=b"a key of the tests")
    encoders = {
        "image": {"kind": "image2d", "widths": [4, 8], "groups": 2},
        "series": {"kind": "series_transformer", "hidden": 8, "heads": 2, "blocks": 1},
        "table": {"kind": "tabular", "hidden": 8},
    }
    model = {"kind": "draf", "width": 8, "encoders": encoders}
    tree = {"name": "ranks", "release": release.url, "model": model, "batch_size": 7, "epochs": 9, "passes_train": 2}
    return FinetuneJob.model_validate(tree)


@pytest.fixture(scope="module")
def out(job: FinetuneJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of all cases, <world>/<case>/, and of plain torch in one process, 1/<clip norm>/."""
    folder = tmp_path_factory.mktemp("out")
    backend = OneProcess()
    batches = Collected(build_parts(job, pin(job)[1], backend.device), backend)
    with repeatable(1, backend.device):
        for clip_norm in (None, CLIP_NORM):
            train(backend, job, batches, clip_norm, None, folder / "1" / str(clip_norm))
    for world in WORLDS:
        mp.spawn(run_rank, (world, free_port(), job.model_dump_json(), folder), nprocs=world)
    return folder


def numbers(folder: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = json.loads((folder / "numbers.json").read_text())
    return found


def tensors(folder: Path) -> dict[str, Tensor]:
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "optimizer.safetensors")}


def cases(kind: Callable[[int], list[Case]]) -> list[tuple[int, Case]]:
    return [(world, case) for world in WORLDS for case in kind(world)]


def test_the_batches_are_cut_unequally_and_the_last_of_an_epoch_is_padded(job: FinetuneJob) -> None:
    order = build_parts(job, pin(job)[1], torch.device("cpu")).order
    sizes = {len(order.draws(step).sample) for step in range(STEPS)}
    assert len(sizes) == 2
    for world in WORLDS:
        rows = {len(range(7)[rank_entries(7, 7, rank, world)]) for rank in range(world)}
        assert rows == {7 // world, 7 // world + 1}


@pytest.mark.parametrize(("world", "case"), [*cases(straight), *cases(variants), *cases(clipped)])
def test_ranks_give_the_losses_and_weights_of_one_process(out: Path, world: int, case: Case) -> None:
    expected, found = out / "1" / str(case.clip_norm), out / str(world) / case.name
    assert len(numbers(found)["losses"]) == STEPS
    assert numbers(found)["losses"] == pytest.approx(numbers(expected)["losses"], rel=TOLERANCE)
    assert numbers(found)["norms"] == pytest.approx(numbers(expected)["norms"], rel=1e-4)
    left, right = tensors(expected / str(STEPS)), tensors(found / str(STEPS))
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-4, atol=1e-5)


def test_clipping_changes_the_losses(out: Path) -> None:
    plain, clip = numbers(out / "1" / "None"), numbers(out / "1" / str(CLIP_NORM))
    assert min(clip["norms"]) > CLIP_NORM
    assert clip["losses"] != pytest.approx(plain["losses"], rel=1e-3)


@pytest.mark.parametrize(("world", "case"), cases(resumed))
def test_a_continued_run_equals_the_undisturbed_one_bit_for_bit(out: Path, world: int, case: Case) -> None:
    whole, half = out / str(world) / Case(case.stage).name, out / str(world) / case.name
    assert numbers(half)["losses"] == numbers(whole)["losses"][HALF:]
    assert numbers(half)["norms"] == numbers(whole)["norms"][HALF:]
    left, right = tensors(whole / str(STEPS)), tensors(half / str(STEPS))
    assert left.keys() == right.keys()
    assert all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize(("world", "case"), cases(moved))
def test_another_number_of_ranks_and_another_stage_continue_the_run(out: Path, world: int, case: Case) -> None:
    expected = numbers(out / "1" / "None")["losses"][HALF:]
    assert numbers(out / str(world) / case.name)["losses"] == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("stage", STAGES)
def test_one_process_continues_what_ranks_began(out: Path, job: FinetuneJob, tmp_path: Path, stage: int) -> None:
    backend = OneProcess()
    batches = Collected(build_parts(job, pin(job)[1], backend.device), backend)
    with repeatable(1, backend.device):
        train(backend, job, batches, None, out / "2" / Case(stage).name / str(HALF), tmp_path)
    expected = numbers(out / "1" / "None")["losses"][HALF:]
    assert numbers(tmp_path)["losses"] == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize(("world", "case"), cases(in_bf16))
def test_bf16_stays_near_fp32_and_stores_fp32(out: Path, world: int, case: Case) -> None:
    found = out / str(world) / case.name
    exact, rounded = numbers(out / "1" / "None")["losses"], numbers(found)["losses"]
    assert rounded != pytest.approx(exact, rel=1e-5)
    assert rounded == pytest.approx(exact, rel=0.05)
    assert all(not t.is_floating_point() or t.dtype == torch.float32 for t in tensors(found / str(STEPS)).values())


@pytest.mark.parametrize("world", WORLDS)
def test_nothing_is_compiled_on_the_cpu(out: Path, world: int) -> None:
    assert json.loads((out / str(world) / "compiled.json").read_text()) == []


def test_without_a_process_group_there_are_no_ranks() -> None:
    with pytest.raises(SpecError, match="process group"):
        DeepSpeedRanks(DeepSpeedConfig(), torch.device("cpu"))


def test_bf16_gives_f32_in_every_field() -> None:
    module = nn.Linear(3, 2)
    deepspeed_engine.compute_in_bf16(module, torch.device("cpu"))
    x = torch.randn(4, 3)
    plain = nn.functional.linear(x, module.weight, module.bias)
    assert module(x).dtype == torch.float32
    assert not torch.equal(module(x), plain)
    torch.testing.assert_close(module(x), plain, rtol=0.02, atol=0.02)

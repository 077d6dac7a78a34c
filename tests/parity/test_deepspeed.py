"""DeepSpeed on several ranks gives the losses and weights of plain torch in one process, and continues bit for bit.

All cases of one world size share one set of processes: starting them costs more than training.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked_ranks import run_on_ranks
from model_inputs import pass_keys, small_batch, small_schema
from torch import Tensor, nn

from draf_dist.data.order import rank_entries
from draf_dist.errors import SpecError
from draf_dist.models.build import build_model
from draf_dist.models.calibration import calibrate
from draf_dist.models.encoders import EncoderChoice, Image2dConfig, SeriesTransformerConfig, TabularConfig
from draf_dist.models.fusion.draf import DrafConfig
from draf_dist.objectives.fusion import FusionObjectiveConfig
from draf_dist.schema.batch import Batch
from draf_dist.training import deepspeed_engine
from draf_dist.training.backend import Backend
from draf_dist.training.bf16 import compute_in_bf16
from draf_dist.training.deepspeed_config import DeepSpeedConfig
from draf_dist.training.deepspeed_engine import DeepSpeedRanks
from draf_dist.training.fragments import HostCopy, WholeTensors
from draf_dist.training.job import OptimizerConfig
from draf_dist.training.loop import StepRules, train_steps
from draf_dist.training.repeatable import repeatable
from draf_dist.training.schedule import EarlyStopping, WarmupCosine
from draf_dist.training.state import TrainState
from draf_dist.training.torch_engine import OneProcess

STEPS, HALF, SHORT = 20, 12, 8
ROWS, EPOCH = 7, 5
STAGES = (0, 1, 2, 3)
WORLDS = (2, 3)
LOSS_TOLERANCE = 1e-6
# The second third of this one.
KEYS = "queries_keys_values.bias"
# Of the distance that training went, all parameters together.
WEIGHT_TOLERANCE = 5e-6
# Every gradient of the model is larger, so it is clipped at every step.
CLIP_NORM = 0.05
LEARNING_RATE = WarmupCosine(3e-3, STEPS, 0.1)
ENCODERS = EncoderChoice(
    image=Image2dConfig(widths=(4,), groups=2),
    series=SeriesTransformerConfig(hidden=8, heads=2, blocks=1),
    table=TabularConfig(hidden=8),
)
COMPILED = "compiled"


@dataclass(frozen=True)
class Case:
    """One training run of all ranks. start: a checkpoint to continue from at step HALF. whole_below: see WHOLE_BELOW."""

    stage: int
    accumulation: int = 1
    precision: str = "fp32"
    clip_norm: float | None = None
    whole_below: int = 0
    start: str | None = None
    steps: int = STEPS

    @property
    def name(self) -> str:
        parts = (self.stage, self.accumulation, self.precision, self.clip_norm, self.whole_below, self.start)
        return "-".join(str(part).replace("/", "_") for part in parts)

    def continued(self, world: int) -> "Case":
        """The same from what it left at step HALF."""
        return replace(self, start=f"{world}/{self.name}")


# Small parameters stay whole, as they do unless somebody changes it.
WHOLE = Case(3, whole_below=deepspeed_engine.WHOLE_BELOW)


def straight(world: int) -> list[Case]:
    return [Case(stage, accumulation) for stage in STAGES for accumulation in (1, 2)]


def whole(world: int) -> list[Case]:
    return [WHOLE] if world == 2 else []


def clipped(world: int) -> list[Case]:
    return [Case(stage, clip_norm=CLIP_NORM, steps=SHORT) for stage in (0, 1, 3)] if world == 2 else []


def in_bf16(world: int) -> list[Case]:
    return [Case(stage, precision="bf16", steps=SHORT) for stage in (1, 3)] if world == 2 else []


def interrupted(world: int) -> list[Case]:
    """The runs that are continued later. The cuts of ZeRO pad differently on 3 ranks."""
    return [*map(Case, STAGES), Case(2, 2), WHOLE] if world == 2 else [Case(2), Case(3)]


def resumed(world: int) -> list[Case]:
    return [case.continued(world) for case in interrupted(world)]


def moved(world: int) -> list[Case]:
    """Continued from what another stage wrote on another number of ranks, or one process."""
    starts = ("1/None", "2/" + Case(3).name, "2/" + Case(0).name, "2/" + Case(1).name)
    return [Case(stage, start=start) for stage, start in zip(STAGES, starts, strict=True)] if world == 3 else []


def all_cases(world: int) -> list[Case]:
    kinds: list[Callable[[int], list[Case]]] = [straight, whole, clipped, in_bf16, resumed, moved]
    return [case for kind in kinds for case in kind(world)]


@cache
def global_batch(step: int) -> Batch:
    """Seven rows, about a third of whose modalities is absent; in an epoch's last batch three of them are padding."""
    batch = small_batch(small_schema(), ROWS, seed=step)
    weight = torch.ones(ROWS)
    weight[ROWS - (3 if step % EPOCH == EPOCH - 1 else 0) :] = 0
    return replace(
        batch,
        weight=weight,
        present=batch.present & (weight > 0).unsqueeze(1),
        uid=torch.where(weight > 0, batch.uid + ROWS * step, -1),
        epoch=torch.full((ROWS,), step // EPOCH),
    )


def batches(backend: Backend, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
    mine = rank_entries(ROWS, ROWS, backend.rank, backend.world)
    return ((step, global_batch(step).rows(mine.start, mine.stop)) for step in range(start, stop))


def new_model() -> nn.Module:
    """Its scale of U is what validation sets."""
    config = DrafConfig(width=8, encoders=ENCODERS, alpha_mode="scaled")
    return build_model(config, small_schema(), seed=1)


def rules(backend: Backend) -> StepRules:
    return StepRules(lambda batch: batch, lambda batch: pass_keys(batch, 2), LEARNING_RATE, backend.reduce, backend.accumulation)


def train(backend: Backend, case: Case, start: Path | None, out: Path) -> nn.Module:
    """Trains to the end; every rank leaves its part of step HALF and of the end under `out`, rank 0 what the reports said."""
    engine, files = backend.start(new_model(), OptimizerConfig(clip_norm=case.clip_norm))
    copy = HostCopy()
    state = TrainState(0, EarlyStopping(patience=1))
    if start is not None:
        files.load(tensors(start))
        state.step = HALF
    numbers: dict[str, list[float]] = {"losses": [], "norms": []}
    todo = batches(backend, state.step, case.steps)
    for report in train_steps(state, engine, todo, FusionObjectiveConfig().build(), rules(backend)):
        numbers["losses"].append(report.loss)
        numbers["norms"].append(report.gradient_norm)
        if report.step in (HALF, case.steps):
            (out / str(report.step)).mkdir(parents=True, exist_ok=True)
            (out / str(report.step) / f"{backend.rank}.safetensors").write_bytes(copy.take(files.fragments()))
    if backend.rank == 0:
        (out / "numbers.json").write_text(json.dumps(numbers))
    return engine.module


def calibrated(backend: Backend, module: nn.Module) -> list[float]:
    """The scale of U on the batches of one epoch, as every rank has it."""
    calibrate(module, ((batch, pass_keys(batch, 2)) for _, batch in batches(backend, 0, EPOCH)))
    return backend.gather(module.get_buffer("weights.u_scale").view(1)).tolist()  # type: ignore[no-any-return]


def gathered(backend: Backend) -> dict[str, bool]:
    """Whether rows of every dtype come back as they are; rank 0 has none, each further one more."""
    whole = torch.arange(1, 40).view(-1, 3)
    owner = torch.cat([torch.full((rank,), rank) for rank in range(backend.world)])
    found = {}
    for dtype in (torch.int64, torch.int16, torch.bool, torch.float64, torch.float32, torch.bfloat16):
        for shape in ((), (3,), (3, 1), (0,)):
            values = whole[: len(owner), : shape[0] if shape else 1].reshape(len(owner), *shape).to(dtype)
            back = backend.gather(values[owner == backend.rank])
            found[f"{dtype} {shape}"] = back.dtype == dtype and torch.equal(back, values)
    found["none at all"] = backend.gather(whole[:0]).shape == (0, 3)
    return found


def refusal_of_an_idle_parameter(backend: Backend) -> str:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "idle": nn.Linear(2, 1)})
    engine, _ = backend.start(model, OptimizerConfig())
    engine.backward(model["used"](torch.ones(1, 2)).sum())
    with pytest.raises(ValueError, match="no loss") as refused:
        engine.step(0.1)
    return str(refused.value)


def run_rank(rank: int, world: int, out: Path) -> None:
    """What every process does: all cases, one after the other."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(out / COMPILED)
    cpu = torch.device("cpu")
    scales: dict[str, list[float]] = {}
    with repeatable(1, cpu):
        for case in all_cases(world):
            deepspeed_engine.WHOLE_BELOW = case.whole_below
            tree = {"zero_stage": case.stage, "precision": case.precision, "accumulation": case.accumulation}
            backend = DeepSpeedRanks(DeepSpeedConfig.model_validate(tree), cpu)
            start = out / case.start / str(HALF) if case.start else None
            module = train(backend, case, start, out / str(world) / case.name)
            if case in interrupted(world):
                scales[case.name] = calibrated(backend, module)
        idle = refusal_of_an_idle_parameter(DeepSpeedRanks(DeepSpeedConfig(), cpu))
        found = {"scales": scales, "gathered": gathered(backend), "idle": idle, "imported": "mlflow" in sys.modules}
    (out / str(world) / f"rank{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of all cases, <world>/<case>/, and of plain torch in one process, 1/<clip norm>/."""
    folder = tmp_path_factory.mktemp("out")
    backend = OneProcess()
    with repeatable(1, backend.device):
        for clip_norm in (None, CLIP_NORM):
            module = train(backend, Case(0, clip_norm=clip_norm), None, folder / "1" / str(clip_norm))
            if clip_norm is None:
                (folder / "1" / "scale.json").write_text(json.dumps(calibrated(backend, module)))
    for world in WORLDS:
        run_on_ranks(run_rank, world, folder)
    return folder


def numbers(folder: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = json.loads((folder / "numbers.json").read_text())
    return found


def tensors(folder: Path) -> WholeTensors:
    return WholeTensors((path.read_bytes() for path in sorted(folder.iterdir())), str(folder))


def trained(weights: dict[str, Tensor]) -> Tensor:
    """All parameters but the biases of attention keys, which have no gradient but rounding."""
    parameters = {name: weights[name].flatten() for name, _ in new_model().named_parameters()}
    return torch.cat([torch.cat([v[:8], v[16:]]) if name.endswith(KEYS) else v for name, v in parameters.items()]).double()


def cases(*kinds: Callable[[int], list[Case]]) -> list[tuple[int, Case]]:
    return [(world, case) for kind in kinds for world in WORLDS for case in kind(world)]


def name_of(value: object) -> str:
    return value.name if isinstance(value, Case) else str(value)


def test_the_batches_are_cut_unequally_and_the_last_of_an_epoch_is_padded() -> None:
    padding = [int((global_batch(step).weight == 0).sum()) for step in range(STEPS)]
    assert padding == [0, 0, 0, 0, 3] * (STEPS // EPOCH)
    for world in WORLDS:
        rows = {len(range(ROWS)[rank_entries(ROWS, ROWS, rank, world)]) for rank in range(world)}
        assert rows == {ROWS // world, ROWS // world + 1}


@pytest.mark.parametrize(("world", "case"), cases(straight, whole, clipped), ids=name_of)
def test_ranks_give_the_losses_and_weights_of_one_process(out: Path, world: int, case: Case) -> None:
    expected, found = numbers(out / "1" / str(case.clip_norm)), numbers(out / str(world) / case.name)
    assert len(found["losses"]) == case.steps
    assert found["losses"] == pytest.approx(expected["losses"][: case.steps], rel=LOSS_TOLERANCE)
    assert found["norms"] == pytest.approx(expected["norms"][: case.steps], rel=1e-4)
    if case.steps == STEPS:
        left, right = (tensors(out / folder / str(STEPS)) for folder in ("1/None", f"{world}/{case.name}"))
        assert left.keys() == right.keys()
        assert {name: left.shape(name) for name in left} == {name: right.shape(name) for name in right}
        way = trained(left.weights()) - trained(new_model().state_dict())
        assert (trained(right.weights()) - trained(left.weights())).norm() < WEIGHT_TOLERANCE * way.norm()


def test_only_the_biases_of_attention_keys_have_no_gradient(out: Path) -> None:
    """They add the same to the scores of all keys, which softmax ignores; Adam makes full steps of what rounding leaves."""
    squares = {name: value for name, value in tensors(out / "1" / "None" / str(STEPS)).items() if name.startswith("exp_avg_sq/")}
    idle = {name: (value.sqrt() < 1e-8).nonzero().flatten().tolist() for name, value in squares.items()}
    assert {name: found for name, found in idle.items() if found} == {
        f"exp_avg_sq/backbones.encoders.m_vitals.blocks.0.{KEYS}": list(range(8, 16))
    }


def test_clipping_changes_the_losses(out: Path) -> None:
    plain, clip = numbers(out / "1" / "None"), numbers(out / "1" / str(CLIP_NORM))
    assert min(clip["norms"]) > CLIP_NORM
    assert clip["losses"][:SHORT] != pytest.approx(plain["losses"][:SHORT], rel=1e-5)


@pytest.mark.parametrize(("world", "case"), cases(interrupted), ids=name_of)
def test_a_continued_run_equals_the_undisturbed_one_bit_for_bit(out: Path, world: int, case: Case) -> None:
    through, half = out / str(world) / case.name, out / str(world) / case.continued(world).name
    assert numbers(half)["losses"] == numbers(through)["losses"][HALF:]
    assert numbers(half)["norms"] == numbers(through)["norms"][HALF:]
    for rank in range(world):
        left, right = (folder / str(STEPS) / f"{rank}.safetensors" for folder in (half, through))
        assert left.read_bytes() == right.read_bytes()


@pytest.mark.parametrize(("world", "case"), cases(moved), ids=name_of)
def test_another_number_of_ranks_and_another_stage_continue_the_run(out: Path, world: int, case: Case) -> None:
    expected = numbers(out / "1" / "None")["losses"][HALF:]
    assert numbers(out / str(world) / case.name)["losses"] == pytest.approx(expected, rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("stage", STAGES)
def test_one_process_continues_what_ranks_began(out: Path, tmp_path: Path, stage: int) -> None:
    backend = OneProcess()
    with repeatable(1, backend.device):
        train(backend, Case(0), out / "3" / Case(stage).name / str(HALF), tmp_path)
    expected = numbers(out / "1" / "None")["losses"][HALF:]
    assert numbers(tmp_path)["losses"] == pytest.approx(expected, rel=LOSS_TOLERANCE)


@pytest.mark.parametrize(("world", "case"), cases(in_bf16), ids=name_of)
def test_bf16_stays_near_fp32_and_stores_fp32(out: Path, world: int, case: Case) -> None:
    found = out / str(world) / case.name
    exact, rounded = numbers(out / "1" / "None")["losses"][:SHORT], numbers(found)["losses"]
    assert rounded != pytest.approx(exact, rel=1e-5)
    assert rounded == pytest.approx(exact, rel=0.05)
    assert all(not t.is_floating_point() or t.dtype == torch.float32 for t in tensors(found / str(SHORT)).values())


@pytest.mark.parametrize("world", WORLDS)
def test_the_scale_of_the_uncertainty_is_that_of_one_process_on_every_rank(out: Path, world: int) -> None:
    (expected,) = json.loads((out / "1" / "scale.json").read_text())
    for rank in range(world):
        scales = json.loads((out / str(world) / f"rank{rank}.json").read_text())["scales"]
        assert set(scales) == {case.name for case in interrupted(world)}
        for found in scales.values():
            assert len(set(found)) == 1
            assert found == pytest.approx([expected] * world, rel=1e-4)


@pytest.mark.parametrize("world", WORLDS)
def test_rows_of_any_type_are_gathered_in_the_order_of_ranks(out: Path, world: int) -> None:
    for rank in range(world):
        found = json.loads((out / str(world) / f"rank{rank}.json").read_text())["gathered"]
        assert [what for what, equal in found.items() if not equal] == []


def test_a_rank_does_not_wait_for_mlflow(out: Path) -> None:
    """DeepSpeed would import it for its autotuner: a quarter of the time that a rank takes to start."""
    assert json.loads((out / "2" / "rank1.json").read_text())["imported"] is False


def test_nothing_is_compiled_on_the_cpu(out: Path) -> None:
    """DeepSpeed would put its own all-reduce there, after a minute."""
    assert not (out / COMPILED).exists()


def test_a_parameter_that_no_loss_reaches_is_refused(out: Path) -> None:
    """Adam would leave it alone, ZeRO would let it decay."""
    found = json.loads((out / "2" / "rank1.json").read_text())["idle"]
    assert found == "no loss reaches these parameters: idle.weight, idle.bias"


def test_a_device_that_deepspeed_does_not_drive_is_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    with pytest.raises(SpecError, match="DS_ACCELERATOR=cuda"):
        DeepSpeedRanks(DeepSpeedConfig(), torch.device("cuda", 0))
    dist.destroy_process_group()


def test_without_a_process_group_there_are_no_ranks() -> None:
    with pytest.raises(SpecError, match="process group"):
        DeepSpeedRanks(DeepSpeedConfig(), torch.device("cpu"))


def test_bf16_gives_f32_in_every_field() -> None:
    module = nn.Linear(3, 2)
    compute_in_bf16(module, torch.device("cpu"))
    x = torch.randn(4, 3)
    plain = nn.functional.linear(x, module.weight, module.bias)
    assert module(x).dtype == torch.float32
    assert not torch.equal(module(x), plain)
    torch.testing.assert_close(module(x), plain, rtol=0.02, atol=0.02)

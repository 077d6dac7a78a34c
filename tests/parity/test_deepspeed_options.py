"""What a profile may ask of DeepSpeed changes no result: offloading, activation checkpointing, keys that are passed on.

Two ranks train all cases, one after the other: starting processes costs more than training.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig as DeepSpeedsOwn
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from forked_ranks import run_on_ranks
from model_inputs import SMALL_ENCODERS, pass_keys, small_batch, small_schema, small_stats
from small_engines import new_model, objective
from torch import Tensor, nn

from draf_dist.data.order import rank_entries
from draf_dist.errors import GateError
from draf_dist.models.encoders.image2d import ResidualBlock
from draf_dist.models.export import model_files, read_model
from draf_dist.models.fusion import FusionConfig
from draf_dist.models.fusion.draf import DrafConfig
from draf_dist.models.fusion.mean import MeanConfig
from draf_dist.schema.batch import Batch
from draf_dist.training import deepspeed_engine, deepspeed_files
from draf_dist.training.backend import Backend, EngineFiles
from draf_dist.training.deepspeed_config import DeepSpeedConfig
from draf_dist.training.deepspeed_engine import DeepSpeedRanks
from draf_dist.training.deepspeed_extra import DeepSpeedExtra, ZeroExtra
from draf_dist.training.fragments import HostCopy, WholeTensors
from draf_dist.training.job import OptimizerConfig
from draf_dist.training.loop import StepRules, train_steps
from draf_dist.training.repeatable import repeatable
from draf_dist.training.schedule import EarlyStopping
from draf_dist.training.state import TrainState
from draf_dist.training.torch_engine import OneProcess, load_weights

MODELS, STAGES, WORLD = ("draf", "mean", "simclr"), (0, 1, 2, 3), 2
# The first of these steps is saved and continued from.
HALF, STEPS, ROWS = 1, 2, 7
LOSS_TOLERANCE = 1e-6
# Of a tensor's greatest value.
STATE_TOLERANCE = 1e-6
# Its running mean of U is a buffer that must move once per step.
FUSION: dict[str, FusionConfig | None] = {
    "draf": DrafConfig(width=8, encoders=SMALL_ENCODERS, u_ema=0.9),
    "mean": MeanConfig(width=8, encoders=SMALL_ENCODERS),
    "simclr": None,
}
CPU = torch.device("cpu")
Tree = dict[str, Any]
# Every key that may be passed on, at another value than DeepSpeed's own.
ZERO: Tree = {
    "contiguous_gradients": False,
    "reduce_scatter": False,
    "reduce_bucket_size": 1000,
    "use_multi_rank_bucket_allreduce": False,
    "allgather_partitions": False,
    "allgather_bucket_size": 1000,
    "overlap_comm": True,
    "sub_group_size": 900,
}
STAGE_3: Tree = {
    "contiguous_gradients": False,
    "reduce_bucket_size": 1000,
    "overlap_comm": False,
    "sub_group_size": 900,
    "stage3_prefetch_bucket_size": 300,
    "stage3_param_persistence_threshold": 20,
    "stage3_model_persistence_threshold": 5000,
    "stage3_max_live_parameters": 1000,
    "stage3_max_reuse_distance": 1000,
    "stage3_use_all_reduce_for_fetch_params": True,
    "stage3_allgather_sequential": True,
    "log_trace_cache_warnings": True,
}
# The least that each size may be.
SMALLEST: Tree = {"reduce_bucket_size": 1, "allgather_bucket_size": 2, "sub_group_size": 1}
SMALLEST_3: Tree = SMALLEST | {key: 0 for key, value in STAGE_3.items() if key.startswith("stage3_") and type(value) is int}
REST: Tree = {
    "comms_logger": {"enabled": True, "verbose": True, "prof_all": False, "prof_ops": ["broadcast"], "debug": True},
    "wall_clock_breakdown": True,
    "memory_breakdown": True,
    "steps_per_print": 2,
    "log_level": "error",
}


class Asked(dict[str, Any]):
    """A configuration that knows for which keys it was asked."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(settings)
        self.keys_of: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_of.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.keys_of.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        # Looked for among these too.
        return self


@dataclass(frozen=True)
class Case:
    """One run of both ranks under a DeepSpeed part of a profile. start: name of a case to continue at step HALF."""

    name: str
    model: str
    settings: Tree
    start: str | None = None


def plain(model: str, stage: int) -> Case:
    return Case(f"{model}-{stage}", model, {"zero_stage": stage})


PLAIN = [plain(model, stage) for model in MODELS for stage in STAGES]
# Two micro-batches of SimCLR: gradient caching computes every block three times.
CACHED = Case("simclr-2-cached", "simclr", {"zero_stage": 2, "accumulation": 2})
BF16 = Case("draf-3-bf16", "draf", {"zero_stage": 3, "precision": "bf16"})
KEPT = [*PLAIN, CACHED, BF16]
FORGETFUL = [replace(case, name=f"{case.name}-again", settings=case.settings | {"activation_checkpointing": True}) for case in KEPT]
OFFLOADED = [
    Case("off-1", "mean", {"zero_stage": 1, "offload": "optimizer"}),
    Case("off-2", "mean", {"zero_stage": 2, "offload": "optimizer", "accumulation": 2}),
    Case("off-3", "mean", {"zero_stage": 3, "offload": "optimizer"}),
    Case("off-all", "mean", {"zero_stage": 3, "offload": "optimizer_and_parameters"}),
]
# From and to offloading, through every stage.
MOVED = [
    Case("all-to-0", "mean", {"zero_stage": 0}, start="off-all"),
    Case("0-to-1", "mean", {"zero_stage": 1, "offload": "optimizer"}, start="mean-0"),
    Case("1-to-2", "mean", {"zero_stage": 2, "offload": "optimizer"}, start="off-1"),
    Case("2-to-3", "mean", {"zero_stage": 3}, start="off-2"),
    Case("3-to-all", "mean", {"zero_stage": 3, "offload": "optimizer_and_parameters"}, start="mean-3"),
    Case("3-to-1", "mean", {"zero_stage": 1}, start="off-3"),
]
PASSED = [
    Case("passed-1", "mean", {"zero_stage": 1, "extra": REST | {"zero_optimization": ZERO}}),
    Case("passed-2", "mean", {"zero_stage": 2, "extra": {"zero_optimization": ZERO}}),
    Case("passed-3", "mean", {"zero_stage": 3, "extra": {"zero_optimization": STAGE_3}}),
    Case("smallest-1", "mean", {"zero_stage": 1, "extra": {"zero_optimization": SMALLEST}}),
    Case("smallest-2", "mean", {"zero_stage": 2, "extra": {"zero_optimization": SMALLEST}}),
    Case("smallest-3", "mean", {"zero_stage": 3, "extra": {"zero_optimization": SMALLEST_3}}),
]
CONTINUED = [replace(case, name=f"{case.name}-continued", start=case.name) for case in OFFLOADED + PASSED]
ALL = [*KEPT, *FORGETFUL, *OFFLOADED, *PASSED, *CONTINUED, *MOVED]


def batches(backend: Backend, start: int) -> Iterator[tuple[int, Batch]]:
    mine = rank_entries(ROWS, ROWS, backend.rank, backend.world)
    for step in range(start, STEPS):
        yield step, small_batch(small_schema(), ROWS, seed=step).rows(mine.start, mine.stop)


def save(files: EngineFiles, backend: Backend, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{backend.rank}.safetensors").write_bytes(HostCopy().take(files.fragments()))


def state_of(folder: Path) -> WholeTensors:
    return WholeTensors((path.read_bytes() for path in sorted(folder.iterdir())), str(folder))


def train(case: Case, backend: Backend, out: Path, calls: Counter[str] | None = None) -> list[float]:
    """Trains to the end; every rank leaves its part of what was restored, of step HALF and of the end.

    calls: how often a layer within a block was computed is added to it.
    """
    engine, files = backend.start(new_model(FUSION[case.model]), OptimizerConfig())
    if calls is not None:
        inner = next(part for part in engine.module.modules() if isinstance(part, ResidualBlock)).conv1
        inner.register_forward_hook(lambda *ignored: calls.update([case.name]))
    state, folder = TrainState(0, EarlyStopping(patience=1)), out / case.name
    if case.start is not None:
        files.load(state_of(out / case.start / str(HALF)))
        state.step = HALF
        save(files, backend, folder / "restored")
    rules = StepRules(
        lambda batch: batch, lambda batch: pass_keys(batch, 2), lambda step: 2e-3, backend.reduce, backend.accumulation
    )
    losses = []
    for report in train_steps(state, engine, batches(backend, state.step), objective(FUSION[case.model], backend.world), rules):
        losses.append(report.loss)
        if report.step in (HALF, STEPS):
            save(files, backend, folder / str(report.step))
    return losses


def arrived(case: Case) -> Tree:
    """What DeepSpeed has made of the keys that were passed."""
    config = DeepSpeedConfig.model_validate(case.settings)
    told = deepspeed_engine.settings(config, None, 1)
    made = DeepSpeedsOwn(told)
    zero = made.zero_config.model_dump(mode="json", by_alias=True)
    rest = {key: getattr(made, key) for key in REST if key != "comms_logger"}
    logger = made.comms_config.comms_logger.model_dump() if made.comms_config.comms_logger_enabled else None
    return {"zero": zero, "comms_logger": logger, **rest}


def run_rank(rank: int, world: int, out: Path) -> None:
    deepspeed_engine.WHOLE_BELOW = 0
    losses, calls = {}, Counter[str]()
    with repeatable(1, CPU):
        for case in ALL:
            losses[case.name] = train(case, DeepSpeedRanks(DeepSpeedConfig.model_validate(case.settings), CPU), out, calls)
    found = {case.name: arrived(case) for case in PASSED + OFFLOADED}
    about = {"losses": losses, "calls": calls, "arrived": found, "elsewhere": [elsewhere(stage) for stage in STAGES[1:]]}
    (out / f"rank{rank}.json").write_text(json.dumps(about))


def elsewhere(stage: int) -> str:
    """What a rank says where DeepSpeed lays state out in another way: in turns at ZeRO 1 and 2, the last rank's first at 3."""
    as_it_was, span = deepspeed_engine.settings, deepspeed_files._span

    def in_turns(*arguments: Any) -> Tree:
        told = as_it_was(*arguments)
        return told | {"zero_optimization": told["zero_optimization"] | {"round_robin_gradients": True}}

    def from_the_end(parameter: nn.Parameter) -> tuple[int, int]:
        start, count = span(parameter)
        return parameter.ds_numel - start - count, count  # type: ignore[attr-defined]

    ranks = DeepSpeedRanks(DeepSpeedConfig.model_validate({"zero_stage": stage}), CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed_engine, "settings", in_turns)
        patch.setattr(deepspeed_files, "_span", from_the_end)
        with pytest.raises(GateError) as caught:
            ranks.start(new_model(FUSION["mean"]), OptimizerConfig())
    return str(caught.value)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all cases left, <case>/<step>/."""
    folder = tmp_path_factory.mktemp("out")
    run_on_ranks(run_rank, WORLD, folder)
    return folder


@pytest.fixture(scope="module")
def losses(out: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = json.loads((out / "rank0.json").read_text())["losses"]
    return found


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    with repeatable(1, CPU):
        return train(Case("one", "mean", {}), OneProcess(), tmp_path_factory.mktemp("one"))


def name_of(value: object) -> str:
    return value.name if isinstance(value, Case) else str(value)


def same_bits(left: Path, right: Path) -> bool:
    return all((left / name).read_bytes() == (right / name).read_bytes() for name in ("0.safetensors", "1.safetensors"))


@pytest.mark.parametrize("case", KEPT, ids=name_of)
def test_blocks_that_are_computed_again_change_no_bit(out: Path, losses: dict[str, list[float]], case: Case) -> None:
    """Running means of U are among what is compared: they move once."""
    assert losses[f"{case.name}-again"] == losses[case.name]
    assert same_bits(out / f"{case.name}-again" / str(STEPS), out / case.name / str(STEPS))


@pytest.mark.parametrize("case", KEPT, ids=name_of)
def test_blocks_are_computed_once_more(out: Path, case: Case) -> None:
    calls = json.loads((out / "rank1.json").read_text())["calls"]
    # SimCLR takes both views at once; gradient caching has a first look at each of two micro-batches.
    once, looks = STEPS * case.settings.get("accumulation", 1), 2 if case is CACHED else 1
    assert (calls[case.name], calls[f"{case.name}-again"]) == (once * looks, once * (looks + 1))


@pytest.mark.parametrize("model", MODELS)
def test_in_one_process_they_change_no_bit_either(tmp_path: Path, model: str) -> None:
    with repeatable(1, CPU):
        kept = train(Case("kept", model, {}), OneProcess(), tmp_path)
        again = train(Case("again", model, {}), OneProcess(activation_checkpointing=True), tmp_path)
    assert again == kept
    left, right = (tmp_path / name / str(STEPS) / "0.safetensors" for name in ("kept", "again"))
    assert left.read_bytes() == right.read_bytes()


@pytest.mark.parametrize("case", OFFLOADED + PASSED, ids=name_of)
def test_losses_are_those_of_one_process(losses: dict[str, list[float]], in_one_process: list[float], case: Case) -> None:
    assert losses[case.name] == pytest.approx(in_one_process, rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("step", [HALF, STEPS])
@pytest.mark.parametrize("case", PASSED, ids=name_of)
def test_checkpoints_are_those_without_passed_keys(out: Path, case: Case, step: int) -> None:
    """Weights, both moments and step counters: losses alone would not tell whether a checkpoint is put together rightly."""
    without = state_of(out / plain(case.model, case.settings["zero_stage"]).name / str(step))
    found = state_of(out / case.name / str(step))
    assert found.keys() == without.keys()
    off = {name: (found[name] - without[name]).abs().max() / without[name].abs().max().clamp(min=1e-30) for name in without}
    assert {name: float(value) for name, value in off.items() if value > STATE_TOLERANCE} == {}


@pytest.mark.parametrize("case", OFFLOADED + PASSED, ids=name_of)
def test_a_continued_run_with_settings_leaves_the_same_bits(out: Path, losses: dict[str, list[float]], case: Case) -> None:
    assert losses[f"{case.name}-continued"] == losses[case.name][HALF:]
    assert same_bits(out / f"{case.name}-continued" / str(STEPS), out / case.name / str(STEPS))


@pytest.mark.parametrize("case", MOVED, ids=name_of)
def test_a_state_moves_between_stages_and_offloading_bit_for_bit(
    out: Path, losses: dict[str, list[float]], in_one_process: list[float], case: Case
) -> None:
    before, after = state_of(out / str(case.start) / str(HALF)), state_of(out / case.name / "restored")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert losses[case.name] == pytest.approx(in_one_process[HALF:], rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("case", [plain("mean", stage) for stage in STAGES] + OFFLOADED, ids=name_of)
def test_model_files_come_from_any_stage_with_and_without_offloading(out: Path, case: Case) -> None:
    """The exchange form of a checkpoint in mid-run holds the bits that the ranks hold."""
    state, model = state_of(out / case.name / str(HALF)), new_model(FUSION["mean"])
    load_weights(model, state.weights())
    files = model_files(model, FUSION["mean"], small_schema(), small_stats())
    read: dict[str, Tensor] = read_model(files, where="model").model.state_dict()
    held = state.weights()
    assert read.keys() == held.keys()
    assert all(torch.equal(value, held[name]) for name, value in read.items())


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_state_that_lies_elsewhere_is_refused_at_the_start(out: Path, stage: int, rank: int) -> None:
    """DeepSpeed keeps each element, but not where its own account of a parameter says."""
    told = json.loads((out / f"rank{rank}.json").read_text())["elsewhere"][stage - 1]
    assert "This DeepSpeed lays its state out in another way" in told
    # A rank whose own pieces are right hears of the others'.
    assert json.loads((out / "rank0.json").read_text())["elsewhere"][stage - 1] == told


def test_keys_that_are_passed_arrive(out: Path) -> None:
    found = json.loads((out / "rank1.json").read_text())["arrived"]
    for case in PASSED:
        zero = case.settings["extra"]["zero_optimization"]
        assert {key: found[case.name]["zero"][key] for key in zero} == zero
    assert {key: found["passed-1"][key] for key in REST} == REST


def test_offloading_is_on_and_of_the_kind_that_was_asked_for(out: Path) -> None:
    found = json.loads((out / "rank0.json").read_text())["arrived"]
    wanted = {"off-1": (True, False), "off-2": (True, False), "off-3": (True, False), "off-all": (True, True)}
    parts = ("offload_optimizer", "offload_param")
    on_cpu = {name: tuple((found[name]["zero"][part] or {}).get("device") == "cpu" for part in parts) for name in wanted}
    assert on_cpu == wanted


def test_every_key_of_deepspeeds_is_passed_or_refused_with_a_reason() -> None:
    asked = Asked(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1)
    DeepSpeedsOwn(asked)
    assert asked.keys_of - DeepSpeedExtra.model_fields.keys() == set(DeepSpeedExtra.refused)
    zero = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert zero - ZeroExtra.model_fields.keys() <= set(ZeroExtra.refused)


def test_every_key_that_may_be_passed_is_tried() -> None:
    assert set(ZERO) | set(STAGE_3) == set(ZeroExtra.model_fields)
    assert set(REST) | {"zero_optimization"} == set(DeepSpeedExtra.model_fields)
    made = DeepSpeedZeroConfig().model_dump(by_alias=True)
    tried = ((key, value) for zero in (ZERO, STAGE_3) for key, value in zero.items())
    # Without a value that is passed already, a test of its effect could not fail.
    assert [key for key, value in tried if value == made[key] and key != "overlap_comm"] == []

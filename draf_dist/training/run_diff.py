"""Where two runs part: in their jobs, in the numbers of which step, in which tensors of which checkpoint."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from draf_dist.config.spec import parse_yaml
from draf_dist.training.jobs import RESOLVED
from draf_dist.training.journal import Line
from draf_dist.training.replay import relative, saved_steps, saved_tensors
from draf_dist.training.run_folder import JOB, RunFolder, open_run

# (step, event) -> its numbers by name.
Numbers = dict[tuple[int, str], dict[str, Any]]
# Of a step: how it came about, not what came out.
TIMES = ("wait_s", "compute_s", "data", "time")
MISSING = "-"


@dataclass(frozen=True)
class Differing:
    """A key, or a number, and what it is in either run; "-" where it has none."""

    name: str
    left: Any
    right: Any

    @property
    def relative(self) -> float | None:
        """How far two numbers are apart, as a share of the larger."""
        numbers = isinstance(self.left, int | float) and isinstance(self.right, int | float)
        return relative(float(self.left), float(self.right)) if numbers else None


@dataclass(frozen=True)
class DifferingTensor:
    """A tensor of a checkpoint: the largest difference of an element, and that as a share of the largest element.

    shapes: told where they differ; then there is no difference to tell.
    """

    name: str
    absolute: float | None
    relative: float | None
    shapes: str = ""


@dataclass(frozen=True)
class Parted:
    """The first step or checkpoint (by its steps done) at which something differs, and what."""

    step: int
    event: str
    differing: tuple[Differing, ...]


@dataclass(frozen=True)
class PartedTensors:
    """The first checkpoint that both have in which tensors differ, most different first, and how many tensors there are."""

    step: int
    tensors: tuple[DifferingTensor, ...]
    of: int


@dataclass(frozen=True)
class RunDiff:
    """Two runs beside each other.

    job: keys of the spec that differ. made_with: versions and commits that do; no difference of the runs. steps: done by each.
    compared: how many both have. parted: in metrics.jsonl. tensors: in the checkpoints that both have. checkpoints: their steps.
    """

    left: str
    right: str
    job: tuple[Differing, ...]
    made_with: tuple[Differing, ...]
    steps: tuple[int, int]
    compared: int
    parted: Parted | None
    checkpoints: tuple[int, ...]
    tensors: PartedTensors | None

    @property
    def equal(self) -> bool:
        """Whether job, steps, numbers and tensors are the same."""
        return not self.job and self.steps[0] == self.steps[1] and self.parted is None and self.tensors is None


def diff_runs(left_url: str, right_url: str, *, tolerance: float = 0.0) -> RunDiff:
    """Compares two runs. tolerance: relative differences of numbers and tensors up to this are none.

    Raises:
        SpecError: there is no run at one of the URLs.
        DataError: a checkpoint that both have is broken in one.
    """
    left, right = open_run(left_url), open_run(right_url)
    numbers = _numbers(left.metrics()), _numbers(right.metrics())
    shared = sorted(set(saved_steps(left)) & set(saved_steps(right)))
    return RunDiff(
        left=left.url,
        right=right.url,
        job=tuple(_unequal("", left.job.model_dump(mode="json"), right.job.model_dump(mode="json"))),
        made_with=tuple(_unequal("", _made_with(left), _made_with(right))),
        steps=(_last_step(numbers[0]), _last_step(numbers[1])),
        compared=sum(event == "step" for _, event in numbers[0].keys() & numbers[1].keys()),
        parted=_first_parted(*numbers, tolerance),
        checkpoints=tuple(shared),
        tensors=_first_parted_tensors(left, right, shared, tolerance),
    )


def _made_with(run: RunFolder) -> dict[str, Any]:
    """Versions and commits; the job's own hash says nothing that its keys don't."""
    about = parse_yaml(run.store.read(JOB).decode(), where=run.store.where(JOB)).get(RESOLVED, {})
    return {key: value for key, value in about.items() if key not in ("job_sha256", "release_version")}


def _numbers(metrics: Iterable[Line]) -> Numbers:
    """The terms of the loss are among the numbers."""
    found = {}
    for line in metrics:
        flat = {key: value for key, value in line.items() if key not in ("event", "step", "terms", *TIMES)}
        flat |= {f"terms.{name}": value for name, value in line.get("terms", {}).items()}
        found[line["step"], line["event"]] = flat
    return found


def _last_step(numbers: Numbers) -> int:
    return max((step for step, _ in numbers), default=0)


def _first_parted(left: Numbers, right: Numbers, tolerance: float) -> Parted | None:
    """Within the steps that both have got to: a run that is longer has not parted. A skipped step has no numbers."""
    reached = min(_last_step(left), _last_step(right))
    keys = (key for key in left.keys() | right.keys() if key[0] <= reached)
    # Validation comes after the step.
    for step, event in sorted(keys, key=lambda key: (key[0], key[1] != "step")):
        differing = tuple(_beyond(_unequal("", left.get((step, event), {}), right.get((step, event), {})), tolerance))
        if differing:
            return Parted(step, event, differing)
    return None


def _beyond(differing: Iterable[Differing], tolerance: float) -> Iterator[Differing]:
    return (each for each in differing if each.relative is None or each.relative > tolerance)


def _first_parted_tensors(left: RunFolder, right: RunFolder, steps: list[int], tolerance: float) -> PartedTensors | None:
    for step in steps:
        here, there = saved_tensors(left, step), saved_tensors(right, step)
        names = here.keys() | there.keys()
        differing = [found for name in names if (found := _tensor(name, here, there, tolerance))]
        if differing:
            ordered = sorted(differing, key=lambda found: (found.absolute is not None, -(found.relative or 0.0), found.name))
            return PartedTensors(step, tuple(ordered), len(names))
    return None


def _tensor(name: str, left: Mapping[str, Tensor], right: Mapping[str, Tensor], tolerance: float) -> DifferingTensor | None:
    if name not in left or name not in right:
        return DifferingTensor(name, None, None, "only in one of them")
    a, b = left[name], right[name]
    if a.shape != b.shape or a.dtype != b.dtype:
        return DifferingTensor(name, None, None, f"{_kind(a)} and {_kind(b)}")
    # Two NaN in one place are no difference.
    same = (a == b) | (a.isnan() & b.isnan())
    if same.all():
        return None
    here_, there_ = a.double(), b.double()
    # A number beside a NaN is infinitely far.
    gap = (here_ - there_).abs().nan_to_num(nan=torch.inf)[~same].max()
    share = float(gap / torch.maximum(here_.abs().nan_to_num().max(), there_.abs().nan_to_num().max()))
    return DifferingTensor(name, float(gap), share) if share > tolerance else None


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _unequal(name: str, left: Any, right: Any) -> Iterator[Differing]:
    """What differs, as deep as both are mappings."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in sorted(left.keys() | right.keys()):
            yield from _unequal(f"{name}.{key}" if name else key, left.get(key, MISSING), right.get(key, MISSING))
    elif left != right:
        yield Differing(name, left, right)

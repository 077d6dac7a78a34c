"""The numbers of a run while it goes on: metrics.jsonl and TensorBoard."""

import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from draf_dist.data.loader_stats import LoaderStats
from draf_dist.storage import Store
from draf_dist.training.journal import Journal, room
from draf_dist.training.loop import StepReport

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


class Tracker:
    """Numbers of a run, on disk. Both files begin at `start`: what a killed attempt wrote past its checkpoint is taken out.

    metrics.jsonl holds {"event": "step", "step", "loss", "terms", "data", ...} once per optimizer step, {"event": "epoch", "step",
    "epoch", "nll", ...} once per validation; `step` counts optimizer steps done.
    """

    def __init__(self, store: Store, start: int, due: bool = False) -> None:
        """due: whether the validation at `start` is still to be made; then a line that says what it found goes too."""
        self._store = store
        validated = start - 1 if due else start
        self._journal = Journal(store, METRICS, lambda line: line["step"] <= (validated if line["event"] == "epoch" else start))
        # A bucket takes no appended bytes: events are gathered here and sent at every checkpoint.
        local = store.local_path(TENSORBOARD)
        self._staging: tempfile.TemporaryDirectory[str] | None = None
        if local is None:
            self._staging = tempfile.TemporaryDirectory(prefix="draf-tensorboard-")
            local = Path(self._staging.name)
        self._folder = local
        # purge_step tells TensorBoard to hide what an earlier attempt wrote from this step on.
        self._writer = SummaryWriter(str(self._folder), purge_step=start + 1)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._journal.close()
        with room(self._folder):
            self._writer.close()
        if self._staging is not None:
            self._staging.cleanup()

    def step(self, report: StepReport, supply: LoaderStats) -> None:
        """Records one optimizer step; supply: what the loader of the first rank did since the attempt began."""
        numbers = {"loss": report.loss, "learning_rate": report.learning_rate, "gradient_norm": report.gradient_norm}
        seconds = {"wait_s": round(report.wait_s, 6), "compute_s": round(report.compute_s, 6)}
        data = _data_numbers(report, supply)
        facts = {"terms": report.terms, "samples": report.samples, **seconds, "data": data}
        self._journal.append({"event": "step", "step": report.step, **numbers, **facts, "time": round(time.time(), 3)})
        self._scalars("data", data, report.step)
        self._scalars("train", {**numbers, **{f"terms/{name}": value for name, value in report.terms.items()}}, report.step)

    def epoch(self, epoch: int, step: int, numbers: dict[str, float]) -> None:
        """Records one validation; epoch counts epochs done."""
        self._journal.append({"event": "epoch", "step": step, "epoch": epoch, **numbers})
        self._scalars("val", numbers, step)

    def flush(self) -> None:
        """Makes everything recorded so far durable; another thread may call it."""
        self._journal.flush()
        with room(self._folder):
            self._writer.flush()
        if self._staging is not None:
            for path in sorted(self._folder.iterdir()):
                # As it is now: it grows while it is sent.
                self._store.write(f"{TENSORBOARD}/{path.name}", path.read_bytes())

    def _scalars(self, group: str, numbers: dict[str, float], step: int) -> None:
        with room(self._folder):
            for name, value in numbers.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)


def _data_numbers(report: StepReport, supply: LoaderStats) -> dict[str, float]:
    """The share of the step that was spent waiting for data, what was read so far; and, where there is such, found and left out."""
    numbers: dict[str, float] = {"wait_share": round(report.wait_s / max(report.wait_s + report.compute_s, 1e-9), 6)}
    numbers |= {"read_bytes": supply.read_bytes, "retries": supply.retries}
    if supply.hit_rate is not None:
        numbers |= {"hit_rate": round(supply.hit_rate, 6), "requests": supply.requests}
    return numbers | ({"left_out": supply.left_out} if supply.left_out else {})


@dataclass(frozen=True)
class Hparams:
    """One trial as TensorBoard's HParams page shows it: its settings and the numbers it reached."""

    name: str
    settings: Mapping[str, bool | int | float | str]
    numbers: Mapping[str, float]


def write_hparams(store: Store, folder: str, trials: Iterable[Hparams]) -> None:
    """One summary a trial, in a folder of its own name each; what lay in the folder before is gone."""
    for path in store.list(folder):
        store.delete(path)
    for trial in trials:
        with tempfile.TemporaryDirectory(prefix="draf-tensorboard-") as place:
            _write_trial(place, trial)
            for file in sorted(Path(place).iterdir()):
                store.upload(f"{folder}/{trial.name}/{file.name}", file)


def _write_trial(place: str, trial: Hparams) -> None:
    with SummaryWriter(place) as writer:
        # SummaryWriter.add_hparams would put them into a folder named by the time of day.
        for summary in hparams(dict(trial.settings), dict(trial.numbers)):  # type: ignore[no-untyped-call]
            writer.file_writer.add_summary(summary)
        for name, value in trial.numbers.items():
            writer.add_scalar(name, value)

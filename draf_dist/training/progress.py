"""What a run says on the terminal."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from draf_dist.training.loop import StepReport


class ProgressLine:
    """One moving line on a terminal (loss, epoch, samples/s, time left); elsewhere one plain line per epoch."""

    def __init__(self, console: Console, *, num_steps: int, steps_per_epoch: int, start: int) -> None:
        self._console = console
        self._steps_per_epoch = steps_per_epoch
        self._num_epochs = -(-num_steps // steps_per_epoch)
        self._rate: float | None = None
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("step {task.completed}/{task.total}  loss {task.fields[loss]}  {task.fields[rate]} samples/s"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(
            "train", total=num_steps, completed=start, epoch=self._epoch(start), loss="-", rate="-"
        )

    def __enter__(self) -> "ProgressLine":
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def step(self, report: StepReport) -> None:
        """Moves the line."""
        rate = report.samples / max(report.wait_s + report.compute_s, 1e-9)
        # A mean over about the last twenty steps: short enough to show a stall, long enough to read.
        self._rate = rate if self._rate is None else 0.95 * self._rate + 0.05 * rate
        epoch, loss, shown = self._epoch(report.step - 1), f"{report.loss:.4f}", f"{self._rate:,.0f}"
        self._progress.update(self._task, completed=report.step, epoch=epoch, loss=loss, rate=shown)

    def epoch(self, epoch: int, loss: float, numbers: dict[str, float], *, best: bool) -> None:
        """Says how an epoch went; epoch counts epochs done."""
        rate = "-" if self._rate is None else f"{self._rate:,.0f}"
        found = "  ".join(f"val {name} {value:.4f}" for name, value in numbers.items())
        mark = "  best so far" if best else ""
        line = f"epoch {epoch}/{self._num_epochs}  loss {loss:.4f}  {found}  {rate} samples/s{mark}"
        self._console.print(line, highlight=False, soft_wrap=True)

    def _epoch(self, step: int) -> str:
        return f"{min(step // self._steps_per_epoch + 1, self._num_epochs)}/{self._num_epochs}"

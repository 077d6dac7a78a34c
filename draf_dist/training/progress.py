"""What a run says on the terminal."""

import textwrap
from collections import Counter
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from draf_dist.training.goodput import Goodput
from draf_dist.training.loop import StepReport

WIDTH = 80
# Of the wall time; what is less is not worth a word.
WORTH = 0.0005


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
        # Those by modality are many: they are in metrics.jsonl.
        found = "  ".join(f"val {name} {value:.4f}" for name, value in numbers.items() if "/" not in name)
        mark = "  best so far" if best else ""
        line = f"epoch {epoch}/{self._num_epochs}  loss {loss:.4f}  {found}  {rate} samples/s{mark}"
        self._console.print(line, highlight=False, soft_wrap=True)

    def end(self, found: Goodput) -> None:
        """Says what the wall time of the run went into."""
        for line in described(found):
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _epoch(self, step: int) -> str:
        return f"{min(step // self._steps_per_epoch + 1, self._num_epochs)}/{self._num_epochs}"


def described(found: Goodput) -> list[str]:
    """A goodput in a few lines of at most WIDTH columns."""
    shares = [(kind.replace("_", " "), seconds / max(found.wall_s, 1e-9)) for kind, seconds in found.seconds.items()]
    ranked = sorted(((name, share) for name, share in shares if share >= WORTH), key=lambda part: -part[1])
    parts = [f"{name} {share:.1%}" for name, share in ranked]
    first = f"wall time {duration(found.wall_s)}, goodput {found.ettr:.1%}, {found.samples_per_s:,.1f} samples/s"
    lines = [first, *_wrapped(parts)]
    if found.failures or found.lost_steps or found.stops:
        lines += _wrapped(_troubles(found))
    return lines


def _troubles(found: Goodput) -> list[str]:
    failed = dict(Counter(failure.why for failure in found.failures))
    return [_counted("failure", failed), f"{_number(found.lost_steps, 'step')} lost", _counted("planned stop", found.stops)]


def duration(seconds: float) -> str:
    """For people: the two largest units of days, hours, minutes and seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    days, hours = divmod(minutes // 60, 24)
    return f"{days} d {hours} h" if days else f"{hours} h {minutes % 60} min"


def _counted(noun: str, of: dict[str, int]) -> str:
    reasons = ", ".join(f"{why}: {num}" for why, num in of.items())
    return _number(sum(of.values()), noun) + (f" ({reasons})" if of else "")


def _number(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"


def _wrapped(parts: list[str]) -> list[str]:
    # A part stays on one line: textwrap does not break at spaces of this kind.
    text = ", ".join(part.replace(" ", "\xa0") for part in parts)
    return [line.replace("\xa0", " ") for line in textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")]

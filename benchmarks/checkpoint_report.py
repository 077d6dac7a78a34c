"""From the seconds of checkpoints to the tables of their benchmark."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loader_report import median_interval
from rich.console import Console
from rich.table import Table

ARMS = ("ours", "ray", "ray-async")
WORKERS = 2
INTERVAL_S = 60.0


@dataclass(frozen=True)
class Measured:
    """Seconds of one checkpoint, as the first rank saw them.

    slowed_s: how much longer the steps took together that were made until it was durable, which was durable_s after it was begun;
    steps: how many. upload_s, commit_s: of that time, where they can be told apart. restore_s: until all ranks have the state back.
    """

    round: int
    arm: str
    megabytes: int
    stopped_s: float
    files_s: float
    slowed_s: float
    durable_s: float
    upload_s: float
    commit_s: float
    restore_s: float
    usual_step_s: float
    steps: int

    @property
    def stall_s(self) -> float:
        """What training lost."""
        return self.stopped_s + self.slowed_s


COLUMNS: dict[str, Callable[[Measured], float]] = {
    "stopped s": lambda each: each.stopped_s,
    "copy s": lambda each: each.files_s,
    "slowed s": lambda each: each.slowed_s,
    "stall s": lambda each: each.stall_s,
    "durable s": lambda each: each.durable_s,
    "upload s": lambda each: each.upload_s,
    "commit s": lambda each: each.commit_s,
    "restore s": lambda each: each.restore_s,
}
COMPARED = ("stall s", "durable s", "restore s")


def show(found: Sequence[Measured], console: Console) -> None:
    """The two tables."""
    table = Table("state", "arm", *COLUMNS, "stall of 60 s", title=f"{WORKERS} ranks; medians of n rounds (worst)")
    for megabytes, arm in dict.fromkeys((each.megabytes, each.arm) for each in sorted(found, key=_place)):
        rounds = [each for each in found if (each.megabytes, each.arm) == (megabytes, arm)]
        cells = [both([value(each) for each in rounds]) for value in COLUMNS.values()]
        shares = [100 * each.stall_s / INTERVAL_S for each in rounds]
        share = f"{statistics.median(shares):.2f} % ({max(shares):.2f})"
        table.add_row(f"{megabytes} MB", arm, *cells, share)
    console.print(table)
    table = Table("state", "ours over", *COMPARED, "n", title="ratios in pairs, median (least to greatest)")
    for (megabytes, arm), pairs in ratios(found).items():
        intervals = [median_interval([pair[name] for pair in pairs]) for name in COMPARED]
        cells = [f"{each.median:.2f} ({each.low:.2f} to {each.high:.2f})" for each in intervals]
        table.add_row(f"{megabytes} MB", arm, *cells, str(len(pairs)))
    console.print(table)


def ratios(found: Sequence[Measured]) -> dict[tuple[int, str], list[dict[str, float]]]:
    """By size and other arm: ours over it in every round, by column."""
    ours = {(each.megabytes, each.round): each for each in found if each.arm == "ours"}
    pairs: dict[tuple[int, str], list[dict[str, float]]] = {}
    for each in sorted(found, key=_place):
        mine = ours.get((each.megabytes, each.round))
        if each.arm != "ours" and mine is not None:
            ratio = {name: COLUMNS[name](mine) / COLUMNS[name](each) for name in COMPARED}
            pairs.setdefault((each.megabytes, each.arm), []).append(ratio)
    return pairs


def _place(each: Measured) -> tuple[int, int, int]:
    return each.megabytes, ARMS.index(each.arm), each.round


def both(seconds: list[float]) -> str:
    """The median and the worst."""
    return f"{statistics.median(seconds):.3f} ({max(seconds):.3f})"

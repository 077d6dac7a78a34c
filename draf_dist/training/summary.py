"""How a run stands, from its folder alone: what `draf run show` prints."""

from dataclasses import dataclass
from typing import Literal

from draf_dist.data.release import open_release
from draf_dist.errors import DrafError
from draf_dist.training.journal import Line
from draf_dist.training.ledger import effective_commits, receipts_by_epoch, seconds_by_kind
from draf_dist.training.run_folder import open_run


@dataclass(frozen=True)
class RunSummary:
    """One run.

    state: open means that no attempt has said that it ended: it still runs, or was killed. score: the number of validation that is
    to fall; best_loss, best_step: its lowest, and when. samples: studies consumed, by source epoch. epochs_complete: epochs whose
    receipt equals the release's; None where the release can't be read. seconds: wall time by kind, over all attempts. epochs: the
    validation lines of metrics.jsonl.
    """

    url: str
    name: str
    release: str
    state: Literal["open", "interrupted", "finished"]
    attempts: int
    steps: int
    score: str
    best_loss: float | None
    best_step: int | None
    samples: dict[int, int]
    epochs_complete: int | None
    seconds: dict[str, float]
    checkpoints: tuple[int, ...]
    epochs: tuple[Line, ...]


def summarise(run_url: str) -> RunSummary:
    """Reads a run folder; needs the release for `epochs_complete` only.

    Raises:
        SpecError: no such run.
    """
    folder = open_run(run_url)
    lines = folder.ledger()
    commits = effective_commits(lines)
    epochs = tuple(line for line in folder.metrics() if line["event"] == "epoch")
    best = min(epochs, key=lambda line: (line[folder.job.score], line["step"]), default=None)
    last = lines[-1] if lines else None
    receipts = receipts_by_epoch(lines)
    return RunSummary(
        url=folder.url,
        name=folder.job.name,
        release=folder.job.release,
        state=last["outcome"] if last is not None and last["event"] == "end" else "open",
        attempts=sum(line["event"] == "attempt" for line in lines),
        steps=commits[-1]["stop"] if commits else 0,
        score=folder.job.score,
        best_loss=None if best is None else best[folder.job.score],
        best_step=None if best is None else best["step"],
        samples={epoch: receipt.count for epoch, receipt in sorted(receipts.items())},
        epochs_complete=complete_epochs(run_url),
        seconds=seconds_by_kind(lines),
        checkpoints=tuple(folder.checkpoints.steps()),
        epochs=epochs,
    )


def complete_epochs(run_url: str) -> int | None:
    """How many source epochs were consumed whole, each study once: their receipt equals the release's.

    None where the release can't be read.
    """
    folder = open_run(run_url)
    try:
        expected = open_release(folder.job.release).manifest.receipts["train"]
    except DrafError:
        return None
    return sum(receipt == expected for receipt in receipts_by_epoch(folder.ledger()).values())

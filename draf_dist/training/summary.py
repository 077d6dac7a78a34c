"""How a run stands, from its folder alone: what `draf run show` prints."""

from dataclasses import dataclass
from typing import Literal

from draf_dist.data.loader_stats import LoaderStats
from draf_dist.data.release import open_release
from draf_dist.errors import DrafError
from draf_dist.schema.release import Receipt
from draf_dist.training.goodput import Goodput, goodput
from draf_dist.training.job import FinetuneJob
from draf_dist.training.jobs import AnyJob
from draf_dist.training.journal import Line
from draf_dist.training.label_counts import count_labels
from draf_dist.training.ledger import (
    NOTHING,
    SourceEpoch,
    effective_commits,
    left_out_by_source,
    receipts_by_source,
    source_epoch_name,
    supply_of,
)
from draf_dist.training.plan import build_plan
from draf_dist.training.risk_correlation import risk_warnings
from draf_dist.training.run_folder import RunFolder, open_run


@dataclass(frozen=True)
class RunSummary:
    """One run.

    state: open means that no attempt has said that it ended: it still runs, or was killed. score: the number of validation that is
    to fall; best_loss, best_step: its lowest, and when. samples: studies consumed, by source epoch. epochs_complete: source epochs
    consumed whole, each study once: their receipt equals the source's. as_planned: whether all receipts, those of begun epochs too,
    are those that the order gives for these steps. Both None where the release can't be read. labelled: training studies whose
    label is used, where the job uses a fraction of them; None: all, or the release can't be read. left_out: samples that the order
    gave and that were left out as unusable: with them no epoch is whole, and of as_planned only the counts can be compared.
    goodput: what the wall time went into; data, validation: what the loaders of all ranks did in all attempts for either. skipped,
    slow: the lines of the ledger about updates that were skipped and ranks that were slow. epochs: the validation lines of
    metrics.jsonl. warnings: what the best validation says that a reader should know.
    """

    url: str
    name: str
    release: str
    state: Literal["open", "interrupted", "failed", "rolled_back", "finished"]
    attempts: int
    steps: int
    score: str
    best_loss: float | None
    best_step: int | None
    samples: dict[str, int]
    epochs_complete: int | None
    as_planned: bool | None
    labelled: int | None
    left_out: int
    goodput: Goodput
    data: LoaderStats
    validation: LoaderStats
    checkpoints: tuple[int, ...]
    skipped: tuple[Line, ...]
    slow: tuple[Line, ...]
    epochs: tuple[Line, ...]
    warnings: tuple[str, ...]


def summarise(run_url: str) -> RunSummary:
    """Reads a run folder; needs the release for `epochs_complete` and `as_planned` only.

    Raises:
        SpecError: no such run.
    """
    folder = open_run(run_url)
    lines = folder.ledger()
    commits = effective_commits(lines)
    epochs = tuple(line for line in folder.metrics() if line["event"] == "epoch")
    best = min(epochs, key=lambda line: (line[folder.job.score], line["step"]), default=None)
    last = lines[-1] if lines else None
    receipts, left_out, supplied = receipts_by_source(lines), left_out_by_source(lines), supply_of(lines)
    steps = commits[-1]["stop"] if commits else 0
    complete, as_planned = _compare(folder, receipts, left_out, steps)
    return RunSummary(
        url=folder.url,
        name=folder.job.name,
        release=folder.job.release,
        state=last["outcome"] if last is not None and last["event"] == "end" else "open",
        attempts=sum(line["event"] == "attempt" for line in lines),
        steps=steps,
        score=folder.job.score,
        best_loss=None if best is None else best[folder.job.score],
        best_step=None if best is None else best["step"],
        samples={source_epoch_name(*of): receipt.count for of, receipt in sorted(receipts.items())},
        epochs_complete=complete,
        as_planned=as_planned,
        labelled=_labelled(folder.job),
        left_out=sum(left_out.values()),
        goodput=goodput(lines),
        data=supplied.training,
        validation=supplied.validation,
        checkpoints=tuple(folder.checkpoints.steps()),
        skipped=tuple(line for line in lines if line["event"] == "skipped"),
        slow=tuple(line for line in lines if line["event"] == "slow"),
        epochs=epochs,
        warnings=risk_warnings(epochs, None if best is None else best["step"]),
    )


def _compare(
    folder: RunFolder, receipts: dict[SourceEpoch, Receipt], left_out: dict[SourceEpoch, int], steps: int
) -> tuple[int | None, bool | None]:
    """How many source epochs were consumed whole, and whether all was consumed as planned."""
    try:
        plan = build_plan(folder.job, open_release(folder.job.release))
        whole = {source.name: source.receipt() for source in plan.sources}
        planned = plan.receipts(steps)
    except DrafError:
        return None, None
    complete = sum(receipt == whole[source] for (source, _), receipt in receipts.items())
    return complete, all(
        _accounted_for(planned.get(of, NOTHING), receipts.get(of, NOTHING), left_out.get(of, 0)) for of in {*planned, *receipts}
    )


def _labelled(job: AnyJob) -> int | None:
    if not isinstance(job, FinetuneJob) or job.label_fraction == 1:
        return None
    try:
        return count_labels(job, open_release(job.release)).num_studies
    except DrafError:
        return None


def _accounted_for(planned: Receipt, found: Receipt, left_out: int) -> bool:
    # How many were left out is in the books, which ones is not: of a shard that is gone nobody knows.
    return found == planned if left_out == 0 else found.count + left_out == planned.count

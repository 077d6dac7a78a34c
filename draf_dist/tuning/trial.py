"""One trial: its runs, begun or continued, epoch by epoch. Knows nothing of Ray; its run folders are the only record of it."""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass

from draf_dist.training.job import FinetuneJob
from draf_dist.training.journal import Line
from draf_dist.training.ledger import effective_commits, seconds_by_kind
from draf_dist.training.pin import pin
from draf_dist.training.pretrain_job import PretrainJob
from draf_dist.training.run import EpochReport, RunResult, begin
from draf_dist.training.run_folder import RunFolder

# Carries a run on from where it is, see training.run.attempt_by_epochs.
CarryOut = Callable[[str], Generator[EpochReport, None, RunResult]]
# Holds a run folder by its name, so that no other trial of the campaign trains there meanwhile.
Hold = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Progress:
    """A trial after an epoch. numbers: of validation at best_epoch, whose weights the run would keep if it ended now.

    training_s: booked by its run over all attempts, and by pre-training in this one; spent_s: by both in this attempt. Idle time
    is in neither.
    """

    epochs: int
    best_epoch: int
    numbers: dict[str, float]
    run: str
    pretraining: str | None
    training_s: float
    spent_s: float


def trial_epochs(
    finetune: FinetuneJob, pretrain: PretrainJob | None, url: str, carry_out: CarryOut, hold: Hold
) -> Generator[Progress, None, Progress]:
    """Trains, and hands over after every epoch of fine-tuning; epochs that lie in the run folder already are handed over again.

    Its return value is how the trial stands at its end.

    Pre-training comes first, whole: a trial whose pre-training is that of another one uses its run. url: where the runs lie.

    Raises:
        DrafError: whatever ends a run.
    """
    spent, name = 0.0, None
    if pretrain is not None:
        name = pretrain.run_name
        with hold(name):
            spent = _whole(pretrain, f"{url}/{name}", carry_out)
        found = {pretrain.objective.modality: f"{url}/{name}"}
        finetune = finetune.model_copy(update={"pretrained": {**finetune.pretrained, **found}})
    job = pin(finetune)
    with hold(job.run_name):
        folder = begin(job, f"{url}/{job.run_name}")
        before = training_seconds(folder)
        seen: list[EpochReport] = []

        def standing() -> Progress:
            best = min(seen, key=lambda each: (each.numbers[job.score], each.step))
            total = training_seconds(folder) + spent
            return Progress(seen[-1].epoch, best.epoch, best.numbers, job.run_name, name, total, total - before)

        with closing(_reports(folder, carry_out)) as reports:
            for report in reports:
                seen.append(report)
                yield standing()
        return standing()


def training_seconds(folder: RunFolder) -> float:
    """Wall time that a run's ledger accounts for, over all attempts, what is nothing in particular left out."""
    return sum(seconds for kind, seconds in seconds_by_kind(folder.ledger()).items() if kind != "other")


def durable_epochs(folder: RunFolder) -> list[EpochReport]:
    """The validations that a checkpoint stands behind."""
    lines = folder.ledger()
    stop = max((commit["stop"] for commit in effective_commits(lines)), default=0)
    return [_report(line) for line in folder.metrics() if line["event"] == "epoch" and line["step"] <= stop]


def _whole(job: PretrainJob, url: str, carry_out: CarryOut) -> float:
    folder = begin(job, url)
    before = training_seconds(folder)
    for _ in carry_out(url):
        pass
    return training_seconds(folder) - before


def _reports(folder: RunFolder, carry_out: CarryOut) -> Generator[EpochReport, None, None]:
    done = durable_epochs(folder)
    yield from done
    last = done[-1].epoch if done else 0
    with closing(carry_out(folder.url)) as live:
        yield from (report for report in live if report.epoch > last)


def _report(line: Line) -> EpochReport:
    numbers = {key: value for key, value in line.items() if key not in ("event", "step", "epoch")}
    return EpochReport(line["epoch"], line["step"], numbers)

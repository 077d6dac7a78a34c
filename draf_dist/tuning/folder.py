"""A campaign's folder: what it seeks, its study, its trials and rungs; begun once, continued by the same command."""

import re
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL

from draf_dist.config.spec import fingerprint, parse_yaml, validate_spec, yaml_text
from draf_dist.errors import DataError, SpecError, explain, together
from draf_dist.storage import Store, open_store
from draf_dist.training.journal import Journal, read_lines
from draf_dist.training.pin import pin
from draf_dist.training.run import RUNS
from draf_dist.training.run_folder import Fence
from draf_dist.tuning.campaign_job import Base, CampaignJob
from draf_dist.tuning.records import TrialRecord
from draf_dist.tuning.rungs import RungEntry, Rungs
from draf_dist.tuning.sampler import NumberedSampler

CAMPAIGN = "campaign.yaml"
TRIALS = "trials.jsonl"
RUNGS = "rungs.jsonl"
STUDY = "study.db"
TRIAL_RUNS = "trials"
LOCK_TIMEOUT_S = 60.0
ELSEWHERE = "Use another --out."
_VERSION = re.compile(r"@[0-9a-f]+$")


@dataclass(frozen=True)
class CampaignFolder:
    """A campaign that exists; its jobs name pinned releases."""

    store: Store
    campaign: CampaignJob

    @property
    def url(self) -> str:
        """Where it is."""
        return self.store.url

    @property
    def trials_url(self) -> str:
        """Where the run folders of its trials lie."""
        return self.store.where(TRIAL_RUNS)

    def records(self) -> list[TrialRecord]:
        """The trials that have ended, in the order in which they did."""
        return [TrialRecord.model_validate(line) for line in read_lines(self.store, TRIALS)]

    def entries(self) -> list[RungEntry]:
        """The rung table, in the order in which it was written."""
        return [RungEntry.model_validate(line) for line in read_lines(self.store, RUNGS)]


@dataclass(frozen=True)
class Books:
    """What one driver writes with. Every write asks first whether a later driver has taken the campaign over."""

    folder: CampaignFolder
    fence: Fence
    study: Study
    rungs: Rungs
    _trials: Journal
    _rungs: Journal
    _study_file: Path

    def record(self, record: TrialRecord) -> None:
        """Writes down how a trial ended. The study is told afterwards: what it misses, `settle` tells it later."""
        self.fence.check()
        self._trials.append(record.model_dump(mode="json"))
        self._trials.flush()

    def records(self) -> list[TrialRecord]:
        """The trials that have ended."""
        return [TrialRecord.model_validate(line) for line in self._trials.lines]

    def enter(self, entry: RungEntry) -> None:
        """Writes down a trial at a rung."""
        self.fence.check()
        self._rungs.append(entry.model_dump(mode="json"))
        self._rungs.flush()
        self.rungs.enter(entry)

    def save_study(self) -> None:
        """Sends the study where the folder is: a database can't be written in a bucket, so a copy goes there after every change."""
        self.fence.check()
        if self.folder.store.local_path(STUDY) is not None:
            return
        with tempfile.TemporaryDirectory(prefix="draf-study-") as place:
            copy = Path(place) / STUDY
            with closing(sqlite3.connect(self._study_file)) as source, closing(sqlite3.connect(copy)) as target:
                source.backup(target)
            self.folder.store.upload(STUDY, copy)


def enter_campaign(job: CampaignJob, out: str | None) -> CampaignFolder:
    """The folder of a campaign, made or found; its jobs are pinned, to what is pinned there if it exists.

    Raises:
        SpecError: see find_campaign.
    """
    store, there, pinned = find_campaign(job, out)
    if there != pinned:
        store.write(CAMPAIGN, yaml_text(pinned).encode())
    return CampaignFolder(store, pinned)


def find_campaign(job: CampaignJob, out: str | None) -> tuple[Store, CampaignJob | None, CampaignJob]:
    """Where a campaign would lie, what lies there, and the campaign with its jobs pinned; writes nothing.

    Raises:
        SpecError: the folder holds another campaign (says in what it differs), or something that is no campaign.
    """
    there = None if out is None else _stored(open_store(out))
    pinned = _pinned(job, there)
    store = open_store(out or f"{RUNS}/{pinned.folder_name}")
    there = there or _stored(store)
    if there is None and store.list():
        remedy = ELSEWHERE
        raise SpecError(explain(store.url, expected="a campaign, or an empty folder", found=f"no {CAMPAIGN}", remedy=remedy))
    if there is not None:
        _check_same(store, there, pinned)
    return store, there, pinned


@contextmanager
def open_books(folder: CampaignFolder, max_epochs: int) -> Iterator[Books]:
    """Takes the campaign over, with all that is written so far.

    Raises:
        DataError: the study is gone or is another one's.
    """
    with ExitStack() as stack:
        fence = Fence.take(folder.store)
        trials, rungs = Journal(folder.store, TRIALS), Journal(folder.store, RUNGS)
        stack.callback(trials.close)
        stack.callback(rungs.close)
        study_file = stack.enter_context(_local_study(folder.store))
        table = Rungs(folder.campaign.stopping, max_epochs, [RungEntry.model_validate(line) for line in rungs.lines])
        study = open_study(study_file, folder.campaign)
        books = Books(folder, fence, study, table, trials, rungs, study_file)
        _check_study(folder, study, books.records())
        settle(study, books.records())
        books.save_study()
        yield books


def open_study(file: Path, campaign: CampaignJob) -> Study:
    """The study in a file, made if there is none."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = URL.create("sqlite", database=str(file)).render_as_string()
    storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": LOCK_TIMEOUT_S}})
    sampler = NumberedSampler(campaign.seed)
    return optuna.create_study(
        storage=storage, sampler=sampler, study_name=campaign.name, direction="minimize", load_if_exists=True
    )


@contextmanager
def study_of(folder: CampaignFolder) -> Iterator[Study]:
    """A copy of the study in memory, to look at."""
    with _local_study(folder.store) as file:
        study = open_study(file, folder.campaign)
        copy = optuna.create_study(direction="minimize")
        copy.add_trials(study.get_trials(deepcopy=False))
        yield copy


def settle(study: Study, records: list[TrialRecord]) -> None:
    """Tells the study of trials that were written down just before a driver was killed."""
    ended = {record.trial: record for record in records}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.number in ended:
            objective = ended[trial.number].objective
            state = TrialState.FAIL if objective is None else TrialState.COMPLETE
            study.tell(trial.number, objective, state=state)


def orphans(study: Study, records: list[TrialRecord]) -> list[FrozenTrial]:
    """Trials that were begun and have not ended: they are continued, under the same number, with the same parameters."""
    ended = {record.trial for record in records}
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return [trial for trial in running if trial.number not in ended]


def _check_study(folder: CampaignFolder, study: Study, records: list[TrialRecord]) -> None:
    trials = study.get_trials(deepcopy=False)
    if any(record.trial >= len(trials) or trials[record.trial].params != record.parameters for record in records):
        remedy = "Bring the file back, or begin in another folder."
        where = folder.store.where(STUDY)
        raise DataError(explain(where, expected=f"the study of the trials in {TRIALS}", found="another one", remedy=remedy))


@contextmanager
def _local_study(store: Store) -> Iterator[Path]:
    local = store.local_path(STUDY)
    if local is not None:
        yield local
        return
    with tempfile.TemporaryDirectory(prefix="draf-study-") as place:
        file = Path(place) / STUDY
        if store.exists(STUDY):
            file.write_bytes(store.read(STUDY))
        yield file


def _stored(store: Store) -> CampaignJob | None:
    if not store.exists(CAMPAIGN):
        return None
    where = store.where(CAMPAIGN)
    return validate_spec(parse_yaml(store.read(CAMPAIGN).decode(), where=where), CampaignJob, where=where)


def _pinned(job: CampaignJob, there: CampaignJob | None) -> CampaignJob:
    """The campaign with the jobs' releases pinned: where they name no version, to that of the campaign in the folder."""
    found: dict[str, Any] = {}
    for name, stage in job.stages.items():
        before = None if there is None else there.stages.get(name)
        if before is not None and open_store(stage.release).url == open_store(_VERSION.sub("", before.release)).url:
            stage = stage.model_copy(update={"release": before.release})
        found[name] = pin(stage)
    return job.model_copy(update={"base": Base(**found), "release": None})


def _check_same(store: Store, there: CampaignJob, here: CampaignJob) -> None:
    if fingerprint(there.fixed) != fingerprint(here.fixed):
        problems = [
            explain(f"{store.where(CAMPAIGN)}: {path}", expected=f"{before!r} as before", found=repr(now), remedy=ELSEWHERE)
            for path, before, now in _differences(there.fixed, here.fixed, "")
        ]
        raise SpecError(together(problems))
    if here.budget.trials < there.budget.trials:
        found, remedy = str(here.budget.trials), "A campaign can be extended, not shortened; use another --out."
        where = f"{store.where(CAMPAIGN)}: budget.trials"
        raise SpecError(explain(where, expected=f"at least {there.budget.trials} as before", found=found, remedy=remedy))


def _differences(before: Any, now: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))
    elif before != now:
        yield path, before, now

"""What steers a campaign inside Ray Tune: OptunaSearch over a study on disk, and successive halving over a table on disk."""

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from optuna import Trial
from optuna.trial import FrozenTrial
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from draf_dist.errors import DrafError
from draf_dist.launch.profile import Profile
from draf_dist.launch.ray_desk import Desk
from draf_dist.training.run import StopRequest
from draf_dist.tuning.actor import ENDED, EPOCHS, HALTING, NUMBER, OBJECTIVE, POINT, PROGRESS, REASON
from draf_dist.tuning.folder import Books, orphans
from draf_dist.tuning.places import num_workers, profile_text
from draf_dist.tuning.point import Point, epochs_at
from draf_dist.tuning.records import State, TrialRecord
from draf_dist.tuning.space import distribution, suggest

HALTS: dict[str, type[DrafError]] = {error.__name__: error for error in HALTING}
LOST = "its process ended, or met an error that nobody foresaw"


@dataclass(frozen=True)
class Begun:
    """A trial that was handed out. since: by time.perf_counter(); reported: epochs that the study knows."""

    number: int
    point: Point
    since: float
    reported: set[int]


class CampaignSearch(OptunaSearch):
    """OptunaSearch that first continues what a killed driver left, and writes every trial down before it tells the study.

    profile: where one trial trains. on_record: hears of every trial that has ended. on_end: of its number, whatever became of it.
    """

    def __init__(
        self,
        books: Books,
        profile: Profile,
        stop: StopRequest,
        on_record: Callable[[TrialRecord], None],
        on_end: Callable[[int], None],
    ) -> None:
        self.books, self._campaign, self._stop = books, books.folder.campaign, stop
        self._profile, self._on_record, self._on_end = profile, on_record, on_end
        self._orphans = orphans(books.study, books.records())
        self._begun: dict[str, Begun] = {}
        self.halted: DrafError | None = None
        space = {path: distribution(parameter) for path, parameter in self._campaign.space.items()}
        study = books.study
        # OptunaSearch opens the same study once more, by its storage and its name.
        super().__init__(
            space, metric=OBJECTIVE, mode="min", sampler=study.sampler, study_name=study.study_name, storage=study._storage
        )

    def suggest(self, trial_id: str) -> Any:
        """The next trial; none once the campaign is to end."""
        if self._is_over():
            return Searcher.FINISHED
        self.books.fence.check()
        orphan = self._orphans.pop(0) if self._orphans else None
        if orphan is not None:
            self._ot_trials[trial_id] = self._continued(orphan)
        point: Any = super().suggest(trial_id)
        self.books.save_study()
        reported = set() if orphan is None else set(orphan.intermediate_values)
        number = self._ot_trials[trial_id].number
        self._begun[trial_id] = Begun(number, point, time.perf_counter(), reported)
        return {NUMBER: number, POINT: point}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """An epoch of a trial; those that the study knows are not reported to it again."""
        begun = self._begun[trial_id]
        if EPOCHS in result and result[EPOCHS] not in begun.reported:
            self.books.fence.check()
            begun.reported.add(result[EPOCHS])
            with warnings.catch_warnings():
                # Of an epoch that another driver has reported meanwhile.
                warnings.simplefilter("ignore", UserWarning)
                super().on_trial_result(trial_id, {**result, "training_iteration": result[EPOCHS]})

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The end of a trial: written down, then told to the study."""
        found, begun = result or {}, self._begun[trial_id]
        self._on_end(begun.number)
        ended = found.get(ENDED)
        if ended in HALTS:
            self.halted = self.halted or HALTS[ended](found[REASON])
            return
        # Of an epoch after which a trial is stopped Tune tells only here.
        self.on_trial_result(trial_id, found)
        record = _record(begun, found, profile_text(self._profile), {each.run for each in self.books.records()}, lost=error)
        self.books.record(record)
        failed = record.state == "failed"
        with warnings.catch_warnings():
            # Of what it can't tell, which `settle` tells.
            warnings.simplefilter("ignore", UserWarning)
            super().on_trial_complete(trial_id, None if failed else found, error=failed)
        self.books.save_study()
        self._on_record(record)

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: the study is on disk."""

    def _is_over(self) -> bool:
        if self.halted is not None or self._stop.requested or too_many_failures(self.books):
            return True
        return not self._orphans and budget_spent(self.books, num_workers(self._profile))

    def _continued(self, orphan: FrozenTrial) -> Trial:
        trial = Trial(self.books.study, orphan._trial_id)
        for path, parameter in self._campaign.space.items():
            suggest(trial, path, parameter)
        return trial


class DurableHalving(FIFOScheduler):
    """Stops trials by the rung table, which is written down at every entry.

    Trials with equal settings share one run, so they stand at a rung once, under the number of the first of them.
    """

    def __init__(self, books: Books) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.books = books
        self._first: dict[int, int] = {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """The decision after an epoch; the same as before where the trial stands at the rung already."""
        number, rungs = self._standing_for(trial.config[NUMBER], trial.config[POINT]), self.books.rungs
        if EPOCHS not in result:
            return TrialScheduler.CONTINUE
        last = epochs_at(self.books.folder.campaign, trial.config[POINT])
        entry = rungs.decide(number, result[EPOCHS], result[OBJECTIVE], last)
        if entry is not None:
            self.books.enter(entry)
        return TrialScheduler.STOP if rungs.stopped(number, result[EPOCHS]) else TrialScheduler.CONTINUE

    def _standing_for(self, number: int, point: Point) -> int:
        if number not in self._first:
            alike = (trial.number for trial in self.books.study.get_trials(deepcopy=False) if trial.params == point)
            self._first[number] = min(alike, default=number)
        return self._first[number]


class RelayStop(tune.Stopper):
    """Asked by Ray Tune again and again; tells trials when this process is to stop. They stop with a checkpoint, by themselves."""

    def __init__(self, stop: StopRequest, desk: Desk) -> None:
        self._stop, self._desk, self._asked = stop, desk, False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial is stopped from here."""
        return False

    def stop_all(self) -> bool:
        """Passes the request on, once."""
        if self._stop.requested and not self._asked:
            self._asked = True
            self._desk.ask_to_stop(self._stop.requested)
        return False


def budget_spent(books: Books, workers: int) -> bool:
    """Whether the workers have trained for as long as the budget says."""
    hours = books.folder.campaign.budget.worker_hours
    return hours is not None and workers * sum(record.training_s for record in books.records()) >= hours * 3600


def too_many_failures(books: Books) -> bool:
    """Whether more trials failed than may."""
    return sum(record.state == "failed" for record in books.records()) > books.folder.campaign.max_failures


def _record(begun: Begun, result: dict[str, Any], profile: str, recorded_runs: set[str | None], *, lost: bool) -> TrialRecord:
    """recorded_runs: those that trials before it have booked."""
    ended: Any = "failed" if lost else result.get(ENDED, "stopped")
    state: State = ended
    wall = time.perf_counter() - begun.since
    common = {
        "trial": begun.number,
        "parameters": begun.point,
        "state": state,
        "profile": profile,
        "wall_s": round(wall, 3),
        "time": round(time.time(), 3),
    }
    if PROGRESS not in result:
        return TrialRecord.model_validate({**common, REASON: LOST if lost else result.get(REASON, "")})
    progress = json.loads(result[PROGRESS])
    numbers = {name: progress["numbers"].get(name) for name in ("nll", "nll_scaled", "temperature", "auroc")}
    known = {
        "run": progress["run"],
        "pretraining": progress["pretraining"],
        "epochs": progress["epochs"],
        "training_s": round(progress["spent_s" if progress["run"] in recorded_runs else "training_s"], 3),
        "overhead_s": round(wall - progress["spent_s"], 3),
    }
    if state == "failed":
        return TrialRecord.model_validate({**common, **known, REASON: LOST if lost else result[REASON]})
    best = {"best_epoch": progress["best_epoch"], "objective": result[OBJECTIVE], **numbers}
    return TrialRecord.model_validate({**common, **known, **best})

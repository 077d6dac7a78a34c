"""The actor in which trials train, one after another: as Ray Tune wants it, a Trainable whose step is an epoch."""

import json
import os
from collections.abc import Generator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ray import tune

from draf_dist.errors import DrafError, GateError, InterruptedRunError, StorageFullError, UnreachableError
from draf_dist.launch.profile import Profile
from draf_dist.launch.ray_desk import Desk, DeskStop
from draf_dist.training.run import StopRequest
from draf_dist.tuning.campaign_job import CampaignJob
from draf_dist.tuning.claims import Claims
from draf_dist.tuning.places import carry_out
from draf_dist.tuning.point import jobs_at
from draf_dist.tuning.trial import Progress, trial_epochs

NUMBER, POINT = "number", "point"
# Keys of a result; Tune takes mappings apart, so progress is text.
EPOCHS, OBJECTIVE, PROGRESS, ENDED, REASON = "epochs_done", "objective", "progress", "ended", "reason"
# What is no fault of a trial ends the campaign instead; the same command continues.
HALTING = (InterruptedRunError, UnreachableError, StorageFullError, GateError)


@dataclass(frozen=True)
class ActorTask:
    """What is the same for all trials. folder: the command's own, where all nodes are one machine: relative paths mean the same."""

    campaign: CampaignJob
    trials_url: str
    profile: Profile
    desk: Desk
    claims: Claims
    settings: dict[str, str]
    folder: str | None


class TrialActor(tune.Trainable):
    """Trains the trial of its config. Nothing is stored by Ray: a run folder holds all that there is to restore."""

    # Ray itself adds what tune.with_parameters was given.
    def setup(self, config: dict[str, Any], task: ActorTask) -> None:  # type: ignore[override]
        """Begins the first trial of this process."""
        self._task = task
        os.environ.update(task.settings | task.desk.arrive(config[NUMBER]))
        self._stop = DeskStop(task.desk)
        self._carry_out = carry_out(task.profile, self._stop)
        self._last: dict[str, Any] = {}
        self._epochs = self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begins another one."""
        self._epochs.close()
        self._epochs = self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """An epoch, or how the trial ended."""
        try:
            self._last = self._result(next(self._epochs))
        except StopIteration as ended:
            return {**self._result(ended.value), ENDED: "finished", "done": True}
        except HALTING as error:
            return {ENDED: type(error).__name__, REASON: str(error), "done": True}
        except DrafError as error:
            return {**self._last, ENDED: "failed", REASON: str(error), "done": True}
        return self._last

    def cleanup(self) -> None:
        """Leaves the trial as it is: its run can be continued."""
        self._epochs.close()

    def _begin(self, config: dict[str, Any]) -> Generator[Progress, None, Progress]:
        if self._task.folder is not None:
            # Ray has moved to a folder of its own.
            os.chdir(self._task.folder)
        self._last = {}
        return _epochs(self._task, config, self._stop, self._carry_out)

    def _result(self, progress: Progress) -> dict[str, Any]:
        objective = progress.numbers[self._task.campaign.objective]
        return {EPOCHS: progress.epochs, OBJECTIVE: objective, PROGRESS: json.dumps(asdict(progress))}


def _epochs(task: ActorTask, config: dict[str, Any], stop: StopRequest, carry: Any) -> Generator[Progress, None, Progress]:
    """Inside the generator, so that jobs which are refused end the trial, not the actor."""
    jobs: Any = jobs_at(task.campaign, config[POINT])
    hold: Any = partial(_held, task.claims, config[NUMBER], stop)
    return (yield from trial_epochs(jobs["finetune"], jobs.get("pretrain"), task.trials_url, carry, hold))


def _held(claims: Claims, trial: int, stop: StopRequest, run: str) -> AbstractContextManager[None]:
    return claims.held(run, trial, stop)

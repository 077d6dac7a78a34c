"""What a failure on a worker means: start the workers again, or end with an error of ours."""

from collections.abc import Mapping

from ray.exceptions import RayError
from ray.train import ControllerError, TrainingFailedError, UserCallback, WorkerGroupError

from draf_dist.errors import DrafError, UnreachableError, explain
from draf_dist.launch.ray_desk import Desk
from draf_dist.training.watch.watchdog import HungError


class FailureWatch(UserCallback):
    """Sits in Ray's controller: an error that a user must mend ends the run at once, anything else starts the workers again.

    Ray Train tries an exception of the train function again like a lost process; what a callback raises it does not.
    """

    def __init__(self, desk: Desk, max_failures: int) -> None:
        self._desk, self._max_failures = desk, max_failures
        self._failures = 0

    def after_exception(self, run_context: object, worker_exceptions: Mapping[int, Exception]) -> None:
        """Hears of exceptions by rank.

        Raises:
            DrafError: the first rank's among those that a user must mend.
        """
        for _, error in sorted(worker_exceptions.items()):
            if isinstance(error, DrafError):
                raise error
        self._failures += 1
        if self._failures <= self._max_failures:
            again = f"Starting the workers again, {self._failures} of at most {self._max_failures} times."
            self._desk.say(f"warning: {describe(worker_exceptions)}. {again}")


def describe(failures: Mapping[int, Exception]) -> str:
    """What became of each rank, in one line. Not an exception's own text: a library may quote data there."""
    return ", ".join(f"rank {rank}: {_describe(error)}" for rank, error in sorted(failures.items()))


def as_draf_error(error: Exception, url: str, max_failures: int) -> DrafError:
    """The error that ended a run at `url`, in our terms."""
    cause = error.controller_failure if isinstance(error, ControllerError) else error
    if isinstance(cause, DrafError):
        return cause
    if isinstance(cause, WorkerGroupError):
        found = f"{max_failures + 1} failures, the last of them: {describe(cause.worker_failures)}"
        remedy = "The same command continues from the newest checkpoint; --debug shows the last failure whole."
        return DrafError(explain(url, expected="workers that stay alive", found=found, remedy=remedy))
    if isinstance(cause, RayError) and not isinstance(error, TrainingFailedError):
        remedy = "The same command continues from the newest checkpoint once the cluster is back."
        return UnreachableError(explain(url, expected="a Ray cluster that stays", found=type(cause).__name__, remedy=remedy))
    remedy = "The same command continues; --debug shows the error whole."
    return DrafError(explain(url, expected="Ray Train to go on", found=type(cause).__name__, remedy=remedy))


def _describe(error: Exception) -> str:
    if isinstance(error, HungError):
        return str(error)
    # Ray has no public name for it: the worker no longer answers.
    return "its process ended" if type(error).__name__ == "WorkerHealthCheckFailedError" else type(error).__name__

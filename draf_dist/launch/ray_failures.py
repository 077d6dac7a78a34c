"""What a failure on a worker means: an error of ours that ends the run, or one after which the workers start again."""

from collections.abc import Mapping

from ray.exceptions import ActorDiedError, RayActorError, RayError
from ray.train import ControllerError, TrainingFailedError, UserCallback

from draf_dist.errors import DrafError, UnreachableError, explain
from draf_dist.launch.ray_desk import Desk
from draf_dist.training.watch.watchdog import HungError


class StartEnded(Exception):  # noqa: N818
    """These workers are not started again as they were: the driver takes it from here."""


class FailureWatch(UserCallback):
    """Sits in Ray's controller: an error that a user must mend ends the run at once, of anything else the driver decides.

    Ray Train tries an exception of the train function again like a lost process; what a callback raises it does not.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def after_exception(self, run_context: object, worker_exceptions: Mapping[int, Exception]) -> None:
        """Hears of exceptions by rank.

        Raises:
            DrafError: the first rank's among those that a user must mend.
            StartEnded: the driver wants no more of these workers.
        """
        for _, error in sorted(worker_exceptions.items()):
            if isinstance(error, DrafError):
                raise error
        if not self._desk.wait_for_verdict(describe(worker_exceptions)):
            raise StartEnded


def describe(failures: Mapping[int, Exception]) -> str:
    """What became of each rank, in one line. Not an exception's own text: a library may quote data there."""
    return ", ".join(f"rank {rank}: {_describe(error)}" for rank, error in sorted(failures.items()))


def gave_up(url: str, failures: int, last: str) -> DrafError:
    """The error that ends a run which fails again and again. failures: in a row, without a checkpoint between them."""
    found = f"{failures} failures without a new checkpoint between them, the last of them: {last}"
    remedy = "The same command continues from the newest checkpoint; --debug shows the last failure whole."
    return DrafError(explain(url, expected="workers that stay alive", found=found, remedy=remedy))


def failed_start(error: Exception) -> str | None:
    """What became of workers that were not started, or of who starts them; None where it is something else, or without places."""
    if isinstance(error, ActorDiedError):
        return "the controller of Ray Train was lost"
    cause = _cause(error)
    # Ray has no public name for the one; the other is of a worker that dies just when its function is launched.
    lost_early = type(cause).__name__ == "WorkerGroupStartupFailedError" or isinstance(cause, RayActorError)
    return "a worker was lost before it began" if error is not cause and lost_early else None


def starts_again(error: Exception) -> bool:
    """Whether only these workers have ended: the driver said so, or somebody else was faster to take their places."""
    cause = _cause(error)
    return isinstance(cause, StartEnded) or type(cause).__name__ == "WorkerGroupStartupTimeoutError"


def as_draf_error(error: Exception, url: str) -> DrafError:
    """The error that ended a run at `url`, in our terms."""
    cause = _cause(error)
    if isinstance(cause, DrafError):
        return cause
    if isinstance(cause, RayError) and not isinstance(error, TrainingFailedError):
        remedy = "The same command continues from the newest checkpoint once the cluster is back."
        return UnreachableError(explain(url, expected="a Ray cluster that stays", found=type(cause).__name__, remedy=remedy))
    remedy = "The same command continues; --debug shows the error whole."
    return DrafError(explain(url, expected="Ray Train to go on", found=type(cause).__name__, remedy=remedy))


def _cause(error: Exception) -> Exception:
    return error.controller_failure if isinstance(error, ControllerError) else error


def _describe(error: Exception) -> str:
    if isinstance(error, HungError):
        return str(error)
    # Ray has no public name for it: the worker no longer answers.
    return "its process ended" if type(error).__name__ == "WorkerHealthCheckFailedError" else type(error).__name__

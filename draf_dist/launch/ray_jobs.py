"""Submissions of a run to a Ray cluster: begin or go on, follow, ask how it stands, stop."""

import re
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray.job_submission import JobDetails

from draf_dist.errors import (
    DataError,
    DrafError,
    GateError,
    InterruptedRunError,
    SpecError,
    UnreachableError,
    explain,
)
from draf_dist.launch.bundle import Bundle
from draf_dist.launch.cluster_profile import ClusterProfile
from draf_dist.launch.package import Package
from draf_dist.launch.ray_dashboard import PATIENCE_S, RETRY_INTERVAL_S, Dashboard

POLL_S = 0.5
# The log is fetched whole: a long one less often, so that following takes at most so much of the connection.
LOG_BYTES_PER_S = 50_000
# Beyond the time that the cluster gives a job between SIGTERM and SIGKILL.
STOP_MARGIN_S = 30.0
RUN_URL = "run"
LONGEST_REASON = 300
_ERRORS = {error.exit_code: error for error in (SpecError, DataError, GateError, InterruptedRunError, UnreachableError)}
# A wrong spec, bad data, a gate: the same command would end in the same way.
_TO_BE_MENDED = (SpecError.exit_code, DataError.exit_code, GateError.exit_code)
_NOISE = re.compile(
    r"Running entrypoint for job |"
    r"(?:\x1b\[\d+m)?\((?:raylet|autoscaler|pid=|\w+ pid=)|"
    r"\[?\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d,\d+[\t ](?:[A-Z]+ [\w.]+\.(?:py|cc):\d+ -- |[A-Z]\b)"
)


@dataclass(frozen=True)
class Submission:
    """One attempt at a run on a cluster.

    state: Ray's word: PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED. began, ended: seconds since 1970. exit_code: of the command.
    message: Ray's word on it, the log's end included. already: it ran before it was asked for, and goes on.
    """

    id: str
    attempt: int
    state: str
    run_url: str
    began: float | None
    ended: float | None
    exit_code: int | None
    message: str
    already: bool = False

    @property
    def is_active(self) -> bool:
        """Whether it runs or waits to."""
        return self.state in ("PENDING", "RUNNING")

    @property
    def reason(self) -> str:
        """Why it failed: the command's exit code (its log says the rest), or why it never ran."""
        if self.exit_code is not None:
            return f"exit code {self.exit_code}"
        return f"that it did not run to an end: {' '.join(self.message.split())[:LONGEST_REASON]}"


def submit(bundle: Bundle, cluster: ClusterProfile, package: Package) -> Submission:
    """Starts the bundle's command on the cluster; a run that exists is continued by it. One that is active is left alone.

    Raises:
        UnreachableError: no cluster there, or it refuses the token.
    """
    dashboard = Dashboard(cluster.dashboard)
    newest = _newest(dashboard, bundle.name)
    if newest is not None and newest.is_active:
        return replace(newest, already=True)
    number = 1 if newest is None else newest.attempt + 1
    with package.unpacked() as folder:
        return _begin(dashboard, bundle, number, _runtime_env(folder, cluster))


def _runtime_env(folder: Path, cluster: ClusterProfile) -> dict[str, Any]:
    """Nothing secret may stand here: everybody can read it."""
    # Between SIGTERM and SIGKILL, else three seconds.
    return {"working_dir": str(folder), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_stop_wait_s(cluster))}}


def _begin(dashboard: Dashboard, bundle: Bundle, number: int, runtime_env: dict[str, Any]) -> Submission:
    """Submits, again and again while a cluster that has just been started is not ready for it: an id is taken only once."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            dashboard.submit_job(
                entrypoint=shlex.join(bundle.command(".")),
                submission_id=f"{bundle.name}-{number}",
                runtime_env=runtime_env,
                metadata={RUN_URL: bundle.run_url},
            )
            return _get(dashboard, f"{bundle.name}-{number}")
        except UnreachableError:
            raise
        except DrafError:
            taken = _newest(dashboard, bundle.name)
            if taken is not None and taken.attempt >= number:
                # Somebody else was faster.
                return replace(taken, already=True)
            if time.monotonic() >= deadline:
                raise
            time.sleep(RETRY_INTERVAL_S)


def status(name: str, cluster: ClusterProfile) -> Submission | None:
    """The newest submission of a run (bundle.name); None if this cluster knows of none."""
    return _newest(Dashboard(cluster.dashboard), name)


def follow(submission: Submission, cluster: ClusterProfile, show: Callable[[str], None]) -> Submission:
    """Shows the lines of the job's log as they come, until it has ended; what it had ended as. A lost connection is taken up again.

    Raises:
        UnreachableError: the connection was away for longer than PATIENCE_S (the job goes on), or the log of a job that has ended.
    """
    dashboard = Dashboard(cluster.dashboard)
    shown = 0
    while True:
        # Asked before the log is read: what has ended by then has written everything.
        found = _get(dashboard, submission.id)
        log = _log(dashboard, found)
        end = len(log) if not found.is_active else log.rfind("\n") + 1
        for line in log[shown:end].splitlines():
            if not _NOISE.match(line):
                show(line)
        shown = max(shown, end)
        if not found.is_active:
            return found
        time.sleep(max(POLL_S, len(log) / LOG_BYTES_PER_S))


def stop(name: str, cluster: ClusterProfile) -> Submission | None:
    """Asks the newest submission of a run to stop, and waits until it has: it finishes its step and writes a checkpoint first.

    None if this cluster knows of none; one that has ended is returned as it is.

    Raises:
        DrafError: it did not stop in time.
    """
    dashboard = Dashboard(cluster.dashboard)
    newest = _newest(dashboard, name)
    if newest is None or not newest.is_active:
        return newest
    dashboard.stop_job(newest.id)
    wait_s = _stop_wait_s(cluster) + STOP_MARGIN_S
    deadline = time.monotonic() + wait_s
    while (found := _get(dashboard, newest.id)).is_active:
        if time.monotonic() >= deadline:
            remedy = "Look at it in the dashboard."
            raise DrafError(explain(newest.id, expected=f"to stop within {wait_s:.0f} s", found=found.state, remedy=remedy))
        time.sleep(POLL_S)
    return found


def check_succeeded(submission: Submission) -> None:
    """Nothing, if it succeeded.

    Raises:
        InterruptedRunError: it was stopped.
        DrafError: it failed; of the class that its own exit code stands for.
    """
    if submission.state == "SUCCEEDED":
        return
    if submission.state == "STOPPED":
        raise InterruptedRunError(
            explain(submission.id, expected="to finish", found="that it was stopped", remedy="Submit it again to continue.")
        )
    remedy = "Submitted again, the run continues from its newest checkpoint."
    if submission.exit_code in _TO_BE_MENDED:
        remedy = "Mend the cause first, which its log names: as it is it would fail again."
    error = _ERRORS.get(submission.exit_code or DrafError.exit_code, DrafError)
    raise error(explain(submission.id, expected="to finish", found=submission.reason, remedy=remedy))


def _stop_wait_s(cluster: ClusterProfile) -> int:
    """As long as the profile grants one rank for what it does alone, which is uploading a checkpoint."""
    return cluster.train.collective_timeout_s


def _newest(dashboard: Dashboard, name: str) -> Submission | None:
    found = [_submission(job) for job in dashboard.list_jobs() if job.submission_id and _attempt(name, job.submission_id)]
    return max(found, key=lambda submission: submission.attempt, default=None)


def _get(dashboard: Dashboard, submission_id: str) -> Submission:
    return _submission(dashboard.get_job_info(submission_id))


def _attempt(name: str, submission_id: str) -> int:
    """The number of an attempt at the run of this name; 0 for a submission of another one."""
    head, _, number = submission_id.rpartition("-")
    return int(number) if head == name and number.isdecimal() else 0


def _submission(job: JobDetails) -> Submission:
    submission_id = str(job.submission_id)
    return Submission(
        id=submission_id,
        attempt=int(submission_id.rpartition("-")[2]),
        state=job.status.value,
        run_url=(job.metadata or {}).get(RUN_URL, ""),
        began=_seconds(job.start_time),
        ended=_seconds(job.end_time),
        exit_code=job.driver_exit_code,
        message=job.message or "",
    )


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _log(dashboard: Dashboard, submission: Submission) -> str:
    """All of it so far; nothing while the node that has it does not answer, as long as there will be a later time to ask.

    Raises:
        UnreachableError: the job has ended, and its log can't be had for PATIENCE_S.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return dashboard.get_job_logs(submission.id)
        except UnreachableError:
            raise
        except DrafError as error:
            if submission.is_active:
                return ""
            if time.monotonic() >= deadline:
                raise _without_log(submission) from error
            time.sleep(RETRY_INTERVAL_S)


def _without_log(submission: Submission) -> UnreachableError:
    end = f"{submission.state}: {submission.reason}" if submission.state == "FAILED" else submission.state
    remedy = f"The job itself is {end}. With --status it says how its run stands."
    return UnreachableError(explain(submission.id, expected="the end of its log", found="none that can be read", remedy=remedy))

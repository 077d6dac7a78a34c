"""A campaign from beginning to end: trials through Ray Tune until the budget is spent, then the outcome."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import TuneError
from rich.console import Console
from rich.markup import escape

from draf_dist.errors import DrafError, InterruptedRunError, explain
from draf_dist.launch.profile import OneProcessProfile, Profile
from draf_dist.launch.ray_cluster import RayCluster, check_reach, environment, ray_cluster
from draf_dist.launch.ray_desk import Desk
from draf_dist.launch.ray_train import LENT
from draf_dist.training.interrupt import Interrupt
from draf_dist.tuning.actor import ActorTask, TrialActor
from draf_dist.tuning.campaign_job import CampaignJob
from draf_dist.tuning.checks import check_campaign
from draf_dist.tuning.claims import Claims
from draf_dist.tuning.folder import Books, CampaignFolder, enter_campaign, open_books, orphans, settle
from draf_dist.tuning.leaderboard import Leaderboard
from draf_dist.tuning.outcome import WINNER, write_outcome
from draf_dist.tuning.places import actor_resources, bundle, cluster_profile, num_workers
from draf_dist.tuning.point import max_epochs
from draf_dist.tuning.records import TrialRecord
from draf_dist.tuning.search import CampaignSearch, DurableHalving, RelayStop, budget_spent, too_many_failures

# A trial whose process was lost goes on in another one so many times, from its newest checkpoint.
RESTARTS = 1
_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # A trial that fails at once has nothing to report.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # Tune's own state is never read again.
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "60",
}


@dataclass(frozen=True)
class CampaignResult:
    """A campaign that is over. winner: URL of the job spec of its best trial."""

    url: str
    winner: str
    leaderboard: Leaderboard

    @property
    def best(self) -> TrialRecord:
        """The trial that won."""
        return self.leaderboard.best


def run_campaign(
    job: CampaignJob, out: str | None = None, profile: Profile | None = None, console: Console | None = None
) -> CampaignResult:
    """Begins or continues a campaign and carries it to its end; one that is over gives its result again.

    out: URL of the folder; runs/<name>-<8 hex> if None. profile: where one trial trains; None is one process with one thread.

    Raises:
        SpecError: the campaign, its jobs, the folder or the profile does not fit.
        InterruptedRunError: SIGINT or SIGTERM came; the same command continues.
        GateError: a later driver has taken the campaign over.
        DrafError: more trials failed than may, or all of them.
    """
    check_campaign(job)
    folder = enter_campaign(job, out)
    if len(folder.records()) < folder.campaign.budget.trials:
        with open_books(folder, max_epochs(folder.campaign)) as books:
            _search(books, profile or OneProcessProfile(), console or Console(stderr=True))
    return CampaignResult(folder.url, folder.store.where(WINNER), write_outcome(folder))


def _search(books: Books, profile: Profile, console: Console) -> None:
    """Trains until nothing is left to begin or to continue."""
    _check_failures(books)
    if budget_spent(books, num_workers(profile)) and not orphans(books.study, books.records()):
        return
    with ExitStack() as stack:
        for name in ("ray.tune", "ray.train", "ray.air"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        # Before the cluster: processes of one of our own inherit it.
        stack.enter_context(environment(_QUIET))
        cluster = stack.enter_context(ray_cluster(cluster_profile(profile)))
        at_a_time = _room(cluster, books.folder, profile)
        desk, claims = Desk.open(_lent(cluster)), Claims.open()
        stack.callback(desk.close)
        stack.callback(claims.close)
        # Entered last: Ray sets signal handlers of its own when a cluster is joined.
        interrupt = stack.enter_context(Interrupt())
        lines = Lines(books, console)
        search = CampaignSearch(books, profile, interrupt, lines.record, claims.release_all)
        here = str(Path.cwd()) if cluster.is_this_machine else None
        task = ActorTask(books.folder.campaign, books.folder.trials_url, profile, desk, claims, cluster.settings, here)
        _tune(task, search, at_a_time, RelayStop(interrupt, desk))
    settle(books.study, books.records())
    books.save_study()
    if search.halted is not None and not interrupt.requested:
        raise search.halted
    _check_failures(books)
    if interrupt.requested:
        raise _interrupted(books, interrupt.requested)


def _tune(task: ActorTask, search: CampaignSearch, at_a_time: int, stop: RelayStop) -> None:
    books = search.books
    with tempfile.TemporaryDirectory(prefix="draf-tune-") as storage, own_errors():
        # Ray's annotations are those of function trainables.
        trainable: Any = tune.with_resources(tune.with_parameters(TrialActor, task=task), actor_resources(task.profile))
        tune.run(
            trainable,
            name=books.folder.campaign.name,
            num_samples=books.folder.campaign.budget.trials - len(books.records()),
            search_alg=search,
            scheduler=DurableHalving(books),
            stop=stop,
            max_concurrent_trials=at_a_time,
            reuse_actors=True,
            max_failures=RESTARTS,
            raise_on_failed_trial=False,
            storage_path=storage,
            trial_dirname_creator=lambda trial: f"trial-{trial.trial_id}",
            verbose=0,
        )


@contextmanager
def own_errors() -> Iterator[None]:
    """Ray Tune wraps whatever its callbacks raise; an error that a user can mend comes out as itself."""
    try:
        yield
    except TuneError as error:
        inner: BaseException | None = error
        while isinstance(inner, TuneError):
            inner = inner.__cause__ or inner.__context__
        if isinstance(inner, DrafError):
            raise inner from None
        raise


@dataclass(frozen=True)
class Lines:
    """One line a trial, for the user."""

    books: Books
    console: Console

    def record(self, record: TrialRecord) -> None:
        """A trial has ended."""
        records = self.books.records()
        done = f"{len(records)} of {self.books.folder.campaign.budget.trials}: trial {record.trial} {record.state}"
        if record.objective is None:
            self._say(f"{done}: {record.reason}")
            return
        best = min((each.objective, each.trial) for each in records if each.objective is not None)
        fitted = f"NLL {record.nll:.4f}, with T {record.temperature:.2f} {record.nll_scaled:.4f}"
        self._say(f"{done} after {record.epochs} epochs, {record.wall_s:.0f} s: {fitted}; best {best[0]:.4f} (trial {best[1]})")

    def _say(self, line: str) -> None:
        self.console.print(escape(line), highlight=False, soft_wrap=True)


def _room(cluster: RayCluster, folder: CampaignFolder, profile: Profile) -> int:
    """How many trials to have at a time.

    Raises:
        SpecError: there is no room for one; a local folder, which only one of many nodes would see.
    """
    if not cluster.is_this_machine:
        check_reach(cluster.num_nodes, {"--out": folder.url, **{n: job.release for n, job in folder.campaign.stages.items()}})
    wanted = cluster_profile(profile).model_copy(update={"cpus_per_worker": bundle(profile)["CPU"]})
    cluster.make_room(wanted)
    return max(1, min(folder.campaign.concurrent, cluster.places(bundle(profile)) // num_workers(profile)))


def _lent(cluster: RayCluster) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(LENT)} if cluster.is_this_machine else {}


def _check_failures(books: Books) -> None:
    if too_many_failures(books):
        failed = [record for record in books.records() if record.state == "failed"]
        found = f"{len(failed)}, the last one: {failed[-1].reason}"
        expected = f"at most {books.folder.campaign.max_failures} failed trials"
        remedy = "Correct the space or the base job in another folder, or allow more with --set max_failures=N."
        raise DrafError(explain(books.folder.url, expected=expected, found=found, remedy=remedy))


def _interrupted(books: Books, signal: str) -> InterruptedRunError:
    done, planned = len(books.records()), books.folder.campaign.budget.trials
    remedy = "Trials wrote checkpoints: the same command continues."
    return InterruptedRunError(
        explain(books.folder.url, expected="to finish", found=f"{signal} after {done} of {planned} trials", remedy=remedy)
    )

"""Where a trial trains: in the process of its actor, or on workers of its own."""

import threading
from collections.abc import Generator

import torch
import torch.distributed as dist
from ray.tune import PlacementGroupFactory
from rich.console import Console

from draf_dist.launch.profile import OneProcessProfile, Profile, RayProfile
from draf_dist.launch.ray_desk import Desk
from draf_dist.training.backend import DECODE_THREADS, Backend
from draf_dist.training.run import EpochReport, RunResult, StopRequest, attempt_by_epochs
from draf_dist.training.run_folder import open_run
from draf_dist.tuning.trial import CarryOut, durable_epochs

WATCH_INTERVAL_S = 0.5
# The actor of a trial with workers of its own only watches.
WATCHER = {"CPU": 0.01}


def has_workers(profile: Profile) -> bool:
    """Whether a trial trains on workers of its own."""
    return isinstance(profile, RayProfile) and profile.workers > 1


def num_workers(profile: Profile) -> int:
    """How many train one trial."""
    return profile.workers if isinstance(profile, RayProfile) else 1


def bundle(profile: Profile) -> dict[str, float]:
    """What one worker of a trial takes of a node."""
    if isinstance(profile, RayProfile):
        return profile.bundle
    on_gpu = profile.backend().device.type == "cuda"
    return {"CPU": float(profile.threads), **({"GPU": 1.0} if on_gpu else {})}


def profile_text(profile: Profile) -> str:
    """What of a profile can move the numbers of a trial."""
    device = "cuda" if "GPU" in bundle(profile) else "cpu"
    precision = profile.deepspeed.precision if isinstance(profile, RayProfile) else "fp32"
    return f"{profile.kind}, {num_workers(profile)} on {device}, {precision}"


def actor_resources(profile: Profile) -> PlacementGroupFactory:
    """What Ray sets aside for the actor of a trial; its workers, if it has some, ask for their own."""
    return PlacementGroupFactory([WATCHER if has_workers(profile) else bundle(profile)])


def cluster_profile(profile: Profile) -> RayProfile:
    """The cluster that a campaign needs: that of the profile; one of its own where the profile knows of none."""
    return profile if isinstance(profile, RayProfile) else RayProfile(workers=1, threads=profile.threads)


def carry_out(profile: Profile, stop: StopRequest) -> CarryOut:
    """How a run is carried on in a trial's actor: with the engine that `draf train` takes for the same profile."""
    if isinstance(profile, RayProfile) and profile.workers > 1:
        return lambda url: _on_workers(url, profile, stop)
    # How many trials share the node is up to Ray: none takes all of its cores to decode.
    alone = profile.model_copy(update={"decode_threads": profile.decode_threads or DECODE_THREADS})
    backend = alone.backend() if isinstance(alone, OneProcessProfile) else _one_rank(alone)
    return lambda url: attempt_by_epochs(url, backend, Console(quiet=True), stop)


def _one_rank(profile: RayProfile) -> Backend:
    """DeepSpeed with this process as the only rank of a group."""
    if not dist.is_initialized():
        backend = "nccl" if profile.gpus_per_worker else "gloo"
        # Within one process nothing needs to be found: torch's export list leaves this store out.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    torch.set_num_threads(profile.threads)
    # DeepSpeed looks for an accelerator when it is imported.
    from draf_dist.training.deepspeed_engine import DeepSpeedRanks

    device = torch.device("cuda", 0) if profile.gpus_per_worker else torch.device("cpu")
    return DeepSpeedRanks(profile.deepspeed, device, profile.threads, profile.decode_threads or DECODE_THREADS)


def _on_workers(url: str, profile: RayProfile, stop: StopRequest) -> Generator[EpochReport, None, RunResult]:
    """Ray Train in a thread; its epochs are read from the run folder."""
    fit = _Fit(url, profile)
    fit.start()
    shown = len(durable_epochs(open_run(url)))
    try:
        running = True
        while running:
            running = fit.is_alive()
            found = durable_epochs(open_run(url))
            yield from found[shown:]
            shown = max(shown, len(found))
            if stop.requested:
                fit.ask_to_stop(stop.requested)
            fit.join(WATCH_INTERVAL_S)
    finally:
        # Whoever closes this does not want it to go on.
        fit.ask_to_stop("the campaign")
        fit.join()
    return fit.result()


class _Fit(threading.Thread):
    """train_on_ray for a run that exists."""

    def __init__(self, url: str, profile: RayProfile) -> None:
        super().__init__(daemon=True)
        self._url, self._profile = url, profile
        self._desk: Desk | None = None
        self._asked: str | None = None
        self._result: RunResult | None = None
        self._error: Exception | None = None

    def run(self) -> None:
        """Carries it to its end."""
        # What only trials with workers need is imported for them alone.
        from draf_dist.launch.ray_train import train_on_ray

        job, quiet = open_run(self._url).job, Console(quiet=True)
        try:
            self._result = train_on_ray(job, self._url, self._profile, console=quiet, watch=self._watch)
        except Exception as error:  # noqa: BLE001
            # Whatever it is: nobody hears of an error in a thread, so `result` raises it again where the trial runs.
            self._error = error

    def ask_to_stop(self, reason: str) -> None:
        """Makes it stop after the step in hand; nothing where it has ended."""
        self._asked = self._asked or reason
        if self._desk is not None and self.is_alive():
            self._desk.ask_to_stop(self._asked)

    def result(self) -> RunResult:
        """How it ended; raises what it raised."""
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def _watch(self, desk: Desk) -> None:
        self._desk = desk
        if self._asked is not None:
            desk.ask_to_stop(self._asked)

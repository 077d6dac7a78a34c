"""Effective training time ratio under kills: `draf train` beside plain Ray Train with a checkpoint an epoch.

    python benchmarks/ettr.py [--minutes 15] [--mean 60] [--seed 0] [--json FILE]

Two ranks on a Ray cluster of their own, checkpoints on a real S3 server on this machine; one arm after the other, both under the
same kills: SIGKILL of a rank's process, one in 60 s in the mean and as many as that makes, of which rank is drawn too. A kill that
comes while no rank's process exists hits nothing. The arms train the same DRAF on the same batches with the same DeepSpeed engine:
  plain   Ray's guides, as Ray ships it: train.report with a checkpoint after every epoch, get_checkpoint() after a failure
  ours    draf train, checkpoint.every_steps as `draf plan --measured` advises after a run without kills
ratio     steps of the newest durable checkpoint at the end, each once, at the plain loop's median length without kills, over wall
          time, which begins with the command and so includes the start of the cluster
restart   from a kill until the workers are ready for steps again
lost      work since the checkpoint that the next attempt went on from
books     the ratio that `draf run show` computes from the ledger of ours: until its last line, steps as long as they took
What another length of the plain arm's epoch would give is computed from its measured restarts, and not run (Daly 2006).
"""

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from ettr_report import History, Kill, expected_ratio, of_ledger, schedule, summary
from rich.console import Console
from rich.table import Table

from draf_dist.data.release import open_release
from draf_dist.launch.local_s3 import LocalS3
from draf_dist.training.goodput import goodput
from draf_dist.training.interval import DAY_S, Advice, advise
from draf_dist.training.jobs import load_job
from draf_dist.training.pin import pin
from draf_dist.training.plan import build_plan
from draf_dist.training.run_folder import open_run

BENCHMARKS = Path(__file__).resolve().parent
JOB = BENCHMARKS.parent / "jobs" / "finetune_synth.yaml"
WORKERS, BATCH = 2, 32
# A step of a third of a second on two ranks, and with --subjects an epoch of half a minute or more.
ENCODER = "{kind: image2d, widths: [64, 128, 256], dropout: 0.05, projection_dropout: 0.1}"
PROFILE = f"kind: ray\nworkers: {WORKERS}\nthreads: 1\nmax_failures: 100000\n"
UNDISTURBED_EVERY, STOP_TIMEOUT_S, LEFT_OUT = 20, 60.0, 3
EPOCHS_S = (10.0, 20.0, 40.0, 80.0, 160.0)
console = Console(width=140 if not sys.stdout.isatty() else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--mean", type=float, default=60.0, help="seconds between kills, in the mean")
    parser.add_argument("--undisturbed", type=float, default=100.0, help="seconds of each arm without kills")
    parser.add_argument("--subjects", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ettr-")))
        server = stack.enter_context(LocalS3(folder / "s3"))
        # Without a token Ray makes one and leaves it in the home folder.
        rays = {"RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
        os.environ.update(server.environment | rays | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"})
        steps_per_epoch = make_ready(folder, options.subjects)
        arms = Arms(folder, server, steps_per_epoch)
        calm = {"plain": arms.plain(options.undisturbed, []), "ours": arms.ours(options.undisturbed, [], UNDISTURBED_EVERY)}
        plan = planned(calm, arms.advised(options.mean), steps_per_epoch)
        console.print(f"without kills: {json.dumps(plan)}", highlight=False, soft_wrap=True)
        seconds = 60 * options.minutes
        kills = schedule(options.seed, seconds, options.mean, WORKERS)
        found = [arms.plain(seconds, kills), arms.ours(seconds, kills, plan["every_steps"])]
    figures = [summary(history, plan["step_s"]) for history in found]
    show(figures, plan, options.mean)
    if options.json:
        about = {"minutes": options.minutes, "mean_s": options.mean, "seed": options.seed, "planned_kills": len(kills)}
        options.json.write_text(json.dumps({**about, "without_kills": plan, "arms": figures}, indent=1) + "\n")


def make_ready(folder: Path, subjects: int) -> int:
    """A release, the job that both arms pin, and the profile; the steps of an epoch."""
    synth, release = folder / "synth", folder / "release"
    draf("synth", str(synth), "--sites", "4", "--subjects", str(subjects))
    draf("prepare", str(synth / "card.yaml"), "--raw", str(synth / "raw"), "--out", str(release))
    # So many epochs that no run comes to its end.
    settings = {"release": release, "batch_size": BATCH, "model.encoders.image": ENCODER, "epochs": 10**5, "patience": 10**5}
    job = pin(load_job(JOB, [f"{name}={value}" for name, value in settings.items()]))
    # YAML holds JSON.
    (folder / "job.yaml").write_text(job.model_dump_json())
    (folder / "profile.yaml").write_text(PROFILE)
    steps: int = build_plan(job, open_release(job.release)).order.steps_per_epoch
    return steps


@dataclass
class Arms:
    """Runs them, each time anew."""

    folder: Path
    server: LocalS3
    steps_per_epoch: int
    _num_runs: int = 0

    def plain(self, seconds: float, kills: list[Kill]) -> History:
        """Ray Train as in ettr_plain.py, for so long."""
        events = self.folder / "plain.jsonl"
        events.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "ray", ignore_errors=True)
        # Nothing of an earlier run: Ray would go on from there.
        self._empty("plain")
        # A socket's path is short, and Ray makes several levels beneath it.
        temporary = tempfile.mkdtemp(prefix="ettr-", dir="/tmp")
        command = [sys.executable, str(BENCHMARKS / "ettr_plain.py"), str(self.folder), str(WORKERS), temporary]
        try:
            with Running(command, self.folder / "plain.log") as running:
                hits = running.under(kills, seconds)
                ended = time.time()
                text = events.read_text() if events.exists() else ""
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        lines = [json.loads(line) for line in text.splitlines()]
        steps = max((line["stop"] for line in lines if line["event"] == "commit"), default=0)
        taken = [line["seconds"] for line in lines if line["event"] == "step"]
        return History("plain", running.began, ended, hits, [each for each in lines if each["event"] != "step"], steps, taken)

    def ours(self, seconds: float, kills: list[Kill], every_steps: int) -> History:
        """draf train, for so long."""
        self._num_runs += 1
        url = self._url
        draf_train = ["train", str(self.folder / "job.yaml"), "--profile", str(self.folder / "profile.yaml"), "--out", url]
        setting = ["--set", f"checkpoint.every_steps={every_steps}"]
        command = [sys.executable, "-m", "draf_dist.cli.app", *draf_train, *setting]
        with Running(command, self.folder / "ours.log") as running:
            hits = running.under(kills, seconds)
            ended = time.time()
            run = open_run(url)
            # The checkpoints first: one that is made meanwhile counts with the next look, as its commit does.
            durable = max(run.checkpoints.steps(), default=0)
            ledger, metrics = run.ledger(), run.metrics()
        taken = [line["wait_s"] + line["compute_s"] for line in metrics if line["event"] == "step"]
        books = goodput(ledger).ettr if ledger else None
        return History("ours", running.began, ended, hits, of_ledger(ledger, durable), durable, taken, books)

    def advised(self, mean_s: float) -> Advice:
        """What `draf plan --measured` says after the newest run of ours."""
        job = {"every_steps": UNDISTURBED_EVERY, "steps_per_epoch": self.steps_per_epoch, "world": WORKERS}
        return advise(open_run(self._url), **job, failures_per_day=DAY_S / mean_s)

    @property
    def _url(self) -> str:
        return f"{self.server.create_bucket('ours')}/run-{self._num_runs}"

    def _empty(self, bucket: str) -> None:
        from draf_dist.storage import open_store

        store = open_store(self.server.create_bucket(bucket))
        for path in store.list():
            store.delete(path)


class Running:
    """A command with all processes below it, while entered."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.began = time.time()
        self._log = log
        with log.open("wb") as file:
            self._driver = psutil.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        below = self._below()
        self._driver.terminate()
        psutil.wait_procs([self._driver], timeout=STOP_TIMEOUT_S)
        for process in [self._driver, *below]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs([self._driver, *below], timeout=STOP_TIMEOUT_S)

    def under(self, kills: list[Kill], seconds: float) -> list[float]:
        """Kills ranks as planned until the time is over; when it hit one.

        Raises:
            SystemExit: the command ended by itself.
        """
        hits = []
        for kill in kills:
            self._wait(kill.at_s)
            ranks = self._ranks()
            if ranks:
                with suppress(psutil.NoSuchProcess):
                    ranks[kill.rank % len(ranks)].send_signal(signal.SIGKILL)
                    hits.append(time.time())
        self._wait(seconds)
        return hits

    def _wait(self, until_s: float) -> None:
        while (left := self.began + until_s - time.time()) > 0:
            time.sleep(min(left, 0.5))
            if self._driver.poll() is not None:
                raise SystemExit(f"{self._driver.args}: ended by itself\n{self._log.read_text()[-3000:]}")

    def _ranks(self) -> list[psutil.Process]:
        """The workers' processes, in the order of their start: Ray names them by their actor."""
        return sorted((each for each in self._below() if "RayTrainWorker" in name_of(each)), key=lambda each: each.pid)

    def _below(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return self._driver.children(recursive=True)
        return []


def name_of(process: psutil.Process) -> str:
    """What it calls itself; nothing if it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def planned(calm: dict[str, History], advice: Advice, steps_per_epoch: int) -> dict[str, Any]:
    """What the arms without kills say about the ones with them."""
    plain, ours = (calm[arm].step_s[LEFT_OUT:] for arm in ("plain", "ours"))
    if not plain or not ours:
        raise SystemExit("too few steps in the undisturbed runs: give --undisturbed more seconds")
    step_s = median(plain)
    lengths = {"step_s": step_s, "ours_step_s": median(ours), "epoch_s": steps_per_epoch * step_s}
    ratios = {f"{arm}_ratio": history.ratio(step_s) for arm, history in calm.items()}
    costs = {"save_s": advice.costs.save_s, "slowed_s": advice.costs.slowed_s, "durable_s": advice.costs.durable_s}
    return {**lengths, "steps_per_epoch": steps_per_epoch, **costs, "every_steps": advice.every_steps, **ratios}


def show(figures: list[dict[str, Any]], plan: dict[str, Any], mean_s: float) -> None:
    """The tables."""
    names = ("ratio", "steps", "kills", "attempts", "restart_s", "longest_restart_s", "lost_s", "lost_steps", "wall_s", "books")
    about = f"epoch {plan['epoch_s']:.0f} s of steps, step {plan['step_s']:.3f} s, ours saves every {plan['every_steps']} steps"
    table = Table("arm", *names, title=about)
    for arm in figures:
        table.add_row(arm["arm"], *(f"{arm[name]:.3f}" if isinstance(arm[name], float) else str(arm[name]) for name in names))
    console.print(table)
    plain, ours = figures
    if plain["ratio"]:
        console.print(f"ours over plain: {ours['ratio'] / plain['ratio']:.2f}")
    restart_s = plain["restart_s"]
    rows = [(each, expected_ratio(each, 0.0, restart_s, mean_s)) for each in (*EPOCHS_S, plan["epoch_s"])]
    computed = Table("epoch s", "ratio", title=f"plain, computed: a kill every {mean_s:.0f} s, restarts of {restart_s:.1f} s")
    for epoch_s, ratio in sorted(rows):
        computed.add_row(f"{epoch_s:.0f}", f"{ratio:.3f}")
    console.print(computed)


def draf(*arguments: str) -> None:
    """One command.

    Raises:
        SystemExit: it failed; with what it printed.
    """
    command = [sys.executable, "-m", "draf_dist.cli.app", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"draf {' '.join(arguments)}:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()

"""What goes wrong while a run trains on a Ray cluster: after it, the run has to be the one that nothing happened to.

    python benchmarks/chaos_training.py [--kills 20] [--seed 0] [--json FILE]

A Ray cluster of four raylets and a real S3 server on this machine; `draf train` on two of its workers, again and again. SIGKILL of
workers at drawn moments, of Ray Train's controller, of a raylet, of the command, of the whole cluster; SIGTERM; the S3 server
restarted; a checkpoint damaged; two attempts at once. Losses, validation, weights and receipts are compared with those of an
undisturbed run, to the bit; at each failure one interval of checkpoints may be lost at most. Fails if anything is not as it must
be. Figures: docs/troubleshooting.md.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from disturbed_moments import Moment, at_put, in_step, in_validation, while_launching, while_restoring, while_starting
from disturbed_runs import (
    CACHE,
    CONTROLLER,
    EVERY_STEPS,
    DisturbedRun,
    Place,
    Result,
    a_place,
    held,
    undisturbed,
)
from rich.console import Console
from rich.table import Table

from draf_dist.errors import DrafError
from draf_dist.launch.local_ray import HEAD
from draf_dist.storage import open_store
from draf_dist.training.run_folder import open_run

RAYLETS = 3
EPOCHS = 16
KILLS_A_RUN = 4
SERVER_AWAY_S = 3.0
# Steps at the end that nothing is drawn from: a disturbed run shall have a few left.
TAIL = 12
FAILED = (AssertionError, subprocess.TimeoutExpired, psutil.Error, DrafError, LookupError, ValueError, OSError)
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One run and what is done to it."""

    name: str
    act: Callable[[DisturbedRun, random.Random], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of workers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[""], metavar="CASE", help="those whose names have one of these in them")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # Whoever ends it leaves no cluster and no server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    draw, began = random.Random(options.seed), time.monotonic()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name, a_place(Path(name), raylets=RAYLETS, epochs=EPOCHS) as place:
        expected = undisturbed(place)
        for case in cases(place, draw, options.kills):
            # Drawn in any case: a case alone is the same as among others.
            own = random.Random(draw.random())
            if any(part in case.name for part in options.only):
                rows += outcome(case, place, expected, own)
    show(rows, time.monotonic() - began)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if not rows or any(row["wrong"] for row in rows):
        sys.exit(1)


def cases(place: Place, draw: random.Random, num_kills: int) -> list[Case]:
    chosen = moments(draw, num_kills, place.num_steps - TAIL)
    parts = [chosen[start : start + KILLS_A_RUN] for start in range(0, len(chosen), KILLS_A_RUN)]
    return [
        *(Case(f"workers-{number}", partial(workers_killed, moments=part)) for number, part in enumerate(parts)),
        Case("controller", controller_killed),
        Case("raylet", raylet_killed),
        Case("command-killed", command_killed),
        Case("command-stopped", command_stopped),
        Case("server-saving", server_restarted_while_saving),
        Case("server-reading", server_restarted_while_reading),
        Case("damaged", checkpoint_damaged),
        Case("two-attempts", two_attempts),
        Case("cluster", cluster_lost),
    ]


def moments(draw: random.Random, count: int, num_steps: int) -> list[Moment]:
    """Every kind of moment as often as it counts, in runs of KILLS_A_RUN whose steps rise."""
    kinds: list[Callable[[int], Moment]] = [
        *[lambda step: in_step(draw, step)] * 2,
        lambda step: while_launching(draw),
        lambda step: at_put(draw, step, "uploading its part", "rank-00000.safetensors"),
        lambda step: while_starting(draw),
        lambda step: at_put(draw, step, "checkpoint being committed", "manifest.json"),
        lambda step: in_validation(draw, step),
        lambda step: while_restoring(draw),
        lambda step: at_put(draw, step, "uploading its part", "rank-00001.safetensors"),
        lambda step: in_step(draw, step),
    ]
    drawn = [kinds[number % len(kinds)] for number in range(count)]
    draw.shuffle(drawn)
    found = []
    for start in range(0, count, KILLS_A_RUN):
        steps = sorted(draw.sample(range(1, num_steps), KILLS_A_RUN))
        found += [kind(step) for kind, step in zip(drawn[start : start + KILLS_A_RUN], steps, strict=False)]
    # What comes last in a run: its result is being written.
    found[KILLS_A_RUN - 1 : KILLS_A_RUN] = [at_put(draw, num_steps, "exporting", "/model/")]
    return found


def outcome(case: Case, place: Place, expected: Result, draw: random.Random) -> list[Row]:
    """A row for everything that was done to the run."""
    run = DisturbedRun(place, case.name)
    wrong: list[str] = []
    try:
        case.act(run, draw)
        wrong = run.wrong(expected)
        rows = [{"what": each.what, "seconds": each.seconds, "lost": run.lost_steps(each)} for each in run.failures]
    except FAILED as error:
        wrong = [f"{type(error).__name__}: {error}"]
        rows = [{"what": each.what, "seconds": each.seconds, "lost": None} for each in run.failures]
        Console().print(run.said(3000), markup=False)
    finally:
        place.faults.clear()
        if run.driver is not None and run.driver.poll() is None:
            run.driver.kill()
            run.driver.wait()
    rows = [{"case": case.name, **row, "wrong": wrong} for row in rows or [{"what": "-", "seconds": None, "lost": None}]]
    for row in rows:
        Console(width=150).print(row)
    return rows


def workers_killed(run: DisturbedRun, draw: random.Random, moments: list[Moment]) -> None:
    run.start()
    for moment, following in zip(moments, [*moments[1:], None], strict=True):
        run.kill(*moment.wait(run))
        if following is None or not following.before_step:
            run.wait_for_new_step()
    run.finish()


def controller_killed(run: DisturbedRun, draw: random.Random) -> None:
    """The process of Ray Train that watches the workers."""
    run.start()
    in_step(draw, draw.randint(EVERY_STEPS, run.place.num_steps // 2)).wait(run)
    run.kill(run.place.processes_of(CONTROLLER)[-1], "controller of Ray Train")
    run.wait_for_new_step()
    run.finish()


def raylet_killed(run: DisturbedRun, draw: random.Random) -> None:
    """One with a rank on it; then a new one joins."""
    run.start()
    pid, _ = in_step(draw, draw.randint(EVERY_STEPS, run.place.num_steps // 2)).wait(run)
    ray = run.place.ray
    nodes = [ray.node_of(each.pid) for each in run.seen()]
    lost = next(node for node in nodes if node not in (None, HEAD))
    assert lost is not None
    ray.kill_node(lost)
    run.failed("raylet with a rank")
    assert lost not in [ray.node_of(pid) for pid in ray.pids]
    ray.add_node()
    run.wait_for_new_step()
    run.finish()


def command_killed(run: DisturbedRun, draw: random.Random) -> None:
    run.start()
    train_until(run, draw, EVERY_STEPS, 2)
    kill_command(run, "the command (SIGKILL)")
    run.start()
    run.wait_for_new_step()
    run.finish()


def train_until(run: DisturbedRun, draw: random.Random, first: int, part: int) -> None:
    """A step from `first` on in the first half (part 2) or third (part 3) of the run."""
    step = draw.randint(first, run.place.num_steps // part)
    run.until(lambda: run.trains(step))


def kill_command(run: DisturbedRun, what: str, **facts: Any) -> None:
    """SIGKILL; its ranks, which the cluster ends then, are waited for."""
    assert run.driver is not None
    ranks = {each.pid for each in run.seen()}
    killed = time.monotonic()
    run.driver.kill()
    run.driver.wait()
    deadline = killed + 60
    while any(psutil.pid_exists(pid) for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.failed(what, time=killed, **facts)


def command_stopped(run: DisturbedRun, draw: random.Random) -> None:
    """SIGTERM: it has time to save, and nothing is done again."""
    driver = run.start()
    run.until(lambda: run.trains(EVERY_STEPS + 1))
    sent = time.monotonic()
    driver.send_signal(signal.SIGTERM)
    code = run.end()
    assert code == 5, f"exit code {code}"
    (end,) = run.ledger("end")
    assert end["outcome"] == "interrupted"
    run.failed("the command (SIGTERM)", time=sent, attempt=end["attempt"], reached=end["steps"])
    run.start()
    run.wait_for_new_step()
    run.finish()
    assert run.lost_steps(run.failures[-1]) == 0


def server_restarted_while_saving(run: DisturbedRun, draw: random.Random) -> None:
    run.start()
    train_until(run, draw, 1, 2)
    restart_at(run, "PUT", "rank-00001.safetensors", "S3 server restarted in a save")


def server_restarted_while_reading(run: DisturbedRun, draw: random.Random) -> None:
    # The runs before have left all shards there.
    shutil.rmtree(run.place.folder / CACHE)
    run.start()
    restart_at(run, "GET", ".tar", "S3 server restarted while shards are read")


def restart_at(run: DisturbedRun, method: str, key: str, what: str) -> None:
    """With that request on its way; the run outlasts it, and no attempt more is needed."""
    server = run.place.server
    before = server.pid
    with held(run, method, key) as arrived:
        run.until(arrived)
        run.disturbed(what)
        server.stop()
        try:
            time.sleep(SERVER_AWAY_S)
        finally:
            server.start()
    assert server.pid not in (None, before)
    run.finish()
    assert len(run.ledger("attempt")) == 1, "another attempt was needed"


def checkpoint_damaged(run: DisturbedRun, draw: random.Random) -> None:
    """A bit of the newest checkpoint, between two attempts: the one before it serves."""
    run.start()
    train_until(run, draw, 3 * EVERY_STEPS, 2)
    kill_command(run, "the command (SIGKILL), then a bit of the newest checkpoint", intervals=2)
    store, names = open_store(run.url), open_run(run.url).checkpoints.ids()
    newest, before = sorted(names)[-1], sorted(names)[-2]
    path = f"checkpoints/{newest}/rank-{draw.randrange(2):05d}.safetensors"
    data = bytearray(store.read(path))
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    store.write(path, bytes(data))
    run.start()
    run.wait_for_new_step()
    run.finish()
    assert newest in run.said(), "nobody was told"
    start = run.ledger("attempt")[-1]["start"]
    assert f"step-{start:08d}-" in before, f"it went on from step {start}"


def two_attempts(run: DisturbedRun, draw: random.Random) -> None:
    """The ranks of the first are stopped as those of a virtual machine may be, and go on when the second has begun."""
    first = run.start()
    train_until(run, draw, EVERY_STEPS, 3)
    ranks = [each.pid for each in run.seen()]
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    run.failed("a second attempt beside the first")
    run.start()
    run.wait_for_new_step()
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)
    code = first.wait(120)
    assert code == 4, f"the older one: exit code {code}"
    run.finish()


def cluster_lost(run: DisturbedRun, draw: random.Random) -> None:
    """Every process of it, the head first; a new one is started, at another address."""
    run.start()
    train_until(run, draw, EVERY_STEPS, 2)
    ray, killed = run.place.ray, time.monotonic()
    for pid in ray.pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.failed("the whole cluster", time=killed)
    ray.stop()
    code = run.end()
    assert code in (1, 6), f"exit code {code}"
    ray.__enter__()
    run.start()
    run.wait_for_new_step()
    run.finish()


def show(rows: list[Row], seconds: float) -> None:
    table = Table("run", "what was killed, or done", "seconds to the first new step", "lost steps", "equal to the undisturbed run")
    for row in rows:
        waited = "-" if row["seconds"] is None else f"{row['seconds']:.1f}"
        equal = f"NO: {'; '.join(row['wrong'])}" if row["wrong"] else "yes"
        table.add_row(row["case"], row["what"], waited, str(row["lost"]), equal)
    Console(width=170).print(table)
    waits = sorted(row["seconds"] for row in rows if row["seconds"] is not None)
    median = f"{waits[len(waits) // 2]:.1f} s" if waits else "-"
    Console(width=170).print(f"{len(rows)} disturbances, {seconds:.0f} s; to the first new step: {median} (median)")


if __name__ == "__main__":
    main()

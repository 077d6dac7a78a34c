"""`draf demo`: the whole road on this machine, on a real S3 server, with a killed and resumed training in the middle."""

import json as json_module
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from draf_dist.cli.evaluate import print_evaluation
from draf_dist.cli.output import JsonOption, console, errors, print_json, table
from draf_dist.cli.subject_key import PUBLIC_KEY
from draf_dist.errors import DrafError, SpecError, explain

if TYPE_CHECKING:
    from draf_dist.evaluation.results import Evaluation

SUMMARY = "demo.json"
MARK = ".draf-demo"
TRAIN_TIMEOUT_S = 600.0
POLL_S = 0.05


@dataclass
class Stages:
    """Names and seconds of what was done, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Announces a stage on standard error and times it."""
        errors.print(f"[bold]{name}[/] ...", highlight=False)
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 2)


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write; an earlier demo there is replaced.")] = Path("demo"),
    subjects: Annotated[int, typer.Option(min=200, help="Synthetic subjects.")] = 800,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json: JsonOption = False,
) -> None:
    """Synthesise hospitals, prepare to S3, train DRAF, kill it, resume it, evaluate, report, and check the result.

    Example: draf demo --out demo
    """
    from draf_dist.launch.local_s3 import LocalS3

    began = time.perf_counter()
    _clear(out)
    stages = Stages()
    with stages("start S3 server"):
        server = LocalS3(out / "s3").__enter__()
    try:
        os.environ.update(server.environment)
        evaluation, facts = _road(out.absolute(), server.create_bucket("demo"), stages, subjects=subjects, seed=seed)
    finally:
        server.stop()
    facts |= {"seconds": stages.seconds, "total_seconds": round(time.perf_counter() - began, 2)}
    (out / SUMMARY).write_text(json_module.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if json:
        print_json(facts)
        return
    print_evaluation(evaluation)
    console.print(table("checks", ("what", "found"), facts["checks"].items()))
    console.print(table("stages", ("stage", "seconds"), [*stages.seconds.items(), ("total", facts["total_seconds"])]))
    console.print(
        f"Report: {out / 'run' / 'report.html'}   Stage seconds and checks: {out / SUMMARY}", soft_wrap=True, highlight=False
    )


def _road(out: Path, bucket: str, stages: Stages, *, subjects: int, seed: int) -> tuple["Evaluation", dict[str, Any]]:
    """Everything between the server's start and its end; returns the evaluation, and what the checks found."""
    import torch

    from draf_dist.cli.demo_checks import check_artefacts
    from draf_dist.cli.demo_job import demo_evaluation, demo_job
    from draf_dist.config.spec import dump_yaml
    from draf_dist.data.prepare import prepare
    from draf_dist.evaluation.evaluate import evaluate
    from draf_dist.sources.card import load_card
    from draf_dist.sources.synth import synthesise
    from draf_dist.sources.synth.truth import posterior_by_uid

    # Models this small gain nothing from a second thread, and threads that wait for a busy core cost much.
    torch.set_num_threads(1)
    synth, run, reference = out / "synth", out / "run", out / "reference"
    with stages("synthesise raw export"):
        synthesise(synth, num_sites=4, num_subjects=subjects, seed=seed)
    with stages("prepare release on s3://"):
        source = load_card(synth / "card.yaml").build(synth / "raw")
        release = prepare(source, f"{bucket}/synth", subject_key=PUBLIC_KEY)
    job = demo_job(release.pinned_url, seed=seed)
    dump_yaml(job, out / "job.yaml")
    with ExitStack() as processes:
        with stages("train, kill in mid-training"):
            unkilled = processes.enter_context(Training(out, reference))
            killed = processes.enter_context(Training(out, run))
            killed_at = killed.kill_after(job.checkpoint.every_steps * 3 // 2)
        with stages("resume; reference run beside it"):
            processes.enter_context(Training(out, run)).finish()
            unkilled.finish()
    with stages("evaluate and report"):
        evaluation = evaluate(str(run), demo_evaluation(), truth=posterior_by_uid(synth / "truth", PUBLIC_KEY))
    with stages("check own artefacts"):
        checks = check_artefacts(release, run, reference, killed_at)
    return evaluation, {"release": release.pinned_url, "killed_at_step": killed_at, "checks": checks}


class Training:
    """One `draf train` in a process of its own, as a user would start it; gone at the end of the `with` block at the latest."""

    def __init__(self, out: Path, run: Path) -> None:
        self.run = run
        self.log = out / f"{run.name}.log"
        command = [sys.executable, "-m", "draf_dist.cli.app", "train", str(out / "job.yaml"), "--out", str(run)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def kill_after(self, step: int) -> int:
        """SIGKILL once that many steps are in metrics.jsonl; returns how many there were.

        Raises:
            DrafError: the process ended by itself before.
        """
        deadline = time.monotonic() + TRAIN_TIMEOUT_S
        while (done := self._steps()) < step:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self._stop()
                raise self._failed(f"to be killed after step {step}", f"step {done}")
            time.sleep(POLL_S)
        self._stop()
        return self._steps()

    def finish(self) -> None:
        """Waits for the end.

        Raises:
            DrafError: it ended with an error, or did not end in time.
        """
        try:
            code = self.process.wait(TRAIN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._stop()
            raise self._failed("to finish", f"no end within {TRAIN_TIMEOUT_S:.0f} s") from None
        if code != 0:
            raise self._failed("exit code 0", str(code))

    def _steps(self) -> int:
        metrics = self.run / "metrics.jsonl"
        return metrics.read_text().count('"event": "step"') if metrics.exists() else 0

    def _stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def _failed(self, expected: str, found: str) -> DrafError:
        last = self.log.read_text(errors="replace").splitlines()[-3:]
        return DrafError(
            explain(f"training {self.run.name}", expected=expected, found=found, remedy=f"{self.log} ends: {' / '.join(last)}")
        )


def _clear(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        if not (out / MARK).exists():
            raise SpecError(
                explain(str(out), expected="a new folder or an earlier demo", found="something else", remedy="Name another --out.")
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()

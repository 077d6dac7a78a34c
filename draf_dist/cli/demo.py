"""`draf demo`: the whole road on this machine: a real S3 server, a real Ray cluster, a worker killed in the middle of training."""

import json as json_module
import os
import shutil
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from draf_dist.cli.demo_stages import PRETRAINED, REFERENCE, RUN, Stages
from draf_dist.cli.evaluate import print_evaluation
from draf_dist.cli.output import JsonOption, console, print_json, table
from draf_dist.cli.subject_key import PUBLIC_KEY
from draf_dist.errors import InterruptedRunError, SpecError, explain

if TYPE_CHECKING:
    from draf_dist.cli.demo_kill import Kill
    from draf_dist.evaluation.results import Evaluation

SUMMARY = "demo.json"
MARK = ".draf-demo"


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write; an earlier demo there is replaced.")] = Path("demo"),
    subjects: Annotated[int, typer.Option(min=200, help="Synthetic subjects.")] = 800,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    full: Annotated[
        bool, typer.Option("--full", help="Then a campaign, a submission to a cluster, and a new hospital's delivery.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Synthesise hospitals, prepare to S3, pre-train and fine-tune on 2 Ray workers, kill one, evaluate, report, check it all.

    With --full the road goes on: a campaign of six trials; the fine-tuning job submitted to a Ray cluster with a token; a delivery
    of a new hospital ingested, the model retrained, judged by the gate, promoted, and rolled back.

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
        if full:
            facts["checks"] |= _rest_of_the_road(out.absolute(), facts["release"], stages, subjects=subjects, seed=seed)
    except InterruptedRunError as error:
        remedy = "The demo starts anew at the next call; a training of your own would continue."
        raise InterruptedRunError(explain("demo", expected="to finish", found="a signal", remedy=remedy)) from error
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
        f"Report: {out / RUN / 'report.html'}   Stage seconds and checks: {out / SUMMARY}", soft_wrap=True, highlight=False
    )


def _road(out: Path, bucket: str, stages: Stages, *, subjects: int, seed: int) -> tuple["Evaluation", dict[str, Any]]:
    """Everything between the server's start and its end; returns the evaluation, and what the checks found."""
    import torch

    from draf_dist.cli.demo_checks import check_artefacts
    from draf_dist.cli.demo_job import demo_evaluation
    from draf_dist.data.prepare import prepare
    from draf_dist.evaluation.evaluate import evaluate
    from draf_dist.sources.card import load_card
    from draf_dist.sources.synth import synthesise
    from draf_dist.sources.synth.truth import posterior_by_uid

    # Models this small gain nothing from a second thread, and threads that wait for a busy core cost much.
    torch.set_num_threads(1)
    synth = out / "synth"
    with stages("synthesise raw export"):
        synthesise(synth, num_sites=4, num_subjects=subjects, seed=seed)
    with stages("prepare release on s3://"):
        source = load_card(synth / "card.yaml").build(synth / "raw")
        release = prepare(source, f"{bucket}/synth", subject_key=PUBLIC_KEY)
    kill = _train(out, release.pinned_url, stages, seed)
    with stages("evaluate and report"):
        evaluation = evaluate(str(out / RUN), demo_evaluation(), truth=posterior_by_uid(synth / "truth", PUBLIC_KEY))
    with stages("check own artefacts"):
        checks = check_artefacts(release, out, kill)
    return evaluation, {"release": release.pinned_url, "kill": asdict(kill), "checks": checks}


def _train(out: Path, release: str, stages: Stages, seed: int) -> "Kill":
    """All stages of training on one Ray cluster of two workers."""
    from draf_dist.cli.demo_job import demo_job, demo_pretraining, demo_profile
    from draf_dist.cli.demo_kill import Killer
    from draf_dist.config.spec import dump_yaml
    from draf_dist.launch.ray_cluster import ray_cluster
    from draf_dist.launch.ray_train import train_on_ray

    profile = demo_profile()
    dump_yaml(profile, out / "profile.yaml")
    with ExitStack() as stack:
        log = Console(file=stack.enter_context((out / "train.log").open("a", encoding="utf-8")))
        with stages("start a Ray cluster"):
            stack.enter_context(ray_cluster(profile))
        with stages("pre-train the image encoder on 2 workers"):
            pretraining = demo_pretraining(release, seed=seed)
            dump_yaml(pretraining, out / "pretrain.yaml")
            encoder = train_on_ray(pretraining, str(out / PRETRAINED), profile, console=log)
        job = demo_job(release, encoder.url, seed=seed)
        dump_yaml(job, out / "job.yaml")
        with stages("fine-tune on 2 workers, kill one, recover"):
            killer = Killer(out / RUN, after_step=job.checkpoint.every_steps * 3 // 2)
            train_on_ray(job, str(out / RUN), profile, console=log, watch=killer.start)
            kill = killer.result()
        with stages("fine-tune again, undisturbed"):
            train_on_ray(job, str(out / REFERENCE), profile, console=log)
    return kill


def _rest_of_the_road(out: Path, release: str, stages: Stages, *, subjects: int, seed: int) -> dict[str, str]:
    from draf_dist.cli.demo_campaign import campaign
    from draf_dist.cli.demo_continual import new_hospital
    from draf_dist.cli.demo_submit import submission

    return {
        **campaign(out, release, stages, seed=seed),
        **submission(out, stages),
        **new_hospital(out, release, stages, subjects=subjects, seed=seed),
    }


def _clear(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        if not (out / MARK).exists():
            raise SpecError(
                explain(str(out), expected="a new folder or an earlier demo", found="something else", remedy="Name another --out.")
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()

"""`draf train`: a job to a finished run."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from draf_dist.cli.output import DryRunOption, JsonOption, SetOption, console, print_json

if TYPE_CHECKING:
    from draf_dist.training.jobs import AnyJob


def train(
    job: Annotated[Path, typer.Argument(help="The job (YAML).")],
    out: Annotated[str | None, typer.Option(help="URL of the run folder; runs/<job>-<hash> if not given.")] = None,
    overrides: SetOption = None,
    profile: Annotated[Path | None, typer.Option(help="Where to run (YAML, see cluster/); this process if not given.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove the run that is there and start anew.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="The run must exist; continue it.")] = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Train a model. The same command on a run that exists continues it, and on a finished one prints its result.

    Example: draf train jobs/finetune_synth.yaml --set release=s3://bucket/synth --out runs/first --profile cluster/ray_local.yaml
    """
    from draf_dist.data.release import open_release
    from draf_dist.launch.cluster_profile import load_profile
    from draf_dist.launch.profile import OneProcessProfile
    from draf_dist.launch.train import train_with
    from draf_dist.training.job import without_secret
    from draf_dist.training.jobs import load_job
    from draf_dist.training.pin import pin
    from draf_dist.training.run import RUNS
    from draf_dist.training.stages import build_stage
    from draf_dist.training.torch_engine import OneProcess

    spec = load_job(job, overrides or ())
    where = OneProcessProfile() if profile is None else load_profile(profile)
    if dry_run:
        pinned = pin(spec)
        url = without_secret("--out", out or f"{RUNS}/{pinned.run_name}")
        release = open_release(pinned.release)
        # What a rank would refuse: encoders that don't fit, modalities that are not there.
        build_stage(pinned, release, OneProcess())
        num_train = release.manifest.receipts["train"].count
        if json:
            print_json({"run": url, "release": pinned.release, "num_train": num_train})
        else:
            console.print(f"Would {pinned.kind} on {num_train} studies of {pinned.release} into {url}.", soft_wrap=True)
        return
    result = train_with(where, spec, out, fresh=fresh, resume=resume)
    if json:
        print_json(asdict(result))
        return
    console.print(
        f"Finished after {result.steps} steps: best validation {result.score} {result.best_loss:.4f} at step {result.best_step}.",
        highlight=False,
    )
    console.print(f"Run: {result.url}   {_next(spec, result.url)}", soft_wrap=True, highlight=False)


def _next(job: "AnyJob", url: str) -> str:
    from draf_dist.training.pretrain_job import PretrainJob

    if isinstance(job, PretrainJob):
        return f"Next: --set pretrained.{job.objective.modality}={url} in a fine-tuning job"
    return f"Next: draf evaluate {url}"

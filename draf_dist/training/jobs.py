"""Every kind of training job: read from a file, and in the resolved form that a run stores."""

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import draf_dist
from draf_dist.config.spec import apply_overrides, model_of_kind, parse_yaml, read_yaml, validate_spec
from draf_dist.training.job import FinetuneJob
from draf_dist.training.pretrain_job import PretrainJob

# Every kind of job: a new one is a file of its own, a name here, and its stage in stages.py.
AnyJob = FinetuneJob | PretrainJob
JOBS: dict[str, type[AnyJob]] = {job.model_fields["kind"].default: job for job in get_args(AnyJob)}
RESOLVED = "resolved"
LIBRARIES = ("torch", "numpy", "safetensors", "pyarrow", "pydantic")


def load_job(path: Path | str, overrides: Sequence[str] = ()) -> AnyJob:
    """The job in a YAML file, one that a run stored included.

    Raises:
        SpecError: one line for every problem.
    """
    tree = read_yaml(path)
    apply_overrides(tree, overrides)
    return _job(tree, where=str(path))


def parse_job(text: str, *, where: str) -> AnyJob:
    """The job in a run's job.yaml."""
    return _job(parse_yaml(text, where=where), where=where)


def _job(tree: dict[str, Any], *, where: str) -> AnyJob:
    """A job without `kind` is one of fine-tuning."""
    tree = {key: value for key, value in tree.items() if key != RESOLVED}
    model = model_of_kind(tree.get("kind", "finetune"), JOBS, where=where, see="See jobs/ for examples.")
    return validate_spec(tree, model, where=where)


def resolved(job: AnyJob) -> dict[str, Any]:
    """The job with every default filled in, and under `resolved` what it was made with."""
    _, _, pinned = job.release.rpartition("@")
    about = {
        "job_sha256": job.sha256,
        "release_version": pinned,
        "draf_dist": draf_dist.__version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    return {**job.model_dump(mode="json"), RESOLVED: about}


def git_commit() -> str | None:
    """The commit of the code that runs, `-dirty` where files differ from it; None outside a git work tree."""
    folder = Path(draf_dist.__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

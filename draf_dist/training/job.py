"""The spec of a fine-tuning job, and its resolved form as a run stores it."""

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

import draf_dist
from draf_dist.config.spec import Spec, apply_overrides, fingerprint, parse_yaml, read_yaml, validate_spec
from draf_dist.data.corruption import TrainingCorruption
from draf_dist.errors import SpecError, explain
from draf_dist.models.fusion import FusionConfig
from draf_dist.models.fusion.draf import DrafConfig
from draf_dist.objectives.fusion import FusionObjectiveConfig

RESOLVED = "resolved"
LIBRARIES = ("torch", "numpy", "safetensors", "pyarrow", "pydantic")


class OptimizerConfig(Spec):
    """Adam (decoupled weight decay), linear warm-up, then cosine to 0. clip_norm None: gradients are not clipped."""

    learning_rate: float = Field(1e-3, gt=0)
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float | None = Field(None, gt=0)


class CheckpointConfig(Spec):
    """A checkpoint is written after every epoch, and within epochs every `every_steps`; the newest `keep` and the best stay."""

    every_steps: int = Field(200, ge=1)
    keep: int = Field(2, ge=1)


class FinetuneJob(Spec):
    """What to train on what; where it runs and where it is written are no part of it.

    release: URL, or URL@version; a run pins the version. groups, open_samples: see docs/order.md. patience: epochs without a better
    validation NLL after which training stops. passes_train, passes_eval: Monte-Carlo passes per step and per validation.
    """

    kind: Literal["finetune"] = "finetune"
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    release: str
    seed: int = Field(0, ge=0)
    model: FusionConfig = DrafConfig()
    objective: FusionObjectiveConfig = FusionObjectiveConfig()
    corruption: TrainingCorruption = TrainingCorruption()
    batch_size: int = Field(64, ge=1)
    groups: int = Field(64, ge=1)
    open_samples: int = Field(65_536, ge=1)
    epochs: int = Field(30, ge=1)
    patience: int = Field(10, ge=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    passes_train: int = Field(4, ge=1)
    passes_eval: int = Field(30, ge=1)

    @field_validator("release")
    @classmethod
    def _no_secret(cls, release: str) -> str:
        if "@" in urlsplit(release).netloc:
            # Not a ValueError: pydantic's own message would repeat the value.
            remedy = "Put them into the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY."
            raise SpecError(explain("release", expected="a URL without credentials", found="one with", remedy=remedy))
        return release

    @property
    def sha256(self) -> str:
        """What tells this job from every other one; 64 hex digits."""
        return fingerprint(self)

    @property
    def run_name(self) -> str:
        """The name of the run folder: <job>-<8 hex of the resolved job>."""
        return f"{self.name}-{self.sha256[:8]}"


def load_job(path: Path | str, overrides: Sequence[str] = ()) -> FinetuneJob:
    """The job in a YAML file, one that a run stored included.

    Raises:
        SpecError: one line for every problem.
    """
    tree = read_yaml(path)
    tree.pop(RESOLVED, None)
    apply_overrides(tree, overrides)
    return validate_spec(tree, FinetuneJob, where=str(path))


def parse_job(text: str, *, where: str) -> FinetuneJob:
    """The job in a run's job.yaml."""
    tree = parse_yaml(text, where=where)
    tree.pop(RESOLVED, None)
    return validate_spec(tree, FinetuneJob, where=where)


def resolved(job: FinetuneJob) -> dict[str, Any]:
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

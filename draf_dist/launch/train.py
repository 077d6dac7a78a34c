"""A training job, carried out where a profile says."""

from rich.console import Console

from draf_dist.launch.profile import OneProcessProfile, Profile
from draf_dist.training.jobs import AnyJob
from draf_dist.training.run import RunResult, train


def train_with(
    profile: Profile,
    job: AnyJob,
    out: str | None = None,
    *,
    fresh: bool = False,
    resume: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Begins or continues a run, and carries it to its end. Arguments and errors: see training.run.train and train_on_ray."""
    if isinstance(profile, OneProcessProfile):
        return train(job, out, fresh=fresh, resume=resume, console=console, backend=profile.backend())
    # Only those who use Ray wait for its import.
    from draf_dist.launch.ray_train import train_on_ray

    return train_on_ray(job, out, profile, fresh=fresh, resume=resume, console=console)

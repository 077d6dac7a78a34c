"""From a job to its stage."""

from draf_dist.data.release import Release
from draf_dist.losses.gather import AllGather, one_process
from draf_dist.training.backend import Backend
from draf_dist.training.finetune import build_finetuning
from draf_dist.training.jobs import AnyJob
from draf_dist.training.pretrain import build_pretraining
from draf_dist.training.pretrain_job import PretrainJob
from draf_dist.training.stage import Stage


def build_stage(job: AnyJob, release: Release, backend: Backend, run: str | None = None) -> Stage:
    """The stage of a job whose release, and whatever else it reads, is pinned. run: its URL, once there is one."""
    if isinstance(job, PretrainJob):
        return build_pretraining(job, release, backend, run)
    gather = AllGather() if backend.world > 1 else one_process
    return build_finetuning(job, release, backend.device, run, gather=gather, reduce=backend.reduce)

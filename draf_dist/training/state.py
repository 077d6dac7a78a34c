"""Where a run stands: everything a checkpoint stores besides tensors."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from draf_dist.schema.record import Record
from draf_dist.training.job import FinetuneJob, Replay, TrainJob
from draf_dist.training.schedule import EarlyStopping


class OrderState(Record):
    """The position in the global sample order, as the optimizer has consumed it: exact for any number of ranks.

    replay: how two parts of the release are mixed; not there in a run without.
    """

    release: str
    seed: int
    groups: int
    open_samples: int
    batch_size: int
    step: int = Field(ge=0)
    replay: Replay | None = Field(None, exclude_if=lambda replay: replay is None)

    @classmethod
    def at(cls, job: TrainJob, release: str, step: int) -> "OrderState":
        """The order of a job on a version of its release, with `step` steps consumed."""
        return cls(
            release=release,
            seed=job.seed,
            groups=job.groups,
            open_samples=job.open_samples,
            batch_size=job.batch_size,
            step=step,
            replay=job.replay if isinstance(job, FinetuneJob) else None,
        )


class RunState(Record):
    """state.json of a checkpoint. score: what a validation found at this step, None where none was made.

    due: that of the epoch that ends here is still to be made; left out where it is not, as in all checkpoints of earlier versions.
    """

    format: Literal[2] = 2
    order: OrderState
    stopping: EarlyStopping
    score: float | None = None
    due: bool = Field(False, exclude_if=lambda due: not due)
    job_sha256: str
    attempt: int
    world: int


@dataclass
class TrainState:
    """What changes while a run goes on, besides the engine. step: optimizer steps done.

    due: an epoch ends here, and its validation is still to be made.
    """

    step: int
    stopping: EarlyStopping
    due: bool = False

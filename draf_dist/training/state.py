"""Where a run stands: everything a checkpoint stores besides tensors."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from draf_dist.data.order import Order
from draf_dist.schema.modality import Record
from draf_dist.training.schedule import EarlyStopping


class OrderState(Record):
    """The position in the global sample order, as the optimizer has consumed it: exact for any number of ranks."""

    release: str
    seed: int
    groups: int
    open_samples: int
    batch_size: int
    step: int = Field(ge=0)

    @classmethod
    def at(cls, order: Order, step: int) -> "OrderState":
        """The order with `step` steps consumed."""
        return cls(
            release=order.release,
            seed=order.seed,
            groups=order.groups,
            open_samples=order.open_samples,
            batch_size=order.batch_size,
            step=step,
        )


class RunState(Record):
    """state.json of a checkpoint."""

    format: Literal[1] = 1
    order: OrderState
    stopping: EarlyStopping
    job_sha256: str
    attempt: int
    world: int


@dataclass
class TrainState:
    """What changes while a run goes on, besides the engine. step: optimizer steps done."""

    step: int
    stopping: EarlyStopping

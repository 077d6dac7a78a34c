"""What a job says about steps that went bad."""

from typing import Literal

from pydantic import Field

from draf_dist.config.spec import Spec

Action = Literal["stop", "skip", "roll_back"]


class BadLoss(Spec):
    """action: what happens at a bad step. at_most: so many times one after the other, then the run stops. See troubleshooting.md.

    stop: the run ends. skip: the step's update is skipped. roll_back: back to the newest checkpoint, and the updates of all steps
    from there to the bad one are skipped. exploding: a loss, or norm of the gradient, that is so many times the median of the last
    good ones is bad too; None asks only whether they are finite.
    """

    action: Action = "stop"
    at_most: int = Field(3, ge=1)
    exploding: float | None = Field(None, gt=1)

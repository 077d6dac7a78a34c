"""The part of a profile that says how DeepSpeed computes; it changes no result but by rounding."""

from typing import Literal

from pydantic import Field

from draf_dist.config.spec import Spec


class DeepSpeedConfig(Spec):
    """Many ranks with DeepSpeed.

    zero_stage: what the ranks share among them: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too. precision: bf16
    runs the model under autocast; parameters, optimizer state and losses stay fp32. accumulation: micro-batches per step and rank.
    """

    kind: Literal["deepspeed"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    accumulation: int = Field(1, ge=1)

"""The part of a profile that says how DeepSpeed computes; it changes no result but by rounding."""

from typing import Literal, Self

from pydantic import Field, model_validator

from draf_dist.config.spec import Spec
from draf_dist.training.deepspeed_extra import DeepSpeedExtra


class DeepSpeedConfig(Spec):
    """Many ranks with DeepSpeed.

    zero_stage: what the ranks share among them: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too. precision: bf16
    runs the model under autocast; parameters, optimizer state and losses stay fp32. accumulation: micro-batches per step and rank.
    offload: what of a rank's share lies in the host's memory instead of the GPU's; Adam then computes on the CPU.
    activation_checkpointing: blocks of the model are computed again in backward instead of kept. extra: passed on to DeepSpeed.
    """

    kind: Literal["deepspeed"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    accumulation: int = Field(1, ge=1)
    offload: Literal["none", "optimizer", "optimizer_and_parameters"] = "none"
    activation_checkpointing: bool = False
    extra: DeepSpeedExtra = DeepSpeedExtra()

    @model_validator(mode="after")
    def _stage_has_it(self) -> Self:
        least = {"none": 0, "optimizer": 1, "optimizer_and_parameters": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(
                f"offload {self.offload} needs zero_stage {' or '.join(map(str, range(least, 4)))}, not {self.zero_stage}"
            )
        idle = [name for name in self.extra.of_zero() if self.zero_stage < (3 if name.startswith("stage3_") else 1)]
        if idle:
            raise ValueError(f"extra.zero_optimization: these do nothing at zero_stage {self.zero_stage}: {', '.join(idle)}")
        return self

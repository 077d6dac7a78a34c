"""Whether the loss reaches every parameter."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Reached:
    """Which trained parameters a gradient has reached since `watch`.

    Plain Adam leaves a parameter without a gradient alone. ZeRO knows only flat tensors: it takes the gradient for 0, so such a
    parameter decays. A model whose every parameter some loss reaches (rule D2) gives the same with both, so that is required.
    """

    missing: dict[str, RemovableHandle]

    @classmethod
    def watch(cls, module: nn.Module) -> "Reached":
        """Begins with none reached."""
        reached = cls({})
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                hook: Callable[[Tensor], None] = partial(reached._strike, name)
                reached.missing[name] = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        return reached

    def check(self) -> None:
        """Raises ValueError if there are some that no gradient has reached."""
        if self.missing:
            raise ValueError(f"no loss reaches these parameters: {', '.join(self.missing)}")

    def _strike(self, name: str, _: Tensor) -> None:
        if name in self.missing:
            self.missing.pop(name).remove()

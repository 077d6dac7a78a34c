"""Which parameters weight decay pulls towards 0."""

from typing import Any

from torch import nn

from draf_dist.models.variational import GaussianWeight


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters of a module for an optimizer with decoupled weight decay; Gaussian weights apart, without it.

    What regularises those is the divergence from their prior. Decay would pull rho to 0, which is a sigma of .69 and no zero of
    anything (spec 3.4).
    """
    gaussian = {id(parameter) for part in module.modules() if isinstance(part, GaussianWeight) for parameter in part.parameters()}
    groups: dict[float, list[nn.Parameter]] = {weight_decay: [], 0.0: []}
    for parameter in module.parameters():
        groups[0.0 if id(parameter) in gaussian else weight_decay].append(parameter)
    # DeepSpeed takes no empty group.
    return [{"params": chosen, "weight_decay": decay} for decay, chosen in groups.items() if chosen]

"""The one place where absent inputs are replaced, before any layer, and outputs are masked again (rule D1).

`where`, never a product: NaN * 0 is NaN, and masking outputs alone leaves NaN in the gradients of the weights.
"""

import torch
from torch import Tensor

from draf_dist.schema.batch import Batch, ModalityInput, SeriesInput


def clear_absent(batch: Batch) -> dict[str, ModalityInput]:
    """The inputs with zeros wherever nothing was measured: absent modalities, values not observed, steps past the length."""
    return {name: _clear(batch.inputs[name], batch.present[:, axis]) for axis, name in enumerate(batch.modalities)}


def mask_absent(values: Tensor, present: Tensor) -> Tensor:
    """Values (..., B, M, Z) with exact zeros where the modality is absent; present is (B, M)."""
    return torch.where(present.unsqueeze(-1), values, 0.0)


def _clear(value: ModalityInput, present: Tensor) -> ModalityInput:
    if isinstance(value, Tensor):
        return torch.where(present.view(-1, *[1] * (value.dim() - 1)), value, 0.0)
    steps = torch.arange(value.values.shape[1], device=value.values.device)
    length = torch.where(present, value.length, 0)
    counts = (steps < length.unsqueeze(1)).unsqueeze(2)
    observed = value.observed & counts
    return SeriesInput(torch.where(observed, value.values, 0.0), observed, length)

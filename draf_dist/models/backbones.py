"""The encoders of all modalities: a batch in, one feature vector per pass, study and modality out."""

import torch
from torch import Tensor, nn

from draf_dist.errors import SpecError, explain
from draf_dist.models.absent import clear_absent, mask_absent
from draf_dist.models.encoders import EncoderChoice
from draf_dist.models.mc import check_sampling, has_dropout
from draf_dist.schema.batch import Batch, ModalityInput, SeriesInput
from draf_dist.schema.modality import DataSchema, ImageSpec, ModalitySpec, SeriesSpec, VolumeSpec

# Rows times passes per forward of the encoders on a CPU, where no gradient is wanted.
_ROWS_AT_ONCE = 256


class Backbones(nn.Module):
    """One encoder per modality. Every encoder runs on every row, whatever is missing (rule D1)."""

    def __init__(self, choice: EncoderChoice, schema: DataSchema, width: int) -> None:
        super().__init__()
        choice.check_names(schema)
        self.schema = schema
        self.encoders = nn.ModuleDict({module_name(spec.name): choice.of(spec).build(spec, width) for spec in schema.modalities})

    def forward(self, batch: Batch, keys: Tensor) -> Tensor:
        """Features f32 (S, B, M, Z) of keys (S, B), exactly 0 where a modality is absent."""
        inputs = clear_absent(batch)
        features = torch.cat([self.encode(inputs, part) for part in _in_parts(keys)])
        return mask_absent(features, batch.present)

    def encode(self, inputs: dict[str, ModalityInput], keys: Tensor) -> Tensor:
        """Features (S, B, M, Z) of inputs without NaN."""
        return torch.stack([self.encoders[module_name(name)](inputs[name], keys) for name in self.schema.names], dim=2)

    def check_sampling(self) -> None:
        """The start-up guard of rule D5; see mc.check_sampling."""
        device = next(self.parameters()).device
        named = [(spec.name, self.encoders[module_name(spec.name)]) for spec in self.schema.modalities]
        check_sampling(named, {spec.name: _probe(spec, device) for spec in self.schema.modalities})

    def require_dropout(self, model: str) -> None:
        """Refuses encoders that can't sample, for models whose weights rest on the spread of passes.

        Raises:
            SpecError: an encoder without any MC dropout.
        """
        for spec in self.schema.modalities:
            if not has_dropout(self.encoders[module_name(spec.name)]):
                remedy = "Set its dropout above 0; without it every uncertainty is 0."
                raise SpecError(
                    explain(f"model {model}: encoder of {spec.name}", expected="MC dropout", found="none", remedy=remedy)
                )


def module_name(modality: str) -> str:
    """A modality's name as the name of a module, which may hold no dot and must not hide an attribute of the container."""
    return "m_" + modality.replace(".", "_dot_")


def _in_parts(keys: Tensor) -> tuple[Tensor, ...]:
    """Passes that go through the encoders together.

    Without gradients nothing but the features is kept, so on a CPU they go in parts that fit the cache: 30 passes take a third
    of the time. With gradients, or on a GPU, all go at once.
    """
    if torch.is_grad_enabled() or not keys.is_cpu:
        return (keys,)
    return torch.split(keys, max(1, _ROWS_AT_ONCE // max(1, keys.shape[1])))


def _probe(spec: ModalitySpec, device: torch.device) -> ModalityInput:
    """Two rows of a modality that differ along every axis; what they hold does not matter."""
    if isinstance(spec, ImageSpec):
        return _ramp((2, spec.channels, spec.height, spec.width), device)
    if isinstance(spec, VolumeSpec):
        return _ramp((2, spec.channels, *spec.delivered), device)
    steps = spec.num_steps if isinstance(spec, SeriesSpec) else 1
    values = _ramp((2, steps, len(spec.variables)), device)
    return SeriesInput(values, torch.ones_like(values, dtype=torch.bool), torch.full((2,), steps, device=device))


def _ramp(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel(), device=device).view(shape)

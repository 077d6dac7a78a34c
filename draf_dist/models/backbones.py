"""The encoders of all modalities: a batch in, one feature vector per pass, study and modality out."""

import torch
from torch import Tensor, nn

from draf_dist.errors import SpecError, explain
from draf_dist.models.absent import clear_absent, mask_absent
from draf_dist.models.encoders import EncoderChoice, EncoderConfig
from draf_dist.models.mc import Scope, check_sampling, has_dropout
from draf_dist.schema.batch import Batch, ModalityInput, SeriesInput
from draf_dist.schema.modality import DataSchema, ImageSpec, ModalitySpec, SeriesSpec, VolumeSpec

# Rows times passes per forward of an encoder on a CPU, where no gradient is wanted; fewer of what has a third dimension.
_ROWS_AT_ONCE = 256
_VOLUMES_AT_ONCE = 16
# What the start-up guard shows an encoder of volumes: two rows of a whole CT would take gigabytes.
_MAX_PROBE_SIDE = 64


class Backbones(nn.Module):
    """One encoder per modality. Every encoder runs on every row, whatever is missing (rule D1).

    With `mc_scope: head` dropout is left out of everything before the projections. So the trunks run once for all passes, and
    parameters and the masks of the projections are those of `full`.
    """

    def __init__(self, choice: EncoderChoice, schema: DataSchema, width: int) -> None:
        super().__init__()
        choice.check_names(schema)
        self.schema, self.choice, self.width = schema, choice, width
        self.mc_scope = choice.mc_scope
        configs = {spec.name: choice.of(spec) for spec in schema.modalities}
        if self.mc_scope == "head":
            configs = {name: _without_trunk_dropout(config) for name, config in configs.items()}
        self.encoders = nn.ModuleDict({module_name(spec.name): configs[spec.name].build(spec, width) for spec in schema.modalities})

    def forward(self, batch: Batch, keys: Tensor) -> Tensor:
        """Features f32 (S, B, M, Z) of keys (S, B), exactly 0 where a modality is absent."""
        return mask_absent(self.encode(clear_absent(batch), keys), batch.present)

    def encode(self, inputs: dict[str, ModalityInput], keys: Tensor) -> Tensor:
        """Features (S, B, M, Z) of inputs without NaN."""
        return torch.stack([self._passes(spec, inputs[spec.name], keys) for spec in self.schema.modalities], dim=2)

    def _passes(self, spec: ModalitySpec, value: ModalityInput, keys: Tensor) -> Tensor:
        """Features (S, B, Z) of one modality.

        Without gradients nothing but the features is kept, so on a CPU passes go in parts that fit the cache: 30 passes take a
        third of the time. With gradients, on a GPU, or where only the projection is repeated, all go at once.
        """
        encoder = self.encoders[module_name(spec.name)]
        if torch.is_grad_enabled() or not keys.is_cpu or self.mc_scope == "head":
            features: Tensor = encoder(value, keys)
            return features
        rows = _VOLUMES_AT_ONCE if isinstance(spec, VolumeSpec) else _ROWS_AT_ONCE
        parts = torch.split(keys, max(1, rows // max(1, keys.shape[1])))
        return torch.cat([encoder(value, part) for part in parts])

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


def mc_scope(model: nn.Module) -> Scope:
    """What the passes of a model draw anew: the label of every result that rests on them."""
    return "head" if any(isinstance(part, Backbones) and part.mc_scope == "head" for part in model.modules()) else "full"


def module_name(modality: str) -> str:
    """A modality's name as the name of a module, which may hold no dot and must not hide an attribute of the container."""
    return "m_" + modality.replace(".", "_dot_")


def _without_trunk_dropout(config: EncoderConfig) -> EncoderConfig:
    return config.model_copy(update={"dropout": 0.0})


def _probe(spec: ModalitySpec, device: torch.device) -> ModalityInput:
    """Two rows of a modality that differ along every axis; what they hold does not matter."""
    if isinstance(spec, ImageSpec):
        return _ramp((2, spec.channels, spec.height, spec.width), device)
    if isinstance(spec, VolumeSpec):
        return _ramp((2, spec.channels, *(min(side, _MAX_PROBE_SIDE) for side in spec.delivered)), device)
    steps = spec.num_steps if isinstance(spec, SeriesSpec) else 1
    values = _ramp((2, steps, len(spec.variables)), device)
    return SeriesInput(values, torch.ones_like(values, dtype=torch.bool), torch.full((2,), steps, device=device))


def _ramp(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel(), device=device).view(shape)

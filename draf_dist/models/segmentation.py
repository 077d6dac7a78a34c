"""The Bayesian stage of BSSL: an encoder, a variational decoder, heads for masks, classes or labels (proposal 2.2-2.3; spec 3.4).

From the proposal: the pre-trained encoder with features at several scales, Bayesian layers in the decoder and in the heads, several
heads on one backbone, attention at several levels. Ours: the U-Net itself, that the encoder is deterministic (spec 3.4), and that
predictions go through the attention maps, so that these say what they rest on and are trained where nothing else asks for them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from draf_dist.config.spec import Spec
from draf_dist.errors import SpecError, explain
from draf_dist.models.absent import clear_absent
from draf_dist.models.backbones import module_name
from draf_dist.models.encoders.image2d import Dimensions, Image2dConfig
from draf_dist.models.encoders.volume3d import Volume3dConfig
from draf_dist.models.link import link_of
from draf_dist.models.mc import name_streams
from draf_dist.models.reliability import equal_weights
from draf_dist.models.spatial_attention import Attention, SpatialAttention, attention_entropy, relative_to_peak
from draf_dist.models.streamed import streamed
from draf_dist.models.unet import LayerOptions, PyramidDecoder, PyramidEncoder, WeightName
from draf_dist.models.variational import RHO_INIT, Draws, name_draws, posterior_moments, posterior_sigma
from draf_dist.schema.batch import Batch, FusionOutput
from draf_dist.schema.label import SegmentationSpec, TaskSpec
from draf_dist.schema.modality import DataSchema, ImageSpec, VolumeSpec


class BayesianUnetConfig(Spec):
    """A U-Net on one image or volume.

    modality: what it reads; None: that of the masks, or the only one there is. widths: channels of each level; the first is at
    half the resolution. heads: what else is asked of the same backbone, by name, besides the label of the release. weights:
    `point` with dropout 0 is the deterministic network, with a dropout that of MC dropout (the baselines of spec 3.7).
    """

    kind: Literal["bayesian_unet"] = "bayesian_unet"
    modality: str | None = None
    widths: tuple[int, ...] = Field((16, 32, 64), min_length=1)
    groups: int = Field(8, ge=1)
    weights: WeightName = "gaussian"
    rho_init: float = RHO_INIT
    dropout: float = Field(0.0, ge=0, lt=1)
    heads: dict[str, TaskSpec] = {}

    def build(self, schema: DataSchema) -> "BayesianUnet":
        """The model for one data schema.

        Raises:
            SpecError: see image_of and tasks_of.
        """
        model = BayesianUnet(self, schema)
        name_streams(model)
        name_draws(model)
        return model

    def image_of(self, schema: DataSchema) -> ImageSpec | VolumeSpec:
        """What it reads.

        Raises:
            SpecError: there is no such image or volume, or it is not said which of several.
        """
        images = {spec.name: spec for spec in schema.modalities if isinstance(spec, ImageSpec | VolumeSpec)}
        asked = schema.label.modality if isinstance(schema.label, SegmentationSpec) else None
        name = self.modality or asked or (next(iter(images)) if len(images) == 1 else None)
        if name not in images:
            remedy = f"Known: {', '.join(images)}." if images else "Choose a model that reads what there is."
            found = "none" if name is None else repr(name)
            raise SpecError(explain("model.modality", expected="an image or a volume of the release", found=found, remedy=remedy))
        return images[name]

    def encoder_of(self, spec: ImageSpec | VolumeSpec) -> Image2dConfig | Volume3dConfig:
        """The encoder whose parameters, but for its projection, are those of the model's own."""
        kind = Image2dConfig if isinstance(spec, ImageSpec) else Volume3dConfig
        return kind(widths=self.widths, groups=self.groups)

    def tasks_of(self, schema: DataSchema) -> dict[str, TaskSpec]:
        """All that is predicted, by name; the label of the release comes first.

        Raises:
            SpecError: a head has the label's name, or masks are those of another modality.
        """
        if schema.label.name in self.heads:
            remedy = "The label of the release has a head already."
            raise SpecError(explain("model.heads", expected="other names", found=repr(schema.label.name), remedy=remedy))
        tasks = {schema.label.name: schema.label, **self.heads}
        image = self.image_of(schema).name
        for name, task in tasks.items():
            if isinstance(task, SegmentationSpec) and task.modality != image:
                remedy = "A mask has the grid of the image that it was drawn on."
                raise SpecError(explain(f"masks of {name}", expected=f"masks of {image}", found=task.modality, remedy=remedy))
        return tasks


@dataclass(frozen=True)
class Encoded:
    """What is the same in every pass. image: f32 (B, C, *space), 0 where absent. features: (B, C_l, *space_l), finest first."""

    image: Tensor
    features: list[Tensor]
    attention: Attention


@dataclass(frozen=True)
class Decoded:
    """What the heads read. maps: D (S, B, C, *space); attended: D (1 + A / max A), of the same shape.

    fine: sum_v A(v) D(v), (S, B, C). coarse: beta_l sum_v A^l(v) F^l(v) of all levels side by side, (B, sum_l C_l).
    """

    maps: Tensor
    attended: Tensor
    fine: Tensor
    coarse: Tensor


class BayesianUnet(nn.Module):
    """x -> features F^l -> attention A -> decoder D_t -> heads, T draws of the weights of decoder and heads.

    A mask is a 1x1 convolution of D_t (1 + A / max A). Everything else is linear in what A and the A^l pool: what no attention lies
    on has no part in it.
    """

    def __init__(self, config: BayesianUnetConfig, schema: DataSchema) -> None:
        super().__init__()
        self.config = config
        spec = config.image_of(schema)
        self.modality, self.axis = spec.name, schema.names.index(spec.name)
        self.tasks, self.label = config.tasks_of(schema), schema.label.name
        dimensions: Dimensions = 2 if isinstance(spec, ImageSpec) else 3
        options = LayerOptions(dimensions, config.groups, config.weights, config.rho_init, config.dropout)
        self.encoder = PyramidEncoder(spec.channels, config.widths, dimensions, config.groups)
        self.attention = SpatialAttention(config.widths, dimensions)
        self.decoder = PyramidDecoder(spec.channels, config.widths, options)
        self.heads = nn.ModuleDict({module_name(name): _head(task, config.widths, options) for name, task in self.tasks.items()})

    def forward(self, batch: Batch, keys: Tensor, weight_keys: Tensor | None = None) -> FusionOutput:
        """The prediction of S passes of a normalised batch; keys int64 (S, B).

        weight_keys: int64 (S,) of variational.weight_keys, for weights that are sampled; None: local reparameterisation.
        logits: (S, B, K), of masks (S, B, K, *space). parts: `logits/<head>` (B, S, ...) of the other heads; `attention`, A
        (B, *space); `epistemic_map` (B, *space), without gradient, see `epistemic_map`; `posterior` (B, 4), posterior_moments in
        every row. Reliability is 1 / n: one modality is read, the others may hold annotations.
        """
        encoded = self.encode(batch)
        draws = Draws(keys, weight_keys)
        decoded = self.decode(encoded, draws)
        logits = self.predict(decoded, draws)
        moments = posterior_moments(self).expand(batch.num_rows, -1)
        uncertainty, epistemic = self.uncertainties(logits[self.label], decoded.maps)
        others = {f"logits/{name}": value.transpose(0, 1) for name, value in logits.items() if name != self.label}
        attention = encoded.attention.composite
        return FusionOutput(
            logits=logits[self.label],
            reliability=equal_weights(batch.present),
            uncertainty={name: self._at_axis(value, batch.present) for name, value in uncertainty.items()},
            features=self._at_axis(torch.cat([decoded.fine.mean(0), decoded.coarse], dim=1), batch.present),
            parts={"attention": attention, "epistemic_map": epistemic, "posterior": moments, **others},
            signals={
                "attention_entropy": attention_entropy(attention.detach()),
                "posterior_sigma": posterior_sigma(moments.detach()),
            },
        )

    def encode(self, batch: Batch) -> Encoded:
        """The part without draws."""
        image = clear_absent(batch)[self.modality]
        assert isinstance(image, Tensor)  # the schema says so
        features = self.encoder(image)
        return Encoded(image, features, self.attention(features, image.shape[2:]))

    def decode(self, encoded: Encoded, draws: Draws) -> Decoded:
        """What the heads read, of every pass."""
        attention = encoded.attention
        maps: Tensor = self.decoder(encoded.image, encoded.features, draws)
        # Nothing was drawn yet where weights are points.
        maps = maps.expand(draws.study.shape[0], *maps.shape[1:])
        levels = [
            beta * torch.einsum("bcv,bv->bc", features.flatten(2), weights.flatten(1))
            for beta, features, weights in zip(attention.beta, encoded.features, attention.levels, strict=True)
        ]
        return Decoded(
            maps=maps,
            attended=maps * (1 + relative_to_peak(attention.composite).unsqueeze(1)),
            fine=torch.einsum("sbcv,bv->sbc", maps.flatten(3), attention.composite.flatten(1)),
            coarse=torch.cat(levels, dim=1),
        )

    def predict(self, decoded: Decoded, draws: Draws) -> dict[str, Tensor]:
        """The logits of every task: (S, B, K, *space) of a mask, (S, B, K) of anything else."""
        return {name: self.heads[module_name(name)](decoded, draws) for name in self.tasks}

    def passes(self, batch: Batch, keys: Tensor, weight_keys: Tensor | None = None) -> Iterator[Tensor]:
        """The logits (B, K, ...) of the label, one pass after the other, for models/streamed.py; the encoder runs once."""
        encoded = self.encode(batch)
        for number in range(keys.shape[0]):
            part = slice(number, number + 1)
            draws = Draws(keys[part], None if weight_keys is None else weight_keys[part])
            yield self.predict(self.decode(encoded, draws), draws)[self.label][0]

    @torch.no_grad()
    def uncertainties(self, logits: Tensor, maps: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Those of the label, each (B,), of a mask the mean over places; and the map of the epistemic one, (B, *space).

        Where the label is no mask, no place has an uncertainty of its own: the map is the variance over passes of the class
        activation, the mean weights of the head times D_t, in the mean over classes (spec 3.6).
        """
        link, head = link_of(self.tasks[self.label]), self.heads[module_name(self.label)]
        if isinstance(head, PooledHead):
            return link.uncertainties(logits), head.activation(maps).var(0, correction=0).mean(-1)
        found = streamed(logits.unbind(), link).uncertainties()
        return {name: value.flatten(1).mean(1) for name, value in found.items()}, found["epistemic"]

    def start_encoder(self, state: Mapping[str, Tensor]) -> None:
        """Copies a pre-trained `image2d` or `volume3d` encoder into this one; its projection has nothing to do here.

        Raises:
            SpecError: it has other parameters: its widths or groups of channels are not those of this model.
        """
        own = self.encoder.state_dict()
        strange = sorted(name for name in own if name not in state or state[name].shape != own[name].shape)
        if strange or any(name.startswith("blocks.") and name not in own for name in state):
            found = f"another {strange[0]}" if strange else "more blocks"
            remedy = "Give the model the widths of the encoder that was pre-trained."
            raise SpecError(explain("pretrained encoder", expected="that of this model", found=found, remedy=remedy))
        self.encoder.load_state_dict({name: state[name] for name in own})

    def _at_axis(self, values: Tensor, present: Tensor) -> Tensor:
        """Values (B, ...) of the image as (B, M, ...), 0 for every other modality and where it is absent."""
        is_image = functional.one_hot(torch.tensor(self.axis), present.shape[1]).bool().to(present.device)
        shown = (present & is_image).view(*present.shape, *[1] * (values.dim() - 1))
        return torch.where(shown, values.unsqueeze(1), 0.0)


class MaskHead(nn.Module):
    """Logits of every place: a 1x1 convolution of the attended decoder."""

    def __init__(self, width: int, outputs: int, options: LayerOptions) -> None:
        super().__init__()
        self.conv = options.conv(width, outputs, 1, bias=True)

    def forward(self, decoded: Decoded, draws: Draws) -> Tensor:
        """Logits (S, B, K, *space)."""
        logits: Tensor = self.conv(decoded.attended, draws)
        return logits


class PooledHead(nn.Module):
    """Logits of a whole image: one linear map of the pooled decoder, one of the pooled encoder."""

    def __init__(self, fine: int, coarse: int, outputs: int, options: LayerOptions) -> None:
        super().__init__()
        self.fine = options.linear(fine, outputs)
        self.coarse = options.linear(coarse, outputs, bias=False)

    def forward(self, decoded: Decoded, draws: Draws) -> Tensor:
        """Logits (S, B, K)."""
        logits: Tensor = self.fine(decoded.fine, draws) + self.coarse(decoded.coarse.unsqueeze(0), draws)
        return logits

    def activation(self, maps: Tensor) -> Tensor:
        """What each place of D (S, B, C, *space) speaks for, by the mean weights: (S, B, *space, K)."""
        return self.fine.expected(maps.movedim(2, -1))


def _head(task: TaskSpec, widths: tuple[int, ...], options: LayerOptions) -> nn.Module:
    outputs = len(task.outputs)
    if isinstance(task, SegmentationSpec):
        return MaskHead(widths[0], outputs, options)
    return PooledHead(widths[0], sum(widths), outputs, options)

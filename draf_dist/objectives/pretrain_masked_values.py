"""Masked values: a series encoder learns, without labels, to say from the rest of a series what was hidden of it."""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from draf_dist import noise
from draf_dist.config.spec import Spec
from draf_dist.errors import SpecError, explain
from draf_dist.losses.gather import Gather, one_process
from draf_dist.models.absent import clear_absent
from draf_dist.models.encoders import EncoderConfig
from draf_dist.models.masked_values import MaskedValuesNet, StepEncoder
from draf_dist.objectives.pretrain_modality import encoder_config, modality_of, not_readable
from draf_dist.schema.batch import Batch, SeriesInput, Term
from draf_dist.schema.modality import DataSchema, SeriesSpec


class MaskedValuesConfig(Spec):
    """The mean squared error of hidden z-scores; share of the observed values that is hidden, each by its own coin."""

    kind: Literal["masked_values"] = "masked_values"
    modality: str
    share: float = Field(0.3, gt=0, lt=1)

    def build(self, seed: int, gather: Gather = one_process) -> "MaskedValuesObjective":
        """The objective. seed: of what is hidden. gather: not needed, no row looks at another."""
        return MaskedValuesObjective(self, seed)

    def network(self, schema: DataSchema, encoder: EncoderConfig | None, width: int) -> MaskedValuesNet:
        """The network that the objective trains.

        Raises:
            SpecError: the modality is no series of this schema, or the encoder reads no series, or no steps.
        """
        spec = modality_of(schema, self.modality, SeriesSpec)
        built = encoder_config(encoder, spec).build(spec, width)
        if not isinstance(built, StepEncoder):
            remedy = "Choose series_transformer or gru."
            found = "one of the whole series alone"
            raise SpecError(explain("encoder", expected="an encoder with a token of every step", found=found, remedy=remedy))
        return MaskedValuesNet(built, width, len(spec.variables))


class MaskedValuesObjective:
    """Terms of one batch, both means over the hidden values.

    masked_values: the squared error. baseline: that of saying 0, the training mean, whatever the series; of scale 0.
    """

    def __init__(self, config: MaskedValuesConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    def __call__(self, model: nn.Module, batch: Batch, keys: Tensor, /) -> dict[str, Term]:
        """Runs a MaskedValuesNet on what is left of the series.

        Raises:
            SpecError: the modality is not in the batch or is no series.
        """
        series = self._series(batch)
        hidden = self.hidden(batch, series)
        visible = SeriesInput(torch.where(hidden, 0.0, series.values), series.observed & ~hidden, series.length)
        found: Tensor = model(visible, keys[0])
        return {
            "masked_values": _squared(found - series.values, hidden),
            "baseline": replace(_squared(series.values, hidden), scale=0.0),
        }

    def hidden(self, batch: Batch, series: SeriesInput) -> Tensor:
        """Which values are hidden, bool (B, T, F), of those observed: a function of (seed, modality, epoch, uid, element)."""
        keys = noise.sample_keys(self.seed, f"masked_values/{self.config.modality}", batch.epoch, batch.uid, 1)[0]
        return noise.bernoulli(keys, tuple(series.values.shape[1:]), self.config.share) & series.observed

    def numbers(self, means: dict[str, float]) -> dict[str, float]:
        """The error as `loss`, the baseline, and as `explained` the share of the variance that the network accounts for."""
        loss, baseline = means["masked_values"], means["baseline"]
        return {"loss": loss, "baseline": baseline, "explained": 1 - loss / baseline if baseline > 0 else 0.0}

    def _series(self, batch: Batch) -> SeriesInput:
        """The series with zeros, and nothing observed, wherever nothing counts: padding, absent, past the length."""
        counted = replace(batch, present=batch.present & (batch.weight > 0)[:, None])
        inputs = clear_absent(counted)
        series = inputs.get(self.config.modality)
        if not isinstance(series, SeriesInput):
            known = tuple(name for name, value in inputs.items() if isinstance(value, SeriesInput))
            raise not_readable(self.config.modality, SeriesSpec, known)
        return series


def _squared(error: Tensor, counted: Tensor) -> Term:
    """The mean of the squares where counted."""
    return Term(torch.where(counted, error, 0.0).square().sum(), counted.sum().to(error.dtype))

"""The exchange form of a pre-trained encoder: what fine-tuning loads. Never a pickle."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import Field, ValidationError
from torch import nn

from draf_dist import __version__
from draf_dist.config.spec import canonical_json
from draf_dist.errors import SpecError, explain, together
from draf_dist.models.encoders import EncoderConfig
from draf_dist.models.exchange import check_digest, digest, fill, require_files, unreadable, weights_of
from draf_dist.schema.modality import ImageSpec, ModalitySpec, SeriesSpec, VariableSpec, VolumeSpec
from draf_dist.schema.record import Record
from draf_dist.schema.release import ReleaseStats

ENCODER_WEIGHTS, ENCODER_DESCRIPTION, ENCODER_STATS, ENCODER_CARD = "encoder.safetensors", "encoder.json", "stats.json", "README.md"
ENCODER_FILES = (ENCODER_WEIGHTS, ENCODER_DESCRIPTION, ENCODER_STATS)


class EncoderDescription(Record):
    """encoder.json: what is needed to build the encoder again, where it comes from, and digests of what lies beside it.

    objective: the kind of pre-training. release: URL@version of what it was trained on. width: of its features.
    """

    format: int = Field(1, ge=1, le=1)
    draf_dist: str
    objective: str
    release: str
    modality: ModalitySpec
    encoder: EncoderConfig
    width: int
    weights_sha256: str
    stats_sha256: str

    def check_fits(self, spec: ModalitySpec, encoder: EncoderConfig, width: int, *, where: str) -> None:
        """Refuses to stand in for another encoder; all differences at once.

        Raises:
            SpecError: the modality is of another kind or shape, or has other variables; the config or the width differs.
        """
        pairs: list[tuple[str, str, str]] = [(f"kind of {spec.name}", spec.kind, self.modality.kind)]
        if spec.kind == self.modality.kind:
            there = _reading(self.modality)
            pairs += [(f"{key} of {spec.name}", value, there[key]) for key, value in _reading(spec).items()]
            pairs += _config_pairs(encoder, self.encoder)
            pairs.append(("model.width", str(width), str(self.width)))
        remedy = "Give the job the encoder that was pre-trained, or pre-train this one."
        problems = [
            explain(f"{where}: {what}", expected=wanted, found=found, remedy=remedy)
            for what, wanted, found in pairs
            if wanted != found
        ]
        if problems:
            raise SpecError(together(problems))


@dataclass(frozen=True)
class ExportedEncoder:
    """A pre-trained encoder, with the statistics of what it was trained on."""

    encoder: nn.Module
    description: EncoderDescription
    stats: ReleaseStats


def encoder_files(
    encoder: nn.Module,
    *,
    config: EncoderConfig,
    spec: ModalitySpec,
    width: int,
    objective: str,
    release: str,
    stats: ReleaseStats,
) -> dict[str, bytes]:
    """The files of model/ by name, for any store. The same encoder gives the same bytes."""
    weights, stats_json = weights_of(encoder), canonical_json(stats)
    description = EncoderDescription(
        draf_dist=__version__,
        objective=objective,
        release=release,
        modality=spec,
        encoder=config,
        width=width,
        weights_sha256=digest(weights),
        stats_sha256=digest(stats_json),
    )
    num_parameters = sum(parameter.numel() for parameter in encoder.parameters())
    return {
        ENCODER_WEIGHTS: weights,
        ENCODER_STATS: stats_json,
        ENCODER_CARD: _card(description, num_parameters).encode(),
        ENCODER_DESCRIPTION: json.dumps(description.model_dump(mode="json"), indent=2).encode(),
    }


def read_description(content: bytes, *, where: str) -> EncoderDescription:
    """The description in encoder.json.

    Raises:
        DataError: it is none of this version.
    """
    try:
        return EncoderDescription.model_validate_json(content)
    except ValidationError as error:
        raise unreadable(where, f"the description of an encoder of draf_dist {__version__}", error) from error


def read_encoder(files: Mapping[str, bytes], *, where: str) -> ExportedEncoder:
    """The encoder in the files of model/, checked against their digests, and every tensor against name and shape.

    Raises:
        DataError: a file is missing, damaged, or not what the description says.
    """
    require_files(files, ENCODER_FILES, where=where, what="a pre-trained encoder")
    description = read_description(files[ENCODER_DESCRIPTION], where=f"{where}/{ENCODER_DESCRIPTION}")
    for name, wanted in ((ENCODER_WEIGHTS, description.weights_sha256), (ENCODER_STATS, description.stats_sha256)):
        check_digest(files[name], wanted, where=f"{where}/{name}")
    encoder = description.encoder.build(description.modality, description.width)
    fill(encoder, files[ENCODER_WEIGHTS], where=f"{where}/{ENCODER_WEIGHTS}")
    try:
        stats = ReleaseStats.model_validate_json(files[ENCODER_STATS])
    except ValidationError as error:
        raise unreadable(f"{where}/{ENCODER_STATS}", "statistics of a release", error) from error
    return ExportedEncoder(encoder, description, stats)


def _reading(spec: ModalitySpec) -> dict[str, str]:
    """What an encoder of this modality takes for granted: not its name, nor which values were held plausible."""
    if isinstance(spec, ImageSpec):
        return {"size": f"{spec.channels} x {spec.height} x {spec.width}"}
    if isinstance(spec, VolumeSpec):
        sides, spacing = (" x ".join(f"{value:g}" for value in values) for values in (spec.delivered, spec.spacing_mm))
        return {"size": f"{spec.channels} x {sides}", "spacing": f"{spacing} mm"}
    variables = ", ".join(f"{one.name} [{_stored_as(one)}]" for one in spec.variables)
    grid = {"steps": f"{spec.num_steps} of {spec.step_h:g} h"} if isinstance(spec, SeriesSpec) else {}
    return {"variables": variables, **grid}


def _stored_as(variable: VariableSpec) -> str:
    """The unit of a number; of codes what each of them means, in their order: another order is another meaning."""
    if variable.categories:
        return f"categorical: {' / '.join(variable.categories)}"
    return f"{variable.unit}{', binary' if variable.type == 'binary' else ''}"


def _config_pairs(wanted: EncoderConfig, found: EncoderConfig) -> list[tuple[str, str, str]]:
    """(key, wanted, found) of every key of either config."""
    left, right = wanted.model_dump(mode="json"), found.model_dump(mode="json")
    return [(f"encoder: {key}", str(left.get(key, "no such key")), str(right.get(key, "no such key"))) for key in {**left, **right}]


def _card(description: EncoderDescription, num_parameters: int) -> str:
    """The model card: markdown text; nothing in it depends on a subject."""
    return f"""# Pre-trained encoder of {description.modality.name} ({description.objective})

- Reads modality **{description.modality.name}** ({description.modality.kind}); gives {description.width} features.
- {num_parameters:,} parameters of kind `{description.encoder.kind}`, trained without labels on `{description.release}`.

| reads | |
|---|---|
{chr(10).join(f"| {key} | {value} |" for key, value in _reading(description.modality).items())}

## Use
A fine-tuning job starts from it with `pretrained: {{{description.modality.name}: <URL of this run>}}`; its encoder and width must
be these. Inputs are normalised with the statistics of the release they come from; `stats.json` holds those of pre-training. The
files hold no code and no pickle.

## Limits
For research. It predicts nothing by itself. What it has learned of the acquisition (sites, devices) stands in the run's metrics.
"""

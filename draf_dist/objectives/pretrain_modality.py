"""Which modality is pre-trained, and by which encoder."""

from typing import TypeVar

from draf_dist.errors import SpecError, explain
from draf_dist.models.encoders import EncoderChoice, EncoderConfig
from draf_dist.schema.modality import DataSchema, ImageSpec, ModalitySpec, SeriesSpec, VolumeSpec

SpecT = TypeVar("SpecT", ImageSpec, VolumeSpec, SeriesSpec)


def modality_of(schema: DataSchema, name: str, kind: type[SpecT]) -> SpecT:
    """The modality of that name.

    Raises:
        SpecError: there is none, or it is of another kind.
    """
    specs = [spec for spec in schema.modalities if isinstance(spec, kind)]
    for spec in specs:
        if spec.name == name:
            return spec
    raise not_readable(name, kind, tuple(spec.name for spec in specs))


def picture_of(schema: DataSchema, name: str) -> ImageSpec | VolumeSpec:
    """The image or volume of that name.

    Raises:
        SpecError: there is none, or it is of another kind.
    """
    pictures = {spec.name: spec for spec in schema.modalities if isinstance(spec, ImageSpec | VolumeSpec)}
    if name not in pictures:
        raise no_picture(name, tuple(pictures))
    return pictures[name]


def no_picture(name: str, known: tuple[str, ...]) -> SpecError:
    """The refusal of a modality that is neither an image nor a volume."""
    return _not_of_kind(name, "image or volume", known)


def not_readable(name: str, kind: type[SpecT], known: tuple[str, ...]) -> SpecError:
    """The refusal of a modality that the objective can't read; known are those that it can."""
    return _not_of_kind(name, kind.model_fields["kind"].default, known)


def _not_of_kind(name: str, kind: str, known: tuple[str, ...]) -> SpecError:
    what = f"one of kind {kind} in the release"
    remedy = f"Choose one of {', '.join(known)}." if known else "Choose another objective, or another release."
    return SpecError(explain("objective.modality", expected=what, found=repr(name), remedy=remedy))


def encoder_config(encoder: EncoderConfig | None, spec: ModalitySpec) -> EncoderConfig:
    """The encoder that a job means: its own, or the default of the modality's kind."""
    return EncoderChoice().of(spec) if encoder is None else encoder

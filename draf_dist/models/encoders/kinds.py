"""Which kind of modality an encoder reads."""

from typing import Literal

from draf_dist.errors import SpecError, explain
from draf_dist.schema.modality import ModalitySpec, VolumeSpec


def wrong_kind(encoder: str, *, reads: Literal["image", "series", "table"], spec: ModalitySpec) -> SpecError:
    """The refusal of an encoder that was given to a modality of another kind."""
    remedy = f"Choose an encoder of {spec.kind} modalities for it."
    return SpecError(
        explain(
            f"model.encoders: {encoder} for {spec.name}", expected=f"a modality of kind {reads}", found=spec.kind, remedy=remedy
        )
    )


def no_volume_encoder(spec: VolumeSpec) -> SpecError:
    """The refusal of a model on a release that has a 3-D image."""
    remedy = "Volumes can be prepared and streamed, but no model reads them yet: train on a release whose card leaves this one out."
    return SpecError(
        explain(
            f"model.encoders: {spec.name}", expected="a modality of kind image, series or table", found=spec.kind, remedy=remedy
        )
    )

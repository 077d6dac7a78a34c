"""Which kind of modality an encoder reads."""

from draf_dist.errors import SpecError, explain
from draf_dist.schema.modality import ModalitySpec


def wrong_kind(encoder: str, *, reads: str, spec: ModalitySpec) -> SpecError:
    """The refusal of an encoder that was given to a modality of another kind."""
    remedy = f"Choose an encoder of {spec.kind} modalities for it."
    return SpecError(
        explain(
            f"model.encoders: {encoder} for {spec.name}", expected=f"a modality of kind {reads}", found=spec.kind, remedy=remedy
        )
    )

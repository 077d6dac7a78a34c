"""Which kind of modality an encoder reads."""

from collections.abc import Iterable

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


def no_codes(encoder: str, spec: ModalitySpec, codes: Iterable[str]) -> SpecError:
    """The refusal of an encoder of numbers that was given a table with categorical variables."""
    remedy = "Read the table with kind tabular, which embeds them, or put them in a table of their own."
    found = f"categorical {', '.join(codes)}"
    return SpecError(explain(f"model.encoders: {encoder} for {spec.name}", expected="numbers alone", found=found, remedy=remedy))

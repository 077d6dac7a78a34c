"""What a release holds: modalities in axis order, their variables, the label."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Record(BaseModel):
    """Base of everything that is stored as JSON: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class VariableSpec(Record):
    """One column of a series or table, in its canonical unit.

    low and high bound what is plausible, both inclusive, in the canonical unit; None means unbounded. A value outside is
    not observed. Binary variables are 0 or 1 and are not standardised.
    """

    name: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    type: Literal["numeric", "binary"] = "numeric"


class ImageSpec(Record):
    """A 2-D image, uint8, as it is stored: (C, H, W)."""

    kind: Literal["image"] = "image"
    name: str
    channels: int = Field(1, ge=1)
    height: int = Field(ge=8)
    width: int = Field(ge=8)


class SeriesSpec(Record):
    """Timed values on a regular grid of T steps that ends at the anchor: (T, F), NaN on disk where not observed."""

    kind: Literal["series"] = "series"
    name: str
    variables: tuple[VariableSpec, ...]
    num_steps: int = Field(ge=1)
    step_h: float = Field(gt=0)


class TableSpec(Record):
    """One row of values known at the anchor: (1, F), NaN on disk where not observed. A series of one step."""

    kind: Literal["table"] = "table"
    name: str
    variables: tuple[VariableSpec, ...]


ModalitySpec = Annotated[ImageSpec | SeriesSpec | TableSpec, Field(discriminator="kind")]


class LabelSpec(Record):
    """The class label: names in index order; K = len(classes) >= 2."""

    name: str
    classes: tuple[str, ...] = Field(min_length=2)


class DataSchema(Record):
    """schema.json of a release. Axis M of every (B, M) tensor follows `modalities`; Batch.site indexes `sites`."""

    modalities: tuple[ModalitySpec, ...] = Field(min_length=1)
    label: LabelSpec
    sites: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Modality names in axis order."""
        return tuple(spec.name for spec in self.modalities)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.label.classes)

"""What a release asks of a model: one class, several labels at once, the time of an event, or a mask."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from draf_dist.schema.record import Record


class LabelSpec(Record):
    """The class label: names in index order; K = len(classes) >= 2."""

    name: str
    classes: tuple[str, ...] = Field(min_length=2)

    @property
    def outputs(self) -> tuple[str, ...]:
        """What a model gives one logit each, K in all."""
        return self.classes


class MultiLabelSpec(Record):
    """K labels of which any number is true; each is known or not by itself."""

    kind: Literal["multilabel"] = "multilabel"
    name: str
    labels: tuple[str, ...] = Field(min_length=1)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The labels."""
        return self.labels


class SurvivalSpec(Record):
    """The time to an event, in K = len(edges) + 1 intervals: [0, e_1), [e_1, e_2), ..., [e_(K-1), inf).

    edges: in `unit`, rising and above 0. A model gives the logit of the hazard of every interval.
    """

    kind: Literal["survival"] = "survival"
    name: str
    unit: str = "days"
    edges: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _edges_rise(self) -> "SurvivalSpec":
        if any(low >= high for low, high in pairwise(self.edges)):
            raise ValueError(f"edges must rise, found {list(self.edges)}")
        return self

    @property
    def outputs(self) -> tuple[str, ...]:
        """The intervals."""
        bounds = ("0", *(f"{edge:g}" for edge in self.edges), "inf")
        return tuple(f"[{low}, {high}) {self.unit}" for low, high in pairwise(bounds))


# In a mask: a voxel of which nobody says what it is. It counts in no loss and no metric.
IGNORED = -1


class SegmentationSpec(Record):
    """A class for every voxel of one modality's volume or image; the first is the background."""

    kind: Literal["segmentation"] = "segmentation"
    name: str
    modality: str
    structures: tuple[str, ...] = Field(min_length=2)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The structures."""
        return self.structures


def _kind(value: object) -> str:
    """A class label has no kind: it was the only one when the format began."""
    return str(value.get("kind", "class")) if isinstance(value, Mapping) else _KINDS.get(type(value), "")


_KINDS: dict[type[Any], str] = {
    LabelSpec: "class",
    MultiLabelSpec: "multilabel",
    SurvivalSpec: "survival",
    SegmentationSpec: "segmentation",
}
TaskSpec = Annotated[
    Annotated[LabelSpec, Tag("class")]
    | Annotated[MultiLabelSpec, Tag("multilabel")]
    | Annotated[SurvivalSpec, Tag("survival")]
    | Annotated[SegmentationSpec, Tag("segmentation")],
    Discriminator(_kind),
]

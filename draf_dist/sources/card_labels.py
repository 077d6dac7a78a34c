"""Labels of a card: a class, several labels at once, or the time of an event, in columns of the studies table; or a mask."""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from draf_dist.config.spec import kind_or
from draf_dist.schema.label import LabelSpec, MultiLabelSpec, SurvivalSpec
from draf_dist.sources.card_parts import CardPart, Name
from draf_dist.sources.card_segmentation import SegmentationCard, Values


class LabelCard(CardPart):
    """A class label in a column of the studies table.

    classes: names in index order. values: what the cell says -> class (default: the cell says the class). A cell that is missing
    or says something else leads to a rejection. Numbers compare as numbers: 1 and 1.0 are the same. where: column -> values, as
    that of a table: the rows of the studies table that count while this label is the chosen one.
    """

    column: str
    classes: tuple[str, ...] = Field(min_length=2)
    values: dict[str, str] = Field(default_factory=dict)
    where: dict[str, Values] = Field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        """What is read of the studies table."""
        return (self.column,)

    def spec(self, name: str) -> LabelSpec:
        """What the release asks for."""
        return LabelSpec(name=name, classes=self.classes)


class MultiLabelCard(CardPart):
    """Several labels of which any number holds, each in a column of its own.

    labels: label -> column, in index order. yes, no: what a cell says where the label holds, and where it does not. unknown: what
    it says where nobody knows, beside the card's `missing`. A cell that says something else, or a row in which no label is known,
    leads to a rejection.
    """

    kind: Literal["multilabel"]
    labels: dict[Name, str] = Field(min_length=1)
    yes: tuple[str, ...] = ("1",)
    no: tuple[str, ...] = ("0",)
    unknown: tuple[str, ...] = ()
    where: dict[str, Values] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_meaning(self) -> "MultiLabelCard":
        said = (*self.yes, *self.no, *self.unknown)
        if len(said) != len(set(said)):
            raise ValueError("a value stands twice in yes, no and unknown")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """What is read of the studies table."""
        return tuple(self.labels.values())

    def spec(self, name: str) -> MultiLabelSpec:
        """What the release asks for."""
        return MultiLabelSpec(name=name, labels=tuple(self.labels))


class SurvivalCard(CardPart):
    """The time of an event, counted from the study's anchor, or until when it had not happened.

    time: a column of numbers. event: a column; happened, censored: what it says. unit: of the times and of `edges`, which cut time
    into the intervals of discrete-time survival (quartiles of the times of events in training are usual).
    A negative or missing time, or another word about the event, leads to a rejection.
    """

    kind: Literal["survival"]
    time: str
    event: str
    happened: tuple[str, ...] = ("1",)
    censored: tuple[str, ...] = ("0",)
    unit: str = "days"
    edges: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(min_length=1)
    where: dict[str, Values] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_sound(self) -> "SurvivalCard":
        if set(self.happened) & set(self.censored):
            raise ValueError("a value stands in both happened and censored")
        if any(low >= high for low, high in pairwise(self.edges)):
            raise ValueError(f"edges must rise, found {list(self.edges)}")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """What is read of the studies table."""
        return (self.time, self.event)

    def spec(self, name: str) -> SurvivalSpec:
        """What the release asks for."""
        return SurvivalSpec(name=name, unit=self.unit, edges=self.edges)


AnyLabelCard = Annotated[
    Annotated[LabelCard, Tag("class")]
    | Annotated[MultiLabelCard, Tag("multilabel")]
    | Annotated[SurvivalCard, Tag("survival")]
    | Annotated[SegmentationCard, Tag("segmentation")],
    Discriminator(kind_or("class")),
]

"""The part of a card that says where the masks of a volume lie and what their values mean."""

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from draf_dist.schema.label import SegmentationSpec
from draf_dist.sources.card_parts import CardPart, Name

BACKGROUND = "background"
# What a mask's voxels can say at all: whole numbers that every common format of masks holds.
LARGEST_VALUE = 2**24
# More than any atlas has; a longer range is a slip of the pen.
LARGEST_RANGE = 65_536

Values = str | tuple[str, ...]
# A value, or `100-207` for all from 100 to 207.
MaskValue = Annotated[str, Field(pattern=r"^[0-9]{1,8}(-[0-9]{1,8})?$")]


class SegmentationCard(CardPart):
    """A class for every voxel of one modality's volumes, from a second volume beside each: the mask.

    modality: whose volumes were outlined. path: where a mask lies below the raw folder, with `{site}` and `{file}`. file: the
    column of the modality's table that fills `{file}` (default: that of the modality itself). A study whose cell is empty, or
    whose mask is not there, has no label: it is kept, with its target hidden.
    structures: name -> the values in a mask that mean it, in index order from 1; many values may mean one. Index 0 is the
    background: the values in `background`. others: what all further values mean; without it a mask that has one is refused.
    `ignored` voxels count in no loss and no metric. where: as that of any label.
    """

    kind: Literal["segmentation"]
    modality: Name
    path: str
    file: str | None = None
    structures: dict[Name, tuple[MaskValue, ...]] = Field(min_length=1)
    background: tuple[MaskValue, ...] = ("0",)
    others: Literal["background", "ignored"] | None = None
    where: dict[str, Values] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_meaning(self) -> "SegmentationCard":
        if BACKGROUND in self.structures:
            raise ValueError("a structure named background: give its values as `background`, or as `others: background`")
        if empty := [name for name, values in self.structures.items() if not values]:
            raise ValueError(f"no values for {', '.join(empty)}")
        counts: Counter[int] = Counter()
        for text in (*self.background, *(text for values in self.structures.values() for text in values)):
            counts.update(_spelled_out(text))
        if twice := sorted(value for value, count in counts.items() if count > 1):
            raise ValueError(f"values that stand twice: {', '.join(map(str, twice[:10]))}")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """What is read of the studies table: nothing, for the label is a file."""
        return ()

    def spec(self, name: str) -> SegmentationSpec:
        """What the release asks for."""
        return SegmentationSpec(name=name, modality=self.modality, structures=(BACKGROUND, *self.structures))

    def classes(self) -> dict[int, int]:
        """Value in a mask -> index of its structure; what is not here follows `others`."""
        listed = (self.background, *self.structures.values())
        return {value: index for index, values in enumerate(listed) for text in values for value in _spelled_out(text)}


def _spelled_out(text: str) -> Iterator[int]:
    """The values of a MaskValue.

    Raises:
        ValueError: a range that is empty or too long, or a value that is too large.
    """
    first, _, last = text.partition("-")
    low, high = int(first), int(last or first)
    if not low <= high < low + LARGEST_RANGE or high > LARGEST_VALUE:
        raise ValueError(f"expected a value or a range such as 100-207, at most {LARGEST_VALUE}, found {text}")
    yield from range(low, high + 1)

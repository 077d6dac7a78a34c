"""What a release holds: modalities in axis order, their variables, what it asks of a model."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from draf_dist.errors import SpecError, explain
from draf_dist.schema.label import LabelSpec, SegmentationSpec, TaskSpec
from draf_dist.schema.record import Record


class VariableSpec(Record):
    """One column of a series or table, in its canonical unit.

    low and high bound what is plausible, both inclusive, in the canonical unit; None means unbounded. A value outside is
    not observed. Binary variables are 0 or 1 and are not standardised. Categorical ones, of tables alone, hold codes: value i is
    categories[i], whose order means nothing; they have no unit, low is 0 and high the last code.
    """

    name: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    type: Literal["numeric", "binary", "categorical"] = "numeric"
    # Left out of what is stored where empty, or every release without any had another version.
    categories: tuple[str, ...] = Field((), exclude_if=lambda categories: categories == ())

    @model_validator(mode="after")
    def _has_categories_or_none(self) -> "VariableSpec":
        if self.type != "categorical" and not self.categories:
            return self
        if self.type != "categorical":
            raise ValueError(f"a {self.type} variable has no categories")
        if len(self.categories) < 2 or len(set(self.categories)) != len(self.categories):
            raise ValueError("a categorical variable has two or more categories, each once")
        if (self.unit, self.low, self.high) != ("", 0, len(self.categories) - 1):
            raise ValueError(f"codes of {len(self.categories)} categories have no unit and reach from 0 to the last")
        return self

    @classmethod
    def categorical(cls, name: str, categories: tuple[str, ...]) -> "VariableSpec":
        """A variable that holds codes."""
        return cls(name=name, low=0.0, high=float(len(categories) - 1), type="categorical", categories=categories)


class ImageSpec(Record):
    """A 2-D image, uint8, as it is stored: (C, H, W)."""

    kind: Literal["image"] = "image"
    name: str
    channels: int = Field(1, ge=1)
    height: int = Field(ge=8)
    width: int = Field(ge=8)


Millimetres = Annotated[float, Field(gt=0, allow_inf_nan=False)]
MAX_SIDE = 4096
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Sides = tuple[Side, Side, Side]


class VolumeSpec(Record):
    """A 3-D image as it is stored: (C, D, H, W), whose index grows towards the patient's head (D), front (H) and right (W).

    spacing_mm, shape, patch, chunk: in the order (D, H, W). shape: of every stored volume; None: each has its own, at least as
    large as the patch. patch: what the loader delivers; None: the whole volume. chunk: of the stored array, what is read at once.
    unit: HU, or empty where the numbers have none. fill: the value of what lies outside the scan.
    """

    kind: Literal["volume"] = "volume"
    name: str
    channels: int = Field(1, ge=1, le=64)
    spacing_mm: tuple[Millimetres, Millimetres, Millimetres]
    shape: Sides | None = None
    patch: Sides | None = None
    dtype: Literal["int16", "float16"] = "int16"
    unit: Literal["HU", ""] = ""
    clip: tuple[float, float] | None = None
    fill: int = Field(0, ge=-2048, le=2048)
    chunk: Sides

    @model_validator(mode="after")
    def _can_be_delivered(self) -> "VolumeSpec":
        if problem := volume_problem(self.shape, self.patch, self.clip):
            raise ValueError(problem)
        return self

    @property
    def delivered(self) -> Sides:
        """(D, H, W) of what the loader delivers."""
        sides = self.shape if self.patch is None else self.patch
        assert sides is not None  # the validator refuses a spec with neither
        return sides


def volume_problem(shape: Sides | None, patch: Sides | None, clip: tuple[float, float] | None) -> str | None:
    """Why volumes can't be stored and delivered so; None where they can."""
    if shape is None and patch is None:
        return "volumes of any shape can only be delivered in patches: give `patch`, or `shape`"
    if shape is not None and patch is not None and any(p > s for p, s in zip(patch, shape, strict=True)):
        return f"patch {list(patch)} is larger than shape {list(shape)}"
    if clip is not None and not clip[0] < clip[1]:
        return f"clip {list(clip)} is empty"
    return None


class SeriesSpec(Record):
    """Timed values on a regular grid of T steps that ends at the anchor: (T, F), NaN on disk where not observed."""

    kind: Literal["series"] = "series"
    name: str
    variables: tuple[VariableSpec, ...]
    num_steps: int = Field(ge=1)
    step_h: float = Field(gt=0)

    @model_validator(mode="after")
    def _holds_no_codes(self) -> "SeriesSpec":
        if codes := ", ".join(one.name for one in self.variables if one.type == "categorical"):
            raise ValueError(f"a series holds numbers, not codes ({codes}): categorical variables belong in a table")
        return self


class TableSpec(Record):
    """One row of values known at the anchor: (1, F), NaN on disk where not observed. A series of one step."""

    kind: Literal["table"] = "table"
    name: str
    variables: tuple[VariableSpec, ...]


ModalitySpec = Annotated[ImageSpec | VolumeSpec | SeriesSpec | TableSpec, Field(discriminator="kind")]


class DataSchema(Record):
    """schema.json of a release. Axis M of every (B, M) tensor follows `modalities`; Batch.site indexes `sites`."""

    modalities: tuple[ModalitySpec, ...] = Field(min_length=1)
    label: TaskSpec
    sites: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Modality names in axis order."""
        return tuple(spec.name for spec in self.modalities)

    @property
    def mask(self) -> VolumeSpec | None:
        """How the masks of a segmentation are stored: as one more volume on the grid of theirs; None for any other label.

        Raises:
            SpecError: the masks are those of a modality that is no volume.
        """
        if not isinstance(self.label, SegmentationSpec):
            return None
        wanted = self.label.modality
        image = next((spec for spec in self.modalities if spec.name == wanted and isinstance(spec, VolumeSpec)), None)
        if image is None:
            remedy = "Masks are stored on the grid of a volume."
            raise SpecError(explain(f"label {self.label.name}", expected="masks of a volume", found=repr(wanted), remedy=remedy))
        changed = {"name": self.label.name, "channels": 1, "dtype": "int16", "unit": "", "clip": None, "fill": 0}
        return image.model_copy(update=changed)

    @property
    def stored(self) -> tuple[ModalitySpec, ...]:
        """What a sample is made of beside its json, in the order of an index: the modalities, then the mask if one is asked for."""
        return self.modalities if self.mask is None else (*self.modalities, self.mask)

    @property
    def stored_names(self) -> tuple[str, ...]:
        """The names of `stored`."""
        return tuple(spec.name for spec in self.stored)

    @property
    def num_outputs(self) -> int:
        """K: logits that a model gives a study (of a mask: a voxel)."""
        return len(self.label.outputs)

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of a class label, for what is there for these alone.

        Raises:
            SpecError: the release asks for something else.
        """
        if not isinstance(self.label, LabelSpec):
            remedy = "This part of the program reads class labels only."
            raise SpecError(explain(f"label {self.label.name}", expected="classes", found=self.label.kind, remedy=remedy))
        return self.label.classes

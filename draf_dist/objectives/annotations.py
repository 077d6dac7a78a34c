"""Images of a release that say what is right about another image: experts' maps, masks of the body or of an organ."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from draf_dist.errors import SpecError, explain
from draf_dist.models.absent import clear_absent
from draf_dist.schema.batch import Batch
from draf_dist.schema.modality import DataSchema, ImageSpec, VolumeSpec

Picture = ImageSpec | VolumeSpec


def annotation(batch: Batch, modality: str) -> tuple[Tensor, Tensor]:
    """A map f32 (B, *space) in [0, 1] that the release holds as an image, and which rows have one, bool (B,).

    Its own least value stands for 0 and its largest for 1, which undoes whatever the images were normalised with; all 0 where
    the two are equal.

    Raises:
        SpecError: the batch has no such image.
    """
    inputs = clear_absent(batch)
    image = inputs.get(modality)
    if not isinstance(image, Tensor):
        images = ", ".join(name for name, value in inputs.items() if isinstance(value, Tensor))
        remedy = f"Images: {images}."
        raise SpecError(explain("objective", expected="an image of the release", found=repr(modality), remedy=remedy))
    flat = image[:, 0].flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    scaled = (flat - low) / torch.where(high > low, high - low, 1.0)
    return scaled.view_as(image[:, 0]), batch.present[:, batch.modalities.index(modality)]


def mask_annotation(batch: Batch, modality: str) -> tuple[Tensor, Tensor]:
    """A mask bool (B, *space) that the release holds as an image, and of which rows it says something, bool (B,).

    One of a single value says nothing: whether all is inside or none of it was lost when images were normalised.
    """
    shown, known = annotation(batch, modality)
    return shown > 0.5, known & (shown.flatten(1).amax(1) > 0)


def check_annotation(where: str, found: str | None, image: str, schema: DataSchema) -> str:
    """The modality that is to annotate an image.

    Raises:
        SpecError: it is no image of the release, or has another grid.
    """
    pictures = pictures_of(schema)
    if found is None or found not in pictures:
        remedy = f"Images: {', '.join(pictures)}."
        shown = "none" if found is None else repr(found)
        raise SpecError(explain(where, expected="an image of the release", found=shown, remedy=remedy))
    grids = {name: _grid(pictures[name]) for name in (image, found)}
    if grids[image] != grids[found]:
        shown = f"{found} with {_by(grids[found])}"
        remedy = "Prepare them alike."
        raise SpecError(explain(where, expected=f"the grid of {image}, {_by(grids[image])}", found=shown, remedy=remedy))
    return found


def pictures_of(schema: DataSchema) -> Mapping[str, Picture]:
    """Images and volumes of a release by name."""
    return {spec.name: spec for spec in schema.modalities if isinstance(spec, ImageSpec | VolumeSpec)}


def _grid(spec: Picture) -> tuple[float, ...]:
    """Sides; of volumes also what is stored, for patches are cut at one place of it, and the spacing."""
    if isinstance(spec, ImageSpec):
        return (spec.height, spec.width)
    return (*spec.delivered, *(spec.shape or ()), *spec.spacing_mm)


def _by(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)

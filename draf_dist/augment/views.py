"""Two views of every image for contrastive pre-training, with a record of what was done to each."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from draf_dist import noise
from draf_dist.augment.crop import RandomCrop
from draf_dist.augment.cuboid_mask import CuboidMask
from draf_dist.augment.elastic import Elastic
from draf_dist.augment.gaussian_noise import GaussianNoise
from draf_dist.augment.intensity import Intensity
from draf_dist.augment.rotate_scale import RotateScale
from draf_dist.augment.transform import Applied, Parameters, in_blocks
from draf_dist.config.spec import Spec

# Adding a transform: one file and one name here.
ViewTransform = Annotated[RotateScale | Elastic | Intensity | GaussianNoise | CuboidMask, Field(discriminator="kind")]


# (mean, deviation) of the training images, f32 scalars, with which they were standardised.
Scale = tuple[Tensor, Tensor]
AS_STORED: Scale = (torch.tensor(0.0, device="cpu"), torch.tensor(1.0, device="cpu"))


@dataclass(frozen=True)
class View:
    """One view. image: f32, as the batch; applied: kind of transform -> its parameters, in the order of application."""

    image: Tensor
    applied: Applied


@dataclass(frozen=True)
class Views:
    """Two views of one crop. region: int64 (B,), of the crop, which no view moves; crop: its parameters."""

    first: View
    second: View
    region: Tensor
    crop: Parameters


class ViewsConfig(Spec):
    """The crop, then what is done to either view of it, in this order. The defaults are for chest radiographs (spec 3.2)."""

    crop: RandomCrop = RandomCrop()
    transforms: tuple[ViewTransform, ...] = (RotateScale(), Elastic(), Intensity(), GaussianNoise(), CuboidMask())

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse_twice(transform.kind for transform in self.transforms)
        return self

    def make(self, image: Tensor, *, scale: Scale = AS_STORED, stream: str, seed: int, epoch: Tensor, uid: Tensor) -> Views:  # noqa: ARG002 - as presets
        """Views of normalised images f32 (B, C, H, W) or volumes (B, C, D, H, W).

        They are functions of (seed, stream, view, epoch, uid) and the image alone.

        scale: as of a preset; nothing that is done here asks for stored values. stream: what is seen, the modality.
        epoch, uid: int64 (B,).
        """
        keys, size = view_keys(stream, seed, epoch, uid), tuple(image.shape[2:])
        crop = self.crop.sample(keys("crop"), size)
        window = self.crop.apply(image, crop)
        drawn: list[Applied] = [{t.kind: t.sample(keys(f"{view}/{t.kind}"), size) for t in self.transforms} for view in (1, 2)]
        first, second = (View(in_blocks(window, applied, self._apply), applied) for applied in drawn)
        return Views(first, second, crop["region"], crop)

    def _apply(self, image: Tensor, applied: Applied) -> Tensor:
        for transform in self.transforms:
            image = transform.apply(image, applied[transform.kind])
        return image


def view_keys(stream: str, seed: int, epoch: Tensor, uid: Tensor) -> Callable[[str], Tensor]:
    """From what is drawn for ("crop", or view/kind of transform) to one key a sample, int64 (B,)."""

    def keys(purpose: str) -> Tensor:
        return noise.sample_keys(seed, f"augment/{stream}/{purpose}", epoch, uid, 1)[0]

    return keys


def refuse_twice(kinds: Iterable[str]) -> None:
    """Raises ValueError where a transform is listed twice: both would have the same draws, and one record."""
    kinds = list(kinds)
    if len(set(kinds)) != len(kinds):
        raise ValueError("a transform is listed twice")

"""Views for each modality, from the scanner to the encoder: what its acquisition may have done, the patient's posture, the rest."""

from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator
from torch import Tensor

from draf_dist.augment.beam_hardening import BeamHardening
from draf_dist.augment.bias_field import BiasField
from draf_dist.augment.crop import RandomCrop
from draf_dist.augment.cuboid_mask import CuboidMask
from draf_dist.augment.cupping import Cupping
from draf_dist.augment.elastic import Elastic
from draf_dist.augment.gaussian_noise import GaussianNoise
from draf_dist.augment.gibbs_ringing import GibbsRinging
from draf_dist.augment.intensity import Intensity
from draf_dist.augment.k_space import KSpaceUndersampling
from draf_dist.augment.poisson_noise import PoissonNoise
from draf_dist.augment.rician_noise import RicianNoise
from draf_dist.augment.rotate_scale import RotateScale
from draf_dist.augment.transform import Applied, Parameters, in_blocks
from draf_dist.augment.views import Scale, View, Views, ViewsConfig, refuse_twice, view_keys
from draf_dist.augment.warp import warp
from draf_dist.augment.window import Window
from draf_dist.config.spec import NO_KIND, Spec, kind_or

# Of stored values: HU, a scanner's magnitudes, grey values. Adding a transform: one file and one name here.
CtTransform = Annotated[BeamHardening | Cupping | Window, Field(discriminator="kind")]
MriTransform = Annotated[BiasField | KSpaceUndersampling | GibbsRinging | RicianNoise, Field(discriminator="kind")]
CxrTransform = PoissonNoise
Acquisition = CtTransform | MriTransform | CxrTransform

# Of standardised values.
StandardTransform = Annotated[Intensity | GaussianNoise | CuboidMask, Field(discriminator="kind")]


class Preset(Spec):
    """What is done to either view, in this order (spec 3.2; the order is ours).

    1. `acquisition`, on stored values and the whole image, because a scanner sees the whole body.
    2. Standardisation.
    3. The crop, which both views share, `rotate_scale` and `elastic`, in one interpolation.
    4. `transforms`.
    """

    crop: RandomCrop = RandomCrop()
    acquisition: tuple[Acquisition, ...] = ()
    rotate_scale: RotateScale = RotateScale(max_degrees=10)
    elastic: Elastic = Elastic(displacement=(0.01, 0.03))
    transforms: tuple[StandardTransform, ...] = (GaussianNoise(), CuboidMask())

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse_twice(step.kind for step in (*self.acquisition, *self.transforms))
        return self

    def make(self, image: Tensor, *, scale: Scale, stream: str, seed: int, epoch: Tensor, uid: Tensor) -> Views:
        """Views of standardised images (B, C, H, W) or volumes (B, C, D, H, W), functions of (seed, stream, view, epoch, uid).

        scale: (mean, deviation) with which they were standardised (`Normaliser.constants`). stream: what is seen, the modality.
        epoch, uid: int64 (B,).

        Raises:
            SpecError: the spacing of `rotate_scale` is of another number of axes.
        """
        keys, size = view_keys(stream, seed, epoch, uid), tuple(image.shape[2:])
        crop = self.crop.sample(keys("crop"), size)
        steps = (*self.acquisition, self.rotate_scale, self.elastic, *self.transforms)
        drawn: list[Applied] = [{step.kind: step.sample(keys(f"{view}/{step.kind}"), size) for step in steps} for view in (1, 2)]
        first, second = (self.view(image, scale, crop, applied) for applied in drawn)
        return Views(first, second, crop["region"], crop)

    def view(self, image: Tensor, scale: Scale, crop: Parameters, applied: Applied) -> View:
        """One view under the parameters of the crop and of every step: `make` again, from its record."""
        steps = {self.crop.kind: crop, **applied}
        return View(in_blocks(image, steps, lambda part, mine: self._apply(part, scale, mine)), applied)

    def _apply(self, image: Tensor, scale: Scale, applied: Applied) -> Tensor:
        mean, deviation = scale
        if self.acquisition:
            image = image * deviation + mean
            for step in self.acquisition:
                image = step.apply(image, applied[step.kind])
            image = (image - mean).div_(deviation)
        posture = self.rotate_scale.affine(applied["rotate_scale"], tuple(image.shape[2:]))
        image = warp(image, self.crop.affine(applied["random_crop"]).of(posture), applied["elastic"]["control"])
        for transform in self.transforms:
            image = transform.apply(image, applied[transform.kind])
        return image


class CtPreset(Preset):
    """Of CT in HU. `pixel_mm` of beam hardening and `spacing` of rotate_scale are those of the release."""

    kind: Literal["ct"] = "ct"
    acquisition: tuple[CtTransform, ...] = (BeamHardening(), Window())


class MriPreset(Preset):
    """Of MRI magnitudes, which are not negative."""

    kind: Literal["mri"] = "mri"
    acquisition: tuple[MriTransform, ...] = (BiasField(), KSpaceUndersampling(), GibbsRinging(), RicianNoise())
    transforms: tuple[StandardTransform, ...] = (Intensity(gamma=(0.7, 1.4)), CuboidMask())


class CxrPreset(Preset):
    """Of chest radiographs, stored from 0 to 255."""

    kind: Literal["cxr"] = "cxr"
    acquisition: tuple[CxrTransform, ...] = (PoissonNoise(),)
    rotate_scale: RotateScale = RotateScale()
    elastic: Elastic = Elastic()
    transforms: tuple[StandardTransform, ...] = (Intensity(), GaussianNoise(), CuboidMask())


# What a job says: the views one by one, which have no kind, or a preset by its kind.
AnyViews = Annotated[
    Annotated[ViewsConfig, Tag(NO_KIND)]
    | Annotated[CtPreset, Tag("ct")]
    | Annotated[MriPreset, Tag("mri")]
    | Annotated[CxrPreset, Tag("cxr")],
    Discriminator(kind_or(NO_KIND)),
]

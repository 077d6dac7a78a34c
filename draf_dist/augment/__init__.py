"""Batched random transforms of images on the device, keyed by sample: parameters first, then the same for all rows."""

from draf_dist.augment.crop import RandomCrop
from draf_dist.augment.cuboid_mask import CuboidMask
from draf_dist.augment.elastic import Elastic
from draf_dist.augment.gaussian_noise import GaussianNoise
from draf_dist.augment.intensity import Intensity
from draf_dist.augment.rotate_scale import RotateScale
from draf_dist.augment.transform import Parameters, Transform
from draf_dist.augment.views import View, Views, ViewsConfig, ViewTransform

__all__ = [
    "CuboidMask",
    "Elastic",
    "GaussianNoise",
    "Intensity",
    "Parameters",
    "RandomCrop",
    "RotateScale",
    "Transform",
    "View",
    "ViewTransform",
    "Views",
    "ViewsConfig",
]

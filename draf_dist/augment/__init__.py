"""Batched random transforms of images on the device, keyed by sample: parameters first, then the same for all rows."""

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
from draf_dist.augment.presets import Acquisition, AnyViews, CtPreset, CxrPreset, MriPreset, Preset
from draf_dist.augment.rician_noise import RicianNoise
from draf_dist.augment.rotate_scale import RotateScale
from draf_dist.augment.transform import Parameters, Transform
from draf_dist.augment.views import View, Views, ViewsConfig, ViewTransform
from draf_dist.augment.window import Window

__all__ = [
    "Acquisition",
    "AnyViews",
    "BeamHardening",
    "BiasField",
    "CtPreset",
    "CuboidMask",
    "Cupping",
    "CxrPreset",
    "Elastic",
    "GaussianNoise",
    "GibbsRinging",
    "Intensity",
    "KSpaceUndersampling",
    "MriPreset",
    "Parameters",
    "PoissonNoise",
    "Preset",
    "RandomCrop",
    "RicianNoise",
    "RotateScale",
    "Transform",
    "View",
    "ViewTransform",
    "Views",
    "ViewsConfig",
    "Window",
]

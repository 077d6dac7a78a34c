"""X-rays of many energies: a thick body lets the hard ones through, and its middle looks less dense than it is."""

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from draf_dist import noise
from draf_dist.augment.bounds import NotNegative
from draf_dist.augment.radon import detectors, filtered_back_projection, project
from draf_dist.augment.transform import Parameters, Size, between, rows_of_block
from draf_dist.config.spec import Spec

Shares = tuple[Annotated[float, Field(gt=0)], ...]


class BeamHardening(Spec):
    """HU + 1000 / mu_w FBP(p' - p), slice by slice (spec 3.2), of attenuation mu = mu_w (1 + HU / 1000) without negative values.

    p: parallel projections of mu; p' = -ln sum_k w_k exp(-kappa_k p), with sum w_k = sum w_k kappa_k = 1, so that thin rays are
    as before. p' <= p (Jensen). Only the difference is reconstructed: what reconstruction blurs cancels.

    strength: uniform; pulls all kappas towards 1, by 1 + strength (kappa_k - 1): 0 is one energy, 1 the kappas as given. The
    range is ours: at 1, water 30 cm thick loses a fifth of its attenuation, as no scanner that corrects for water shows it.
    weights, kappas: w_k and kappa_k. mu_water_per_cm: mu_w. pixel_mm: the side of a pixel.
    resolution, angles: what is reconstructed is smooth, so it is computed on slices whose longer side is averaged down to this
    many pixels, from so many directions, and enlarged.
    """

    kind: Literal["beam_hardening"] = "beam_hardening"
    strength: NotNegative = (0.0, 0.5)
    weights: Shares = (0.5, 0.5)
    kappas: Shares = (0.667, 1.333)
    mu_water_per_cm: float = Field(0.2, gt=0)
    pixel_mm: float = Field(1.0, gt=0)
    resolution: int = Field(64, ge=8)
    angles: int = Field(60, ge=8)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.weights) != len(self.kappas):
            raise ValueError("one weight for each kappa")
        products = [weight * kappa for weight, kappa in zip(self.weights, self.kappas, strict=True)]
        if abs(sum(self.weights) - 1) > 1e-6 or abs(sum(products) - 1) > 1e-6:
            raise ValueError("weights, and weights times kappas, add up to 1")
        if self.strength[1] * max(1 - kappa for kappa in self.kappas) > 1:
            raise ValueError("a strength that makes a kappa negative")
        return self

    def sample(self, keys: Tensor, size: Size) -> Parameters:
        """Strength (B,)."""
        return {"strength": between(noise.uniform(keys, ()), self.strength)}

    def apply(self, image: Tensor, parameters: Parameters) -> Tensor:
        """The images, HU, with their artefacts."""
        slices = image.flatten(0, -3)
        strength = parameters["strength"].repeat_interleave(len(slices) // len(image))
        return image + self.artefact(slices, strength).view_as(image)

    def artefact(self, slices: Tensor, strength: Tensor) -> Tensor:
        """What is added to slices (N, H, W), HU, strength (N,)."""
        height, width = slices.shape[-2:]
        shrink = max(1.0, max(height, width) / self.resolution)
        small = (round(height / shrink), round(width / shrink))
        coarse = functional.interpolate(slices[None], size=small, mode="area")[0]
        pixel_cm = self.pixel_mm / 10 * shrink
        mu = (1 + coarse / 1000).clamp_min_(0).mul_(self.mu_water_per_cm)
        # As many slices at a time as leave the rays of one direction in the cache.
        rows = rows_of_block(detectors(*small) ** 2, mu)
        parts = []
        for some, their in zip(torch.split(mu, rows), torch.split(strength, rows), strict=True):
            sinogram = self.hardening(project(some, angles=self.angles, pixel=pixel_cm), their)
            parts.append(filtered_back_projection(sinogram, *small, pixel=pixel_cm))
        found = torch.cat(parts).mul_(1000 / self.mu_water_per_cm)
        return functional.interpolate(found[None], size=(height, width), mode="bilinear", align_corners=False)[0]

    def hardening(self, projection: Tensor, strength: Tensor) -> Tensor:
        """What hardening takes from projections (N, ..), strength (N,): p' - p, at most 0.

        -ln sum w exp(-kappa p) - p, but without the loss of digits.
        """
        strength = strength.view(-1, *(1 for _ in projection.shape[1:]))
        # exp(p) sum w exp(-kappa p) - 1 = sum w (exp((1 - kappa) p) - 1), exactly 0 where all kappas are 1.
        excess = torch.zeros_like(projection)
        for weight, kappa in zip(self.weights, self.kappas, strict=True):
            excess += weight * torch.expm1((1 - kappa) * strength * projection)
        return excess.clamp_min_(0).log1p_().neg_()

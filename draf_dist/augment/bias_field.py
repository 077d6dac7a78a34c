"""Coils hear what is near them better: a slow change of brightness over the image."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from draf_dist import noise
from draf_dist.augment.transform import Parameters, Size, centres
from draf_dist.config.spec import Spec


class BiasField(Spec):
    """x exp(sum c_ij.. P_i P_j ..), over Legendre polynomials of the axes with 1 <= i + j + .. <= degree (Van Leemput et al. 1999).

    P_i are functions of the place from -1 to 1 between the outer edges. The constant term is left out: it would be a gain, which
    standardisation or gamma stand for. For intensities that are not negative, before standardisation, which moves 0.

    coefficient: c is uniform between -coefficient and coefficient, one for every term and sample.
    """

    kind: Literal["bias_field"] = "bias_field"
    coefficient: float = Field(0.3, gt=0, le=1)
    degree: int = Field(3, ge=1, le=8)

    def sample(self, keys: Tensor, size: Size) -> Parameters:
        """Coefficients f32 (B, degree + 1, degree + 1, ..), by the degree along every axis; 0 where there is no term."""
        terms, axes = self.degree + 1, len(size)
        degrees = torch.arange(terms, device=keys.device)
        total = torch.stack(torch.meshgrid(*(degrees for _ in size), indexing="ij")).sum(0)
        allowed = (total >= 1) & (total <= self.degree)
        draws = noise.uniform(keys, (terms,) * axes)
        return {"coefficients": torch.where(allowed, (2 * draws - 1) * self.coefficient, 0.0)}

    def apply(self, image: Tensor, parameters: Parameters) -> Tensor:
        """The images under their fields."""
        field = parameters["coefficients"]
        # The last axis first: most of the work is that of the first axis, whose terms are whole slabs.
        for axis in reversed(range(2, image.ndim)):
            places = 2 * centres(image.shape[axis], image.device) - 1
            field = _sum_of(field, _legendre(places, self.degree), axis - 1)
        return field.exp_()[:, None] * image


def _sum_of(coefficients: Tensor, polynomials: list[Tensor], axis: int) -> Tensor:
    """Polynomials (length,) summed over one axis of their coefficients, in a fixed order."""
    shape = (-1, *(1 for _ in coefficients.shape[axis + 1 :]))
    # P_0 is 1.
    total = coefficients.narrow(axis, 0, 1)
    for degree, polynomial in enumerate(polynomials[1:], start=1):
        term = (coefficients.narrow(axis, degree, 1), polynomial.view(shape))
        total = torch.addcmul(total, *term) if degree == 1 else total.addcmul_(*term)
    return total


def _legendre(x: Tensor, degree: int) -> list[Tensor]:
    """P_0 to P_degree, by Bonnet's recursion."""
    found = [torch.ones_like(x), x]
    for n in range(1, degree):
        found.append(((2 * n + 1) * x * found[n] - n * found[n - 1]) / (n + 1))
    return found

"""The posture of the patient and the distance of the tube."""

import math
from typing import Literal

from pydantic import Field
from torch import Tensor

from draf_dist import noise
from draf_dist.augment.bounds import Positive
from draf_dist.augment.transform import Parameters, between, centres, resample
from draf_dist.config.spec import Spec


class RotateScale(Spec):
    """Rotation about the centre by up to max_degrees either way, and magnification by `scale`.

    No translation, which would move the region label, and no left-right flip, which would mirror the heart.
    """

    kind: Literal["rotate_scale"] = "rotate_scale"
    max_degrees: float = Field(7.0, ge=0, le=45)
    scale: Positive = (0.9, 1.1)

    def sample(self, keys: Tensor, size: tuple[int, int]) -> Parameters:
        """Degrees (B,), positive is counter-clockwise; scale (B,), above 1 is larger."""
        turn, size_draw = noise.uniform(keys, (2,)).unbind(dim=1)
        return {"degrees": between(turn, (-self.max_degrees, self.max_degrees)), "scale": between(size_draw, self.scale)}

    def apply(self, image: Tensor, parameters: Parameters) -> Tensor:
        """The images, turned in pixels (not in fractions of an extent that may differ by axis)."""
        height, width = image.shape[-2:]
        angle = (parameters["degrees"] * (math.pi / 180)).view(-1, 1, 1)
        factor = parameters["scale"].view(-1, 1, 1)
        y = (centres(height, image.device) - 0.5).view(1, -1, 1) * height
        x = (centres(width, image.device) - 0.5).view(1, 1, -1) * width
        # Where a pixel of the result is read from: the inverse of the map.
        from_y = (angle.cos() * y + angle.sin() * x) / factor
        from_x = (angle.cos() * x - angle.sin() * y) / factor
        return resample(image, from_y / height + 0.5, from_x / width + 0.5)

"""Another setting of the display window."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from draf_dist import noise
from draf_dist.augment.transform import Parameters, Size, between, by_row
from draf_dist.config.spec import Spec


class Window(Spec):
    """A window of another centre and width, shown on the grey scale of the one that is meant: HU in, HU out.

    c0 + w0 (clip(x, c - w/2, c + w/2) - c) / w, c uniform within centre_change of c0, w within width_change of w0, both as a
    fraction of themselves (spec 3.2: 10 % and 20 %; so a window whose centre is 0 HU is not moved). The result lies within the
    window that is meant, so its mean and deviation in the training data still fit: take that to which the release clips.

    centre, width: c0 and w0, HU; the defaults are a window for soft tissue.
    """

    kind: Literal["window"] = "window"
    centre: float = Field(40.0, ge=-2000, le=4000)
    width: float = Field(400.0, gt=0, le=8000)
    centre_change: float = Field(0.1, ge=0, lt=1)
    width_change: float = Field(0.2, ge=0, lt=1)

    def sample(self, keys: Tensor, size: Size) -> Parameters:
        """Centre (B,), width (B,), in HU."""
        moved, wider = noise.uniform(keys, (2,)).unbind(dim=1)
        return {
            "centre": self.centre * (1 + between(moved, (-self.centre_change, self.centre_change))),
            "width": self.width * (1 + between(wider, (-self.width_change, self.width_change))),
        }

    def apply(self, image: Tensor, parameters: Parameters) -> Tensor:
        """The images through their windows."""
        place = (image - by_row(parameters["centre"], image)).div_(by_row(parameters["width"], image))
        return place.clamp_(-0.5, 0.5).mul_(self.width).add_(self.centre)

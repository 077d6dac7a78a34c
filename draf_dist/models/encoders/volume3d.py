"""A small residual network for 3-D images with GroupNorm and MC dropout: image2d with another dimension (own)."""

from typing import Literal

from pydantic import Field

from draf_dist.config.spec import Spec
from draf_dist.models.encoders.image2d import ResidualEncoder
from draf_dist.models.encoders.kinds import wrong_kind
from draf_dist.schema.modality import ModalitySpec, VolumeSpec


class Volume3dConfig(Spec):
    """As Image2dConfig. Voxels count as cubes: where spacing differs by axis, let the card resample."""

    kind: Literal["volume3d"] = "volume3d"
    widths: tuple[int, ...] = Field((16, 32, 64), min_length=1)
    groups: int = Field(8, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    projection_dropout: float = Field(0.2, ge=0, lt=1)

    def build(self, spec: ModalitySpec, width: int) -> ResidualEncoder:
        """The encoder of one modality of volumes, with features of the given width.

        Raises:
            SpecError: the modality is of another kind.
        """
        if not isinstance(spec, VolumeSpec):
            raise wrong_kind(self.kind, reads="volume", spec=spec)
        return ResidualEncoder(
            3,
            channels=spec.channels,
            widths=self.widths,
            groups=self.groups,
            dropout=self.dropout,
            projection_dropout=self.projection_dropout,
            width=width,
        )

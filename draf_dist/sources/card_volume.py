"""The part of a card that describes a 3-D image."""

from typing import Literal

from pydantic import Field, model_validator

from draf_dist.schema.modality import Millimetres, Sides, VolumeSpec, volume_problem
from draf_dist.sources.card_parts import CardPart, Name, SiteName, WindowHours

# Air, and the largest value of a 12-bit scanner: what lies beyond is metal or the outside of the scanner's circle.
HU_AIR = -1024
HU_RANGE = (-1024.0, 3071.0)
SMALLEST_CHUNK, LARGEST_CHUNK = 16, 64


class VolumeCard(CardPart):
    """One 3-D image per study: the latest in the window. Sites in absent_at have none.

    file: the column with the name of a .nii or .nii.gz file, or of a folder with the DICOM files of one series; path: where it lies
    below the raw folder, with `{site}` and `{file}`. Everything of three numbers is in the order D (feet to head), H (back to
    front), W (left to right). spacing_mm: to which volumes are resampled. shape: to which they are cropped or padded about their
    centre; without it each keeps its own. patch: what training reads of them, at random places; without it the whole.
    unit: HU turns DICOM's stored values to Hounsfield units and refuses what is no CT. clip: values outside become its bounds
    (with HU: [-1024, 3071], else none). fill: the value outside the scan (with HU: -1024, else 0). dtype: as it is stored.
    chunk: of the stored array, what is read at once (by default half the patch as a power of two, 16 to 64).
    """

    kind: Literal["volume"] = "volume"
    name: Name
    table: Name
    absent_at: tuple[SiteName, ...] = ()
    file: str
    path: str
    window_h: WindowHours | None = None
    spacing_mm: tuple[Millimetres, Millimetres, Millimetres]
    shape: Sides | None = None
    patch: Sides | None = None
    channels: int = Field(1, ge=1, le=64)
    dtype: Literal["int16", "float16"] = "int16"
    unit: Literal["HU", ""] = ""
    clip: tuple[float, float] | None = None
    fill: int | None = Field(None, ge=-2048, le=2048)
    chunk: Sides | None = None

    @model_validator(mode="after")
    def _can_be_delivered(self) -> "VolumeCard":
        if problem := volume_problem(self.shape, self.patch, self.clip):
            raise ValueError(problem)
        return self

    def spec(self) -> VolumeSpec:
        """The modality as the release describes it."""
        is_hu = self.unit == "HU"
        return VolumeSpec(
            name=self.name,
            channels=self.channels,
            spacing_mm=self.spacing_mm,
            shape=self.shape,
            patch=self.patch,
            dtype=self.dtype,
            unit=self.unit,
            clip=HU_RANGE if is_hu and self.clip is None else self.clip,
            fill=self.fill if self.fill is not None else HU_AIR if is_hu else 0,
            chunk=self.chunk or self._usual_chunk(),
        )

    def _usual_chunk(self) -> Sides:
        sides = self.patch or self.shape
        assert sides is not None  # the validator refuses a card with neither
        # Of a patch at a random place half a chunk is read in vain at either end; smaller chunks cost more requests and headers.
        d, h, w = (
            min(LARGEST_CHUNK, max(SMALLEST_CHUNK, 2 ** ((side // 2).bit_length() - 1 if side > 1 else 0))) for side in sides
        )
        return d, h, w

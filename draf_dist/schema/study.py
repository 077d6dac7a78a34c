"""What a source yields: one subject at one time anchor at one site, raw."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RawVolume:
    """A 3-D image as a source decoded it, already turned to the patient's axes.

    voxels: int16 or float32 (C, D, H, W) in the unit of the schema, any D, H, W; D grows towards the head, H towards the front, W
    towards the patient's right; NaN where the scanner saw nothing. spacing_mm: of voxel centres along (D, H, W). affine: (3, 4),
    from (d, h, w, 1) to the RAS millimetres of a voxel's centre; None where nobody asks.
    """

    voxels: NDArray[np.int16] | NDArray[np.float32]
    spacing_mm: tuple[float, float, float]
    affine: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class TimeToEvent:
    """The time of an event, or (event False) the last time at which it had not happened, in the unit of the SurvivalSpec."""

    time: float
    event: bool


@dataclass(frozen=True)
class MaskLabel:
    """Whether somebody outlined the structures in a study's volume; the mask itself is Study.mask."""

    drawn: bool


# What is known of a study's label: a class index; for each of K labels whether it holds, None where unknown; a time; a mask.
StudyLabel = int | tuple[bool | None, ...] | TimeToEvent | MaskLabel


@dataclass(frozen=True)
class Study:
    """One subject at one time anchor (event + offset) at one site.

    subject and anchor are as the hospital wrote them: they are hashed before anything is stored and never printed.
    inputs maps modality -> uint8 (C, H, W) for an image as the source decoded it (any H, W), float32 (T, F) for a series and
    (1, F) for a table, already in canonical units with NaN where not observed. An absent modality has no entry.
    volumes maps modality -> 3-D image. image_digests maps modality -> sha256 hex of the raw image or volume: one that two subjects
    claim is a leak.
    label is of the kind that the schema asks for. quality maps modality -> [0, 1] where the source knows it. where is the place in
    the export, a file and a row, for messages: never a subject. mask: int16 (1, D, H, W) on the voxels of the volume that the label
    is about, each the index of a structure or IGNORED.
    """

    subject: str
    site: str
    anchor: str
    inputs: dict[str, NDArray[np.uint8] | NDArray[np.float32]]
    label: StudyLabel
    image_digests: dict[str, str] = field(default_factory=dict)
    quality: dict[str, float] = field(default_factory=dict)
    where: str = ""
    volumes: dict[str, RawVolume] = field(default_factory=dict)
    mask: RawVolume | None = None


@dataclass(frozen=True)
class Rejection:
    """A study that can't be used. `where` is a file and line or row, never a subject; `reason` is one of a few short words."""

    site: str
    where: str
    reason: str
    detail: str

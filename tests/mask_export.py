"""A raw export of MRI with masks, both stored along any axes, and its card; every voxel of an image tells what its mask says."""

from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from draf_dist.config.spec import parse_yaml, validate_spec
from draf_dist.sources.hospital_export import HospitalExport, HospitalExportCard

CARD = """
name: heads
licence: {name: none}
split: {public_subject_key: true}
sites: {folders: [north]}
tables:
  patients: {path: "{site}/patients.csv", subject: patient}
studies: {table: patients}
label: parts
labels:
  parts:
    kind: segmentation
    modality: mr
    path: "{site}/masks/{file}"
    structures: {inner: [5, 6], outer: [7]}
    others: background
modalities:
  - {kind: volume, name: mr, table: patients, file: mr, path: "{site}/mr/{file}", spacing_mm: [1, 1, 1], patch: [8, 8, 8]}
  - {kind: table, name: clinic, table: patients, variables: [{name: age, unit: year}]}
"""
NUM_PATIENTS = 10
# Of patient 0 there is no mask, of patient 1 no image either.
WITHOUT_MASK, WITHOUT_IMAGE = 0, 1
# Raw values, and the index of the structure that the card makes of each.
STRUCTURE = {0: 0, 5: 1, 6: 1, 7: 2, 9: 0}
NOISE = 10
AXES = ("RAS", "LPS", "PIR", "SAL", "ILA")
ORIGIN_MM = (-31.0, 12.5, 4.25)


def raw_mask(patient: int) -> NDArray[np.uint8]:
    """(X, Y, Z) in RAS: blocks of raw values, so that neighbours often agree, of another size for every patient."""
    generator = np.random.default_rng(patient)
    sides = (14 + patient, 12 + 2 * (patient % 3), 19)
    blocks = generator.choice(np.array(list(STRUCTURE), dtype=np.uint8), [-(-side // 3) for side in sides])
    return np.kron(blocks, np.ones((3, 3, 3), dtype=np.uint8))[: sides[0], : sides[1], : sides[2]]


def image_of(mask: NDArray[np.uint8], patient: int) -> NDArray[np.int16]:
    """Ten times the raw value, and a little more."""
    noise = np.random.default_rng(100 + patient).integers(0, NOISE, mask.shape)
    return (NOISE * mask.astype(np.int16) + noise).astype(np.int16)


def structures(mask: NDArray[np.generic]) -> NDArray[np.int64]:
    """What the card makes of raw values."""
    return np.vectorize(STRUCTURE.__getitem__, otypes=[np.int64])(mask)


def save(path: Path, voxels: NDArray[np.generic], spacing: tuple[float, float, float] = (1, 1, 1), *, axes: str = "RAS") -> None:
    """An (X, Y, Z) RAS volume as a NIfTI file whose voxels are stored along other axes."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = ORIGIN_MM
    image = nib.Nifti1Image(voxels, affine)
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(tuple(axes)))
    image = image.as_reoriented(turn)
    image.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


def write_export(raw: Path, spacing: tuple[float, float, float] = (1, 1, 1)) -> None:
    """spacing: of (X, Y, Z) in mm, of all images and masks."""
    lines = ["patient,mr,age"]
    for i in range(NUM_PATIENTS):
        mask, name = raw_mask(i), f"{i}.nii.gz"
        lines.append(f"P{i},{'' if i == WITHOUT_IMAGE else name},{50 + i}")
        save(raw / "north/mr" / name, image_of(mask, i), spacing, axes=AXES[i % len(AXES)])
        if i != WITHOUT_MASK:
            save(raw / "north/masks" / name, mask, spacing, axes=AXES[(i + 2) % len(AXES)])
    (raw / "north/patients.csv").write_text("\n".join(lines) + "\n")


def card(*, label: Mapping[str, object] | None = None, **changes: Mapping[str, object]) -> HospitalExportCard:
    """label: keys of the label to set, None takes one out; changes: modality -> keys of its part."""
    content = parse_yaml(CARD, where="card")
    parts = content["labels"]["parts"]
    parts |= label or {}
    content["labels"]["parts"] = {key: value for key, value in parts.items() if value is not None}
    for modality in content["modalities"]:
        modality |= changes.get(modality["name"], {})
    return validate_spec(content, HospitalExportCard, where="card")


def export(raw: Path, *, label: Mapping[str, object] | None = None, **changes: Mapping[str, object]) -> HospitalExport:
    """The source, of a card with these changes."""
    return HospitalExport(card(label=label, **changes), raw)

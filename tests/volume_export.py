"""A raw export with a CT (DICOM folders and a NIfTI file) and an MRI (NIfTI) for some of its patients, and its card."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from volume_inputs import write_dicom, write_nifti

from draf_dist.config.spec import parse_yaml, validate_spec
from draf_dist.sources.hospital_export import HospitalExport, HospitalExportCard

CARD = """
name: scans
licence: {name: none}
split: {public_subject_key: true}
sites: {folders: [north]}
tables:
  patients: {path: "{site}/patients.csv", subject: patient}
studies: {table: patients}
label: sick
labels: {sick: {column: sick, classes: ["no", "yes"]}}
modalities:
  - {kind: volume, name: ct, table: patients, file: ct, path: "{site}/{file}", unit: HU, spacing_mm: [2, 1, 1], patch: [8, 8, 8]}
  - kind: volume
    name: mr
    table: patients
    file: mr
    path: "{site}/{file}"
    spacing_mm: [1, 1, 1]
    shape: [12, 12, 12]
    dtype: float16
"""
NUM_PATIENTS = 8


def write_export(raw: Path) -> None:
    """Patient 0 has no CT, patient 1 no MRI; the CT of patient 2 is a NIfTI file."""
    (raw / "north").mkdir(parents=True)
    lines = ["patient,sick,ct,mr"]
    for i in range(NUM_PATIENTS):
        ct, mr = "" if i == 0 else "ct2.nii" if i == 2 else f"ct{i}", "" if i == 1 else f"mr{i}.nii.gz"
        lines.append(f"P{i},{'yes' if i % 2 else 'no'},{ct},{mr}")
        if ct.endswith(".nii"):
            write_nifti(raw / "north" / ct, scan(i), np.diag([1, 1, 2, 1.0]))
        elif ct:
            write_dicom(raw / "north" / ct, scan(i), spacing=(1, 1, 2))
        if mr:
            write_nifti(raw / "north" / mr, scan(100 + i).astype(np.float32) / 4, np.eye(4))
    (raw / "north/patients.csv").write_text("\n".join(lines) + "\n")


def scan(seed: int) -> np.ndarray:
    """(X, Y, Z) int16."""
    return np.random.default_rng(seed).integers(-1000, 1000, (13, 11, 10)).astype(np.int16)


def export(raw: Path, **changes: Mapping[str, object]) -> HospitalExport:
    """The source; changes: modality -> keys of its part of the card."""
    content = parse_yaml(CARD, where="card")
    for modality in content["modalities"]:
        modality |= changes.get(modality["name"], {})
    return HospitalExport(validate_spec(content, HospitalExportCard, where="card"), raw)

"""A raw export of scans with a ball in them, which is brighter on one side, its outlines beside them, and its card."""

from pathlib import Path

import numpy as np
from volume_inputs import write_nifti

from draf_dist.config.spec import parse_yaml, validate_spec
from draf_dist.data.prepare import prepare
from draf_dist.sources.hospital_export import HospitalExport, HospitalExportCard

KEY = b"sixteen or more bytes of key"
SIDE = 12
CARD = f"""
name: balls
licence: {{name: none}}
split: {{public_subject_key: true}}
sites: {{folders: [north]}}
tables:
  patients: {{path: "{{site}}/patients.csv", subject: patient}}
studies: {{table: patients}}
label: ball
labels:
  ball:
    kind: segmentation
    modality: mr
    path: "{{site}}/{{file}}"
    file: mask
    structures: {{dim: ["3"], bright: ["7-9"]}}
    others: ignored
modalities:
  - {{kind: volume, name: mr, table: patients, file: mr, path: "{{site}}/{{file}}", spacing_mm: [1, 1, 1],
     shape: [{SIDE}, {SIDE}, {SIDE}], patch: [PATCH, PATCH, PATCH], chunk: [8, 8, 8]}}
"""


def outlined_release(folder: Path, num_patients: int = 24, *, patch: int = 8) -> str:
    """The URL of a release, delivered in patches of so many voxels.

    Every sixth patient has no mask, and of the first slice of every mask nobody says what it is.
    """
    raw = folder / "raw" / "north"
    raw.mkdir(parents=True)
    lines = ["patient,mr,mask"]
    for i in range(num_patients):
        scan, mask = ball(i)
        write_nifti(raw / f"mr{i}.nii.gz", scan, np.eye(4))
        if i % 6 != 5:
            write_nifti(raw / f"mask{i}.nii.gz", mask, np.eye(4))
        lines.append(f"P{i},mr{i}.nii.gz,{'' if i % 6 == 5 else f'mask{i}.nii.gz'}")
    (raw / "patients.csv").write_text("\n".join(lines) + "\n")
    card = validate_spec(parse_yaml(CARD.replace("PATCH", str(patch)), where="card"), HospitalExportCard, where="card")
    return prepare(HospitalExport(card, folder / "raw"), str(folder / "release"), subject_key=KEY).url


def ball(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scan and mask, int16 (X, Y, Z): 3 in the half of the ball that is dim, 8 in the other, 99 in the first slice."""
    generator = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(SIDE)] * 3, indexing="ij"))
    centre = generator.uniform(4.5, 6.5, 3)
    inside = np.sqrt(((grid - centre[:, None, None, None]) ** 2).sum(0)) < generator.uniform(2.5, 3.5)
    bright = inside & (grid[0] > centre[0])
    scan = 100 * inside + 150 * bright + generator.normal(0, 30, inside.shape)
    mask = np.where(bright, 8, np.where(inside, 3, 0))
    mask[:, :, 0] = 99
    return scan.astype(np.int16), mask.astype(np.int16)

"""An export with labels and times whose truth is known: what a study shows decides both, and some of either is not known."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from draf_dist.config.spec import parse_yaml, validate_spec
from draf_dist.data.prepare import prepare
from draf_dist.sources.card import Card
from draf_dist.sources.hospital_export import HospitalExport
from draf_dist.training.job import FinetuneJob
from draf_dist.training.run import train

SUBJECT_KEY = b"k" * 32
EDGES = (4.0, 8.0, 16.0)
CARD = """
name: clinic
licence: {name: none}
split: {public_subject_key: true, held_out_sites: [west]}
sites: {column: hospital, groups: {north: N, south: S, west: W}}
tables: {visits: {path: visits.csv, subject: person, study: visit}}
studies: {table: visits}
label: LABEL
labels:
  findings: {kind: multilabel, labels: {edema: e, effusion: f}, unknown: ["9"]}
  death: {kind: survival, time: months, event: dead, unit: months, edges: [4, 8, 16]}
modalities:
  - {kind: table, name: heart, table: visits, variables: [{name: x}]}
  - {kind: table, name: lungs, table: visits, variables: [{name: z}]}
"""


def write_clinic(folder: Path, *, num_subjects: int = 600, seed: int = 5) -> Path:
    """visits.csv: x decides edema and the hazard, z effusion; a third of effusion is not known, and many times are censored."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    x, z = generator.normal(size=(2, num_subjects))
    edema, effusion = (generator.random(num_subjects) < 1 / (1 + np.exp(-3 * value)) for value in (x, z))
    death, leaves = generator.exponential(8 * np.exp(-1.2 * x)), generator.exponential(16, num_subjects)
    lines = ["person,visit,hospital,x,z,e,f,months,dead"]
    for i in range(num_subjects):
        known = str(int(effusion[i])) if i % 3 else "9"
        months, dead = min(death[i], leaves[i]), int(death[i] < leaves[i])
        lines.append(f"p{i},v{i},{'NSW'[i % 3]},{x[i]:.4f},{z[i]:.4f},{int(edema[i])},{known},{months:.4f},{dead}")
    (folder / "visits.csv").write_text("\n".join(lines) + "\n")
    return folder


def clinic_release(raw: Path, label: str, url: Path) -> str:
    """A release of the export that asks for `findings` or `death`."""
    card = validate_spec(parse_yaml(CARD.replace("LABEL", label), where="card"), Card, where="card")
    prepare(HospitalExport(card, raw), str(url), subject_key=SUBJECT_KEY)
    return str(url)


def clinic_run(release: str, out: Path, **changes: Any) -> str:
    """The URL of a small run on it, trained until it ranks."""
    settings = {
        "name": "clinic",
        "release": release,
        "model": {"kind": "draf", "width": 8},
        "epochs": 25,
        "patience": 25,
        "passes_train": 2,
        "passes_eval": 4,
        "batch_size": 32,
        "optimizer": {"learning_rate": 0.01},
        "corruption": {"probability": 0.1, "modality_dropout": 0.1},
    }
    train(FinetuneJob.model_validate(settings | changes), str(out), console=Console(quiet=True))
    return str(out)

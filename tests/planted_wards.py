"""A small export of tables with a planted signal, and a benchmark of it: folds and cells in seconds, without any data set."""

import csv
from pathlib import Path

import numpy as np

WARDS = tuple("abcdefgh")
CARD = """
name: wards
licence: {name: CC0-1.0}
studies: {table: stays}
sites: {column: ward, groups: {a: A, b: B, c: C, d: D, e: E, f: F, g: G, h: H}}
label: outcome
labels: {outcome: {column: died, classes: ['no', 'yes'], values: {0: 'no', 1: 'yes'}}}
tables: {stays: {path: stays.csv, subject: patient}}
modalities:
- {kind: table, name: blood, table: stays, variables: [{name: marker, unit: g/L, range: [-20, 20]}]}
- {kind: table, name: history, table: stays, variables: [{name: age, unit: year, range: [0, 120]}]}
"""
JOB = """
kind: bench
name: wards
card: {card}
folds: 2
finetune:
  model: {{kind: mean, width: 8, encoders: {{table: {{kind: tabular, hidden: 8}}}}}}
  epochs: 2
  batch_size: 32
  passes_train: 1
  passes_eval: 2
systems:
  mean:
  draf: {{model: {{kind: draf}}}}
baselines: [{{kind: logistic_regression}}]
reference: mean
passes: 4
bootstrap: 40
"""


def write_export(folder: Path, *, num_stays: int = 240, num_travellers: int = 12) -> Path:
    """stays.csv: the marker tells the outcome (AUROC about .86), the age does not; some patients lie on two wards."""
    generator = np.random.default_rng(7)
    died = generator.random(num_stays) < 0.3
    marker = 1.5 * died + generator.normal(size=num_stays)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "stays.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["patient", "ward", "died", "marker", "age"])
        for i in range(num_stays):
            patient = i - 1 if 0 < i <= 2 * num_travellers and i % 2 else i
            age = "" if i % 5 == 0 else int(generator.integers(20, 90))
            writer.writerow([f"p{patient}", WARDS[i % len(WARDS)].upper(), int(died[i]), f"{marker[i]:.3f}", age])
    return folder


def write_job(folder: Path) -> Path:
    """bench.yaml, and the card that it names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "card.yaml").write_text(CARD)
    (folder / "bench.yaml").write_text(JOB.format(card=folder / "card.yaml"))
    return folder / "bench.yaml"

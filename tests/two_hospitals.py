"""A raw export of two small hospitals that name, code and measure things differently, and its card."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from draf_dist.config.spec import apply_overrides, parse_yaml, validate_spec
from draf_dist.schema.study import Rejection, Study
from draf_dist.sources.card import Card
from draf_dist.sources.hospital_export import HospitalExport

# The same three people as two hospitals would export them: other codes, units, column names and label words.

CARD = """
name: ward
licence: {name: none}
sites: {folders: [north, south]}
tables:
  stays:
    path: "{site}/stays.csv"
    study: stay
    subject: patient
    static: true
    rename: {south: {aufenthalt: stay, fall: patient, aufnahme: admitted, geschlecht: sex}}
  vitals: {path: "{site}/vitals.csv", study: stay, time: at, code: item, value: value, unit: unit}
  labs: {path: "{site}/labs.csv", study: stay, time: at, code: item, value: value, unit: unit}
  images: {path: "{site}/images.csv", study: stay, time: at}
studies: {table: stays, anchor: {column: admitted, offset_h: 24}}
label: death
labels:
  death: {column: outcome, classes: [survived, died], values: {alive: survived, dead: died, "0": survived, "1": died}}
modalities:
  - {kind: image, name: cxr, table: images, file: file, path: "{site}/img/{file}", window_h: [-24, 0], height: 32, width: 32}
  - kind: series
    name: vitals
    table: vitals
    window_h: [-24, 0]
    variables:
      - {name: heart_rate, code: {north: HR, south: 220045}, canonical: bpm, range: [20, 300]}
      - {name: temperature, code: {north: TEMP, south: T}, canonical: degC, range: [25, 45]}
  - kind: table
    name: labs
    table: labs
    window_h: [-24, 0]
    variables:
      - {name: glucose, code: {north: GLU, south: BZ}, canonical: mmol/L, range: [1, 60], molar_mass_g_mol: 180.156}
      - {name: wbc, code: {north: WBC, south: LEUKO}, canonical: 10^9/L, range: [0.1, 500]}
  - kind: table
    name: history
    table: stays
    variables:
      - {name: age, unit: year, range: [0, 120]}
      - {name: female, code: sex, type: binary, values: {F: 1, W: 1, M: 0}}
    multi_hot: [{column: icd, separator: ";", codes: {diabetes: ["E10*", "E11*"], copd: [J44]}}]
"""

Rows = list[list[Any]]


def write_csv(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def append(path: Path, rows: Rows) -> None:
    with path.open("a", newline="") as file:
        csv.writer(file).writerows(rows)


def write_png(path: Path, value: int, side: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side), value, np.uint8)).save(path)


def write_export(raw: Path) -> None:
    """Two sites, two studies each; study a died, b survived; admission on 1 March, anchor on 2 March, 06:00."""
    north, south = raw / "north", raw / "south"
    write_csv(
        north / "stays.csv",
        [["stay", "patient", "admitted", "age", "sex", "icd", "outcome"]]
        + [
            ["a", "P1", "2021-03-01 06:00:00", 70, "F", "E11.9; J44", "dead"],
            ["b", "P2", "2021-03-01 06:00:00", 50, "M", "", "alive"],
        ],
    )
    write_csv(
        south / "stays.csv",
        [["aufenthalt", "fall", "aufnahme", "age", "geschlecht", "icd", "outcome"]]
        + [["a", "Q1", "2021-03-01T06:00", 70, "W", "E11.9;J44", 1], ["b", "Q2", "2021-03-01T06:00", 50, "M", "NA", 0]],
    )
    head = [["stay", "at", "item", "value", "unit"]]
    write_csv(
        north / "vitals.csv",
        head + [["a", "2021-03-01 06:30:00", "HR", 80, "bpm"], ["a", "2021-03-02 05:30:00", "TEMP", 98.6, "degF"]],
    )
    write_csv(
        south / "vitals.csv",
        head + [["a", "2021-03-01 06:30:00", 220045, 80, "/min"], ["a", "2021-03-02 05:30:00", "T", 37.0, "°C"]],
    )
    write_csv(
        north / "labs.csv",
        head + [["a", "2021-03-01 12:00:00", "GLU", 90, "mg/dL"], ["a", "2021-03-01 12:00:00", "WBC", 7.5, "K/uL"]],
    )
    write_csv(
        south / "labs.csv",
        head + [["a", "2021-03-01 12:00:00", "BZ", 900 / 180.156, "mmol/L"], ["a", "2021-03-01 12:00:00", "LEUKO", 7500, "1/uL"]],
    )
    for site in (north, south):
        write_csv(
            site / "images.csv",
            [["stay", "file", "at"], ["a", "a.png", "2021-03-01 10:00:00"], ["b", "b.png", "2021-03-02 06:00:00"]],
        )
        write_png(site / "img/a.png", 10)
        write_png(site / "img/b.png", 20)


def source(raw: Path, *overrides: str, card: str = CARD) -> HospitalExport:
    tree = parse_yaml(card, where="card")
    apply_overrides(tree, overrides)
    return HospitalExport(validate_spec(tree, Card, where="card"), raw)


def read(raw: Path, *overrides: str, card: str = CARD) -> tuple[list[Study], list[Rejection]]:
    items = list(source(raw, *overrides, card=card).studies())
    return [item for item in items if isinstance(item, Study)], [item for item in items if isinstance(item, Rejection)]


def assert_same(left: list[Study], right: list[Study]) -> None:
    assert [(s.site, s.subject, s.anchor, s.label, s.image_digests) for s in left] == [
        (s.site, s.subject, s.anchor, s.label, s.image_digests) for s in right
    ]
    for one, other in zip(left, right, strict=True):
        assert one.inputs.keys() == other.inputs.keys()
        for name in one.inputs:
            np.testing.assert_array_equal(one.inputs[name], other.inputs[name])

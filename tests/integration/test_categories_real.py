"""Categorical columns of public exports of real hospitals. The data are no part of the repository: see DRAF_TEST_DATA."""

from collections import Counter
from pathlib import Path

import numpy as np
import public_data

from draf_dist.config.spec import parse_yaml, validate_spec
from draf_dist.data.prepare import prepare
from draf_dist.schema.modality import TableSpec
from draf_dist.schema.study import Rejection, Study
from draf_dist.sources.card import Card, load_card
from draf_dist.sources.hospital_export import HospitalExport

ROOT = Path(__file__).resolve().parents[2]
HEART = """
name: uci_heart_categories
licence: {name: CC-BY-4.0}
sites: {folders: {cleveland: cleveland, hungary: hungarian, switzerland: switzerland, long_beach: va}}
tables:
  visits:
    path: "processed.{site}.data"
    header: [age, sex, cp, trestbps, chol, fbs, restecg, thalach, exang, oldpeak, slope, ca, thal, num]
studies: {table: visits}
label: disease
labels:
  disease: {column: num, classes: [absent, present], values: {0: absent, 1: present, 2: present, 3: present, 4: present}}
modalities:
  - kind: table
    name: codes
    table: visits
    variables:
      - {name: pain, code: cp, type: categorical, categories: {typical: 1, atypical: 2, not_angina: 3, none: 4}, strict: true}
      - {name: rest, code: restecg, type: categorical, categories: {normal: 0, st_change: 1, hypertrophy: 2}}
      - {name: perfusion, code: thal, type: categorical, categories: {normal: 3, fixed: 6, reversible: 7}}
"""
EICU = """
name: eicu_categories
licence: {name: ODbL}
sites: {column: hospitalid, groups: {h73: "73"}, other: elsewhere}
tables:
  stays: {path: patient.csv.gz, study: patientunitstayid, subject: uniquepid}
studies: {table: stays}
label: death
labels: {death: {column: hospitaldischargestatus, classes: [Alive, Expired]}}
modalities:
  - kind: table
    name: admission
    table: stays
    variables:
      - {name: sex, code: gender, type: categorical, categories: [Female, Male], strict: true}
      - name: unit
        code: unittype
        type: categorical
        categories: {surgical: [SICU, CSICU, CTICU], medical: MICU, mixed: Med-Surg ICU, heart: [Cardiac ICU, CCU-CTICU]}
"""


def export_of(card: str, folder: str) -> HospitalExport:
    return HospitalExport(validate_spec(parse_yaml(card, where="card"), Card, where="card"), public_data.folder(folder))


def read(export: HospitalExport) -> tuple[list[Study], list[Rejection]]:
    items = list(export.studies())
    return [i for i in items if isinstance(i, Study)], [i for i in items if isinstance(i, Rejection)]


def test_codes_of_the_heart_data_are_what_its_card_says_one_by_one() -> None:
    """The card of the repository has the same columns as one binary variable a code."""
    coded = read(export_of(HEART, "uci_heart"))[0]
    source = load_card(ROOT / "datasets" / "uci_heart.yaml").build(public_data.folder("uci_heart"))
    spread = [item for item in source.studies() if isinstance(item, Study)]
    place = {
        spec.name: {one.name: at for at, one in enumerate(spec.variables)}
        for spec in source.schema.modalities
        if isinstance(spec, TableSpec)
    }
    columns = {
        0: ("clinic", ("pain_typical", "pain_atypical", "pain_not_angina", "pain_none")),
        1: ("exercise", ("rest_normal", "rest_st_change", "rest_hypertrophy")),
        2: ("imaging", ("perfusion_normal", "perfusion_fixed", "perfusion_reversible")),
    }
    by_row = {study.where: study for study in spread}
    compared: Counter[int] = Counter()
    for study in coded:
        for column, (modality, names) in columns.items():
            bits = by_row[study.where].inputs.get(modality)
            ones = [] if bits is None else [float(bits[0, place[modality][name]]) for name in names]
            code = float(study.inputs["codes"][0, column])
            # A cell of `?` is not known either way.
            assert np.isnan(code) == (not any(one == 1 for one in ones))
            if not np.isnan(code):
                assert ones == [float(at == code) for at in range(len(names))]
                compared[column] += 1
    # As published: everybody has a kind of pain; of 486 nobody looked at the perfusion.
    assert compared == {0: 920, 1: 918, 2: 434}


def test_admissions_of_eicu_are_counted_by_category(tmp_path: Path) -> None:
    export = export_of(EICU, "eicu_demo")
    release = prepare(export, str(tmp_path / "release"), subject_key=b"k" * 32, limit=0.05)
    # Neuro ICU is none of the card's categories (65 stays, 3 of them without an outcome, and such stays are left out).
    studies, rejections = read(export)
    assert len(studies) + len(rejections) == 2520
    unit, sex = export.counts.variables["admission.unit"], export.counts.variables["admission.sex"]
    assert (unit.unreadable, unit.observed + unit.unreadable) == (62, len(studies))
    assert sex.unreadable == 0
    values = np.array([study.inputs["admission"][0] for study in studies])
    whole = [np.bincount(column[~np.isnan(column)].astype(int)) for column in values.T]
    assert [column.tolist() for column in whole] == [[994, 1494], [200, 139, 1876, 215]]
    # Training has a part of each category, and what it counts is what it observed.
    for one, everybody in zip(release.stats.variables["admission"], whole, strict=True):
        assert sum(one.categories) == one.num_observed
        assert all(0.5 * number < count < number for count, number in zip(one.categories, everybody, strict=True))

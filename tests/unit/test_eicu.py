"""The source `eicu` on tiny look-alikes: what is known by the end of day one enters, and nothing that gives the outcome away."""

import csv
import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from draf_dist.data.prepare import inspect_source
from draf_dist.errors import DataError, SpecError
from draf_dist.schema.study import Rejection, Study
from draf_dist.sources.card import load_card
from draf_dist.sources.eicu.source import Eicu
from draf_dist.sources.hospital_export import HospitalExport

CARD = """
kind: eicu
name: small
licence: {name: none}
apache:
  patient:
    - {name: age, column: age, unit: year, values: {"> 89": 90}}
    - {name: female, column: gender, type: binary, values: {Female: 1, Male: 0}}
  patient_codes: [{column: unittype, prefix: unit_, codes: {medical: MICU, cardiac: ["CCU*", CSICU]}}]
  apache: [{name: ph, column: ph, range: [6.5, 8]}, {name: ventilated, column: vent, type: binary}]
vitals: {step_h: 6, variables: [{name: map, column: noninvasivemean, unit: mmHg, range: [10, 250]}]}
drugs:
  medication: [{column: gtc, says_nothing: ["0"], codes: {pressor: "32", diuretic: "56"}}]
  infusion: [{prefix: infusion_, codes: {norepinephrine: "norepinephrine*"}}]
respiration: {step_h: 12, variables: [{name: fio2, labels: [FiO2, FIO2 (%)], range: [21, 100]}]}
history:
  past: [{prefix: past_, says_nothing: ["*/Not Obtainable"], codes: {copd: "*/COPD/*"}}]
  admission: [{prefix: admitted_, codes: {sepsis: "*|Sepsis*", arrest: "*|Cardiac arrest (with*"}}]
"""
NAMES = ("Zqpatient1", "Zqpatient2", "Zqpatient3")
Row = dict[str, Any]


def stay(number: int, **changed: Any) -> Row:
    """A stay of 50 hours that was survived."""
    row = {
        "patientunitstayid": number,
        "uniquepid": NAMES[0],
        "hospitalid": 56,
        "age": 70,
        "gender": "Female",
        "unittype": "MICU",
        "hospitaldischargestatus": "Alive",
        "hospitaldischargelocation": "Home",
        "hospitaldischargeoffset": 4000,
        "unitdischargestatus": "Alive",
        "unitdischargelocation": "Floor",
        "unitdischargeoffset": 3000,
        "dischargeweight": 80,
    }
    return row | changed


TABLES: dict[str, list[Row]] = {
    "hospital": [{"hospitalid": 56}, {"hospitalid": 141}],
    "patient": [
        stay(101),
        stay(102, uniquepid=NAMES[1], age="> 89", gender="", unittype="CCU-CTICU", hospitaldischargestatus="Expired"),
        stay(103, uniquepid=NAMES[0], hospitalid=141, gender="Male", unittype="Neuro ICU"),
    ],
    "apacheApsVar": [{"patientunitstayid": 101, "ph": 7.2, "vent": 1}, {"patientunitstayid": 102, "ph": -1, "vent": 0}],
    "vitalAperiodic": [
        {"patientunitstayid": 101, "observationoffset": 0, "noninvasivemean": 60},
        {"patientunitstayid": 101, "observationoffset": 360, "noninvasivemean": 80},
        {"patientunitstayid": 101, "observationoffset": 361, "noninvasivemean": 100},
        {"patientunitstayid": 101, "observationoffset": 1440, "noninvasivemean": 110},
    ],
    "medication": [
        {"patientunitstayid": 101, "drugorderoffset": 5, "drugstartoffset": 10, "drugstopoffset": 100, "gtc": 32},
        {"patientunitstayid": 102, "drugorderoffset": 5, "drugstartoffset": 10, "drugstopoffset": 100, "gtc": 0},
    ],
    "infusionDrug": [{"patientunitstayid": 102, "infusionoffset": 50, "drugname": "Norepinephrine (mcg/min)"}],
    "respiratoryCharting": [
        {
            "patientunitstayid": 101,
            "respchartoffset": 30,
            "respchartentryoffset": 40,
            "respchartvaluelabel": "FIO2 (%)",
            "respchartvalue": "40",
        }
    ],
    "pastHistory": [
        {
            "patientunitstayid": 101,
            "pasthistoryoffset": -900,
            "pasthistoryenteredoffset": 12,
            "pasthistorypath": "notes/Pulmonary/COPD/COPD - severe",
        },
        {
            "patientunitstayid": 102,
            "pasthistoryoffset": 1,
            "pasthistoryenteredoffset": 12,
            "pasthistorypath": "notes/Options/Not Obtainable",
        },
    ],
    "admissionDx": [
        {"patientunitstayid": 102, "admitdxenteredoffset": 20, "admitdxpath": "all|Diagnosis|Cardiac arrest (with or without)"}
    ],
}


class Export:
    """A raw folder whose tables a test may change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tables = {name: [dict(row) for row in rows] for name, rows in TABLES.items()}

    def source(self, *overrides: str) -> Eicu:
        raw = self.folder / "raw"
        raw.mkdir(exist_ok=True)
        for name, rows in self.tables.items():
            with gzip.open(raw / f"{name}.csv.gz", "wt", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in [*TABLES[name], *rows] for key in row)))
                writer.writeheader()
                writer.writerows(rows)
        (self.folder / "card.yaml").write_text(CARD)
        source = load_card(self.folder / "card.yaml", overrides).build(raw)
        assert isinstance(source, Eicu)
        return source

    def studies(self) -> list[Study]:
        return list(only_studies(self.source().studies()))


def only_studies(items: Iterable[Study | Rejection]) -> Iterator[Study]:
    return (item for item in items if isinstance(item, Study))


@pytest.fixture
def export(tmp_path: Path) -> Export:
    return Export(tmp_path)


def same(left: list[Study], right: list[Study]) -> bool:
    return len(left) == len(right) and all(
        a.label == b.label
        and a.inputs.keys() == b.inputs.keys()
        and all(np.array_equal(a.inputs[name], b.inputs[name], equal_nan=True) for name in a.inputs)
        for a, b in zip(left, right, strict=True)
    )


def values(study: Study, modality: str) -> list[Any]:
    return [None if np.isnan(value) else round(float(value), 4) for value in study.inputs[modality].ravel()]


def test_tables_become_five_modalities(export: Export) -> None:
    schema = export.source().schema
    assert schema.names == ("apache", "vitals", "drugs", "respiration", "history")
    assert schema.sites == ("hospital_56", "hospital_141")
    assert [variable.name for variable in schema.modalities[0].variables] == [
        "age",
        "female",
        "ph",
        "ventilated",
        "unit_medical",
        "unit_cardiac",
    ]
    first, second, third = export.studies()
    assert [study.label for study in (first, second, third)] == [0, 1, 0]
    assert values(first, "apache") == [70, 1, 7.2, 1, 1, 0]
    assert values(first, "drugs") == [1, 0, None]
    assert values(first, "respiration") == [40, None]
    assert values(first, "history") == [1, None, None]
    # Nobody could ask, so the past is not known; the admission diagnosis is.
    assert values(second, "history") == [None, 0, 1]
    # An order without a class says nothing; the infusion does.
    assert values(second, "drugs") == [None, None, 1]
    assert third.inputs.keys() == {"apache"}
    assert values(third, "apache") == [70, 0, None, None, 0, 0]


def test_minus_one_is_no_measurement(export: Export) -> None:
    assert values(export.studies()[1], "apache")[2] is None


def test_steps_end_at_their_last_minute(export: Export) -> None:
    assert values(export.studies()[0], "vitals") == [70, 100, None, 110]


def test_age_above_89_is_a_number(export: Export) -> None:
    assert values(export.studies()[1], "apache")[0] == 90


def test_what_discharge_says_is_no_input(export: Export) -> None:
    before = export.studies()
    for row in export.tables["patient"]:
        row |= {
            "hospitaldischargelocation": "Death",
            "hospitaldischargeoffset": 1500,
            "unitdischargestatus": "Expired",
            "unitdischargelocation": "Death",
            "unitdischargeoffset": 1500,
            "dischargeweight": 0,
        }
    assert same(export.studies(), before)


def test_the_outcome_changes_the_label_and_nothing_else(export: Export) -> None:
    before = export.studies()
    export.tables["patient"][0]["hospitaldischargestatus"] = "Expired"
    after = export.studies()
    assert (before[0].label, after[0].label) == (0, 1)
    assert all(np.array_equal(array, after[0].inputs[name], equal_nan=True) for name, array in before[0].inputs.items())


def test_results_and_late_tables_are_never_opened(export: Export) -> None:
    before = export.studies()
    for name in ("apachePatientResult", "apachePredVar", "diagnosis", "treatment", "carePlanEOL"):
        (export.folder / "raw" / f"{name}.csv.gz").write_bytes(b"no archive at all")
    assert same(export.studies(), before)


@pytest.mark.parametrize(
    ("table", "row"),
    [
        ("vitalAperiodic", {"observationoffset": 1441, "noninvasivemean": 20}),
        ("vitalAperiodic", {"observationoffset": -1, "noninvasivemean": 20}),
        ("medication", {"drugorderoffset": 5, "drugstartoffset": 1441, "drugstopoffset": 2000, "gtc": 56}),
        ("medication", {"drugorderoffset": 1441, "drugstartoffset": 10, "drugstopoffset": 2000, "gtc": 56}),
        ("medication", {"drugorderoffset": -900, "drugstartoffset": -900, "drugstopoffset": -1, "gtc": 56}),
        ("infusionDrug", {"infusionoffset": 1441, "drugname": "Norepinephrine"}),
        (
            "respiratoryCharting",
            {"respchartoffset": 1000, "respchartentryoffset": 1441, "respchartvaluelabel": "FiO2", "respchartvalue": 99},
        ),
        ("pastHistory", {"pasthistoryoffset": -5, "pasthistoryenteredoffset": 1441, "pasthistorypath": "x/COPD/y"}),
        ("admissionDx", {"admitdxenteredoffset": 1441, "admitdxpath": "a|Sepsis, late"}),
        ("admissionDx", {"admitdxenteredoffset": "", "admitdxpath": "a|Sepsis, undated"}),
    ],
)
def test_rows_that_were_not_known_within_the_first_day_change_nothing(export: Export, table: str, row: Row) -> None:
    before = export.studies()
    export.tables[table] += [{"patientunitstayid": number, **row} for number in (101, 102, 103)]
    assert same(export.studies(), before)
    assert not same([], before)


def test_the_end_and_the_cancellation_of_an_order_come_later_and_change_nothing(export: Export) -> None:
    before = export.studies()
    for row in export.tables["medication"]:
        row |= {"drugstopoffset": 9000, "drugordercancelled": "Yes"}
    assert same(export.studies(), before)


def test_rows_after_the_end_of_a_short_stay_are_left_out(export: Export) -> None:
    export.tables["patient"][0]["unitdischargeoffset"] = 361
    source = export.source()
    assert values(next(only_studies(source.studies())), "vitals") == [70, 100, None, None]
    assert source.counts.tables["vitals.vitalAperiodic"].outside_window == 1


def test_short_stays_are_left_out_and_counted_but_are_nothing_bad(export: Export) -> None:
    export.tables["patient"][0]["unitdischargeoffset"] = 359
    source = export.source()
    items = list(source.studies())
    assert len(items) == 2
    assert all(isinstance(item, Study) for item in items)
    assert (source.counts.tables["patient"].rows, source.counts.tables["patient"].outside_window) == (3, 1)


def test_a_patient_in_two_hospitals_goes_to_one_split(export: Export) -> None:
    first, _, third = export.studies()
    assert first.subject == third.subject
    assert first.site != third.site
    assert first.anchor != third.anchor
    # Hospital 141 is held out, so the stay of the same patient in hospital 56 is too.
    source = export.source("split.held_out_sites=[hospital_141]")
    counts = inspect_source(source, subject_key=b"sixteen or more bytes of key").counts
    assert counts["hospital_56"]["ood"]["studies"] == counts["hospital_141"]["ood"]["studies"] == 1


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"hospitaldischargestatus": ""}, "no label"),
        ({"hospitaldischargestatus": "Moved"}, "unknown label"),
        ({"uniquepid": ""}, "no subject"),
        ({"hospitalid": 999}, "unknown site"),
        ({"patientunitstayid": 102}, "repeated study"),
        ({"unitdischargeoffset": "soon"}, "bad time"),
    ],
)
def test_bad_stays_are_quarantined_with_a_reason_and_without_a_name(export: Export, changed: Row, reason: str) -> None:
    export.tables["patient"][2] |= changed
    rejections = [item for item in export.source().studies() if isinstance(item, Rejection)]
    assert [rejection.reason for rejection in rejections] == [reason]
    assert rejections[0].where == "patient.csv.gz row 4"
    assert not any(name in str(rejections) for name in (*NAMES, "103"))


def test_values_out_of_range_are_not_observed_and_counted(export: Export) -> None:
    export.tables["respiratoryCharting"][0]["respchartvalue"] = "0.4"
    export.tables["apacheApsVar"][0]["ph"] = "acid"
    source = export.source()
    assert next(only_studies(source.studies())).inputs.keys() == {"apache", "vitals", "drugs", "history"}
    assert source.counts.variables["respiration.fio2"].out_of_range == 1
    assert source.counts.variables["apache.ph"].unreadable == 1


def test_missing_files_and_columns_are_told_together(export: Export) -> None:
    source = export.source()
    (export.folder / "raw" / "medication.csv.gz").unlink()
    with gzip.open(export.folder / "raw" / "infusionDrug.csv.gz", "wt") as file:
        file.write("patientunitstayid,infusionoffset,drug\n")
    with pytest.raises(DataError) as caught:
        list(source.studies())
    assert "medication.csv.gz: expected a CSV file" in str(caught.value)
    assert "infusionDrug.csv.gz: expected a column 'drugname'" in str(caught.value)


def test_a_broken_archive_is_told_by_its_name(export: Export) -> None:
    source = export.source()
    path = export.folder / "raw" / "vitalAperiodic.csv.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"vitalAperiodic\.csv\.gz"):
        list(source.studies())


def test_plain_csv_is_read_too(export: Export) -> None:
    before = export.studies()
    for packed in (export.folder / "raw").glob("*.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    source = load_card(export.folder / "card.yaml").build(export.folder / "raw")
    assert same(list(only_studies(source.studies())), before)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("apache.apache=[{name: died, column: actualhospitalmortality}]", "apache.apache.0.column"),
        ("apache.patient=[{name: weight, column: dischargeweight}]", "apache.patient.0.column"),
        ("drugs.medication=[{column: drugordercancelled, codes: {yes_: 'Yes'}}]", "drugs.medication.0.column"),
        ("window_h=48", "window_h"),
        ("vitals.step_h=5", "goes in evenly"),
        ("diagnosis={}", "expected a known key"),
        ("kind=eicuu", "Did you mean 'eicu'"),
        ("split.held_out_sites=[hospital_7]", "hospital_7"),
        ("split.held_out_sites=[hospital_56, hospital_141]", "a site left to train on"),
    ],
)
def test_a_card_can_not_name_what_leaks_or_is_not_there(export: Export, override: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        export.source(override)


def test_each_card_builds_its_own_source(export: Export, tmp_path: Path) -> None:
    assert export.source().card_sha256 == load_card(tmp_path / "card.yaml").sha256
    heart = Path(__file__).resolve().parents[2] / "datasets" / "uci_heart.yaml"
    assert isinstance(load_card(heart).build(tmp_path), HospitalExport)

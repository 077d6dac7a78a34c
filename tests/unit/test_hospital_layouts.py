"""Raw exports of other layouts: without headers, sites in a column, one study per subject, other times and decimal marks."""

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from two_hospitals import CARD, read, write_csv, write_export, write_png

from draf_dist.config.spec import apply_overrides, parse_yaml, validate_spec
from draf_dist.errors import DataError
from draf_dist.schema.study import Rejection, Study
from draf_dist.sources.card import Card
from draf_dist.sources.hospital_export import HospitalExport
from draf_dist.sources.tables import NO_TIME, times


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    write_export(tmp_path / "raw")
    return tmp_path / "raw"


# A layout like that of public heart data: one headerless file per site, no times, no subjects, `?` and 0 for missing.
HEART = """
name: heart
licence: {name: none}
sites: {folders: {rome: roman, oslo: norse}}
tables:
  visits: {path: "proc.{site}.data", header: [age, sex, pain, chol, ca, num]}
studies: {table: visits}
label: disease
labels:
  disease: {column: num, classes: [absent, present], values: {0: absent, 1: present, 2: present}}
modalities:
  - kind: table
    name: clinic
    table: visits
    variables:
      - {name: age, unit: year, range: [0, 120]}
      - {name: chol, unit: mg/dL, missing: [0]}
      - {name: ca, code: {rome: ca, oslo: null}}
    multi_hot: [{column: pain, prefix: pain_, codes: {typical: ["1", "1.0"], none: ["4", "4.0"]}}]
"""


def test_headerless_files_without_times_or_subjects(tmp_path: Path) -> None:
    (tmp_path / "proc.roman.data").write_text("63.0,1.0,1.0,233.0,0.0,0\r\n67.0,1.0,4.0,0.0,?,2.0\r\n")
    (tmp_path / "proc.norse.data").write_text("32,1,2,95,9,1\n40,0,4,?,9,?\n")
    studies, rejections = read(tmp_path, card=HEART)
    assert [(s.site, s.label, s.anchor) for s in studies] == [("rome", 0, ""), ("rome", 1, ""), ("oslo", 1, "")]
    assert len({s.subject for s in studies}) == 3
    np.testing.assert_array_equal(
        [s.inputs["clinic"][0] for s in studies], [[63, 233, 0, 1, 0], [67, np.nan, np.nan, 0, 1], [32, 95, np.nan, 0, 0]]
    )
    assert [(r.where, r.reason) for r in rejections] == [("proc.norse.data row 2", "no label")]


# A layout like that of a public collection of radiographs: one file for all, sites as free text, times as days from the onset.
COLLECTION = """
name: collection
licence: {name: none}
sites: {column: location, pattern: "([^,]+)$", groups: {italy: Italy, spain: [Spain, España]}, other: elsewhere}
tables:
  metadata: {path: metadata.csv, subject: patientid, time: offset, where: {modality: X-ray}}
studies: {table: metadata, anchor: {column: offset, number_unit: day}, repeat: last}
label: survival
labels:
  survival: {column: survival, classes: [died, survived], values: {N: died, Y: survived}}
  icu: {column: went_icu, classes: [no, yes], values: {N: no, Y: yes}}
modalities:
  - {kind: image, name: cxr, table: metadata, file: filename, path: "images/{file}", window_h: [-72, 0], height: 32, width: 32}
  - kind: table
    name: clinic
    table: metadata
    window_h: [-72, 0]
    variables:
      - {name: age, unit: year, range: [0, 120]}
      - {name: female, code: sex, type: binary, values: {F: 1, M: 0}}
"""


def write_collection(raw: Path) -> None:
    head = ["patientid", "offset", "sex", "age", "modality", "location", "filename", "survival", "went_icu", ""]
    rows = [
        ["1", "3", "F", "61", "X-ray", "Ospedale, Milan, Italy ", "1a.jpg", "Y", "N", ""],
        ["1", "5", "F", "61", "X-ray", "Milan, ITALY", "1b.jpg", "N", "Y", ""],
        ["1", "9", "F", "61", "CT", "Milan, Italy", "1c.jpg", "N", "Y", ""],
        ["2", "0", "M", "?", "X-ray", "Madrid, España", "2.jpg", "Y", "N", ""],
        ["3", "", "M", "40", "X-ray", "Spain", "3.jpg", "Y", "N", ""],
        ["4", "1", "M", "40", "X-ray", "Lyon, France", "4.jpg", "Y", "", "two\nlines"],
    ]
    write_csv(raw / "metadata.csv", [head, *rows])
    for row in rows:
        write_png(raw / "images" / f"{row[6]}.png", int(row[0]))
        (raw / "images" / f"{row[6]}.png").rename(raw / "images" / row[6])


def test_sites_in_a_column_times_in_days_and_one_study_per_subject(tmp_path: Path) -> None:
    write_collection(tmp_path)
    studies, rejections = read(tmp_path, card=COLLECTION)
    assert [(s.site, s.subject, s.anchor, s.label) for s in studies] == [
        ("italy", "1", "5", 0),
        ("spain", "2", "0", 1),
        ("elsewhere", "4", "1", 1),
    ]
    np.testing.assert_array_equal([s.inputs["clinic"][0] for s in studies], [[61, 1], [np.nan, 0], [40, 0]])
    assert [int(s.inputs["cxr"][0, 0, 0]) for s in studies] == [1, 2, 4]
    assert [(r.site, r.where, r.reason) for r in rejections] == [("spain", "metadata.csv row 6", "bad time")]


def test_the_label_is_a_choice_and_an_unlisted_site_is_rejected(tmp_path: Path) -> None:
    write_collection(tmp_path)
    studies, rejections = read(tmp_path, "label=icu", card=COLLECTION.replace(", other: elsewhere", ""))
    assert [(s.subject, s.label) for s in studies] == [("1", 1), ("2", 0)]
    assert ("metadata.csv row 7", "unknown site") in [(r.where, r.reason) for r in rejections]


def test_the_rows_of_a_label_count_for_that_label_alone_and_the_others_are_counted(tmp_path: Path) -> None:
    write_collection(tmp_path)
    card = COLLECTION.replace("values: {N: no, Y: yes}}", "values: {N: no, Y: yes}, where: {went_icu: [Y, N]}}")
    studies, _ = read(tmp_path, card=card)
    assert [s.subject for s in studies] == ["1", "2", "4"]
    tree = parse_yaml(card, where="card")
    apply_overrides(tree, ["label=icu"])
    export = HospitalExport(validate_spec(tree, Card, where="card"), tmp_path)
    items = list(export.studies())
    assert [s.subject for s in items if isinstance(s, Study)] == ["1", "2"]
    assert {item.reason for item in items if isinstance(item, Rejection)} == {"bad time"}
    # One row of a CT, and one of an X-ray of which nobody knows whether the patient went to the ICU.
    assert export.counts.tables["clinic.metadata"].not_wanted == 2


def test_joined_by_subject_earlier_days_count_and_later_ones_do_not(tmp_path: Path) -> None:
    write_collection(tmp_path)
    card = COLLECTION.replace("  metadata: {", "  pictures: {path: metadata.csv, subject: patientid, time: offset}\n  metadata: {")
    card = card.replace("name: cxr, table: metadata", "name: cxr, table: pictures").replace("repeat: last", "repeat: first")
    first = read(tmp_path, card=card)[0][0]
    assert (first.anchor, first.image_digests.keys()) == ("3", {"cxr"})
    digest = first.image_digests["cxr"]
    # With one study per row, the later study sees the picture of its own day, never that of day 9.
    studies = read(tmp_path, card=card.replace("repeat: first", "repeat: each"))[0]
    assert [(s.subject, s.anchor) for s in studies[:2]] == [("1", "3"), ("1", "5")]
    assert studies[0].image_digests["cxr"] == digest


def test_a_date_format_and_a_decimal_comma_are_read(tmp_path: Path) -> None:
    write_export(tmp_path)
    for name in ("vitals.csv", "labs.csv"):
        for site in ("north", "south"):
            path = tmp_path / site / name
            rows = list(csv.reader(path.open()))
            stamp = [[f"{r[1][8:10]}.{r[1][5:7]}.{r[1][:4]} {r[1][11:16]}"] for r in rows[1:]]
            changed = [[r[0], *s, r[2], r[3].replace(".", ","), r[4]] for r, s in zip(rows[1:], stamp, strict=True)]
            path.write_text("\n".join(";".join(row) for row in [rows[0], *changed]) + "\n")
    card = CARD.replace(", time: at, code", ", time: at, time_format: '%d.%m.%Y %H:%M', delimiter: ';', decimal: ',', code")
    np.testing.assert_allclose(read(tmp_path, card=card)[0][0].inputs["labs"], [[90 * 10 / 180.156, 7.5]], rtol=1e-6)


def test_study_ids_that_two_sites_use_cannot_share_a_file(raw: Path) -> None:
    write_csv(raw / "labs.csv", [["stay", "at", "item", "value", "unit"], ["a", "2021-03-01 12:00:00", "GLU", 90, "mg/dL"]])
    with pytest.raises(DataError, match="study ids of its own, found 2 that another site uses too"):
        read(raw, card=CARD.replace('labs: {path: "{site}/labs.csv"', "labs: {path: labs.csv"))


@pytest.mark.parametrize(
    ("time_format", "texts"),
    [
        (None, ["2021-03-01 06:00", "2021-03-01T06:00:00", "2021-02-31 06:00", "2021-03-01T06:00:00Z", "soon", None]),
        ("%d.%m.%Y %H:%M", ["01.03.2021 06:00", "1.3.2021 6:00", "31.02.2021 06:00", "01.03.2021 06:00 h", "soon", None]),
        ("%d/%m/%y %H:%M:%S.%f", ["01/03/21 06:00:00.0", "01/03/21 06:00:00.000", "31/02/21 06:00:00.0", "01/03/21", "soon", None]),
    ],
)
def test_a_day_that_no_calendar_has_is_no_time(time_format: str | None, texts: list[str | None]) -> None:
    six = int(np.datetime64("2021-03-01T06:00", "us").astype(np.int64))
    for one in (texts, *([text] for text in texts)):
        expected = [six if text in texts[:2] else NO_TIME for text in one]
        assert times(pa.array(one, pa.string()), time_format=time_format, number_unit=None).tolist() == expected


def test_times_as_numbers_are_exact_in_their_unit() -> None:
    found = times(pa.array(["1.5", "-2", "x", None, "1e300"]), time_format=None, number_unit="day")
    assert found.tolist() == [36 * 3_600_000_000, -48 * 3_600_000_000, NO_TIME, NO_TIME, NO_TIME]

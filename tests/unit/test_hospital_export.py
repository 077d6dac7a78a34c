"""A raw export and its card as studies: joined at the anchor, in canonical units, with everything that is bad told."""

import csv
import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from draf_dist.config.spec import apply_overrides, parse_yaml, validate_spec
from draf_dist.errors import DataError, SpecError
from draf_dist.schema.study import Rejection, Study
from draf_dist.sources.card import Card
from draf_dist.sources.hospital_export import HospitalExport
from draf_dist.sources.tables import NO_TIME, times

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


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    write_export(tmp_path / "raw")
    return tmp_path / "raw"


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


def test_sites_with_other_codes_units_and_columns_give_equal_studies(raw: Path) -> None:
    studies, rejections = read(raw)
    assert rejections == []
    assert [(s.site, s.subject, s.label) for s in studies] == [
        ("north", "P1", 1),
        ("north", "P2", 0),
        ("south", "Q1", 1),
        ("south", "Q2", 0),
    ]
    north, south = studies[0], studies[2]
    assert north.anchor == south.anchor == "2021-03-02T06:00:00"
    for name in ("cxr", "vitals", "labs", "history"):
        np.testing.assert_allclose(north.inputs[name], south.inputs[name], rtol=1e-6)


def test_units_become_canonical_in_closed_form(raw: Path) -> None:
    study = read(raw)[0][0]
    labs, vitals = study.inputs["labs"], study.inputs["vitals"]
    assert (labs.shape, labs.dtype, vitals.shape, vitals.dtype) == ((1, 2), np.float32, (24, 2), np.float32)
    np.testing.assert_allclose(labs, [[90 * 10 / 180.156, 7.5]], rtol=1e-6)
    np.testing.assert_allclose(vitals[23, 1], 37.0, rtol=1e-6)


def test_a_step_of_the_grid_holds_what_came_within_its_hour(raw: Path) -> None:
    append(raw / "north/vitals.csv", [["b", at, "HR", value, "bpm"] for at, value in [
        ("2021-03-01 06:00:00", 60),  # exactly at the start: first step
        ("2021-03-01 07:00:00", 70),  # the end of a step belongs to it
        ("2021-03-01 07:00:01", 100),
        ("2021-03-02 06:00:00", 90),  # exactly at the anchor: last step
    ]])  # fmt: skip
    heart_rate = read(raw)[0][1].inputs["vitals"][:, 0]
    expected = np.full(24, np.nan)
    expected[[0, 1, 23]] = [65, 100, 90]
    np.testing.assert_array_equal(heart_rate, expected)


@pytest.mark.parametrize(("how", "expected"), [("last", 3.0), ("mean", 4.0), ("min", 2.0), ("max", 7.0)])
def test_a_table_aggregates_its_window(raw: Path, how: str, expected: float) -> None:
    # The row that is last in time is not the last in the file.
    rows = [["b", f"2021-03-01 {hour}:00:00", "WBC", value, "10^9/L"] for hour, value in [("12", 7), ("20", 3), ("09", 2)]]
    append(raw / "north/labs.csv", rows)
    card = CARD.replace("canonical: 10^9/L,", f"canonical: 10^9/L, aggregate: {how},")
    assert read(raw, card=card)[0][1].inputs["labs"][0, 1] == expected


def test_a_study_without_rows_lacks_the_modality(raw: Path) -> None:
    assert set(read(raw)[0][1].inputs) == {"cxr", "history"}


def test_codes_become_multi_hot_and_an_empty_cell_differs_from_not_known(raw: Path) -> None:
    first, second, _, fourth = read(raw)[0]
    np.testing.assert_array_equal(first.inputs["history"], [[70, 1, 1, 1]])
    np.testing.assert_array_equal(second.inputs["history"], [[50, 0, 0, 0]])
    np.testing.assert_array_equal(fourth.inputs["history"], [[50, 0, np.nan, np.nan]])


def test_the_latest_image_in_the_window_is_joined(raw: Path) -> None:
    for name, value in (("early.png", 50), ("late.png", 60), ("after.png", 70)):
        write_png(raw / "north/img" / name, value)
    rows = [
        ["a", "late.png", "2021-03-02 05:59:00"],
        ["a", "early.png", "2021-03-01 11:00:00"],
        ["a", "after.png", "2021-03-02 06:00:01"],
    ]
    append(raw / "north/images.csv", rows)
    image = read(raw)[0][0].inputs["cxr"]
    assert (image.shape, image.dtype, int(image[0, 0, 0])) == ((1, 16, 16), np.uint8, 60)


OUTSIDE_H = st.one_of(st.floats(0.001, 5000), st.floats(-5000, -24.001))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hours=st.lists(OUTSIDE_H, min_size=1, max_size=12), stay=st.sampled_from("ab"), value=st.floats(20, 100))
def test_nothing_from_after_the_anchor_or_before_the_window_enters(
    tmp_path: Path, hours: list[float], stay: str, value: float
) -> None:
    raw = tmp_path / "raw"
    write_export(raw)
    before = read(raw)[0]
    anchor = np.datetime64("2021-03-02T06:00:00", "us")
    stamps = [str(anchor + np.timedelta64(round(h * 3.6e9), "us")).replace("T", " ") for h in hours]
    append(raw / "north/vitals.csv", [[stay, at, "HR", value, "bpm"] for at in stamps])
    append(raw / "north/labs.csv", [[stay, at, "WBC", value, "10^9/L"] for at in stamps])
    write_png(raw / "north/img/other.png", 99)
    append(raw / "north/images.csv", [[stay, "other.png", at] for at in stamps])
    assert_same(read(raw)[0], before)


def test_the_order_of_rows_in_the_files_changes_nothing(raw: Path) -> None:
    append(raw / "north/vitals.csv", [["b", f"2021-03-01 {hour:02d}:10:00", "HR", 60 + hour, "bpm"] for hour in range(8, 24)])
    before = read(raw)[0]
    for name in ("vitals", "labs", "images"):
        path = raw / f"north/{name}.csv"
        head, *rows = path.read_text().splitlines()
        path.write_text("\n".join([head, *rows[::-1]]) + "\n")
    assert_same(read(raw)[0], before)


def test_implausible_unreadable_and_converted_values_are_counted(raw: Path) -> None:
    append(raw / "north/vitals.csv", [["b", "2021-03-01 10:00:00", "HR", v, "bpm"] for v in ("900", "<40", "?", "", "77")])
    append(
        raw / "north/vitals.csv",
        [
            ["b", "soon", "HR", 70, "bpm"],
            ["zz", "2021-03-01 10:00:00", "HR", 70, "bpm"],
            ["b", "2022-01-01 00:00:00", "HR", 70, "bpm"],
        ],
    )
    export = source(raw)
    studies = [item for item in export.studies() if isinstance(item, Study)]
    assert np.nanmax(studies[1].inputs["vitals"]) == 77
    heart_rate, temperature = export.counts.variables["vitals.heart_rate"], export.counts.variables["vitals.temperature"]
    assert (heart_rate.observed, heart_rate.converted, heart_rate.out_of_range, heart_rate.unreadable) == (3, 0, 1, 1)
    assert (temperature.observed, temperature.converted) == (2, 1)
    rows = export.counts.tables["vitals.vitals"]
    assert (rows.rows, rows.unmatched, rows.bad_time, rows.outside_window) == (12, 1, 1, 1)


def test_a_second_pass_counts_anew_and_yields_the_same(raw: Path) -> None:
    export = source(raw)
    first = [item for item in export.studies() if isinstance(item, Study)]
    counts = export.counts
    assert_same([item for item in export.studies() if isinstance(item, Study)], first)
    assert export.counts == counts


def test_bad_studies_are_rejected_with_a_row_and_a_reason_and_no_subject(raw: Path) -> None:
    append(
        raw / "north/stays.csv",
        [["c", "SECRET3", "yesterday", 50, "M", "", "alive"], ["d", "SECRET4", "2021-03-01 06:00:00", 50, "M", "", "moved"]]
        + [["e", "SECRET5", "2021-03-01 06:00:00", 50, "M", "", ""], ["f", "", "2021-03-01 06:00:00", 50, "M", "", "alive"]]
        + [["a", "SECRET6", "2021-03-01 06:00:00", 50, "M", "", "alive"], ["g", "P1", "2021-03-01 06:00:00", 50, "M", "", "alive"]]
        + [["h", "SECRET8", "2021-03-01 06:00:00", "", "", "NA", "alive"]],
    )
    studies, rejections = read(raw)
    assert len(studies) == 4
    assert [(r.where, r.reason) for r in rejections] == [
        ("north/stays.csv row 4", "bad time"),
        ("north/stays.csv row 5", "unknown label"),
        ("north/stays.csv row 6", "no label"),
        ("north/stays.csv row 7", "no subject"),
        ("north/stays.csv row 8", "repeated study"),
        ("north/stays.csv row 9", "repeated study"),
        ("north/stays.csv row 10", "no input"),
    ]
    assert "SECRET" not in repr(rejections)


def broken_image(raw: Path, content: bytes) -> Rejection:
    (raw / "north/img/a.png").write_bytes(content)
    studies, rejections = read(raw)
    assert [s.subject for s in studies] == ["P2", "Q1", "Q2"]
    (rejection,) = rejections
    assert rejection.where == "north/images.csv row 2"
    return rejection


def encoded(array: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_truncated_image_is_quarantined(raw: Path, kind: str) -> None:
    content = encoded(NOISE, kind)
    assert broken_image(raw, content[: len(content) // 2]).reason == "broken image"


def test_a_png_whose_check_sum_is_wrong_is_quarantined(raw: Path) -> None:
    # Stored without compression, a changed pixel breaks nothing but the check sum.
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, "PNG", compress_level=0)
    content = bytearray(buffer.getvalue())
    content[len(content) // 2] ^= 0xFF
    assert broken_image(raw, bytes(content)).reason == "broken image"


def test_other_formats_are_not_decoded(raw: Path) -> None:
    assert broken_image(raw, encoded(NOISE, "TIFF")).reason == "broken image"


def test_a_decompression_bomb_is_refused_before_it_is_decoded(raw: Path) -> None:
    bomb = encoded(np.zeros((64, 9001), np.uint8))
    assert broken_image(raw, bomb).reason == "image too large"
    # A header that promises 200,000 x 200,000 pixels, with its check sum right.
    huge = bytearray(encoded(np.zeros((16, 16), np.uint8)))
    huge[16:24] = (200_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    assert broken_image(raw, bytes(huge)).reason == "image too large"


def test_an_image_that_is_too_small_or_not_there_is_quarantined(raw: Path) -> None:
    assert broken_image(raw, encoded(np.zeros((4, 40), np.uint8))).reason == "image too small"
    (raw / "north/img/a.png").unlink()
    assert read(raw)[1][0].reason == "missing image"


@pytest.mark.parametrize(
    ("name", "reason"), [("../../../outside.png", "bad path"), ("link.png", "bad path"), ("/etc/passwd", "missing image")]
)
def test_no_path_leads_out_of_the_raw_folder(raw: Path, name: str, reason: str) -> None:
    write_png(raw.parent / "outside.png", 1)
    (raw / "north/img/link.png").symlink_to(raw.parent / "outside.png")
    append(raw / "north/images.csv", [["a", name, "2021-03-02 05:00:00"]])
    assert [r.reason for r in read(raw)[1]] == [reason]


def test_an_image_with_an_unreadable_time_is_quarantined(raw: Path) -> None:
    append(raw / "north/images.csv", [["a", "a.png", "31.02.2021"]])
    assert [(r.where, r.reason) for r in read(raw)[1]] == [("north/images.csv row 4", "bad time")]


def test_one_image_file_claimed_by_two_subjects_stops_everything(raw: Path) -> None:
    append(raw / "north/images.csv", [["b", "a.png", "2021-03-05 00:00:00"]])
    with pytest.raises(DataError) as caught:
        read(raw)
    assert (
        "north/images.csv row 4: expected an image file of one subject only, found another subject's in north/images.csv row 2."
        in str(caught.value)
    )
    assert "P1" not in str(caught.value)


def test_equal_image_files_have_equal_digests(raw: Path) -> None:
    studies = read(raw)[0]
    # Sites share pictures byte for byte here: prepare sees it by the digest.
    assert studies[0].image_digests["cxr"] == studies[2].image_digests["cxr"] != studies[1].image_digests["cxr"]


def test_deep_images_are_windowed_to_eight_bits(raw: Path) -> None:
    deep = np.array([[1000, 2000], [3000, 5000]], np.uint16).repeat(8, 0).repeat(8, 1)
    (raw / "north/img/a.png").write_bytes(encoded(deep))
    image = read(raw)[0][0].inputs["cxr"][0, ::8, ::8]
    np.testing.assert_array_equal(image, [[0, 64], [128, 255]])
    levels = CARD.replace("height: 32,", "height: 32, levels: [2000, 3000],")
    np.testing.assert_array_equal(read(raw, card=levels)[0][0].inputs["cxr"][0, ::8, ::8], [[0, 0], [255, 255]])


def test_colour_and_alpha_become_the_channels_of_the_card(raw: Path) -> None:
    colour = np.zeros((16, 16, 4), np.uint8)
    colour[..., 0], colour[..., 3] = 255, 255
    (raw / "north/img/a.png").write_bytes(encoded(colour))
    assert int(read(raw)[0][0].inputs["cxr"][0, 0, 0]) == 76
    three = read(raw, card=CARD.replace("height: 32,", "height: 32, channels: 3,"))[0][0].inputs["cxr"]
    np.testing.assert_array_equal(three[:, 0, 0], [255, 0, 0])


def test_missing_columns_of_all_files_are_told_together_before_any_study(raw: Path) -> None:
    for path, old, new in [
        ("north/vitals.csv", "item", "itme"),
        ("south/stays.csv", "geschlecht", "sexus"),
        ("south/labs.csv", "unit", "value"),
    ]:
        text = (raw / path).read_text()
        (raw / path).write_text(text.replace(old, new, 1))
    with pytest.raises(DataError) as caught:
        next(source(raw).studies())
    told = str(caught.value).splitlines()
    assert "north/vitals.csv: expected a column 'item', found the columns stay, at, itme, value, unit. Did you mean 'itme'?" in told
    assert any(line.startswith("south/stays.csv: expected a column 'geschlecht'") for line in told)
    assert any(line.startswith("south/labs.csv: expected one column 'value', found several") for line in told)


def test_a_missing_file_is_named(raw: Path) -> None:
    (raw / "south/labs.csv").unlink()
    with pytest.raises(DataError, match=r"south/labs.csv: expected a CSV file, found no such file"):
        read(raw)


def test_a_modality_that_a_site_lacks_needs_no_file(raw: Path) -> None:
    (raw / "south/labs.csv").unlink()
    card = CARD.replace("name: labs\n", "name: labs\n    absent_at: [south]\n")
    studies = read(raw, card=card)[0]
    assert ["labs" in s.inputs for s in studies] == [True, False, False, False]


def test_unknown_units_in_the_data_are_told_with_code_unit_and_rows(raw: Path) -> None:
    append(
        raw / "north/labs.csv",
        [["b", "2021-03-01 12:00:00", "GLU", 90, "grain/pint"], ["b", "2021-03-01 13:00:00", "WBC", 7, "BLOB"]],
    )
    append(raw / "north/labs.csv", [["b", "2021-03-01 13:00:00", "WBC", 7, ""], ["b", "2021-03-01 14:00:00", "WBC", 7, "BLOB"]])
    with pytest.raises(DataError) as caught:
        read(raw)
    told = str(caught.value).splitlines()
    assert told == [
        "north/labs.csv: code WBC (variable wbc): expected a unit convertible to 10^9/L, found 'BLOB' in 2 rows. "
        "Say in unit_aliases what it means ('BLOB': ...), or correct it.",
        "north/labs.csv: code WBC (variable wbc): expected a unit convertible to 10^9/L, found no unit in 1 rows. "
        "Give variable wbc a `unit` for rows that state none.",
    ]
    aliases = CARD.replace("name: ward", "name: ward\nunit_aliases: {BLOB: 10^9/L}").replace(
        "canonical: 10^9/L,", "canonical: 10^9/L, unit: 10^9/L,"
    )
    assert read(raw, card=aliases)[0][1].inputs["labs"][0, 1] == 7


def test_rows_of_unequal_length_are_told_without_their_content(raw: Path) -> None:
    with (raw / "north/vitals.csv").open("a") as file:
        file.write("b,2021-03-01 10:00:00,HR,SECRET,bpm,extra\n")
    with pytest.raises(DataError, match=r"north/vitals.csv: expected 5 columns in every row, found 1 rows") as caught:
        read(raw)
    assert "SECRET" not in str(caught.value)


def test_another_encoding_is_told_and_can_be_named(raw: Path) -> None:
    path = raw / "south/vitals.csv"
    path.write_bytes(path.read_text().encode("latin-1"))
    with pytest.raises(DataError, match=r"south/vitals.csv: expected utf-8 text"):
        read(raw)
    card = CARD.replace('vitals: {path: "{site}/vitals.csv",', 'vitals: {path: "{site}/vitals.csv", encoding: latin-1,')
    assert len(read(raw, card=card)[0]) == 4


def test_a_raw_folder_that_is_not_there_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="expected a folder"):
        source(tmp_path / "none")


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

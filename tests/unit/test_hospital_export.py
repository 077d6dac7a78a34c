"""A raw export and its card as studies: joined at the anchor, in canonical units, with everything that is bad told."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from two_hospitals import CARD, append, assert_same, read, source, write_export, write_png

from draf_dist.errors import DataError, SpecError
from draf_dist.schema.study import Study


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    write_export(tmp_path / "raw")
    return tmp_path / "raw"


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

"""Files as hospitals really send them: what is read from them, what is refused, and where a message says that it stands."""

import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from ward_export import image_file, replace_text, write_ward

from draf_dist.data.prepare import prepare
from draf_dist.errors import DataError, SpecError
from draf_dist.schema.study import Rejection, Study
from draf_dist.sources.card import load_card
from draf_dist.sources.hospital_export import HospitalExport
from draf_dist.sources.tables import numbers, times
from draf_dist.storage import open_store

STAYS = "raw/north/stays.csv"
LABS = "raw/north/labs.csv"


@pytest.fixture
def ward(tmp_path: Path) -> Path:
    return write_ward(tmp_path, num_studies=6)


def read(ward: Path) -> tuple[list[Study], list[Rejection], HospitalExport]:
    source = HospitalExport(load_card(ward / "card.yaml"), ward / "raw")
    found = list(source.studies())
    return [s for s in found if isinstance(s, Study)], [r for r in found if isinstance(r, Rejection)], source


def rewrite(path: Path, change: "dict[bytes, bytes]") -> None:
    content = path.read_bytes()
    for old, new in change.items():
        assert old in content
        content = content.replace(old, new)
    path.write_bytes(content)


def test_byte_order_mark_line_ends_and_quotes_change_nothing(ward: Path) -> None:
    plain = read(ward)[0]
    for line_end in (b"\r\n", b"\r", b"\n\n"):
        rewritten = write_ward(ward / line_end.hex(), num_studies=6)
        rewrite(rewritten / STAYS, {b"\n": line_end, b"alive": b'"alive"'})
        (rewritten / STAYS).write_bytes(b"\xef\xbb\xbf" + (rewritten / STAYS).read_bytes())
        studies = read(rewritten)[0]
        assert [(s.subject, s.anchor, s.label) for s in studies] == [(s.subject, s.anchor, s.label) for s in plain]


def test_rows_are_counted_as_a_spreadsheet_does_with_blank_lines(ward: Path) -> None:
    replace_text(ward / STAYS, "STAY88260002", "\n  \n,,,,,\nSTAY88260002")
    replace_text(ward / STAYS, "2031-03-05", "2031-99-05")
    studies, rejections, _ = read(ward)
    assert len(studies) == 11
    assert [rejection.where for rejection in rejections] == ["north/stays.csv row 9"]
    assert studies[2].where == "north/stays.csv row 7"


def test_a_date_that_stands_for_no_date_is_quarantined(ward: Path) -> None:
    replace_text(ward / STAYS, "2031-03-02 06:00", "9999-12-31 06:00")
    assert [rejection.reason for rejection in read(ward)[1]] == ["bad time"]


def test_a_site_without_studies_does_not_stop_the_others(ward: Path) -> None:
    (ward / STAYS).write_text("stay,patient,surname,admitted,age,outcome\n")
    studies, rejections, _ = read(ward)
    assert {study.site for study in studies} == {"south"}
    assert rejections == []


def test_an_empty_file_is_called_so(ward: Path) -> None:
    (ward / LABS).write_text("")
    with pytest.raises(DataError, match=r"north/labs.csv: expected a line of column names, found an empty file"):
        read(ward)
    names = "header: [stay, at, item, value, unit], study: stay, time: at, code"
    replace_text(ward / "card.yaml", '"{site}/labs.csv", study: stay, time: at, code', f'"{{site}}/labs.csv", {names}')
    with pytest.raises(DataError, match=r"north/labs.csv: expected rows, found an empty file"):
        read(ward)


def test_another_delimiter_is_recognised_and_no_cell_is_shown(ward: Path) -> None:
    rewrite(ward / STAYS, {b",": b";"})
    with pytest.raises(DataError, match=r"found none of them among its 1 columns. Set `delimiter: ';'`"):
        read(ward)


def test_a_quote_that_swallows_rows_is_refused(ward: Path) -> None:
    # Closed three rows further down, it makes one row of four, and the number of columns is right.
    replace_text(ward / LABS, "STAY88260001,", '"STAY88260001,')
    replace_text(ward / LABS, "STAY88260004,", 'STAY88260004",')
    with pytest.raises(DataError, match=r"north/labs.csv row 3: stay: expected cells of one line") as caught:
        read(ward)
    assert "STAY8826" not in str(caught.value)


def test_notes_of_several_lines_are_no_mistake(ward: Path) -> None:
    rewrite(ward / STAYS, {b"Zqfamilyname2": b'"Zqfamilyname\nsecond line"'})
    assert len(read(ward)[0]) == 12


def test_beside_decimal_commas_a_point_is_no_number() -> None:
    texts = pa.array(["1,5", "1.234", "1.234,5", "7", None])
    assert numbers(texts, decimal=",").tolist() == pytest.approx([1.5, np.nan, np.nan, 7, np.nan], nan_ok=True)
    assert np.isnan(numbers(pa.array(["1_000", "x"]))).all()
    assert times(pa.array(["1,5"]), time_format=None, number_unit="hour", decimal=",").tolist() == [5_400_000_000]


def test_what_a_site_never_gave_is_told(ward: Path) -> None:
    rewrite(ward / LABS, {b"GLU": b"GLUC"})
    assert read(ward)[2].counts.variables["labs.glucose"].empty_at == ["north"]
    rewrite(ward / "raw/south/labs.csv", {b" 12:00": b"T12:00Z"})
    counts = read(ward)[2].counts
    assert counts.variables["labs.glucose"].empty_at == ["north", "south"]
    assert counts.tables["labs.labs"].bad_time == 6


def test_the_label_is_no_input(ward: Path) -> None:
    multi = "variables: [{name: age, unit: year, range: [0, 120]}], multi_hot: [{column: outcome, codes: {fate: dead}}]"
    replace_text(ward / "card.yaml", "variables: [{name: age, unit: year, range: [0, 120]}]", multi)
    with pytest.raises(SpecError, match="variable outcome: expected another column, found the label's own"):
        read(ward)


def test_two_sites_in_one_folder_are_refused(ward: Path) -> None:
    replace_text(ward / "card.yaml", "[north, south]", "{north: north, south: north}")
    with pytest.raises(SpecError, match="sites.folders: expected every name once, found 'north' 2 times"):
        read(ward)


@pytest.mark.parametrize("break_it", ["long name", "loop", "folder"])
def test_an_image_that_the_disk_refuses_is_quarantined_unnamed(ward: Path, break_it: str) -> None:
    image = image_file(ward)
    if break_it == "long name":
        replace_text(ward / "raw/north/images.csv", image.name, f"{'XRAYFILE' * 60}.png")
    else:
        image.unlink()
        image.symlink_to(image) if break_it == "loop" else image.mkdir()
    (rejection,) = read(ward)[1]
    assert rejection.where == "north/images.csv row 5"
    assert rejection.reason in ("unreadable image", "missing image")
    assert "XRAYFILE" not in rejection.detail


def test_a_blank_image_is_quarantined_with_its_row(ward: Path) -> None:
    Image.new("L", (20, 20), 7).save(image_file(ward))
    source = HospitalExport(load_card(ward / "card.yaml"), ward / "raw")
    quarantine = prepare(source, str(ward / "out"), subject_key=bytes(16), limit=0.5).quarantine()
    assert [(study.where, study.reason) for study in quarantine.studies] == [("north/stays.csv row 5", "blank image")]


def test_every_kind_of_picture_is_read_without_a_warning(ward: Path) -> None:
    generator = np.random.default_rng(1)
    colour = Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8))
    palette = colour.convert("P")
    palette.info["transparency"] = bytes(range(256))
    pictures = {
        "PNG": [
            colour,
            palette,
            colour.convert("RGBA"),
            colour.convert("1"),
            Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 99),
        ],
        "JPEG": [colour, colour.convert("L"), colour.convert("CMYK")],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind, images in pictures.items():
            for image in images:
                image.save(image_file(ward), kind)
                assert read(ward)[0][3].inputs["cxr"].std() > 10


@pytest.mark.parametrize("url", ["", " ", "s3:/bucket/x", "S3://bucket/x", "file:/x", "gs://x"])
def test_a_url_that_is_none_is_not_taken_for_a_folder(url: str) -> None:
    with pytest.raises(SpecError, match="expected a local path, file:///path or s3://bucket/prefix"):
        open_store(url)

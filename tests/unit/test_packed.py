"""Packed files of an export: what is read from them, what is refused."""

import gzip
import zipfile
from pathlib import Path

import pytest
from ward_export import replace_text, write_ward

from draf_dist.errors import DataError
from draf_dist.schema.study import Study
from draf_dist.sources.card import load_card
from draf_dist.sources.hospital_export import HospitalExport
from draf_dist.sources.packed import opened

FILE = "raw/north/stays.csv"


@pytest.fixture
def ward(tmp_path: Path) -> Path:
    return write_ward(tmp_path, num_studies=6)


def pack(ward: Path, site: str, members: "dict[str, bytes] | None" = None, **options: int) -> Path:
    """A site's stays as a zip of these members (by default: the table alone)."""
    plain = ward / "raw" / site / "stays.csv"
    packed = plain.with_suffix(".csv.zip")
    with zipfile.ZipFile(packed, "w", **options) as archive:
        for name, content in (members or {"stays.csv": plain.read_bytes()}).items():
            archive.writestr(name, content)
    return packed


def studies(ward: Path) -> list[tuple[str, str, object, dict[str, list[float]]]]:
    source = HospitalExport(load_card(ward / "card.yaml"), ward / "raw")
    found = [study for study in source.studies() if isinstance(study, Study)]
    return [(s.subject, s.anchor, s.label, {k: v.ravel().tolist() for k, v in s.inputs.items()}) for s in found]


def refusal(ward: Path) -> str:
    with pytest.raises(DataError) as caught:
        studies(ward)
    return str(caught.value)


@pytest.mark.parametrize("name", ["stays.csv", "../../../elsewhere/stays.csv.zip", "/etc/stays.csv", "folder/stays"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_says_what_the_file_in_it_says_whatever_that_is_called(ward: Path, name: str, method: int) -> None:
    plain = studies(ward)
    before = sorted(str(path) for path in ward.parent.rglob("*"))
    for site in ("north", "south"):
        pack(ward, site, {name: (ward / "raw" / site / "stays.csv").read_bytes()}, compression=method)
    replace_text(ward / "card.yaml", "/stays.csv", "/stays.csv.zip")
    assert studies(ward) == plain
    added = set(map(str, ward.parent.rglob("*"))) - set(before)
    assert added == {str(ward / "raw" / site / "stays.csv.zip") for site in ("north", "south")}, "nothing is unpacked to disk"


def test_what_a_macintosh_adds_to_a_zip_is_no_second_file(ward: Path) -> None:
    plain = studies(ward)
    for site in ("north", "south"):
        content = (ward / "raw" / site / "stays.csv").read_bytes()
        pack(ward, site, {"stays/": b"", "stays/stays.csv": content, "__MACOSX/stays/._stays.csv": b"\0\5\26\7"})
    replace_text(ward / "card.yaml", "/stays.csv", "/stays.csv.zip")
    assert studies(ward) == plain


@pytest.mark.parametrize(("members", "number"), [({"a.csv": b"x", "b.csv": b"y"}, 2), ({"folder/": b""}, 0)])
def test_a_zip_holds_one_file(ward: Path, members: dict[str, bytes], number: int) -> None:
    pack(ward, "north", members)
    pack(ward, "south")
    replace_text(ward / "card.yaml", "/stays.csv", "/stays.csv.zip")
    assert f"north/stays.csv.zip: expected a zip of one file, found {number} files" in refusal(ward)


def test_a_zip_with_a_password_is_refused(ward: Path) -> None:
    packed = bytearray(pack(ward, "north").read_bytes())
    # The flag of an encrypted member, in its own header and in the directory at the end.
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        packed[packed.index(mark) + place] |= 1
    pack(ward, "south")
    (ward / f"{FILE}.zip").write_bytes(packed)
    replace_text(ward / "card.yaml", "/stays.csv", "/stays.csv.zip")
    assert "north/stays.csv.zip: expected a zip without a password" in refusal(ward)


@pytest.mark.parametrize("how", ["no archive", "cut off", "a byte changed", "unknown method"])
def test_a_broken_zip_is_refused_before_or_while_it_is_read(ward: Path, how: str) -> None:
    path = pack(ward, "north", compression=zipfile.ZIP_STORED)
    whole = path.read_bytes()
    place = whole.index(b"STAY88260003")
    broken = {
        "no archive": b"stay,patient\n",
        "cut off": whole[: len(whole) // 2],
        "a byte changed": whole[:place] + b"T" + whole[place + 1 :],
        "unknown method": whole.replace(b"PK\3\4" + whole[4:8] + b"\0\0", b"PK\3\4" + whole[4:8] + b"\x63\0").replace(
            b"PK\1\2" + whole[whole.index(b"PK\1\2") + 4 : whole.index(b"PK\1\2") + 10] + b"\0\0",
            b"PK\1\2" + whole[whole.index(b"PK\1\2") + 4 : whole.index(b"PK\1\2") + 10] + b"\x63\0",
        ),
    }[how]
    path.write_bytes(broken)
    pack(ward, "south")
    replace_text(ward / "card.yaml", "/stays.csv", "/stays.csv.zip")
    assert "north/stays.csv.zip: expected a zip file, found a broken one" in refusal(ward)


def test_a_gzip_file_that_was_cut_off_is_refused(ward: Path) -> None:
    for site in ("north", "south"):
        plain = ward / "raw" / site / "stays.csv"
        plain.with_suffix(".csv.gz").write_bytes(gzip.compress(plain.read_bytes())[:-40])
    replace_text(ward / "card.yaml", "/stays.csv", "/stays.csv.gz")
    assert "stays.csv.gz: expected a gzip file, found a broken one" in refusal(ward)


def test_an_error_of_the_reader_stays_what_it_is(ward: Path) -> None:
    """Only what the archive itself causes is told as a broken archive."""
    with pytest.raises(ValueError, match="of the caller"), opened(pack(ward, "north"), "north/stays.csv.zip"):
        raise ValueError("of the caller")

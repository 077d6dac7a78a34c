"""A delivery has arrived when its list has, and is what was sealed or nothing."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from draf_dist.errors import DataError, SpecError
from draf_dist.schema.delivery import MAX_FILE_BYTES
from draf_dist.sources.card import load_card
from draf_dist.sources.delivery import card_of_sites, check_files, delivery_sha256, read_delivery, seal
from draf_dist.sources.hospital_export import HospitalExportCard
from draf_dist.sources.synth import synthesise
from draf_dist.storage.local import UNFINISHED


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {"north/stays.csv": "a,b\n1,2\n", "north/img/john_doe.png": "pixels", "notes.txt": ""}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def listed(folder: Path, **changes: object) -> None:
    """Changes delivery.json by hand."""
    content = json.loads((folder / "delivery.json").read_text())
    (folder / "delivery.json").write_text(json.dumps(content | changes))


def test_what_is_sealed_is_read_again_and_every_file_is_in_the_list(folder: Path) -> None:
    delivery = seal(folder, "n-1", sites=["north"], previous_delivery="n-0")
    assert read_delivery(folder) == delivery
    assert [file.path for file in delivery.files] == ["north/img/john_doe.png", "north/stays.csv", "notes.txt"]
    assert (delivery.sites, delivery.previous_delivery, delivery.size_bytes) == (("north",), "n-0", 14)
    check_files(folder, delivery)
    assert list(folder.glob(f"{UNFINISHED}*")) == []


def test_sealing_again_changes_nothing_and_another_list_is_never_overwritten(folder: Path) -> None:
    first = seal(folder, "n-1", created_at=datetime(2026, 1, 1, tzinfo=UTC))
    before = (folder / "delivery.json").read_bytes()
    assert seal(folder, "n-1") == first
    with pytest.raises(SpecError, match="found one of delivery n-1\\. A sealed delivery does not change"):
        seal(folder, "n-2")
    (folder / "notes.txt").write_text("more")
    with pytest.raises(SpecError, match="of delivery n-1, of other files"):
        seal(folder, "n-1")
    assert (folder / "delivery.json").read_bytes() == before


def test_a_folder_without_a_list_has_not_arrived(folder: Path) -> None:
    with pytest.raises(SpecError, match=r"a delivery that has arrived, found none.*draf delivery seal"):
        read_delivery(folder)
    with pytest.raises(SpecError, match="expected the folder of a delivery, found nothing"):
        read_delivery(folder / "nowhere")


def test_what_a_killed_seal_left_is_no_part_of_the_delivery(folder: Path) -> None:
    (folder / f"{UNFINISHED}17-ab").write_text("{")
    check_files(folder, seal(folder, "n-1"))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda folder: (folder / "north/stays.csv").write_text("a,b\n1,3\n"), r"file 2 of the list \(\.csv file\): other bytes"),
        (lambda folder: (folder / "north/stays.csv").write_text("a"), r"file 2 of the list \(\.csv file\): 1 bytes, not 8"),
        (lambda folder: (folder / "north/img/john_doe.png").unlink(), r"file 1 of the list \(\.png file\): missing"),
        (
            lambda folder: (folder / "north/jane_roe.png").write_text("x"),
            r"\.png file one folder down that the list does not have: 1",
        ),
        (
            lambda folder: (folder / "north/img/.DS_Store").write_text("x"),
            r"hidden \(a name that begins with a dot, as \.DS_Store\) file 2 folders down that the list does not have: 1",
        ),
    ],
)
def test_whatever_differs_from_the_seal_is_told_without_a_files_name(folder: Path, change: object, found: str) -> None:
    delivery = seal(folder, "n-1")
    change(folder)  # type: ignore[operator]
    with pytest.raises(DataError, match=found) as caught:
        check_files(folder, delivery)
    assert "found 1 differences" in str(caught.value)
    assert not any(name in str(caught.value) for name in ("john", "jane"))


def test_links_are_refused_when_sealing_and_when_checking(folder: Path) -> None:
    delivery = seal(folder, "n-1")
    (folder / "notes.txt").unlink()
    (folder / "notes.txt").symlink_to(folder / "north/stays.csv")
    with pytest.raises(DataError, match="plain files only"):
        check_files(folder, delivery)
    (folder / "delivery.json").unlink()
    with pytest.raises(DataError, match="plain files only"):
        seal(folder, "n-1")


@pytest.mark.parametrize(
    "path", ["../x", "/etc/x", "a//b", "a/./b", "", "a\\b", "c:x", "a\nb", "delivery.json", "a/../../x", "x" * 2000]
)
def test_a_path_that_could_lead_elsewhere_is_refused(folder: Path, path: str) -> None:
    seal(folder, "n-1")
    listed(folder, files=[{"path": path, "size_bytes": 1, "sha256": "0" * 64}])
    with pytest.raises(DataError, match=r"found .* at files\.1\.path"):
        read_delivery(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"delivery_id": "../up"},
        {"created_at": "2026-01-01T00:00:00"},  # no time zone
        {"files": []},
        {"files": [{"path": "a", "size_bytes": MAX_FILE_BYTES + 1, "sha256": "0" * 64}]},
        {"files": [{"path": "a", "size_bytes": -1, "sha256": "0" * 64}]},
        {"files": [{"path": "a", "size_bytes": 1, "sha256": "0" * 64}] * 2},
        {"extra": 1},
    ],
)
def test_a_list_that_is_not_as_described_is_refused(folder: Path, changes: dict[str, object]) -> None:
    seal(folder, "n-1")
    listed(folder, **changes)
    with pytest.raises(DataError, match=r"delivery\.json: expected a delivery, found"):
        read_delivery(folder)


@pytest.mark.parametrize("place", ["", "files.1"])
def test_an_unknown_key_is_not_named_for_it_may_be_a_patients_name(folder: Path, place: str) -> None:
    seal(folder, "n-1")
    entry = {"path": "a", "size_bytes": 1, "sha256": "0" * 64}
    listed(folder, **({"files": [{**entry, "Jane Roe": 1}]} if place else {"Jane Roe": 1}))
    with pytest.raises(DataError, match=f"a key that is not one of those .* at {place or 'top level'}") as caught:
        read_delivery(folder)
    assert "Jane" not in str(caught.value)


def test_of_a_card_of_several_sites_only_those_of_the_delivery_are_kept(tmp_path: Path) -> None:
    synthesise(tmp_path, num_subjects=8, seed=0)
    whole = load_card(tmp_path / "card.yaml")
    assert isinstance(whole, HospitalExportCard)
    first, *others = whole.sites.names()
    one = card_of_sites(whole, [first])
    assert one.sites.names() == (first,)
    assert not any(other in one.model_dump_json() for other in others)
    schema = whole.data_schema()
    assert one.data_schema() == schema.model_copy(update={"sites": (first,)})
    assert card_of_sites(whole, []) == card_of_sites(whole, ["elsewhere", first]) == whole


def test_an_id_that_no_release_should_hold_and_an_empty_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="at delivery_id"):
        seal(folder, "Jane Roe, 3 May")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found none"):
        seal(tmp_path / "empty", "n-1")


def test_the_digest_is_of_the_content_and_not_of_its_layout(folder: Path) -> None:
    digest = delivery_sha256(seal(folder, "n-1"))
    content = json.loads((folder / "delivery.json").read_text())
    (folder / "delivery.json").write_text(json.dumps(dict(reversed(content.items())), indent=7))
    assert delivery_sha256(read_delivery(folder)) == digest
    listed(folder, created_at="2020-01-01T00:00:00+00:00")
    assert delivery_sha256(read_delivery(folder)) != digest

"""Urls of foreign tars and cards for them that can't be meant so."""

from pathlib import Path

import pytest
from foreign_tars import CARD, KEY, source, write_tars

from draf_dist.data.foreign import prepare_foreign
from draf_dist.errors import SpecError


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("s3://key:secret@bucket/a.tar", "expected one without credentials"),
        ("pipe:cat a.tar", "found none"),
        ("http://host/a.tar", "expected a local path"),
        ("{tmp}/nothing", "expected a tar, or a folder of tars, found none"),
        ("{tmp}/tars/wards-{000..009}.tar", r"wards-004\.tar: expected a tar"),
        ("{tmp}/tars/x-*.tar", "tars, found none"),
        ("{tmp}/ta*/a.tar", "in the name of the tars alone"),
        ("{tmp}/tars/wards-{009..000}.tar", "from low to high"),
    ],
)
def test_what_is_no_url_of_tars_is_refused(tmp_path: Path, url: str, found: str) -> None:
    (write_tars(tmp_path / "tars", per_tar=1) / "other.tar.gz").write_bytes(b"")
    with pytest.raises(SpecError, match=found) as caught:
        prepare_foreign(source(url.replace("{tmp}", str(tmp_path))), str(tmp_path / "out"), subject_key=KEY)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("a.tar.gz", "a.tar.gz"),
        ("a.tgz", "a.tgz"),
        ("a.tar.bz2", "a.tar.bz2"),
        ("A.TAR.ZST", "A.TAR.ZST"),
        ("a-{000..003}.tar.xz", "a-000.tar.xz"),
        ("folder", "b.tar.gz"),
        ("folder/", "b.tar.gz"),
        ("folder/*.tar", "b.tar.gz"),
        ("folder/b.tar*", "b.tar.gz"),
        ("folder/*.gz", "b.tar.gz"),
    ],
)
def test_compressed_tars_are_refused_with_what_to_do(tmp_path: Path, url: str, name: str) -> None:
    for file in ("a.tar.gz", "a.tgz"):
        (tmp_path / file).write_bytes(b"\x1f\x8b")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(SpecError, match=f"expected tars that are not compressed, found {name}. Unpack them first .gunzip"):
        prepare_foreign(source(f"{tmp_path}/{url}"), str(tmp_path / "out"), subject_key=KEY)


def modality(**changes: object) -> list[dict[str, object]]:
    return [{**CARD["modalities"][0], **changes}]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"modalities": modality(member="pyd")}, "only jpg, jpeg, png, npy can be decoded"),
        ({"modalities": modality(member="a.pkl")}, "only jpg, jpeg, png, npy can be decoded"),
        ({"subject": {"member": "id.pickle"}}, "is no plain text"),
        ({"subject": {"member": "id", "field": "id"}}, "exactly one of"),
        ({"sites": {"constant": "north", "groups": {"south": "s"}}}, "either a `constant` site"),
        ({"sites": {"field": "h", "groups": {"north": "n", "south": ["s", "n"]}}}, "n in two groups"),
        ({"split": {"held_out_sites": ["west"]}}, "held-out sites west are none of north, south"),
        ({"split": {"files": {"val": "v*"}}}, "needs a pattern for train"),
        ({"label": "other"}, "label other is none of finding"),
        ({"labels": {"finding": {"member": "jpg", "classes": ["a", "b"]}}}, "member jpg is both a modality and a word"),
        ({"modalities": CARD["modalities"] + modality(member="b.jpg")}, "modality cxr twice"),
    ],
)
def test_a_card_that_can_not_be_meant_so_is_refused(changes: dict[str, object], found: str) -> None:
    with pytest.raises(SpecError, match=found):
        source("x", **changes)

"""Samples of foreign tars: what they mean, what is left out and why, and what is never decoded."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from foreign_release import made, stored, uid
from foreign_tars import HEIGHT, KEY, WIDTH, by_hand, card, members_of, name, npy, picture, sample, source, values, write

from draf_dist.data.encode import UnfitError
from draf_dist.data.foreign import prepare_foreign
from draf_dist.data.foreign_words import Words
from draf_dist.data.verify import verify
from draf_dist.errors import DataError

Members = dict[str, bytes]


def bad(extension: str, content: bytes) -> Callable[[Members], Members]:
    return lambda members: {**members, extension: content}


def without(*extensions: str) -> Callable[[Members], Members]:
    return lambda members: {extension: data for extension, data in members.items() if extension not in extensions}


def said(**content: object) -> Callable[[Members], Members]:
    return bad("json", json.dumps(content).encode())


TOO_HIGH = npy(np.full((4, 2), 251, dtype=np.float32))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (bad("jpg", picture(9)[:-400]), "undecodable member"),
        (bad("jpg", b"GIF89a"), "undecodable member"),
        (bad("vitals.npy", npy(values(1).astype(np.float64))), "undecodable member"),
        (bad("vitals.npy", npy(values(1)[:3])), "undecodable member"),
        (bad("vitals.npy", b"\x80\x04pickle"), "undecodable member"),
        (bad("jpg", bytes(10**6)), "member too large"),
        (bad("vitals.npy", TOO_HIGH), "out of range"),
        (bad("npy", npy(np.full((3, HEIGHT, WIDTH), 7, np.uint8))), "duplicate modality"),
        (bad("cls", b"2"), "unknown label"),
        (bad("cls", b"01"), "unknown label"),
        (bad("cls", b""), "no label"),
        (without("cls"), "no label"),
        (without("json"), "no site"),
        (bad("json", b"{"), "bad json"),
        (bad("json", b"[" * 60_000), "bad json"),
        (said(hospital="n"), "no subject"),
        (said(hospital="n", patient={"id": float("nan")}), "no subject"),
        (said(hospital=float("inf"), patient={"id": "x"}), "no site"),
        (said(hospital="west", patient={"id": "x"}), "unknown site"),
        (said(hospital=["n"], patient={"id": "x"}), "bad json"),
        (without("jpg", "vitals.npy"), "no input"),
    ],
)
def test_a_bad_sample_is_quarantined_with_its_place_and_reason_and_the_rest_goes_on(
    tmp_path: Path, change: Callable[[Members], Members], reason: str
) -> None:
    samples = {f"Jane_{i}": sample(i) for i in range(22)}
    (tmp_path / "tars").mkdir()
    write(tmp_path / "tars" / "a.tar", {**samples, "Jane_5": change(dict(samples["Jane_5"]))})
    release = made(tmp_path)
    (left_out,) = release.quarantine().studies
    assert left_out.reason == reason
    assert left_out.where.startswith("a.tar: member ")
    assert "Jane" not in release.store.read(f"releases/{release.version}/quarantine.json").decode()
    assert set(stored(release)) == {uid(key) for key in samples if key != "Jane_5"}
    verify(release)


def test_words_mean_what_the_card_says(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    one = {"jpg": picture(1), "cls": b" ill\n", "json": b'{"hospital": 1.0, "patient": {"id": 7}}'}
    two = {"jpg": picture(2), "cls": b"0", "json": b'{"hospital": "s", "patient": {"id": "8"}}'}
    write(tmp_path / "tars" / "a.tar", {"ward/1": one, "ward/2": two})
    found = stored(made(tmp_path))
    assert [found[uid(key)][1:3] for key in ("ward/1", "ward/2")] == [("north", "ill"), ("south", "healthy")]
    folders = {"sites": {"key_until": "/", "groups": {"north": "ward"}}, "subject": None}
    release = prepare_foreign(source(tmp_path / "tars", **folders), str(tmp_path / "other"), subject_key=KEY)
    assert release.schema.sites == ("north",)
    assert len({row["subject"] for row in release.subjects().to_pylist()}) == 2


@pytest.mark.parametrize(
    ("classes", "values", "means"),
    [
        (["1", "2", "3"], {}, {"1": 0, "3": 2, "0": None, "4": None, "02": None, "00": None, "2.0": None}),
        (["none", "-1", "0.5"], {}, {"none": 0, "0.5": 2, "0": None, "2": None}),
        (["healthy", "ill"], {"2": "ill"}, {"2": 1, "ill": 1, "1": None, "0": None}),
        (["grade 1", "grade 2"], {"g2": "grade 2"}, {"0": 0, "1": 1, "g2": 1, "01": None, "+1": None, "2": None, "\u0661": None}),
    ],
)
def test_a_number_is_an_index_only_where_no_class_is_a_number(
    classes: list[str], values: dict[str, str], means: dict[str, int | None]
) -> None:
    words = Words(card(labels={"finding": {"member": "cls", "classes": classes, "values": values}}))
    for word, expected in means.items():
        if expected is None:
            with pytest.raises(UnfitError, match="unknown label"):
                words.label("", {"cls": word.encode()})
        else:
            assert words.label("", {"cls": word.encode()}) == expected


def test_nothing_that_pandas_writes_for_nothing_is_a_word() -> None:
    words = Words(card(labels={"finding": {"field": "ill", "classes": ["healthy", "ill"]}}))
    for nothing in (b"NaN", b"null", b"Infinity", b"-Infinity", b'" "'):
        texts = {"json": b'{"hospital": %s, "patient": {"id": %s}, "ill": %s}' % (nothing, nothing, nothing)}
        for read, reason in ((words.site, "no site"), (words.subject, "no subject"), (words.label, "no label")):
            with pytest.raises(UnfitError, match=reason):
                read("", texts)


def test_an_image_of_equal_pixels_is_no_image_and_values_that_nobody_observed_are_no_modality(tmp_path: Path) -> None:
    samples = {name(i): sample(i) for i in range(24)}
    del samples[name(3)]["vitals.npy"]
    samples[name(3)]["npy"] = npy(np.full((3, HEIGHT, WIDTH), 7, np.uint8))
    samples[name(5)]["vitals.npy"] = npy(np.full((4, 2), np.nan, np.float32))
    (tmp_path / "tars").mkdir()
    write(tmp_path / "tars" / "a.tar", samples)
    release = made(tmp_path)
    assert release.manifest.quarantined == {"blank image": 1}
    assert set(stored(release)[uid(name(5))][3]) == {"cxr"}


@pytest.mark.parametrize("extension", ["json", "vitals.npy"])
def test_groups_that_webdataset_would_tear_apart_are_quarantined_not_joined(tmp_path: Path, extension: str) -> None:
    members = members_of({name(i): sample(i) for i in range(40)})
    # Without the one its first part is no sample, without the other it would be one with a part missing.
    torn = [member for member in members if member[0] == f"{name(5)}.{extension}"]
    rest = [member for member in members if member not in torn]
    (tmp_path / "tars").mkdir()
    by_hand(tmp_path / "tars" / "a.tar", [*rest, *torn])
    release = made(tmp_path)
    (left_out,) = release.quarantine().studies
    assert (left_out.reason, left_out.where.split(" at ")[0]) == ("split sample", f"a.tar: member {len(members)}")
    assert set(stored(release)) == {uid(name(i)) for i in range(40) if i != 5}


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        ("s0005.jpg", "duplicate name"),
        ("s0005.JPG", "duplicate name"),
        ("/s0005.jpg", "bad name"),
        ("../s0005.jpg", "bad name"),
        ("a/../s0005.jpg", "bad name"),
        ("n" * 260 + ".jpg", "bad name"),
        ("a\nb.jpg", "bad name"),
        (b"\xff\xfe.jpg".decode("utf-8", "surrogateescape"), "bad name"),
    ],
)
def test_names_that_no_tar_of_samples_should_hold_are_quarantined(tmp_path: Path, member: str, reason: str) -> None:
    members = members_of({name(i): sample(i) for i in range(40)})
    at = 1 + max(i for i, (each, _) in enumerate(members) if each.startswith(name(5)))
    (tmp_path / "tars").mkdir()
    by_hand(tmp_path / "tars" / "a.tar", [*members[:at], (member, picture(99)), *members[at:]], tarfile.GNU_FORMAT)
    release = made(tmp_path)
    assert release.manifest.quarantined == {reason: 1}
    expected = 39 if reason == "duplicate name" else 40
    assert len(stored(release)) == expected


def test_a_link_is_never_followed(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    path = by_hand(tmp_path / "tars" / "a.tar", members_of({name(i): sample(i) for i in range(40)}))
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("evil.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    assert made(tmp_path).manifest.quarantined == {"no file": 1}


def test_members_that_the_card_does_not_name_are_counted_and_never_decoded(tmp_path: Path) -> None:
    samples = {name(i): {**sample(i), "pyd": b"cos\nsystem\n(S'false'\ntR.", "extra.txt": b"x"} for i in range(20)}
    (tmp_path / "tars").mkdir()
    path = write(tmp_path / "tars" / "a.tar", samples)
    with tarfile.open(path, "a") as tar:
        for each in ("README.md", "__meta__/x.jpg", "Makefile", ".hidden.jpg"):
            tar.addfile(tarfile.TarInfo(each))
    foreign = source(path)
    release = prepare_foreign(foreign, str(tmp_path / "out"), subject_key=KEY)
    assert foreign.ignored == {"pyd": 20, "txt": 20, "md": 1, "": 3}
    assert len(stored(release)) == 20


def test_dots_and_long_names_in_keys_are_taken_as_webdataset_takes_them(tmp_path: Path) -> None:
    long = f"ward é/{'x' * 150}"
    tars = write(tmp_path / "a.tar", {"v1.2/a": sample(1), "1.2.840": sample(2), long: sample(3)})
    theirs = list(webdataset.WebDataset(str(tars), shardshuffle=False))
    assert [one["__key__"] for one in theirs] == ["v1.2/a", "1", long]
    foreign = source(tars)
    release = prepare_foreign(foreign, str(tmp_path / "out"), subject_key=KEY)
    assert set(stored(release)) == {uid("v1.2/a"), uid(long)}
    assert foreign.ignored == {"cls": 1, "json": 1, "jpg": 1, "npy": 1}
    write(tmp_path / "b.tar", {"1.2.840": sample(2)})
    with pytest.raises(DataError, match=r"expected samples with \.jpg.* found none; members .* \.cls 1.*first dot"):
        prepare_foreign(source(tmp_path / "b.tar"), str(tmp_path / "b"), subject_key=KEY)


def test_a_key_that_comes_in_two_tars_counts_once_or_in_each_as_the_card_says(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    for tar in range(2):
        write(tmp_path / "tars" / f"{tar}.tar", {name(i): sample(i + 30 * tar) for i in range(20)})
    with pytest.raises(DataError, match="20 of 40: repeated key 20 .*keys: per_tar"):
        made(tmp_path)
    release = made(tmp_path, keys="per_tar")
    assert set(stored(release)) == {uid(f"{tar}.tar/{name(i)}") for tar in range(2) for i in range(20)}


@pytest.mark.parametrize("is_known", [True, False])
def test_one_image_under_two_subjects_never_gets_into_two_splits(tmp_path: Path, is_known: bool) -> None:
    (tmp_path / "tars").mkdir()
    samples = {name(i): {**sample(i), "jpg": picture(i)} for i in range(0, 60, 2)}
    samples[name(8)]["jpg"] = picture(4)
    write(tmp_path / "tars" / "a.tar", samples)
    if is_known:
        with pytest.raises(DataError, match="expected images that belong to one subject"):
            made(tmp_path)
    else:
        release = made(tmp_path, subject=None)
        assert release.manifest.quarantined == {"repeated image": 1}
        verify(release)


def test_too_many_bad_samples_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    write(tmp_path / "tars" / "a.tar", {name(i): {**sample(i), "cls": b"x" if i % 10 == 0 else b"1"} for i in range(30)})
    with pytest.raises(DataError, match=r"at most 5.0% .* 3 of 30: unknown label 3"):
        made(tmp_path)
    assert not (tmp_path / "out").exists()

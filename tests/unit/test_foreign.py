"""Foreign WebDataset tars as a release that points to them."""

import json
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from foreign_tars import (
    CARD,
    HEIGHT,
    KEY,
    WIDTH,
    by_hand,
    members_of,
    name,
    npy,
    picture,
    sample,
    source,
    values,
    write,
    write_tars,
)
from memory_delivery import MemoryDelivery, sealed

from draf_dist.continual.ingest import ingest
from draf_dist.data.foreign import inspect_foreign, prepare_foreign
from draf_dist.data.loader import evaluation_batches
from draf_dist.data.release import Release, open_release
from draf_dist.data.stats import StatsBuilder, decode_member
from draf_dist.data.verify import verify
from draf_dist.errors import DataError, SpecError
from draf_dist.executor import Done, Outcome
from draf_dist.schema.identity import sample_uid, subject_pseudonym
from draf_dist.schema.release import SPLITS, Split
from draf_dist.schema.study import Study

NUM = 60
Members = dict[str, bytes]


def made(folder: Path, limit: float = 0.05, **changes: object) -> Release:
    """The release of the tars in a folder."""
    return prepare_foreign(source(folder / "tars", **changes), str(folder / "out"), subject_key=KEY, limit=limit)


def stored(release: Release) -> dict[int, tuple[Split, str, str, dict[str, bytes]]]:
    """By uid: split, site, label and the bytes of each modality, read as its index says, where its shard points to."""
    found = {}
    for split in SPLITS:
        for shard in release.shards(split):
            index = release.index(shard)
            store, path = release.tar_location(shard)
            assert index.num_samples == shard.num_samples
            assert index.sites is not None
            assert index.labels is not None
            for i, uid in enumerate(index.uids.tolist()):
                members = {name: index.member(i, name) for name in index.modalities}
                data = {n: bytes(store.read_range(path, m.offset, m.stop)) for n, m in members.items() if m is not None}
                assert all(members[n].matches(content) for n, content in data.items())
                site, label = release.schema.sites[index.sites[i]], release.schema.label.classes[index.labels[i]]
                assert uid not in found
                found[uid] = (split, site, label, data)
    return found


def uid(key: str) -> int:
    return sample_uid(KEY, source="wards", sample=key)


def test_every_sample_is_found_again_in_the_tar_that_holds_it(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars")
    before = {path.name: path.read_bytes() for path in (tmp_path / "tars").iterdir()}
    release = made(tmp_path)
    found, subjects = stored(release), {row["uid"]: row["subject"] for row in release.subjects().to_pylist()}
    assert set(found) == {uid(name(i)) for i in range(NUM)}
    for i in range(NUM):
        _, site, label, data = found[uid(name(i))]
        members = sample(i)
        assert (site, label) == (("north", "south")[i // 2 % 2], ("healthy", "ill")[i % 2])
        assert data == {n: members[e] for n, e in (("cxr", "jpg"), ("vitals", "vitals.npy")) if e in members}
        assert subjects[uid(name(i))] == subject_pseudonym(KEY, f"Jane Doe {i // 2}")
    assert {path.name: path.read_bytes() for path in (tmp_path / "tars").iterdir()} == before
    assert not list((tmp_path / "out").rglob("*.tar"))
    assert verify(open_release(str(tmp_path / "out"))).num_samples == NUM


def test_batches_hold_what_webdataset_itself_decodes(tmp_path: Path) -> None:
    tars = sorted(write_tars(tmp_path / "tars").iterdir())
    theirs = {uid(one["__key__"]): one for one in webdataset.WebDataset([str(t) for t in tars], shardshuffle=False).decode("rgb8")}
    release = made(tmp_path)
    seen = []
    for split in SPLITS:
        for batch in evaluation_batches(release, split, 8) if release.shards(split) else ():
            seen += batch.uid.tolist()
            for row, each in enumerate(batch.uid.tolist()):
                one, vitals = theirs[each], batch.inputs["vitals"]
                assert batch.present[row].tolist() == ["jpg" in one, "vitals.npy" in one]
                assert release.schema.sites[batch.site[row]] == {"n": "north", "s": "south"}[one["json"]["hospital"]]
                assert batch.target.label[row] == one["cls"]
                if "jpg" in one:
                    # Two decoders of JPEG may round differently.
                    pixels = batch.inputs["cxr"][row].permute(1, 2, 0).numpy().astype(int)
                    assert np.abs(pixels - one["jpg"].astype(int)).max() <= 2
                if "vitals.npy" in one:
                    assert np.array_equal(
                        np.where(vitals.observed[row], vitals.values[row], np.nan), one["vitals.npy"], equal_nan=True
                    )
    assert sorted(seen) == sorted(theirs)
    assert not batch.quality_known.any()


@pytest.mark.parametrize("kind", ["image", "series"])
def test_a_card_may_name_images_alone_or_values_alone(tmp_path: Path, kind: str) -> None:
    write_tars(tmp_path / "tars", num_tars=2, per_tar=20)
    release = made(tmp_path, modalities=[each for each in CARD["modalities"] if each["kind"] == kind], limit=0.5)
    verify(release)


def test_a_tar_with_samples_of_several_splits_is_a_shard_of_each(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars", num_tars=1, per_tar=60)
    release = made(tmp_path)
    splits = {shard.split: shard for shard in release.manifest.shards}
    assert {"train", "val", "test"} <= set(splits)
    assert len({shard.sha256 for shard in splits.values()}) == 1
    assert len({shard.index_sha256 for shard in splits.values()}) == len(splits)
    found = stored(release)
    in_training = [uid(name(i)) for i in range(60) if found[uid(name(i))][0] == "train"]
    assert release.index(splits["train"]).uids.tolist() == in_training
    subjects: dict[str, set[str]] = {}
    for row in release.subjects().to_pylist():
        subjects.setdefault(row["subject"], set()).add(row["split"])
    assert all(len(found) == 1 for found in subjects.values())


def test_statistics_are_those_of_the_training_samples(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars")
    release = made(tmp_path)
    builder = StatsBuilder(release.schema)
    for shard in release.shards("train"):
        for each in release.index(shard).uids.tolist():
            data = stored(release)[each][3]
            builder.add(
                {spec.name: decode_member(data[spec.name], spec) for spec in release.schema.modalities if spec.name in data}
            )
    assert release.stats == builder.result()
    assert release.sums() == builder.sums()
    assert release.stats.images["cxr"].num_images > 10


def test_the_names_of_the_tars_may_tell_the_splits_and_held_out_sites_go_before_them(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    for split, numbers in {"train": range(20), "val": range(20, 26), "test": range(26, 32)}.items():
        write(tmp_path / "tars" / f"{split}-000.tar", {name(i): sample(i) for i in numbers})
    files = {"train": "train-*.tar", "val": ["val-*.tar"], "test": "test-*.tar"}
    release = made(tmp_path, split={"files": files, "held_out_sites": ["south"]})
    found = stored(release)
    assert {found[uid(name(i))][0] for i in range(32) if i // 2 % 2} == {"ood"}
    assert [found[uid(name(i))][0] for i in (0, 20, 28)] == ["train", "val", "test"]
    verify(release)
    write(tmp_path / "tars" / "val-001.tar", {"late": {**sample(1), "cls": b"0", "json": sample(0)["json"]}})
    with pytest.raises(DataError, match="1 samples whose subject is also in a tar of another split"):
        made(tmp_path, split={"files": files})
    write(tmp_path / "tars" / "extra.tar", {"x": sample(70)})
    with pytest.raises(SpecError, match=r"extra\.tar: expected one pattern of the card's split\.files, found none"):
        made(tmp_path, split={"files": files})


class LastFirst:
    """An executor whose tasks end in the reverse order, and travel as they would to another process."""

    def map(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Outcome[Any]]:
        for index in reversed(range(len(tasks))):
            yield Done(index, pickle.loads(pickle.dumps(function(pickle.loads(pickle.dumps(tasks[index]))))))


def test_the_same_tars_give_the_same_version_in_whichever_order_they_are_read(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars")
    first = made(tmp_path)
    foreign = source(tmp_path / "tars")
    second = prepare_foreign(foreign, str(tmp_path / "out"), subject_key=KEY, executor=LastFirst())
    assert second.version == first.version
    assert made(tmp_path, description="another card").version != first.version


def test_looking_at_tars_writes_nothing_and_tells_the_same(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars")
    inspection = inspect_foreign(source(tmp_path / "tars"), str(tmp_path / "out"), subject_key=KEY)
    assert not (tmp_path / "out").exists()
    release = made(tmp_path)
    assert (inspection.counts, inspection.quarantine) == (release.manifest.counts, release.quarantine())


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
        (bad("cls", b""), "no label"),
        (without("cls"), "no label"),
        (without("json"), "no site"),
        (bad("json", b"{"), "bad json"),
        (bad("json", b"[" * 60_000), "bad json"),
        (said(hospital="n"), "no subject"),
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


def test_another_card_for_the_same_tars_leaves_the_earlier_version_as_it_was(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars", num_tars=1, per_tar=60)
    first = made(tmp_path)
    labels = {"finding": {**CARD["labels"]["finding"], "values": {"0": "ill", "1": "healthy"}}}
    second = made(tmp_path, labels=labels)
    assert second.manifest.parent == first.version
    verify(first)
    verify(second)
    assert [found[2] for found in stored(first).values()] != [found[2] for found in stored(second).values()]


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


def test_broken_tars_are_refused_all_together_and_nothing_is_written(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars", num_tars=3, per_tar=20)
    for number in (0, 2):
        path = tmp_path / "tars" / f"wards-{number:03d}.tar"
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError) as caught:
        made(tmp_path)
    assert [line.split(": ")[0][-13:] for line in str(caught.value).splitlines()] == ["wards-000.tar", "wards-002.tar"]
    assert "cut short" in str(caught.value) or "in the middle of a file" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_too_many_bad_samples_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    write(tmp_path / "tars" / "a.tar", {name(i): {**sample(i), "cls": b"x" if i % 10 == 0 else b"1"} for i in range(30)})
    with pytest.raises(DataError, match=r"at most 5.0% .* 3 of 30: unknown label 3"):
        made(tmp_path)
    assert not (tmp_path / "out").exists()


def change_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] = 1
    path.write_bytes(bytes(data))


def change_an_image(path: Path) -> None:
    data = path.read_bytes()
    at = data.index(picture(1)) + 100
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda path: path.unlink(), "found nothing"),
        (lambda path: path.write_bytes(path.read_bytes() + bytes(512)), "bytes that was indexed, found"),
        (change_an_image, r"[0-9a-f]{16}\.cxr: expected .* with crc32"),
        (change_last_byte, "more behind its end"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"Jane Doe 1", b"John Doe 1", 1)), "found other bytes"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"s0000", b"s9999")), "no tar header"),
    ],
)
def test_a_tar_that_changed_since_is_named_and_to_be_prepared_again(
    tmp_path: Path, change: Callable[[Path], None], found: str
) -> None:
    write_tars(tmp_path / "tars")
    release = made(tmp_path)
    change(tmp_path / "tars" / "wards-000.tar")
    with pytest.raises(DataError, match=rf"wards-000\.tar.*{found}.*run draf prepare again"):
        verify(release)


def test_tars_and_release_can_be_moved_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tars(tmp_path / "here" / "tars")
    monkeypatch.chdir(tmp_path / "here")
    release = prepare_foreign(source("tars/wards-{000..003}.tar"), "sets/out", subject_key=KEY)
    assert {shard.url for shard in release.manifest.shards} == {f"../../tars/wards-{i:03d}.tar" for i in range(4)}
    monkeypatch.chdir(tmp_path)
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert verify(open_release("there/sets/out")).version == release.version


class Newcomers(MemoryDelivery):
    """Twenty studies of people that no tar has."""

    def studies(self) -> Iterator[Study]:
        for i in range(20):
            pixels = np.random.default_rng(1000 + i).integers(0, 256, (3, HEIGHT, WIDTH), dtype=np.uint8)
            yield Study(f"new {i}", self.schema.sites[i % 2], "", {"cxr": pixels, "vitals": values(1000 + i)}, i % 2)


def test_a_delivery_of_a_hospital_goes_on_where_the_tars_end(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars")
    release = made(tmp_path)
    delivery = Newcomers(name="wards", schema=release.schema)
    child = ingest(delivery, sealed(tmp_path / "in"), release.url, subject_key=KEY).release
    assert child.manifest.shards[: len(release.manifest.shards)] == release.manifest.shards
    assert verify(child).num_samples == NUM + 20
    batches = [batch for split in SPLITS if child.shards(split) for batch in evaluation_batches(child, split, 16)]
    assert sum(int((batch.uid >= 0).sum()) for batch in batches) == NUM + 20


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("s3://key:secret@bucket/a.tar", "expected one without credentials"),
        ("pipe:cat a.tar", "found none"),
        ("http://host/a.tar", "expected a local path"),
        ("{tmp}/nothing", "expected a tar, or a folder of tars, found none"),
        ("{tmp}/tars/wards-{000..009}.tar", r"wards-004\.tar: expected a tar"),
        ("{tmp}/tars/x-*.tar", "found none"),
        ("{tmp}/ta*/a.tar", "in the name of the tars alone"),
        ("{tmp}/tars/wards-{009..000}.tar", "from low to high"),
    ],
)
def test_what_is_no_url_of_tars_is_refused(tmp_path: Path, url: str, found: str) -> None:
    write_tars(tmp_path / "tars", per_tar=1)
    with pytest.raises(SpecError, match=found) as caught:
        prepare_foreign(source(url.replace("{tmp}", str(tmp_path))), str(tmp_path / "out"), subject_key=KEY)
    assert "secret" not in str(caught.value)


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

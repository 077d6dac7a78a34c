"""Foreign WebDataset tars as a release that points to them."""

import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from foreign_release import made, stored, uid
from foreign_tars import CARD, HEIGHT, KEY, WIDTH, name, picture, sample, source, values, write, write_tars
from memory_delivery import MemoryDelivery, sealed

from draf_dist.continual.ingest import ingest
from draf_dist.data.foreign import inspect_foreign, prepare_foreign
from draf_dist.data.loader import evaluation_batches
from draf_dist.data.release import open_release
from draf_dist.data.stats import StatsBuilder, decode_member
from draf_dist.data.verify import verify
from draf_dist.errors import DataError, SpecError
from draf_dist.executor import Done, Outcome
from draf_dist.schema.identity import subject_pseudonym
from draf_dist.schema.release import SPLITS
from draf_dist.schema.study import Study

NUM = 60


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


def test_another_card_for_the_same_tars_leaves_the_earlier_version_as_it_was(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars", num_tars=1, per_tar=60)
    first = made(tmp_path)
    labels = {"finding": {**CARD["labels"]["finding"], "values": {"0": "ill", "1": "healthy"}}}
    second = made(tmp_path, labels=labels)
    assert second.manifest.parent == first.version
    verify(first)
    verify(second)
    assert [found[2] for found in stored(first).values()] != [found[2] for found in stored(second).values()]


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

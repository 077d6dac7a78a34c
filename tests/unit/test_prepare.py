import io
import json
import tempfile
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dying_writer import Died, dying_after
from memory_source import KEY, SCHEMA, MemorySource, only, with_image
from PIL import Image

from draf_dist.data.encode import UnfitError, encode_study, in_range, resized
from draf_dist.data.prepare import inspect_source, prepare
from draf_dist.data.receipts import receipt
from draf_dist.data.release import open_release, release_log, version_of
from draf_dist.data.shards import decode_meta
from draf_dist.data.stats import decode_member
from draf_dist.data.verify import verify
from draf_dist.errors import DataError, GateError, SpecError
from draf_dist.schema.identity import study_uid, subject_pseudonym
from draf_dist.schema.modality import ImageSpec, TableSpec, VariableSpec
from draf_dist.schema.release import SPLITS, ReleaseManifest, ShardRecord
from draf_dist.schema.study import Rejection, Study


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_study_is_found_again_as_it_was(tmp_path: Path) -> None:
    source = MemorySource(image_shape=(1, 16, 12))
    release = prepare(source, str(tmp_path), subject_key=KEY, shard_size_bytes=20_000)
    stored = {}
    for split in SPLITS:
        for shard in release.shards(split):
            index = release.index(shard)
            tar = (tmp_path / "shards" / split / f"{shard.sha256}.tar").read_bytes()
            for i in range(index.num_samples):
                meta = decode_meta(tar[index.meta(i).offset : index.meta(i).stop])
                arrays = {}
                for spec in SCHEMA.modalities:
                    member = index.member(i, spec.name)
                    if member is not None:
                        arrays[spec.name] = decode_member(tar[member.offset : member.stop], spec)
                stored[meta.uid] = (meta, arrays)
    studies = list(source.studies())
    assert len(stored) == len(studies)
    assert len(release.manifest.shards) > 6
    for study in studies:
        meta, arrays = stored[study_uid(KEY, site=study.site, subject=study.subject, anchor=study.anchor)]
        assert (meta.subject, meta.site) == (subject_pseudonym(KEY, study.subject), study.site)
        assert meta.label == SCHEMA.classes[study.label]
        assert meta.quality == (study.quality if "cxr" in study.inputs else {})
        assert set(arrays) == set(study.inputs)
        assert all(np.array_equal(arrays[name], array, equal_nan=True) for name, array in study.inputs.items())


def test_the_same_input_gives_the_same_version_and_bytes(tmp_path: Path) -> None:
    first = prepare(MemorySource(), str(tmp_path / "a"), subject_key=KEY)
    second = prepare(MemorySource(), str(tmp_path / "b"), subject_key=KEY)
    assert first.version == second.version
    assert content(tmp_path / "a") == content(tmp_path / "b")
    again = prepare(MemorySource(), str(tmp_path / "a"), subject_key=KEY)
    assert again.version == first.version
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_any_number_of_jobs_gives_the_same_version_bytes_and_quarantine(tmp_path: Path) -> None:
    def spoil(i: int, study: Study) -> Study | Rejection:
        if i == 7:
            return replace(study, label=9)
        return Rejection("north", f"row {i}", "bad time", "") if i == 20 else MemorySource()._study(4) if i == 5 else study

    source = MemorySource(change=spoil)
    one = prepare(source, str(tmp_path / "1"), subject_key=KEY, limit=0.1, shard_size_bytes=20_000)
    four = prepare(source, str(tmp_path / "4"), subject_key=KEY, limit=0.1, shard_size_bytes=20_000, jobs=4)
    assert one.version == four.version
    assert content(tmp_path / "1") == content(tmp_path / "4")
    assert [study.reason for study in four.quarantine().studies] == ["duplicate study", "unknown label", "bad time"]


def test_the_version_of_a_manifest_of_before_foreign_tars_stays() -> None:
    digest = "0123456789abcdef" * 4
    digests = {f"{part}_sha256": digest for part in ("schema", "stats", "subjects", "quarantine", "card")}
    shard = ShardRecord(split="train", sha256=digest, size_bytes=10240, index_sha256=digest, num_samples=2)
    empty = {"counts": {}, "quarantined": {}, "receipts": {}}
    manifest = ReleaseManifest(version="", name="small", **digests, subject_key_check=digest[:16], **empty, shards=(shard,))
    assert version_of(manifest) == "8390ec3ce19a0144"
    foreign = shard.model_copy(update={"url": "../tars/a.tar"})
    assert version_of(manifest.model_copy(update={"shards": (foreign,)})) != "8390ec3ce19a0144"


@pytest.mark.parametrize(
    "changed",
    [
        MemorySource(card_sha256="0" * 64),
        MemorySource(num_studies=59),
        MemorySource(held_out_sites=frozenset()),
        MemorySource(change=only(7, lambda study: replace(study, label=1 - study.label))),
    ],
)
def test_another_input_gives_another_version(tmp_path: Path, changed: MemorySource) -> None:
    first = prepare(MemorySource(), str(tmp_path / "a"), subject_key=KEY)
    assert prepare(changed, str(tmp_path / "b"), subject_key=KEY).version != first.version


def test_no_subject_is_in_two_splits_and_held_out_sites_are_only_in_ood(tmp_path: Path) -> None:
    rows = prepare(MemorySource(), str(tmp_path), subject_key=KEY).subjects().to_pylist()
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row["subject"], set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert len(splits) < len(rows)
    touching = {row["subject"] for row in rows if row["site"] == "west"}
    assert {row["subject"] for row in rows if row["split"] == "ood"} == touching
    assert {row["site"] for row in rows if row["split"] == "ood"} > {"west"}


def test_the_manifest_counts_what_is_there(tmp_path: Path) -> None:
    source = MemorySource()
    release = prepare(source, str(tmp_path), subject_key=KEY)
    rows = release.subjects().to_pylist()
    expected = Counter((study.site, name) for study in source.studies() for name in ("studies", *study.inputs))
    counts = release.manifest.counts
    assert {(s, n): sum(counts[s][d][n] for d in SPLITS) for s in SCHEMA.sites for n in ("studies", *SCHEMA.names)} == expected
    for split in SPLITS:
        uids = np.array([row["uid"] for row in rows if row["split"] == split])
        assert release.manifest.receipts[split] == receipt(uids)
        assert sum(shard.num_samples for shard in release.shards(split)) == len(uids)


def test_statistics_are_of_the_training_split_alone(tmp_path: Path) -> None:
    source = MemorySource()
    release = prepare(source, str(tmp_path), subject_key=KEY)
    train = {row["uid"] for row in release.subjects().to_pylist() if row["split"] == "train"}
    ages, pixels = [], []
    for study in source.studies():
        if study_uid(KEY, site=study.site, subject=study.subject, anchor=study.anchor) in train:
            ages.append(study.inputs["history"][0, 0])
            if "cxr" in study.inputs:
                pixels.append(resized(study.inputs["cxr"], SCHEMA.modalities[0]))
    age = release.stats.variables["history"][0]
    assert (age.mean, age.std) == pytest.approx((np.mean(ages, dtype=float), np.std(ages, dtype=float)), rel=1e-12)
    cxr = release.stats.images["cxr"]
    assert (cxr.mean, cxr.std, cxr.num_images) == pytest.approx((np.mean(pixels), np.std(pixels), len(pixels)), rel=1e-12)


def test_samples_of_all_sites_are_mixed(tmp_path: Path) -> None:
    release = prepare(MemorySource(num_studies=200), str(tmp_path), subject_key=KEY)
    site_of = {row["uid"]: row["site"] for row in release.subjects().to_pylist()}
    sites = [site_of[uid] for uid in release.index(release.shards("train")[0]).uids.tolist()]
    changes = sum(a != b for a, b in zip(sites, sites[1:], strict=False))
    expected = sum(1 - max(Counter(sites).values()) / len(sites) for _ in sites) * 0.6
    assert changes > expected


def test_neither_names_nor_dates_of_subjects_are_stored(tmp_path: Path) -> None:
    release = prepare(MemorySource(), str(tmp_path), subject_key=KEY)
    everything = b"".join(content(tmp_path).values()) + json.dumps(release.subjects().to_pylist()).encode()
    assert b"patient " not in everything
    assert b"2020-01" not in everything
    assert KEY not in everything


def test_a_bad_study_is_quarantined_with_where_and_why_and_the_rest_goes_on(tmp_path: Path) -> None:
    bad = Rejection("north", "studies.csv row 3", "bad time", "no such month")
    release = prepare(MemorySource(change=only(1, lambda study: bad)), str(tmp_path), subject_key=KEY)
    quarantine = release.quarantine()
    assert release.manifest.quarantined == quarantine.reasons == {"bad time": 1}
    assert [(q.site, q.where, q.reason) for q in quarantine.studies] == [("north", "studies.csv row 3", "bad time")]
    assert len(release.subjects()) == 59


def test_too_many_bad_studies_stop_the_run_with_their_reasons(tmp_path: Path) -> None:
    def spoil(i: int, study: Study) -> Study | Rejection:
        if i % 12 == 0:
            return Rejection(study.site, f"row {i}", "bad time", "no such month")
        return replace(study, label=9) if i == 1 else study

    with pytest.raises(DataError, match=r"at most 5.0% .* found 6 of 60: bad time 5 \(first: row 0: .*unknown label 1"):
        prepare(MemorySource(change=spoil), str(tmp_path), subject_key=KEY)
    assert content(tmp_path) == {}
    assert len(prepare(MemorySource(change=spoil), str(tmp_path), subject_key=KEY, limit=0.1).subjects()) == 54


def test_a_source_without_studies_is_no_release(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found none"):
        prepare(MemorySource(num_studies=0), str(tmp_path), subject_key=KEY)


@pytest.mark.parametrize("same_file", [True, False])
def test_one_image_under_two_subjects_stops_the_run_and_names_both_studies(tmp_path: Path, same_file: bool) -> None:
    first = MemorySource()._study(6)
    pixels, digest = first.inputs["cxr"], first.image_digests["cxr"]
    other = np.flip(pixels).copy() if same_file else pixels
    source = MemorySource(change=only(7, lambda study: with_image(study, other, digest if same_file else "ab" * 32)))
    uids = [study_uid(KEY, site=s.site, subject=s.subject, anchor=s.anchor) for s in (first, source._study(7))]
    with pytest.raises(DataError) as caught:
        prepare(source, str(tmp_path), subject_key=KEY)
    assert all(f"cxr of study {uid:016x}" in str(caught.value) for uid in uids)
    assert "patient" not in str(caught.value)
    assert content(tmp_path) == {}


def test_one_image_in_two_studies_of_one_subject_is_no_leak(tmp_path: Path) -> None:
    assert MemorySource()._study(10).subject == MemorySource()._study(11).subject
    pixels, digest = _image(MemorySource()._study(14))
    source = MemorySource(num_studies=14, change=lambda i, study: with_image(study, pixels, digest) if i in (10, 11) else study)
    verify(prepare(source, str(tmp_path), subject_key=KEY))


def _image(study: Study) -> tuple[np.ndarray, str]:
    return study.inputs["cxr"], study.image_digests["cxr"]


def test_implausible_values_are_not_observed_and_counted(tmp_path: Path) -> None:
    values = np.array([[19, 1], [20, np.inf], [250, 3], [np.nan, 4]], dtype=np.float32)
    source = MemorySource(change=only(0, lambda study: replace(study, inputs={**study.inputs, "vitals": values})))
    release = prepare(source, str(tmp_path), subject_key=KEY)
    assert release.quarantine().out_of_range == {"vitals.hr": 1, "vitals.t": 1}


def test_a_value_on_the_bound_is_inside_after_rounding() -> None:
    spec = TableSpec(name="x", variables=(VariableSpec(name="a", low=0.1, high=0.1),))
    values, excluded = in_range(np.array([[0.1]], dtype=np.float32), spec)
    assert not np.isnan(values).any()
    assert excluded == {}


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"cxr": np.zeros((3, 20, 30), np.uint8)}, "bad shape"),
        ({"cxr": np.zeros((1, 20, 30), np.float32)}, "bad shape"),
        ({"cxr": np.full((1, 20, 30), 7, np.uint8)}, "blank image"),
        ({"vitals": np.zeros((3, 2), np.float32)}, "bad shape"),
        ({"vitals": np.full((4, 2), np.nan, np.float32)}, "no input"),
        ({}, "no input"),
        ({"ct": np.zeros((1, 2), np.float32)}, "unknown modality"),
    ],
)
def test_what_does_not_fit_the_schema_is_unfit(inputs: dict[str, np.ndarray], reason: str) -> None:
    with pytest.raises(UnfitError) as caught:
        encode_study(Study("s", "north", "", inputs, 0), SCHEMA)
    assert caught.value.reason == reason


def test_a_study_that_comes_twice_is_taken_once(tmp_path: Path) -> None:
    source = MemorySource(change=only(5, lambda study: MemorySource()._study(4)))
    release = prepare(source, str(tmp_path), subject_key=KEY)
    assert release.manifest.quarantined == {"duplicate study": 1}


def test_halving_an_image_averages_blocks_of_four() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 16, 24), dtype=np.uint8)
    expected = pixels.reshape(1, 8, 2, 12, 2).mean(axis=(2, 4))
    assert np.abs(resized(pixels, ImageSpec(name="x", height=8, width=12)) - expected).max() <= 0.5


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_of_any_number_of_channels_are_stored_without_loss(channels: int) -> None:
    schema = SCHEMA.model_copy(update={"modalities": (ImageSpec(name="x", channels=channels, height=8, width=9),)})
    pixels = np.random.default_rng(0).integers(0, 256, (channels, 8, 9), dtype=np.uint8)
    encoded = encode_study(Study("s", "north", "", {"x": pixels}, 0), schema)
    (data,) = encoded.members.values()
    assert np.array_equal(decode_member(data, schema.modalities[0]), pixels)
    if channels in (1, 3):
        assert Image.open(io.BytesIO(data)).format == "PNG"


def test_a_later_delivery_continues_the_splits_and_knows_its_parent(tmp_path: Path) -> None:
    first = prepare(MemorySource(num_studies=40), str(tmp_path), subject_key=KEY)
    second = prepare(MemorySource(num_studies=80), str(tmp_path), subject_key=KEY)
    assert second.manifest.parent == first.version
    before, after = ({row["subject"]: row["split"] for row in r.subjects().to_pylist()} for r in (first, second))
    assert all(after[subject] == split for subject, split in before.items())
    assert open_release(str(tmp_path)).version == second.version
    assert open_release(f"{tmp_path}@{first.version}").version == first.version
    log = release_log(str(tmp_path))
    assert [(entry.version, entry.parent, entry.is_head) for entry in log] == [
        (second.version, first.version, True),
        (first.version, None, False),
    ]
    assert [sum(entry.num_studies.values()) for entry in log] == [80, 40]


def test_another_subject_key_is_refused(tmp_path: Path) -> None:
    prepare(MemorySource(), str(tmp_path), subject_key=KEY)
    with pytest.raises(GateError, match="DRAF_SUBJECT_KEY") as caught:
        prepare(MemorySource(), str(tmp_path), subject_key=b"another key of sixteen bytes")
    assert caught.value.exit_code == 4


def test_another_data_set_at_the_url_is_refused(tmp_path: Path) -> None:
    prepare(MemorySource(), str(tmp_path), subject_key=KEY)
    with pytest.raises(SpecError, match="releases of 'other', found of 'small'"):
        prepare(MemorySource(name="other"), str(tmp_path), subject_key=KEY)


def test_a_version_can_not_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="without a version"):
        prepare(MemorySource(), f"{tmp_path}/x@0123456789abcdef", subject_key=KEY)


def test_looking_at_a_source_writes_nothing_and_tells_the_same(tmp_path: Path) -> None:
    inspection = inspect_source(MemorySource(), subject_key=KEY)
    release = prepare(MemorySource(), str(tmp_path), subject_key=KEY)
    assert inspection.counts == release.manifest.counts
    assert inspection.quarantine == release.quarantine()


def test_what_is_not_a_release_is_named_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    with pytest.raises(SpecError, match="Beside it are: small"):
        open_release(str(tmp_path / "smal"))
    with pytest.raises(SpecError, match="found none"):
        open_release(str(tmp_path / "small"))
    release = prepare(MemorySource(), str(tmp_path / "small"), subject_key=KEY)
    wrong = release.version[:-1] + ("0" if release.version[-1] != "0" else "1")
    with pytest.raises(SpecError, match=f"Did you mean .*small@{release.version}"):
        open_release(f"{tmp_path}/small@{wrong}")
    (tmp_path / "small" / "HEAD.json").unlink()
    with pytest.raises(SpecError, match=f"no HEAD.json but versions {release.version}"):
        open_release(str(tmp_path / "small"))


@pytest.mark.parametrize("earlier", [False, True])
def test_at_whichever_write_a_run_dies_no_half_release_is_seen(tmp_path: Path, earlier: bool) -> None:
    url = str(tmp_path / "small")
    first = prepare(MemorySource(num_studies=20), url, subject_key=KEY) if earlier else None
    num_deaths = 0
    while True:
        try:
            with dying_after(num_deaths):  # every attempt may write one thing more than the one before it
                release = prepare(MemorySource(num_studies=30), url, subject_key=KEY, shard_size_bytes=20_000)
            break
        except Died:
            num_deaths += 1
        if first is None:
            with pytest.raises(SpecError, match="expected a release"):
                open_release(url)
        else:
            assert open_release(url).version == first.version
    assert num_deaths > 4
    assert verify(open_release(url)).version == release.version
    assert release.manifest.parent == (first.version if first else None)


def test_memory_and_temporary_disk_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    schema = SCHEMA.model_copy(update={"modalities": (ImageSpec(name="cxr", height=200, width=200),)})

    def large(i: int, study: Study) -> Study:
        pixels = np.random.default_rng(i).integers(0, 256, (1, 200, 200), np.uint8)
        return Study(study.subject, study.site, study.anchor, {"cxr": pixels}, 0)

    source = MemorySource(num_studies=200, schema=schema, change=large)
    tracemalloc.start()
    release = prepare(source, str(tmp_path / "out"), subject_key=KEY, shard_size_bytes=500_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(shard.size_bytes for shard in release.manifest.shards) > 8_000_000
    assert peak < 3_000_000
    assert list((tmp_path / "temporary").iterdir()) == []

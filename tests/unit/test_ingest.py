"""A delivery becomes a child release: what it is, how splits go on, what is refused."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from memory_delivery import EAST, MemoryDelivery, at, changed_schema, content, sealed, splits_of, take_in, uid_of
from memory_source import KEY, SCHEMA, MemorySource

from draf_dist.continual.ingest import OTHER_SPLIT, STATES, ingest, inspect_delivery
from draf_dist.data.loader import Loader
from draf_dist.data.order import Order
from draf_dist.data.prepare import prepare
from draf_dist.data.receipts import receipt
from draf_dist.data.release import Release, open_release, release_log, version_of
from draf_dist.data.splits import SHARES
from draf_dist.data.stats import decode_member
from draf_dist.data.verify import verify
from draf_dist.errors import DataError, DrafError, GateError, SpecError
from draf_dist.schema.modality import DataSchema
from draf_dist.schema.release import SPLITS, ReleaseManifest
from draf_dist.schema.study import Study
from draf_dist.sources.delivery import delivery_sha256, read_delivery


@pytest.fixture
def parent(tmp_path: Path) -> Release:
    return prepare(MemorySource(), str(tmp_path / "small"), subject_key=KEY, shard_size_bytes=40_000)


# What a child is.


def test_a_child_has_its_parents_shards_in_their_order_and_then_its_own(parent: Release, tmp_path: Path) -> None:
    before = content(parent)
    states: list[str] = []
    found = take_in(parent, MemoryDelivery(schema=EAST), sealed(tmp_path / "in"), on_state=states.append)
    child, old = found.release.manifest, parent.manifest
    assert tuple(states) == STATES
    assert (found.verdict, child.parent) == ("ingested", parent.version)
    assert child.shards[: len(old.shards)] == old.shards
    new = child.shards[len(old.shards) :]
    assert sum(shard.num_samples for shard in new) == found.delivery.num_studies == 20
    assert {name: data for name, data in content(parent).items() if name in before and name != "HEAD.json"} == {
        name: data for name, data in before.items() if name != "HEAD.json"
    }
    assert open_release(parent.url).version == found.release.version
    assert verify(found.release).num_samples == 80
    assert verify(open_release(parent.pinned_url)).num_samples == 60


def test_new_sites_come_last_so_that_indices_of_old_ones_stay(parent: Release, tmp_path: Path) -> None:
    child = take_in(parent, MemoryDelivery(schema=EAST), sealed(tmp_path / "in")).release
    assert child.schema.sites == ("north", "south", "west", "east")
    assert child.schema.model_copy(update={"sites": SCHEMA.sites}) == parent.schema


def test_the_manifest_adds_up_and_names_the_delivery(parent: Release, tmp_path: Path) -> None:
    source, folder = MemoryDelivery(schema=EAST, card_sha256="ab" * 32), sealed(tmp_path / "in", "n-1")
    found = take_in(parent, source, folder)
    manifest = found.release.manifest
    expected = Counter((s.site, n) for each in (MemorySource(), source) for s in each.studies() for n in ("studies", *s.inputs))
    counts = manifest.counts
    assert {
        (s, n): total for s in counts for n in counts[s]["train"] if (total := sum(counts[s][d][n] for d in SPLITS))
    } == expected
    by_uid = splits_of(found.release)
    for split in SPLITS:
        assert manifest.receipts[split] == receipt(np.array([uid for uid, where in by_uid.items() if where == split]))
    (record,) = manifest.deliveries
    assert (record.delivery_id, record.sha256, record.card_sha256) == ("n-1", delivery_sha256(read_delivery(folder)), "ab" * 32)
    assert manifest.card_sha256 == parent.manifest.card_sha256
    assert [entry.deliveries for entry in release_log(parent.url)] == [("n-1",), ()]


def test_a_release_without_deliveries_has_the_version_that_it_had_before_there_were_any() -> None:
    digests = {f"{name}_sha256": "1" * 64 for name in ("schema", "stats", "subjects", "quarantine", "card")}
    about = {"version": "", "name": "small", "subject_key_check": "6" * 16, "counts": {}, "quarantined": {}, "receipts": {}}
    manifest = ReleaseManifest.model_validate({**about, **digests, "shards": ()})
    assert not {"deliveries", "sums_sha256"} & manifest.model_dump().keys()
    assert version_of(manifest) == "4b667904968f91e8"
    record = {"delivery_id": "a", "sha256": "2" * 64, "card_sha256": "3" * 64}
    counts = {"num_studies": 1, "num_duplicates": 0, "num_quarantined": 0}
    child = ReleaseManifest.model_validate({**manifest.model_dump(), "deliveries": [{**record, **counts}]})
    assert version_of(child) != version_of(manifest)


def test_statistics_of_a_child_are_those_of_one_pass_over_everything(parent: Release, tmp_path: Path) -> None:
    def constant(i: int, study: Study) -> Study:
        return replace(study, inputs={**study.inputs, "history": np.array([[50, i % 2]], np.float32)})

    release = prepare(MemorySource(change=constant), str(tmp_path / "other"), subject_key=KEY)
    assert release.stats.variables["history"][0].std == 1.0  # of a constant: stats.json alone could not be gone on from
    for first, change in ((60, constant), (80, lambda i, study: study)):
        release = take_in(release, MemoryDelivery(first=first, change=change), sealed(tmp_path / f"{first}", f"{first}")).release
    ages, pixels = [], []
    for shard in release.shards("train"):
        index, tar = release.index(shard), (tmp_path / "other" / "shards" / "train" / f"{shard.sha256}.tar").read_bytes()
        for i in range(index.num_samples):
            for spec, into in ((SCHEMA.modalities[0], pixels), (SCHEMA.modalities[2], ages)):
                if (member := index.member(i, spec.name)) is not None:
                    into.append(decode_member(tar[member.offset : member.stop], spec).astype(float))
    age, cxr = release.stats.variables["history"][0], release.stats.images["cxr"]
    values = np.stack(ages)[:, 0, 0]
    assert (age.mean, age.std, age.num_observed) == pytest.approx((values.mean(), values.std(), len(values)), rel=1e-12)
    assert (cxr.mean, cxr.std, cxr.num_images) == pytest.approx((np.mean(pixels), np.std(pixels), len(pixels)), rel=1e-12)
    verify(release)  # bit for bit, and the sums too


def test_training_reads_old_and_new_studies_of_a_child(parent: Release, tmp_path: Path) -> None:
    child = take_in(parent, MemoryDelivery(schema=EAST), sealed(tmp_path / "in")).release
    sizes = tuple(shard.num_samples for shard in child.shards("train"))
    order = Order(shard_sizes=sizes, release=child.version, seed=1, batch_size=8, groups=4, open_samples=32)
    seen: list[int] = []
    sites: set[int] = set()
    for _, batch in Loader(child, "train", order).batches(0, order.steps_per_epoch):
        seen += batch.uid[batch.weight > 0].tolist()
        sites |= set(batch.site[batch.weight > 0].tolist())
    old = {uid for uid, split in splits_of(parent).items() if split == "train"}
    assert set(seen) > old
    assert sorted(seen) == sorted(uid for uid, split in splits_of(child).items() if split == "train")
    assert child.schema.sites.index("east") in sites


# Splits are kept for ever.


def test_splits_of_old_subjects_never_change_and_new_ones_go_on_from_the_counts(tmp_path: Path) -> None:
    source = MemorySource(num_studies=40, held_out_sites=frozenset({"west"}))
    release = prepare(source, str(tmp_path / "small"), subject_key=KEY)
    for number in range(12):
        before = splits_of(release)
        delivery = MemoryDelivery(first=40 + 5 * number, num_studies=5)
        release = take_in(release, delivery, sealed(tmp_path / f"{number}", f"{number}")).release
        after = splits_of(release)
        assert {uid: after[uid] for uid in before} == before
    assert len(after) == 100
    subject_of = {row["subject"]: row["split"] for row in release.subjects().to_pylist() if row["split"] != "ood"}
    for split, share in SHARES.items():
        # Were each delivery divided for itself, far too few would be tested on: the first of every small stratum trains.
        assert abs(list(subject_of.values()).count(split) - len(subject_of) * share / 20) < 3


def test_a_subject_comes_back_to_the_split_it_had(parent: Release, tmp_path: Path) -> None:
    old = {row["subject"]: row["split"] for row in parent.subjects().to_pylist()}
    again = MemoryDelivery(first=0, num_studies=60, change=lambda i, study: replace(study, anchor="2021-06-01"))
    child = take_in(parent, again, sealed(tmp_path / "in"), limit=1.0).release
    rows = [row for row in child.subjects().to_pylist() if row["uid"] not in splits_of(parent)]
    assert len(rows) > 40
    assert all(row["split"] == old[row["subject"]] for row in rows)


def test_a_held_out_site_that_delivers_again_stays_held_out_without_the_cards_word(parent: Release, tmp_path: Path) -> None:
    child = take_in(parent, at("west"), sealed(tmp_path / "in")).release
    new = splits_of(child).keys() - splits_of(parent).keys()
    assert len(new) == 20
    assert {splits_of(child)[uid] for uid in new} == {"ood"}
    assert child.manifest.held_out_sites == ("west",)


def test_a_new_site_that_the_card_holds_out_is_ood(parent: Release, tmp_path: Path) -> None:
    source = replace(MemoryDelivery(schema=EAST), held_out_sites=frozenset({"east"}))
    child = take_in(parent, source, sealed(tmp_path / "in")).release
    assert child.manifest.held_out_sites == ("east", "west")
    assert child.manifest.counts["east"]["ood"]["studies"] > 0
    assert not any(child.manifest.counts["east"][split]["studies"] for split in SHARES)
    verify(child)


def test_a_subject_who_trains_and_is_seen_at_a_held_out_site_stays_in_training_without_that_study(
    parent: Release, tmp_path: Path
) -> None:
    trains = next(s for s in MemorySource().studies() if splits_of(parent).get(uid_of(s)) == "train")
    source = at("west")
    moved = replace(
        source, change=lambda i, study: replace(study, site="west", subject=trains.subject if i == 61 else study.subject)
    )
    found = take_in(parent, moved, sealed(tmp_path / "in"), limit=0.2)
    assert found.quarantine.reasons == {OTHER_SPLIT: 1}
    assert found.delivery.num_studies == 19
    assert splits_of(found.release)[uid_of(trains)] == "train"
    verify(found.release)


def test_a_card_that_holds_out_a_site_that_trains_is_refused(parent: Release, tmp_path: Path) -> None:
    source = replace(MemoryDelivery(), held_out_sites=frozenset({"north", "west"}))
    with pytest.raises(SpecError, match="found north, which the release trains on"):
        take_in(parent, source, sealed(tmp_path / "in"))


# What is refused.


HR, TEMPERATURE = SCHEMA.modalities[1].variables  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("schema", "difference"),
    [
        (changed_schema(step_h=2), "modality vitals: step_h 1.0, found 2"),
        (changed_schema(variables=(HR.model_copy(update={"unit": "Hz"}), TEMPERATURE)), "variable hr: unit '1/min', found 'Hz'"),
        (changed_schema(variables=(HR.model_copy(update={"high": None}), TEMPERATURE)), "variable hr: high 250.0, found None"),
        (changed_schema(variables=(HR,)), "modality vitals: variables hr, t, found without t"),
        (changed_schema(variables=(TEMPERATURE, HR)), "found them in another order"),
        (changed_schema(name="signs"), "modalities cxr, vitals, history, found cxr, signs, history"),
        (
            SCHEMA.model_copy(update={"label": SCHEMA.label.model_copy(update={"classes": ("died", "survived")})}),
            "label death with survived, died, found label death with died, survived",
        ),
    ],
    ids=["step", "unit", "range", "variable gone", "order", "modality", "label"],
)
def test_every_difference_of_the_schema_but_new_sites_is_refused_by_name(
    parent: Release, tmp_path: Path, schema: DataSchema, difference: str
) -> None:
    before = content(parent)
    with pytest.raises(SpecError) as caught:
        take_in(parent, MemoryDelivery(schema=schema), sealed(tmp_path / "in"))
    assert difference in str(caught.value)
    assert content(parent) == before


@pytest.mark.parametrize(
    ("source", "key", "error", "words"),
    [
        (MemoryDelivery(), b"another key of sixteen bytes", GateError, "DRAF_SUBJECT_KEY"),
        (MemoryDelivery(name="other"), KEY, SpecError, "releases of 'other', found of 'small'"),
    ],
)
def test_another_key_and_another_data_set_are_refused(
    parent: Release, tmp_path: Path, source: MemoryDelivery, key: bytes, error: type[DrafError], words: str
) -> None:
    with pytest.raises(error, match=words):
        ingest(source, sealed(tmp_path / "in"), parent.url, subject_key=key)


def test_a_url_without_a_release_or_with_a_version_is_refused(parent: Release, tmp_path: Path) -> None:
    folder = sealed(tmp_path / "in")
    (tmp_path / "empty").mkdir()
    for url, words in ((str(tmp_path / "empty"), "Make the first one with draf prepare"), (parent.pinned_url, "without a version")):
        with pytest.raises(SpecError, match=words):
            ingest(MemoryDelivery(), folder, url, subject_key=KEY)


def test_a_delivery_comes_after_the_one_that_it_names(parent: Release, tmp_path: Path) -> None:
    second = sealed(tmp_path / "second", "n-2", previous_delivery="n-1")
    with pytest.raises(GateError, match="expected n-1 before it"):
        take_in(parent, MemoryDelivery(first=90), second)
    take_in(parent, MemoryDelivery(), sealed(tmp_path / "first", "n-1"))
    assert take_in(parent, MemoryDelivery(first=90), second).verdict == "ingested"


def test_a_card_of_other_sites_than_the_deliverys_is_refused(parent: Release, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="the sites of delivery first: east, found north, south, west"):
        take_in(parent, MemoryDelivery(), sealed(tmp_path / "in", sites=["east"]))


def test_files_that_are_not_as_sealed_stop_the_ingest(parent: Release, tmp_path: Path) -> None:
    folder, before = sealed(tmp_path / "in"), content(parent)
    (folder / "east" / "stays.csv").write_text("war")
    with pytest.raises(DataError, match=r"file 1 of the list \(\.csv file\): other bytes"):
        take_in(parent, MemoryDelivery(), folder)
    (folder / "delivery.json").unlink()
    with pytest.raises(SpecError, match="has arrived"):
        take_in(parent, MemoryDelivery(), folder)
    assert content(parent) == before


def test_looking_at_a_delivery_writes_nothing_and_tells_the_same(parent: Release, tmp_path: Path) -> None:
    source, folder, before = MemoryDelivery(first=55, schema=EAST), sealed(tmp_path / "in"), content(parent)
    seen = inspect_delivery(source, folder, parent.url, subject_key=KEY)
    assert content(parent) == before
    found = take_in(parent, source, folder)
    assert (seen.verdict, seen.delivery, seen.counts, seen.quarantine) == (
        found.verdict,
        found.delivery,
        found.counts,
        found.quarantine,
    )
    assert seen.release.version == parent.version
    assert inspect_delivery(source, folder, parent.url, subject_key=KEY).verdict == "already there"

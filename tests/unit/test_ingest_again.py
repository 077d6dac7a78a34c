"""Deliveries that come twice, bring what is there already, change it, overtake one another, or die half-way."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dying_writer import Died, dying_after
from memory_delivery import MemoryDelivery, at, changed_schema, content, sealed, take_in, uid_of
from memory_source import KEY, SCHEMA, MemorySource, only, with_image

from draf_dist.continual import ingest as ingestion
from draf_dist.continual.ingest import OTHER_CONTENT, ingest, inspect_delivery
from draf_dist.data.prepare import prepare
from draf_dist.data.release import Release, open_release, release_log
from draf_dist.data.verify import verify
from draf_dist.errors import DataError, GateError
from draf_dist.schema.study import Rejection, Study

EAST_TOO = SCHEMA.model_copy(update={"sites": (*SCHEMA.sites, "east")})


@pytest.fixture
def parent(tmp_path: Path) -> Release:
    return prepare(MemorySource(), str(tmp_path / "small"), subject_key=KEY, shard_size_bytes=40_000)


# Twice, again, changed.


def test_the_same_delivery_twice_changes_nothing(parent: Release, tmp_path: Path) -> None:
    folder = sealed(tmp_path / "in")
    first = take_in(parent, MemoryDelivery(), folder)
    before = content(parent)
    again = take_in(parent, MemoryDelivery(), folder)
    assert (again.verdict, again.release.version, again.delivery) == ("already there", first.release.version, first.delivery)
    later = take_in(parent, MemoryDelivery(first=90), sealed(tmp_path / "later", "second"))
    assert take_in(parent, MemoryDelivery(), folder).release.version == later.release.version
    assert before.items() <= content(parent).items() | {("HEAD.json", before["HEAD.json"])}


def test_the_same_delivery_is_there_whatever_the_card_says(parent: Release, tmp_path: Path) -> None:
    folder = sealed(tmp_path / "in", sites=SCHEMA.sites)
    first = take_in(parent, MemoryDelivery(), folder)
    strange = [MemoryDelivery(schema=changed_schema(step_h=2)), MemoryDelivery(name="other"), at("east")]
    assert [take_in(parent, card, folder).verdict for card in strange] == ["already there"] * len(strange)
    assert inspect_delivery(strange[0], folder, parent.url, subject_key=KEY).release.version == first.release.version


def test_other_bytes_under_the_same_id_are_refused(parent: Release, tmp_path: Path) -> None:
    take_in(parent, MemoryDelivery(), sealed(tmp_path / "in", "n-1"))
    before = content(parent)
    with pytest.raises(GateError, match=r"delivery n-1: .*other bytes under the same id") as caught:
        take_in(parent, MemoryDelivery(first=100), sealed(tmp_path / "other", "n-1", content="other"))
    assert caught.value.exit_code == 4
    assert content(parent) == before


def test_studies_that_are_there_already_are_skipped_and_counted(parent: Release, tmp_path: Path) -> None:
    nothing = take_in(parent, MemoryDelivery(first=30, num_studies=30), sealed(tmp_path / "in", "n-1"))
    assert (nothing.delivery.num_studies, nothing.delivery.num_duplicates, nothing.quarantine.num_studies) == (0, 30, 0)
    some = take_in(parent, MemoryDelivery(first=50, num_studies=30), sealed(tmp_path / "more", "n-2"))
    assert (some.delivery.num_studies, some.delivery.num_duplicates) == (20, 10)
    verify(some.release)


@pytest.mark.parametrize(
    ("change", "limit", "duplicates"),
    [(lambda i, study: study, 0.05, 30), (only(40, lambda study: replace(study, label=1 - study.label)), 0.05, 29)]
    + [(lambda i, study: replace(study, label=1 - study.label), 1.0, 0)],
    ids=["all there already", "one changed", "all changed"],
)
def test_a_delivery_without_anything_new_is_recorded_and_the_next_one_may_follow_it(
    parent: Release, tmp_path: Path, change: Callable[[int, Study], Study], limit: float, duplicates: int
) -> None:
    # East, a site of this card, has no study in the delivery: the release does not learn of it.
    source = MemoryDelivery(first=30, num_studies=30, schema=EAST_TOO, change=change)
    folder = sealed(tmp_path / "in", "n-1")
    seen = inspect_delivery(source, folder, parent.url, subject_key=KEY, limit=limit)
    assert (seen.verdict, seen.release.version, open_release(parent.url).version) == ("nothing new", parent.version, parent.version)
    found = take_in(parent, source, folder, limit=limit)
    child = found.release
    assert (found.verdict, found.delivery) == ("nothing new", seen.delivery)
    assert (found.delivery.num_studies, found.delivery.num_duplicates) == (0, duplicates)
    assert open_release(parent.url).version == child.version != parent.version
    assert (child.manifest.parent, child.manifest.shards) == (parent.version, parent.manifest.shards)
    assert (child.schema, child.stats, child.manifest.counts) == (parent.schema, parent.stats, parent.manifest.counts)
    assert child.manifest.quarantined == ({OTHER_CONTENT: 30 - duplicates} if duplicates < 30 else {})
    assert [entry.deliveries for entry in release_log(parent.url)] == [("n-1",), ()]
    verify(child)
    again = take_in(parent, source, folder, limit=limit)
    assert (again.verdict, again.release.version) == ("already there", child.version)
    assert take_in(parent, MemoryDelivery(), sealed(tmp_path / "next", "n-2", previous_delivery="n-1")).verdict == "ingested"


@pytest.mark.parametrize(
    "change",
    [
        lambda study: replace(study, label=1 - study.label),
        lambda study: replace(study, inputs={**study.inputs, "history": study.inputs["history"] + np.float32([[1, 0]])}),
        lambda study: replace(study, inputs={"history": study.inputs["history"]}, quality={}),
        lambda study: with_image(study, np.flip(study.inputs["cxr"]).copy(), "ab" * 32),
        lambda study: replace(study, quality={"cxr": 0.25}),
    ],
    ids=["label", "value", "modality gone", "image", "quality"],
)
def test_a_study_that_is_there_with_other_content_is_quarantined_and_never_overwritten(
    parent: Release, tmp_path: Path, change: Callable[[Study], Study]
) -> None:
    source = MemoryDelivery(first=57, num_studies=30, change=only(59, change))
    assert {"cxr", "history"} <= MemorySource()._study(59).inputs.keys()
    found = take_in(parent, source, sealed(tmp_path / "in", "n-1"))
    assert found.quarantine.reasons == {OTHER_CONTENT: 1}
    assert (found.delivery.num_studies, found.delivery.num_duplicates, found.delivery.num_quarantined) == (27, 2, 1)
    verify(found.release)


def test_quarantine_of_a_child_is_that_of_its_parent_and_of_the_delivery_under_its_id(tmp_path: Path) -> None:
    bad = Rejection("north", "stays.csv row 3", "bad time", "no such month")
    release = prepare(MemorySource(change=only(1, lambda study: bad)), str(tmp_path / "small"), subject_key=KEY)
    found = take_in(release, MemoryDelivery(change=only(66, lambda study: bad)), sealed(tmp_path / "in", "n-1"))
    quarantine = found.release.quarantine()
    assert [study.where for study in quarantine.studies] == ["stays.csv row 3", "n-1: stays.csv row 3"]
    assert found.release.manifest.quarantined == quarantine.reasons == {"bad time": 2}
    assert found.quarantine.num_studies == found.delivery.num_quarantined == 1


def test_too_many_studies_with_other_content_stop_the_ingest(parent: Release, tmp_path: Path) -> None:
    before = content(parent)
    source = MemoryDelivery(first=50, num_studies=30, change=lambda i, study: replace(study, label=1 - study.label))
    with pytest.raises(DataError, match=rf"delivery n-1: .* at most 5.0% .* found 10 of 30: {OTHER_CONTENT} 10"):
        take_in(parent, source, sealed(tmp_path / "in", "n-1"))
    assert content(parent) == before


def test_an_image_that_the_release_has_of_another_subject_stops_the_ingest(parent: Release, tmp_path: Path) -> None:
    theirs, before = MemorySource()._study(6), content(parent)
    source = MemoryDelivery(change=only(67, lambda study: with_image(study, theirs.inputs["cxr"], "ab" * 32)))
    mine = uid_of(source.change(67, source._study(67)))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=rf"cxr of study {mine:016x} .*another subject's study {uid_of(theirs):016x}"):
        take_in(parent, source, sealed(tmp_path / "in"))
    assert content(parent) == before


def test_an_image_of_the_same_subject_may_come_again(parent: Release, tmp_path: Path) -> None:
    theirs = MemorySource()._study(6)
    source = MemoryDelivery(
        change=only(67, lambda s: replace(with_image(s, theirs.inputs["cxr"], "ab" * 32), subject=theirs.subject, site=theirs.site))
    )
    verify(take_in(parent, source, sealed(tmp_path / "in")).release)


# Others at the same time, and a prepare afterwards.


@pytest.mark.parametrize("moment", ["sharded", "committed"])
def test_one_who_is_overtaken_builds_on_the_other_and_nothing_is_lost(parent: Release, tmp_path: Path, moment: str) -> None:
    folders = {name: sealed(tmp_path / name, name) for name in ("slow", "fast")}
    overtaking = {moment: "fast"}

    def overtake(state: str) -> None:
        if overtaking.pop(state, None):
            take_in(parent, MemoryDelivery(first=70), folders["fast"])

    # Ten of the studies are in both: those of the slower one are duplicates by the time it is done.
    slow = take_in(parent, MemoryDelivery(first=60), folders["slow"], on_state=overtake)
    assert [d.delivery_id for d in slow.release.manifest.deliveries] == ["fast", "slow"]
    assert (slow.delivery.num_studies, slow.delivery.num_duplicates) == (10, 10)
    assert open_release(parent.url).version == slow.release.version
    assert verify(slow.release).num_samples == 90
    # A version that was complete before it was overtaken stays, and no HEAD.json leads to it.
    log = [entry.deliveries for entry in release_log(parent.url)]
    assert log == [("slow",), ("fast",), ()] + [("slow",)] * (moment == "committed")


def test_one_who_is_overtaken_by_the_same_delivery_finds_it_there(parent: Release, tmp_path: Path) -> None:
    folder, left = sealed(tmp_path / "in"), [True]

    def overtake(state: str) -> None:
        if state == "committed" and left and left.pop():
            take_in(parent, MemoryDelivery(), folder)

    found = take_in(parent, MemoryDelivery(), folder, on_state=overtake)
    # Both made the very same version: who moved HEAD.json first is of no importance.
    assert len(found.release.manifest.deliveries) == 1
    assert len(release_log(parent.url)) == 2
    verify(found.release)


def test_one_who_is_always_overtaken_gives_up_and_says_so(parent: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingestion, "MAX_ATTEMPTS", 2)
    first = iter(range(100, 200, 5))

    def overtake(state: str) -> None:
        if state == "sharded":
            start = next(first)
            take_in(parent, MemoryDelivery(first=start, num_studies=5), sealed(tmp_path / f"{start}", f"{start}"))

    with pytest.raises(GateError, match="found 2 others that published first"):
        take_in(parent, MemoryDelivery(), sealed(tmp_path / "in"), on_state=overtake)
    assert verify(open_release(parent.url)).num_samples == 70


def test_preparing_the_first_export_again_leaves_what_was_delivered(parent: Release, tmp_path: Path) -> None:
    child = take_in(parent, MemoryDelivery(), sealed(tmp_path / "in")).release
    again = prepare(MemorySource(), parent.url, subject_key=KEY, shard_size_bytes=40_000)
    assert again.version == parent.version
    assert open_release(parent.url).version == child.version
    with pytest.raises(GateError, match="the studies of 1 deliveries would be missing"):
        prepare(MemorySource(num_studies=70), parent.url, subject_key=KEY)
    assert open_release(parent.url).version == child.version


def test_at_whichever_write_an_ingest_dies_the_release_is_as_it_was(tmp_path: Path) -> None:
    parent = prepare(MemorySource(num_studies=20), str(tmp_path / "small"), subject_key=KEY)
    folder, versions = sealed(tmp_path / "in"), set()
    for num_writes in range(30):
        url = str(tmp_path / f"{num_writes}")
        shutil.copytree(parent.url, url)
        try:
            with dying_after(num_writes):
                versions.add(ingest(MemoryDelivery(num_studies=10), folder, url, subject_key=KEY).release.version)
            break
        except Died:
            assert open_release(url).version == parent.version
        versions.add(ingest(MemoryDelivery(num_studies=10), folder, url, subject_key=KEY).release.version)
        assert verify(open_release(url)).num_samples == 30
    # At least one shard and its index, five small files, release.json, HEAD.json.
    assert 9 <= num_writes < 29
    assert len(versions) == 1

"""A delivery to a child release: `draf ingest`. docs/deliveries.md says what is promised.

Until HEAD.json is moved, by compare-and-swap, nothing that is written can be taken for the newest release, and everything is
written under names that follow from its content. So an ingest that dies in any state leaves the release as it was, and the same
command ends with the same version as if nothing had happened. One that is overtaken by another is compared, split and packed again
on the new parent, from what it has read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from draf_dist.continual.child import Addition, Base, child_release, continued_splits, find_base, without_moves
from draf_dist.continual.known import compare
from draf_dist.data.gather import Gathered, Progress, Row, Spool, refuse_too_many
from draf_dist.data.pack import SHARD_BYTES, Packing, gathered, training_statistics, write_shards
from draf_dist.data.parent import unversioned
from draf_dist.data.parts import Counts, count
from draf_dist.data.prepare import QUARANTINE_LIMIT
from draf_dist.data.publish import OvertakenError, move_head, refuse_if_overtaken, write_release
from draf_dist.data.release import Release, load_release, open_release, read_head
from draf_dist.data.training_sums import training_sums
from draf_dist.errors import GateError, SpecError, explain
from draf_dist.schema.delivery import Delivery
from draf_dist.schema.release import DeliveryRecord, Quarantine
from draf_dist.schema.study import Rejection
from draf_dist.sources.base import Source
from draf_dist.sources.delivery import check_files, delivery_sha256, read_delivery
from draf_dist.storage import Store, open_store

# Who is overtaken was so by one that is done: more than hospitals that deliver within the same minute.
MAX_ATTEMPTS = 20
OTHER_CONTENT = "already in the release with other content"
OTHER_SPLIT = "at a held-out site, but its subject is in another split"

# received: delivery.json is there, and new. verified: every file is as sealed. gathered: studies lie encoded in local temporary
# space, bad ones are set aside. compared: what the release has already is known. split: every new subject has its split. sharded:
# the new shards are in the store. committed: the version is complete. published: HEAD.json names it.
State = Literal["received", "verified", "gathered", "compared", "split", "sharded", "committed", "published"]
STATES: tuple[State, ...] = get_args(State)
OnState = Callable[[State], None]
Verdict = Literal["ingested", "already there", "nothing new"]


@dataclass(frozen=True)
class Ingested:
    """What became of a delivery.

    release: the one that HEAD.json names. counts, quarantine: of the studies that the delivery added, and of those left out; both
    empty if it was there already.
    """

    release: Release
    verdict: Verdict
    delivery: DeliveryRecord
    counts: Counts
    quarantine: Quarantine


@dataclass(frozen=True)
class _Received:
    """One delivery and where it goes: what stays the same over all attempts."""

    source: Source
    delivery: Delivery
    sha256: str
    store: Store
    url: str
    subject_key: bytes
    limit: float

    @property
    def where(self) -> str:
        return f"delivery {self.delivery.delivery_id}"

    def base(self) -> Base:
        return find_base(self.store, self.url, self.source, self.subject_key)


def ingest(
    source: Source,
    delivery_dir: Path,
    release_url: str,
    *,
    subject_key: bytes,
    limit: float = QUARANTINE_LIMIT,
    shard_size_bytes: int = SHARD_BYTES,
    on_progress: Progress = lambda done, total: None,
    on_state: OnState = lambda state: None,
) -> Ingested:
    """Adds a sealed delivery to the newest release of a data set, as a child release that becomes the newest.

    The same delivery a second time changes nothing. Studies that the release has with the same content are skipped, those that it
    has with other content are quarantined. A delivery without anything new is recorded: the child has its parent's shards alone.

    Args:
        source: the card's source of the delivery's folder.
        delivery_dir: the folder, with its delivery.json.
        release_url: URL of the data set, without a version.
        subject_key: the one that the release was made with.
        limit: share of the delivery's studies that may go to quarantine.
        shard_size_bytes: a shard is cut before it would be larger.
        on_progress: called with (studies read, None), then with (studies written, all new studies).
        on_state: called with every state once it is reached; after being overtaken, again from "compared" on.

    Raises:
        SpecError: no such folder, no delivery.json, no release at the URL, or a card that does not fit the release.
        DataError: files that are not as sealed, too many unusable studies, or one image under two subjects.
        GateError: another delivery of that id, a previous delivery that is missing, another subject key, or overtaken too often.
        StorageFullError, UnreachableError: no room in the store or on the temporary disk; no answer, or refused.
    """
    received = _received(source, delivery_dir, release_url, subject_key, limit)
    if (there := _already_there(received)) is not None:
        return there
    _check_sites(received)
    received.base()
    on_state("received")
    check_files(delivery_dir, received.delivery)
    on_state("verified")
    with gathered(source, subject_key, limit, on_progress) as (folder, spool, found):
        on_state("gathered")
        for _ in range(MAX_ATTEMPTS):
            base = received.base()
            # Another process may have taken in the same delivery meanwhile.
            if (there := _in_release(received, base.release)) is not None:
                return there
            added = _addition(received, base, spool, found, on_state)
            packing = Packing(received.store, spool, folder, base.schema, shard_size_bytes)
            try:
                return _publish(packing, added, on_progress, on_state)
            except OvertakenError:
                continue
    found_then = f"{MAX_ATTEMPTS} others that published first, one after the other"
    remedy = "Run the same command again when fewer ingests run at once."
    raise GateError(explain(received.where, expected="a release to build on", found=found_then, remedy=remedy))


def inspect_delivery(
    source: Source,
    delivery_dir: Path,
    release_url: str,
    *,
    subject_key: bytes,
    limit: float = QUARANTINE_LIMIT,
    on_progress: Progress = lambda done, total: None,
) -> Ingested:
    """Reads and checks everything as `ingest` does and writes nothing; raises what it would.

    The verdict is what `ingest` would say; the release is the newest one as it is now.
    """
    received = _received(source, delivery_dir, release_url, subject_key, limit)
    if (there := _already_there(received)) is not None:
        return there
    _check_sites(received)
    base = received.base()
    check_files(delivery_dir, received.delivery)
    with gathered(source, subject_key, limit, on_progress) as (_, spool, found):
        added = _addition(received, base, spool, found, lambda state: None)
    return _ingested(base.release, added)


def _received(source: Source, delivery_dir: Path, release_url: str, subject_key: bytes, limit: float) -> _Received:
    url = unversioned(release_url)
    delivery = read_delivery(delivery_dir)
    store = open_store(url, must_exist=True)
    return _Received(source, delivery, delivery_sha256(delivery), store, url, subject_key, limit)


def _check_sites(received: _Received) -> None:
    delivery, source = received.delivery, received.source
    if delivery.sites and set(delivery.sites) != set(source.schema.sites):
        expected = f"the sites of delivery {delivery.delivery_id}: {', '.join(sorted(delivery.sites))}"
        found = ", ".join(sorted(source.schema.sites))
        remedy = "Use a card that has these sites; docs/deliveries.md says how."
        raise SpecError(explain(f"card {source.name}", expected=expected, found=found, remedy=remedy))


def _already_there(received: _Received) -> Ingested | None:
    """As _in_release, of the newest release; the card is not asked. None if there is no release yet."""
    return None if read_head(received.store) is None else _in_release(received, open_release(received.url))


def _in_release(received: _Received, release: Release) -> Ingested | None:
    """The answer for a delivery that the release has.

    Raises:
        GateError: it has another one of this id, or lacks the one that must come before.
    """
    taken_in = {record.delivery_id: record for record in release.manifest.deliveries}
    record = taken_in.get(received.delivery.delivery_id)
    if record is not None and record.sha256 == received.sha256:
        nothing = Quarantine(num_studies=0, limit=received.limit, reasons={}, studies=(), out_of_range={})
        return Ingested(release, "already there", record, count(release.schema, {}), nothing)
    if record is not None:
        raise GateError(
            explain(
                f"{release.pinned_url}: {received.where}",
                expected=f"delivery.json with sha256 {record.sha256[:16]}..., as it was taken in",
                found=f"{received.sha256[:16]}...: other bytes under the same id",
                remedy="Ask the sender which one is right; what is new comes under an id of its own.",
            )
        )
    previous = received.delivery.previous_delivery
    if previous is not None and previous not in taken_in:
        remedy = "Take that one in first."
        raise GateError(explain(received.where, expected=f"{previous} before it", found="none in the release", remedy=remedy))
    return None


def _addition(received: _Received, base: Base, spool: Spool, found: Gathered, on_state: OnState) -> Addition:
    known = compare(base.release, spool, found.rows)
    on_state("compared")
    rows, moves = without_moves(base, known.new)
    rejections = found.rejections + [_rejection(row, OTHER_CONTENT) for row in known.changed]
    rejections += [_rejection(row, OTHER_SPLIT) for row in moves]
    kept = Gathered([*rows, *known.same], rejections, found.out_of_range)
    refuse_too_many(kept, received.where, received.limit)
    splits = continued_splits(base, rows)
    on_state("split")
    record = DeliveryRecord(
        delivery_id=received.delivery.delivery_id,
        sha256=received.sha256,
        card_sha256=received.source.card_sha256,
        num_studies=len(rows),
        num_duplicates=len(known.same),
        num_quarantined=len(rejections),
    )
    return Addition(base if rows else base.without_new_sites(), rows, splits, record, kept.quarantine(received.limit))


def _rejection(row: Row, reason: str) -> Rejection:
    return Rejection(site=row.site, where=row.where, reason=reason, detail="see docs/deliveries.md")


def _publish(packing: Packing, added: Addition, on_progress: Progress, on_state: OnState) -> Ingested:
    base, store = added.base, packing.store
    rows = added.rows_by_split
    statistics = training_statistics(packing.spool, rows["train"], base.schema, training_sums(base.release))
    shards = write_shards(packing, rows, on_progress)
    on_state("sharded")
    manifest, parts = child_release(added, shards, statistics)
    # A version that can no longer become the newest would only stand in the log, of use to nobody.
    refuse_if_overtaken(store, base.parent)
    write_release(store, manifest, parts)
    on_state("committed")
    move_head(store, manifest.version, base.parent)
    on_state("published")
    return _ingested(load_release(base.release.url, store, manifest.version), added)


def _ingested(release: Release, added: Addition) -> Ingested:
    verdict: Verdict = "ingested" if added.rows else "nothing new"
    return Ingested(release, verdict, added.record, added.counts, added.quarantine)

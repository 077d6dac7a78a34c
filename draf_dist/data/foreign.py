"""Foreign WebDataset tars to a release that points to them: `draf prepare CARD --from-webdataset URL`.

The tars stay where they are, as they are. The release holds an index for each (and, where a tar has samples of several splits, for
each split of it) and the small files. It pins every tar by its size and sha256.
"""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from draf_dist.data.foreign_index import TarReport, TarTask, image_columns, index_foreign_tar, variable_columns
from draf_dist.data.foreign_splits import check_names, split_rule
from draf_dist.data.foreign_tars import LISTED_TARS, ForeignTar, find_tars
from draf_dist.data.gather import Gathered, Leaks, Progress, Row, refuse_too_many
from draf_dist.data.pack import by_split
from draf_dist.data.parent import find_parent, key_check, unversioned
from draf_dist.data.parts import count, encode_parts, subjects_table
from draf_dist.data.prepare import QUARANTINE_LIMIT, Inspection, manifest_of, publish, splits_of
from draf_dist.data.release import Release, index_path
from draf_dist.data.shards import ABSENT, OFFSET, ShardIndex, encode_index
from draf_dist.data.splits import component_of
from draf_dist.data.stats import StatsBuilder, VariableMoments
from draf_dist.errors import DataError, DrafError, SpecError, UnreachableError, explain, together
from draf_dist.executor import Executor, Failed, Serial
from draf_dist.schema.label_text import label_text
from draf_dist.schema.modality import DataSchema, ImageSpec
from draf_dist.schema.release import SPLITS, ImageSums, ShardRecord, Split, TrainingSums
from draf_dist.schema.study import Rejection
from draf_dist.sources.webdataset_card import WebDatasetCard
from draf_dist.storage import Store, open_store, room_on

# On S3 an index costs two requests, and one waits for each.
INDEX_WRITERS = 8
IntArray = NDArray[np.int64]
_ERRORS: dict[int, type[DrafError]] = {error.exit_code: error for error in (SpecError, DataError, UnreachableError)}


@dataclass
class ForeignTars:
    """Tars and the card that says what they mean. ignored: members that the card does not name, by extension (latest pass)."""

    card: WebDatasetCard
    url: str
    ignored: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.name = self.card.name
        self.schema = self.card.data_schema()
        self.held_out_sites = frozenset(self.card.split.held_out_sites)
        self.public_subject_key = self.card.split.public_subject_key
        self.card_sha256 = self.card.sha256


@dataclass(frozen=True)
class _Found:
    """What one pass over all tars found. rows: per tar, a row for each sample of its report, None for one that is left out."""

    tars: Sequence[ForeignTar]
    reports: Sequence[TarReport]
    rows: Sequence[Sequence[Row | None]]
    gathered: Gathered
    moments: "_Moments"

    def kept(self, number: int, split: Split, splits: Mapping[str, Split]) -> IntArray:
        """Which samples of a tar belong to a split."""
        rows = enumerate(self.rows[number])
        return np.array([i for i, row in rows if row is not None and splits[component_of(row.subject)] == split], dtype=np.int64)


def prepare_foreign(
    source: ForeignTars,
    url: str,
    *,
    subject_key: bytes,
    limit: float = QUARANTINE_LIMIT,
    on_progress: Progress = lambda done, total: None,
    executor: Executor | None = None,
) -> Release:
    """Indexes the tars as a release of the data set at `url` and makes it the newest one; nothing of them is copied.

    Every tar is read once, from front to end, and every member that the card names is decoded once. The same tars, card and key
    give the same version. Memory holds the index and one record a sample, temporary disk 24 bytes a variable and sample.

    Args:
        source: the tars and their card.
        url: local path, file:// or s3:// URL of the data set, without a version.
        subject_key: the secret under which subjects become pseudonyms.
        limit: share of samples that may go to quarantine.
        on_progress: called with (samples read, None).
        executor: where tars are read, one at a time or several.

    Raises:
        SpecError: no such tars, the URL of the data set, or another data set there.
        DataError: a tar whose structure is broken, too many unusable samples, one image or fixed split that mixes subjects up.
        GateError: see data/prepare.py.
        UnreachableError, StorageFullError: no answer, or refused; no room.
    """
    url = unversioned(url)
    store = open_store(url)
    parent = find_parent(store, url, source.name, subject_key)
    with _read(source, store, subject_key, limit, on_progress, executor or Serial()) as found:
        splits = splits_of(found.gathered, source, parent, split_rule(source.card, found.tars, found.rows))
        sums = _training_sums(found, splits, source.schema)
        shards = _write_indexes(store, found, splits, source.schema)
    stats = StatsBuilder(source.schema, sums).result()
    gathered = found.gathered
    subjects = subjects_table(gathered.rows, splits)
    parts = encode_parts(source.schema, stats, subjects, gathered.quarantine(limit), sums)
    manifest = manifest_of(source, parts, parent, key_check(subject_key), by_split(gathered.rows, splits), gathered, shards)
    return publish(store, url, manifest, parts, parent)


def inspect_foreign(
    source: ForeignTars,
    url: str,
    *,
    subject_key: bytes,
    limit: float = QUARANTINE_LIMIT,
    on_progress: Progress = lambda done, total: None,
    executor: Executor | None = None,
) -> Inspection:
    """Reads and checks everything as `prepare_foreign` does, and writes nothing; raises what that would."""
    url = unversioned(url)
    store = open_store(url)
    parent = find_parent(store, url, source.name, subject_key)
    with _read(source, store, subject_key, limit, on_progress, executor or Serial()) as found:
        splits = splits_of(found.gathered, source, parent, split_rule(source.card, found.tars, found.rows))
    return Inspection(count(source.schema, by_split(found.gathered.rows, splits)), found.gathered.quarantine(limit))


class _Moments:
    """The moments of all samples, one file a tar, so that memory does not grow with the number of variables."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, number: int, moments: NDArray[np.float64]) -> None:
        """Keeps those of a tar."""
        np.save(self._folder / f"{number}.npy", moments, allow_pickle=False)

    def get(self, number: int) -> NDArray[np.float64]:
        """Those of a tar."""
        return np.asarray(np.load(self._folder / f"{number}.npy", allow_pickle=False))


@contextmanager
def _read(
    source: ForeignTars, store: Store, subject_key: bytes, limit: float, on_progress: Progress, executor: Executor
) -> Iterator[_Found]:
    """Reads all tars; what lies on the temporary disk is gone at the end."""
    tars = find_tars(source.url, store)
    check_names(source.card, tars)
    with tempfile.TemporaryDirectory(prefix="draf-prepare-") as name, room_on(Path(name)):
        moments = _Moments(Path(name))
        tasks = [TarTask(tar, source.card, subject_key) for tar in tars]
        reports = _reports(tasks, moments, on_progress, executor)
        source.ignored = sum((report.ignored for report in reports), Counter())
        rows, rejections = _rows(source, tars, reports)
        gathered = Gathered(sorted((row for of_tar in rows for row in of_tar if row), key=_uid), rejections, Counter())
        _refuse_unusable(source, gathered, limit)
        yield _Found(tars, reports, rows, gathered, moments)


def _reports(tasks: Sequence[TarTask], moments: _Moments, on_progress: Progress, executor: Executor) -> list[TarReport]:
    """One for each tar, in their order.

    Raises:
        DataError: the structure of a tar is broken; names all such tars.
    """
    reports: dict[int, TarReport] = {}
    done = 0
    for outcome in executor.map(index_foreign_tar, tasks):
        if isinstance(outcome, Failed):
            raise _ERRORS.get(outcome.exit_code, DrafError)(outcome.message)
        report = outcome.value
        moments.put(outcome.index, report.moments)
        reports[outcome.index] = replace(report, moments=np.empty((0, 3, 0)))
        done += len(report.uids) + len(report.rejections)
        on_progress(done, None)
    broken = [(tasks[number].tar.url, reports[number].problem) for number in sorted(reports) if reports[number].problem]
    if broken:
        remedy = "Nothing was written. Write the tar anew, or leave it out."
        problems = [explain(url, expected="a tar of whole files", found=found, remedy=remedy) for url, found in broken]
        more = len(problems) - LISTED_TARS
        raise DataError(together([*problems[:LISTED_TARS], *([f"... and {more} more."] if more > 0 else [])]))
    return [reports[number] for number in range(len(tasks))]


def _rows(
    source: ForeignTars, tars: Sequence[ForeignTar], reports: Sequence[TarReport]
) -> tuple[list[list[Row | None]], list[Rejection]]:
    """The samples that stay, by tar, and those that don't; of two with one key the first stays.

    Raises:
        DataError: an image of two subjects, where the card says whose the samples are.
    """
    seen: set[int] = set()
    leaks, owners = Leaks(), set[bytes]()
    rows: list[list[Row | None]] = []
    rejections: list[Rejection] = []
    for tar, report in zip(tars, reports, strict=True):
        rejections += report.rejections
        rows.append([])
        for i in range(len(report.uids)):
            row = _row(source.schema, report, i)
            place = f"{tar.name}: sample at byte {row.offset}"
            digests = set(report.digests[i].values())
            reason = _repetition(source.card, row.uid in seen, bool(digests & owners))
            if reason is not None:
                rejections.append(Rejection(row.site, place, *reason))
                rows[-1].append(None)
                continue
            seen.add(row.uid)
            if source.card.subject is None:
                owners |= digests
            else:
                leaks.check(row, {name: (digest,) for name, digest in report.digests[i].items()}, where=place)
            rows[-1].append(row)
    leaks.refuse()
    return rows, rejections


def _repetition(card: WebDatasetCard, is_known: bool, is_shown: bool) -> tuple[str, str] | None:
    """Why a sample is left out that came before, by its key or, where nothing says whose the samples are, by an image of it."""
    if is_known and card.keys == "unique":
        return "repeated key", "an earlier tar has it too; if every tar counts anew, say `keys: per_tar` in the card"
    if is_known:
        return "repeated key", "a tar with the same file name has it too"
    return ("repeated image", "an earlier sample has it too") if is_shown else None


def _row(schema: DataSchema, report: TarReport, i: int) -> Row:
    present = tuple(name for name, member in zip(schema.names, report.members[i, :-1], strict=True) if member[OFFSET] != ABSENT)
    site, label = schema.sites[report.sites[i]], int(report.labels[i])
    text = label_text(schema.label, label)
    return Row(int(report.uids[i]), report.subjects[i], site, text, label, present, report.offsets[i], parts=(), where="")


def _uid(row: Row) -> int:
    return row.uid


def _refuse_unusable(source: ForeignTars, gathered: Gathered, limit: float) -> None:
    refuse_too_many(gathered, source.name, limit)
    if gathered.rows:
        return
    ignored = ", ".join(f".{name} {number}" if name else f"without one {number}" for name, number in source.ignored.most_common(5))
    wanted = ", ".join(f".{name}" for modality in source.card.modalities for name in modality.extensions)
    found = f"none; members by the last part of their extension: {ignored}" if ignored else "none"
    remedy = "An extension is all that follows the first dot of a file's name: name it in the card's `member`."
    raise DataError(explain(source.url, expected=f"samples with {wanted}", found=found, remedy=remedy))


def _training_sums(found: _Found, splits: Mapping[str, Split], schema: DataSchema) -> TrainingSums:
    """What the statistics follow from: of the training samples in the order in which they are read."""
    images = image_columns(schema.modalities)
    variables = variable_columns(schema.modalities)
    num_images = dict.fromkeys(images, 0)
    totals = {name: np.zeros(2, dtype=object) for name in images}
    moments = {name: VariableMoments(columns.stop - columns.start) for name, columns in variables.items()}
    for number, report in enumerate(found.reports):
        kept = found.kept(number, "train", splits)
        present = report.members[kept][:, :-1, OFFSET] != ABSENT
        for name, column in images.items():
            num_images[name] += int(present[:, schema.names.index(name)].sum())
            totals[name] += report.image_sums[kept, column].astype(object).sum(axis=0)
        of_tar = found.moments.get(number)
        for name, columns in variables.items():
            for i in kept[present[:, schema.names.index(name)]]:
                moments[name].merge(of_tar[i, :, columns])
    num_pixels = {s.name: s.channels * s.height * s.width for s in schema.modalities if isinstance(s, ImageSpec)}
    return TrainingSums(
        images={
            name: ImageSums(num_images=n, num_pixels=n * num_pixels[name], total=totals[name][0], total_squares=totals[name][1])
            for name, n in num_images.items()
        },
        variables={name: moment.sums() for name, moment in moments.items()},
    )


def _write_indexes(store: Store, found: _Found, splits: Mapping[str, Split], schema: DataSchema) -> tuple[ShardRecord, ...]:
    """The shards, split by split; a tar with samples of several splits is one of each."""

    def write(split: Split, number: int, kept: IntArray) -> ShardRecord:
        report = found.reports[number]
        index = ShardIndex(
            schema.names, report.uids[kept], report.members[kept], sites=report.sites[kept], labels=report.labels[kept]
        )
        content = encode_index(index)
        shard = ShardRecord(
            split=split,
            sha256=report.sha256,
            size_bytes=report.size_bytes,
            index_sha256=hashlib.sha256(content).hexdigest(),
            num_samples=len(kept),
            url=found.tars[number].url,
        )
        if store.size(index_path(shard)) != len(content):
            store.write(index_path(shard), content)
        return shard

    places = ((split, number, found.kept(number, split, splits)) for split in SPLITS for number in range(len(found.tars)))
    with ThreadPoolExecutor(INDEX_WRITERS) as pool:
        return tuple(pool.map(write, *zip(*(place for place in places if len(place[2])), strict=True)))

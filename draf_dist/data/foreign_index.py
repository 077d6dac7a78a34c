"""One foreign WebDataset tar -> the index of its samples, from one pass over its bytes.

A sample is what WebDataset takes for one: neighbouring members with the same key, which is the name up to the first dot of its base
name. What of it can't be used is told with its place in the tar, never with its key, which may name a person.
"""

import hashlib
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from draf_dist.data.decode import MAX_META_BYTES, UndecodableError, decode_image, decode_series, max_member_bytes, series_shape
from draf_dist.data.encode import UnfitError, in_range
from draf_dist.data.foreign_tars import ForeignTar
from draf_dist.data.foreign_walk import BrokenTarError, Entry, TarStream, walk
from draf_dist.data.foreign_words import Words
from draf_dist.data.shards import ABSENT, OFFSET
from draf_dist.data.stats import moments_of
from draf_dist.schema.identity import sample_uid, subject_pseudonym
from draf_dist.schema.modality import ImageSpec, ModalitySpec, SeriesSpec, TableSpec
from draf_dist.schema.study import Rejection
from draf_dist.sources.webdataset_card import WebDatasetCard, ending
from draf_dist.storage import MissingError, Store, open_store

MAX_NAME_BYTES = 255
DIGEST_BYTES = 16
# As WebDataset splits a name: the key may hold folders, the extension what it likes but those.
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
# WebDataset passes over these.
_SKIPPED = re.compile(r"__[^/]*__($|/)")
# What became of a key that is no row; the first rejection has the latter number, the next one less, and so on.
_IGNORED, _REJECTED = -1, -2
TarSpec = ImageSpec | SeriesSpec | TableSpec


@dataclass(frozen=True)
class TarTask:
    """What a worker needs to index one tar."""

    tar: ForeignTar
    card: WebDatasetCard
    subject_key: bytes


@dataclass(frozen=True)
class TarReport:
    """What one tar holds; rows are the usable samples in the order in which they lie.

    problem: why the whole tar can't be used; then all else is empty. uids, sites, labels: int64 (n,); members: as in ShardIndex;
    subjects: pseudonyms. offsets: where each begins. digests: of each row, its images by modality.
    image_sums: int64 (n, images, 2), sum of the pixels and of their squares. moments: float64 (n, 3, F) over the variables of all
    other modalities, 0 where absent. rejections: samples left out. ignored: members that the card does not name, by the last part
    of their extensions.
    """

    problem: str = ""
    sha256: str = ""
    size_bytes: int = 0
    uids: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    members: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 1, 3), np.int64))
    sites: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    labels: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    subjects: tuple[str, ...] = ()
    offsets: tuple[int, ...] = ()
    digests: tuple[dict[str, bytes], ...] = ()
    image_sums: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 0, 2), np.int64))
    moments: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 3, 0)))
    rejections: tuple[Rejection, ...] = ()
    ignored: Counter[str] = field(default_factory=Counter)


@dataclass
class _Sample:
    """A sample while its members come in. place: of its first member, then of what makes it unusable; problem says why it is.

    is_named: whether the card names any of its members; without one it is a file beside the samples, as a README.
    """

    key: str
    place: str
    offset: int
    members: NDArray[np.int64]
    image_sums: NDArray[np.int64]
    moments: NDArray[np.float64]
    words: dict[str, bytes] = field(default_factory=dict)
    extensions: set[str] = field(default_factory=set)
    digests: dict[str, bytes] = field(default_factory=dict)
    problem: UnfitError | None = None
    is_named: bool = False

    def spoil(self, problem: UnfitError, place: str) -> None:
        """The first problem is told."""
        if self.problem is None:
            self.problem, self.place = problem, place


@dataclass(frozen=True, slots=True)
class _Row:
    """A usable sample."""

    sample: _Sample
    site: int
    label: int
    uid: int
    subject: str


def index_foreign_tar(task: TarTask) -> TarReport:
    """Reads a tar once: every member that the card names is decoded and its crc32 taken, and the sha256 of the whole.

    A tar that is gone or whose structure is not sound gives a report with a problem.

    Raises:
        UnreachableError: the store does not answer, or refuses the credentials.
    """
    try:
        store, name = _store(task.tar.folder), task.tar.name
        size_bytes = store.size(name) or 0
        with TarStream(store, name, size_bytes) as stream:
            found = _Indexer(task)
            for entry in walk(stream):
                found.take(entry, stream)
            return found.report(stream.sha256(), size_bytes)
    except BrokenTarError as error:
        return TarReport(problem=str(error))
    except MissingError:
        return TarReport(problem="nothing, though it was there a moment ago")


@lru_cache(maxsize=64)
def _store(folder: str) -> Store:
    """Opened once in each worker: on S3 that costs half a second."""
    return open_store(folder)


class _Indexer:
    """Groups members into samples, and keeps of each what the release needs."""

    def __init__(self, task: TarTask) -> None:
        self._task, self._words = task, Words(task.card)
        self._specs = tuple(modality.spec() for modality in task.card.modalities)
        self._columns = {name: i for i, modality in enumerate(task.card.modalities) for name in modality.extensions}
        self._named = self._words.extensions | self._columns.keys()
        self._layout = _Layout(self._specs)
        self._open: _Sample | None = None
        # Key -> the number of its row, _IGNORED, or _REJECTED less the number of its rejection.
        self._fate: dict[str, int] = {}
        self._rows: list[_Row | None] = []
        self._rejections: list[Rejection] = []
        self._ignored: Counter[str] = Counter()

    def take(self, entry: Entry, stream: TarStream) -> None:
        """The next member of the tar."""
        found = _NAME.fullmatch(entry.name)
        if found is None or _SKIPPED.match(entry.name):
            self._ignored[""] += 1
            return
        key, extension = found[1], found[2].lower()
        place = f"{self._task.tar.name}: member {entry.number} at byte {entry.offset}"
        sample = self._sample(key, place, entry.offset)
        sample.is_named = sample.is_named or extension in self._named
        if extension not in self._named:
            self._ignored[ending(extension)] += 1
        try:
            _check(entry, sample, extension)
            if extension in self._named:
                self._keep(sample, extension, entry, stream)
        except UnfitError as problem:
            sample.spoil(problem, place)

    def _sample(self, key: str, place: str, offset: int) -> _Sample:
        """The one that a member with this key belongs to."""
        if self._open is None or self._open.key != key:
            self._close()
            self._open = self._layout.empty(key, place, offset)
            if key in self._fate:
                self._open.spoil(UnfitError("split sample", "its key comes back after other samples"), place)
        return self._open

    def _keep(self, sample: _Sample, extension: str, entry: Entry, stream: TarStream) -> None:
        """Reads a member that the card names."""
        if extension in self._words.extensions:
            sample.words[extension] = _content(entry, stream, MAX_META_BYTES)
            return
        column = self._columns[extension]
        spec = self._specs[column]
        if sample.members[column, OFFSET] != ABSENT:
            raise UnfitError("duplicate modality", f"a second member for {spec.name}")
        data = _content(entry, stream, max_member_bytes(spec))
        if self._layout.measure(sample, column, data):
            sample.members[column] = entry.offset, entry.size, zlib.crc32(data)

    def _close(self) -> None:
        """Decides what becomes of the sample whose last member has come."""
        sample, self._open = self._open, None
        if sample is None:
            return
        before = self._fate.get(sample.key, _IGNORED)
        if before == _IGNORED and not sample.is_named:
            self._fate[sample.key] = _IGNORED
            return
        row = self._row(sample)
        if row is not None:
            self._fate[sample.key] = len(self._rows)
            self._rows.append(row)
        elif before <= _REJECTED:
            # What was missing when it was first closed is no news beside the fact that it was torn apart.
            self._rejections[_REJECTED - before] = self._rejections.pop()
        else:
            self._fate[sample.key] = _REJECTED + 1 - len(self._rejections)
            if before >= 0:
                self._rows[before] = None

    def _row(self, sample: _Sample) -> _Row | None:
        """None for a sample that can't be used; it goes to the rejections."""
        site = None
        try:
            if sample.problem is not None:
                raise sample.problem
            if (sample.members[:, OFFSET] == ABSENT).all():
                raise UnfitError("no input", "no modality with an observed value")
            site = self._words.site(sample.key, sample.words)
            label = self._words.label(sample.key, sample.words)
            subject = self._words.subject(sample.key, sample.words)
        except UnfitError as problem:
            name = "" if site is None else self._task.card.sites.names()[site]
            self._rejections.append(Rejection(name, sample.place, problem.reason, problem.detail))
            return None
        card, key = self._task.card, self._task.subject_key
        identity = sample.key if card.keys == "unique" else f"{self._task.tar.name}/{sample.key}"
        uid = sample_uid(key, source=card.name, sample=identity)
        return _Row(sample, site, label, uid, subject_pseudonym(key, identity if subject is None else subject))

    def report(self, sha256: str, size_bytes: int) -> TarReport:
        """What was found, once all members have come."""
        self._close()
        rows = [row for row in self._rows if row is not None]
        empty = self._layout.empty("", "", 0)
        return TarReport(
            sha256=sha256,
            size_bytes=size_bytes,
            uids=np.array([row.uid for row in rows], dtype=np.int64),
            members=np.array([row.sample.members for row in rows], dtype=np.int64).reshape(len(rows), *empty.members.shape),
            sites=np.array([row.site for row in rows], dtype=np.int64),
            labels=np.array([row.label for row in rows], dtype=np.int64),
            subjects=tuple(row.subject for row in rows),
            offsets=tuple(row.sample.offset for row in rows),
            digests=tuple(row.sample.digests for row in rows),
            image_sums=np.array([row.sample.image_sums for row in rows], dtype=np.int64).reshape(
                len(rows), *empty.image_sums.shape
            ),
            moments=np.array([row.sample.moments for row in rows], dtype=np.float64).reshape(len(rows), *empty.moments.shape),
            rejections=tuple(self._rejections),
            ignored=self._ignored,
        )


class _Layout:
    """Where in a row's arrays each modality has its sums."""

    def __init__(self, specs: Sequence[TarSpec]) -> None:
        self._specs = specs
        self.images = image_columns(specs)
        self.variables = variable_columns(specs)

    def empty(self, key: str, place: str, offset: int) -> _Sample:
        """A sample of which nothing is known yet."""
        num_variables = max((columns.stop for columns in self.variables.values()), default=0)
        return _Sample(
            key=key,
            place=place,
            offset=offset,
            members=np.full((len(self._specs) + 1, 3), ABSENT, dtype=np.int64),
            image_sums=np.zeros((len(self.images), 2), dtype=np.int64),
            moments=np.zeros((3, num_variables)),
        )

    def measure(self, sample: _Sample, column: int, data: bytes) -> bool:
        """Decodes a modality and keeps its sums; False where nothing of it is observed, so that it is absent.

        Raises:
            UnfitError: it does not decode to what the card says, or has a value outside its range.
        """
        spec = self._specs[column]
        try:
            if isinstance(spec, ImageSpec):
                self._measure_image(sample, spec, data)
                return True
            return self._measure_values(sample, spec, data)
        except UndecodableError as error:
            raise UnfitError("undecodable member", f"{spec.name}: {error}") from error

    def _measure_image(self, sample: _Sample, spec: ImageSpec, data: bytes) -> None:
        pixels = np.empty((spec.height, spec.width, spec.channels), dtype=np.uint8)
        decode_image(data, pixels.transpose(2, 0, 1))
        if pixels.min() == pixels.max():
            raise UnfitError("blank image", f"{spec.name}: all pixels are {pixels.flat[0]}")
        # Exact: whole numbers far below 2**53, in whichever order they are added.
        wide = pixels.ravel().astype(np.float64)
        sample.image_sums[self.images[spec.name]] = wide.sum(), wide @ wide
        sample.digests[spec.name] = hashlib.sha256(data).digest()[:DIGEST_BYTES]

    def _measure_values(self, sample: _Sample, spec: SeriesSpec | TableSpec, data: bytes) -> bool:
        values = np.empty(series_shape(spec), dtype=np.float32)
        decode_series(data, values)
        _, excluded = in_range(values, spec)
        if excluded:
            raise UnfitError("out of range", f"{spec.name}: {', '.join(excluded)}")
        sample.moments[:, self.variables[spec.name]] = moments_of(values)
        return not np.isnan(values).all()


def image_columns(specs: Sequence[ModalitySpec]) -> dict[str, int]:
    """Which of the second axis of TarReport.image_sums is whose."""
    names = [spec.name for spec in specs if isinstance(spec, ImageSpec)]
    return {name: i for i, name in enumerate(names)}


def variable_columns(specs: Sequence[ModalitySpec]) -> dict[str, slice]:
    """Which of the last axis of TarReport.moments are whose."""
    found: dict[str, slice] = {}
    start = 0
    for spec in specs:
        if isinstance(spec, SeriesSpec | TableSpec):
            found[spec.name] = slice(start, start + len(spec.variables))
            start += len(spec.variables)
    return found


def _check(entry: Entry, sample: _Sample, extension: str) -> None:
    """Raises UnfitError for what no tar of samples should hold."""
    parts = entry.name.split("/")
    if not entry.name.isprintable() or len(entry.name.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES:
        raise UnfitError("bad name", f"longer than {MAX_NAME_BYTES} bytes, or with characters that can't be printed")
    if parts[0] == "" or ".." in parts:
        raise UnfitError("bad name", "an absolute path, or one with ..")
    if not entry.is_file:
        raise UnfitError("no file", "a link, a device or a sparse file")
    if extension in sample.extensions:
        raise UnfitError("duplicate name", "a second member with this name")
    sample.extensions.add(extension)


def _content(entry: Entry, stream: TarStream, most: int) -> bytes:
    if entry.size > most:
        raise UnfitError("member too large", f"{entry.size} bytes, expected at most {most}")
    return stream.read(entry.size)

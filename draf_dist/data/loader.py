"""The loader: steps of a plan -> batches of one rank, decoded by threads into arrays that are made once per batch.

Which samples a batch holds is arithmetic (order.py); threads and prefetch decide only when the work is done. Rows are cut into
chunks, every chunk is filled by one thread into its own rows, and batches leave in order, so an error surfaces at its own step,
after every good batch before it.
"""

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from draf_dist.data.collate import Frame
from draf_dist.data.decode import Bytes, UndecodableError, decode_image, decode_series, decode_study
from draf_dist.data.order import Plan, rank_entries
from draf_dist.data.release import Release
from draf_dist.data.shard_reader import Place, ShardReader, make_block_cache
from draf_dist.errors import SpecError, explain
from draf_dist.schema.batch import Batch
from draf_dist.schema.modality import ImageSpec
from draf_dist.schema.release import Split

# The files of one sample with their places: the modalities in axis order, None where absent, then the json.
_Sample = list[tuple[Place, Bytes] | None]

# Requests to a store wait for the network, not for the processor.
FETCH_THREADS = 8
# Several chunks a thread: the last one to finish holds the batch up for less.
CHUNKS_PER_THREAD = 4


class DecodeHook(Protocol):
    """Changes stored images in the decode thread. Must be a pure function of its arguments."""

    def levels(self, uid: Tensor, epoch: Tensor) -> dict[str, NDArray[np.int64]]:
        """Modality -> grid index of every sample (B,); 0 leaves the image as it is."""
        ...

    def change(self, image: NDArray[np.uint8], index: int) -> NDArray[np.uint8]:
        """The image (C, H, W) at a grid index above 0."""
        ...

    def severity(self, index: int) -> float:
        """What Batch.severity says of a grid index, in (0, 1]."""
        ...


@dataclass(frozen=True)
class _Rows:
    """What one local batch is made of: row i is sample[i] of release source[i], drawn in epoch[i]; the rest is padding."""

    step: int
    num_rows: int
    source: NDArray[np.int64]
    epoch: NDArray[np.int64]
    sample: NDArray[np.int64]


class Loader:
    """Batches of one rank, the same for any number of threads and any prefetch.

    releases: one, or one per source of a mixture, with equal schemas; a plan numbers the samples of their `split`.
    threads: that decode. prefetch: batches that are being made beyond the one that is handed out; with it memory is bounded.
    decode: a hook for stored images, see `corruption.Corruptor.decode_hook`.

    Raises:
        SpecError: the schemas differ.
    """

    def __init__(
        self,
        releases: Release | Sequence[Release],
        split: Split,
        plan: Plan,
        *,
        rank: int = 0,
        world: int = 1,
        threads: int = 2,
        prefetch: int = 4,
        decode: DecodeHook | None = None,
    ) -> None:
        self.releases = (releases,) if isinstance(releases, Release) else tuple(releases)
        _check_schemas(self.releases)
        self.plan, self.rank, self.world = plan, rank, world
        self._threads, self._prefetch = threads, prefetch
        blocks = make_block_cache()
        self._filler = _Filler([ShardReader(release, split, blocks) for release in self.releases], decode)

    @property
    def num_rows(self) -> int:
        """Rows of this rank's batches, padding included: the same at every step."""
        mine = rank_entries(self.plan.batch_size, self.plan.batch_size, self.rank, self.world)
        return int(mine.stop - mine.start)

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Generator[tuple[int, Batch], None, None]:
        """(step, batch) for steps [start_step, stop_step), endless without a stop. Images are uint8, values in stored units.

        Closing the generator ends its threads.

        Raises:
            DataError: a member that is damaged or not what the schema says, a shard that is cut short or gone.
            UnreachableError: the store does not answer.
        """
        steps = takewhile(lambda step: stop_step is None or step < stop_step, count(start_step))
        return _in_order((self._rows(step) for step in steps), self._filler, self._threads, self._prefetch)

    def _rows(self, step: int) -> _Rows:
        draws = self.plan.draws(step)
        mine = rank_entries(len(draws.sample), self.plan.batch_size, self.rank, self.world)
        return _Rows(step, self.num_rows, draws.source[mine], draws.epoch[mine], draws.sample[mine])


def evaluation_batches(
    release: Release,
    split: Split,
    batch_size: int,
    *,
    rank: int = 0,
    world: int = 1,
    threads: int = 2,
    partners: Mapping[str, NDArray[np.int64]] | None = None,
) -> Iterator[Batch]:
    """Every sample of a split once, in the order they are stored, epoch 0; the last batch is short.

    Of several ranks each gets its cut of every batch, the last one padded: all have the same number of batches, none is empty.
    partners: modality -> for every sample of the split the sample whose modality it gets (its own number: no change); what is
    exchanged so is flagged as corrupted with severity 1. Raises as `Loader.batches`.
    """
    reader = ShardReader(release, split)
    samples = np.arange(reader.num_samples, dtype=np.int64)
    zeros = np.zeros(min(batch_size, len(samples)), dtype=np.int64)
    parts = (samples[start : start + batch_size] for start in range(0, len(samples), batch_size))
    whole = rank_entries(batch_size, batch_size, rank, world)
    cuts = (part[rank_entries(len(part), batch_size, rank, world)] for part in parts)
    rows = (
        _Rows(step, len(part) if world == 1 else whole.stop - whole.start, zeros[: len(part)], zeros[: len(part)], part)
        for step, part in enumerate(cuts)
    )
    for _, batch in _in_order(rows, _Filler([reader], None, partners), threads, prefetch=2):
        yield batch


class _Filler:
    """Fills frames with samples: what a chunk of rows needs is read, checked and decoded."""

    def __init__(
        self, readers: Sequence[ShardReader], hook: DecodeHook | None, partners: Mapping[str, NDArray[np.int64]] | None = None
    ) -> None:
        self.schema = readers[0].release.schema
        self.is_local = all(reader.is_local for reader in readers)
        self._readers, self._hook, self._partners = readers, hook, partners or {}

    def fetch(self, rows: _Rows, chunk: range) -> list[_Sample]:
        """The files of every row of the chunk."""
        places = [self._places(rows, row) for row in chunk]
        samples: list[_Sample] = [[None] * len(found) for found in places]
        for source in sorted({int(rows.source[row]) for row in chunk}):
            wanted = [
                (number, column, place)
                for number, row in enumerate(chunk)
                for column, place in enumerate(places[number])
                if place is not None and rows.source[row] == source
            ]
            contents = self._readers[source].read([place for _, _, place in wanted])
            for (number, column, place), content in zip(wanted, contents, strict=True):
                samples[number][column] = (place, content)
        return samples

    def fill(self, frame: Frame, rows: _Rows, chunk: range, samples: Sequence[_Sample]) -> None:
        """Decodes what was fetched into the rows of the frame."""
        for row, sample in zip(chunk, samples, strict=True):
            self._fill_row(frame, row, int(rows.epoch[row]), sample)
        if self._hook is not None:
            here = slice(chunk.start, chunk.stop)
            levels = self._hook.levels(torch.from_numpy(frame.uid[here]), torch.from_numpy(frame.epoch[here]))
            for name, indices in levels.items():
                self._change(self._hook, frame, chunk, name, indices)

    def _places(self, rows: _Rows, row: int) -> list[Place | None]:
        reader, sample = self._readers[int(rows.source[row])], int(rows.sample[row])
        places = reader.places(sample)
        for name, partners in self._partners.items():
            column = self.schema.names.index(name)
            places[column] = reader.places(int(partners[sample]))[column]
        return places

    def _fill_row(self, frame: Frame, row: int, epoch: int, sample: _Sample) -> None:
        frame.present[row] = False
        own = sample[-1]
        assert own is not None  # the json, which every sample has
        for column, piece in enumerate(sample):
            if piece is None:
                continue
            place, content = piece
            place.check(content)
            try:
                self._decode(frame, row, column, epoch, content)
            except UndecodableError as error:
                raise place.error("a file as schema.json describes it", str(error)) from error
            if place.uid != own[0].uid:
                frame.severity[row, column] = 1.0
        if frame.uid[row] != own[0].uid:
            raise own[0].error("the uid that its name says", "another")

    def _decode(self, frame: Frame, row: int, column: int, epoch: int, content: Bytes) -> None:
        if column == len(self.schema.modalities):
            frame.describe(row, decode_study(content), epoch)
            return
        spec = self.schema.modalities[column]
        frame.present[row, column] = True
        if isinstance(spec, ImageSpec):
            decode_image(content, frame.images[spec.name][row])
        else:
            values, observed = frame.values[spec.name][row], frame.observed[spec.name][row]
            decode_series(content, values)
            np.logical_not(np.isnan(values), out=observed)
            values[~observed] = 0.0

    @staticmethod
    def _change(hook: DecodeHook, frame: Frame, chunk: range, name: str, indices: NDArray[np.int64]) -> None:
        column = frame.schema.names.index(name)
        for row, index in zip(chunk, indices.tolist(), strict=True):
            if index > 0 and frame.present[row, column]:
                frame.images[name][row] = hook.change(frame.images[name][row], index)
                frame.severity[row, column] = hook.severity(index)


class _Workers:
    """The threads of one pass: those that wait for the store, and those that decode. Leaving ends them."""

    def __init__(self, filler: _Filler, threads: int) -> None:
        self._filler, self._threads = filler, threads
        self._stopped = threading.Event()
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._fetchers = None if filler.is_local else ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="fetch")

    def start(self, rows: _Rows) -> "_Job":
        """Begins a batch."""
        frame = Frame(self._filler.schema, rows.num_rows)
        size = max(1, -(-len(rows.sample) // (CHUNKS_PER_THREAD * self._threads)))
        chunks = [range(start, min(start + size, len(rows.sample))) for start in range(0, len(rows.sample), size)]
        return _Job(rows.step, frame, [self._submit(frame, rows, chunk) for chunk in chunks])

    def stop(self) -> None:
        """Drops what has not begun and waits for what has."""
        self._stopped.set()
        pools = [pool for pool in (self._fetchers, self._decoders) if pool is not None]
        for pool in pools:
            # All are told before any is waited for: a decoder may be waiting for a request that has not begun.
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in pools:
            pool.shutdown(wait=True)

    def _submit(self, frame: Frame, rows: _Rows, chunk: range) -> Future[None]:
        fetched = self._fetchers.submit(self._filler.fetch, rows, chunk) if self._fetchers is not None else None
        return self._decoders.submit(self._fill, frame, rows, chunk, fetched)

    def _fill(self, frame: Frame, rows: _Rows, chunk: range, fetched: Future[list[_Sample]] | None) -> None:
        samples = self._filler.fetch(rows, chunk) if fetched is None else fetched.result()
        if not self._stopped.is_set():
            self._filler.fill(frame, rows, chunk, samples)


@dataclass(frozen=True)
class _Job:
    """A batch that is being made."""

    step: int
    frame: Frame
    chunks: list[Future[None]]

    def result(self) -> tuple[int, Batch]:
        """Waits for it; raises what went wrong in the first chunk that did."""
        for chunk in self.chunks:
            chunk.result()
        return self.step, self.frame.batch()


def _in_order(requests: Iterable[_Rows], filler: _Filler, threads: int, prefetch: int) -> Generator[tuple[int, Batch], None, None]:
    """The batches in the order they were asked for, at most prefetch + 1 of them in the making."""
    workers = _Workers(filler, threads)
    jobs: deque[_Job] = deque()
    try:
        for rows in requests:
            jobs.append(workers.start(rows))
            if len(jobs) > prefetch:
                yield jobs.popleft().result()
        while jobs:
            yield jobs.popleft().result()
    finally:
        workers.stop()


def _check_schemas(releases: Sequence[Release]) -> None:
    first = releases[0]
    for release in releases[1:]:
        if release.schema != first.schema:
            raise SpecError(
                explain(
                    release.pinned_url,
                    expected=f"the schema of {first.pinned_url}",
                    found="another",
                    remedy="Only releases with the same modalities, variables, labels and sites can be mixed.",
                )
            )

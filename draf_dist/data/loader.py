"""The loader: steps of a plan -> batches of one rank, decoded by threads into memory that is used again and again.

Which samples a batch holds is arithmetic (order.py); threads, readahead and prefetch decide only when the work is done. Remote
blocks are fetched ahead of use (remote_shards.py). Rows are cut into chunks, every chunk is filled by one thread into its own rows,
and batches leave in order, so an error surfaces at its own step, after every good batch before it.
"""

import hashlib
import os
import secrets
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import count, islice, takewhile

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from draf_dist.data.arena import Arena
from draf_dist.data.bad_data import LISTED, STRICT, BadData, BadDataDesk, LeftOut
from draf_dist.data.filler import DecodeHook, Filler, Rows
from draf_dist.data.loader_stats import LoaderStats, of_cache, of_desk, of_stores
from draf_dist.data.local_shards import is_local
from draf_dist.data.node_cache import Lease, NodeCache, default_cache
from draf_dist.data.order import Plan, rank_entries
from draf_dist.data.patches import PatchRule
from draf_dist.data.pipeline import Workshop, in_order, reach
from draf_dist.data.release import Release
from draf_dist.data.remote_shards import BLOCK_BYTES
from draf_dist.data.sequential import Sequential
from draf_dist.data.shard_reader import IntArray, ShardReader
from draf_dist.data.working_set import working_set
from draf_dist.errors import SpecError, explain
from draf_dist.schema.batch import Batch
from draf_dist.schema.release import Split
from draf_dist.storage import Store

EVALUATION_PREFETCH = 2


@dataclass(frozen=True)
class Reading:
    """How a loader works. Nothing of it changes a batch but `bad_data`, which may leave something out, and `patch_seed`.

    prefetch: batches that are being made beyond the one that is handed out; with it memory is bounded. cache: where blocks of
    remote shards are kept; None for that of the environment. pinned: batches in page-locked memory, for a GPU. patch_seed: with the
    epoch and the uid it decides where patches of volumes lie. job: a name that all processes of a run give, and no other run:
    those on one node then count as one to the cache; None: each pass counts by itself. beside_bytes: what other passes of that
    job hold in the cache beside this one.
    """

    prefetch: int = 4
    bad_data: BadData = BadData()
    cache: NodeCache | None = None
    pinned: bool = False
    patch_seed: int = 0
    job: str | None = None
    beside_bytes: int = 0


class Loader:
    """Batches of one rank, the same for any number of threads and any prefetch.

    releases: one, or one per source of a mixture, with equal schemas; a plan numbers the samples of their `split`.
    threads: that decode. decode: a hook for stored images, see `corruption.Corruptor.decode_hook`.

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
        decode: DecodeHook | None = None,
        reading: Reading = Reading(),
    ) -> None:
        self.releases = (releases,) if isinstance(releases, Release) else tuple(releases)
        _check_schemas(self.releases)
        self.plan, self.rank, self.world = plan, rank, world
        self._threads, self._reading = threads, reading
        self._desk = BadDataDesk(reading.bad_data, " and ".join(release.pinned_url for release in self.releases))
        readers = [ShardReader(release.apart(split), split) for release in self.releases]
        self._filler = Filler(readers, decode, self._desk, patch_rule=PatchRule(reading.patch_seed))
        self._arena = Arena(pinned=reading.pinned)
        self._stores = _stores(self._filler.readers)
        self._earlier = LoaderStats()
        self._lease: Lease | None = None

    @property
    def num_rows(self) -> int:
        """Rows of this rank's batches, padding included: the same at every step."""
        mine = rank_entries(self.plan.batch_size, self.plan.batch_size, self.rank, self.world)
        return int(mine.stop - mine.start)

    @property
    def left_out(self) -> list[LeftOut]:
        """The first members that were left out; see BadData."""
        return list(self._desk.listed)

    def stats(self) -> LoaderStats:
        """Of all passes so far, of this loader alone."""
        lease = LoaderStats() if self._lease is None else of_cache(self._lease.stats)
        return self._earlier + of_stores(self._stores) + lease + of_desk(self._desk)

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Generator[tuple[int, Batch], None, None]:
        """(step, batch) for steps [start_step, stop_step), endless without a stop. Images are uint8, values in stored units.

        Closing the generator ends its threads.

        Raises:
            DataError: a member that is damaged or not what the schema says, a shard that is cut short or gone.
            UnreachableError: the store does not answer.
            SpecError: the cache of the node is smaller than what is open at once.
        """
        steps = takewhile(lambda step: stop_step is None or step < stop_step, count(start_step))
        with ExitStack() as stack:
            self._lease = _lease(self._filler.readers, self.plan, self._reading, stack)
            if self._lease is not None:
                # What an earlier attempt left and steps before this one needed may go.
                self._lease.advance(start_step)
            workshop = Workshop(self._filler, self.plan, self._arena, self._threads, self._reading.prefetch, self._lease)
            try:
                yield from stack.enter_context(closing(in_order(map(self._rows, steps), workshop)))
            finally:
                if self._lease is not None:
                    self._earlier, self._lease = self._earlier + of_cache(self._lease.stats), None

    def _rows(self, step: int) -> Rows:
        draws = self.plan.draws(step)
        mine = rank_entries(len(draws.sample), self.plan.batch_size, self.rank, self.world)
        return Rows(step, self.num_rows, draws.source[mine], draws.epoch[mine], draws.sample[mine])


@dataclass(frozen=True)
class Portion:
    """Which batches of a pass are read, and what of them.

    steps: numbers of batches; None for all. chosen: bool (N,), the samples of the split that are read, for one rank alone; None
    for all; a batch of which none is read is left out. partners: modality -> for every sample of the split the sample whose
    modality it gets (its own number: no change); what is exchanged so is flagged as corrupted with severity 1.
    """

    steps: range | None = None
    chosen: NDArray[np.bool_] | None = None
    partners: Mapping[str, IntArray] | None = None


WHOLE = Portion()


class SplitLoader:
    """Every sample of a split once a pass, in the order they are stored, epoch 0; the last batch is short.

    Of several ranks each gets its cut of every batch, the last one padded: all have the same number of batches, none is empty.
    The limit of `reading.bad_data` is asked of every pass by itself.
    """

    def __init__(
        self,
        release: Release,
        split: Split,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        threads: int = 2,
        reading: Reading = Reading(prefetch=EVALUATION_PREFETCH),
    ) -> None:
        self.release, self.split = release, split
        self._reader = ShardReader(release.apart(split), split)
        self._batch_size, self._rank, self._world = batch_size, rank, world
        self._threads, self._reading = threads, reading
        self._stores = _stores([self._reader])
        self._earlier = LoaderStats()
        self._left_out: dict[str, LeftOut] = {}

    @property
    def left_out(self) -> list[LeftOut]:
        """The first members that were left out, each once, however many passes there were; step: the batch of the pass."""
        return list(self._left_out.values())

    def stats(self) -> LoaderStats:
        """Of all passes that have ended, of this loader alone."""
        return self._earlier + of_stores(self._stores)

    @property
    def num_samples(self) -> int:
        """Of the split."""
        return self._reader.num_samples

    @property
    def num_batches(self) -> int:
        """Of a whole pass."""
        return -(-self.num_samples // self._batch_size)

    def uids(self) -> IntArray:
        """The uids of all samples of the split, in the order of a pass; reads the indexes of all shards."""
        return self._reader.uids(np.arange(self._reader.num_samples, dtype=np.int64))

    def batches(self, portion: Portion = WHOLE) -> Iterator[Batch]:
        """One pass, or a part of one: nothing else is read. Raises as `Loader.batches`."""
        desk = BadDataDesk(self._reading.bad_data, self._reader.release.pinned_url)
        filler = Filler([self._reader], None, desk, portion.partners)
        plan = Sequential(tuple(shard.num_samples for shard in self._reader.shards), self._batch_size)
        with ExitStack() as stack:
            lease = _lease([self._reader], plan, self._reading, stack)
            stack.callback(self._count, desk, lease)
            workshop = Workshop(filler, plan, Arena(), self._threads, self._reading.prefetch, lease)
            for _, batch in stack.enter_context(closing(in_order(self._rows(portion), workshop))):
                yield batch

    def studies(self, portion: Portion = WHOLE) -> Iterator[Batch]:
        """The same without padding: what was left out is not there, and the batch that much shorter."""
        for batch in self.batches(portion):
            real = batch.weight > 0
            if real.any():
                yield batch if real.all() else _rows_of(batch, real)

    def _rows(self, portion: Portion) -> Iterator[Rows]:
        samples = np.arange(self._reader.num_samples, dtype=np.int64)
        zeros = np.zeros(min(self._batch_size, len(samples)), dtype=np.int64)
        whole = rank_entries(self._batch_size, self._batch_size, self._rank, self._world)
        for step in range(self.num_batches) if portion.steps is None else portion.steps:
            mine = samples[step * self._batch_size : (step + 1) * self._batch_size]
            mine = mine[rank_entries(len(mine), self._batch_size, self._rank, self._world)]
            num_rows = len(mine) if self._world == 1 else whole.stop - whole.start
            if portion.chosen is not None:
                mine = mine[portion.chosen[mine]]
                num_rows = len(mine)
            if num_rows:
                yield Rows(step, num_rows, zeros[: len(mine)], zeros[: len(mine)], mine)

    def _count(self, desk: BadDataDesk, lease: Lease | None) -> None:
        cached = LoaderStats() if lease is None else of_cache(lease.stats)
        self._earlier += of_desk(desk) + cached
        fresh = {one.message: one for one in desk.listed}
        self._left_out = dict(islice((self._left_out | fresh).items(), LISTED))


def _rows_of(batch: Batch, chosen: Tensor) -> Batch:
    return batch.map(lambda tensor: tensor[chosen])


def evaluation_batches(
    release: Release,
    split: Split,
    batch_size: int,
    *,
    bad_data: BadData = STRICT,
) -> Iterator[Batch]:
    """The studies of one pass of a SplitLoader; raises as that does."""
    reading = Reading(prefetch=EVALUATION_PREFETCH, bad_data=bad_data)
    return SplitLoader(release, split, batch_size, reading=reading).studies()


def evaluation_bytes(release: Release, split: Split, batch_size: int) -> int:
    """What one pass over a split holds in the cache of the node at once, at most; 0 where nothing is fetched."""
    reader = ShardReader(release, split)
    plan = Sequential(tuple(shard.num_samples for shard in reader.shards), batch_size)
    return 0 if is_local(reader) else _open_bytes([reader], plan, EVALUATION_PREFETCH)


def _open_bytes(readers: Sequence[ShardReader], plan: Plan | Sequential, prefetch: int) -> int:
    shard_bytes = [[shard.size_bytes for shard in reader.shards] for reader in readers]
    if isinstance(plan, Sequential):
        return plan.open_bytes(shard_bytes[0], block_bytes=BLOCK_BYTES, ahead_steps=reach(prefetch))
    return working_set(plan, shard_bytes, block_bytes=BLOCK_BYTES, ahead_steps=reach(prefetch))


def _lease(readers: Sequence[ShardReader], plan: Plan | Sequential, reading: Reading, stack: ExitStack) -> Lease | None:
    """A place in the cache of the node, if anything has to be fetched."""
    if all(is_local(reader) for reader in readers):
        return None
    needed = _open_bytes(readers, plan, reading.prefetch)
    cache = reading.cache or default_cache()
    # Who has no name may be a rank of a job or a job: taken for a rank, two jobs would hold twice what was promised.
    job = reading.job or f"process {os.getpid()}, {secrets.token_hex(4)}"
    # Those at the same pass of a job wait for each other before any block is dropped, as their steps are the same.
    names = [*(shard.sha256 for reader in readers for shard in reader.shards), repr(plan)]
    part = hashlib.sha256("\n".join(names).encode()).hexdigest()[:32]
    return stack.enter_context(closing(cache.lease(job, needed + reading.beside_bytes, part)))


def _stores(readers: Sequence[ShardReader]) -> list[Store]:
    """The stores that shards, indexes and volumes are read from."""
    locations = [reader.release.tar_location(shard)[0] for reader in readers for shard in reader.shards]
    return list({id(store): store for store in (*locations, *(reader.release.store for reader in readers))}.values())


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

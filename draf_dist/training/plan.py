"""What a run follows: the order of its training split, whole or, with replay, as two sources that are mixed."""

from dataclasses import dataclass

import numpy as np

from draf_dist.data.filler import DecodeHook
from draf_dist.data.loader import EVALUATION_PREFETCH, Loader, Reading, SplitLoader, evaluation_bytes
from draf_dist.data.mixture import Mixture
from draf_dist.data.order import Order, TrainingOrder
from draf_dist.data.permutation import IntArray
from draf_dist.data.receipts import receipt
from draf_dist.data.release import Release
from draf_dist.data.replay import new_and_old, num_training
from draf_dist.schema.release import Receipt
from draf_dist.training.backend import Backend
from draf_dist.training.job import FinetuneJob, TrainJob
from draf_dist.training.ledger import ONLY, SourceEpoch

NEW, OLD = "new", "old"


@dataclass(frozen=True)
class Source:
    """Where samples are drawn from: the training split of a release, or of a view of one. name: `only`, `new` or `old`."""

    name: str
    release: Release

    @property
    def num_samples(self) -> int:
        """N of this source."""
        return num_training(self.release)

    def uids(self) -> IntArray:
        """int64 (N,), as the order numbers the samples; reads the index of every shard."""
        return np.concatenate([self.release.index(shard).uids for shard in self.release.shards("train")])

    def receipt(self) -> Receipt:
        """Of one whole epoch: what the manifest says, or for a view what its indexes say."""
        known = self.release.manifest.receipts.get("train")
        return receipt(self.uids()) if known is None else known


@dataclass(frozen=True)
class TrainingPlan:
    """The order of a run and the sources that it draws from; entry i of `sources` is source i of its draws.

    release: whole, as validation reads it. run: URL of the run, which names it to the cache of a node; None outside of one.
    """

    sources: tuple[Source, ...]
    order: TrainingOrder
    release: Release
    run: str | None = None

    @property
    def validation_bytes(self) -> int:
        """What a validation holds in the cache of a node at once, beside what training holds."""
        return evaluation_bytes(self.release, "val", self.order.batch_size)

    def validation(self, backend: Backend, job: TrainJob) -> SplitLoader:
        """A rank's part of the validation split, as loaded; job: that of the plan."""
        return SplitLoader(
            self.release,
            "val",
            self.order.batch_size,
            rank=backend.rank,
            world=backend.world,
            threads=backend.decode_threads,
            reading=Reading(prefetch=EVALUATION_PREFETCH, bad_data=job.bad_data, job=self.run),
        )

    def loader(self, backend: Backend, job: TrainJob, decode: DecodeHook | None = None) -> Loader:
        """The training batches of a rank; job: that of the plan."""
        releases = [source.release for source in self.sources]
        reading = Reading(
            bad_data=job.bad_data,
            pinned=backend.device.type == "cuda",
            patch_seed=job.seed,
            job=self.run,
            # Asked for at the start: a run must not find after its first epoch that it can't validate.
            beside_bytes=self.validation_bytes,
        )
        rank, world, threads = backend.rank, backend.world, backend.decode_threads
        return Loader(releases, "train", self.order, rank=rank, world=world, threads=threads, decode=decode, reading=reading)

    def entry_sources(self, step: int) -> IntArray:
        """The source of every entry of the global batch of a step, counted from 0: batches are sorted by source."""
        drawn = np.subtract(self.order.num_drawn(step + 1), self.order.num_drawn(step))
        return np.repeat(np.arange(len(self.sources)), drawn)

    def num_entries(self, step: int) -> int:
        """Entries of the global batch of a step, counted from 0."""
        return len(self.entry_sources(step))

    def receipts(self, steps: int) -> dict[SourceEpoch, Receipt]:
        """What the first `steps` steps consume, by source epoch: a whole one equals its source's receipt.

        Needs the shards' indexes where an epoch is not whole, or a source is not the whole split.
        """
        expected: dict[SourceEpoch, Receipt] = {}
        for number, (source, drawn) in enumerate(zip(self.sources, self.order.num_drawn(steps), strict=True)):
            epochs, rest = divmod(drawn, source.num_samples)
            if epochs:
                expected |= dict.fromkeys(((source.name, epoch) for epoch in range(epochs)), source.receipt())
            if rest:
                samples = self._begun(number, epochs, steps)
                expected[source.name, epochs] = receipt(source.uids()[samples])
        return expected

    def _begun(self, source: int, epoch: int, steps: int) -> IntArray:
        """The samples that the first `steps` steps draw in an epoch of a source, found from its end backwards."""
        first = epoch * self.sources[source].num_samples
        found = []
        for step in reversed(range(steps)):
            if self.order.num_drawn(step + 1)[source] <= first:
                break
            draws = self.order.draws(step)
            found.append(draws.sample[(draws.source == source) & (draws.epoch == epoch)])
        return np.concatenate(found)


def build_plan(job: TrainJob, release: Release, run: str | None = None) -> TrainingPlan:
    """The plan of a job whose release is pinned. run: see TrainingPlan.

    Raises:
        SpecError: replay, and one of its two sources has nothing, or there is no such version.
    """
    replay = job.replay if isinstance(job, FinetuneJob) else None
    if replay is None:
        return TrainingPlan((Source(ONLY, release),), _order(job, release, release.version), release, run)
    parts = tuple(Source(name, part) for name, part in zip((NEW, OLD), new_and_old(release, replay.since), strict=True))
    # Keys of their own: two sources of one size must not be shuffled alike.
    orders = tuple(_order(job, part.release, f"{release.version}/{part.name}") for part in parts)
    return TrainingPlan(parts, Mixture(orders, (replay.new, replay.old), job.batch_size), release, run)


def _order(job: TrainJob, release: Release, key: str) -> Order:
    return Order(
        shard_sizes=tuple(shard.num_samples for shard in release.shards("train")),
        release=key,
        seed=job.seed,
        batch_size=job.batch_size,
        groups=job.groups,
        open_samples=job.open_samples,
    )

"""A split under one corruption at one severity, as a robustness sweep evaluates it: keyed by seed and uid, without an epoch."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from draf_dist.data.bad_data import STRICT, BadData
from draf_dist.data.corruption.missing import fit_not_at_random
from draf_dist.data.corruption.operations import AnyOperation, MissingNotAtRandom, Swap, severity
from draf_dist.data.corruption.training import Corruptor
from draf_dist.data.loader import evaluation_batches
from draf_dist.data.release import Release
from draf_dist.data.shard_reader import ShardReader
from draf_dist.errors import SpecError, explain
from draf_dist.noise import chain, hash64_np
from draf_dist.schema.batch import Batch
from draf_dist.schema.release import Split


def corrupted_batches(  # noqa: PLR0913 - what is read and how, and what is done to it
    release: Release,
    split: Split,
    corruptor: Corruptor,
    operation: AnyOperation,
    index: int,
    *,
    modality: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    bad_data: BadData = STRICT,
) -> Iterator[Batch]:
    """Every sample of a split once, normalised, with one operation at one grid index; index 0 is the split as it is.

    modality: the only one that is hit; None hits all that the operation fits (a modality swapped alone has another partner
    than its neighbours, so all of a sample's come from different subjects).

    Raises:
        SpecError: the grid has no such index, or the release no such modality.
    """
    _check(release, operation, index, modality)
    if isinstance(operation, Swap):
        names = release.schema.names if modality is None else (modality,)
        swapped = {name: swap_partners(release, split, name, seed=seed) for name in names if index > 0}
        yield from map(corruptor.normaliser, evaluation_batches(release, split, batch_size, partners=swapped, bad_data=bad_data))
    elif isinstance(operation, MissingNotAtRandom):
        clean = partial(evaluation_batches, release, split, batch_size, bad_data=bad_data)
        yield from _missing_not_at_random(lambda: map(corruptor.normaliser, clean()), operation, index, seed)
    else:
        for batch in evaluation_batches(release, split, batch_size, bad_data=bad_data):
            yield corruptor.apply(corruptor.normaliser(batch), operation, index, modality=modality, seed=seed)


def swap_partners(release: Release, split: Split, modality: str, *, seed: int) -> NDArray[np.int64]:
    """For every sample of a split the sample whose modality it gets: of another subject, keyed by uid; int64 (N,).

    Samples that have the modality form a ring in keyed order; each takes from the next one of another subject, so a sample is
    the partner of one other (of more only where a subject has several studies). Without a partner it keeps its own.
    """
    reader = ShardReader(release, split)
    samples = np.arange(reader.num_samples, dtype=np.int64)
    uids = reader.uids(samples)
    has = reader.present(samples)[:, release.schema.names.index(modality)]
    table = release.subjects()
    subject_of = dict(zip(table["uid"].to_pylist(), table["subject"].to_pylist(), strict=True))
    ring = samples[has][np.argsort(hash64_np(chain(seed, "swap", modality), uids[has]), kind="stable")]
    subjects = [subject_of[int(uid)] for uid in uids[ring]]
    partners = samples.copy()
    partners[ring] = ring[_next_of_another(subjects)]
    return partners


def _next_of_another(subjects: list[str]) -> NDArray[np.int64]:
    """For each place on the ring the next place with another subject; its own place if there is none."""
    result = np.arange(len(subjects), dtype=np.int64)
    for place, subject in enumerate(subjects):
        ahead = ((place + step) % len(subjects) for step in range(1, len(subjects)))
        result[place] = next((other for other in ahead if subjects[other] != subject), place)
    return result


def _missing_not_at_random(
    batches: Callable[[], Iterator[Batch]], operation: MissingNotAtRandom, index: int, seed: int
) -> Iterator[Batch]:
    """batches: a pass over the split, normalised."""
    if index == 0:
        yield from batches()
        return
    law = fit_not_at_random(batches(), rate=operation.grid[index], slope=operation.slope, score=operation.score)
    yield from (law.apply(batch, seed=seed) for batch in batches())


def _check(release: Release, operation: AnyOperation, index: int, modality: str | None) -> None:
    severity(operation, index)
    where = f"corruption {operation.kind}"
    if modality is not None and modality not in release.schema.names:
        known = ", ".join(release.schema.names)
        raise SpecError(explain(where, expected=f"one of {known}", found=repr(modality), remedy="Correct the name."))
    if modality is not None and isinstance(operation, MissingNotAtRandom):
        raise SpecError(explain(where, expected="no modality", found=repr(modality), remedy="It acts on all of them at once."))

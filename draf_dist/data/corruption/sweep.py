"""A split under one corruption at one severity, as a robustness sweep evaluates it: keyed by seed and uid, without an epoch."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from draf_dist.data.corruption.missing import NotAtRandom, constant_severity, fit_not_at_random, label_score, records_only
from draf_dist.data.corruption.operations import AnyOperation, MissingNotAtRandom, Swap, severity
from draf_dist.data.corruption.training import Corruptor
from draf_dist.data.loader import WHOLE, Portion, SplitLoader
from draf_dist.data.release import Release
from draf_dist.data.shard_reader import IntArray, ShardReader
from draf_dist.errors import SpecError, explain
from draf_dist.noise import chain, hash64_np
from draf_dist.schema.batch import Batch
from draf_dist.schema.categories import category_counts
from draf_dist.schema.release import Split


class CorruptedSplit:
    """A split under any operation, normalised, every sample once, in stored order; or some batches of it.

    What needs the whole split (partners of swaps, how sick everybody is) is worked out once. device: where batches are changed.
    """

    def __init__(self, loader: SplitLoader, corruptor: Corruptor, *, seed: int = 0, device: torch.device | str = "cpu") -> None:
        self._loader, self._corruptor, self._seed, self._device = loader, corruptor, seed, device
        self._partners: dict[str, IntArray] = {}
        self._laws: dict[MissingNotAtRandom, tuple[NotAtRandom, ...]] = {}

    def clean(self, portion: Portion = WHOLE) -> Iterator[Batch]:
        """The split as it is."""
        for batch in self._loader.studies(portion):
            yield self._corruptor.normaliser(batch.to(self._device))

    def batches(
        self, operation: AnyOperation, index: int, modality: str | None = None, portion: Portion = WHOLE
    ) -> Iterator[Batch]:
        """The split with one operation at one grid index; index 0 is the split as it is.

        modality: the only one that is hit; None hits all that the operation fits (a modality swapped alone has another partner
        than its neighbours, so all of a sample's come from different subjects).

        Raises:
            SpecError: the grid has no such index, or the release no such modality; how sick somebody is can't be read from codes.
        """
        self._check(operation, index, modality)
        if isinstance(operation, Swap):
            partners = {} if index == 0 else self._swapped(modality)
            return self.clean(replace(portion, partners=partners))
        return (self.change(batch, operation, index, modality) for batch in self.clean(portion))

    def is_possible(self, operation: AnyOperation) -> bool:
        """False for one that asks who is sicker where all have one label."""
        return not isinstance(operation, MissingNotAtRandom) or bool(self._fitted(operation))

    def change(self, batch: Batch, operation: AnyOperation, index: int, modality: str | None = None) -> Batch:
        """A clean batch of the split with one operation at one grid index.

        Raises:
            TypeError: for `Swap`, which happens where samples are read.
            SpecError: the grid has no such index.
            DataError: the operation is not possible.
        """
        if isinstance(operation, MissingNotAtRandom):
            return batch if index == 0 else self._law(operation, index).apply(batch, seed=self._seed)
        return self._corruptor.apply(batch, operation, index, modality=modality, seed=self._seed)

    def _check_score(self, operation: AnyOperation) -> None:
        if not isinstance(operation, MissingNotAtRandom) or operation.score != "ehr":
            return
        if codes := [name for spec in self._loader.release.schema.modalities for name in category_counts(spec)]:
            raise SpecError(
                explain(
                    f"corruption {operation.kind}: score ehr",
                    expected="series and tables of numbers",
                    found=f"categorical {', '.join(codes)}",
                    remedy="A principal axis of codes means nothing: use `score: label`.",
                )
            )

    def _swapped(self, modality: str | None) -> Mapping[str, IntArray]:
        release, split = self._loader.release, self._loader.split
        names = release.schema.names if modality is None else (modality,)
        for name in names:
            if name not in self._partners:
                self._partners[name] = swap_partners(release, split, name, seed=self._seed)
        return {name: self._partners[name] for name in names}

    def _law(self, operation: MissingNotAtRandom, index: int) -> NotAtRandom:
        laws = self._fitted(operation)
        if not laws:
            raise constant_severity(operation.score, self._loader.num_samples)
        return laws[index - 1]

    def _fitted(self, operation: MissingNotAtRandom) -> tuple[NotAtRandom, ...]:
        """The laws of all grid entries but the first, by one pass over the split; none where all have one label."""
        if operation not in self._laws:
            records = [records_only(batch) for batch in self.clean()]
            labels = {label for batch in records for label in label_score(batch).tolist()}
            rates = operation.grid[1:] if operation.score != "label" or len(labels) > 1 else ()
            slope, score = operation.slope, operation.score
            self._laws[operation] = tuple(fit_not_at_random(records, rate=rate, slope=slope, score=score) for rate in rates)
        return self._laws[operation]

    def _check(self, operation: AnyOperation, index: int, modality: str | None) -> None:
        severity(operation, index)
        self._check_score(operation)
        where, names = f"corruption {operation.kind}", self._loader.release.schema.names
        if modality is not None and modality not in names:
            known = ", ".join(names)
            raise SpecError(explain(where, expected=f"one of {known}", found=repr(modality), remedy="Correct the name."))
        if modality is not None and isinstance(operation, MissingNotAtRandom):
            raise SpecError(explain(where, expected="no modality", found=repr(modality), remedy="It acts on all of them at once."))


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

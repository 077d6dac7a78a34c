"""What a worker does with parts of an evaluation: reads their batches, predicts them under their condition, stores them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from draf_dist.data.bad_data import UNLIMITED
from draf_dist.data.corruption import CorruptedSplit, Corruptor, Swap
from draf_dist.data.loader import EVALUATION_PREFETCH, Portion, Reading, SplitLoader
from draf_dist.data.loader_stats import LoaderStats
from draf_dist.errors import DataError, explain
from draf_dist.evaluation.parts import REMOVALS, Found, Part, Setting, read_part, write_part
from draf_dist.evaluation.predict import Predictor
from draf_dist.evaluation.predictions import CLEAN, Applied
from draf_dist.evaluation.robustness import cases_of, kept, removals
from draf_dist.evaluation.subject import Subject, open_subject
from draf_dist.schema.batch import Batch
from draf_dist.schema.release import Split
from draf_dist.storage import open_store
from draf_dist.training.repeatable import repeatable


def predict_parts(parts: tuple[Part, ...]) -> None:
    """Predicts and stores those that are not stored yet.

    Raises:
        DataError: data that can't be used; a model that is not the one that the parts are of.
    """
    for part in parts:
        store = open_store(part.setting.run)
        if read_part(store, part) is None:
            place = part.setting.place
            with repeatable(place.threads, torch.device(place.device)):
                found = _bench(part.setting, part.release).predict(part)
            write_part(store, part, found)


@lru_cache(maxsize=1)
def _bench(setting: Setting, release: str) -> "_Bench":
    """What is opened once, as long as parts of one evaluation and release follow one another."""
    subject = open_subject(setting.run, release)
    if subject.model_sha256 != setting.model_sha256:
        remedy = "Evaluate the run again."
        raise DataError(explain(setting.run, expected="the model as it was at the start", found="another", remedy=remedy))
    subject.exported.model.to(setting.place.device)
    return _Bench(setting, subject)


def forget() -> None:
    """Lets go of what was opened."""
    _bench.cache_clear()


@dataclass
class _Bench:
    """One model on one release, with what parts have in common: open splits, and the clean studies of a sweep's last batches."""

    setting: Setting
    subject: Subject
    _splits: dict[Split, "_OpenSplit"] = field(default_factory=dict)

    def predict(self, part: Part) -> Found:
        """The predictions of a part, in the order of its conditions."""
        opened = self._split(part.split)
        before = opened.loader.stats()
        predictor = Predictor(self.subject.exported.model, self.subject.release.schema, part.passes, self.setting.seed)
        predicted = (predictor.predict_any(batches, part.split, applied) for applied, batches in opened.changed(part))
        predictions = tuple(one for one in predicted if one is not None)
        read = opened.loader.stats() - before
        return Found(predictions, LoaderStats(members=read.members, left_out=read.left_out, lost_samples=read.lost_samples))

    def _split(self, split: Split) -> "_OpenSplit":
        if split not in self._splits:
            setting, subject = self.setting, self.subject
            # How much may be left out is asked of the whole split, where its parts are put together.
            reading = Reading(EVALUATION_PREFETCH, setting.bad_data.model_copy(update={"limit": UNLIMITED}))
            threads = setting.place.decode_threads
            loader = SplitLoader(subject.release, split, setting.batch_size, threads=threads, reading=reading)
            corruptor = Corruptor(subject.job.corruption, subject.normaliser, seed=setting.seed)
            corrupted = CorruptedSplit(loader, corruptor, seed=setting.seed, device=setting.place.device)
            self._splits[split] = _OpenSplit(loader, corrupted)
        return self._splits[split]


@dataclass
class _OpenSplit:
    """A split, and of a sweep the studies that take part and those of the batches that were read last."""

    loader: SplitLoader
    split: CorruptedSplit
    _chosen: dict[int, NDArray[np.bool_]] = field(default_factory=dict)
    _held: tuple[Portion, list[Batch]] | None = None

    def changed(self, part: Part) -> Iterator[tuple[Applied, Iterable[Batch]]]:
        """Every condition of a part with its batches."""
        portion, schema = self._portion(part), self.loader.release.schema
        if part.condition == CLEAN:
            yield Applied(), self.split.clean(portion)
        elif part.condition == REMOVALS:
            for kind, modality, keep in removals(schema):
                yield Applied(kind, 1, modality), kept(self._clean(portion), keep)
        elif not isinstance(part.condition, str) and self.split.is_possible(part.condition):
            for case in cases_of(part.condition, schema):
                if isinstance(case.operation, Swap):
                    yield case.applied, self.split.batches(case.operation, case.index, case.modality, portion)
                else:
                    clean = self._clean(portion)
                    yield case.applied, (self.split.change(batch, case.operation, case.index, case.modality) for batch in clean)

    def _portion(self, part: Part) -> Portion:
        if part.largest_uid is None:
            return Portion(part.steps)
        if part.largest_uid not in self._chosen:
            self._chosen = {part.largest_uid: self.loader.uids() <= part.largest_uid}
        return Portion(part.steps, self._chosen[part.largest_uid])

    def _clean(self, portion: Portion) -> list[Batch]:
        """The clean studies of a sweep's batches, held until others are asked for."""
        held = self._held
        if held is None or held[0].steps != portion.steps or held[0].chosen is not portion.chosen:
            held = self._held = (portion, list(self.split.clean(portion)))
        return held[1]

"""Cox's regression as a row of a benchmark: reads a release as networks do, and predicts hazards of its intervals."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from draf_dist.data.loader import evaluation_batches
from draf_dist.data.normalise import Normaliser
from draf_dist.data.release import Release
from draf_dist.errors import DataError, SpecError, explain
from draf_dist.evaluation.answers import TimeAnswers, answers_of, targets_of
from draf_dist.evaluation.baselines import summarise_series
from draf_dist.evaluation.cox_regression import CoxRegressionConfig, Floats, FollowedUp, best_penalty, breslow, hazards
from draf_dist.evaluation.predictions import Applied, Predictions, concatenate
from draf_dist.schema.batch import Batch, SeriesInput
from draf_dist.schema.categories import batch_as_numbers
from draf_dist.schema.label import SurvivalSpec
from draf_dist.schema.modality import DataSchema, SeriesSpec, TableSpec
from draf_dist.schema.release import Split


def check_cox(config: CoxRegressionConfig, schema: DataSchema) -> None:
    """Refuses what Cox's regression can't read.

    Raises:
        SpecError: the label is not a time; a modality that is not there, or neither a table nor a series.
    """
    if not isinstance(schema.label, SurvivalSpec):
        remedy = "Leave it out, or choose a survival label in the card."
        raise SpecError(explain("baselines: cox_regression", expected="a label of times", found=schema.label.name, remedy=remedy))
    readable = [spec.name for spec in schema.modalities if isinstance(spec, SeriesSpec | TableSpec)]
    for name in config.modalities or schema.names:
        if name not in readable:
            remedy = f"Name some of {', '.join(readable)} in `modalities`."
            raise SpecError(explain("baselines: cox_regression", expected="tables and series", found=name, remedy=remedy))


@dataclass(frozen=True)
class _Fitted:
    """coefficients (P,); baseline: its cumulative hazard by interval, (K,)."""

    coefficients: Floats
    baseline: Floats


class CoxBaseline:
    """What a cell trains; it is fitted when something is to be predicted. What was not observed is the mean of training."""

    steps, best_step = 0, 0

    def __init__(self, config: CoxRegressionConfig, release: Release, batch_size: int) -> None:
        check_cox(config, release.schema)
        self._config, self._batch_size = config, batch_size
        self.release = release
        self.normaliser = Normaliser(release.schema, release.stats)

    def predict(self, batches: Iterable[Batch], split: Split, applied: Applied) -> Predictions:
        """Of normalised batches.

        Raises:
            DataError: there is no study in the batches.
        """
        parts = [self._predict_batch(batch, split, applied) for batch in batches]
        if not parts:
            raise DataError(explain(f"split {split}", expected="at least one study", found="none", remedy="Use fewer folds."))
        return concatenate(parts)

    @cached_property
    def _fitted(self) -> _Fitted:
        label = self.release.schema.label
        assert isinstance(label, SurvivalSpec), "check_cox saw to it"
        train, val = self._read("train"), self._read("val")
        _, coefficients = best_penalty(train, val, self._config.penalties)
        edges = np.array(label.edges, dtype=np.float64)
        return _Fitted(coefficients, breslow(train.features @ coefficients, train.time, train.event, edges))

    def _read(self, split: Split) -> FollowedUp:
        """The studies of a split whose outcome is known."""
        batches = [self.normaliser(batch) for batch in evaluation_batches(self.release, split, self._batch_size)]
        if not batches:
            raise DataError(explain(f"split {split}", expected="at least one study", found="none", remedy="Use fewer folds."))
        known = np.concatenate([targets_of(batch) for batch in batches]) >= 0
        answers = [self._answers(batch) for batch in batches]
        time: Floats = np.concatenate([each.time for each in answers]).astype(np.float64)
        event: NDArray[np.bool_] = np.concatenate([each.event for each in answers])
        return FollowedUp(np.concatenate([self._features(batch) for batch in batches])[known], time[known], event[known])

    def _features(self, batch: Batch) -> Floats:
        numbers = batch_as_numbers(self.release.schema, batch)
        return np.concatenate([_columns(numbers, name) for name in self._config.modalities or batch.modalities], axis=1)

    def _answers(self, batch: Batch) -> TimeAnswers:
        answers = answers_of(batch, self.release.schema.label)
        assert isinstance(answers, TimeAnswers), "check_cox saw to it"
        return answers

    def _predict_batch(self, batch: Batch, split: Split, applied: Applied) -> Predictions:
        """It has one answer and no passes: nothing is epistemic, and weights and uncertainties of modalities do not exist."""
        hazard = hazards(self._features(batch) @ self._fitted.coefficients, self._fitted.baseline)
        variance = (hazard * (1 - hazard)).mean(axis=1).astype(np.float32)
        nothing = np.full(batch.present.shape, np.nan, dtype=np.float32)
        return Predictions(
            modalities=batch.modalities,
            classes=self.release.schema.label.outputs,
            split=split,
            applied=applied,
            uid=batch.uid.numpy(),
            site=np.array(self.release.schema.sites, dtype=np.str_)[batch.site.numpy()],
            target=targets_of(batch),
            probability=hazard.astype(np.float32),
            epistemic=np.zeros(len(hazard), dtype=np.float32),
            aleatoric=variance,
            total=variance,
            present=batch.present.numpy(),
            corrupted=batch.corrupted.numpy(),
            severity=batch.severity.numpy(),
            reliability=nothing,
            corruption_probability=nothing,
            unimodal=nothing,
            uncertainty={},
            answers=self._answers(batch),
        )


def _columns(batch: Batch, name: str) -> Floats:
    """A table as it is, a series as its summaries; 0, the mean of training, where nothing was observed."""
    series = batch.inputs[name]
    assert isinstance(series, SeriesInput), "check_cox saw to it"
    values, observed = series.values.numpy().astype(np.float64), series.observed.numpy()
    found = summarise_series(values, observed) if values.shape[1] > 1 else np.where(observed, values, 0.0)[:, 0]
    return np.nan_to_num(found)

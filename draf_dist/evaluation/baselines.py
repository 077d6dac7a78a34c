"""Baselines without a network: logistic regression and gradient boosting over what the networks see.

They read a release through the same loader and normaliser. A series becomes five numbers a variable: last, mean, least and greatest
observed value, and how many steps were observed.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from draf_dist.config.spec import Spec
from draf_dist.data.corruption import Corruptor, TrainingCorruption
from draf_dist.data.loader import evaluation_batches
from draf_dist.data.normalise import Normaliser
from draf_dist.data.release import Release
from draf_dist.errors import DataError, SpecError, explain
from draf_dist.evaluation.cox_regression import CoxRegressionConfig
from draf_dist.evaluation.predictions import Applied, Predictions
from draf_dist.metrics.calibration import negative_log_likelihood
from draf_dist.schema.batch import Batch, SeriesInput
from draf_dist.schema.categories import batch_as_numbers
from draf_dist.schema.modality import DataSchema
from draf_dist.schema.release import Split

Floats = NDArray[np.float64]
SUMMARIES = ("last", "mean", "min", "max", "count")


# A fitted model of scikit-learn, which has no types: predict_proba takes features (n, P), NaN where not observed, and gives the
# probabilities (n, K') of the classes that training held, in index order.
Classifier = Any


class Corrupted(Spec):
    """The training studies as networks meet them: `copies` times, each anew under the law of their job (as so many epochs)."""

    law: TrainingCorruption
    copies: int = Field(4, ge=1)


class LogisticRegressionConfig(Spec):
    """Medians where not observed and a bit that says so, standardised; of the penalties that with the least validation NLL."""

    kind: Literal["logistic_regression"] = "logistic_regression"
    inverse_penalties: tuple[float, ...] = Field((1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0), min_length=1)
    # Left out of the stored form where it is not set: cells from before there was such a thing keep their names.
    corrupted: Corrupted | None = Field(None, exclude_if=lambda corrupted: corrupted is None)

    @property
    def name(self) -> str:
        """The row of a table."""
        return self.kind

    def fit(self, train: "Examples", val: "Examples") -> Classifier:
        """The model with the penalty that validation chooses; it learns from training alone."""
        fitted = [self._pipeline(c).fit(train.features, train.label) for c in self.inverse_penalties]
        return fitted[least_nll([model.predict_proba(val.features) for model in fitted], train.label, val.label)]

    def _pipeline(self, inverse_penalty: float) -> Pipeline:
        return make_pipeline(
            SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True),
            StandardScaler(),
            LogisticRegression(C=inverse_penalty, max_iter=5000),
        )


class GradientBoostingConfig(Spec):
    """Histogram gradient boosting, which takes missing values as they are; as many trees as give the least validation NLL."""

    kind: Literal["gradient_boosting"] = "gradient_boosting"
    learning_rate: float = Field(0.05, gt=0)
    most_trees: int = Field(300, ge=1)
    max_leaf_nodes: int = Field(15, ge=2)
    min_samples_leaf: int = Field(20, ge=1)
    l2_regularization: float = Field(1.0, ge=0)
    corrupted: Corrupted | None = Field(None, exclude_if=lambda corrupted: corrupted is None)

    @property
    def name(self) -> str:
        """The row of a table."""
        return self.kind

    def fit(self, train: "Examples", val: "Examples") -> Classifier:
        """The model cut after the number of trees that validation chooses; it learns from training alone."""
        # It refuses a column of which training has no value at all.
        observed = np.flatnonzero(~np.isnan(train.features).all(axis=0))
        grown = self._trees(self.most_trees).fit(train.features[:, observed], train.label)
        number = 1 + least_nll(list(grown.staged_predict_proba(val.features[:, observed])), train.label, val.label)
        # Growing is deterministic: fewer trees are the first of the many.
        columns = ColumnTransformer([("observed", "passthrough", observed)])
        return make_pipeline(columns, self._trees(number)).fit(train.features, train.label)

    def _trees(self, number: int) -> HistGradientBoostingClassifier:
        return HistGradientBoostingClassifier(
            learning_rate=self.learning_rate,
            max_iter=number,
            max_leaf_nodes=self.max_leaf_nodes,
            min_samples_leaf=self.min_samples_leaf,
            l2_regularization=self.l2_regularization,
            early_stopping=False,
            random_state=0,
        )


ClassBaseline = LogisticRegressionConfig | GradientBoostingConfig
BaselineConfig = Annotated[ClassBaseline | CoxRegressionConfig, Field(discriminator="kind")]


@dataclass(frozen=True)
class Examples:
    """A split as rows of numbers. features (n, P), NaN where not observed; label (n,), -1 where unknown."""

    features: Floats
    label: NDArray[np.int64]
    uid: NDArray[np.int64]
    site: NDArray[np.str_]
    present: NDArray[np.bool_]

    def labelled(self) -> "Examples":
        """The rows whose label is known."""
        known = self.label >= 0
        return Examples(self.features[known], self.label[known], self.uid[known], self.site[known], self.present[known])


def read_examples(release: Release, split: Split, batch_size: int, corrupted: Corrupted | None = None) -> Examples:
    """A split of a release, normalised by its training statistics; corrupted: as training meets it, several times.

    Raises:
        SpecError: it has images.
        DataError: it holds no study, or files are damaged.
    """
    normaliser = Normaliser(release.schema, release.stats)
    clean = map(normaliser, evaluation_batches(release, split, batch_size))
    batches = clean if corrupted is None else _met_in_training(clean, corrupted, normaliser)
    parts = examples_of(batches, release.schema)
    if len(parts.uid) == 0:
        raise DataError(explain(f"split {split}", expected="at least one study", found="none", remedy="Use fewer folds."))
    return parts


def examples_of(batches: Iterable[Batch], schema: DataSchema) -> Examples:
    """Normalised batches as rows of numbers, end to end; of a code an indicator for every category."""
    parts = [_examples(batch_as_numbers(schema, batch), schema.sites) for batch in batches]
    if not parts:
        nothing = np.zeros(0, dtype=np.int64)
        return Examples(np.zeros((0, 0)), nothing, nothing, np.zeros(0, dtype=np.str_), np.zeros((0, 0), dtype=np.bool_))
    names = ("features", "label", "uid", "site", "present")
    return Examples(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _met_in_training(batches: Iterable[Batch], corrupted: Corrupted, normaliser: Normaliser) -> Iterator[Batch]:
    corruptor = Corruptor(corrupted.law, normaliser, seed=0)
    for batch in batches:
        for epoch in range(corrupted.copies):
            yield corruptor.train(replace(batch, epoch=torch.full_like(batch.epoch, epoch)))


def predict_baseline(model: Classifier, seen: NDArray[np.int64], examples: Examples, release: Release, split: str) -> Predictions:
    """Predictions in the form of those of networks; `seen` are the labels of training, whose classes the model knows.

    It has one answer and no passes: nothing is epistemic, and weights and uncertainties of modalities do not exist.
    """
    classes, modalities = release.schema.classes, release.schema.names
    probability = all_classes(model.predict_proba(examples.features), seen, len(classes))
    variance = probability[:, 1] * (1 - probability[:, 1]) if len(classes) == 2 else 1 - (probability**2).sum(axis=1)
    nothing = np.full((len(probability), len(modalities)), np.nan, dtype=np.float32)
    return Predictions(
        modalities=modalities,
        classes=classes,
        split=split,
        applied=Applied(),
        uid=examples.uid,
        site=examples.site,
        target=examples.label,
        probability=probability.astype(np.float32),
        epistemic=np.zeros(len(probability), dtype=np.float32),
        aleatoric=variance.astype(np.float32),
        total=variance.astype(np.float32),
        present=examples.present,
        corrupted=np.zeros_like(examples.present),
        severity=np.zeros_like(nothing),
        reliability=nothing,
        corruption_probability=nothing,
        unimodal=nothing,
        uncertainty={},
    )


def summarise_series(values: Floats, observed: NDArray[np.bool_]) -> Floats:
    """(n, T, F) to (n, 5 F): last, mean, least, greatest observed value, NaN where there is none, and the number observed."""
    number = observed.sum(axis=1)
    some = number > 0
    steps = np.arange(values.shape[1])[None, :, None]
    latest = np.where(observed, steps, -1).max(axis=1)
    last = np.take_along_axis(values, np.maximum(latest, 0)[:, None, :], axis=1)[:, 0]
    mean = np.where(observed, values, 0.0).sum(axis=1) / np.maximum(number, 1)
    least, greatest = np.where(observed, values, np.inf).min(axis=1), np.where(observed, values, -np.inf).max(axis=1)
    found = [np.where(some, part, np.nan) for part in (last, mean, least, greatest)]
    return np.concatenate([*found, number.astype(np.float64)], axis=1)


def _examples(batch: Batch, sites: tuple[str, ...]) -> Examples:
    columns = [_features(batch, name) for name in batch.modalities]
    label = np.where(batch.classes.observed.numpy(), batch.classes.label.numpy(), -1)
    return Examples(
        features=np.concatenate(columns, axis=1),
        label=label.astype(np.int64),
        uid=batch.uid.numpy(),
        site=np.array(sites, dtype=np.str_)[batch.site.numpy()],
        present=batch.present.numpy(),
    )


def _features(batch: Batch, name: str) -> Floats:
    series = batch.inputs[name]
    if not isinstance(series, SeriesInput):
        remedy = "Leave `baselines` empty for data with images."
        raise SpecError(explain(f"baselines: {name}", expected="tables and series only", found="an image", remedy=remedy))
    values, observed = series.values.numpy().astype(np.float64), series.observed.numpy()
    if values.shape[1] > 1:
        return summarise_series(values, observed)
    return np.where(observed, values, np.nan)[:, 0]


def least_nll(candidates: Sequence[Floats], seen: NDArray[np.int64], label: NDArray[np.int64]) -> int:
    """Which of the probabilities, whose columns are the classes in `seen`, has the least NLL; the first of equals."""
    nll = [negative_log_likelihood(all_classes(each, seen, int(max(seen.max(), label.max())) + 1), label) for each in candidates]
    return int(np.argmin(nll))


def all_classes(probability: Floats, seen: NDArray[np.int64], num_classes: int) -> Floats:
    """Probabilities of the classes in `seen` as those of all classes; one that training did not hold has 0."""
    every = np.zeros((len(probability), num_classes))
    every[:, np.unique(seen)] = probability
    return every

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier

from draf_dist.evaluation.baselines import (
    BaselineConfig,
    Examples,
    GradientBoostingConfig,
    LogisticRegressionConfig,
    all_classes,
    least_nll,
    summarise_series,
)
from draf_dist.metrics.classification import auroc

BASELINES = [LogisticRegressionConfig(), GradientBoostingConfig(most_trees=60)]


def examples(n: int, *, seed: int, missing: float = 0.3, tells_by_absence: bool = False) -> Examples:
    """Two informative features, eight that say nothing."""
    generator = np.random.default_rng(seed)
    label = (generator.random(n) < 0.3).astype(np.int64)
    features = generator.normal(size=(n, 10))
    features[:, :2] += 1.2 * label[:, None]
    features[generator.random(features.shape) < missing] = np.nan
    if tells_by_absence:
        features[:, :2] = generator.normal(size=(n, 2))
        features[generator.random(n) < np.where(label == 1, 0.8, 0.2), 0] = np.nan
    return Examples(features, label, np.arange(n), np.full(n, "a"), np.ones((n, 1), dtype=bool))


@pytest.mark.parametrize("config", BASELINES, ids=lambda config: config.kind)
def test_a_planted_signal_is_found(config: BaselineConfig) -> None:
    model = config.fit(examples(1500, seed=0, missing=0), examples(300, seed=1, missing=0))
    test = examples(2000, seed=2, missing=0)
    # The exact posterior of two normal features 1.2 apart has AUROC Phi(1.2) = .885.
    assert auroc(model.predict_proba(test.features), test.label) > 0.86


@pytest.mark.parametrize("config", BASELINES, ids=lambda config: config.kind)
def test_that_a_value_is_missing_can_be_learned(config: BaselineConfig) -> None:
    train, val, test = (examples(1000, seed=seed, tells_by_absence=True) for seed in range(3))
    # Absence alone tells: .8 against .2, AUROC .8.
    assert auroc(config.fit(train, val).predict_proba(test.features), test.label) > 0.75


@pytest.mark.parametrize("config", BASELINES, ids=lambda config: config.kind)
def test_a_feature_that_is_never_observed_does_no_harm(config: BaselineConfig) -> None:
    train, val = examples(400, seed=0), examples(200, seed=1)
    train.features[:, 5] = np.nan
    assert np.isfinite(config.fit(train, val).predict_proba(val.features)).all()


def test_without_a_signal_validation_keeps_the_model_small() -> None:
    train, val = examples(600, seed=0), examples(300, seed=1)
    noise = np.random.default_rng(9)
    for part in (train, val):
        part.features[:] = noise.normal(size=part.features.shape)
    assert LogisticRegressionConfig().fit(train, val)[-1].C <= 1e-2
    assert GradientBoostingConfig().fit(train, val)[-1].max_iter <= 20


def test_fewer_trees_are_the_first_of_the_many() -> None:
    train, val = examples(500, seed=0), examples(200, seed=1)
    config = GradientBoostingConfig(most_trees=40)
    chosen: HistGradientBoostingClassifier = config.fit(train, val)[-1]
    every = list(config._trees(40).fit(train.features, train.label).staged_predict_proba(val.features))
    assert np.array_equal(chosen.predict_proba(val.features), every[chosen.max_iter - 1])
    assert chosen.max_iter == 1 + least_nll(every, train.label, val.label)


def test_a_series_becomes_last_mean_least_greatest_and_count() -> None:
    values = np.array([[[1.0, 5.0], [3.0, 0.0], [0.0, 0.0]]])
    observed = np.array([[[True, False], [True, False], [False, False]]])
    found = summarise_series(values, observed).reshape(5, 2)
    assert found[:, 0].tolist() == [3, 2, 1, 3, 2]
    assert np.isnan(found[:4, 1]).all()
    assert found[4, 1] == 0


def test_a_class_that_training_did_not_hold_has_no_probability() -> None:
    found = all_classes(np.array([[0.3, 0.7]]), np.array([0, 2, 2]), 3)
    assert found.tolist() == [[0.3, 0, 0.7]]

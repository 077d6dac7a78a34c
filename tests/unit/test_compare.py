"""Corrupted against clean: paired differences, drops in percent of the clean value, and what a swap of rows would break."""

import numpy as np
import pytest
from hand_made_predictions import context, studies

from draf_dist.evaluation.compare import Reference, compare
from draf_dist.evaluation.statistics import estimate_all
from draf_dist.metrics.classification import auroc


def test_no_corruption_costs_exactly_nothing() -> None:
    test, _ = studies(seed=1)
    found = compare(Reference(test, context(None)), test)
    for name in ("auroc_difference", "nll_difference", "auroc_drop_percent"):
        assert (found[name].value, found[name].low, found[name].high) == (0.0, 0.0, 0.0)


def test_the_drop_is_a_share_of_the_clean_value() -> None:
    test, _ = studies(seed=1)
    flat = type(test)(**{**vars(test), "probability": np.full_like(test.probability, 0.5)})
    reference = Reference(test, context(None))
    found, clean = compare(reference, flat), auroc(reference.scored.probability, reference.scored.label)
    assert found["auroc"].value == 0.5
    assert found["auroc_difference"].value == pytest.approx(clean - 0.5)
    assert found["auroc_drop_percent"].value == pytest.approx(100 * (clean - 0.5) / clean)
    assert found["nll_difference"].value < 0


def test_a_paired_difference_is_surer_than_its_two_sides() -> None:
    test, _ = studies(seed=1)
    generator = np.random.default_rng(0)
    p = np.clip(test.probability[:, 1] + generator.normal(0, 0.02, test.num_studies), 0.001, 0.999)
    other = type(test)(**{**vars(test), "probability": np.stack([1 - p, p], axis=1).astype(np.float32)})
    found = compare(Reference(test, context(None, bootstrap=300)), other)
    assert found["auroc_difference"].high - found["auroc_difference"].low < 0.5 * (found["auroc"].high - found["auroc"].low)


def test_fast_intervals_are_those_of_the_plain_bootstrap() -> None:
    test, _ = studies(seed=1)
    made = context(None, bootstrap=60)
    reference = Reference(test, made)
    plain = estimate_all(
        lambda rows: {"auroc": auroc(reference.scored.probability[rows], reference.scored.label[rows])}, made.resamples(test)
    )
    assert reference.estimates()["auroc"].model_dump() == pytest.approx(plain["auroc"].model_dump())


@pytest.mark.parametrize(("n", "says"), [(9, False), (10, True)])
def test_few_studies_have_a_cost_but_no_interval_and_so_no_certain_loss(n: int, says: bool) -> None:
    test, _ = studies(n, seed=5)
    flipped = type(test)(**{**vars(test), "probability": test.probability[:, ::-1]})
    found = compare(Reference(test, context(None)), flipped)
    for name in ("auroc_difference", "nll_difference"):
        assert found[name].value is not None
        assert (found[name].low is not None) == says


def test_other_studies_are_no_pair() -> None:
    test, _ = studies(seed=1)
    with pytest.raises(ValueError, match="same studies"):
        compare(Reference(test, context(None)), test.rows(np.arange(test.num_studies)[::-1].copy()))

import numpy as np
import pytest

from draf_dist.evaluation.multiplicity import bootstrap_p, holm


def test_holm_multiplies_by_how_many_are_left_and_never_falls() -> None:
    # By hand: .01 x 4, then .02 x 3, .03 x 2 = .06 not below the one before, .5 x 1.
    found = holm({"c": 0.03, "a": 0.01, "d": 0.5, "b": 0.02})
    assert list(found) == ["c", "a", "d", "b"]
    assert [found[name] for name in "abcd"] == pytest.approx([0.04, 0.06, 0.06, 0.5])


def test_holm_of_one_is_the_value_itself_and_none_is_above_one() -> None:
    assert holm({"a": 0.2}) == {"a": 0.2}
    assert holm({}) == {}
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_holm_keeps_the_chance_of_any_false_rejection() -> None:
    """Ten true null hypotheses, tested again and again: at level .2 about one family in five has a rejection, not nine in ten."""
    families = np.random.default_rng(0).random((2000, 10))
    falsely = [min(holm(dict(enumerate(family))).values()) < 0.2 for family in families]
    assert np.mean(falsely) == pytest.approx(1 - (1 - 0.02) ** 10, abs=0.03)
    assert np.mean(families.min(axis=1) < 0.2) > 0.85


def test_p_is_the_level_at_which_the_percentile_interval_touches_zero() -> None:
    replicates = np.random.default_rng(1).normal(1.0, 0.6, 999)
    p = bootstrap_p(replicates)
    low = np.quantile(replicates, p / 2)
    assert p == pytest.approx(2 * (replicates <= 0).mean(), abs=0.003)
    assert low == pytest.approx(0, abs=0.05)
    assert bootstrap_p(-replicates) == p


def test_no_p_is_below_what_so_many_resamples_can_show() -> None:
    assert bootstrap_p(np.full(999, 0.1)) == pytest.approx(2 / 1000)
    assert bootstrap_p(np.zeros(99)) == 1.0
    assert bootstrap_p(np.array([np.nan, 1.0])) == 1.0
    assert bootstrap_p(np.full(3, np.nan)) is None

"""Champion and challenger on the same studies: what is harm, what bounds it, and how often the bounds are wrong."""

from dataclasses import replace

import numpy as np
import pytest
from gate_holdouts import of_nll, own_subjects, pair

from draf_dist.continual.comparison import compare
from draf_dist.continual.policy import GatePolicy
from draf_dist.continual.verdict import judge
from draf_dist.evaluation.predictions import Predictions, concatenate

POLICY = GatePolicy(replicates=1000)
SITES = np.array(["north", "south"] * 40)


def normal_harm(n: int, *, mean: float = 0.0, sd: float = 0.2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, sd, n)


def test_a_model_does_itself_no_harm() -> None:
    champion, _ = pair(np.zeros(80), SITES)
    found = compare(champion, champion, own_subjects(champion), POLICY)
    for part in found.slices:
        assert (part.harm, part.lower, part.upper, part.sd) == (0, 0, 0, 0)
        assert (part.negative_flips, part.positive_flips) == (0, 0)
        assert part.champion == part.challenger


def test_harm_is_the_difference_of_mean_nll_overall_and_per_site() -> None:
    harm = normal_harm(80)
    champion, challenger = pair(harm, SITES)
    found = compare(champion, challenger, own_subjects(champion), POLICY)
    assert found.overall.harm == pytest.approx(harm.mean())
    assert [part.site for part in found.sites] == ["north", "south"]
    for part in found.sites:
        assert part.harm == pytest.approx(harm[part.site == SITES].mean())
        assert part.harm == pytest.approx((part.challenger["nll"] or 0) - (part.champion["nll"] or 0))
        assert part.lower < part.harm < part.upper


def test_flips_count_who_alone_is_right() -> None:
    right, wrong = -np.log(0.9), -np.log(0.2)
    champion = of_nll(np.array([right, right, right, wrong]), ["a"] * 4)
    challenger = of_nll(np.array([right, wrong, right, right]), ["a"] * 4)
    found = compare(champion, challenger, own_subjects(champion), POLICY).overall
    assert (found.negative_flips, found.positive_flips) == (0.25, 0.25)


def test_the_order_of_the_studies_plays_no_part() -> None:
    champion, challenger = pair(normal_harm(80), SITES)
    shuffled = np.random.default_rng(1).permutation(80)
    subjects = own_subjects(champion)
    assert compare(champion.rows(shuffled), challenger, subjects, POLICY) == compare(champion, challenger, subjects, POLICY)


def test_seeing_every_study_twice_makes_nothing_surer() -> None:
    champion, challenger = pair(normal_harm(80), SITES)
    once = compare(champion, challenger, own_subjects(champion), POLICY).overall
    twice = [concatenate([side, replace(side, uid=side.uid + 80)]) for side in (champion, challenger)]
    subjects = {uid: uid % 80 for uid in range(160)}
    found = compare(twice[0], twice[1], subjects, POLICY).overall
    assert (found.num_studies, found.num_subjects) == (160, 80)
    assert (found.lower, found.upper, found.sd) == pytest.approx((once.lower, once.upper, once.sd))


def test_sd_of_subjects_is_the_standard_error_of_the_bootstrap() -> None:
    generator = np.random.default_rng(0)
    subject = np.repeat(np.arange(300), generator.integers(1, 5, 300))
    harm = generator.normal(0, 1, 300)[subject] + generator.normal(0.1, 1, len(subject))
    champion, challenger = pair(harm * 0.05, np.full(len(subject), "a"))
    found = compare(champion, challenger, dict(enumerate(subject.tolist())), POLICY).overall
    # One-sided bounds of a normal mean: 1.645 standard errors at 5 %, 1.960 at the 2.5 % that each of two tests has.
    assert found.sd / np.sqrt(300) == pytest.approx((found.upper - found.lower) / (1.645 + 1.960), rel=0.1)
    # What one who takes every study for a subject of its own would find is far too small.
    assert np.std(harm * 0.05) / np.sqrt(len(harm)) < 0.75 * found.sd / np.sqrt(300)


def test_unlabelled_studies_take_no_part() -> None:
    champion, challenger = pair(normal_harm(80), SITES)
    known = np.arange(80) < 70
    sides = [replace(side, target=np.where(known, side.target, -1)) for side in (champion, challenger)]
    found = compare(sides[0], sides[1], own_subjects(champion), POLICY)
    assert found.num_unlabelled == 10
    without = compare(champion.rows(known), challenger.rows(known), own_subjects(champion), POLICY)
    assert found.overall == without.overall


@pytest.mark.parametrize("other", [of_nll(np.ones(79), ["a"] * 79), of_nll(np.ones(80), ["a"] * 80, first_uid=1)])
def test_other_studies_are_no_pair(other: Predictions) -> None:
    champion = of_nll(np.ones(80), ["a"] * 80)
    with pytest.raises(ValueError, match="same studies"):
        compare(champion, other, own_subjects(champion) | own_subjects(other), POLICY)


def test_more_sites_make_naming_one_harder_and_promoting_no_easier() -> None:
    harm = np.tile(normal_harm(200), 4)
    found = []
    for names in (["a", "b"], ["a", "b", "c", "d"]):
        site = np.array(names).repeat(200)
        champion, challenger = pair(harm[: len(site)], site)
        found.append(compare(champion, challenger, own_subjects(champion), POLICY))
    first, second = found
    assert (first.num_tests, second.num_tests) == (3, 5)
    assert second.sites[0].lower < first.sites[0].lower
    assert second.sites[0].upper == first.sites[0].upper


def test_a_site_that_someone_trained_on_is_listed_without_a_study() -> None:
    champion, challenger = pair(normal_harm(80), SITES)
    found = compare(champion, challenger, own_subjects(champion), POLICY, champion_sites={"north"}, trained_sites={"north", "west"})
    assert [(part.site, part.is_new, part.num_subjects) for part in found.sites] == [
        ("north", False, 40),
        ("south", True, 40),
        ("west", True, 0),
    ]
    assert found.num_improvements == 2


def test_wrong_verdicts_are_as_rare_as_the_policy_says() -> None:
    """Three sites exactly at their margin: naming any is wrong, and promoting is wrong; skewed differences, few subjects."""
    policy = GatePolicy(replicates=1000, overall_margin=0.05, site_margin=0.05, require="non_inferior", confidence=0.9)
    site = np.array(["a", "b", "c"]).repeat(40)
    decisions = []
    for trial in range(80):
        skewed = 0.1 * (np.random.default_rng(trial).exponential(1, 120) - 1) + 0.05
        champion, challenger = pair(skewed, site, seed=trial)
        decisions.append(judge(compare(champion, challenger, own_subjects(champion), policy), policy).decision)
    # 10 % each; two standard deviations of 80 trials are 7 %.
    assert decisions.count("refuse") / 80 <= 0.17
    assert decisions.count("promote") / 80 <= 0.17


def test_rare_great_harm_is_seldom_called_small() -> None:
    """One subject in ten pays 1 nat, and the margin is what that makes: to pass the challenger is wrong. Percentiles often do."""
    policy = GatePolicy(replicates=1000, overall_margin=0.1, site_margin=0.1, require="non_inferior")
    passed = passed_by_percentiles = 0
    for trial in range(100):
        generator = np.random.default_rng(trial)
        harm = np.where(generator.random(50) < 0.1, 1.0, 0.0) + generator.normal(0, 0.1, 50)
        champion, challenger = pair(harm, np.full(50, "a"))
        passed += judge(compare(champion, challenger, own_subjects(champion), policy), policy).decision == "promote"
        means = generator.multinomial(50, np.full(50, 1 / 50), 1000) @ harm / 50
        passed_by_percentiles += np.quantile(means, 0.95) <= 0.1
    # 5 %; two standard deviations of 100 trials are 4.4 %.
    assert passed <= 9 < passed_by_percentiles


def test_one_subject_harmed_greatly_among_ties_leaves_harm_unbounded() -> None:
    """A resample without that subject has no spread: it must not count as one that fits."""
    harm = np.zeros(60)
    harm[7] = 2.0
    champion, challenger = pair(harm, np.full(60, "a"))
    found = compare(champion, challenger, own_subjects(champion), POLICY)
    assert found.overall.harm == pytest.approx(2 / 60)
    assert (found.overall.upper, found.overall.upper_shared) == (None, None)
    verdict = judge(found, POLICY.model_copy(update={"require": "non_inferior", "overall_margin": 0.5, "site_margin": 0.5}))
    assert (verdict.decision, verdict.sites) == ("cannot_tell", ("a",))
    # Ten of them: hardly a resample is without one.
    harm[::6] = 2.0
    champion, challenger = pair(harm, np.full(60, "a"))
    bounded = compare(champion, challenger, own_subjects(champion), POLICY).overall
    assert bounded.lower < bounded.harm < bounded.upper < 2


def test_harm_the_same_for_everyone_is_known() -> None:
    champion, challenger = pair(np.full(60, 0.1), np.full(60, "a"))
    found = compare(champion, challenger, own_subjects(champion), POLICY).overall
    assert (found.lower, found.upper) == pytest.approx((0.1, 0.1))


def test_the_level_holds_for_harm_that_the_holdout_shows_and_for_no_other() -> None:
    """Both challengers harm by exactly the margin. Rule of three: what befalls under 3/n of the subjects may befall none of n."""
    policy = GatePolicy(replicates=1000, overall_margin=0.1, site_margin=0.1, require="non_inferior")
    passed = {"everyone a little": 0, "one in fifty by 5 nats": 0}
    for trial in range(100):
        generator = np.random.default_rng(trial)
        noise = generator.normal(0, 0.1, 50)
        rare = np.where(generator.random(50) < 0.02, 5.0, 0.0)
        for name, harm in zip(passed, (0.1 + noise, rare + noise), strict=True):
            champion, challenger = pair(harm, np.full(50, "a"))
            passed[name] += judge(compare(champion, challenger, own_subjects(champion), policy), policy).decision == "promote"
    assert passed["everyone a little"] <= 9
    # 0.98^50 = 36 % of such samples have nobody harmed in them; two standard deviations of 100 trials are 9.6 %.
    assert passed["one in fifty by 5 nats"] == pytest.approx(36, abs=10)

"""The decision of a gate, from comparisons made by hand; and that the number of subjects it asks for is enough."""

import json
import re

import numpy as np
import pytest
from gate_holdouts import own_subjects, pair

from draf_dist.config.spec import load_spec
from draf_dist.continual.comparison import Comparison, Slice, compare
from draf_dist.continual.gate_report import forest, render, write_verdict
from draf_dist.continual.policy import GatePolicy, load_policy
from draf_dist.continual.power import subjects_needed
from draf_dist.continual.verdict import AS_SEEN, NO_DIFFERENCE, Lineage, Side, Verdict, judge
from draf_dist.errors import SpecError
from draf_dist.storage import open_store

POLICY = GatePolicy()
SIDE = Side(run="run", weights_sha256="0" * 64, job_sha256="0" * 64, release="r@0", temperature=1.0)
LINEAGE = Lineage(champion=SIDE, challenger=SIDE, holdout="h@0", split="test")
BE_NO_WORSE = GatePolicy(require="non_inferior")


def part(site: str | None, harm: float, *, error: float = 0.004, subjects: int = 400, is_new: bool = False) -> Slice:
    """A slice whose bounds are two standard errors from harm."""
    return Slice(
        site=site,
        is_new=is_new,
        num_studies=subjects,
        num_subjects=subjects,
        margin=POLICY.overall_margin if site is None else POLICY.site_margin,
        harm=harm,
        lower=harm - 2 * error,
        upper=harm + 2 * error,
        upper_shared=harm + 3 * error,
        sd=error * subjects**0.5,
    )


def comparison(*slices: Slice) -> Comparison:
    return Comparison(num_unlabelled=0, num_tests=len(slices), num_improvements=1, overall=slices[0], sites=slices[1:])


def test_a_harmed_site_is_refused_and_named() -> None:
    verdict = judge(comparison(part(None, -0.1), part("north", -0.2), part("south", 0.09)), POLICY)
    assert (verdict.decision, verdict.sites) == ("refuse", ("south",))
    assert any("south" in reason and "worse by at least 0.0820" in reason for reason in verdict.reasons)


def test_harm_overall_is_refused_though_no_site_alone_shows_it() -> None:
    verdict = judge(comparison(part(None, 0.04), part("north", 0.04), part("south", 0.04)), POLICY)
    assert (verdict.decision, verdict.sites) == ("refuse", ())


def test_better_everywhere_is_promoted() -> None:
    verdict = judge(comparison(part(None, -0.05), part("north", -0.05), part("south", -0.05)), POLICY)
    assert (verdict.decision, verdict.sites, verdict.subjects_needed, verdict.improvement) == ("promote", (), None, "overall")
    assert [finding.state for finding in verdict.findings] == ["non_inferior"] * 3


def test_too_few_subjects_decide_nothing_whatever_they_show() -> None:
    for harm in (-1.0, 1.0):
        verdict = judge(comparison(part(None, -0.1), part("south", harm, subjects=POLICY.min_subjects - 1)), POLICY)
        assert (verdict.decision, verdict.sites) == ("cannot_tell", ("south",))
        assert verdict.subjects_needed >= POLICY.min_subjects


def test_an_open_site_states_how_many_subjects_it_has_and_needs() -> None:
    open_site = part("south", 0.03, error=0.05, subjects=100)
    verdict = judge(comparison(part(None, -0.1), open_site), POLICY)
    # ((z_.95 + z_.80) sd / margin)^2 with sd = .05 * sqrt(100).
    assert verdict.subjects_needed == int(np.ceil(((1.6448536 + 0.8416212) * 0.5 / 0.05) ** 2)) == 619
    found = verdict.findings[1]
    assert (verdict.decision, found.present, found.needed, found.assumption) == ("cannot_tell", 100, 619, NO_DIFFERENCE)
    assert any("100 subjects" in reason and "619 at site south would do" in reason for reason in verdict.reasons)


@pytest.mark.parametrize("harm", [0.03, 0.07])
def test_where_that_many_are_there_the_harm_seen_is_taken_as_true(harm: float) -> None:
    verdict = judge(comparison(part(None, -0.1), part("south", harm, error=0.015)), POLICY)
    found = verdict.findings[1]
    assert (verdict.decision, found.assumption) == ("cannot_tell", AS_SEEN)
    assert subjects_needed(0.015 * 20, 0.05, alpha=0.05, power=0.8) < found.present < found.needed


def test_harm_equal_to_the_margin_has_no_number() -> None:
    verdict = judge(comparison(part(None, -0.1), part("south", 0.05, error=0.015)), POLICY)
    assert (verdict.decision, verdict.sites, verdict.subjects_needed) == ("cannot_tell", ("south",), None)


def test_the_open_slice_that_needs_most_gives_the_number_overall_included() -> None:
    slices = (
        part(None, 0.0199, error=0.005),
        part("north", 0.03, error=0.05, subjects=100),
        part("south", 0.03, error=0.1, subjects=100),
    )
    verdict = judge(comparison(*slices), POLICY)
    assert verdict.sites == ("north", "south")
    # Overall is open as well, and needs far more: the harm seen is almost the margin.
    assert verdict.subjects_needed == verdict.findings[0].needed > verdict.findings[2].needed > verdict.findings[1].needed
    assert verdict.needed == f"{verdict.subjects_needed} in all"
    assert f"{verdict.subjects_needed} in all would do" in verdict.reasons[0]
    assert verdict.needed in render(verdict.model_copy(update={"lineage": LINEAGE}))
    without = judge(comparison(part(None, 0.0), *slices[1:]), POLICY)
    assert without.needed == f"{verdict.findings[2].needed} at site south"


def test_sites_that_the_policy_does_not_demand_may_stay_open_but_not_be_harmed() -> None:
    policy = POLICY.model_copy(update={"sites": ("north",)})
    few = part("south", 0.0, subjects=12)
    assert judge(comparison(part(None, -0.1), part("north", 0.0), few), policy).decision == "promote"
    refused = judge(comparison(part(None, -0.1), part("north", 0.0), part("south", 0.2)), policy)
    assert (refused.decision, refused.sites) == ("refuse", ("south",))


def test_a_policy_that_names_an_unknown_site_is_refused() -> None:
    policy = POLICY.model_copy(update={"sites": ("nroth",)})
    with pytest.raises(SpecError, match="nroth"):
        judge(comparison(part(None, -0.1), part("north", 0.0)), policy)


def test_being_no_worse_is_enough_only_where_the_policy_says_so() -> None:
    same = comparison(part(None, 0.0), part("north", 0.0))
    assert judge(same, BE_NO_WORSE).decision == "promote"
    verdict = judge(same, POLICY)
    assert (verdict.decision, verdict.sites, verdict.subjects_needed) == ("cannot_tell", (), None)
    assert "No improvement" in verdict.reasons[-1]


def test_an_improvement_too_small_to_show_has_a_number() -> None:
    verdict = judge(comparison(part(None, -0.004), part("north", -0.004)), POLICY)
    assert (verdict.decision, verdict.sites) == ("cannot_tell", ())
    assert verdict.subjects_needed == subjects_needed(0.004 * 20, 0.004, alpha=0.05, power=0.8)


def test_a_gain_at_a_new_site_with_too_few_subjects_is_seen_and_has_a_number() -> None:
    few = part("west", -0.3, error=0.1, subjects=12, is_new=True)
    verdict = judge(comparison(part(None, 0.0), few), POLICY.model_copy(update={"sites": ()}))
    # The level is shared with overall: alpha / 2; at least min_subjects.
    number = subjects_needed(0.1 * 12**0.5, 0.3, alpha=0.025, power=0.8)
    assert (verdict.decision, verdict.needed) == ("cannot_tell", f"{max(number, POLICY.min_subjects)} at site west")
    assert "none was seen" not in verdict.reasons[-1]
    assert verdict.needed in verdict.reasons[-1]
    nothing = judge(comparison(part(None, 0.0), part("west", 0.01, subjects=12, is_new=True)), POLICY)
    assert "none was seen" in nothing.reasons[-1]


def test_a_site_new_since_the_champion_may_show_the_improvement() -> None:
    def verdict(*, is_new: bool) -> Verdict:
        return judge(comparison(part(None, 0.0), part("north", 0.0), part("west", -0.3, is_new=is_new)), POLICY)

    assert (verdict(is_new=True).decision, verdict(is_new=True).improvement) == ("promote", "west")
    assert verdict(is_new=False).decision == "cannot_tell"


def test_an_improvement_is_held_to_the_shared_level() -> None:
    barely = part(None, -0.010)
    assert barely.upper < 0 < barely.upper_shared
    assert judge(comparison(barely), POLICY).decision == "cannot_tell"


def test_a_site_without_a_holdout_subject_can_not_be_judged() -> None:
    empty = Slice(site="west", is_new=True, num_studies=0, num_subjects=0, margin=0.05)
    verdict = judge(comparison(part(None, -0.1), empty), POLICY)
    assert (verdict.decision, verdict.sites, verdict.subjects_needed) == ("cannot_tell", ("west",), POLICY.min_subjects)


def test_the_number_of_subjects_asked_for_decides_with_the_power_stated() -> None:
    """Fifteen subjects ask for a number; holdouts of that size, drawn from the same kind of harmless subjects, are promoted."""
    policy = GatePolicy(require="non_inferior", overall_margin=0.05, site_margin=0.05, replicates=1000)

    def decision(num_subjects: int, seed: int) -> Verdict:
        harm = np.random.default_rng(seed).normal(0, 0.2, num_subjects)
        champion, challenger = pair(harm, np.full(num_subjects, "south"), seed=seed)
        return judge(compare(champion, challenger, own_subjects(champion), policy), policy)

    fifteen = decision(15, seed=7)
    assert (fifteen.decision, fifteen.sites) == ("cannot_tell", ("south",))
    # The number follows from the spread among fifteen; what it promises, it promises for that spread.
    spread = fifteen.comparison.sites[0].sd
    needed = fifteen.subjects_needed
    assert needed == subjects_needed(spread, 0.05, alpha=0.05, power=0.8)
    exact = subjects_needed(0.2, 0.05, alpha=0.05, power=0.8)
    promoted = {n: np.mean([decision(n, seed).decision == "promote" for seed in range(80)]) for n in (exact, exact // 2)}
    # 80 %; two standard deviations of 80 trials are 9 %. With half the subjects the formula's own power is 54 %.
    assert promoted[exact] == pytest.approx(0.8, abs=0.09)
    assert promoted[exact // 2] == pytest.approx(0.54, abs=0.11)


def test_a_verdict_survives_its_json() -> None:
    verdict = judge(comparison(part(None, 0.04), part("north", 0.03, error=0.05)), POLICY)
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict


def test_the_example_policy_is_the_default_and_mistakes_are_told_together(tmp_path) -> None:
    assert load_policy("jobs/gate_default.yaml") == POLICY
    (tmp_path / "gate.yaml").write_text("kind: gate\nsite_margin: -1\nconfidence: 2\noveral_margin: 0.1\n")
    with pytest.raises(SpecError) as told:
        load_spec(tmp_path / "gate.yaml", GatePolicy)
    assert len(str(told.value).splitlines()) == 3
    assert "overall_margin" in str(told.value)


def test_the_page_says_the_verdict_and_escapes_what_comes_from_data(tmp_path) -> None:
    verdict = judge(comparison(part(None, -0.1), part("<script>x</script>", 0.2), part("few", 0.0, subjects=3)), POLICY)
    write_verdict(open_store(str(tmp_path)), verdict)
    page = (tmp_path / "gate.html").read_text()
    assert page == render(verdict)
    assert "Refuse: harm at &lt;script&gt;" in page
    assert "<script" not in page
    assert not re.search(r"https?://", page)
    assert Verdict.model_validate(json.loads((tmp_path / "verdict.json").read_text())) == verdict


def test_a_slice_that_nothing_bounds_is_open_but_may_be_harmed() -> None:
    unbounded = part("south", 0.03).model_copy(update={"upper": None, "upper_shared": None})
    verdict = judge(comparison(part(None, -0.1), unbounded), POLICY)
    assert (verdict.decision, verdict.sites) == ("cannot_tell", ("south",))
    assert "nothing bounds the harm" in verdict.reasons[1]
    drawn = forest(list(zip(verdict.comparison.slices, verdict.findings, strict=True)))
    assert drawn.bars[1].high == drawn.right
    assert judge(comparison(part(None, -0.1), unbounded.model_copy(update={"lower": 0.06})), POLICY).decision == "refuse"


def test_every_bound_is_drawn_inside_the_plot() -> None:
    verdict = judge(comparison(part(None, -0.4), part("a", 0.9, error=0.1), part("b", 0.0, error=0.3)), POLICY)
    drawn = forest(list(zip(verdict.comparison.slices, verdict.findings, strict=True)))
    for bar in drawn.bars:
        assert drawn.left <= bar.low < bar.x < bar.high <= drawn.right
        assert drawn.left <= bar.margin <= drawn.right
    assert drawn.bars[0].x < drawn.zero < drawn.bars[1].x

"""From a comparison to a verdict: promote, refuse, or cannot tell. Pure, so that every decision is tested without a model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from draf_dist.config.spec import fingerprint
from draf_dist.continual.comparison import Comparison, Slice
from draf_dist.continual.policy import GatePolicy
from draf_dist.continual.power import subjects_needed
from draf_dist.errors import SpecError, explain
from draf_dist.schema.record import Record

Decision = Literal["promote", "refuse", "cannot_tell"]
State = Literal["harmed", "non_inferior", "open"]
NO_DIFFERENCE, AS_SEEN = "no true difference", "a true difference as large as the one seen"


class Finding(Record):
    """What is known of one slice (site None: all studies).

    needed: holdout subjects with whom it would be decided with the policy's power, if `assumption` holds; null where it is
    decided, or where no number would do. demanded: promotion needs it to be non-inferior.
    """

    site: str | None
    state: State
    demanded: bool
    present: int
    needed: int | None = None
    assumption: str = ""


class Side(Record):
    """One of the two models. run: the name of its folder. release: what it was trained on, pinned."""

    run: str
    weights_sha256: str
    job_sha256: str
    release: str
    temperature: float


class Lineage(Record):
    """What was compared on what. holdout: URL@version."""

    champion: Side
    challenger: Side
    holdout: str
    split: str


class Verdict(Record):
    """decision, and what it rests on.

    sites: those harmed if refused, those still open if it cannot tell. subjects_needed: holdout subjects of the slice that needs
    most, of all slices open and the one nearest to a required improvement; null where an open slice can't be settled by any number.
    needed_at: that slice, "overall" or a site; "" without a number. reasons: sentences for people. improvement: the slice that
    shows one, "overall" or a new site; "" where none does.
    """

    decision: Decision
    sites: tuple[str, ...]
    subjects_needed: int | None
    reasons: tuple[str, ...]
    improvement: str
    needed_at: str = ""
    findings: tuple[Finding, ...]
    comparison: Comparison
    policy: GatePolicy
    lineage: Lineage | None = None

    @property
    def policy_fingerprint(self) -> str:
        """Eight hex digits that tell policies apart."""
        return fingerprint(self.policy)[:8]

    @property
    def needed(self) -> str:
        """The number of subjects with where they are needed: "619 at site south", "1200 in all"; "" without a number."""
        return "" if self.subjects_needed is None else counted(self.subjects_needed, self.needed_at)


@dataclass(frozen=True)
class _Need:
    """So many holdout subjects of one slice."""

    number: int
    site: str | None


def judge(comparison: Comparison, policy: GatePolicy) -> Verdict:
    """The verdict of a policy.

    Refuse: a slice with enough subjects is harmed (lower bound above its margin). Promote: every slice demanded is non-inferior
    (upper bound at most its margin; an intersection-union test, so no level is shared: Berger, Technometrics 1982) and, if the
    policy requires it, overall or a site that is new since the champion is improved (shared upper bound below 0). Cannot tell:
    otherwise.

    Raises:
        SpecError: the policy names a site that is not there.
    """
    _check_sites(comparison, policy)
    findings = [_find(part, comparison, policy) for part in comparison.slices]
    improvement = _improvement(comparison, policy)
    decision, named = _decide(findings, policy, improvement)
    reasons = [_sentence(part, finding, comparison, policy) for part, finding in zip(comparison.slices, findings, strict=True)]
    lacking = None
    if policy.require == "improvement" and decision != "refuse" and not improvement:
        lacking = _subjects_for_improvement(comparison, policy)
    most = _most_needed(named, lacking)
    return Verdict(
        decision=decision,
        sites=tuple(finding.site for finding in named if finding.site is not None),
        subjects_needed=None if most is None else most.number,
        needed_at="" if most is None else name_of(most.site),
        reasons=(*reasons, *([] if decision == "refuse" else _improvement_sentences(policy, improvement, lacking))),
        improvement=improvement,
        findings=tuple(findings),
        comparison=comparison,
        policy=policy,
    )


def name_of(site: str | None) -> str:
    """A slice, in words."""
    return "overall" if site is None else site


def counted(number: int, slice_name: str) -> str:
    """So many subjects, and where: all of the holdout, or of one site."""
    return f"{number} in all" if slice_name == name_of(None) else f"{number} at site {slice_name}"


def _check_sites(comparison: Comparison, policy: GatePolicy) -> None:
    known = [part.site for part in comparison.sites if part.site is not None]
    if strange := sorted(set(policy.sites or ()) - set(known)):
        found = f"{', '.join(strange)} as well"
        remedy = "Correct the names, or leave sites out for every site."
        raise SpecError(explain("policy: sites", expected=f"some of {', '.join(known)}", found=found, remedy=remedy))


def _decide(findings: Sequence[Finding], policy: GatePolicy, improvement: str) -> tuple[Decision, list[Finding]]:
    """The decision and the slices that it rests on."""
    if harmed := [finding for finding in findings if finding.state == "harmed"]:
        return "refuse", harmed
    if still_open := [finding for finding in findings if finding.state == "open" and finding.demanded]:
        return "cannot_tell", still_open
    return ("promote" if improvement or policy.require == "non_inferior" else "cannot_tell"), []


def _most_needed(named: Iterable[Finding], lacking: _Need | None) -> _Need | None:
    """The largest of all numbers; None where one of the slices can't be settled by any."""
    still_open = [finding for finding in named if finding.state == "open"]
    if any(finding.needed is None for finding in still_open):
        return None
    needs = [_Need(finding.needed, finding.site) for finding in still_open if finding.needed is not None]
    return max([*needs, *([] if lacking is None else [lacking])], key=lambda need: need.number, default=None)


def _find(part: Slice, comparison: Comparison, policy: GatePolicy) -> Finding:
    state = _state(part, policy)
    demanded = part.site is None or policy.sites is None or part.site in policy.sites
    found = Finding(site=part.site, state=state, demanded=demanded, present=part.num_subjects)
    if state != "open":
        return found
    needed, assumption = _subjects_to_decide(part, comparison, policy)
    return found.model_copy(update={"needed": needed, "assumption": assumption})


def _state(part: Slice, policy: GatePolicy) -> State:
    if part.num_subjects < policy.min_subjects:
        return "open"
    if part.lower is not None and part.lower > part.margin:
        return "harmed"
    return "non_inferior" if part.upper is not None and part.upper <= part.margin else "open"


def _subjects_to_decide(part: Slice, comparison: Comparison, policy: GatePolicy) -> tuple[int | None, str]:
    """Subjects to show that there is no harm, if there is none; if as many are here already, to decide about the harm seen."""
    if part.sd is None or part.harm is None:
        return policy.min_subjects, NO_DIFFERENCE
    quiet = subjects_needed(part.sd, part.margin, alpha=policy.alpha, power=policy.power)
    quiet = None if quiet is None else max(quiet, policy.min_subjects)
    if quiet is None or quiet > part.num_subjects:
        return quiet, NO_DIFFERENCE
    # Harm above the margin is to be shown at the shared level, harm below it to be excluded at the whole one.
    alpha = policy.alpha / comparison.num_tests if part.harm > part.margin else policy.alpha
    loud = subjects_needed(part.sd, abs(part.margin - part.harm), alpha=alpha, power=policy.power)
    return None if loud is None else max(loud, part.num_subjects + 1), AS_SEEN


def _candidates(comparison: Comparison) -> Iterable[Slice]:
    """The slices that may show an improvement once they have enough subjects."""
    return (part for part in comparison.slices if part.site is None or part.is_new)


def _improvement(comparison: Comparison, policy: GatePolicy) -> str:
    enough = (part for part in _candidates(comparison) if part.num_subjects >= policy.min_subjects)
    shown = [part for part in enough if part.upper_shared is not None and part.upper_shared < 0]
    return name_of(shown[0].site) if shown else ""


def _subjects_for_improvement(comparison: Comparison, policy: GatePolicy) -> _Need | None:
    """Subjects in the slice nearest to it, if what was seen is true; None where no slice got better."""
    better = [part for part in _candidates(comparison) if part.harm is not None and part.harm < 0]
    numbers = ((part.site, _subjects_to_improve(part, comparison, policy)) for part in better)
    return min((_Need(number, site) for site, number in numbers if number is not None), key=lambda need: need.number, default=None)


def _subjects_to_improve(part: Slice, comparison: Comparison, policy: GatePolicy) -> int | None:
    is_judged = part.num_subjects >= policy.min_subjects
    # A slice that has too few subjects as yet will share the level with the others once it has enough.
    alpha = policy.alpha / (comparison.num_improvements + (0 if is_judged else 1))
    number = subjects_needed(part.sd or 0.0, -(part.harm or 0.0), alpha=alpha, power=policy.power)
    return None if number is None else max(number, policy.min_subjects if not is_judged else part.num_subjects + 1)


def _sentence(part: Slice, finding: Finding, comparison: Comparison, policy: GatePolicy) -> str:
    where, percent = name_of(part.site), f"{100 * policy.confidence:g} %"
    if part.harm is None:
        return (
            f"{where}: no holdout subject; {counted(finding.needed or policy.min_subjects, where)} would be the least to judge by."
        )
    what = f"{where}: NLL {part.harm:+.4f} nats on {part.num_subjects} subjects"
    if finding.state == "harmed":
        shared = f"{percent} over {comparison.num_tests} tests together" if comparison.num_tests > 1 else percent
        return f"{what}: worse by at least {part.lower:.4f} ({shared}), more than the margin of {part.margin:g}."
    if finding.state == "non_inferior" and part.upper is not None and part.upper < 0:
        return f"{what}: better by at least {-part.upper:.4f} ({percent})."
    if finding.state == "non_inferior":
        return f"{what}: worse by at most {part.upper:.4f} ({percent}), within the margin of {part.margin:g}."
    why = f"fewer than {policy.min_subjects} decide nothing" if part.num_subjects < policy.min_subjects else "not decided"
    if part.upper is None:
        why += ", and so few subjects differ that nothing bounds the harm"
    if finding.needed is None:
        return f"{what}: {why}; the harm seen is as large as the margin, so that no number of subjects is likely to settle it."
    return f"{what}: {why}; {counted(finding.needed, where)} would do with power {policy.power:g}, assuming {finding.assumption}."


def _improvement_sentences(policy: GatePolicy, improvement: str, lacking: _Need | None) -> tuple[str, ...]:
    if policy.require == "non_inferior":
        return ()
    if improvement:
        return (f"Improvement is shown: {improvement}.",)
    if lacking is None:
        return ("No improvement is shown, overall or at a new site, and none was seen: more subjects are not likely to show one.",)
    needed = counted(lacking.number, name_of(lacking.site))
    return (f"No improvement is shown; subjects needed: {needed}, with power {policy.power:g}, assuming {AS_SEEN}.",)

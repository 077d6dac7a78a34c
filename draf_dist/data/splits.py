"""Which split a subject belongs to, for ever.

A subject is one key over all sites and studies, so a connected component (everything that must stay together) is all studies of
one subject key, at whichever sites they lie. Its stratum is one (site, label), because a component can be counted in one only: the
first of its sites in alphabetical order, and the highest class index among its studies (in a binary task: whether the outcome ever
occurred). Strata too small for the shares to come out even are counted together, by label.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from draf_dist.errors import DataError, explain
from draf_dist.schema.release import Split

# Twentieths: 70 % / 15 % / 15 %, in the order in which ties are settled.
SHARES: dict[Split, int] = {"train": 14, "val": 3, "test": 3}
Stratum = tuple[str, int]
# A stratum with fewer components shares its counts: the first of every stratum trains, so many hospitals with one death each would
# leave none to validate and test on. After so many the shares come out even.
SMALLEST_STRATUM = sum(SHARES.values())


@dataclass(frozen=True)
class StudyRow:
    """What the rule needs of a study: the pseudonym of its subject, its site, its class index."""

    subject: str
    site: str
    label: int


class SplitRule(Protocol):
    """How `prepare` divides subjects; `assign_splits` is the rule of all releases but those of a benchmark's folds."""

    def __call__(
        self, studies: Iterable[StudyRow], *, held_out_sites: frozenset[str], assigned: Mapping[str, Split] | None = None
    ) -> dict[str, Split]:
        """Component -> split; assigned is what an earlier release at the same URL decided."""
        ...


def component_of(subject: str) -> str:
    """The component of a subject: its own key, which already links its sites."""
    return subject


def strata(studies: Iterable[StudyRow]) -> dict[str, Stratum]:
    """The (site, label) in which each component is counted."""
    found: dict[str, Stratum] = {}
    for study in studies:
        component = component_of(study.subject)
        site, label = found.get(component, (study.site, study.label))
        found[component] = (min(site, study.site), max(label, study.label))
    return found


def pooled(found: Mapping[str, Stratum]) -> dict[str, Stratum]:
    """The same, but for strata of fewer than SMALLEST_STRATUM components: all of these with one label are one, of no site."""
    sizes = Counter(found.values())
    return {name: stratum if sizes[stratum] >= SMALLEST_STRATUM else ("", stratum[1]) for name, stratum in found.items()}


def assign_splits(
    studies: Iterable[StudyRow], *, held_out_sites: frozenset[str], assigned: Mapping[str, Split] | None = None
) -> dict[str, Split]:
    """Component -> split.

    A component that touches a held-out site is `ood`. The others are taken in keyed-hash order (a pseudonym is one) within each
    stratum, small ones pooled, and each goes to the split furthest below its share of 70/15/15. `assigned` holds what an earlier
    release decided: it stays, and counts.

    Raises:
        DataError: a component that an earlier release put into train, val or test now touches a held-out site, or the reverse.
    """
    studies, earlier = list(studies), assigned or {}
    held_out = {component_of(study.subject) for study in studies if study.site in held_out_sites}
    splits: dict[str, Split] = {}
    counts: dict[Stratum, Counter[Split]] = defaultdict(Counter)
    new: list[tuple[str, Stratum]] = []
    num_moved = 0
    found = strata(studies)
    counted = pooled({component: stratum for component, stratum in found.items() if component not in held_out})
    for component in sorted(found):
        if component in earlier:
            splits[component] = earlier[component]
            num_moved += (earlier[component] == "ood") != (component in held_out)
        elif component in held_out:
            splits[component] = "ood"
        else:
            new.append((component, counted[component]))
    for component, stratum in counted.items():
        if component in earlier:
            counts[stratum][earlier[component]] += 1
    _refuse_moves(num_moved, held_out_sites)
    for component, stratum in new:
        splits[component] = furthest_below(counts[stratum])
        counts[stratum][splits[component]] += 1
    return splits


def furthest_below(counts: Mapping[Split, int]) -> Split:
    """The split that is furthest below its share once one more component is counted; ties go to the first.

    From empty counts this keeps every split within one component of its share at all times.
    """
    total = 1 + sum(counts.get(split, 0) for split in SHARES)
    # Integers: a float could settle a tie differently on another machine.
    return max(SHARES, key=lambda split: SHARES[split] * total - sum(SHARES.values()) * counts.get(split, 0))


def _refuse_moves(num_moved: int, held_out_sites: frozenset[str]) -> None:
    if num_moved:
        raise DataError(
            explain(
                f"held-out sites {', '.join(sorted(held_out_sites)) or '(none)'}",
                expected="every subject to stay in the split that an earlier release gave it",
                found=f"{num_moved} subjects that would move between ood and the other splits",
                remedy="Prepare to a new URL, or leave the held-out sites as they were.",
            )
        )

from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draf_dist.data.splits import SHARES, StudyRow, assign_splits, furthest_below, pooled, strata
from draf_dist.errors import DataError

ROWS = st.lists(
    st.builds(
        StudyRow, st.integers(0, 400).map(lambda i: f"{i * 2654435761 % 2**32:08x}"), st.sampled_from("abcd"), st.integers(0, 2)
    ),
    max_size=300,
)


def off_target(counts: dict[str, int]) -> float:
    total = sum(counts.values())
    return max(abs(counts.get(split, 0) - total * share / 20) for split, share in SHARES.items())


@given(ROWS)
@settings(max_examples=60, deadline=None)
def test_every_stratum_small_ones_together_is_within_one_subject_of_its_target(rows: list[StudyRow]) -> None:
    splits = assign_splits(rows, held_out_sites=frozenset())
    by_stratum: dict[tuple[str, int], Counter[str]] = {}
    for component, stratum in pooled(strata(rows)).items():
        by_stratum.setdefault(stratum, Counter())[splits[component]] += 1
    assert all(off_target(counts) < 1 for counts in by_stratum.values())


def test_a_death_in_each_of_many_hospitals_reaches_validation_and_test() -> None:
    rows = [
        StudyRow(f"{hospital:03d}{patient:02d}", str(hospital), int(patient == 0))
        for hospital in range(40)
        for patient in range(10)
    ]
    splits = assign_splits(rows, held_out_sites=frozenset())
    deaths, all_of_them = (Counter(splits[row.subject] for row in rows if row.label >= least) for least in (1, 0))
    assert deaths == {"train": 28, "val": 6, "test": 6}
    assert all_of_them == {"train": 280, "val": 60, "test": 60}


@given(ROWS)
@settings(max_examples=60, deadline=None)
def test_a_subject_seen_at_a_held_out_site_is_wholly_ood_and_no_other_is(rows: list[StudyRow]) -> None:
    splits = assign_splits(rows, held_out_sites=frozenset("d"))
    touching = {row.subject for row in rows if row.site == "d"}
    assert set(splits) == {row.subject for row in rows}
    assert {subject for subject, split in splits.items() if split == "ood"} == touching


@given(ROWS, st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_the_order_of_the_studies_does_not_matter(rows: list[StudyRow], random: object) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert assign_splits(rows, held_out_sites=frozenset("d")) == assign_splits(shuffled, held_out_sites=frozenset("d"))


@given(ROWS, ROWS)
@settings(max_examples=30, deadline=None)
def test_a_later_delivery_moves_nobody(first: list[StudyRow], second: list[StudyRow]) -> None:
    held_out = frozenset("d")
    touching = {row.subject for row in first + second if row.site == "d"}
    first = [row for row in first if row.subject not in touching]
    earlier = assign_splits(first, held_out_sites=held_out)
    later = assign_splits(first + second, held_out_sites=held_out, assigned=earlier)
    assert all(later[subject] == split for subject, split in earlier.items())


def test_a_later_delivery_fills_the_split_that_is_behind() -> None:
    first = [StudyRow(f"{i:04x}", "a", 0) for i in range(3)]
    earlier = dict.fromkeys(("0000", "0001", "0002"), "train")
    later = assign_splits(
        [*first, StudyRow("0003", "a", 0), StudyRow("0004", "a", 0)], held_out_sites=frozenset(), assigned=earlier
    )
    assert (later["0003"], later["0004"]) == ("val", "test")


def test_shares_hold_at_every_length_up_to_three_periods() -> None:
    counts: Counter[str] = Counter()
    for _ in range(60):
        counts[furthest_below(counts)] += 1
        assert off_target(counts) < 1
    assert counts == {"train": 42, "val": 9, "test": 9}


def test_a_single_subject_trains() -> None:
    assert assign_splits([StudyRow("a", "x", 1)], held_out_sites=frozenset()) == {"a": "train"}


def test_a_subject_is_counted_where_its_worst_outcome_was() -> None:
    rows = [StudyRow("s", site, label) for site, label in product("ba", (0, 1))]
    assert strata(rows) == {"s": ("a", 1)}


def test_a_training_subject_that_turns_up_at_a_held_out_site_stops_the_delivery() -> None:
    rows = [StudyRow("s", "a", 0), StudyRow("s", "d", 0)]
    with pytest.raises(DataError, match="1 subjects that would move"):
        assign_splits(rows, held_out_sites=frozenset("d"), assigned={"s": "train"})

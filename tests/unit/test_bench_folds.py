from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draf_dist.data.splits import StudyRow
from draf_dist.errors import SpecError
from draf_dist.evaluation.bench_folds import divide_sites, split_of_fold

COUNTS = st.dictionaries(
    st.sampled_from([f"site_{i}" for i in range(40)]),
    st.tuples(st.integers(1, 40), st.integers(0, 5)).map(lambda pair: np.array(pair, dtype=np.int64)),
    min_size=5,
)
ROWS = st.lists(
    st.builds(
        StudyRow, st.integers(0, 400).map(lambda i: f"{i * 2654435761 % 2**32:08x}"), st.sampled_from("abcd"), st.integers(0, 1)
    ),
    max_size=300,
)


@given(COUNTS, st.integers(2, 5), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_every_site_is_held_out_exactly_once(counts: dict[str, np.ndarray], num_folds: int, seed: int) -> None:
    folds = divide_sites(counts, num_folds, seed)
    assert len(folds) == num_folds
    assert sorted(site for fold in folds for site in fold.sites) == sorted(counts)
    assert np.array_equal(np.sum([fold.class_counts for fold in folds], axis=0), np.sum(list(counts.values()), axis=0))


def test_folds_are_even_in_studies_and_in_deaths() -> None:
    generator = np.random.default_rng(0)
    counts = {f"site_{i}": np.array([generator.integers(8, 20), generator.poisson(1)], dtype=np.int64) for i in range(186)}
    by_fold = np.array([fold.class_counts for fold in divide_sites(counts, 5, 0)])
    assert np.ptp(by_fold[:, 1]) <= 2
    assert np.ptp(by_fold[:, 0]) <= 12


@given(COUNTS)
@settings(max_examples=30, deadline=None)
def test_folds_depend_on_names_counts_and_seed_alone(counts: dict[str, np.ndarray]) -> None:
    shuffled = dict(reversed(counts.items()))
    assert divide_sites(counts, 3, 0) == divide_sites(shuffled, 3, 0)


def test_another_seed_gives_another_partition() -> None:
    counts = {f"site_{i}": np.array([10, 1], dtype=np.int64) for i in range(20)}
    assert divide_sites(counts, 4, 0) != divide_sites(counts, 4, 1)


def test_more_folds_than_sites_are_refused() -> None:
    with pytest.raises(SpecError, match="at most 2, the sites with studies"):
        divide_sites({"a": np.array([3, 1]), "b": np.array([3, 1])}, 3, 0)


@given(ROWS)
@settings(max_examples=60, deadline=None)
def test_no_subject_is_on_both_sides_of_a_fold(rows: list[StudyRow]) -> None:
    splits = split_of_fold(rows, held_out_sites=frozenset("ab"))
    touching = {row.subject for row in rows if row.site in "ab"}
    assert {subject for subject, split in splits.items() if split == "ood"} == touching
    assert set(splits) == {row.subject for row in rows}
    assert "test" not in splits.values()


def test_a_rare_class_is_in_validation_although_no_site_has_two_of_it() -> None:
    rows = [StudyRow(f"{site:03d}{i:02d}", f"site_{site}", int(i == 0)) for site in range(100) for i in range(12)]
    splits = split_of_fold(rows, held_out_sites=frozenset({"site_0"}))
    counts = Counter((splits[row.subject], row.label) for row in rows)
    assert counts == {("ood", 0): 11, ("ood", 1): 1, ("train", 0): 926, ("val", 0): 163, ("train", 1): 85, ("val", 1): 14}

"""How far scores of times reach, by the training subjects of a release and by nobody else."""

from pathlib import Path

import numpy as np
import pytest
from planted_clinic import clinic_release, write_clinic

from draf_dist.data.release import Release, open_release
from draf_dist.evaluation.follow_up import LEAST_UNCENSORED, FollowUp, follow_up_of
from draf_dist.metrics.survival import Censoring


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clinic(tmp_path_factory.mktemp("clinic"))


@pytest.fixture(scope="module")
def release(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Release:
    return open_release(clinic_release(raw, "death", tmp_path_factory.mktemp("times") / "release"))


def test_it_is_the_censoring_of_the_training_subjects(release: Release) -> None:
    table = release.subjects()
    train = [text for text, split in zip(table["label"].to_pylist(), table["split"].to_pylist(), strict=True) if split == "train"]
    time = np.array([text.removesuffix("+") for text in train], dtype=np.float32).astype(np.float64)
    by_hand = Censoring.of(time, np.array([not text.endswith("+") for text in train]))
    found = follow_up_of(release)
    assert found is not None
    np.testing.assert_array_equal(found.censoring.time, by_hand.time)
    np.testing.assert_array_equal(found.censoring.probability, by_hand.probability)
    assert len(train) < len(table)


def test_the_horizon_is_the_last_edge_or_where_a_tenth_is_left(release: Release) -> None:
    found = follow_up_of(release)
    assert found is not None
    assert found.edges == (4.0, 8.0, 16.0)
    at_the_horizon = float(found.censoring.at(np.array([found.horizon]))[0])
    assert at_the_horizon >= LEAST_UNCENSORED
    later = found.censoring.time[found.censoring.time > found.horizon]
    assert found.horizon == 16.0 or (found.censoring.at(later) < LEAST_UNCENSORED).all()


def test_it_ends_before_the_last_edge_where_nobody_is_followed_for_so_long(release: Release) -> None:
    found = follow_up_of(release)
    assert found is not None
    assert (found.until(5.0).horizon, found.until(99.0).horizon) == (5.0, found.horizon)
    assert found.until(5.0).grid[[0, -1]].tolist() == [0.0, 5.0]


def test_classes_and_labels_have_none(raw: Path, tmp_path: Path) -> None:
    assert follow_up_of(open_release(clinic_release(raw, "findings", tmp_path / "release"))) is None


def test_a_short_follow_up_is_a_short_horizon(tmp_path: Path) -> None:
    """Everybody leaves by the third month, long before the last edge."""
    raw = write_clinic(tmp_path / "raw")
    lines = (raw / "visits.csv").read_text().splitlines()
    cut = [lines[0]]
    for line in lines[1:]:
        *rest, months, dead = line.split(",")
        left = float(months) > 3
        cut.append(",".join([*rest, "3.0" if left else months, "0" if left else dead]))
    (raw / "visits.csv").write_text("\n".join(cut) + "\n")
    found = follow_up_of(open_release(clinic_release(raw, "death", tmp_path / "release")))
    assert isinstance(found, FollowUp)
    assert 2 < found.horizon < 3

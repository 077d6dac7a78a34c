"""Fractions of the labels by subjects: of every site and label the same share, nested, and told in the summary of a run."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from small_runs import silent, small_job, small_release

from draf_dist.data.release import Release, open_release
from draf_dist.data.splits import StudyRow
from draf_dist.training.job import FinetuneJob
from draf_dist.training.label_counts import count_labels
from draf_dist.training.label_fraction import labelled_subjects
from draf_dist.training.run import train
from draf_dist.training.summary import summarise

SHARES = (0.1, 0.25, 0.5, 1.0)
# Site, label, subjects.
COHORT = (("north", 0, 100), ("north", 1, 40), ("south", 0, 60), ("south", 1, 20))
STUDIES = [StudyRow(f"{site} {label} {i}", site, label) for site, label, count in COHORT for i in range(count)]


def chosen(share: float, seed: int = 0) -> set[str]:
    return set(labelled_subjects(STUDIES, share, seed))


@pytest.mark.parametrize("share", SHARES)
def test_of_every_site_and_label_the_same_share_is_taken(share: float) -> None:
    counts = Counter(name.rsplit(" ", 1)[0] for name in chosen(share))
    assert counts == {f"{site} {label}": share * count for site, label, count in COHORT}


def test_a_larger_share_holds_all_of_a_smaller_one_and_another_seed_others() -> None:
    found = [chosen(share) for share in SHARES]
    assert all(small < large for small, large in zip(found, found[1:], strict=False))
    assert chosen(0.25, seed=1) != found[1]
    assert chosen(0.25) == set(labelled_subjects(reversed(STUDIES), 0.25, 0))


def test_a_rare_label_keeps_at_least_one_subject() -> None:
    rare = [StudyRow("the only one", "south", 2)]
    assert "the only one" in set(labelled_subjects([*STUDIES, *rare], 0.1, 0))


def test_all_studies_of_a_subject_are_taken_or_none() -> None:
    """A subject counts once, under the highest of its labels and the first of its sites."""
    twice = [StudyRow(row.subject, "south", 1) for row in STUDIES if row.site == "north"]
    counts = Counter(name.split(" ")[0] for name in labelled_subjects([*STUDIES, *twice], 0.5, 0))
    assert counts == {"north": 70, "south": 40}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return open_release(small_release(tmp_path_factory.mktemp("data"), num_subjects=90, seed=1))


def job_of(release: Release, share: float) -> FinetuneJob:
    return small_job(release.pinned_url, label_fraction=share, label_fraction_of="subjects", epochs=1)


def test_a_run_tells_of_how_many_studies_it_used_the_label(release: Release, tmp_path: Path) -> None:
    job = job_of(release, 0.25)
    run = train(job, str(tmp_path / "run"), console=silent())
    counts, every = count_labels(job, release), release.manifest.receipts["train"].count
    assert summarise(run.url).labelled == counts.num_studies
    assert counts.num_studies == pytest.approx(0.25 * every, abs=4)
    uid = torch.tensor(release.subjects()["uid"].to_pylist())
    assert int(counts.has_label(uid).sum()) == counts.num_studies


def test_jobs_without_the_setting_keep_their_name(release: Release) -> None:
    plain = small_job(release.pinned_url, label_fraction=0.25)
    assert "label_fraction_of" not in plain.model_dump(mode="json")
    assert job_of(release, 0.25).sha256 != plain.sha256

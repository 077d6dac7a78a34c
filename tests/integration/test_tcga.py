"""TCGA with RNA, copy numbers and survival, as the cards read it. The data are no part of the repository: see DRAF_TEST_DATA."""

from functools import cache
from pathlib import Path

import numpy as np
import public_data
import pytest

from draf_dist.data.splits import StudyRow
from draf_dist.evaluation.bench_folds import count_sites, divide_sites, split_of_fold
from draf_dist.schema.label import SurvivalSpec
from draf_dist.schema.modality import TableSpec
from draf_dist.schema.study import Rejection, Study, TimeToEvent
from draf_dist.sources.base import Source
from draf_dist.sources.card import load_card

ROOT = Path(__file__).resolve().parents[2]
COHORTS = ("blca", "luad", "ucec")


@cache
def read(cohort: str) -> tuple[Source, tuple[Study, ...]]:
    source = load_card(ROOT / "datasets" / f"tcga_{cohort}.yaml").build(public_data.folder("tcga_mcat"))
    items = list(source.studies())
    assert not [item for item in items if isinstance(item, Rejection)]
    return source, tuple(item for item in items if isinstance(item, Study))


def widths(source: Source) -> dict[str, int]:
    return {spec.name: len(spec.variables) for spec in source.schema.modalities if isinstance(spec, TableSpec)}


@pytest.mark.parametrize(
    ("cohort", "slides", "patients", "died", "sites", "columns"),
    [
        ("blca", 437, 373, 169, 33, {"clinical": 2, "rna": 2814, "cnv": 248}),
        ("luad", 516, 453, 158, 33, {"clinical": 2, "rna": 2812, "cnv": 284}),
        ("ucec", 539, 480, 75, 30, {"clinical": 4, "cnv": 123}),
    ],
)
def test_a_cohort_has_the_published_counts(
    cohort: str, slides: int, patients: int, died: int, sites: int, columns: dict[str, int]
) -> None:
    source, studies = read(cohort)
    assert source.counts.tables["cnv.slides"].rows == slides
    assert len(studies) == len({study.subject for study in studies}) == patients
    assert sum(time.event for time in map(_time, studies)) == died
    assert len({study.site for study in studies}) == sites == len(source.schema.sites)
    assert widths(source) == columns
    assert all(study.site == study.subject[5:7] for study in studies)
    observed = {name: np.isfinite(np.concatenate([study.inputs[name] for study in studies])).mean() for name in columns}
    assert observed["cnv"] == 1
    assert min(observed.values()) > 0.97


@pytest.mark.parametrize("cohort", COHORTS)
def test_whoever_died_was_followed_for_a_shorter_time(cohort: str) -> None:
    """The file codes who was censored, not who died: read the wrong way round, deaths would come late and be the many."""
    times = [_time(study) for study in read(cohort)[1]]
    died, censored = ([time.time for time in times if time.event is which] for which in (True, False))
    assert np.median(died) < np.median(censored)
    assert len(died) < len(censored)
    assert min(died) > 0


@pytest.mark.parametrize("cohort", COHORTS)
def test_edges_lie_at_the_quartiles_of_deaths(cohort: str) -> None:
    source, studies = read(cohort)
    assert isinstance(source.schema.label, SurvivalSpec)
    quartiles = np.quantile([_time(study).time for study in studies if _time(study).event], [0.25, 0.5, 0.75])
    np.testing.assert_allclose(source.schema.label.edges, quartiles, atol=0.6)


@pytest.mark.parametrize("cohort", COHORTS)
def test_folds_never_split_a_site_and_all_of_them_hold_deaths(cohort: str) -> None:
    source, studies = read(cohort)
    folds = divide_sites(count_sites(source), 5, seed=0)
    assert sorted(site for fold in folds for site in fold.sites) == sorted({study.site for study in studies})
    shares = np.array([fold.class_counts for fold in folds]) / np.sum([fold.class_counts for fold in folds], axis=0)
    assert shares.min() > 0.1
    rows = [StudyRow(study.subject, study.site, int(_time(study).event)) for study in studies]
    for fold in folds:
        split = split_of_fold(rows, held_out_sites=frozenset(fold.sites))
        assert {row.site for row in rows if split[row.subject] == "ood"} == set(fold.sites)
        assert not {row.site for row in rows if split[row.subject] != "ood"} & set(fold.sites)
        deaths = {name: sum(row.label for row in rows if split[row.subject] == name) for name in ("train", "val", "ood")}
        assert min(deaths.values()) >= 7, deaths


def _time(study: Study) -> TimeToEvent:
    assert isinstance(study.label, TimeToEvent)
    return study.label

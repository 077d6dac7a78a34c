"""The public eICU demo from raw files to a release, by datasets/eicu.yaml. Data are no part of the repository: DRAF_TEST_DATA."""

import csv
import gzip
import io
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import public_data
import pytest
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from draf_dist.data.prepare import prepare
from draf_dist.data.release import Release
from draf_dist.data.verify import verify
from draf_dist.schema.study import Rejection, Study
from draf_dist.sources.base import Source
from draf_dist.sources.card import load_card

ROOT = Path(__file__).resolve().parents[2]
KEY = b"sixteen or more bytes of key"


@pytest.fixture(scope="module")
def source() -> Source:
    return load_card(ROOT / "datasets" / "eicu.yaml").build(public_data.folder("eicu_demo"))


@pytest.fixture(scope="module")
def items(source: Source) -> list[Study | Rejection]:
    return list(source.studies())


@pytest.fixture(scope="module")
def studies(items: list[Study | Rejection]) -> list[Study]:
    return [item for item in items if isinstance(item, Study)]


@pytest.fixture(scope="module")
def release(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Release:
    return prepare(source, str(tmp_path_factory.mktemp("release") / "eicu"), subject_key=KEY)


def rows(name: str) -> list[dict[str, str]]:
    with gzip.open(public_data.folder("eicu_demo") / f"{name}.csv.gz", "rt", newline="") as file:
        return list(csv.DictReader(file))


def test_the_export_has_the_published_counts() -> None:
    patients = rows("patient")
    assert (len(patients), len({row["uniquepid"] for row in patients}), len(rows("hospital"))) == (2520, 1841, 186)
    assert Counter(row["hospitaldischargestatus"] for row in patients) == {"Expired": 212, "Alive": 2280, "": 28}
    hospitals = defaultdict(set)
    for row in patients:
        hospitals[row["uniquepid"]].add(row["hospitalid"])
    assert sum(len(visited) > 1 for visited in hospitals.values()) == 19


@pytest.mark.parametrize(
    ("table", "share", "hospitals_without"),
    [("pastHistory", 0.88, 1), ("medication", 0.74, 42), ("respiratoryCharting", 0.52, 28), ("infusionDrug", 0.33, 63)],
)
def test_whole_tables_are_missing_by_hospital(table: str, share: float, hospitals_without: int) -> None:
    site = {row["patientunitstayid"]: row["hospitalid"] for row in rows("patient")}
    stays = {row["patientunitstayid"] for row in rows(table)}
    assert len(stays) / len(site) == pytest.approx(share, abs=0.006)
    assert len(set(site.values())) - len({site[stay] for stay in stays}) == hospitals_without


def test_the_cohort_is_every_stay_of_six_hours_with_a_known_outcome(
    source: Source, items: list[Study | Rejection], studies: list[Study]
) -> None:
    assert len(studies) == 2289
    assert np.mean([study.label for study in studies]) == pytest.approx(0.082, abs=0.0005)
    assert {item.reason for item in items if isinstance(item, Rejection)} == {"no label"}
    assert source.counts.tables["patient"].rows == 2520
    assert len(items) + source.counts.tables["patient"].outside_window == 2520
    assert len({study.site for study in studies}) == len(source.schema.sites) == 186
    assert len({study.subject for study in studies}) == 1751
    assert Counter(name for study in studies for name in study.inputs) == {
        "apache": 2289,
        "vitals": 2170,
        "drugs": 1825,
        "respiration": 1033,
        "history": 2134,
    }


def test_minus_one_is_missing_as_often_as_published(studies: list[Study], source: Source) -> None:
    names = [variable.name for variable in source.schema.modalities[0].variables]
    apache = np.stack([study.inputs["apache"][0] for study in studies])
    scored = ~np.isnan(apache[:, names.index("ventilated")])
    lacking = {name: np.isnan(apache[scored, names.index(name)]).mean() for name in ("ph", "bilirubin", "albumin", "wbc")}
    assert lacking == pytest.approx({"ph": 0.82, "bilirubin": 0.65, "albumin": 0.61, "wbc": 0.31}, abs=0.03)


def test_a_release_can_be_made_and_verified(release: Release, source: Source) -> None:
    assert verify(release).num_samples == 2289
    assert release.manifest.quarantined == {"no label": 26}
    splits = defaultdict(set)
    table = release.subjects().to_pydict()
    for subject, split in zip(table["subject"], table["split"], strict=True):
        splits[subject].add(split)
    assert all(len(found) == 1 for found in splits.values())
    held_out = {split for site, split in zip(table["site"], table["split"], strict=True) if site in source.held_out_sites}
    assert held_out == {"ood"}
    deaths = Counter(split for split, label in zip(table["split"], table["label"], strict=True) if label == "died")
    shares = {split: deaths[split] / table["split"].count(split) for split in ("train", "val", "test")}
    # A hospital has one or two deaths: splits that let the first of every hospital train would leave none to test on.
    assert shares == pytest.approx(dict.fromkeys(shares, 0.083), abs=0.01), deaths


def test_logistic_regression_on_the_release_reaches_the_known_baseline(release: Release) -> None:
    table = release.subjects().to_pydict()
    order = {uid: i for i, uid in enumerate(table["uid"])}
    features = np.full((len(order), sum(len(summary(None, spec)) for spec in release.schema.modalities)), np.nan)
    start = 0
    for spec in release.schema.modalities:
        width = len(summary(None, spec))
        for uid, array in members(release, spec.name):
            features[order[uid], start : start + width] = summary(array, spec)
        start += width
    label = np.array([name == "died" for name in table["label"]])
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    tables_only = slice(0, len(summary(None, release.schema.modalities[0])) + len(summary(None, release.schema.modalities[1])))
    scores = {}
    for name, columns in {"apache, vitals": tables_only, "all": slice(None)}.items():
        model = make_pipeline(
            SimpleImputer(strategy="median", add_indicator=True), StandardScaler(), LogisticRegression(C=0.01, max_iter=2000)
        )
        predicted = cross_val_predict(model, features[:, columns], label, groups=table["site"], cv=folds, method="predict_proba")
        scores[name] = roc_auc_score(label, predicted[:, 1])
    # Known from folds made the same way: 0.809. Far above it, something would leak: APACHE IVa's own prediction has 0.862.
    assert 0.77 < scores["apache, vitals"] < 0.87, scores
    assert 0.77 < scores["all"] < 0.88, scores


def summary(array: np.ndarray | None, spec: object) -> np.ndarray:
    """Mean, least, greatest of a series; a table as it is."""
    width = len(spec.variables)
    if array is None:
        return np.full(width * (3 if spec.kind == "series" else 1), np.nan)
    if spec.kind == "table":
        return array[0]
    seen = ~np.isnan(array)
    count = np.where(seen.any(0), seen.sum(0), np.nan)
    parts = np.where(seen, array, 0).sum(0) / count, np.where(seen, array, np.inf).min(0), np.where(seen, array, -np.inf).max(0)
    return np.concatenate([np.where(seen.any(0), part, np.nan) for part in parts])


def members(release: Release, modality: str) -> list[tuple[int, np.ndarray]]:
    """(uid, array) of every study that has the modality."""
    found = []
    for path in Path(release.url).rglob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                name, kind, _ = (*member.name.split("."), "")[:3]
                if kind == modality:
                    found.append((int(name, 16), np.load(io.BytesIO(tar.extractfile(member).read()), allow_pickle=False)))
    return found

"""UCI Heart and COVID radiographs from the raw folder to report.html by the command line: a card, a job, no code of their own."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import public_data
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from draf_dist.cli.app import app
from draf_dist.data.loader import evaluation_batches
from draf_dist.data.release import Release, open_release
from draf_dist.schema.release import SPLITS

ROOT = Path(__file__).resolve().parents[2]
KEY = "sixteen or more bytes of key"


@dataclass(frozen=True)
class Road:
    """One data set from raw folder to report."""

    prepared: dict[str, Any]
    release: Release
    run: Path
    evaluated: dict[str, Any]


def draf(*words: object) -> dict[str, Any]:
    """One call of the command line, with --json."""
    done = CliRunner().invoke(app, [*map(str, words), "--json"], env={"DRAF_SUBJECT_KEY": KEY}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def overrides(settings: tuple[str, ...]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def travel(name: str, raw: Path, out: Path, *settings: str) -> Road:
    prepared = draf("prepare", ROOT / "datasets" / f"{name}.yaml", "--raw", raw, "--out", out / "release", *overrides(settings))
    tiny = ("epochs=1", "passes_train=2", "passes_eval=2", f"release={out / 'release'}")
    draf("train", ROOT / "jobs" / f"finetune_{name}.yaml", "--out", out / "run", *overrides(tiny))
    sweep = "sweep={passes: 2, operations: [{kind: ehr_mask, grid: [0, 0.5]}, {kind: missing_not_at_random, grid: [0, 0.5]}]}"
    evaluated = draf("evaluate", out / "run", *overrides(("passes=2", "bootstrap=20", sweep)))
    return Road(prepared, open_release(str(out / "release")), out / "run", evaluated)


@pytest.fixture(scope="module")
def heart(tmp_path_factory: pytest.TempPathFactory) -> Road:
    return travel("uci_heart", public_data.folder("uci_heart"), tmp_path_factory.mktemp("heart"))


@pytest.fixture(scope="module")
def chest(tmp_path_factory: pytest.TempPathFactory) -> Road:
    return travel("covid_cxr", public_data.folder("covid_chestxray"), tmp_path_factory.mktemp("chest"))


@pytest.fixture(params=["heart", "chest"])
def road(request: pytest.FixtureRequest) -> Road:
    found: Road = request.getfixturevalue(request.param)
    return found


def studies_by_site(prepared: dict[str, Any]) -> dict[str, int]:
    return {site: sum(cell["studies"] for cell in splits.values()) for site, splits in prepared["counts"].items()}


def test_heart_has_the_published_counts_and_one_column_that_a_hospital_never_has(heart: Road) -> None:
    assert studies_by_site(heart.prepared) == {"cleveland": 303, "hungary": 294, "switzerland": 123, "long_beach": 200}
    assert heart.prepared["quarantined"] == {}
    assert heart.prepared["nothing_observed"] == {"blood.cholesterol": ["switzerland"]}


def test_a_column_missing_at_a_whole_site_arrives_unobserved_and_never_as_a_value(heart: Road) -> None:
    """Switzerland writes cholesterol 0 for every patient: an observed 0 anywhere would be a mean of 0 mg/dL."""
    schema = heart.release.schema
    modality = schema.names.index("blood")
    variable = [spec.name for spec in schema.modalities[modality].variables].index("cholesterol")
    swiss = schema.sites.index("switzerland")
    values, seen = [], Counter()
    for split in ("train", "val", "test"):
        for batch in evaluation_batches(heart.release, split, 64):
            rows = (batch.site == swiss) & (batch.weight > 0)
            blood = batch.inputs["blood"]
            observed = blood.observed[:, 0, variable] & batch.present[:, modality]
            seen["studies"] += int(rows.sum())
            seen["blood"] += int((rows & batch.present[:, modality]).sum())
            seen["cholesterol"] += int((rows & observed).sum())
            values += blood.values[observed & ~rows, 0, variable].tolist()
    # High sugar is the other column of `blood`: known of 48 of the 123.
    assert seen == {"studies": 123, "blood": 48, "cholesterol": 0}
    assert min(values) > 50


def test_chest_has_the_counts_of_its_page_and_quarantines_nothing(chest: Road) -> None:
    assert studies_by_site(chest.prepared) == {"spain": 17, "italy": 10, "united_kingdom": 4, "elsewhere": 19}
    assert chest.prepared["quarantined"] == {}
    subjects = chest.release.subjects()
    assert len(set(subjects["subject"].to_pylist())) == 34
    assert Counter(subjects["label"].to_pylist()) == {"breathing": 32, "intubated": 18}


@pytest.mark.parametrize(
    ("label", "num_studies", "num_subjects", "classes"),
    [("icu", 27, 14, {"ward": 12, "icu": 15}), ("survival", 75, 35, {"survived": 63, "died": 12})],
)
def test_another_label_is_one_option_and_brings_rows_of_its_own_up_to_the_report(
    label: str, num_studies: int, num_subjects: int, classes: dict[str, int], tmp_path: Path
) -> None:
    road = travel("covid_cxr", public_data.folder("covid_chestxray"), tmp_path, f"label={label}")
    subjects = road.release.subjects()
    assert (subjects.num_rows, len(set(subjects["subject"].to_pylist()))) == (num_studies, num_subjects)
    assert Counter(subjects["label"].to_pylist()) == classes
    assert road.prepared["quarantined"] == {}
    assert f"predicts <b>{label}</b>" in (road.run / "report.html").read_text()
    # Of so few, all of test may have one label; then nobody is sicker, and the sweep says what it leaves out.
    tested = {
        name for name, split in zip(subjects["label"].to_pylist(), subjects["split"].to_pylist(), strict=True) if split == "test"
    }
    assert road.evaluated["sweep"]["left_out"] == ([] if len(tested) > 1 else ["missing_not_at_random"])


def test_rows_whose_label_is_not_known_are_quarantined_by_reason_where_the_card_asks_for_them(tmp_path: Path) -> None:
    raw = public_data.folder("covid_chestxray")
    words = ("prepare", ROOT / "datasets" / "covid_cxr.yaml", "--raw", raw, "--out", tmp_path / "all")
    prepared = draf(*words, "--set", "label=icu", "--set", "labels.icu.where={}", "--limit", "0.9")
    # Of 215 frontal radiographs 123 cells are empty, and two say "Would have been stated".
    assert prepared["quarantined"] == {"no label": 123, "unknown label": 2}
    assert sum(studies_by_site(prepared).values()) == 90


@pytest.mark.parametrize(("name", "held_out"), [("heart", "long_beach"), ("chest", "spain")])
def test_the_held_out_site_alone_is_ood(name: str, held_out: str, request: pytest.FixtureRequest) -> None:
    subjects = request.getfixturevalue(name).release.subjects()
    pairs = set(zip(subjects["site"].to_pylist(), subjects["split"].to_pylist(), strict=True))
    assert {site for site, split in pairs if split == "ood"} == {held_out}
    assert {split for site, split in pairs if site == held_out} == {"ood"}
    assert {split for _, split in pairs} == set(SPLITS)


def test_every_study_is_predicted_exactly_once(road: Road) -> None:
    subjects = road.release.subjects()
    expected = {split: set() for split in ("val", "test", "ood")}
    for uid, split in zip(subjects["uid"].to_pylist(), subjects["split"].to_pylist(), strict=True):
        if split in expected:
            expected[split].add(uid)
    for split, uids in expected.items():
        table = pq.read_table(road.run / "predictions" / f"{split}.parquet")
        assert sorted(table["uid"].to_pylist()) == sorted(uids)
        probability = np.stack([table[name].to_numpy() for name in table.column_names if name.startswith("probability_")])
        np.testing.assert_allclose(probability.sum(0), 1, atol=1e-5)


def test_the_report_opens_without_a_network_and_names_what_was_measured(road: Road) -> None:
    page = (road.run / "report.html").read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#|data:)|@import|url\((?!["']?data:|#)|<script""", page)
    for split in road.evaluated["splits"]:
        assert f"{split['num_studies']} studies of {split['num_subjects']} subjects" in page
    assert all(name in page for name in road.release.schema.names)


def test_no_patient_identifier_of_the_collection_is_in_what_the_run_leaves(chest: Road) -> None:
    raw = public_data.folder("covid_chestxray")
    files = {path.name for path in (raw / "images").iterdir() if len(path.name) > 12}
    left = b"".join(path.read_bytes() for path in chest.run.rglob("*") if path.suffix in {".html", ".json", ".jsonl", ".yaml"})
    assert not [name for name in files if name.encode() in left]

"""Trained models at the gate: harm at one hospital is found and named, an honest improvement passes, what is served stays."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import S3
from gate_hospitals import ODD, fifteen_held_out, invert_labels, job_of, release_of, write_export
from ruamel.yaml import YAML
from small_runs import silent
from typer.testing import CliRunner

from draf_dist.cli.app import app
from draf_dist.continual.gate import check_never_trained_on, run_gate
from draf_dist.continual.gate_report import render
from draf_dist.continual.policy import GatePolicy
from draf_dist.continual.registry import Registry
from draf_dist.continual.verdict import Verdict
from draf_dist.data.release import open_release
from draf_dist.errors import DataError, GateError, SpecError
from draf_dist.models.export import DESCRIPTION, STATS, WEIGHTS
from draf_dist.storage import open_store
from draf_dist.training.run import train
from draf_dist.training.run_folder import RunFolder, open_run

POLICY = GatePolicy(passes=4, replicates=2000)
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Releases true, inverted, fifteen; runs weak (a tenth of the labels), good, and poisoned (one hospital's labels inverted)."""
    folder = tmp_path_factory.mktemp("gate")
    write_export(folder, num_subjects=1700)
    true = release_of(folder, folder / "raw", folder / "true")
    release_of(folder, folder / "raw", folder / "fifteen", rule=fifteen_held_out)
    inverted = release_of(folder, invert_labels(folder, ODD), folder / "inverted")
    for job in (job_of("weak", true, label_fraction=0.1, epochs=2), job_of("good", true), job_of("poisoned", inverted)):
        train(job, str(folder / job.name), console=silent())
    return folder


def judged(folder: Path, champion: str, challenger: str, holdout: str = "true", policy: GatePolicy = POLICY) -> Verdict:
    return run_gate(str(folder / champion), str(folder / challenger), open_release(str(folder / holdout)).pinned_url, policy)


@pytest.fixture(scope="module")
def refused(folder: Path) -> Verdict:
    return judged(folder, "good", "poisoned")


def test_one_hospital_with_inverted_labels_is_refused_and_named(refused: Verdict) -> None:
    assert (refused.decision, refused.sites) == ("refuse", (ODD,))
    odd = next(part for part in refused.comparison.sites if part.site == ODD)
    assert odd.num_subjects >= 200
    assert odd.lower > POLICY.site_margin


def test_with_fifteen_subjects_of_it_nobody_can_tell_and_the_number_needed_is_right(folder: Path, refused: Verdict) -> None:
    verdict = judged(folder, "good", "poisoned", "fifteen")
    assert verdict.decision == "cannot_tell"
    assert ODD in verdict.sites
    found = next(finding for finding in verdict.findings if finding.site == ODD)
    assert found.present == 15
    assert any(f"{ODD}: " in reason and str(found.needed) in reason for reason in verdict.reasons)
    # Holdouts of that many subjects, as unlike one another as the fifteen and harmed by nothing: how many pass?
    part = next(part for part in verdict.comparison.sites if part.site == ODD)

    def power(num_subjects: int) -> float:
        generator = np.random.default_rng(0)
        drawn = generator.normal(0, part.sd, (1000, num_subjects))
        upper = drawn.mean(axis=1) + 1.6449 * drawn.std(axis=1, ddof=1) / np.sqrt(num_subjects)
        return float(np.mean(upper <= part.margin))

    assert power(found.needed) == pytest.approx(POLICY.power, abs=0.04)
    assert power(found.needed // 2) < POLICY.power - 0.2
    assert verdict.subjects_needed == max(each.needed for each in verdict.findings if each.state == "open")


def test_an_honest_improvement_is_promoted(folder: Path) -> None:
    verdict = judged(folder, "weak", "good")
    assert (verdict.decision, verdict.sites, verdict.improvement) == ("promote", (), "overall")


def test_the_same_comparison_gives_the_same_bytes(folder: Path, refused: Verdict) -> None:
    again = judged(folder, "good", "poisoned")
    assert again.model_dump_json() == refused.model_dump_json()
    assert render(again) == render(refused)


def test_the_verdict_says_what_was_compared_and_names_no_subject(folder: Path, refused: Verdict) -> None:
    lineage = refused.lineage
    assert lineage is not None
    assert (lineage.champion.run, lineage.challenger.run) == ("good", "poisoned")
    assert lineage.holdout == open_release(str(folder / "true")).pinned_url
    assert lineage.challenger.release == open_release(str(folder / "inverted")).pinned_url
    text = refused.model_dump_json() + render(refused)
    assert not any(subject in text for subject in open_release(str(folder / "true")).subjects()["subject"].to_pylist())


def test_a_holdout_that_may_move_is_refused(folder: Path) -> None:
    with pytest.raises(SpecError, match="URL@version"):
        run_gate(str(folder / "good"), str(folder / "weak"), str(folder / "true"), POLICY)


def test_a_holdout_with_subjects_that_were_trained_on_is_refused(folder: Path, tmp_path: Path) -> None:
    def everyone_held_out(studies, **_):
        return {study.subject: "test" if i % 3 else "train" for i, study in enumerate(studies)}

    leaky = release_of(folder, folder / "raw", tmp_path / "leaky", rule=everyone_held_out)
    with pytest.raises(GateError, match=r"champion: .*no holdout subject") as told:
        run_gate(str(folder / "good"), str(folder / "weak"), leaky.pinned_url, POLICY)
    assert not any(subject in str(told.value) for subject in leaky.subjects()["subject"].to_pylist())


def test_subjects_under_another_key_can_not_be_told_apart_and_are_refused(folder: Path, tmp_path: Path) -> None:
    other = release_of(folder, folder / "raw", tmp_path / "other", key=b"another key of the tests")
    with pytest.raises(GateError, match="another key"):
        run_gate(str(folder / "good"), str(folder / "weak"), other.pinned_url, POLICY)


def test_what_a_run_started_from_counts_as_trained_on(folder: Path) -> None:
    """The holdout is clean for the run itself and not for its parent."""

    def only_odd(studies, **_):
        return {study.subject: ("train" if study.site == ODD else "test") for study in studies}

    holdout = release_of(folder, folder / "raw", folder / "all_but_odd", rule=only_odd)
    child = open_run(str(folder / "good"))
    own = child.job.model_copy(update={"release": holdout.pinned_url})
    check_never_trained_on({"challenger": RunFolder(child.store, own)}, holdout, "test")
    warm = own.model_copy(update={"warm_start": f"{folder / 'good'}@{'0' * 64}"})
    with pytest.raises(GateError, match="no holdout subject"):
        check_never_trained_on({"challenger": RunFolder(child.store, warm)}, holdout, "test")


def test_a_holdout_with_another_label_is_refused(folder: Path, tmp_path: Path) -> None:
    card = YAML(typ="safe").load((folder / "card.yaml").read_text())
    card["labels"]["death"]["classes"].reverse()
    YAML().dump(card, tmp_path / "card.yaml")
    swapped = release_of(tmp_path, folder / "raw", tmp_path / "swapped")
    with pytest.raises(DataError, match="label"):
        run_gate(str(folder / "good"), str(folder / "weak"), swapped.pinned_url, POLICY)


@pytest.fixture
def draf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `draf models ...` on a registry of the test's own; the answer to --json."""
    monkeypatch.setenv("DRAF_REGISTRY", f"sqlite:///{tmp_path / 'registry.db'}")

    def run(*words: object, exit_code: int = 0) -> Any:
        done = CliRunner().invoke(app, ["models", *map(str, words), "--json"])
        assert done.exit_code == exit_code, done.output
        return json.loads(done.stdout)

    return run


def test_the_road_from_registering_to_rolling_back(folder: Path, tmp_path: Path, draf: Run) -> None:
    holdout = open_release(str(folder / "true")).pinned_url
    assert draf("register", folder / "weak", "--model", "death")["aliases"] == ["challenger"]
    assert draf("promote", "death")["aliases"] == ["champion"]
    draf("predict", "death", "--release", holdout, "--out", tmp_path / "before.parquet")

    draf("register", folder / "good", "--model", "death")
    settings = ("--set", "passes=4", "--set", "replicates=2000")
    found = draf("gate", "death", "--holdout", holdout, "--out", tmp_path / "gate", *settings)
    assert found["decision"] == "promote"
    assert json.loads((tmp_path / "gate" / "verdict.json").read_text()) == found
    assert draf("promote", "death", "--dry-run")["aliases"] == ["challenger"]
    assert draf("promote", "death")["version"] == 2
    draf("predict", "death", "--release", holdout, "--out", tmp_path / "between.parquet")

    draf("register", folder / "poisoned", "--model", "death")
    assert draf("gate", "death", "--holdout", holdout, *settings, exit_code=4)["sites"] == [ODD]
    with pytest.raises(GateError, match=f"refuse.*{ODD}"):
        Registry().promote("death", 3)

    assert draf("rollback", "death", "--dry-run")["version"] == 1
    assert draf("rollback", "death", "--reason", "a drill")["version"] == 1
    answer = draf("predict", "death@champion", "--release", holdout, "--out", tmp_path / "after.parquet")
    assert answer["version"] == 1
    # Bit-identical to before, and not because nothing ever differs.
    assert (tmp_path / "after.parquet").read_bytes() == (tmp_path / "before.parquet").read_bytes()
    assert (tmp_path / "after.parquet").read_bytes() != (tmp_path / "between.parquet").read_bytes()
    shown = draf("show", "death")
    assert [(move["action"], move["version"]) for move in shown["history"]] == [("promote", 1), ("promote", 2), ("rollback", 1)]
    assert draf("list")["models"] == [{"name": "death", "champion": 1, "challenger": 3, "versions": 3}]
    # The verdict on it was against the version that is champion again.
    assert draf("promote", "death", "--version", 2)["aliases"] == ["champion"]


def test_predictions_are_the_same_bytes_in_any_store(
    folder: Path, tmp_path: Path, draf: Run, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draf("register", folder / "weak", "--model", "death")
    for out in ("p.parquet", tmp_path / "elsewhere" / "p.parquet", f"{s3.url}/some/p.parquet"):
        draf("predict", "death@1", "--release", folder / "true", "--split", "val", "--out", out)
    written = [open_store(str(url)).read("p.parquet") for url in (tmp_path, tmp_path / "elsewhere", f"{s3.url}/some")]
    assert written == [written[0]] * 3


def test_weights_that_changed_since_they_were_registered_are_not_served(folder: Path, tmp_path: Path, draf: Run) -> None:
    shutil.copytree(folder / "weak", tmp_path / "run")
    draf("register", tmp_path / "run", "--model", "death")
    for name in (WEIGHTS, STATS, DESCRIPTION):
        shutil.copy(folder / "good" / "model" / name, tmp_path / "run" / "model" / name)
    with pytest.raises(GateError, match="weights that were registered"):
        Registry().promote("death", 1)
    words = ["models", "predict", "death@1", "--release", str(folder / "true"), "--out", str(tmp_path / "p.parquet")]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, GateError)
    assert not (tmp_path / "p.parquet").exists()

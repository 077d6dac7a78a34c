"""A tiny zoo: systems under conditions, with a planted posterior; killed, continued, extended."""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from forked_command import draf, started
from planted_wards import write_export, write_job
from typer.testing import CliRunner

from draf_dist.cli.app import app
from draf_dist.data.loader import evaluation_batches
from draf_dist.errors import SpecError
from draf_dist.evaluation import bench_folds
from draf_dist.evaluation.bench import Prepared, prepare_bench, run_bench
from draf_dist.evaluation.bench_job import load_bench_job
from draf_dist.evaluation.bench_results import Bench, ConditionResult
from draf_dist.evaluation.predictions import read_predictions
from draf_dist.executor import Serial
from draf_dist.storage import open_store

KEY = b"sixteen or more bytes of key"
INNER = "{kind: mean, width: 8, encoders: {table: {kind: tabular, hidden: 8}}}"
LAW = "{operations: [{kind: ehr_noise, grid: [0, 10]}], hold_out_last: false}"
ZOO = (
    "finetune.model={}",
    f"systems={{mean: {{model: {INNER}}}, severity_rejection: {{model: {{kind: severity_rejection, fusion: {INNER}}}}}}}",
    f"baselines=[{{kind: logistic_regression, corrupted: {{law: {LAW}, copies: 2}}}}]",
    "finetune.epochs=6",
    "finetune.optimizer={learning_rate: 1e-2}",
    f"finetune.corruption={LAW}",
    "seeds=[0, 1]",
)
CONDITIONS = {
    "sigma": "{operation: {kind: ehr_noise, grid: [0, 10]}, hits: each}",
    "swap": "{operation: {kind: swap}, hits: one}",
    "mcar": "{operation: {kind: missing, grid: [0, 0.5]}}",
}


@dataclass(frozen=True)
class Planted:
    """Age says nothing; the marker is N(1.5 y, 1), so that its log-likelihood ratio is 1.5 (x - .75)."""

    prior_logit: float
    llr: dict[str, float]


class Quiet:
    """A Progress that counts cells."""

    def __init__(self) -> None:
        self.cells: list[str] = []

    def fold(self, number: int, num_folds: int) -> None: ...

    def cell(self, cell: object, result: object, finished: int, total: int) -> None:
        self.cells.append(cell.name)

    def failed(self, cell: object, message: str) -> None:
        raise AssertionError(f"{cell.name}: {message}")

    def scoring(self) -> None: ...


def overrides(*names: str) -> list[str]:
    return [*ZOO, f"conditions={{{', '.join(f'{name}: {CONDITIONS[name]}' for name in names)}}}"]


def prepared(folder: Path, *names: str) -> Prepared:
    job = load_bench_job(write_job(folder), overrides(*names))
    raw = folder / "raw"
    return prepare_bench(job, raw if raw.exists() else write_export(raw), str(folder / "out"), KEY, Quiet())


def truth_of(bench: Prepared) -> dict[int, Planted]:
    release, found = bench.releases[0], {}
    prior = float(np.log(0.3 / 0.7))
    for split in ("train", "val", "ood"):
        for batch in evaluation_batches(release, split, 64):
            marker = batch.inputs["blood"].values[:, 0, 0].double()
            for uid, value in zip(batch.uid.tolist(), marker.tolist(), strict=True):
                found[uid] = Planted(prior, {"blood": 1.5 * (value - 0.75), "history": 0.0})
    return found


def run(folder: Path, *names: str) -> tuple[Bench, list[str]]:
    bench, heard = prepared(folder, *names), Quiet()
    return run_bench(bench, Serial(), heard, truth_of(bench)), heard.cells


@dataclass(frozen=True)
class Extended:
    """A benchmark under some conditions, and the same folder with one condition more. stamps: of what is trained."""

    before: Bench
    cells: tuple[list[str], list[str]]
    stamps: tuple[dict[Path, int], dict[Path, int]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.fixture(scope="module")
def extended(folder: Path) -> Extended:
    before, first = run(folder, "sigma", "swap")
    stamps = trained(folder)
    _, second = run(folder, *CONDITIONS)
    return Extended(before, (first, second), (stamps, trained(folder)))


@pytest.fixture(scope="module")
def finished(folder: Path, extended: Extended) -> tuple[Path, Bench]:
    return folder, run(folder, *CONDITIONS)[0]


def under(bench: Bench, name: str) -> ConditionResult:
    (found,) = [condition for condition in bench.conditions if condition.name == name]
    return found


def auroc(bench: Bench, name: str) -> dict[str, float]:
    return {row.system: row.metrics["auroc"].value for row in under(bench, name).rows}


def test_every_system_is_measured_under_every_condition(finished: tuple[Path, Bench]) -> None:
    bench = finished[1]
    assert [condition.name for condition in bench.conditions] == ["clean", *CONDITIONS]
    for condition in bench.conditions:
        assert [row.system for row in condition.rows] == ["mean", "severity_rejection", "logistic_regression"]
        assert [sorted(row.holm) for row in condition.rows][0] == []
        assert all(row.holm["auroc"] > 0 and row.differences["auroc"].low is not None for row in condition.rows[1:])
    assert under(bench, "sigma").cases == ("blood", "history")
    assert [row.metrics["auroc"].value for row in bench.rows] == pytest.approx(list(auroc(bench, "clean").values()), abs=1e-12)
    assert [row.metrics["nll"].value for row in bench.rows] == pytest.approx(
        [row.metrics["nll"].value for row in under(bench, "clean").rows], abs=1e-12
    )


def test_noise_on_the_marker_costs_and_noise_on_the_age_does_not(finished: tuple[Path, Bench]) -> None:
    bench = finished[1]
    for row in under(bench, "sigma").rows:
        blood, age = row.by_case
        clean = auroc(bench, "clean")[row.system]
        assert blood < clean - 0.1
        assert abs(age - clean) < 0.06
        assert row.metrics["auroc"].value == pytest.approx((blood + age) / 2)


def test_regret_is_known_where_the_posterior_is(finished: tuple[Path, Bench]) -> None:
    bench = finished[1]
    known = {condition.name: "regret" in condition.rows[0].metrics for condition in bench.conditions}
    assert known == {"clean": True, "sigma": False, "swap": False, "mcar": True}
    for name in ("clean", "mcar"):
        regret = {row.system: row.metrics["regret"].value for row in under(bench, name).rows}
        # No less than the truth.
        assert all(0 < value < 0.3 for value in regret.values()), regret


def test_regret_is_the_divergence_from_the_posterior_of_what_is_left(finished: tuple[Path, Bench]) -> None:
    """Worked out anew from what the cells of the regression have stored."""
    folder, bench = finished
    made = prepared(folder, *CONDITIONS)
    truth, found = truth_of(made), []
    for cell in (cell for cell in made.cells if cell.system == "logistic_regression"):
        temperature = json.loads(Path(cell.url, "cell.json").read_text())["temperature"]["value"]
        (path,) = Path(cell.url, "predictions").glob("ood@mcar-*.parquet")
        (one,) = read_predictions(open_store(str(path.parent)), path.name)
        own = np.isin(one.uid, bench_folds.check_fold(made.releases[cell.fold], made.plan.folds[cell.fold]))
        for uid, there, probability in zip(one.uid[own], one.present[own, 0], one.probability[own, 1].astype(float), strict=True):
            planted = truth[int(uid)]
            logit = planted.prior_logit + (planted.llr["blood"] if there else 0.0)
            p, q = 1 / (1 + np.exp(-logit)), 1 / (1 + np.exp(-np.log(probability / (1 - probability)) / temperature))
            found.append(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    assert len(found) == 240
    assert under(bench, "mcar").rows[2].metrics["regret"].value == pytest.approx(np.mean(found), rel=1e-4)


def test_the_report_shows_the_conditions(finished: tuple[Path, Bench]) -> None:
    text = (finished[0] / "out" / "results.md").read_text()
    assert "| system | clean | sigma | swap | mcar |" in text
    assert "Regret in nats: mean KL from the exact posterior:" in text
    assert "Holm's correction for the 2 systems" in text


def test_all_systems_and_seeds_meet_the_same_disturbance(finished: tuple[Path, Bench]) -> None:
    cells = [cell for cell in prepared(finished[0], *CONDITIONS).cells if cell.fold == 0]
    for name in CONDITIONS:
        files = [next((Path(cell.url) / "predictions").glob(f"ood@{name}-*.parquet")) for cell in cells]
        found = [read_predictions(open_store(str(file.parent)), file.name) for file in files]
        assert len({tuple(one.present.tobytes() for one in parts) for parts in found}) == 1


def test_a_new_condition_trains_nothing_again(finished: tuple[Path, Bench], extended: Extended) -> None:
    assert [len(cells) for cells in extended.cells] == [10, 10]
    assert extended.stamps[0] == extended.stamps[1]
    assert extended.before.conditions == finished[1].conditions[:3]
    assert run(finished[0], *CONDITIONS) == (finished[1], [])


def trained(folder: Path) -> dict[Path, int]:
    files = [*folder.glob("out/cells/*/*/cell.json"), *folder.glob("out/cells/*/*/run/model/*")]
    assert files
    return {file: file.stat().st_mtime_ns for file in files}


def test_a_cell_without_one_of_its_conditions_is_finished_later(finished: tuple[Path, Bench], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished[0] / "raw", folder / "raw")
    shutil.copytree(finished[0] / "out", folder / "out")
    bench = prepared(folder, *CONDITIONS)
    (lost,) = folder.glob("out/cells/logistic_regression/fold-1-seed-0-*/predictions/ood@swap-*.parquet")
    content = lost.read_bytes()
    lost.unlink()
    heard = Quiet()
    run_bench(bench, Serial(), heard)
    assert heard.cells == ["logistic_regression, fold 1, seed 0"]
    assert lost.read_bytes() == content


def test_a_condition_that_fits_nothing_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    job = load_bench_job(write_job(tmp_path), ["conditions={blur: {operation: {kind: downsample, grid: [1, 8]}}}"])
    with pytest.raises(SpecError, match="downsample: expected a modality that it fits"):
        prepare_bench(job, write_export(tmp_path / "raw"), str(tmp_path / "out"), KEY, Quiet())
    assert not (tmp_path / "out" / "cells").exists()


def test_conditions_added_later_are_those_predicted_at_once(finished: tuple[Path, Bench]) -> None:
    folder, bench = finished
    stamps = trained(folder)
    for file in folder.glob("out/cells/*/*/predictions/ood@*.parquet"):
        file.unlink()
    again, cells = run(folder, *CONDITIONS)
    assert (len(cells), trained(folder)) == (10, stamps)
    assert again.conditions == bench.conditions


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAF_SUBJECT_KEY", KEY.decode())
    out, said = tmp_path / "out", tmp_path / "said"
    words = ["bench", str(write_job(tmp_path)), "--raw", str(write_export(tmp_path / "raw"))]
    words += ["--out", str(out), "--executor", "serial", "--json"]
    for setting in (*overrides("mcar"), f"systems={{mean: {{model: {INNER}}}}}", "baselines=[]", "seeds=[0]"):
        words += ["--set", setting]
    process = started(draf, said, *words)
    while not list(out.glob("cells/mean/fold-0*/run/checkpoints/step-*")):
        assert process.exitcode is None, said.read_text()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not list(out.glob("cells/mean/fold-0*/cell.json"))
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    (ledger,) = out.glob("cells/mean/fold-0*/run/ledger.jsonl")
    assert [json.loads(line)["event"] for line in ledger.read_text().splitlines()].count("attempt") == 2
    assert [condition.name for condition in Bench.model_validate_json(done.stdout).conditions] == ["clean", "mcar"]

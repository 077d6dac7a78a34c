"""`draf bench` on a small export with a planted signal: whole, continued, changed, interrupted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from planted_wards import write_export, write_job

from draf_dist.data.loader import evaluation_batches
from draf_dist.errors import DataError, DrafError, SpecError
from draf_dist.evaluation import bench_folds
from draf_dist.evaluation.bench import Prepared, prepare_bench, run_bench
from draf_dist.evaluation.bench_job import load_bench_job
from draf_dist.evaluation.bench_missing import MissingFromStart
from draf_dist.evaluation.bench_results import Bench
from draf_dist.executor import GRACE_S, Executor, Processes, Serial
from draf_dist.sources.synth import synthesise

KEY = b"sixteen or more bytes of key"


class Heard:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.cells: list[str] = []
        self.failures: list[str] = []

    def fold(self, number: int, num_folds: int) -> None: ...

    def cell(self, cell: object, result: object, finished: int, total: int) -> None:
        self.cells.append(cell.name)

    def failed(self, cell: object, message: str) -> None:
        self.failures.append(cell.name)

    def scoring(self) -> None: ...


def prepared(folder: Path, *overrides: str, heard: Heard | None = None) -> Prepared:
    job = load_bench_job(write_job(folder), overrides)
    raw = folder / "raw"
    return prepare_bench(job, raw if raw.exists() else write_export(raw), str(folder / "out"), KEY, heard or Heard())


def run(folder: Path, *overrides: str, executor: Executor | None = None) -> tuple[Bench, Heard]:
    heard = Heard()
    return run_bench(prepared(folder, *overrides), executor or Serial(), heard), heard


def written(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bench]:
    folder = tmp_path_factory.mktemp("bench")
    return folder, run(folder)[0]


def copy_of(finished: tuple[Path, Bench], folder: Path) -> Path:
    """The finished benchmark, to be changed; releases and jobs name it by its own path."""
    shutil.copytree(finished[0], folder, dirs_exist_ok=True)
    return folder


def test_every_study_is_predicted_once_and_the_planted_signal_is_found(finished: tuple[Path, Bench]) -> None:
    folder, bench = finished
    assert [row.system for row in bench.rows] == ["mean", "draf", "logistic_regression"]
    assert (bench.about.num_studies, bench.about.num_subjects, bench.about.num_sites) == (240, 228, 8)
    regression = bench.rows[2].metrics["auroc"]
    # The exact posterior has AUROC Phi(1.5 / sqrt 2) = .856.
    assert 0.8 < regression.value < 0.92
    assert regression.low < regression.value < regression.high
    assert all(bench.rows[i].differences["auroc"].low is not None for i in (1, 2))
    assert bench.rows[0].differences == {}
    assert "| logistic_regression |" in (folder / "out" / "results.md").read_text()


def test_predictions_of_baselines_have_the_columns_of_networks(finished: tuple[Path, Bench]) -> None:
    cells = finished[0] / "out" / "cells"
    (network,) = (cells / "mean").glob("fold-0*/predictions/ood.parquet")
    (baseline,) = (cells / "logistic_regression").glob("fold-0*/predictions/ood.parquet")
    assert pq.read_schema(network).names == pq.read_schema(baseline).names
    assert pq.read_table(network)["uid"].to_pylist() == pq.read_table(baseline)["uid"].to_pylist()


def test_the_same_command_repeats_no_finished_cell(finished: tuple[Path, Bench]) -> None:
    folder, bench = finished
    before = written(folder / "out")
    again, heard = run(folder)
    after = written(folder / "out")
    changed = {path for path in after if after[path] != before.get(path)}
    assert changed == {"bench.json", "results.md"}
    assert (again, heard.cells) == (bench, [])


def test_changing_one_system_repeats_its_cells_alone(finished: tuple[Path, Bench]) -> None:
    folder, bench = finished
    before = written(folder / "out")
    changed, heard = run(folder, "systems.draf.model.reliability_alpha=64")
    assert heard.cells == ["draf, fold 0, seed 0", "draf, fold 1, seed 0"]
    after = written(folder / "out")
    assert all(after[path] == before[path] for path in before if path not in ("bench.json", "results.md"))
    # Holm's p of every row is corrected for what the other rows are.
    of_others = [[row.model_copy(update={"holm": {}}) for row in (found.rows[0], found.rows[2])] for found in (changed, bench)]
    assert of_others[0] == of_others[1]
    assert run(folder)[0] == bench


def test_several_processes_give_the_same_table(finished: tuple[Path, Bench], tmp_path: Path) -> None:
    parallel, heard = run(tmp_path, executor=Processes(2))
    assert len(heard.cells) == 6
    assert [row.model_copy(update={"wall_s": 0.0}) for row in parallel.rows] == [
        row.model_copy(update={"wall_s": 0.0}) for row in finished[1].rows
    ]


def test_a_failed_cell_loses_no_other_and_is_named_at_the_end(tmp_path: Path) -> None:
    heard = Heard()
    bench = prepared(tmp_path, "systems.draf.optimizer={learning_rate: 1e30}")
    with pytest.raises(DrafError) as raised:
        run_bench(bench, Serial(), heard)
    assert heard.failures == ["draf, fold 0, seed 0", "draf, fold 1, seed 0"]
    assert sorted(heard.cells) == [f"{name}, fold {k}, seed 0" for name in ("logistic_regression", "mean") for k in (0, 1)]
    text = str(raised.value)
    assert "draf, fold 0, seed 0: " in text
    assert "learning_rate" in text
    assert "4 of 6 cells are finished, 2 failed" in text
    # Mended, only these are trained.
    assert run(tmp_path)[1].cells == heard.failures


def test_a_model_that_saw_a_subject_of_its_fold_is_refused(finished: tuple[Path, Bench]) -> None:
    made = prepared(finished[0])
    fold, release = made.plan.folds[0], made.releases[0]
    assert len(bench_folds.check_fold(release, fold)) == sum(fold.class_counts)
    with pytest.raises(DataError, match="all subjects of the fold in ood"):
        bench_folds.check_fold(made.releases[1], fold)


def test_travellers_are_held_out_at_both_wards(finished: tuple[Path, Bench]) -> None:
    made = prepared(finished[0])
    ood = [release.manifest.receipts["ood"].count for release in made.releases]
    own = [len(bench_folds.check_fold(release, fold)) for release, fold in zip(made.releases, made.plan.folds, strict=True)]
    assert sum(own) == 240
    assert sum(ood) > 240
    assert all(release.manifest.receipts["test"].count == 0 for release in made.releases)


def test_another_benchmark_does_not_enter_the_folder(finished: tuple[Path, Bench]) -> None:
    with pytest.raises(SpecError, match=r"folds\.json: expected the plan of this benchmark"):
        prepared(finished[0], "folds=4")


def test_what_studies_lost_by_their_label_is_lost_in_training_and_in_the_fold(tmp_path: Path) -> None:
    law = "missing_from_start={rate: 0.4, slope: 2, score: label}"
    bench, _ = run(tmp_path, law, "systems={mean: {}}", "baselines=[]")
    assert bench.about.missing_from_start == MissingFromStart(rate=0.4, slope=2, score="label")
    # How many are missing: .8 of the studies have two tables; by P(lost) .94 and .17 the sick have fewer in most pairs.
    assert bench.about.auroc_of_absence == pytest.approx(0.75, abs=0.1)
    said = "more in the sicker by the label: rate 0.4, slope 2. How many are missing has by itself AUROC 0."
    assert said in (tmp_path / "out" / "results.md").read_text()
    ready = prepared(tmp_path, law, "systems={mean: {}}", "baselines=[]")
    for split in ("train", "ood"):
        batches = list(evaluation_batches(ready.releases[0], split, 64))
        died = torch.cat([batch.classes.label for batch in batches]).bool()
        blood = torch.cat([batch.present[:, 0] for batch in batches]).double()
        # P(lost) is .94 and .17, for standardised labels of 1.5 and -.65. Every fifth study has blood alone and keeps it; of the
        # others that lose both half get it back: .8 (p - p^2 / 2) are without.
        assert blood[died].mean() == pytest.approx(0.60, abs=0.12)
        assert blood[~died].mean() == pytest.approx(0.88, abs=0.07)
    with pytest.raises(SpecError, match=r"folds\.json: expected the plan of this benchmark"):
        prepared(tmp_path)
    with pytest.raises(SpecError, match="--truth: expected absence that says nothing, found missing_from_start"):
        run_bench(ready, Serial(), Heard(), truth={})


def test_folds_of_different_exports_are_refused_before_anything_is_trained(finished: tuple[Path, Bench], tmp_path: Path) -> None:
    folder = copy_of(finished, tmp_path / "copy")
    shutil.rmtree(folder / "out" / "releases" / "fold-1")
    write_export(folder / "raw", num_stays=232)
    with pytest.raises(DataError, match="the studies of the other folds"):
        prepared(folder)


@pytest.mark.slow
def test_a_stopped_command_goes_on_where_it_was(tmp_path: Path) -> None:
    job, out = write_job(tmp_path), tmp_path / "out"
    command = [sys.executable, "-m", "draf_dist.cli.app", "bench", str(job), "--raw", str(write_export(tmp_path / "raw"))]
    command += ["--out", str(out), "--executor", "processes:1", "--json"]
    # Long enough to be met while training.
    for setting in ("finetune.epochs=8", "finetune.patience=8", "systems={mean: {}}", "baselines=[]"):
        command += ["--set", setting]
    environment = os.environ | {"DRAF_SUBJECT_KEY": KEY.decode(), "OMP_NUM_THREADS": "1"}
    errors = stop_at_first_checkpoint(command, environment, out)
    assert "Run the same command again" in errors
    assert not list(out.glob("cells/mean/fold-0*/cell.json"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (ledger,) = out.glob("cells/mean/fold-0*/run/ledger.jsonl")
    events = [json.loads(line)["event"] for line in ledger.read_text().splitlines()]
    assert events.count("attempt") == 2
    found = Bench.model_validate_json(done.stdout)
    assert np.isfinite(found.rows[0].metrics["nll"].value)


def stop_at_first_checkpoint(command: list[str], environment: dict[str, str], out: Path) -> str:
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not list(out.glob("cells/mean/fold-0*/run/checkpoints/step-*")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        # Sooner than a worker that does not listen would be killed.
        _, errors = process.communicate(timeout=GRACE_S - 10)
    finally:
        process.kill()
    assert process.returncode == 5, errors
    return errors


def test_baselines_on_images_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    synthesise(tmp_path / "synth", num_sites=2, num_subjects=40, seed=0)
    path = tmp_path / "bench.yaml"
    path.write_text(
        f"name: images\ncard: {tmp_path / 'synth' / 'card.yaml'}\nfolds: 2\nsystems: {{mean: {{model: {{kind: mean}}}}}}\n"
        "baselines: [{kind: logistic_regression}]\nreference: mean\n"
    )
    with pytest.raises(SpecError, match=r"found images \(cxr\)"):
        prepare_bench(load_bench_job(path), tmp_path / "synth" / "raw", str(tmp_path / "out"), KEY, Heard())
    assert not (tmp_path / "out" / "cells").exists()

"""A trained run on synthetic hospitals, evaluated: each study once, every part written, the same bytes twice."""

import io
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import S3
from forked_command import draf, started
from rich.console import Console
from small_runs import small_job, small_model

from draf_dist.data.corruption import CorruptedSplit, Corruptor, EhrNoise, GaussianNoise, Missing, MissingNotAtRandom, Swap
from draf_dist.data.loader import SplitLoader
from draf_dist.data.prepare import prepare
from draf_dist.data.release import Release, open_release
from draf_dist.data.verify import verify
from draf_dist.errors import DataError, InterruptedRunError, SpecError
from draf_dist.evaluation import parts
from draf_dist.evaluation.evaluate import check_predictions, evaluate, read_evaluation, results_folder
from draf_dist.evaluation.job import EvaluateJob, SweepSettings
from draf_dist.evaluation.parts import Place
from draf_dist.evaluation.predict import Predictor, check_coverage
from draf_dist.evaluation.predictions import Applied, concatenate, read_predictions
from draf_dist.evaluation.results import Evaluation
from draf_dist.evaluation.spread import Workers
from draf_dist.evaluation.subject import open_subject
from draf_dist.executor import Outcome, Processes, ResultT, Serial, TaskT
from draf_dist.sources.card import load_card
from draf_dist.sources.hospital_export import HospitalExport
from draf_dist.sources.synth import synthesise
from draf_dist.sources.synth.truth import posterior_by_uid
from draf_dist.storage import Store, open_store
from draf_dist.training.job import FinetuneJob
from draf_dist.training.run import train
from draf_dist.training.run_folder import open_run

KEY = b"a key of the tests"
SWEEP = SweepSettings(
    operations=(
        GaussianNoise(grid=(0, 0.8)),
        EhrNoise(grid=(0, 3.2, 10.0)),
        Swap(),
        Missing(grid=(0, 0.5)),
        MissingNotAtRandom(grid=(0, 0.5)),
    ),
    passes=3,
    max_studies=12,
)
JOB = EvaluateJob(passes=4, bootstrap=40, sweep=SWEEP)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """export/, release/ and run/: a small DRAF trained for two epochs."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("evaluate")
    synthesise(folder / "export", num_sites=4, num_subjects=160, seed=2)
    source = HospitalExport(load_card(folder / "export" / "card.yaml"), folder / "export" / "raw")
    release = prepare(source, str(folder / "release"), subject_key=KEY)
    job = small_job(release.url, batch_size=32, epochs=2, passes_eval=4)
    train(job, str(folder / "run"), console=Console(file=io.StringIO()))
    return folder


@pytest.fixture(scope="module")
def evaluation(folder: Path) -> Evaluation:
    return evaluate(str(folder / "run"), JOB, truth=posterior_by_uid(folder / "export" / "truth", KEY))


@pytest.fixture(scope="module")
def release(folder: Path) -> Release:
    return open_release(str(folder / "release"))


@pytest.fixture(scope="module")
def store(folder: Path, evaluation: Evaluation) -> Store:
    return open_store(str(folder / "run"))


def test_every_study_of_every_split_is_predicted_once(store: Store, release: Release) -> None:
    for split in ("val", "test", "ood"):
        (predictions,) = read_predictions(store, f"predictions/{split}.parquet")
        check_coverage(predictions, release.manifest.receipts[split])
        assert predictions.probability.sum(axis=1) == pytest.approx(1, abs=1e-6)
        assert predictions.total == pytest.approx(predictions.aleatoric + predictions.epistemic, abs=1e-6)
        assert (predictions.reliability[~predictions.present] == 0).all()


def test_a_repeated_or_lost_study_is_noticed(store: Store, release: Release) -> None:
    (predictions,) = read_predictions(store, "predictions/test.parquet")
    for wrong in (
        predictions.rows(np.arange(1, predictions.num_studies)),
        concatenate([predictions, predictions.rows(np.array([0]))]),
    ):
        with pytest.raises(DataError, match="each once"):
            check_coverage(wrong, release.manifest.receipts["test"])


def test_the_same_evaluation_gives_the_same_bytes(folder: Path, store: Store) -> None:
    paths = ["evaluation.json", "report.html", *store.list("predictions")]
    before = {path: store.read(path) for path in paths}
    evaluate(str(folder / "run"), JOB, truth=posterior_by_uid(folder / "export" / "truth", KEY))
    assert {path: store.read(path) for path in paths} == before


def test_validation_nll_is_that_of_training(folder: Path, evaluation: Evaluation) -> None:
    best = open_run(str(folder / "run")).end()
    assert best is not None
    assert evaluation.temperature.nll_raw == pytest.approx(best["best_loss"], abs=1e-6)
    assert evaluation.temperature.nll_scaled <= evaluation.temperature.nll_raw


def test_a_prediction_does_not_depend_on_its_batch(folder: Path, store: Store) -> None:
    (before,) = read_predictions(store, "predictions/test.parquet")
    other = JOB.model_copy(update={"batch_size": 7, "sweep": None, "bootstrap": 0})
    copy = folder / "copy"
    shutil.copytree(folder / "run", copy)
    evaluate(str(copy), other)
    (after,) = read_predictions(open_store(str(copy)), "predictions/test.parquet")
    assert (after.uid == before.uid).all()
    assert after.probability == pytest.approx(before.probability, abs=1e-6)


def test_what_is_stored_is_valid_json_without_a_subject(store: Store, evaluation: Evaluation, release: Release) -> None:
    assert read_evaluation(store) == evaluation
    text = store.read("evaluation.json").decode() + store.read("report.html").decode()
    json.loads(store.read("evaluation.json"), parse_constant=lambda name: pytest.fail(f"{name} in evaluation.json"))
    for subject in set(release.subjects()["subject"].to_pylist()):
        assert subject not in text
    assert not re.search(r"https?://", text)


def test_the_sweep_has_every_cell_of_its_grid(evaluation: Evaluation) -> None:
    assert evaluation.sweep is not None
    found = {(cell.operation, cell.modality): [] for cell in evaluation.sweep.cells}
    for cell in evaluation.sweep.cells:
        found[cell.operation, cell.modality].append(cell.level)
    assert found["gaussian", "cxr"] == ["0.8"]
    assert found["ehr_noise", "vitals"] == found["ehr_noise", "all"] == ["3.2", "10"]
    assert found["missing", "all"] == found["missing_not_at_random", "all"] == ["0.5"]
    assert {modality for operation, modality in found if operation == "swap"} == set(evaluation.about.modalities)
    assert {(c.operation, c.modality) for c in evaluation.sweep.removals} >= {("remove", "cxr"), ("only", "history")}
    assert evaluation.sweep.num_studies == 12


def test_a_cell_is_the_corruption_that_the_data_layer_defines(folder: Path, store: Store, release: Release) -> None:
    subject = open_subject(str(folder / "run"), None)
    corruptor = Corruptor(subject.run.job.corruption, subject.normaliser, seed=JOB.seed)
    predictor = Predictor(subject.exported.model, release.schema, SWEEP.passes, JOB.seed)
    stored = {part.applied: part for part in read_predictions(store, "predictions/test@ehr_noise.parquet")}
    swept = stored[Applied("ehr_noise", 2, "labs")]
    corrupted = CorruptedSplit(SplitLoader(release, "test", JOB.batch_size), corruptor, seed=JOB.seed)
    whole = predictor.predict(corrupted.batches(SWEEP.operations[1], 2, "labs"), split="test")
    rows = np.isin(whole.uid, swept.uid)
    assert swept.num_studies == 12
    assert swept.probability == pytest.approx(whole.probability[rows], abs=1e-6)
    assert (swept.severity[swept.present[:, 2], 2] == 1).all()
    assert (swept.severity[:, :2] == 0).all()


def test_removing_a_modality_removes_it(store: Store) -> None:
    for part in read_predictions(store, "predictions/test@remove.parquet"):
        m = part.modalities.index(part.applied.modality)
        assert not part.present[:, m].any()
        assert (part.reliability[:, m] == 0).all()
    for part in read_predictions(store, "predictions/test@only.parquet"):
        assert (part.present.sum(axis=1) == 1).all()


def test_regret_is_reported_overall_by_pattern_and_by_removal(evaluation: Evaluation) -> None:
    for split in evaluation.splits:
        assert split.regret is not None
        assert split.regret.expected.low > 0
        groups = [group for group in split.by_pattern if group.regret is not None]
        total = sum(group.num_studies * group.regret.expected.value for group in groups if group.regret)
        assert total / split.num_studies == pytest.approx(split.regret.expected.value)
        gain = split.scaled["nll"].value - split.regret.posterior["nll"].value
        assert split.regret.observed.value == pytest.approx(gain)
    assert evaluation.sweep is not None
    assert all(cell.regret is not None for cell in evaluation.sweep.removals)


def test_a_run_that_is_not_finished_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run" / "model" / "model.json").unlink()  # a kill in the middle of the export: it comes last
    with pytest.raises(SpecError, match="expected a finished run"):
        evaluate(str(tmp_path / "run"), JOB)


def test_an_evaluation_leaves_no_file_of_an_earlier_one(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run" / "predictions").mkdir(exist_ok=True)
    (tmp_path / "run" / "predictions" / "test@jpeg.parquet").write_bytes(b"of an earlier evaluation")
    evaluate(str(tmp_path / "run"), JOB.model_copy(update={"sweep": None, "bootstrap": 0}))
    files = sorted(path.name for path in (tmp_path / "run" / "predictions").iterdir())
    assert files == ["ood.parquet", "test.parquet", "val.parquet"]


def test_a_release_of_another_schema_is_refused(folder: Path, tmp_path: Path) -> None:
    synthesise(tmp_path / "export", num_sites=2, num_subjects=60, seed=1)
    card = (tmp_path / "export" / "card.yaml").read_text()
    (tmp_path / "export" / "card.yaml").write_text(re.sub(r"name: labs", "name: bloods", card))
    source = HospitalExport(load_card(tmp_path / "export" / "card.yaml"), tmp_path / "export" / "raw")
    other = prepare(source, str(tmp_path / "release"), subject_key=KEY)
    verify(other)
    with pytest.raises(DataError, match="modalities cxr, vitals, labs"):
        evaluate(str(folder / "run"), JOB, release_url=other.url)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """Of other hospitals."""
    folder = tmp_path_factory.mktemp("other")
    synthesise(folder / "export", num_sites=4, num_subjects=120, seed=9)
    source = HospitalExport(load_card(folder / "export" / "card.yaml"), folder / "export" / "raw")
    return prepare(source, str(folder / "release"), subject_key=KEY)


def test_with_a_release_that_is_given_the_model_keeps_its_own_statistics(folder: Path, other: Release) -> None:
    subject = open_subject(str(folder / "run"), other.url)
    assert subject.release.version == other.version
    assert subject.exported.stats != other.stats
    assert torch.equal(
        subject.normaliser.constants("cxr", torch.zeros(1))[0], torch.tensor(subject.exported.stats.images["cxr"].mean)
    )


def test_a_release_that_is_given_fits_nothing(folder: Path, evaluation: Evaluation, other: Release, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    there = evaluate(str(tmp_path / "run"), JOB.model_copy(update={"sweep": None}), release_url=other.url)
    assert there.temperature == evaluation.temperature
    assert there.splits[0].num_studies == other.manifest.receipts["test"].count
    # What was found of the run's own release is still what stands in the run.
    store = open_store(str(tmp_path / "run"))
    assert read_evaluation(store) == evaluation
    where = results_folder(there.about)
    assert where == f"evaluations/{other.version}/"
    assert {f"{where}evaluation.json", f"{where}report.html", f"{where}predictions/test.parquet"} <= set(store.list(where))
    assert read_predictions(store, "predictions/test.parquet")[0].num_studies == evaluation.splits[0].num_studies


@pytest.mark.parametrize("kind", ["mean", "concat", "late_mean"])
def test_every_fusion_model_is_trained_and_evaluated_to_the_report(kind: str, folder: Path, tmp_path: Path) -> None:
    run = open_run(str(folder / "run"))
    model = small_model(kind)
    job = {**run.job.model_dump(mode="json"), "name": kind, "model": model, "epochs": 1}
    train(FinetuneJob.model_validate(job), str(tmp_path / "run"), console=Console(file=io.StringIO()))
    found = evaluate(str(tmp_path / "run"), JOB)
    assert found.about.model == kind
    assert (tmp_path / "run" / "report.html").read_text().rstrip().endswith("</html>")
    assert pq.read_table(tmp_path / "run" / "predictions" / "test.parquet").num_rows == found.splits[0].num_studies


@dataclass
class Watched:
    """One process that counts what it does; after so many parts something happens."""

    parts: int = 0
    happens: Callable[[], object] = lambda: None
    tasks: int = field(default=0, init=False)

    def map(self, function: Callable[[TaskT], ResultT], tasks: Sequence[TaskT]) -> Generator[Outcome[ResultT], None, None]:
        for outcome in Serial().map(function, tasks):
            self.tasks += 1
            if self.tasks == self.parts:
                self.happens()
            yield outcome


def stop() -> None:
    raise KeyboardInterrupt


CUT = JOB.model_copy(update={"batch_size": 8, "bootstrap": 0})
FINE = {"CLEAN_STUDIES": 16, "SWEEP_STUDIES": 4}


@pytest.fixture
def fine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts so small that every split has several parts; where it is cut changes no number."""
    for name, value in FINE.items():
        monkeypatch.setattr(parts, name, value)


@pytest.fixture(scope="module")
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Of an evaluation by one process that nothing disturbed."""
    copy = copied(folder, tmp_path_factory.mktemp("undisturbed"))
    evaluate(copy.url, CUT)
    return written(copy)


def copied(folder: Path, out: Path | str) -> Store:
    """A copy of the run, not evaluated."""
    store, run = open_store(f"{out}/run"), folder / "run"
    for path in (run / "job.yaml", *(run / "model").iterdir()):
        store.write(path.relative_to(run).as_posix(), path.read_bytes())
    return store


def stored_parts(store: Store) -> list[str]:
    return [path for path in store.list("evaluating") if path.endswith(".part")]


def written(store: Store) -> dict[str, bytes]:
    assert store.list("evaluating") == []
    return {path: store.read(path) for path in ("evaluation.json", "report.html", *store.list("predictions"))}


def continued(copy: Store) -> tuple[int, int]:
    """Evaluates to the end; how many parts there were already, and how many in all."""
    counted, shown = Watched(), list[tuple[int, int]]()
    workers = Workers(counted, Place())
    evaluate(copy.url, CUT, workers=workers, on_progress=lambda _, done, total: shown.append((done, total)))
    before, total = shown[0]
    assert counted.tasks == total - before
    return before, total


@pytest.mark.usefixtures("fine")
def test_two_processes_write_the_bytes_of_one(folder: Path, results: dict[str, bytes], tmp_path: Path) -> None:
    copy = copied(folder, tmp_path)
    evaluate(copy.url, CUT, workers=Workers(Processes(2), Place()))
    assert written(copy) == results


def evaluate_finely(folder: Path, url: str) -> None:
    vars(parts).update(FINE)
    (folder / "job.yaml").write_text(CUT.model_dump_json())
    draf(folder / "said", "evaluate", url, "--job", str(folder / "job.yaml"))


@pytest.mark.usefixtures("fine")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_killed_at_any_moment_the_same_evaluation_goes_on(
    number: signal.Signals, folder: Path, results: dict[str, bytes], tmp_path: Path
) -> None:
    copy = copied(folder, tmp_path)
    process = started(evaluate_finely, tmp_path, copy.url)
    while len(stored_parts(copy)) < 3:
        assert process.exitcode is None
        time.sleep(0.002)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == (-number if number == signal.SIGKILL else InterruptedRunError.exit_code)
    assert not copy.exists("evaluation.json")
    stored = len(stored_parts(copy))
    before, total = continued(copy)
    assert before == stored
    assert 3 <= before < total
    assert written(copy) == results


@pytest.mark.usefixtures("fine")
def test_on_s3_a_damaged_part_is_made_again(folder: Path, results: dict[str, bytes], s3: S3) -> None:
    copy = copied(folder, s3.url)
    with pytest.raises(KeyboardInterrupt):
        evaluate(copy.url, CUT, workers=Workers(Watched(6, stop), Place()))
    paths = stored_parts(copy)
    assert len(paths) == 6
    data = bytearray(copy.read(paths[0]))
    data[-5] ^= 1
    copy.write(paths[0], bytes(data))
    assert continued(copy)[0] == 5
    assert written(copy) == results


@pytest.mark.usefixtures("fine")
@pytest.mark.parametrize("settings", [{"passes": 3, "sweep": None}, {}], ids=["others", "the_same"])
def test_another_evaluation_of_the_run_meanwhile_changes_nothing(
    settings: dict[str, object], folder: Path, results: dict[str, bytes], tmp_path: Path
) -> None:
    copy, other = copied(folder, tmp_path), CUT.model_copy(update=settings)
    executor = Watched(6, lambda: evaluate(copy.url, other))
    shown = list[tuple[int, int]]()
    found = evaluate(
        copy.url, CUT, workers=Workers(executor, Place()), on_progress=lambda _, done, total: shown.append((done, total))
    )
    assert written(copy) == results
    check_predictions(copy, found)
    # Of other settings no part is touched; those that both had are removed by the first that is done, and made again.
    assert executor.tasks == shown[0][1] + (6 if other == CUT else 0)

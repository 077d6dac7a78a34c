"""One trial: continued from its run folders alone; and what its numbers are."""

import math
from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
from small_runs import ENCODERS, silent, small_job, small_release
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from draf_dist.storage import open_store
from draf_dist.training.pretrain_job import PretrainJob
from draf_dist.training.run import ONE_PROCESS, EpochReport, RunResult, attempt_by_epochs
from draf_dist.training.run_folder import open_run
from draf_dist.training.tracking import Hparams, write_hparams
from draf_dist.tuning.trial import Progress, durable_epochs, trial_epochs


class Never:
    requested = None


def carry_out(url: str) -> Generator[EpochReport, None, RunResult]:
    return attempt_by_epochs(url, ONE_PROCESS, silent(), Never())


def hold(run: str) -> AbstractContextManager[None]:
    return nullcontext()


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_release(tmp_path_factory.mktemp("trial"), num_subjects=60, seed=0)


def to_end(trial: Generator[Progress, None, Progress]) -> tuple[list[Progress], Progress]:
    seen: list[Progress] = []
    while True:
        try:
            seen.append(next(trial))
        except StopIteration as ended:
            return seen, ended.value


def pretraining(release: str) -> PretrainJob:
    objective = {"kind": "masked_values", "modality": "vitals"}
    tree = {"name": "pre", "release": release, "objective": objective, "encoder": ENCODERS["series"], "width": 8}
    return PretrainJob.model_validate({**tree, "batch_size": 16, "epochs": 1})


def test_a_trial_that_is_continued_hands_over_all_its_epochs_once_more(release: str, tmp_path: Path) -> None:
    job, url = small_job(release, epochs=3), str(tmp_path)
    whole, last = to_end(trial_epochs(job, None, str(tmp_path / "whole"), carry_out, hold))
    first = trial_epochs(job, None, url, carry_out, hold)
    killed = next(first)
    first.close()
    again, end = to_end(trial_epochs(job, None, url, carry_out, hold))
    assert [(each.epochs, each.best_epoch, each.numbers) for each in again] == [
        (each.epochs, each.best_epoch, each.numbers) for each in whole
    ]
    assert (killed.epochs, killed.numbers) == (1, whole[0].numbers)
    assert [line["event"] for line in open_run(f"{url}/{end.run}").ledger()].count("attempt") == 2
    # Over all attempts, and over this one.
    assert end.training_s > end.spent_s > 0
    # One that had ended is not trained again.
    finished, _ = to_end(trial_epochs(job, None, url, carry_out, hold))
    assert len(finished) == 3
    assert finished[-1].spent_s == 0
    assert last.numbers == end.numbers


def test_the_numbers_are_those_of_the_epoch_whose_weights_are_kept(release: str, tmp_path: Path) -> None:
    seen, end = to_end(trial_epochs(small_job(release, epochs=4), None, str(tmp_path), carry_out, hold))
    folder = open_run(f"{tmp_path}/{end.run}")
    ended = folder.end()
    assert end.numbers["nll"] == ended["best_loss"]
    (epoch,) = [report for report in durable_epochs(folder) if report.epoch == end.best_epoch]
    assert (epoch.step, epoch.numbers) == (ended["best_step"], end.numbers)
    assert end.numbers["nll_scaled"] <= end.numbers["nll"]
    assert 0.05 <= end.numbers["temperature"] <= 20
    # Numbers of an epoch don't get better afterwards.
    assert [each.numbers["nll"] for each in seen] == sorted((each.numbers["nll"] for each in seen), reverse=True)


def test_trials_with_the_same_pretraining_share_its_run(release: str, tmp_path: Path) -> None:
    held: list[str] = []

    def holding(run: str) -> AbstractContextManager[None]:
        held.append(run)
        return hold(run)

    pre = pretraining(release)
    jobs = [small_job(release, epochs=1, seed=seed) for seed in (0, 1)]
    ends = [to_end(trial_epochs(job, pre, str(tmp_path), carry_out, holding))[1] for job in jobs]
    assert ends[0].pretraining == ends[1].pretraining == pre.run_name
    assert held == [pre.run_name, ends[0].run, pre.run_name, ends[1].run]
    attempts = [line for line in open_run(f"{tmp_path}/{pre.run_name}").ledger() if line["event"] == "attempt"]
    assert len(attempts) == 1
    # The encoder is pinned by its content.
    pinned = open_run(f"{tmp_path}/{ends[0].run}").job.pretrained["vitals"]
    assert pinned.startswith(f"{tmp_path}/{pre.run_name}@")


def test_hparams_are_read_back_by_tensorboard(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("hparams/trial-0009/old", b"of a trial that is gone")
    settings = {"finetune.model.reliability_alpha": 2.5, "pretrain.objective.tau": 0.1, "finetune.model.kind": "draf"}
    write_hparams(store, "hparams", [Hparams(f"trial-{n}", settings, {"objective": 0.4 + n}) for n in (0, 1)])
    assert sorted(path.name for path in (tmp_path / "hparams").iterdir() if any(path.iterdir())) == ["trial-0", "trial-1"]
    for number in (0, 1):
        accumulator = EventAccumulator(str(tmp_path / "hparams" / f"trial-{number}")).Reload()
        content = accumulator.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        found = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
        assert found["finetune.model.reliability_alpha"].number_value == 2.5
        assert found["finetune.model.kind"].string_value == "draf"
        (event,) = accumulator.Scalars("objective")[:1]
        assert math.isclose(event.value, 0.4 + number, rel_tol=1e-6)

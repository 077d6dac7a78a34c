"""A run on several ranks is the run of one process: same order, same numbers, one set of books; and any number of ranks goes on."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from forked_ranks import run_on_ranks
from grown_release import grown_release
from small_runs import silent, small_job, small_model, small_release

from draf_dist.data.release import open_release
from draf_dist.errors import InterruptedRunError, SpecError
from draf_dist.models.fusion.draf import DrafConfig
from draf_dist.training.deepspeed_config import DeepSpeedConfig
from draf_dist.training.deepspeed_engine import DeepSpeedRanks
from draf_dist.training.job import FinetuneJob
from draf_dist.training.journal import Line
from draf_dist.training.ledger import receipts_by_epoch, receipts_by_source
from draf_dist.training.run import attempt, begin, train
from draf_dist.training.run_folder import open_run
from draf_dist.training.torch_engine import OneProcess

WORLDS = (3,)


@dataclass
class StopAfter:
    """Asks to stop from the n-th time it is asked, so after step n of this attempt. None: never."""

    asked_at: int | None
    times: int = 0

    @property
    def requested(self) -> str | None:
        self.times += 1
        return "SIGTERM" if self.asked_at is not None and self.times >= self.asked_at else None


def run_rank(rank: int, world: int, url: str, stop_at: int | None, stage: int) -> None:
    """One process: carries the run on. Only the last rank hears that it is to stop."""
    backend = DeepSpeedRanks(DeepSpeedConfig.model_validate({"zero_stage": stage}), torch.device("cpu"))
    stop = StopAfter(stop_at if rank == world - 1 else None)
    if stop_at is None:
        assert attempt(url, backend, silent(), stop).finished
    else:
        with pytest.raises(InterruptedRunError):
            attempt(url, backend, silent(), stop)


def on_ranks(job: FinetuneJob, out: Path, world: int, *, stop_at: int | None = None, stage: int = 2) -> Path:
    run_on_ranks(run_rank, world, begin(job, str(out)).url, stop_at, stage)
    return out


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> FinetuneJob:
    folder = tmp_path_factory.mktemp("data")
    # Scaled weights: what is learned from validation must be the same on all ranks too.
    model, release = small_model(alpha_mode="scaled"), small_release(folder, num_subjects=60, seed=1)
    return small_job(release, model=model, batch_size=7, checkpoint={"every_steps": 3})


@pytest.fixture(scope="module")
def alone(job: FinetuneJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    train(job, str(out), console=silent())
    return out


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request: pytest.FixtureRequest, job: FinetuneJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return on_ranks(job, tmp_path_factory.mktemp("ranks") / "run", request.param)


def lines(out: Path, event: str) -> list[Line]:
    found = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["event"] == event]


def assert_near(found: Path, expected: Path) -> None:
    for event, number in (("step", "loss"), ("epoch", "nll")):
        values = [[line[number] for line in lines(out, event)] for out in (found, expected)]
        assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_ranks_give_the_losses_and_validations_of_one_process(ranks: Path, alone: Path) -> None:
    assert_near(ranks, alone)
    samples = [[line["samples"] for line in lines(out, "step")] for out in (ranks, alone)]
    assert samples[0] == samples[1]


def test_ranks_together_consume_each_study_once_per_epoch(ranks: Path, job: FinetuneJob) -> None:
    expected = open_release(job.release).manifest.receipts["train"]
    assert receipts_by_epoch(open_run(str(ranks)).ledger()) == dict.fromkeys(range(job.epochs), expected)


def test_ranks_of_a_run_with_replay_are_one_process_too(tmp_path: Path) -> None:
    release, since = grown_release(tmp_path, num_subjects=60, seed=1)
    replayed = small_job(release.pinned_url, replay={"since": since, "new": 2, "old": 1}, batch_size=7, epochs=2)
    train(replayed, str(tmp_path / "alone"), console=silent())
    on_ranks(replayed, tmp_path / "ranks", 2)
    assert_near(tmp_path / "ranks", tmp_path / "alone")
    books = [receipts_by_source(open_run(str(tmp_path / name)).ledger()) for name in ("ranks", "alone")]
    assert books[0] == books[1]


def test_one_attempt_of_many_ranks_is_one_in_the_books(ranks: Path) -> None:
    ledger = open_run(str(ranks)).ledger()
    assert [line["event"] for line in ledger].count("attempt") == 1
    assert ledger[0]["world"] in WORLDS


@pytest.mark.parametrize(("first", "second"), [(1, 3), (3, 2)])
def test_another_number_of_ranks_carries_a_run_on(job: FinetuneJob, alone: Path, tmp_path: Path, first: int, second: int) -> None:
    out = tmp_path / "run"
    if first == 1:
        with pytest.raises(InterruptedRunError):
            attempt(begin(job, str(out)).url, OneProcess(), silent(), StopAfter(5))
    else:
        on_ranks(job, out, first, stop_at=5, stage=3)
    assert len(lines(out, "step")) == 5
    on_ranks(job, out, second, stage=1)
    assert_near(out, alone)
    expected = open_release(job.release).manifest.receipts["train"]
    assert receipts_by_epoch(open_run(str(out)).ledger()) == dict.fromkeys(range(job.epochs), expected)


def test_more_parts_than_rows_are_refused_before_anything_is_written(job: FinetuneJob, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(SpecError, match="at most 7 ranks"):
        train(job, str(out), console=silent(), backend=OneProcess(accumulation=8))
    assert not (out / "ledger.jsonl").exists()


def test_a_share_that_leaves_no_label_is_refused(job: FinetuneJob, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="at least one label"):
        train(job.model_copy(update={"label_fraction": 1e-6}), str(tmp_path / "run"), console=silent())


def test_a_running_mean_of_uncertainties_is_refused_with_accumulation(job: FinetuneJob, tmp_path: Path) -> None:
    model = DrafConfig.model_validate({**job.model.model_dump(), "alpha_mode": "fixed", "u_ema": 0.9})
    with pytest.raises(SpecError, match="u_ema"):
        train(job.model_copy(update={"model": model}), str(tmp_path / "run"), console=silent(), backend=OneProcess(accumulation=2))


def test_a_smaller_share_of_labels_is_part_of_a_larger_one(job: FinetuneJob) -> None:
    from draf_dist.training.label_fraction import has_label

    uid = torch.arange(4000)
    kept = {share: has_label(job.model_copy(update={"label_fraction": share}), uid) for share in (0.1, 0.25, 1.0)}
    assert kept[1.0].all()
    assert not (kept[0.1] & ~kept[0.25]).any()
    for share, mask in kept.items():
        assert float(mask.float().mean()) == pytest.approx(share, abs=0.03)

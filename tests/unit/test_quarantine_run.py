"""A run whose job says quarantine goes on without what is damaged, and its books say what that was."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from small_runs import silent, small_job, small_release
from stop_after import StopAfter
from typer.testing import CliRunner

from draf_dist.cli.app import app
from draf_dist.data.corruption import MissingNotAtRandom, Swap
from draf_dist.data.receipts import receipt
from draf_dist.data.release import Release, open_release, tar_path
from draf_dist.data.shards import Member
from draf_dist.errors import DataError, InterruptedRunError, SpecError
from draf_dist.evaluation import parts
from draf_dist.evaluation.bench_job import BenchJob
from draf_dist.evaluation.evaluate import evaluate
from draf_dist.evaluation.job import EvaluateJob, SweepSettings
from draf_dist.schema.release import Receipt, Split
from draf_dist.training.consumption import Consumption
from draf_dist.training.job import FinetuneJob
from draf_dist.training.journal import Line
from draf_dist.training.ledger import SourceEpoch, left_out_by_source, receipts_by_source
from draf_dist.training.loop import StepReport
from draf_dist.training.plan import TrainingPlan, build_plan
from draf_dist.training.run import attempt, begin, train
from draf_dist.training.run_folder import open_run
from draf_dist.training.summary import summarise
from draf_dist.training.torch_engine import OneProcess

QUARANTINE = {"policy": "quarantine", "limit": 0.02}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return open_release(small_release(tmp_path_factory.mktemp("data"), num_subjects=60, seed=1))


@dataclass(frozen=True)
class Damaged:
    """A release and the studies of its training split that can't be used: one without its json, one without its only image."""

    release: Release
    lost: list[int]


@pytest.fixture(scope="module")
def damaged(whole: Release, tmp_path_factory: pytest.TempPathFactory) -> Damaged:
    release = copied(whole, tmp_path_factory.mktemp("damaged") / "release")
    index = release.index(release.shards("train")[0])
    flip(release, "train", index.meta(0))
    present = index.present.copy()
    present[0] = True
    only = int(np.flatnonzero(present.sum(1) == 1)[0])
    flip(release, "train", members_of(release, "train", only)[0])
    return Damaged(release, [int(index.uids[0]), int(index.uids[only])])


@pytest.fixture(scope="module")
def job(damaged: Damaged) -> FinetuneJob:
    return small_job(damaged.release.pinned_url, epochs=2, bad_data=QUARANTINE, checkpoint={"every_steps": 2})


@pytest.fixture(scope="module")
def undisturbed(job: FinetuneJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(job, str(out), console=silent()).finished
    return out


def copied(release: Release, folder: Path) -> Release:
    shutil.copytree(release.url, folder)
    return open_release(str(folder))


def members_of(release: Release, split: Split, number: int) -> list[Member]:
    index = release.index(release.shards(split)[0])
    return [member for name in index.modalities if (member := index.member(number, name)) is not None]


def flip(release: Release, split: Split, member: Member) -> None:
    path = release.store.local_path(tar_path(release.shards(split)[0]))
    assert path is not None
    data = bytearray(path.read_bytes())
    data[member.offset + member.size - 1] ^= 1
    path.write_bytes(data)


def expected_receipt(damaged: Damaged) -> Receipt:
    """Of one epoch: every study but those that can't be used."""
    release = damaged.release
    uids = np.concatenate([release.index(shard).uids for shard in release.shards("train")])
    return receipt(uids[~np.isin(uids, damaged.lost)])


def steps_of(out: Path) -> list[Line]:
    return [line for line in open_run(str(out)).metrics() if line["event"] == "step"]


def listed(out: Path) -> list[Line]:
    paths = sorted((out / "left_out").iterdir())
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def test_the_receipts_are_of_what_was_used_and_the_rest_is_counted(damaged: Damaged, job: FinetuneJob, undisturbed: Path) -> None:
    lines, expected = open_run(str(undisturbed)).ledger(), expected_receipt(damaged)
    assert receipts_by_source(lines) == {("", epoch): expected for epoch in range(job.epochs)}
    assert left_out_by_source(lines) == {("", epoch): 2 for epoch in range(job.epochs)}
    assert sum(line["samples"] for line in steps_of(undisturbed)) == job.epochs * expected.count
    assert sorted(line["message"].split(".json")[0][-16:] for line in listed(undisturbed) if ".json" in line["message"]) == [
        f"{damaged.lost[0]:016x}"
    ]
    assert [line["split"] for line in listed(undisturbed)] == ["train", "train"]


def test_a_summary_calls_no_epoch_whole_and_says_why(undisturbed: Path) -> None:
    summary = summarise(str(undisturbed))
    assert (summary.epochs_complete, summary.as_planned, summary.left_out) == (0, True, 4)
    assert summary.data.lost_samples >= 4
    shown = CliRunner().invoke(app, ["run", "show", str(undisturbed)]).output
    assert "4 samples were left out" in " ".join(shown.split())


def test_a_study_that_is_missing_and_was_not_left_out_is_noticed(undisturbed: Path, tmp_path: Path) -> None:
    for name in ("job.yaml", "metrics.jsonl"):
        shutil.copy(undisturbed / name, tmp_path)
    lines = [json.loads(line) for line in (undisturbed / "ledger.jsonl").read_text().splitlines()]
    next(line for line in lines if line.get("left_out"))["left_out"]["0"] -= 1
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert summarise(str(tmp_path)).as_planned is False


def test_a_stopped_run_leaves_out_the_same_when_it_goes_on(job: FinetuneJob, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(InterruptedRunError):
        attempt(begin(job, str(out)).url, OneProcess(), silent(), StopAfter(3))
    assert train(job, str(out), console=silent()).finished
    books = [open_run(str(folder)).ledger() for folder in (out, undisturbed)]
    assert receipts_by_source(books[0]) == receipts_by_source(books[1])
    assert left_out_by_source(books[0]) == left_out_by_source(books[1])
    assert [line["loss"] for line in steps_of(out)] == [line["loss"] for line in steps_of(undisturbed)]
    # Its folder is a run's and nothing else.
    assert train(job, str(out), fresh=True, console=silent()).finished


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_of_any_number_consume_and_leave_out_the_same(damaged: Damaged, job: FinetuneJob, world: int) -> None:
    plan, receipts, left_out = build_plan(job, damaged.release), list[tuple[SourceEpoch, Receipt]](), 0
    for rank in range(world):
        backend = OneProcess(rank=rank, world=world)
        consumed = Consumption(plan, rank, world)
        for report in reports(plan, backend, job):
            consumed.add(report)
        found = consumed.settle(backend)
        receipts += found.receipts.items()
        left_out += sum(found.left_out.values())
    expected = expected_receipt(damaged)
    assert {of for of, _ in receipts} == {("", 0)}
    assert sum(part.count for _, part in receipts) == expected.count
    assert sum(int(part.uid_sum, 16) for _, part in receipts) % 2**64 == int(expected.uid_sum, 16)
    assert left_out == 2


def reports(plan: TrainingPlan, backend: OneProcess, job: FinetuneJob) -> list[StepReport]:
    """What a rank reports of the steps of one epoch."""
    return [
        StepReport(step + 1, 0.0, {}, 0.0, 0.0, int((batch.weight > 0).sum()), batch.uid, batch.epoch, 0.0, 0.0)
        for step, batch in plan.loader(backend, job).batches(0, plan.order.steps_per_epoch)
    ]


def test_of_validation_too_what_is_damaged_is_left_out_counted_and_told(whole: Release, tmp_path: Path) -> None:
    release = copied(whole, tmp_path / "release")
    flip(release, "val", release.index(release.shards("val")[0]).meta(0))
    strict = small_job(release.pinned_url, epochs=2)
    with pytest.raises(DataError, match="crc32"):
        train(strict, str(tmp_path / "strict"), console=silent())
    quarantine = small_job(release.pinned_url, epochs=2, bad_data=QUARANTINE)
    assert train(quarantine, str(tmp_path / "run"), console=silent()).finished
    summary = summarise(str(tmp_path / "run"))
    assert (summary.validation.left_out, summary.validation.lost_samples) == (2, 2)
    assert (summary.data.left_out, summary.left_out, summary.epochs_complete) == (0, 0, 2)
    assert [line["split"] for line in listed(tmp_path / "run")] == ["val"]


def test_too_much_damage_before_the_first_commit_leaves_its_list(whole: Release, tmp_path: Path) -> None:
    release = copied(whole, tmp_path / "release")
    for number in range(4):
        flip(release, "train", release.index(release.shards("train")[0]).meta(number))
    job = small_job(release.pinned_url, bad_data={"policy": "quarantine", "limit": 0.002})
    with pytest.raises(DataError, match=r"at most 0\.2% of the members unusable"):
        train(job, str(tmp_path / "run"), console=silent())
    assert len(listed(tmp_path / "run")) >= 3


def test_an_evaluation_leaves_out_what_the_run_may_and_warns(
    damaged: Damaged, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = copied(damaged.release, tmp_path / "release")
    index, num_studies = release.index(release.shards("test")[0]), release.manifest.receipts["test"].count
    # Both ends of the split, and so different parts of it.
    monkeypatch.setattr(parts, "CLEAN_STUDIES", 4)
    for number in (0, num_studies - 1):
        flip(release, "test", index.meta(number))
    sweep = SweepSettings(operations=(Swap(), MissingNotAtRandom(grid=(0, 0.5))), passes=2)
    job = EvaluateJob(passes=2, batch_size=4, bootstrap=0, sweep=sweep)
    found = evaluate(str(undisturbed), job, release_url=release.pinned_url)
    (split,) = [split for split in found.splits if split.split == "test"]
    assert split.num_studies + split.num_unlabelled == num_studies - 2
    (warning,) = [text for text in found.warnings if "left out" in text and text.startswith("Split test")]
    assert "2 studies are missing" in warning


def test_a_benchmark_takes_every_study_or_none(tmp_path: Path) -> None:
    tree = {"name": "b", "card": str(tmp_path / "card.yaml"), "systems": {"a": {}}, "reference": "a"}
    job = BenchJob.model_validate({**tree, "finetune": {"bad_data": {"policy": "quarantine"}}})
    with pytest.raises(SpecError, match=r"systems\.a\.bad_data\.policy: expected fail, found quarantine"):
        job.jobs("bench.yaml")


def test_samples_are_decoded_by_as_many_threads_as_the_backend_says(whole: Release, tmp_path: Path) -> None:
    job = small_job(whole.pinned_url, epochs=1)
    attempt(begin(job, str(tmp_path / "run")).url, OneProcess(decode_threads=3), silent(), StopAfter(1000))
    assert open_run(str(tmp_path / "run")).ledger()[0]["decode_threads"] == 3
    plan = build_plan(job, whole)
    loaders = plan.loader(OneProcess(decode_threads=3), job), plan.validation(OneProcess(decode_threads=3), job)
    assert [loader._threads for loader in loaders] == [3, 3]

"""Replay: what is new in a release mixed with what is old, exactly, whoever counts it and wherever it is cut."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from grown_release import NEW_SHARDS, grown_release, version_without
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import silent, small_job
from stop_after import StopAfter

from draf_dist.data.mixture import Mixture
from draf_dist.data.order import Order, TrainingOrder, rank_entries
from draf_dist.data.receipts import receipt
from draf_dist.data.release import Release, open_release
from draf_dist.data.replay import new_and_old
from draf_dist.errors import InterruptedRunError, SpecError
from draf_dist.schema.release import Receipt
from draf_dist.training.consumption import Consumption
from draf_dist.training.job import FinetuneJob
from draf_dist.training.ledger import SourceEpoch, receipts_by_epoch, receipts_by_source
from draf_dist.training.loop import StepReport
from draf_dist.training.plan import TrainingPlan, build_plan
from draf_dist.training.run import attempt, begin, train
from draf_dist.training.run_folder import open_run
from draf_dist.training.summary import summarise
from draf_dist.training.torch_engine import OneProcess
from draf_dist.training.trace import trace


@st.composite
def orders(draw: st.DrawFn) -> TrainingOrder:
    sizes = st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(lambda shards: sum(shards) > 0)
    weights = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    batch_size = draw(st.integers(1, 24))
    sources = tuple(Order(tuple(draw(sizes)), f"v{i}", draw(st.integers(0, 9)), batch_size, groups=4) for i in range(len(weights)))
    return draw(st.sampled_from([sources[0], Mixture(sources, weights, batch_size)]))


@settings(max_examples=80, deadline=None)
@given(orders(), st.integers(0, 30))
def test_how_far_every_source_is_needs_no_walk(order: TrainingOrder, steps: int) -> None:
    drawn = Counter(int(source) for step in range(steps) for source in order.draws(step).source)
    assert order.num_drawn(steps) == tuple(drawn[source] for source in range(len(order.num_drawn(0))))


@settings(max_examples=80, deadline=None)
@given(orders(), st.integers(1, 5))
def test_an_epoch_of_a_run_is_the_shortest_that_passes_once_over_its_first_source(order: TrainingOrder, epochs: int) -> None:
    num_samples = order.orders[0].num_samples if isinstance(order, Mixture) else order.num_samples
    assert order.num_drawn(epochs * order.steps_per_epoch)[0] >= epochs * num_samples
    if isinstance(order, Mixture):
        share = (order.steps_per_epoch - 1) * order.batch_size * order.weights[0] / sum(order.weights)
        assert share < num_samples


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Release, str]:
    return grown_release(tmp_path_factory.mktemp("data"), num_subjects=90, seed=1)


@pytest.fixture(scope="module")
def release(grown: tuple[Release, str]) -> Release:
    return grown[0]


@pytest.fixture(scope="module")
def earlier(grown: tuple[Release, str]) -> str:
    return grown[1]


@pytest.fixture(scope="module")
def job(release: Release, earlier: str) -> FinetuneJob:
    replay = {"since": earlier, "new": 2, "old": 1}
    return small_job(release.pinned_url, replay=replay, label_fraction=0.7, checkpoint={"every_steps": 3}, batch_size=7)


@pytest.fixture(scope="module")
def plan(job: FinetuneJob, release: Release) -> TrainingPlan:
    return build_plan(job, release)


@pytest.fixture(scope="module")
def undisturbed(job: FinetuneJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(job, str(out), console=silent()).finished
    return out


def uids_drawn(plan: TrainingPlan, steps: int) -> dict[SourceEpoch, list[int]]:
    """Every uid that the first steps draw, by walking."""
    tables = [source.uids() for source in plan.sources]
    found: dict[SourceEpoch, list[int]] = {}
    for step in range(steps):
        draws = plan.order.draws(step)
        for source, epoch, sample in zip(draws.source.tolist(), draws.epoch.tolist(), draws.sample.tolist(), strict=True):
            found.setdefault((plan.sources[source].name, epoch), []).append(int(tables[source][sample]))
    return found


def test_every_training_shard_is_new_or_old_and_none_both(release: Release, earlier: str) -> None:
    parts = new_and_old(release, earlier)
    assert [part.shards("train") for part in parts] == [
        release.shards("train")[-NEW_SHARDS:],
        release.shards("train")[:-NEW_SHARDS],
    ]


def test_a_version_without_anything_new_is_refused(release: Release) -> None:
    with pytest.raises(SpecError, match=r"training studies that version .* lacks, found none\. Name an earlier version"):
        new_and_old(release, release.version)


def test_a_version_that_shares_nothing_is_refused(release: Release) -> None:
    stranger = version_without(release, {shard.sha256 for shard in release.manifest.shards})
    with pytest.raises(SpecError, match=r"training studies of version .*, found none\. Name a version that this one descends from"):
        new_and_old(release, stranger)


def test_a_run_is_refused_before_its_folder_is_made(job: FinetuneJob, release: Release, tmp_path: Path) -> None:
    assert job.replay is not None
    nothing_new = job.model_copy(update={"replay": job.replay.model_copy(update={"since": release.version})})
    with pytest.raises(SpecError, match=r"replay\.since"):
        begin(nothing_new, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_sources_of_one_size_are_shuffled_differently(plan: TrainingPlan) -> None:
    assert isinstance(plan.order, Mixture)
    new, old = plan.order.orders
    of_one_size = replace(new, shard_sizes=old.shard_sizes)
    whole = [[order.draws(step).sample.tolist() for step in range(order.steps_per_epoch)] for order in (of_one_size, old)]
    assert whole[0] != whole[1]


def test_consumed_is_what_the_plan_says_and_every_new_study_once_per_epoch(undisturbed: Path, job: FinetuneJob) -> None:
    release = open_release(job.release)
    plan, lines = build_plan(job, release), open_run(str(undisturbed)).ledger()
    steps = job.epochs * plan.order.steps_per_epoch
    walked = {of: receipt(np.array(uids, dtype=np.int64)) for of, uids in uids_drawn(plan, steps).items()}
    assert receipts_by_source(lines) == plan.receipts(steps) == walked
    new, old = (source.receipt() for source in plan.sources)
    by_epoch = receipts_by_epoch(lines, "new")
    assert [by_epoch[epoch] for epoch in range(job.epochs)] == [new] * job.epochs
    assert (new.count + old.count) == release.manifest.receipts["train"].count
    # The old source is in the middle of an epoch: that is compared too.
    assert set(receipts_by_epoch(lines, "old").values()) != {old}


def test_a_summary_counts_every_source_by_itself(undisturbed: Path, job: FinetuneJob) -> None:
    summary = summarise(str(undisturbed))
    assert summary.as_planned is True
    assert {"new:0", "new:1", "new:2", "old:0"} <= set(summary.samples)
    assert summary.epochs_complete is not None
    assert summary.epochs_complete >= job.epochs


def test_a_study_that_was_read_in_place_of_another_is_noticed(undisturbed: Path, tmp_path: Path) -> None:
    for name in ("job.yaml", "metrics.jsonl"):
        (tmp_path / name).write_bytes((undisturbed / name).read_bytes())
    ledger = (undisturbed / "ledger.jsonl").read_text().splitlines()
    commit = next(i for i, line in enumerate(ledger) if '"old:0"' in line)
    changed = json.loads(ledger[commit])
    changed["receipts"]["old:0"]["uid_sum"] = "0" * 16
    (tmp_path / "ledger.jsonl").write_text("\n".join([*ledger[:commit], json.dumps(changed), *ledger[commit + 1 :]]) + "\n")
    assert summarise(str(tmp_path)).as_planned is False


def test_trace_finds_every_use_of_new_and_old_studies(undisturbed: Path, plan: TrainingPlan, job: FinetuneJob) -> None:
    steps = job.epochs * plan.order.steps_per_epoch
    for number, source in enumerate(plan.sources):
        tables, found = source.uids(), []
        for uid in tables[:5].tolist():
            expected = [
                (source.name, int(draws.epoch[entry]), step, int(entry))
                for step in range(steps)
                for draws in [plan.order.draws(step)]
                for entry in np.flatnonzero(draws.source == number)
                if tables[draws.sample[entry]] == uid
            ]
            assert [(use.source, use.epoch, use.step, use.entry) for use in trace(str(undisturbed), uid)] == expected
            found += expected
        assert found


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_of_any_number_together_consume_what_the_plan_says(plan: TrainingPlan, job: FinetuneJob, world: int) -> None:
    steps = plan.order.steps_per_epoch + 1
    totals: list[tuple[SourceEpoch, Receipt]] = []
    for rank in range(world):
        consumed = Consumption(plan, rank, world)
        for step in range(steps):
            consumed.add(report(plan, step, rank, world))
        totals += consumed.settle(OneProcess()).receipts.items()
    expected = plan.receipts(steps)
    assert {of for of, _ in totals} == set(expected)
    for of, whole in expected.items():
        parts = [part for found, part in totals if found == of]
        assert sum(part.count for part in parts) == whole.count
        assert sum(int(part.uid_sum, 16) for part in parts) % 2**64 == int(whole.uid_sum, 16)


def report(plan: TrainingPlan, step: int, rank: int, world: int) -> StepReport:
    """What a rank reports of a step."""
    draws = plan.order.draws(step)
    mine = rank_entries(len(draws.sample), plan.order.batch_size, rank, world)
    pairs = zip(draws.source[mine].tolist(), draws.sample[mine].tolist(), strict=True)
    uids = torch.tensor([int(plan.sources[source].uids()[sample]) for source, sample in pairs], dtype=torch.int64)
    epochs = torch.from_numpy(draws.epoch[mine])
    return StepReport(step + 1, 0.0, {}, 0.0, 0.0, len(uids), uids, epochs, 0.0, 0.0)


@pytest.mark.parametrize("steps", [1, 4], ids=["before the first checkpoint", "in the middle of an epoch"])
def test_a_stopped_run_goes_on_as_if_nothing_had_been(undisturbed: Path, job: FinetuneJob, tmp_path: Path, steps: int) -> None:
    out = tmp_path / "run"
    with pytest.raises(InterruptedRunError):
        attempt(begin(job, str(out)).url, OneProcess(), silent(), StopAfter(steps))
    assert train(job, str(out), console=silent()).finished
    last = open_run(str(out)).checkpoints.steps()[-1]
    found, expected = (dict(open_run(str(folder)).checkpoints.at(last).tensors) for folder in (out, undisturbed))
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    assert receipts_by_source(open_run(str(out)).ledger()) == receipts_by_source(open_run(str(undisturbed)).ledger())


def test_a_checkpoint_says_what_is_mixed(undisturbed: Path, job: FinetuneJob) -> None:
    checkpoints = open_run(str(undisturbed)).checkpoints
    assert job.replay is not None
    assert checkpoints.at(checkpoints.steps()[-1]).state.order.replay == job.replay

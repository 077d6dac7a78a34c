"""`draf plan`: what it says is what the order and the release really are, and a cache that is too small is refused."""

import json
import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grown_release import NEW_SHARDS, version_without
from remote_folder import as_remote
from sharded import sharded_release
from small_runs import silent, small_job, small_model, small_release
from volume_export import export, write_export

from draf_dist.cli.app import main
from draf_dist.cli.plan import size
from draf_dist.config.spec import canonical_json
from draf_dist.data.loader import Loader, Reading
from draf_dist.data.node_cache import NodeCache
from draf_dist.data.patch_reads import most_read
from draf_dist.data.prepare import prepare
from draf_dist.data.release import Release, open_release
from draf_dist.data.shuffle_quality import MAX_BATCHES, shuffle_quality, steps_to_measure
from draf_dist.errors import SpecError
from draf_dist.schema.modality import VolumeSpec
from draf_dist.storage.local import LocalStore
from draf_dist.training import forecast as forecast_module
from draf_dist.training.forecast import forecast
from draf_dist.training.job import FinetuneJob
from draf_dist.training.pin import pin
from draf_dist.training.plan import build_plan
from draf_dist.training.run import train
from draf_dist.training.run_folder import open_run
from draf_dist.training.torch_engine import OneProcess


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Release, str]:
    release = sharded_release(tmp_path_factory.mktemp("grown"))
    return release, version_without(release, {shard.sha256 for shard in release.shards("train")[-NEW_SHARDS:]})


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Folders that can't be memory-mapped, as far as a release is concerned: everything is read through the store."""
    monkeypatch.setattr(LocalStore, "local_path", lambda store, path: None)
    monkeypatch.setenv("DRAF_CACHE_DIR", str(tmp_path / "cache"))


def job_file(folder: Path, release: Release, **changes: Any) -> Path:
    tree = {
        "name": "small",
        "release": release.pinned_url,
        "model": small_model(),
        "batch_size": 16,
        "groups": 4,
        "open_samples": 32,
    }
    (folder / "job.yaml").write_bytes(canonical_json(FinetuneJob.model_validate({**tree, **changes}).model_dump(mode="json")))
    return folder / "job.yaml"


def run_plan(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *words])
    shown = capsys.readouterr()
    return int(ended.value.code or 0), shown.out, shown.err


def test_what_is_planned_is_what_the_order_draws(
    grown: tuple[Release, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release, _ = grown
    code, out, _ = run_plan(capsys, str(job_file(tmp_path, release)), "--world", "3", "--json")
    found = json.loads(out)
    plan = build_plan(FinetuneJob.model_validate(json.loads((tmp_path / "job.yaml").read_text())), release)
    shards = release.shards("train")
    assert code == 0
    assert found["release"] == release.pinned_url
    assert found["steps_per_epoch"] == plan.order.steps_per_epoch
    assert found["last_batch"] == len(plan.order.draws(plan.order.steps_per_epoch - 1).sample)
    assert (found["rows"], found["imbalance"]) == ([5, 6], pytest.approx(6 * 3 / 16 - 1))
    assert found["epoch_bytes"] == sum(shard.size_bytes for shard in shards)
    assert found["epoch_blocks"] == len(shards)
    assert 0 < found["first_batch_bytes"] <= found["working_set_bytes"] <= found["epoch_bytes"]
    assert found["sources"][0]["num_samples"] == sum(shard.num_samples for shard in shards)
    assert (found["sources"][0]["groups"], found["sources"][0]["window"]) == (4, 8)
    assert found["cache"] == {"folder": None, "limit_bytes": None, "fits": True}


def test_shuffle_quality_is_that_of_the_sites_and_labels_of_the_release(grown: tuple[Release, str], tmp_path: Path) -> None:
    release, _ = grown
    job_file(tmp_path, release)
    plan = build_plan(FinetuneJob.model_validate(json.loads((tmp_path / "job.yaml").read_text())), release)
    order = plan.order.cut_orders[0]
    found = forecast(plan).sources[0]
    table = release.subjects().to_pandas().set_index("uid").loc[plan.sources[0].uids()]
    full = order.num_samples // order.batch_size
    epochs = found.quality_batches // full
    assert found.quality_batches == epochs * full > 20
    for quality, column in ((found.site_quality, "site"), (found.label_quality, "label")):
        category = np.unique(table[column], return_inverse=True)[1]
        expected = np.mean([shuffle_quality(order, category, epoch=epoch) for epoch in range(epochs)])
        assert quality == pytest.approx(expected)


def test_of_a_release_with_very_many_shards_few_indexes_are_read(
    grown: tuple[Release, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, _ = grown
    job_file(tmp_path, release, batch_size=4, open_samples=8)
    plan = build_plan(FinetuneJob.model_validate(json.loads((tmp_path / "job.yaml").read_text())), release)
    whole = forecast(plan).sources[0]
    read: list[int] = []
    monkeypatch.setattr(forecast_module, "MAX_INDEXES", 2)
    monkeypatch.setattr(forecast_module, "FEWEST_BATCHES", 1)
    part = forecast(plan, on_progress=lambda done, total: read.append(total)).sources[0]
    assert whole.quality_batches > part.quality_batches == 1
    assert max(read) <= 4 < len(release.shards("train"))
    assert part.site_quality is not None


def test_a_mixture_is_told_source_by_source(grown: tuple[Release, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release, since = grown
    path = job_file(tmp_path, release, replay={"since": since, "new": 1, "old": 3})
    found = json.loads(run_plan(capsys, str(path), "--json")[1])
    new, old = found["sources"]
    assert [new["name"], old["name"]] == ["new", "old"]
    assert (new["share"], old["share"]) == (4, 12)
    assert new["num_shards"] + old["num_shards"] == len(release.shards("train"))
    # An epoch passes over the new once; of four samples three are old.
    drawn = found["steps_per_epoch"] * 16
    assert new["num_samples"] <= drawn / 4 < new["num_samples"] + 4
    passes = (drawn / 4 / new["num_samples"], drawn * 3 / 4 / old["num_samples"])
    assert found["epoch_bytes"] == pytest.approx(passes[0] * new["read_bytes"] + passes[1] * old["read_bytes"], abs=1)
    assert found["working_set_bytes"] == new["working_set_bytes"] + old["working_set_bytes"]


def test_the_tables_name_every_figure_and_fit_a_terminal(
    grown: tuple[Release, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run_plan(capsys, str(job_file(tmp_path, grown[0])), "--set", "batch_size=32")
    assert code == 0
    for name in (
        "steps per epoch",
        "rows per rank",
        "working set",
        "cache limit",
        "requests per epoch",
        "shuffle of sites",
        "window",
    ):
        assert name in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.usefixtures("remote")
def test_a_cache_below_the_working_set_is_refused_after_the_plan_is_shown(
    grown: tuple[Release, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(job_file(tmp_path, grown[0]))
    monkeypatch.setenv("DRAF_CACHE_BYTES", "1kB")
    code, out, error = run_plan(capsys, path, "--json")
    found = json.loads(out)
    assert code == 2
    assert found["cache"] == {"folder": str(tmp_path / "cache"), "limit_bytes": 1000, "fits": False}
    assert found["needed_bytes"] == found["working_set_bytes"] + found["validation_bytes"]
    assert f"DRAF_CACHE_BYTES={found['needed_bytes']}" in error
    monkeypatch.setenv("DRAF_CACHE_BYTES", str(found["needed_bytes"]))
    code, out, _ = run_plan(capsys, path)
    assert code == 0
    assert "enough" in out


@pytest.mark.usefixtures("remote")
def test_the_loader_refuses_exactly_the_cache_that_the_plan_refuses(
    grown: tuple[Release, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = open_release(grown[0].pinned_url)
    job = FinetuneJob.model_validate(json.loads(job_file(tmp_path, release).read_text()))
    plan = build_plan(job, release, "s3://bucket/run")
    found = forecast(plan)
    assert 0 < found.validation_bytes <= sum(shard.size_bytes for shard in release.shards("val"))
    monkeypatch.setenv("DRAF_CACHE_BYTES", str(found.needed_bytes - 1))
    with closing(plan.loader(OneProcess(), job).batches(0, 1)) as batches, pytest.raises(SpecError, match="DRAF_CACHE_BYTES"):
        next(batches)
    monkeypatch.setenv("DRAF_CACHE_BYTES", str(found.needed_bytes))
    # A run validates while its training batches are open; another run finds no room beside it.
    with closing(plan.loader(OneProcess(), job).batches(0, 2)) as batches:
        next(batches)
        assert sum(int((batch.weight > 0).sum()) for batch in plan.validation(OneProcess(), job).batches()) > 0
        next(batches)
        other = replace(plan, run="s3://bucket/other")
        told = "job s3://bucket/run .*wait until the other jobs"
        with closing(other.loader(OneProcess(), job).batches(0, 1)) as refused, pytest.raises(SpecError, match=told):
            next(refused)


def test_training_and_validation_of_a_run_fit_a_cache_of_what_the_plan_says_and_do_not_start_in_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = pin(small_job(small_release(tmp_path, num_subjects=60, seed=1), epochs=1))
    monkeypatch.setattr(LocalStore, "local_path", lambda store, path: None)
    needed = forecast(build_plan(job, open_release(job.release))).needed_bytes
    monkeypatch.setenv("DRAF_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("DRAF_CACHE_BYTES", str(needed - 1))
    with pytest.raises(SpecError, match=f"DRAF_CACHE_BYTES={needed} or more, or make open_samples or groups of the job smaller\\."):
        train(job, str(tmp_path / "run"), console=silent())
    assert open_run(str(tmp_path / "run")).metrics() == []
    monkeypatch.setenv("DRAF_CACHE_BYTES", str(needed))
    assert train(job, str(tmp_path / "run"), console=silent()).finished


def test_patches_of_volumes_are_at_most_what_is_planned_beside_the_blocks(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    write_export(tmp_path / "raw")
    # Chunks that a patch cuts, and noise, which gets no smaller.
    source = export(tmp_path / "raw", ct={"chunk": [4, 4, 4]})
    release, store = as_remote(prepare(source, str(tmp_path / "out"), subject_key=b"sixteen or more bytes of key"))
    plan = build_plan(small_job(str(tmp_path / "out"), batch_size=3), release)
    found, steps = forecast(plan), plan.order.steps_per_epoch
    most, ranges = 0, 0
    for epoch in range(4):
        store.asked.clear()
        reading = Reading(cache=NodeCache(tmp_path / "cache", 10**9), patch_seed=epoch)
        for _ in Loader(release, "train", plan.order, reading=reading).batches(epoch * steps, (epoch + 1) * steps):
            pass
        patches = [stop - start for path, start, stop in store.asked if path.startswith("volumes/")]
        most, ranges = max(most, sum(patches)), max(ranges, len(patches))
    assert found.epoch_volumes.bytes / 4 < most <= found.epoch_volumes.bytes
    assert 0 < ranges <= found.epoch_volumes.blocks
    assert found.step_volumes.bytes * steps >= found.epoch_volumes.bytes
    # Of 8 x 8 x 8 voxels, chunks of 4: three along each axis; an MRI whole, of 12 x 12 x 12.
    ct, mr = (spec for spec in release.schema.modalities if isinstance(spec, VolumeSpec))
    assert most_read(ct).blocks == 27
    assert most_read(mr).blocks == math.prod(-(-12 // side) for side in mr.chunk)


def test_a_retraining_needs_its_registry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is planned where there is one: tests/integration/test_retrain.py, which has a champion."""
    registry = f"sqlite:///{tmp_path}/registry.db"
    tree = {"kind": "retrain", "name": "again", "registry": registry, "model": "mortality", "release": str(tmp_path)}
    (tmp_path / "retrain.yaml").write_text(json.dumps(tree))
    code, _, error = run_plan(capsys, str(tmp_path / "retrain.yaml"))
    assert code == 2
    assert "expected a registry, found nothing" in error


def test_more_ranks_than_rows_are_refused(grown: tuple[Release, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run_plan(capsys, str(job_file(tmp_path, grown[0])), "--world", "17")
    assert code == 2
    assert "fewer ranks" in error


def test_a_job_whose_encoders_are_still_to_be_trained_can_be_planned(
    grown: tuple[Release, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = job_file(tmp_path, grown[0], pretrained={"cxr": str(tmp_path / "later")})
    assert run_plan(capsys, str(path), "--json")[0] == 0


def test_steps_to_measure_are_full_batches_spread_over_the_epochs(grown: tuple[Release, str], tmp_path: Path) -> None:
    job_file(tmp_path, grown[0])
    order = build_plan(FinetuneJob.model_validate(json.loads((tmp_path / "job.yaml").read_text())), grown[0]).order.cut_orders[0]
    steps = steps_to_measure(order)
    assert len(set(steps)) == len(steps) <= MAX_BATCHES
    assert all(len(order.draws(step).sample) == order.batch_size for step in steps)
    assert steps[0] < order.steps_per_epoch


@pytest.mark.parametrize(
    ("num_bytes", "shown"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2**20, "1.0 MB"), (46 * 10**15, "46000.0 TB")]
)
def test_sizes_are_told_in_powers_of_a_thousand(num_bytes: int, shown: str) -> None:
    assert size(num_bytes) == shown

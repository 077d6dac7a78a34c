"""`draf plan`: what it says is what the order and the release really are, and a cache that is too small is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grown_release import NEW_SHARDS, version_without
from sharded import sharded_release
from small_runs import small_model

from draf_dist.cli.app import main
from draf_dist.cli.plan import size
from draf_dist.config.spec import canonical_json
from draf_dist.data.loader import Loader
from draf_dist.data.release import Release, open_release
from draf_dist.data.shuffle_quality import MAX_BATCHES, shuffle_quality, steps_to_measure
from draf_dist.errors import SpecError
from draf_dist.storage.local import LocalStore
from draf_dist.training import forecast as forecast_module
from draf_dist.training.forecast import forecast
from draf_dist.training.job import FinetuneJob
from draf_dist.training.plan import build_plan


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
    assert f"DRAF_CACHE_BYTES={found['working_set_bytes']}" in error
    monkeypatch.setenv("DRAF_CACHE_BYTES", str(found["working_set_bytes"]))
    code, out, _ = run_plan(capsys, path)
    assert code == 0
    assert "enough" in out


@pytest.mark.usefixtures("remote")
def test_the_loader_refuses_exactly_the_cache_that_the_plan_refuses(
    grown: tuple[Release, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = open_release(grown[0].pinned_url)
    job_file(tmp_path, release)
    plan = build_plan(FinetuneJob.model_validate(json.loads((tmp_path / "job.yaml").read_text())), release)
    needed = forecast(plan).working_set_bytes
    for limit, refused in ((needed - 1, True), (needed, False)):
        monkeypatch.setenv("DRAF_CACHE_BYTES", str(limit))
        batches = Loader(release, "train", plan.order).batches(0, 1)
        if refused:
            with pytest.raises(SpecError, match="DRAF_CACHE_BYTES"):
                next(batches)
        else:
            next(batches)
        batches.close()


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

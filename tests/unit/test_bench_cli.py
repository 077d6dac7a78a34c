import json
from pathlib import Path

import pytest
from planted_wards import write_export, write_job
from typer.testing import CliRunner

from draf_dist.cli.app import app
from draf_dist.cli.bench import choose_executor
from draf_dist.errors import SpecError
from draf_dist.executor import Processes, Serial
from draf_dist.launch.ray_executor import RayExecutor


def test_an_executor_is_named_with_how_many_at_a_time(tmp_path: Path) -> None:
    assert isinstance(choose_executor("serial", "out"), Serial)
    assert choose_executor("processes:4", "out") == Processes(4)
    profile = tmp_path / "cluster.yaml"
    profile.write_text("kind: ray\nworkers: 7\naddress: auto\n")
    chosen = choose_executor(str(profile), "s3://bucket/bench")
    assert isinstance(chosen, RayExecutor)
    assert (chosen.profile.workers, chosen.profile.address, chosen.shared) == (7, "auto", "s3://bucket/bench")
    ray = choose_executor("ray:3", "out")
    assert isinstance(ray, RayExecutor)
    assert ray.profile.workers == 3


@pytest.mark.parametrize("text", ["threads", "processes:0", "processes:many", "serial:2", "processes:-1"])
def test_what_names_no_executor_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="one of serial, processes, ray, or a profile"):
        choose_executor(text, "out")


def test_a_profile_of_one_process_is_no_executor(tmp_path: Path) -> None:
    profile = tmp_path / "laptop.yaml"
    profile.write_text("kind: one_process\n")
    with pytest.raises(SpecError, match="expected a profile of kind ray, found one_process"):
        choose_executor(str(profile), "out")


def test_a_dry_run_counts_cells_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAF_SUBJECT_KEY", "sixteen or more bytes of key")
    monkeypatch.chdir(tmp_path)
    command = ["bench", str(write_job(tmp_path)), "--raw", str(write_export(tmp_path / "raw")), "--dry-run", "--json"]
    before = sorted(tmp_path.rglob("*"))
    found = json.loads(CliRunner().invoke(app, [*command, "--set", "seeds=[0, 1, 2]"]).stdout)
    # Two systems with three seeds and one baseline, on two folds.
    assert (found["cells"], found["rows"]) == (14, ["mean", "draf", "logistic_regression"])
    assert found["folder"].startswith("runs/wards-")
    other = json.loads(CliRunner().invoke(app, [*command, "--set", "folds=3"]).stdout)
    assert other["folder"] != found["folder"]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_raw_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", str(write_job(tmp_path)), "--raw", str(tmp_path / "nowhere")])
    assert isinstance(done.exception, SpecError)
    assert "Check --raw." in str(done.exception)

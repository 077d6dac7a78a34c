"""The command line: exit codes, one-line errors, specs that agree with the demo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from draf_dist.cli.app import main
from draf_dist.cli.demo_job import demo_job, demo_pretraining
from draf_dist.cli.schema import SpecKind
from draf_dist.training.job import FinetuneJob
from draf_dist.training.jobs import load_job
from draf_dist.training.pretrain_job import PretrainJob

ROOT = Path(__file__).resolve().parents[2]


def exit_code(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return int(ended.value.code or 0)


def test_the_demo_trains_the_model_of_the_documented_job() -> None:
    documented = load_job(ROOT / "jobs" / "finetune_synth.yaml")
    demo = demo_job(documented.release, "runs/encoder", seed=documented.seed)
    differing = {name for name in FinetuneJob.model_fields if getattr(demo, name) != getattr(documented, name)}
    assert differing == {"name", "epochs", "patience", "checkpoint", "pretrained"}


def test_the_demo_pretrains_the_encoder_of_the_documented_job() -> None:
    documented = load_job(ROOT / "jobs" / "pretrain_synth.yaml")
    demo = demo_pretraining(documented.release, seed=documented.seed)
    differing = {name for name in PretrainJob.model_fields if getattr(demo, name) != getattr(documented, name)}
    assert differing <= {"name", "epochs", "patience", "checkpoint"}


def test_a_job_that_is_not_there_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("train", "nowhere.yaml") == 2
    shown = capsys.readouterr().err
    assert "nowhere.yaml: expected a YAML file, found no such file" in shown
    assert "Traceback" not in shown


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "draf_dist.cli.app", "train", "nowhere.yaml", "--debug"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_unknown_options_are_wrong_usage() -> None:
    assert exit_code("train", "--no-such-option") == 2


@pytest.mark.parametrize("kind", list(SpecKind))
def test_the_schema_of_a_spec_is_json(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("schema", kind) == 0
    assert json.loads(capsys.readouterr().out)["type"] == "object"


def test_synth_does_not_write_into_a_folder_with_something_in_it(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    assert exit_code("synth", str(tmp_path)) == 2
    assert (tmp_path / "kept").read_text() == "mine"


def test_the_demo_does_not_replace_what_is_no_demo(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    assert exit_code("demo", "--out", str(tmp_path)) == 2
    assert (tmp_path / "kept").read_text() == "mine"


def test_doctor_finds_a_store_that_does_not_exist_bad(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert exit_code("doctor", "--json", "--store", str(tmp_path)) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert {finding["check"] for finding in findings} >= {"Python", "torch", "memory", f"store {tmp_path}"}
    assert exit_code("doctor", "--json", "--store", "ftp://nowhere/x") == 1


def test_a_subject_key_that_is_missing_or_short_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = (ROOT / "datasets" / "synth.yaml").read_text().replace("public_subject_key: true", "public_subject_key: false")
    (tmp_path / "card.yaml").write_text(text)
    for key in (None, "short"):
        monkeypatch.delenv("DRAF_SUBJECT_KEY", raising=False)
        if key is not None:
            monkeypatch.setenv("DRAF_SUBJECT_KEY", key)
        assert exit_code("prepare", str(tmp_path / "card.yaml"), "--raw", str(tmp_path), "--out", str(tmp_path / "out")) == 2
        assert "DRAF_SUBJECT_KEY: expected a secret of at least 16 bytes" in capsys.readouterr().err

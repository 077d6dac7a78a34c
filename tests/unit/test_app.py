"""The command line itself: what happens where no verb has a say."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from memory_delivery import sealed
from memory_source import KEY, MemorySource

from draf_dist.cli import app, doctor
from draf_dist.cli.app import main
from draf_dist.data.prepare import prepare

# Carries out a command line; then tells which of these it has imported.
HEAVY = ("torch", "ray", "deepspeed")
TELLING = f"""
import sys
from draf_dist.cli.app import main
try:
    main(sys.argv[1:])
finally:
    print(*(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)
"""


def imported(*words: str | Path) -> list[str]:
    command = [sys.executable, "-c", TELLING, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr.split()


def test_ctrl_c_outside_training_says_what_to_do_and_exits_5(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(store: str | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--json"])
    assert ended.value.code == 5
    assert "Run the same command again" in capsys.readouterr().err


def test_an_error_for_want_of_memory_is_told_as_one_and_as_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError) as allocator:
        torch.empty(1 << 50)
    with pytest.raises(MemoryError) as python:
        bytearray(1 << 60)
    for error in (allocator.value, python.value):
        app._one_line(type(error), error, None)
        said = " ".join(capsys.readouterr().err.split())
        assert said.startswith("error: memory: expected room")
        assert "batch_size" in said
        assert "bug" not in said
    app._one_line(RuntimeError, RuntimeError("other"), None)
    assert "This is a bug" in " ".join(capsys.readouterr().err.split())


def test_heavy_libraries_wait_for_the_command_that_needs_them(tmp_path: Path) -> None:
    prepare(MemorySource(num_studies=20), str(tmp_path / "release"), subject_key=KEY)
    assert imported("--help") == []
    assert imported("demo", "--help") == []
    assert imported("delivery", "verify", sealed(tmp_path / "delivery")) == []
    assert imported("release", "log", tmp_path / "release") == []
    assert "torch" in imported("release", "verify", tmp_path / "release")

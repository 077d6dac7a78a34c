"""The loader benchmark, as a smoke run: its arms hand out the right images, and its report holds what docs/benchmarks.md says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import loader_report
from loader_report import Run, median_interval, ratios

BENCHMARKS = Path(loader_report.__file__).parent


def test_a_quick_run_reads_every_image_once_with_every_arm(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    command = [sys.executable, BENCHMARKS / "loader.py", "--quick", "--json", out]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    outcomes = {run["arm"]: (run["outcome"], run["detail"]) for run in report["runs"]}
    assert outcomes == {"ours": ("ok", ""), "webdataset": ("ok", ""), "decode": ("ok", "")}
    num_images = report["data"]["num_images"]
    for run in report["runs"]:
        warm = run["figures"]["warm"]
        assert (warm["images"], warm["unique"], warm["repeated"], warm["unknown"]) == (num_images, num_images, 0, 0)
        assert warm["images_per_s"] > 0
        assert warm["cpu_s"] > 0
    assert {ratio["other"] for ratio in report["ratios"]} >= {"webdataset", "best library", "decode bound"}
    assert report["arms"]["webdataset"]["versions"]["webdataset"] == "1.0.2"


def test_the_interval_of_five_rounds_is_their_range() -> None:
    interval = median_interval([1.2, 1.0, 1.1, 1.4, 1.3])
    assert (interval.low, interval.median, interval.high) == (1.0, 1.2, 1.4)
    assert interval.coverage == pytest.approx(0.9375)
    # Of nine, the second to the eighth: 1 - 2 (1 + 9) / 2^9.
    interval = median_interval([float(i) for i in range(9)])
    assert (interval.low, interval.high, interval.coverage) == (1.0, 7.0, pytest.approx(1 - 20 / 512))


def run(number: int, arm: str, rate: float, outcome: str = "ok") -> Run:
    return Run(number, "s3", arm, outcome, "", 0.0, {"cold": {"images_per_s": rate}}, {})


def test_rounds_are_compared_in_pairs_and_with_the_best_library_of_each() -> None:
    runs = [run(0, "ours", 200), run(0, "litdata", 100), run(0, "webdataset", 50)]
    runs += [run(1, "ours", 30), run(1, "litdata", 10), run(1, "webdataset", 20)]
    runs += [run(2, "ours", 90), run(2, "litdata", 0, "crashed"), run(2, "webdataset", 30)]
    found = {ratio.other: ratio.interval for ratio in ratios(runs)}
    assert (found["litdata"].n, found["litdata"].low, found["litdata"].high) == (2, 2.0, 3.0)
    assert (found["best library"].low, found["best library"].median, found["best library"].high) == (1.5, 2.0, 3.0)

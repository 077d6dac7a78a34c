"""Runs one process of the loader benchmark: its result, its peak memory, or how it failed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

RUN = Path(__file__).with_name("loader_run.py")
RUN_TIMEOUT_S = 150.0
# Often enough for a peak that lasts, seldom enough to cost nothing.
SAMPLING_S = 0.5


@dataclass(frozen=True)
class Result:
    """outcome: "ok", "not installed", "crashed" or "stalled"; detail: the last line of what it said, where it is not "ok"."""

    outcome: str
    detail: str = ""
    peak_pss_mib: float = 0.0
    content: dict[str, object] = field(default_factory=dict)


def child(arguments: Sequence[str], environment: dict[str, str], timeout_s: float = RUN_TIMEOUT_S) -> Result:
    """Starts loader_run.py and waits for it; one that takes longer is stopped, with all that it started."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "result.json", Path(folder) / "log.txt"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, str(RUN), *arguments, str(out)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            peak, in_time = _watch(process, time.monotonic() + timeout_s)
        finally:
            _end_group(process)
        if not in_time:
            return Result("stalled", f"no end within {timeout_s:.0f} s; {_last_line(log)}", peak)
        if process.returncode or not out.exists():
            return Result("crashed", f"exit status {process.returncode}; {_last_line(log)}", peak)
        content = json.loads(out.read_text())
        if "not_installed" in content:
            return Result("not installed", content["not_installed"])
        return Result("ok", "", peak, content)


def _watch(process: "subprocess.Popen[bytes]", deadline: float) -> tuple[float, bool]:
    """Peak of the proportional set size in MiB, and whether the process ended before the deadline."""
    peak = 0.0
    while True:
        try:
            process.wait(SAMPLING_S)
        except subprocess.TimeoutExpired:
            peak = max(peak, _pss_mib(process.pid))
            if time.monotonic() < deadline:
                continue
        return peak, process.returncode is not None


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """Ends the session that the process was started in: its workers may have outlived a crash."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _pss_mib(session: int) -> float:
    """Of all processes of a session: pages that several of them share are counted once."""
    total = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if os.getsid(int(folder.name)) == session:
                    rollup = (folder / "smaps_rollup").read_text()
                    total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # ended meanwhile, or not ours
    return total / 1024


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:500] if lines else "it said nothing"

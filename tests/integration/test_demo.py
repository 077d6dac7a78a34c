"""The demo, run as a user runs it: within its time and memory, with its own checks written down."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

# At most three minutes on two idle cores. Other work on the machine stretches wall time without bound, so processor time is
# held to it: on idle cores wall time is shorter, since stages run side by side. demo.json has the wall time of every stage.
SECONDS = 180.0
BYTES = 4 * 2**30


def tree_bytes(root: int) -> int:
    """Resident memory of a process and everything below it (pages shared between them counted once for each)."""
    parents: dict[int, int] = {}
    sizes: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # The name of a program may hold blanks: what follows it begins after the last bracket.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry.name)], sizes[int(entry.name)] = int(fields[1]), int(fields[21])
    inside = {root}
    while grown := {pid for pid, parent in parents.items() if parent in inside and pid not in inside}:
        inside |= grown
    return sum(sizes.get(pid, 0) for pid in inside) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.timeout(900)
def test_the_demo_holds_what_it_promises(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "draf_dist.cli.app", "demo", "--out", str(tmp_path / "demo"), "--json"]
    before, peak = resource.getrusage(resource.RUSAGE_CHILDREN), 0
    with (tmp_path / "log").open("w") as log, (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while process.poll() is None:
            peak = max(peak, tree_bytes(process.pid))
            time.sleep(0.5)
    assert process.returncode == 0, (tmp_path / "log").read_text()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SECONDS
    assert 0 < peak < BYTES
    facts = json.loads((tmp_path / "out").read_text())
    assert facts == json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert set(facts["checks"]) == {"release", "receipts", "losses", "weights", "predictions", "report"}
    assert "over 2 attempts" in facts["checks"]["receipts"]
    assert "bit for bit" in facts["checks"]["losses"]

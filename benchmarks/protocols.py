"""The protocols of draf_dist/protocols through 1e5 histories each of crashes, lost answers and stale actors: docs/protocols.md.

    python benchmarks/protocols.py [--histories 100000] [--first 0] [--json FILE]

A history is drawn from its number alone, so one that goes wrong can be had again: --first NUMBER --histories 1. The program fails
with the last operations of the first history in which something happened that must not.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from interleaved import ViolationError, histories
from interleaved_moves import DataSet, Registry
from interleaved_runs import Run
from rich.console import Console
from rich.table import Table

WORLDS = {"attempts and checkpoints": Run, "releases": DataSet, "promotions": Registry}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--histories", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    table = Table("protocols", "histories", "operations", "us of processor time a history")
    found = {}
    for name, world in WORLDS.items():
        began = time.process_time()
        try:
            operations = histories(world, range(arguments.first, arguments.first + arguments.histories))
        except ViolationError as violation:
            print(f"{name}: {violation}", file=sys.stderr)
            return 1
        micros = 1e6 * (time.process_time() - began) / arguments.histories
        found[name] = {"histories": arguments.histories, "operations": operations, "us_a_history": round(micros)}
        table.add_row(name, f"{arguments.histories:,}", f"{operations:,}", f"{micros:.0f}")
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

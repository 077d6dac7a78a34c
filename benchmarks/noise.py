"""Cost of stateless noise against torch's own generators: medians of interleaved calls, and their ratios.

    python benchmarks/noise.py [--threads 1 2] [--seconds 1.0] [--json FILE]

Each pair is measured by turns, call after call, so that both meet the same load of the machine; the ratio is the median over the
turns of ours / theirs. Below 1 means that ours is cheaper.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from draf_dist import noise

SHAPES = [(32, 64), (64, 128), (64, 130), (128, 256), (64, 1000), (256, 4096), (64, 64, 24, 24)]
PROBABILITY = 0.1


def pairs(shape: tuple[int, ...]) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """What is compared: name -> (ours, torch's), each makes one tensor of a shape whose first axis has a key per row."""
    keys = noise.sample_keys(0, "benchmark", None, torch.arange(shape[0]), 1)[0]
    rest, ones = shape[1:], torch.ones(shape)

    def mask() -> object:
        return noise.bernoulli(keys, rest, PROBABILITY)

    def dropout() -> object:
        return (ones * noise.bernoulli(keys, rest, 1 - PROBABILITY)).mul_(1 / (1 - PROBABILITY))

    return {
        "normal / randn": (lambda: noise.normal(keys, rest), lambda: torch.randn(shape)),
        "mask / bernoulli_": (mask, lambda: torch.empty(shape, dtype=torch.bool).bernoulli_(PROBABILITY)),
        "mask / (rand < p)": (mask, lambda: torch.rand(shape) < PROBABILITY),
        "dropout / F.dropout": (dropout, lambda: torch.nn.functional.dropout(ones, PROBABILITY)),
        "uniform / rand": (lambda: noise.uniform(keys, rest), lambda: torch.rand(shape)),
    }


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(ours: Callable[[], object], theirs: Callable[[], object], seconds: float) -> dict[str, float]:
    """Medians in microseconds and the median ratio of n turns, as many as fit into the seconds (at least 15)."""
    for _ in range(3):
        ours(), theirs()
    turns: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(turns) < 15 or time.perf_counter() < end:
        turns.append((seconds_of(ours), seconds_of(theirs)))
    return {
        "n": len(turns),
        "ours_us": 1e6 * statistics.median(mine for mine, _ in turns),
        "torch_us": 1e6 * statistics.median(other for _, other in turns),
        "ratio": statistics.median(mine / other for mine, other in turns),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=0.5, help="per pair and shape")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    rows = []
    print(f"torch {torch.__version__}, {platform.machine()}; microseconds, median of n interleaved turns")
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for shape in SHAPES:
            for name, (ours, theirs) in pairs(shape).items():
                row = {"threads": threads, "shape": shape, "pair": name, **compare(ours, theirs, arguments.seconds)}
                rows.append(row)
                figures = "{ours_us:10.1f} {torch_us:10.1f}  ratio {ratio:5.2f}  n {n}".format(**row)
                print(f"{threads} thread{'s' * (threads > 1)}  {shape!s:18} {name:20} {figures}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

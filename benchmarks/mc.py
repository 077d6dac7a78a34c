"""What Monte-Carlo passes cost: 30 of a model on images, as `mc_scope: full` and `head`, beside one pass and beside 30 calls.

    python benchmarks/mc.py [--rounds 30] [--rows 16] [--passes 30] [--side 64] [--threads 1] [--json FILE]

The plain mean of features on one image modality, encoders as they are by default, no gradients:
    one        a single pass without any dropout
    head       all passes with mc_scope head, in one call
    full       all passes with mc_scope full, in one call: what comes before the first dropout is computed once
    separate   as many calls of one pass each with mc_scope full
Arms run by turns, in another order every round; ratios are of the same round. Wanted: head at most 1.5 times one, full at most .8
of separate.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from loader_report import median_interval
from model_inputs import pass_keys, small_batch
from rich.console import Console
from rich.table import Table

from draf_dist.models.build import build_model
from draf_dist.models.encoders import EncoderChoice, Image2dConfig
from draf_dist.models.fusion.mean import MeanConfig
from draf_dist.schema.label import LabelSpec
from draf_dist.schema.modality import DataSchema, ImageSpec

WANTED = {("head", "one"): 1.5, ("full", "separate"): 0.8}
STILL = Image2dConfig(dropout=0.0, projection_dropout=0.0)
CHOICES = {"one": EncoderChoice(image=STILL), "head": EncoderChoice(mc_scope="head"), "full": EncoderChoice()}
Round = dict[str, float]


def arms(rows: int, passes: int, side: int) -> dict[str, Callable[[], object]]:
    """What is compared, by name."""
    schema = DataSchema(
        modalities=(ImageSpec(name="cxr", channels=1, height=side, width=side),),
        label=LabelSpec(name="death", classes=("no", "yes")),
        sites=("north",),
    )
    models = {name: build_model(MeanConfig(encoders=choice), schema, seed=0).eval() for name, choice in CHOICES.items()}
    batch = small_batch(schema, rows)
    keys = pass_keys(batch, passes)
    apart = [keys[number : number + 1] for number in range(passes)]
    return {
        "one": lambda: models["one"](batch, apart[0]),
        "head": lambda: models["head"](batch, keys),
        "full": lambda: models["full"](batch, keys),
        "separate": lambda: [models["full"](batch, key) for key in apart],
    }


@torch.inference_mode()
def measure(calls: dict[str, Callable[[], object]], rounds: int) -> list[Round]:
    """Seconds of every arm in every round, after one round that does not count."""
    names, found = list(calls), []
    for number in range(rounds + 1):
        turn = number % len(names)
        seconds = {name: seconds_of(calls[name]) for name in (*names[turn:], *names[:turn])}
        found.append({name: seconds[name] for name in names})
    return found[1:]


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def tables(found: list[Round]) -> list[Table]:
    seconds = Table("arm", "ms, median", "least", title=f"{len(found)} rounds")
    for name in found[0]:
        values = [1e3 * one[name] for one in found]
        seconds.add_row(name, f"{statistics.median(values):.2f}", f"{min(values):.2f}")
    ratios = Table("ratio", "median", "interval", "wanted", "")
    for (ours, other), most in WANTED.items():
        one = median_interval([turn[ours] / turn[other] for turn in found])
        held = "held" if one.median <= most else "missed"
        ratios.add_row(f"{ours} / {other}", f"{one.median:.3f}", f"{one.low:.3f} to {one.high:.3f}", f"at most {most}", held)
    return [seconds, ratios]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rows", type=int, default=16, help="studies of a batch")
    parser.add_argument("--passes", type=int, default=30)
    parser.add_argument("--side", type=int, default=64, help="pixels a side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the seconds of every round here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(arms(options.rows, options.passes, options.side), options.rounds)
    console = Console()
    console.print(f"torch {torch.__version__}, {platform.machine()}; {options.rows} images of {options.side} x {options.side}")
    for table in tables(found):
        console.print(table)
    if options.json is not None:
        about = {name: value for name, value in vars(options).items() if name != "json"}
        options.json.write_text(json.dumps({"torch": torch.__version__, **about, "seconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

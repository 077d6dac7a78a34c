"""Does pre-training help, and with how many labels? Fine-tuning with and without a pre-trained encoder, at shares of the labels.

    python benchmarks/pretraining.py [--data synth eicu] [--fractions 0.1 0.25 1.0] [--seeds 0 1] [--eicu RAW] [--folder study]
        [--json FILE]

synth: the image encoder by SimCLR (jobs/pretrain_synth.yaml), on hospitals of its own for every seed. eicu: the encoder of the
vital signs by masked values (jobs/pretrain_eicu.yaml), one release, RAW being the folder of the public demo. Pre-training sees the
training split without labels; fine-tuning sees the same studies in the same order with and without it, and starts from the same
parameters but for the encoder. Differences are paired: by seed, and by subject in the bootstrap. Finished cells are read back, so a
study that was stopped goes on.
"""

import argparse
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from planted_truth import ROOT, draf, overrides

from draf_dist.data.release import open_release
from draf_dist.evaluation.statistics import Estimate, Resamples, estimate_all
from draf_dist.metrics.calibration import pointwise_negative_log_likelihood
from draf_dist.metrics.classification import auroc

SPLITS = ("test", "ood")
RESAMPLES = 1000
# Small enough for half an hour on two cores.
SYNTH_SUBJECTS = 1_200
SETTINGS = {"synth": ["epochs=24", "patience=24"], "eicu": ["epochs=16", "patience=16"]}
PRETRAIN_SETTINGS = {"synth": ["epochs=40", "patience=40"], "eicu": ["epochs=40", "patience=40"]}
MODALITY = {"synth": "cxr", "eicu": "vitals"}


@dataclass(frozen=True)
class Cell:
    """One fine-tuned and evaluated model."""

    data: str
    seed: int
    fraction: float
    pretrained: bool

    def run(self, folder: Path) -> None:
        run = self.folder(folder)
        settings = [f"release={release(self.data, self.seed, folder)}", f"seed={self.seed}", f"name={run.name}"]
        settings += [f"label_fraction={self.fraction}", *SETTINGS[self.data]]
        if self.pretrained:
            settings.append(f"pretrained.{MODALITY[self.data]}={encoder(self.data, self.seed, folder)}")
        draf("train", ROOT / "jobs" / f"finetune_{self.data}.yaml", "--out", run, *overrides(settings))
        if not (run / "evaluation.json").exists():
            draf("evaluate", run, *overrides(["sweep=null", "bootstrap=0"]))

    def folder(self, folder: Path) -> Path:
        start = "pretrained" if self.pretrained else "scratch"
        return folder / "runs" / f"{self.data}-{self.seed}-{round(100 * self.fraction)}-{start}"


def release(data: str, seed: int, folder: Path) -> Path:
    return folder / f"release-{data}-{seed}" if data == "synth" else folder / "release-eicu"


def encoder(data: str, seed: int, folder: Path) -> Path:
    return folder / "runs" / f"encoder-{data}-{seed}"


def prepare(data: str, seed: int, folder: Path, eicu: Path) -> None:
    out = release(data, seed, folder)
    if (out / "HEAD.json").exists():
        return
    if data == "eicu":
        if not eicu.is_dir():
            raise SystemExit(f"{eicu}: no such folder. Name that of the eICU demo with --eicu, or take --data synth.")
        # Pseudonyms of a public data set, in a folder that nobody keeps.
        os.environ.setdefault("DRAF_SUBJECT_KEY", "benchmarks/pretraining.py")
        draf("prepare", ROOT / "datasets" / "eicu.yaml", "--raw", eicu, "--out", out)
        return
    raw = folder / f"raw-{data}-{seed}"
    if not raw.exists():
        draf("synth", raw, "--subjects", SYNTH_SUBJECTS, "--seed", seed)
    draf("prepare", raw / "card.yaml", "--raw", raw / "raw", "--out", out)


def pretrain(data: str, seed: int, folder: Path) -> None:
    run = encoder(data, seed, folder)
    settings = [f"release={release(data, seed, folder)}", f"seed={seed}", f"name={run.name}", *PRETRAIN_SETTINGS[data]]
    draf("train", ROOT / "jobs" / f"pretrain_{data}.yaml", "--out", run, *overrides(settings))


@dataclass(frozen=True)
class Predicted:
    """Of the labelled studies of a split, in the order of uid: probability (n, 2), temperature-scaled; alone (n,), what the
    modality says by itself, NaN where it is absent; label and subject, int64 (n,)."""

    probability: np.ndarray
    alone: np.ndarray
    label: np.ndarray
    subject: np.ndarray


def predicted(cell: Cell, split: str, folder: Path) -> Predicted:
    run = cell.folder(folder)
    table = pq.read_table(run / "predictions" / f"{split}.parquet").sort_by("uid")
    table = table.filter(table["target"].is_valid())
    temperature = json.loads((run / "evaluation.json").read_text())["temperature"]["value"]
    names = [name for name in table.column_names if name.startswith("probability_")]
    logits = np.log(np.stack([table[name].to_numpy() for name in names], 1).astype(np.float64)) / temperature
    scaled = np.exp(logits - logits.max(1, keepdims=True))
    alone = table[f"unimodal_{MODALITY[cell.data]}"].to_numpy().astype(np.float64)
    subjects = open_release(str(release(cell.data, cell.seed, folder))).subjects()
    owner = dict(zip(subjects["uid"].to_pylist(), subjects["subject"].to_pylist(), strict=True))
    _, subject = np.unique([owner[uid] for uid in table["uid"].to_pylist()], return_inverse=True)
    return Predicted(scaled / scaled.sum(1, keepdims=True), alone, table["target"].to_numpy().astype(np.int64), subject)


def compare(data: str, seed: int, fraction: float, split: str, folder: Path) -> dict[str, object]:
    """AUROC, NLL and the modality's own AUROC without and with pre-training, and with - without, each with its interval."""
    without, with_ = (predicted(Cell(data, seed, fraction, pretrained), split, folder) for pretrained in (False, True))
    assert np.array_equal(without.label, with_.label)
    assert np.array_equal(without.subject, with_.subject)

    def statistics(rows: np.ndarray) -> dict[str, float]:
        scores = {}
        for name, part in (("without", without), ("with", with_)):
            label = part.label[rows]
            scores[f"auroc {name}"] = auroc(part.probability[rows], label)
            scores[f"nll {name}"] = float(pointwise_negative_log_likelihood(part.probability[rows], label).mean())
            alone, seen = part.alone[rows], ~np.isnan(part.alone[rows])
            scores[f"alone {name}"] = auroc(np.stack([1 - alone, alone], 1)[seen], label[seen])
        for name in ("auroc", "nll", "alone"):
            scores[f"{name} difference"] = scores[f"{name} with"] - scores[f"{name} without"]
        return scores

    found = estimate_all(statistics, Resamples(without.subject, replicates=RESAMPLES, seed=0))
    row = {"data": data, "labels": fraction, "split": split, "seed": seed, "n": len(without.label)}
    return row | {"events": int(without.label.sum())} | {name: value.model_dump() for name, value in found.items()}


def shown(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.3f}"


def interval(estimate: Estimate) -> str:
    return "" if estimate.low is None else f"[{shown(estimate.low, '+')}, {shown(estimate.high, '+')}]"


def summarise(rows: list[dict[str, object]]) -> Iterator[str]:
    """Markdown tables, one a data set."""
    for data in dict.fromkeys(row["data"] for row in rows):
        yield f"| {data}: labels | split | seed | AUROC without | with | difference | NLL without | with | difference "
        yield f"| {MODALITY[str(data)]} alone, AUROC without | with | difference |\n" + "|---" * 12 + "|\n"
        for row in (row for row in rows if row["data"] == data):
            numbers = []
            for name in ("auroc", "nll", "alone"):
                first, second, gain = (Estimate.model_validate(row[f"{name} {part}"]) for part in ("without", "with", "difference"))
                numbers += [shown(first.value), shown(second.value), f"{shown(gain.value, '+')} {interval(gain)}"]
            where = f"{row['split']} (n {row['n']}, {row['events']} events)"
            yield f"| {float(str(row['labels'])):.0%} | {where} | {row['seed']} | " + " | ".join(numbers) + " |\n"
        yield "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=MODALITY, default=list(MODALITY))
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.1, 0.25, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--eicu", type=Path, default=ROOT.parent / "shared" / "data" / "eicu_demo")
    parser.add_argument("--folder", type=Path, default=Path("study"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    sources = list(product(options.data, options.seeds))
    for data, seed in sources:
        prepare(data, seed, folder, options.eicu)
    cells = [
        Cell(data, seed, fraction, pretrained)
        for pretrained in (False, True)
        for (data, seed), fraction in product(sources, options.fractions)
    ]
    with ProcessPoolExecutor(options.jobs) as pool:
        list(pool.map(pretrain, *zip(*sources, strict=True), [folder] * len(sources)))
        list(pool.map(Cell.run, cells, [folder] * len(cells)))
    rows = [
        compare(data, seed, fraction, split, folder)
        for data, fraction, split, seed in product(options.data, options.fractions, SPLITS, options.seeds)
    ]
    print("".join(summarise(rows)))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""How far fusion models are from the exact posterior, and how that falls with more subjects.

    python benchmarks/planted_truth.py [--subjects 400 1600 6400] [--seeds 0 1] [--models draf mean] [--folder study]
        [--json FILE]

For every number of subjects and seed: synthesise, prepare, train jobs/finetune_synth.yaml with each model, and evaluate on one
independent cohort (another seed, the three sites that take part in training), the same for all. Temperature comes from the training
release's own validation split. Finished cells are read back, so a study that was stopped goes on.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parents[1]
COHORT_SEED = 1_000_003
# Three quarters of these belong to the three sites that take part in training.
COHORT_SUBJECTS = 8_532
JOB = ROOT / "jobs" / "finetune_synth.yaml"
# Enough for the small cohorts to stop early, few enough for the largest to end within the hour.
EPOCHS = {400: 60, 1_600: 60, 6_400: 20}
SEEN_SITES = "[northgate, riverside, st_anna]"


@dataclass(frozen=True)
class Cell:
    """One trained and evaluated model."""

    model: str
    subjects: int
    seed: int

    def run(self, folder: Path) -> dict[str, object]:
        name = f"{self.model}-{self.subjects}-{self.seed}"
        run = folder / "runs" / name
        release = folder / f"release-{self.subjects}-{self.seed}"
        settings = [f"release={release}", f"seed={self.seed}", f"name={name}", f"epochs={EPOCHS[self.subjects]}"]
        settings.append(f"model.kind={self.model}")
        draf("train", JOB, "--out", run, *overrides(settings))
        if not any(run.glob("evaluations/*/evaluation.json")):
            draf(
                "evaluate", run, "--release", folder / "cohort", "--truth", folder / "cohort-raw" / "truth",
                *overrides(["splits=[ood]", "sweep=null", "bootstrap=200"]),
            )  # fmt: skip
        (evaluation,) = run.glob("evaluations/*/evaluation.json")
        split = json.loads(evaluation.read_text())["splits"][0]
        regret, scaled = split["regret"], split["scaled"]
        return {
            "model": self.model,
            "subjects": self.subjects,
            "seed": self.seed,
            "studies": split["num_studies"],
            "regret": regret["expected"]["value"],
            "regret_observed": regret["observed"]["value"],
            "nll": scaled["nll"]["value"],
            "nll_posterior": regret["posterior"]["nll"]["value"],
            "auroc": scaled["auroc"]["value"],
            "auroc_posterior": regret["posterior"]["auroc"]["value"],
            "ece": scaled["ece"]["value"],
            "ece_raw": split["raw"]["ece"]["value"],
            "ece_posterior": regret["posterior"]["ece"]["value"],
        }


def overrides(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def draf(*words: object) -> None:
    """One call of the command line, as a user would make it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "draf_dist.cli.app", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")


def prepare(folder: Path, raw: Path, release: Path, subjects: int, seed: int, *settings: str) -> None:
    if not raw.exists():
        draf("synth", raw, "--subjects", subjects, "--seed", seed)
    if not (release / "HEAD.json").exists():
        draf("prepare", raw / "card.yaml", "--raw", raw / "raw", "--out", release, *overrides(list(settings)))


def summarise(rows: list[dict[str, object]]) -> str:
    """A Markdown table: medians over seeds, and the range of the regret."""
    lines = [
        "| model | subjects | regret, nats: median (range) | NLL | NLL of the posterior | AUROC | AUROC of the posterior "
        "| ECE scaled | ECE raw |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key in sorted({(str(row["model"]), int(str(row["subjects"]))) for row in rows}):
        cells = [row for row in rows if (row["model"], row["subjects"]) == key]
        column = {name: [float(str(row[name])) for row in cells] for name in cells[0] if name != "model"}
        spread = f"{median(column['regret']):.4f} ({min(column['regret']):.4f} to {max(column['regret']):.4f})"
        rest = ("nll", "nll_posterior", "auroc", "auroc_posterior", "ece", "ece_raw")
        lines.append(f"| {key[0]} | {key[1]:,} | {spread} | " + " | ".join(f"{mean(column[name]):.4f}" for name in rest) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=int, nargs="+", choices=EPOCHS, default=list(EPOCHS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--models", nargs="+", default=["draf", "mean"])
    parser.add_argument("--folder", type=Path, default=Path("study"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    held_out = f"split.held_out_sites={SEEN_SITES}"
    prepare(folder, folder / "cohort-raw", folder / "cohort", COHORT_SUBJECTS, COHORT_SEED, held_out)
    for subjects in options.subjects:
        for seed in options.seeds:
            prepare(folder, folder / f"raw-{subjects}-{seed}", folder / f"release-{subjects}-{seed}", subjects, seed)
    cells = [Cell(model, subjects, seed) for subjects in options.subjects for seed in options.seeds for model in options.models]
    # Longest first, so that the processes end together.
    with ProcessPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(Cell.run, sorted(cells, key=lambda cell: -cell.subjects), [folder] * len(cells)))
    print(summarise(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

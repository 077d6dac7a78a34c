"""What a finished benchmark of records knows beside its tables of results: docs/findings.md, section on records.

    python benchmarks/findings_records.py jobs/bench_zoo_eicu.yaml --raw eicu_demo --out runs/bench_zoo_eicu
        [--only signals passes abstention sites known treatments] [--set 'seeds=[0]'] [--json FILE]
    python benchmarks/findings_records.py jobs/bench_findings_eicu.yaml --raw eicu_demo --out runs/bench_findings_eicu

Needs DRAF_SUBJECT_KEY as `draf bench` did, whose folder it reads. It trains nothing and writes nothing there. `passes` and
`treatments` predict the folds once more with the models of the cells; treatments are those of jobs/bench_findings_eicu.yaml, whose
conditions they need. What is said of systems by name is left out where the job has no such system. Intervals are 95 % percentiles
over 500 resamples of subjects (and of seeds where systems are compared), where nothing else is said.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from findings_alarms import abstention
from findings_signals import detection, passes, risk
from findings_sites import known, site_tables
from findings_study import Silent, Study
from findings_tables import Tables, show_tables
from findings_treatments import CONDITIONS, treatment_tables

from draf_dist.cli.subject_key import subject_key
from draf_dist.evaluation.bench import Prepared, prepare_bench
from draf_dist.evaluation.bench_cell import is_finished
from draf_dist.evaluation.bench_job import load_bench_job
from draf_dist.sources.card import load_card

PARTS: dict[str, Callable[[Study], Tables]] = {
    "signals": lambda study: {
        "Spearman of U_m with p_m, clean: mean over modalities and models": risk(study),
        "Signals of a modality under noise: mean over modalities with numbers and models": detection(study),
    },
    "passes": lambda study: {"Epistemic U_m of few passes and of many others, clean": passes(study)},
    "abstention": lambda study: {"Alarms at p >= .2, the least certain studies left out": abstention(study)},
    "sites": site_tables,
    "known": lambda study: {"Gain on clean studies, mean of folds, 95 % t interval over folds": known(study)},
    "treatments": treatment_tables,
}


def main() -> None:
    """Prints tables; with --json writes every number."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job")
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="of all that the job has conditions for")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    job = load_bench_job(given.job, given.overrides)
    key = subject_key(public=load_card(job.card).split.public_subject_key)
    prepared = prepare_bench(job, given.raw, given.out, key, Silent())
    _check_finished(parser, prepared)
    missing = [name for name in CONDITIONS if name not in job.conditions]
    if missing and "treatments" in (given.only or ()):
        parser.error(f"{given.job}: treatments need the conditions {', '.join(CONDITIONS)}, found no {', '.join(missing)}.")
    study, found = Study(prepared, None), Tables()
    for name in given.only or [one for one in PARTS if not (missing and one == "treatments")]:
        found |= PARTS[name](study)
    show_tables(found, given.json)


def _check_finished(parser: argparse.ArgumentParser, prepared: Prepared) -> None:
    waiting = [cell.name for cell in prepared.cells if not is_finished(cell)]
    if waiting:
        total = len(prepared.cells)
        found = f"expected {total} finished cells, found {total - len(waiting)}; the first that is not: {waiting[0]}"
        parser.error(f"{prepared.store.url}: {found}. Run draf bench with the same job, --out and --set.")


if __name__ == "__main__":
    main()

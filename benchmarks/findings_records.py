"""What a finished benchmark of records knows beside its tables of results: docs/findings.md, section on records.

    python benchmarks/findings_records.py jobs/bench_zoo_eicu.yaml --raw eicu_demo --out runs/bench_zoo_eicu
        [--only signals passes abstention sites known treatments] [--set 'seeds=[0]'] [--json FILE]
    python benchmarks/findings_records.py jobs/bench_findings_eicu.yaml --raw eicu_demo --out runs/bench_findings_eicu

Needs DRAF_SUBJECT_KEY as `draf bench` did, whose folder it reads. It trains nothing and writes nothing there. `passes` and
`treatments` predict the folds once more with the models of the cells; treatments are those of jobs/bench_findings_eicu.yaml, whose
conditions they need. What is said of systems by name is left out where the job has no such system, and so is a part that lacks its
systems, conditions or classes. Intervals are 95 % percentiles over 500 resamples of subjects (and of seeds where systems are
compared), where nothing else is said.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from findings_alarms import abstention
from findings_signals import DRAF, MEASURING, WEIGHING, detection, noises_of, passes, risk
from findings_sites import GAINS, REJECTION, known, site_tables
from findings_study import Silent, Study
from findings_tables import Tables, show_tables
from findings_treatments import CONDITIONS, treatment_tables

from draf_dist.cli.subject_key import subject_key
from draf_dist.data.release import HEAD
from draf_dist.errors import DrafError, SpecError, explain
from draf_dist.evaluation.bench import Prepared, prepare_bench
from draf_dist.evaluation.bench_cell import is_finished
from draf_dist.evaluation.bench_folds import PLAN, RELEASES
from draf_dist.evaluation.bench_job import BenchJob, load_bench_job
from draf_dist.schema.label import LabelSpec, TaskSpec
from draf_dist.sources.card import load_card
from draf_dist.storage import open_store

FINISH = "Run draf bench to its end with the same job, --out and --set first."


@dataclass(frozen=True)
class Part:
    """tables: by title. lacks: what they need and a job on studies with this label does not have; "" where it has everything."""

    tables: Callable[[Study], Tables]
    lacks: Callable[[BenchJob, TaskSpec], str]


def _signal_tables(study: Study) -> Tables:
    noise = "Signals of a modality under noise, from the same studies clean: mean over modalities with numbers and models"
    found = {"Spearman of U_m with p_m, clean: mean over modalities and models": risk(study), noise: detection(study)}
    return {title: table for title, table in found.items() if table}


def _abstention_tables(study: Study) -> Tables:
    return {f"Alarms of {study.prepared.job.reference} at p >= .2, the least certain studies left out": abstention(study)}


def _gain_tables(study: Study) -> Tables:
    title = (
        "Gain on clean studies, mean of folds, 95 % t interval over folds (known: validation studies, on which stopping and "
        "temperature were chosen; a gain of NLL is better when negative)"
    )
    return {title: known(study)}


def _lacks_signals(job: BenchJob, label: TaskSpec) -> str:
    heard = (*DRAF, *WEIGHING, *MEASURING)
    if set(DRAF) & set(job.systems) or (noises_of(job) and set(heard) & set(job.systems)):
        return ""
    return f"one of the systems {', '.join(DRAF)}, or a condition ehr_noise and one of {', '.join(heard)}"


def _lacks_two_classes(job: BenchJob, label: TaskSpec) -> str:
    return "" if isinstance(label, LabelSpec) and len(label.classes) == 2 else "a label of two classes"


def _lacks_gains(job: BenchJob, label: TaskSpec) -> str:
    pairs = [f"{one} and {other}" for one, other in GAINS if {one, other} <= set(job.systems)]
    needed = "" if pairs else "the systems " + ", or ".join(f"{one} and {other}" for one, other in GAINS)
    return _lacks_two_classes(job, label) or needed


def _lacks_treatments(job: BenchJob, label: TaskSpec) -> str:
    missing = [name for name in CONDITIONS if name not in job.conditions]
    return _lacks_rejection(job, label) or (f"the conditions {', '.join(missing)}" if missing else "")


def _lacks_rejection(job: BenchJob, label: TaskSpec) -> str:
    return "" if REJECTION in job.systems else f"the system {REJECTION}"


def _lacks_draf(job: BenchJob, label: TaskSpec) -> str:
    return "" if set(DRAF) & set(job.systems) else f"one of the systems {', '.join(DRAF)}"


PARTS = {
    "signals": Part(_signal_tables, _lacks_signals),
    "passes": Part(lambda study: {"Epistemic U_m of few passes and of many others, clean": passes(study)}, _lacks_draf),
    "abstention": Part(_abstention_tables, _lacks_two_classes),
    "sites": Part(site_tables, _lacks_rejection),
    "known": Part(_gain_tables, _lacks_gains),
    "treatments": Part(treatment_tables, _lacks_treatments),
}


def main(words: Sequence[str] | None = None) -> None:
    """Prints tables; with --json writes every number. words: of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job")
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="of all that the job has systems and conditions for")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(words)
    try:
        study = Study(_finished(load_bench_job(given.job, given.overrides), given.raw, given.out), None)
        lacking = {name: PARTS[name].lacks(study.prepared.job, study.schema.label) for name in given.only or PARTS}
        for name, needed in lacking.items():
            if needed and given.only:
                parser.error(f"{given.job}: {name} needs {needed}, found none. Leave {name} out of --only, or take another job.")
        found = Tables()
        for name, needed in lacking.items():
            if needed:
                print(f"{name} is left out: it needs {needed}.", file=sys.stderr)
            else:
                found |= PARTS[name].tables(study)
    except DrafError as error:
        parser.error(str(error))
    show_tables(found, given.json)


def _finished(job: BenchJob, raw: Path, out: str) -> Prepared:
    """The benchmark in a folder, all of whose folds and cells are there: nothing is written.

    Raises:
        SpecError: it is not there or not finished; the folder holds another one; the reference is a baseline.
    """
    if job.reference not in job.systems:
        remedy = "Add --set reference=NAME."
        raise SpecError(explain("reference", expected="one of the systems", found=f"the baseline {job.reference}", remedy=remedy))
    store = open_store(out)
    # What is not there prepare_bench would make.
    paths = (PLAN, *(f"{RELEASES}/fold-{number}/{HEAD}" for number in range(job.folds)))
    missing = [path for path in paths if not store.exists(path)]
    if missing:
        found, remedy = f"no {missing[0]}", f"Correct --out. {FINISH}"
        raise SpecError(explain(store.url, expected="the folder of a finished benchmark", found=found, remedy=remedy))
    prepared = prepare_bench(job, raw, out, subject_key(public=load_card(job.card).split.public_subject_key), Silent())
    waiting = [cell.name for cell in prepared.cells if not is_finished(cell)]
    if waiting:
        total = len(prepared.cells)
        found = f"{total - len(waiting)}; the first that is not is {waiting[0]}"
        raise SpecError(explain(store.url, expected=f"{total} finished cells", found=found, remedy=FINISH))
    return prepared


if __name__ == "__main__":
    main()

"""`draf evaluate`: a finished run to predictions, evaluation.json and report.html."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from draf_dist.cli.output import JsonOption, SetOption, console, print_json, progress, table
from draf_dist.cli.prepare import termination_as_interrupt
from draf_dist.cli.subject_key import subject_key

if TYPE_CHECKING:
    from draf_dist.evaluation.masks import MaskEvaluation
    from draf_dist.evaluation.results import Evaluation, SplitResult
    from draf_dist.evaluation.spread import Workers
    from draf_dist.evaluation.statistics import Estimate

SHOWN = {
    "class": ("auroc", "auprc", "nll", "ece", "brier", "aurc", "accuracy"),
    "multilabel": ("auroc", "auprc", "nll", "ece", "brier", "aurc"),
    "survival": ("c_index", "c_index_ipcw", "nll", "ibs"),
}


def evaluate(
    run: Annotated[str, typer.Argument(help="URL of the run folder.")],
    job: Annotated[Path | None, typer.Option(help="Evaluation spec (YAML); the defaults if not given.")] = None,
    release: Annotated[str | None, typer.Option(help="Another release to evaluate on, with the same modalities and label.")] = None,
    truth: Annotated[Path | None, typer.Option(help="Folder `truth` of `draf synth`: also report regret.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Where to run (YAML, see cluster/); this process if not given.")] = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Measure accuracy, calibration, abstention and robustness of a run, with intervals. The same command continues.

    Example: draf evaluate runs/first --truth data/truth --profile cluster/ray_local.yaml
    """
    from draf_dist.config.spec import apply_overrides, read_yaml, validate_spec
    from draf_dist.evaluation.evaluate import REPORT, results_folder
    from draf_dist.evaluation.evaluate import evaluate as evaluate_run
    from draf_dist.evaluation.job import EvaluateJob
    from draf_dist.evaluation.masks import evaluate_masks
    from draf_dist.sources.synth.truth import posterior_by_uid

    tree = {} if job is None else read_yaml(job)
    apply_overrides(tree, overrides or ())
    spec = validate_spec(tree, EvaluateJob, where="--set" if job is None else str(job))
    planted = None if truth is None else posterior_by_uid(truth, subject_key(public=True))
    workers = workers_of(profile, run)
    if (masks := evaluate_masks(run, spec, workers.place.device, release_url=release)) is not None:
        print_json(masks.model_dump(mode="json")) if json else print_masks(masks)
        if release is None and not json:
            console.print(f"Numbers and picture: {run.rstrip('/')}/masks.json, masks.png", soft_wrap=True, highlight=False)
        return
    with termination_as_interrupt(), progress() as bar:
        task = bar.add_task("evaluating", total=None)
        found = evaluate_run(
            run,
            spec,
            release_url=release,
            truth=planted,
            workers=workers,
            on_progress=lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total),
        )
    if json:
        print_json(found.model_dump(mode="json"))
        return
    print_evaluation(found)
    console.print(f"Report: {run.rstrip('/')}/{results_folder(found.about)}{REPORT}", soft_wrap=True, highlight=False)


def workers_of(path: Path | None, run: str) -> "Workers":
    """Who predicts; run: URL of the run folder, where parts are written."""
    from draf_dist.evaluation.parts import Place
    from draf_dist.evaluation.spread import Workers
    from draf_dist.executor import Serial
    from draf_dist.launch.cluster_profile import load_profile
    from draf_dist.launch.profile import OneProcessProfile

    profile = OneProcessProfile() if path is None else load_profile(path)
    if isinstance(profile, OneProcessProfile):
        here = profile.backend()
        device: Literal["cpu", "cuda"] = "cuda" if here.device.type == "cuda" else "cpu"
        return Workers(Serial(), Place(device, here.threads, here.decode_threads))
    # Ray takes seconds to import; who does not use it does not wait for it.
    from draf_dist.launch.ray_executor import RayExecutor

    decode_threads = profile.decode_threads or Place().decode_threads
    place = Place("cuda" if profile.gpus_per_worker else "cpu", profile.threads, decode_threads)
    return Workers(RayExecutor(profile, run), place)


def print_evaluation(evaluation: "Evaluation") -> None:
    """The headline table, temperature-scaled, and the warnings."""
    columns = ("temperature-scaled", *(f"{split.split} ({split.num_studies} studies)" for split in evaluation.splits))
    shown = SHOWN[evaluation.about.task]
    rows = [(name.upper().replace("_", " "), *(_metric(split, name) for split in evaluation.splits)) for name in shown]
    if any(split.regret is not None for split in evaluation.splits):
        regrets = ("-" if split.regret is None else _cell(split.regret.observed) for split in evaluation.splits)
        rows.append(("regret, nats", *regrets))
    console.print(table("metrics, with 95 % intervals over subjects", columns, rows))
    for warning in evaluation.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)


def print_masks(evaluation: "MaskEvaluation") -> None:
    """Dice by structure and how well uncertainties find errors, means over studies."""
    columns = ("means over studies", *(f"{split.split} ({split.num_studies} studies)" for split in evaluation.splits))
    rows = [("NLL", *(_cell(split.nll) for split in evaluation.splits))]
    for name in evaluation.splits[0].dice:
        rows.append((f"Dice, {name}", *(_cell(split.dice[name]) for split in evaluation.splits)))
    for zone, scores in evaluation.splits[0].zones.items():
        rows.append((f"wrong voxels, {zone}", *(_cell(split.zones[zone].error_rate) for split in evaluation.splits)))
        for name in scores.error_auroc:
            found = (_cell(split.zones[zone].error_auroc[name]) for split in evaluation.splits)
            rows.append((f"AUROC of errors by {name}, {zone}", *found))
    console.print(table("masks of whole volumes, with 95 % intervals over subjects", columns, rows))


def _metric(split: "SplitResult", name: str) -> str:
    return _cell(split.scaled[name]) if name in split.scaled else "-"


def _cell(estimate: "Estimate") -> str:
    if estimate.value is None:
        return "-"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"

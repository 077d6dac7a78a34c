"""The evaluation of one finished run: predictions, evaluation.json and report.html into its folder."""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

from pydantic import ValidationError

from draf_dist.data.loader_stats import LoaderStats
from draf_dist.data.release import Release
from draf_dist.errors import DataError, explain
from draf_dist.evaluation.describe import Context, describe_split
from draf_dist.evaluation.job import EvaluateJob
from draf_dist.evaluation.parts import FOLDER as PARTS
from draf_dist.evaluation.predictions import Predictions, file_name, write_predictions
from draf_dist.evaluation.regret import PlantedTruth
from draf_dist.evaluation.report import render
from draf_dist.evaluation.results import About, Evaluation
from draf_dist.evaluation.robustness import SweepRun, describe_sweep
from draf_dist.evaluation.run_parts import remove_parts
from draf_dist.evaluation.signals import find_warnings, measure_signals
from draf_dist.evaluation.spread import ONE_PROCESS, Workers, predict_run
from draf_dist.evaluation.subject import Subject, open_subject
from draf_dist.metrics.temperature import fit_temperature
from draf_dist.schema.release import Split
from draf_dist.storage import Store

EVALUATION, REPORT = "evaluation.json", "report.html"
PREDICTIONS, OTHERS = "predictions", "evaluations"
Progress = Callable[[str, int, int], None]


def evaluate(
    run_url: str,
    job: EvaluateJob,
    *,
    release_url: str | None = None,
    truth: Mapping[int, PlantedTruth] | None = None,
    workers: Workers = ONE_PROCESS,
    on_progress: Progress = lambda stage, done, total: None,
) -> Evaluation:
    """Evaluates a run on the release that it was trained on, or on another with the same modalities and label.

    What can't be read is treated as the run's job says (bad_data); what was left out is among the warnings.
    truth: uid -> planted truth, for synthetic data; regret is reported then. on_progress(stage, done, total) is called often.
    workers: where predictions are made. What was predicted when a call was ended, however it was, the same call takes from there.
    Writes predictions/*.parquet, evaluation.json and report.html into the run folder, each at once; of another release into
    evaluations/<version>/ there, so that the run's own stay. The same run, job, release and place give the same bytes, however many
    workers there are.

    Raises:
        SpecError: there is no run or release, or no exported model yet.
        DataError: the model can't read the release, or files are damaged.
    """
    subject = open_subject(run_url, release_url)
    about = _about(subject, job)
    folder = results_folder(about)
    found = predict_run(subject, job, f"{folder}{PARTS}", workers, lambda done, total: on_progress("predict", done, total))
    clean = found.clean
    known = clean["val"].labelled()
    temperature = fit_temperature(known.probability.astype("float64"), known.target)
    context = Context(job, temperature.value, _subject_numbers(subject.release), truth)
    splits = []
    for done, name in enumerate(job.splits):
        on_progress("metrics", done, len(job.splits))
        if name in clean:
            splits.append(describe_split(clean[name], context))
    schema = subject.release.schema
    sweep = describe_sweep(found.swept, job.sweep, schema, context) if job.sweep is not None and found.swept else None
    signals = measure_signals(clean["val"], sweep.clean if sweep else None, sweep.corrupted if sweep else ())
    result = sweep.result if sweep else None
    evaluation = Evaluation(
        about=about,
        temperature=temperature,
        splits=tuple(splits),
        sweep=result,
        signals=signals,
        warnings=_empty_splits(job, clean) + _left_out(found.read) + find_warnings(job, temperature, splits, signals, result),
    )
    _write(subject.run.store, evaluation, list(clean.values()), sweep)
    remove_parts(subject.run.store, f"{folder}{PARTS}")
    return evaluation


def results_folder(about: About) -> str:
    """Where in the run folder the results of an evaluation lie: "" or "evaluations/<version of another release>/"."""
    return "" if about.trained_on.rpartition("@")[2] == about.release_version else f"{OTHERS}/{about.release_version}/"


def read_evaluation(store: Store) -> Evaluation | None:
    """What an earlier evaluation of a run found; None where there was none.

    Raises:
        DataError: evaluation.json is damaged, or of another version.
    """
    if not store.exists(EVALUATION):
        return None
    try:
        return Evaluation.model_validate_json(store.read(EVALUATION))
    except ValidationError as error:
        remedy = "Evaluate the run again."
        raise DataError(
            explain(store.where(EVALUATION), expected="an evaluation", found="something else", remedy=remedy)
        ) from error


def _subject_numbers(release: Release) -> dict[int, int]:
    """Numbers by uid, equal for studies of one subject; the pseudonyms themselves stay in the release."""
    table = release.subjects()
    numbers: dict[str, int] = {}
    pairs = zip(table["uid"].to_pylist(), table["subject"].to_pylist(), strict=True)
    return {uid: numbers.setdefault(subject, len(numbers)) for uid, subject in pairs}


def _about(subject: Subject, job: EvaluateJob) -> About:
    exported, schema = subject.exported, subject.release.schema
    return About(
        run=subject.run.url.rstrip("/").rpartition("/")[2],
        job_name=subject.run.job.name,
        release=subject.release.url,
        release_version=subject.release.version,
        trained_on=subject.run.job.release,
        model=exported.config.kind,
        num_parameters=sum(parameter.numel() for parameter in exported.model.parameters()),
        weights_sha256=subject.weights_sha256,
        modalities=schema.names,
        label=schema.label.name,
        classes=schema.label.classes,
        settings=job,
    )


def _empty_splits(job: EvaluateJob, clean: Mapping[Split, Predictions]) -> tuple[str, ...]:
    return tuple(f"Split {name} holds no study: nothing is reported of it." for name in job.splits if name not in clean)


def _left_out(read: Mapping[Split, LoaderStats]) -> tuple[str, ...]:
    return tuple(
        f"Split {name}: {stats.left_out} of {stats.members} files could not be used and were left out (bad_data of the run's job); "
        f"{stats.lost_samples} studies are missing for that."
        for name, stats in read.items()
        if stats.left_out
    )


def _write(store: Store, evaluation: Evaluation, clean: Sequence[Predictions], sweep: SweepRun | None) -> None:
    folder = results_folder(evaluation.about)
    written = [f"{folder}{file_name(part.split)}" for part in clean]
    for path, part in zip(written, clean, strict=True):
        write_predictions(store, path, [part])
    swept = [*sweep.corrupted, *sweep.removed] if sweep else []
    for (split, operation), parts in groupby(
        sorted(swept, key=lambda part: part.applied.operation), key=lambda part: (part.split, part.applied.operation)
    ):
        written.append(f"{folder}{file_name(split, operation)}")
        write_predictions(store, written[-1], list(parts))
    # An earlier evaluation may have had more corruptions; what this one's numbers don't rest on must not lie beside them.
    for path in set(store.list(f"{folder}{PREDICTIONS}")) - set(written):
        store.delete(path)
    text = json.dumps(evaluation.model_dump(mode="json"), indent=1, allow_nan=False)
    store.write(f"{folder}{EVALUATION}", (text + "\n").encode())
    # The report comes last: where it is, everything that it rests on is there too.
    store.write(f"{folder}{REPORT}", render(evaluation).encode())

"""The evaluation of one finished run: predictions, evaluation.json and report.html into its folder."""

import hashlib
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

from pydantic import ValidationError

from draf_dist.data.loader_stats import LoaderStats
from draf_dist.data.release import Release
from draf_dist.errors import DataError, GateError, explain
from draf_dist.evaluation.context import Context
from draf_dist.evaluation.describe import counted_names, describe_split
from draf_dist.evaluation.follow_up import follow_up_of
from draf_dist.evaluation.job import EvaluateJob
from draf_dist.evaluation.predictions import Predictions, file_name, to_parquet
from draf_dist.evaluation.regret import PlantedTruth
from draf_dist.evaluation.report import render
from draf_dist.evaluation.results import About, Evaluation
from draf_dist.evaluation.robustness import SweepRun, describe_sweep
from draf_dist.evaluation.run_parts import remove_parts
from draf_dist.evaluation.scoring import task_asked, temperature_of
from draf_dist.evaluation.signals import find_warnings, measure_signals
from draf_dist.evaluation.spread import ONE_PROCESS, Workers, parts_folder, predict_run
from draf_dist.evaluation.subject import Subject, open_subject
from draf_dist.evaluation.task_scores import TaskName
from draf_dist.models.backbones import mc_scope
from draf_dist.schema.release import Split
from draf_dist.storage import MissingError, Store

EVALUATION, REPORT = "evaluation.json", "report.html"
PREDICTIONS, OTHERS = "predictions", "evaluations"
# Of two evaluations that write at the same time both may find files of the other; so often each writes its own again.
ROUNDS = 6
RANKS_ONLY = (
    "The model was trained by Cox's likelihood alone (lambda_nll 0): it ranks. Quote its C-indices; NLL, Brier and calibration are "
    "of hazards of which nothing but their order was asked."
)
_draw = random.SystemRandom().random
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
        SpecError: there is no run or release, or no exported model yet; the label is a mask.
        DataError: the model can't read the release, or files are damaged.
        GateError: other evaluations of the run write their results at the same time, again and again.
    """
    subject = open_subject(run_url, release_url)
    task = task_asked(subject.release.schema.label, where="draf evaluate")
    folder = parts_folder(subject, job, workers.place)
    found = predict_run(subject, job, folder, workers, lambda done, total: on_progress("predict", done, total))
    clean = found.clean
    temperature = temperature_of(clean["val"])
    context = Context(job, temperature.value, _subject_numbers(subject.release), truth, follow_up_of(subject.trained_on))
    splits = []
    for done, name in enumerate(job.splits):
        on_progress("metrics", done, len(job.splits))
        if name in clean:
            splits.append(describe_split(clean[name], context))
    schema = subject.release.schema
    sweep = describe_sweep(found.swept, job.sweep, schema, context) if job.sweep is not None and found.swept else None
    signals = measure_signals(clean["val"], sweep.clean if sweep else None, sweep.corrupted if sweep else ())
    result = sweep.result if sweep else None
    files = _prediction_files(list(clean.values()), sweep)
    evaluation = Evaluation(
        about=_about(subject, job, task, counted_names(clean["val"])),
        temperature=temperature,
        splits=tuple(splits),
        sweep=result,
        signals=signals,
        warnings=_empty_splits(job, clean)
        + _left_out(found.read)
        + _ranks_only(subject)
        + find_warnings(job, temperature, splits, signals, result, task=task),
        predictions={path: hashlib.sha256(data).hexdigest() for path, data in files.items()},
    )
    write_results(subject.run.store, evaluation, files)
    remove_parts(subject.run.store, folder)
    return evaluation


def results_folder(about: About) -> str:
    """Where in the run folder the results of an evaluation lie: "" or "evaluations/<version of another release>/"."""
    return "" if about.trained_on.rpartition("@")[2] == about.release_version else f"{OTHERS}/{about.release_version}/"


def write_results(store: Store, evaluation: Evaluation, predictions: dict[str, bytes]) -> None:
    """Writes all results, and looks whether they are there.

    Of several evaluations that write at the same time, the one that writes last then sees what will stay; if that is not all its
    own, it writes again, after a pause. So in the end all files are of one of them.

    Raises:
        GateError: another's were there every time.
    """
    folder = results_folder(evaluation.about)
    text = json.dumps(evaluation.model_dump(mode="json"), indent=1, allow_nan=False)
    # The report comes last: where it is, everything that it rests on is there too.
    results = {EVALUATION: (text + "\n").encode(), REPORT: render(evaluation).encode()}
    for attempt in range(ROUNDS):
        began = time.monotonic()
        for path, data in predictions.items():
            store.write(f"{folder}{path}", data)
        # An earlier evaluation may have had more corruptions; what this one's numbers don't rest on must not lie beside them.
        for path in _written(store, folder) - set(predictions):
            store.delete(f"{folder}{path}")
        for path, data in results.items():
            store.write(f"{folder}{path}", data)
        if _written(store, folder) == set(predictions) and all(
            _content(store, f"{folder}{path}") == data for path, data in (predictions | results).items()
        ):
            return
        # Two that write again and again must not keep in step.
        time.sleep(_draw() * 2 ** (attempt + 1) * (time.monotonic() - began))
    where, remedy = store.where(f"{folder}{EVALUATION}"), "Run the same command again, once nothing else evaluates the run."
    found = "those of another, which is writing too"
    raise GateError(explain(where, expected="the results of this evaluation", found=found, remedy=remedy))


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


def check_predictions(store: Store, evaluation: Evaluation) -> None:
    """Asks whether the predictions in a run folder are those that an evaluation's numbers rest on, before both are used together.

    Raises:
        DataError: some are another evaluation's, or gone: one has ended before it had written all, or is writing.
    """
    folder = results_folder(evaluation.about)
    if others := [path for path, sha256 in evaluation.predictions.items() if _sha256(_content(store, f"{folder}{path}")) != sha256]:
        found = f"another content, or none, in {len(others)} of {len(evaluation.predictions)} files"
        where, remedy = store.where(f"{folder}{others[0]}"), "Evaluate the run again, once nothing else evaluates it."
        raise DataError(explain(where, expected=f"the predictions of {EVALUATION} beside it", found=found, remedy=remedy))


def _sha256(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()


def _content(store: Store, path: str) -> bytes | None:
    try:
        return store.read(path)
    except MissingError:
        return None


def _written(store: Store, folder: str) -> set[str]:
    """The files of predictions that are there, relative to the folder."""
    return {path.removeprefix(folder) for path in store.list(f"{folder}{PREDICTIONS}")}


def _subject_numbers(release: Release) -> dict[int, int]:
    """Numbers by uid, equal for studies of one subject; the pseudonyms themselves stay in the release."""
    table = release.subjects()
    numbers: dict[str, int] = {}
    pairs = zip(table["uid"].to_pylist(), table["subject"].to_pylist(), strict=True)
    return {uid: numbers.setdefault(subject, len(numbers)) for uid, subject in pairs}


def _about(subject: Subject, job: EvaluateJob, task: TaskName, counted: tuple[str, ...]) -> About:
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
        classes=counted,
        settings=job,
        task=task,
        mc_scope=mc_scope(exported.model),
    )


def _empty_splits(job: EvaluateJob, clean: Mapping[Split, Predictions]) -> tuple[str, ...]:
    return tuple(f"Split {name} holds no study: nothing is reported of it." for name in job.splits if name not in clean)


def _ranks_only(subject: Subject) -> tuple[str, ...]:
    return (RANKS_ONLY,) if subject.only_ranks else ()


def _left_out(read: Mapping[Split, LoaderStats]) -> tuple[str, ...]:
    return tuple(
        f"Split {name}: {stats.left_out} of {stats.members} files could not be used and were left out (bad_data of the run's job); "
        f"{stats.lost_samples} studies are missing for that."
        for name, stats in read.items()
        if stats.left_out
    )


def _prediction_files(clean: Sequence[Predictions], sweep: SweepRun | None) -> dict[str, bytes]:
    """predictions/*.parquet -> content."""
    files = {file_name(part.split): to_parquet([part]) for part in clean}
    swept = [*sweep.corrupted, *sweep.removed] if sweep else []
    for (split, operation), parts in groupby(
        sorted(swept, key=lambda part: part.applied.operation), key=lambda part: (part.split, part.applied.operation)
    ):
        files[file_name(split, operation)] = to_parquet(list(parts))
    return files

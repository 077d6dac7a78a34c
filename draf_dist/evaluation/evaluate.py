"""The evaluation of one finished run: predictions, evaluation.json and report.html into its folder."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from pydantic import ValidationError

from draf_dist.data.corruption import Corruptor
from draf_dist.data.loader import EVALUATION_PREFETCH, Reading, SplitLoader
from draf_dist.data.loader_stats import LoaderStats
from draf_dist.data.normalise import Normaliser
from draf_dist.data.release import Release, open_release
from draf_dist.errors import DataError, SpecError, explain
from draf_dist.evaluation.describe import Context, describe_split
from draf_dist.evaluation.job import EvaluateJob
from draf_dist.evaluation.predict import Predictor, check_coverage
from draf_dist.evaluation.predictions import Predictions, file_name, write_predictions
from draf_dist.evaluation.regret import PlantedTruth
from draf_dist.evaluation.report import render
from draf_dist.evaluation.results import About, Evaluation
from draf_dist.evaluation.robustness import Sweeper, SweepRun
from draf_dist.evaluation.signals import find_warnings, measure_signals
from draf_dist.metrics.temperature import fit_temperature
from draf_dist.models.export import DESCRIPTION, REQUIRED_FILES, ExportedModel, read_model
from draf_dist.schema.release import SPLITS, Split
from draf_dist.storage import Store
from draf_dist.training.job import FinetuneJob
from draf_dist.training.run_folder import MODEL, RunFolder, open_run

EVALUATION, REPORT = "evaluation.json", "report.html"
PREDICTIONS, OTHERS = "predictions", "evaluations"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a trained model, the release that it meets, and the run that it came from.

    trained_on: the run's own release, whose validation split fits the temperature whatever release the model meets.
    """

    run: RunFolder
    job: FinetuneJob
    exported: ExportedModel
    weights_sha256: str
    release: Release
    trained_on: Release

    @property
    def normaliser(self) -> Normaliser:
        """With the statistics that the model carries: those of its own training data, whatever release it meets."""
        return Normaliser(self.release.schema, self.exported.stats)


def evaluate(
    run_url: str,
    job: EvaluateJob,
    *,
    release_url: str | None = None,
    truth: Mapping[int, PlantedTruth] | None = None,
    on_progress: Progress = lambda stage, done, total: None,
) -> Evaluation:
    """Evaluates a run on the release that it was trained on, or on another with the same modalities and label.

    What can't be read is treated as the run's job says (bad_data); what was left out is among the warnings.
    truth: uid -> planted truth, for synthetic data; regret is reported then. on_progress(stage, done, total) is called often.
    Writes predictions/*.parquet, evaluation.json and report.html into the run folder, each at once; of another release into
    evaluations/<version>/ there, so that the run's own stay. The same run, job and release give the same bytes.

    Raises:
        SpecError: there is no run or release, or no exported model yet.
        DataError: the model can't read the release, or files are damaged.
    """
    subject = open_subject(run_url, release_url)
    clean, read = _clean_predictions(subject, job, on_progress)
    known = clean["val"].labelled()
    temperature = fit_temperature(known.probability.astype("float64"), known.target)
    context = Context(job, temperature.value, _subject_numbers(subject.release), truth)
    splits = []
    for done, name in enumerate(job.splits):
        on_progress("metrics", done, len(job.splits))
        if name in clean:
            splits.append(describe_split(clean[name], context))
    sweep = _sweep(subject, context, on_progress) if job.sweep is not None else None
    signals = measure_signals(clean["val"], sweep.clean if sweep else None, sweep.corrupted if sweep else ())
    result = sweep.result if sweep else None
    evaluation = Evaluation(
        about=_about(subject, job),
        temperature=temperature,
        splits=tuple(splits),
        sweep=result,
        signals=signals,
        warnings=_empty_splits(job, clean) + _left_out(read) + find_warnings(job, temperature, splits, signals, result),
    )
    _write(subject.run.store, evaluation, list(clean.values()), sweep)
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


def open_subject(run_url: str, release_url: str | None) -> Subject:
    """The run's exported model and the release to meet; raises as `evaluate`."""
    run = open_run(run_url)
    if not isinstance(run.job, FinetuneJob):
        remedy = "Fine-tune with its encoder first: `pretrained` in a fine-tuning job."
        raise SpecError(explain(run.url, expected="a run of fine-tuning", found=f"one of {run.job.kind}", remedy=remedy))
    exported, weights_sha256 = read_exported(run)
    trained_on = open_release(run.job.release)
    release = trained_on if release_url is None else open_release(release_url)
    exported.check_schema(release.schema, where=release.pinned_url)
    return Subject(run, run.job, exported, weights_sha256, release, trained_on)


def read_exported(run: RunFolder) -> tuple[ExportedModel, str]:
    """The exported model of a finished run, checked, and the sha256 of its weights.

    Raises:
        SpecError: the run is not finished.
        DataError: a file is missing or damaged.
    """
    paths = {name: f"{MODEL}/{name}" for name in REQUIRED_FILES}
    # Its description is written last: before it the export is not whole.
    if not run.store.exists(paths[DESCRIPTION]):
        raise SpecError(
            explain(
                run.url,
                expected="a finished run",
                found="no exported model",
                remedy="Let draf train finish; the same command goes on.",
            )
        )
    files = {name: run.store.read(path) for name, path in paths.items()}
    exported = read_model(files, where=run.store.where(MODEL))
    return exported, str(json.loads(files[DESCRIPTION])["weights_sha256"])


def _clean_predictions(
    subject: Subject, job: EvaluateJob, on_progress: Progress
) -> tuple[dict[str, Predictions], dict[str, LoaderStats]]:
    """Predictions of validation and of every split asked for that holds a study; each study exactly once. And what was read."""
    wanted: list[Split] = [name for name in SPLITS if name == "val" or name in job.splits]
    found: dict[str, Predictions] = {}
    read: dict[str, LoaderStats] = {}
    reading = Reading(prefetch=EVALUATION_PREFETCH, bad_data=subject.job.bad_data)
    for done, name in enumerate(wanted):
        on_progress("predict", done, len(wanted))
        release = subject.trained_on if name == "val" else subject.release
        receipt = release.manifest.receipts.get(name)
        if receipt is None or receipt.count == 0:
            continue
        predictor = Predictor(subject.exported.model, release.schema, job.passes, job.seed)
        split = SplitLoader(release, name, job.batch_size, reading=reading)
        found[name] = predictor.predict(map(subject.normaliser, split.studies()), split=name)
        read[name] = split.stats()
        check_coverage(found[name], receipt, read[name].lost_samples)
    if "val" not in found:
        where = subject.trained_on.pinned_url
        raise SpecError(explain(where, expected="studies in the val split", found="none", remedy="Temperature is fitted there."))
    return found, read


def _sweep(subject: Subject, context: Context, on_progress: Progress) -> SweepRun | None:
    settings = context.job.sweep
    assert settings is not None
    receipt = subject.release.manifest.receipts.get(settings.split)
    if receipt is None or receipt.count == 0:
        return None
    corruptor = Corruptor(subject.job.corruption, subject.normaliser, seed=context.job.seed)
    predictor = Predictor(subject.exported.model, subject.release.schema, settings.passes, context.job.seed)
    sweeper = Sweeper(subject.release, corruptor, predictor, context, settings, subject.job.bad_data)
    return sweeper.run(lambda done, total: on_progress("sweep", done, total))


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


def _empty_splits(job: EvaluateJob, clean: Mapping[str, Predictions]) -> tuple[str, ...]:
    return tuple(f"Split {name} holds no study: nothing is reported of it." for name in job.splits if name not in clean)


def _left_out(read: Mapping[str, LoaderStats]) -> tuple[str, ...]:
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

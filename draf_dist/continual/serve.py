"""Predictions of a registered model, the same for ever: files checked against the registry, one noise, one temperature."""

from collections.abc import Callable
from dataclasses import dataclass

from draf_dist.continual.version import ModelVersion
from draf_dist.data.bad_data import STRICT, BadData
from draf_dist.data.loader import EVALUATION_PREFETCH, Reading, SplitLoader
from draf_dist.data.normalise import Normaliser
from draf_dist.data.release import Release, open_release
from draf_dist.errors import GateError, SpecError, explain
from draf_dist.evaluation.predict import Predictor, check_coverage
from draf_dist.evaluation.predictions import Predictions
from draf_dist.evaluation.scoring import scaled, task_asked
from draf_dist.evaluation.scoring import temperature_of as temperature_of_validation
from draf_dist.evaluation.subject import Subject, read_exported
from draf_dist.metrics.temperature import Temperature
from draf_dist.models.exchange import digest
from draf_dist.models.export import DESCRIPTION, ExportedModel
from draf_dist.schema.release import Split
from draf_dist.training.run_folder import MODEL, RunFolder, open_run
from draf_dist.training.validate import EVALUATION_SEED

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Noise:
    """What predictions depend on besides weights and data. batch_size too: sums over a batch round differently at another."""

    passes: int = 30
    batch_size: int = 64
    seed: int = EVALUATION_SEED


SERVED = Noise()


def predict(
    version: ModelVersion, release_url: str, split: Split, on_progress: Progress = lambda stage, done, total: None
) -> Predictions:
    """Temperature-scaled predictions of a registered version; the same version, release and split give the same bytes.

    Uncertainties and their decomposition are those before scaling.

    Raises:
        SpecError: no run, release, or study in the split.
        GateError: the model in the run folder is not the one that was registered.
        DataError: damaged files, or a release that the model can't read.
    """
    on_progress("open", 0, 2)
    exported = check_model(version)
    release = open_release(release_url)
    exported.check_schema(release.schema, where=release.pinned_url)
    on_progress("predict", 1, 2)
    return scaled(predict_split(exported, release, split, SERVED), version.temperature)


def check_model(version: ModelVersion) -> ExportedModel:
    """The model in a version's run folder, if it is still the one that was registered: weights, settings, statistics.

    Raises:
        SpecError, DataError: as `read_exported`.
        GateError: it is another.
    """
    run = open_run(version.run_url)
    exported, weights_sha256 = read_exported(run)
    _check_same(version, "weights that were", version.weights_sha256, weights_sha256)
    _check_same(version, "model.json that was", version.model_sha256, model_sha256(run))
    return exported


def model_sha256(run: RunFolder) -> str:
    """The sha256 of model.json, which holds the settings and the digests of weights and statistics."""
    return digest(run.store.read(f"{MODEL}/{DESCRIPTION}"))


def _check_same(version: ModelVersion, what: str, registered: str, found: str) -> None:
    where = f"{version.name} version {version.version}"
    if not registered:
        remedy = "Register the run again: it becomes a version of its own."
        raise GateError(
            explain(where, expected=f"the sha256 of the {what} registered", found="none in the registry", remedy=remedy)
        )
    if found != registered:
        expected = f"the {what} registered, sha256 {registered[:12]}"
        remedy = "The run folder was changed: restore it from a copy, or register what it holds now as a version of its own."
        raise GateError(explain(where, expected=expected, found=f"{found[:12]} in its run folder", remedy=remedy))


def predict_split(exported: ExportedModel, release: Release, split: Split, noise: Noise, bad_data: BadData = STRICT) -> Predictions:
    """Unscaled predictions of every study of a split, each once, but for what `bad_data` lets be left out.

    Raises:
        SpecError: the split holds no study; the label is a mask.
        DataError: the studies read are not those of the release.
    """
    task_asked(release.schema.label, where=release.pinned_url)
    receipt = release.manifest.receipts.get(split)
    if receipt is None or receipt.count == 0:
        remedy = "Name another split or release."
        raise SpecError(explain(release.pinned_url, expected=f"studies in the {split} split", found="none", remedy=remedy))
    predictor = Predictor(exported.model, release.schema, noise.passes, noise.seed)
    normaliser = Normaliser(release.schema, exported.stats)
    loader = SplitLoader(release, split, noise.batch_size, reading=Reading(prefetch=EVALUATION_PREFETCH, bad_data=bad_data))
    found = predictor.predict(map(normaliser, loader.studies()), split=split)
    check_coverage(found, receipt, loader.stats().lost_samples)
    return found


def temperature_of(subject: Subject, noise: Noise = SERVED) -> Temperature:
    """The temperature fitted on the validation split of the release that a run was trained on, without what the run left out."""
    return temperature_of_validation(predict_split(subject.exported, subject.trained_on, "val", noise, subject.job.bad_data))

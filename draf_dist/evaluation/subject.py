"""What an evaluation is of: the exported model of a finished run, and the release that it meets."""

import json
from dataclasses import dataclass

from draf_dist.config.spec import fingerprint
from draf_dist.data.normalise import Normaliser
from draf_dist.data.release import Release, open_release
from draf_dist.errors import SpecError, explain
from draf_dist.models.export import DESCRIPTION, REQUIRED_FILES, ExportedModel, read_model
from draf_dist.objectives.cox import CoxObjectiveConfig
from draf_dist.training.job import FinetuneJob
from draf_dist.training.run_folder import MODEL, RunFolder, open_run


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

    @property
    def only_ranks(self) -> bool:
        """Whether its hazards were trained to rank alone: then the order of risks means something, and no probability does."""
        objective = self.job.objective
        return isinstance(objective, CoxObjectiveConfig) and objective.lambda_nll == 0

    @property
    def model_sha256(self) -> str:
        """Of all of the model that predictions depend on: weights, settings, statistics; 64 hex digits."""
        exported = self.exported
        parts = {"config": exported.config, "schema": exported.schema, "stats": exported.stats}
        return fingerprint({"weights": self.weights_sha256} | {name: part.model_dump(mode="json") for name, part in parts.items()})


def open_subject(run_url: str, release_url: str | None) -> Subject:
    """The run's exported model and the release to meet, its own if none is named.

    Raises:
        SpecError: there is no run or release, or no exported model yet.
        DataError: the model can't read the release, or files are damaged.
    """
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

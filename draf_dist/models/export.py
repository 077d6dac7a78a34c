"""The exchange form of a model: safetensors, two JSON files and a model card. Never a pickle."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError
from torch import nn

from draf_dist import __version__
from draf_dist.config.spec import canonical_json, fingerprint
from draf_dist.errors import DataError, SpecError, explain
from draf_dist.models.backbones import mc_scope
from draf_dist.models.build import build_model
from draf_dist.models.card import model_card
from draf_dist.models.exchange import check_digest, digest, fill, require_files, unreadable, weights_of
from draf_dist.models.kinds import ModelConfig
from draf_dist.schema.modality import DataSchema
from draf_dist.schema.record import Record
from draf_dist.schema.release import ReleaseStats

WEIGHTS, DESCRIPTION, STATS, CARD = "model.safetensors", "model.json", "stats.json", "README.md"
REQUIRED_FILES = (WEIGHTS, DESCRIPTION, STATS)


class ModelDescription(Record):
    """model.json: what is needed to build the model again, and digests of what lies beside it."""

    format: int = Field(1, ge=1, le=1)
    draf_dist: str
    config: ModelConfig
    data_schema: DataSchema
    data_schema_sha256: str
    weights_sha256: str
    stats_sha256: str


@dataclass(frozen=True)
class ExportedModel:
    """A model with what it was trained on: pass it batches normalised with these stats, of this schema."""

    model: nn.Module
    config: ModelConfig
    schema: DataSchema
    stats: ReleaseStats

    def check_schema(self, schema: DataSchema, *, where: str) -> None:
        """Refuses data that the model can't read.

        Raises:
            DataError: modalities or classes are others, or stand in another order; sites may differ.
        """
        if (schema.modalities, schema.label) != (self.schema.modalities, self.schema.label):
            expected = f"modalities {', '.join(self.schema.names)} and label {self.schema.label.name} as the model was trained on"
            found = f"{', '.join(schema.names)} and {schema.label.name}, or other variables or classes under these names"
            raise DataError(explain(where, expected=expected, found=found, remedy="Use a release with the model's own schema."))


def model_files(
    model: nn.Module, config: ModelConfig, schema: DataSchema, stats: ReleaseStats, trained: Collection[str] | None = None
) -> dict[str, bytes]:
    """The files of model/ by name, for any store. The same model gives the same bytes.

    They are in the order in which to write them: model.json, which holds the digests of the others, comes last.
    trained: the sites of its training studies, where they are known; for the model card.
    """
    weights = weights_of(model)
    stats_json = canonical_json(stats)
    description = ModelDescription(
        format=1,
        draf_dist=__version__,
        config=config,
        data_schema=schema,
        data_schema_sha256=fingerprint(schema),
        weights_sha256=digest(weights),
        stats_sha256=digest(stats_json),
    )
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        WEIGHTS: weights,
        STATS: stats_json,
        CARD: model_card(config, schema, num_parameters, mc_scope(model), trained).encode(),
        DESCRIPTION: json.dumps(description.model_dump(mode="json"), indent=2).encode(),
    }


def save_model(folder: Path, model: nn.Module, config: ModelConfig, schema: DataSchema, stats: ReleaseStats) -> None:
    """Writes model_files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in model_files(model, config, schema, stats).items():
        (folder / name).write_bytes(content)


def load_model(folder: Path) -> ExportedModel:
    """The model in a folder; see read_model.

    Raises:
        SpecError: there is no such folder.
        DataError: a file is missing or bad.
    """
    if not folder.is_dir():
        raise SpecError(
            explain(str(folder), expected="a folder with an exported model", found="no such folder", remedy="Check the path.")
        )
    files = {name: (folder / name).read_bytes() for name in REQUIRED_FILES if (folder / name).is_file()}
    return read_model(files, where=str(folder))


def read_model(files: Mapping[str, bytes], *, where: str) -> ExportedModel:
    """The model in the files of model/, checked against their digests, and every tensor against name and shape.

    Raises:
        DataError: a file is missing, damaged, or not what the config says.
    """
    require_files(files, REQUIRED_FILES, where=where, what="an exported model")
    description = read_description(files[DESCRIPTION], where=f"{where}/{DESCRIPTION}")
    for name, wanted in ((WEIGHTS, description.weights_sha256), (STATS, description.stats_sha256)):
        check_digest(files[name], wanted, where=f"{where}/{name}")
    model = build_model(description.config, description.data_schema, seed=0)
    fill(model, files[WEIGHTS], where=f"{where}/{WEIGHTS}")
    try:
        stats = ReleaseStats.model_validate_json(files[STATS])
    except ValidationError as error:
        raise unreadable(f"{where}/{STATS}", "statistics of a release", error) from error
    return ExportedModel(model, description.config, description.data_schema, stats)


def read_description(content: bytes, *, where: str) -> ModelDescription:
    """The content of model.json.

    Raises:
        DataError: it is no description of a model, or was edited.
    """
    try:
        description = ModelDescription.model_validate_json(content)
    except ValidationError as error:
        raise unreadable(where, f"the description of a model of draf_dist {__version__}", error) from error
    if fingerprint(description.data_schema) != description.data_schema_sha256:
        raise DataError(
            explain(where, expected="a schema with its own digest", found="another", remedy="The file was edited; export again.")
        )
    return description

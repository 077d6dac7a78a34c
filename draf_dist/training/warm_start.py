"""Fine-tuning that goes on from an earlier run's model: which one, pinned before a run begins, and loaded at every attempt."""

from collections.abc import Iterator
from typing import Any

from draf_dist.errors import SpecError, explain, together
from draf_dist.models.export import DESCRIPTION, REQUIRED_FILES, ExportedModel, ModelDescription, read_description, read_model
from draf_dist.models.kinds import ModelConfig
from draf_dist.schema.modality import DataSchema
from draf_dist.training.earlier_run import check_pin, finished_run, split_pin
from draf_dist.training.run_folder import MODEL, RunFolder


def pin_start(url: str, config: ModelConfig, schema: DataSchema) -> str:
    """URL@<sha256 of model.safetensors> of the finished fine-tuning run at a URL, which may be pinned already.

    config, schema: of the model that is to start there, and of the data that it will read.

    Raises:
        SpecError: there is no run, it is of another kind, not finished, or trained again since; or its model is another one, or
            reads other data: one line for every difference.
        DataError: its description can't be read.
    """
    place, wanted = split_pin(url)
    run = _finished(place)
    description = read_description(run.store.read(f"{MODEL}/{DESCRIPTION}"), where=run.store.where(f"{MODEL}/{DESCRIPTION}"))
    check_pin(place, wanted, description.weights_sha256, what="model")
    if problems := [*_differences(description, config, schema)]:
        raise SpecError(together(problems))
    return f"{run.url}@{description.weights_sha256}"


def load_start(pinned_url: str, config: ModelConfig, schema: DataSchema) -> ExportedModel:
    """The model of a URL from pin_start, with the statistics that its input was normalised with.

    Raises:
        SpecError: as pin_start.
        DataError: a file of it is missing or damaged.
    """
    place, _ = split_pin(pin_start(pinned_url, config, schema))
    store = _finished(place).store
    files = {name: store.read(f"{MODEL}/{name}") for name in REQUIRED_FILES if store.exists(f"{MODEL}/{name}")}
    return read_model(files, where=store.where(MODEL))


def _finished(url: str) -> RunFolder:
    return finished_run(url, kind="finetune", what="fine-tuning", description=DESCRIPTION)


def _differences(there: ModelDescription, config: ModelConfig, schema: DataSchema) -> Iterator[str]:
    """One line for every setting of the model, every modality and every property of the label that is another one there.

    Sites may differ: no parameter belongs to one.
    """
    remedy = "Take the model section of that run's job.yaml."
    for key, wanted, found in _unequal("model", config.model_dump(mode="json"), there.config.model_dump(mode="json")):
        yield explain(f"warm_start: {key}", expected=str(found), found=str(wanted), remedy=remedy)
    remedy = "Use a release with the schema that the model was trained on."
    if schema.names != there.data_schema.names:
        known = ", ".join(there.data_schema.names)
        yield explain("warm_start: modalities", expected=known, found=", ".join(schema.names), remedy=remedy)
        return
    pairs = [*zip(schema.modalities, there.data_schema.modalities, strict=True), (schema.label, there.data_schema.label)]
    for here, before in pairs:
        for key, wanted, found in _unequal(here.name, here.model_dump(mode="json"), before.model_dump(mode="json")):
            yield explain(f"warm_start: {key}", expected=str(found), found=str(wanted), remedy=remedy)


def _unequal(name: str, here: Any, there: Any) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value here, value there) of what differs, as deep as both are mappings, or lists of one length."""
    if isinstance(here, dict) and isinstance(there, dict):
        for key in sorted(here.keys() | there.keys()):
            yield from _unequal(f"{name}.{key}", here.get(key), there.get(key))
    elif isinstance(here, list) and isinstance(there, list):
        if len(here) != len(there):
            yield name, f"{len(here)} entries", f"{len(there)} entries"
        for number, pair in enumerate(zip(here, there, strict=False)):
            yield from _unequal(f"{name}.{number}", *pair)
    elif here != there:
        yield name, here, there

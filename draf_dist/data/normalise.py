"""From stored units to what models see: z-scores where observed, 0 elsewhere."""

import torch
from torch import Tensor

from draf_dist.errors import SpecError, explain
from draf_dist.schema.batch import Batch, ModalityInput, SeriesInput
from draf_dist.schema.modality import DataSchema, ImageSpec, ModalitySpec, VolumeSpec
from draf_dist.schema.release import ImageStats, ReleaseStats, VariableStats


class Normaliser:
    """Applies the statistics of a training split to batches of any split.

    Images and volumes become f32 (value - mean) / std. Numeric variables become (value - mean) / std where observed, binary ones
    stay 0 or 1 and categorical ones codes. What is not observed is 0: the training mean, or a code that is not to be read. An
    absent slot becomes 0 and not observed, whatever it held: NaN included. A second application would standardise twice; batches
    come here once, from the loader.
    """

    def __init__(self, schema: DataSchema, stats: ReleaseStats) -> None:
        self.schema = schema
        self._constants = {spec.name: _constants(schema, stats, index) for index, spec in enumerate(schema.modalities)}
        self._categories = {spec.name: _categories(spec, stats) for spec in schema.modalities}

    def __call__(self, batch: Batch) -> Batch:
        """The batch with f32 inputs; everything else is passed on."""
        inputs: dict[str, ModalityInput] = {}
        for index, name in enumerate(batch.modalities):
            value, present = batch.inputs[name], batch.present[:, index]
            inputs[name] = (
                self._series(name, value, present) if isinstance(value, SeriesInput) else self._image(name, value, present)
            )
        return Batch(**{**vars(batch), "inputs": inputs})

    def constants(self, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, std) of a modality: f32 scalars for an image or volume, (F,) for a series; on the device of `like`."""
        mean, std = self._constants[name]
        return mean.to(like.device), std.to(like.device)

    def categories(self, name: str) -> dict[int, tuple[int, ...]]:
        """Place of each categorical variable of a modality -> how often its categories are observed in training."""
        return self._categories[name]

    def _image(self, name: str, pixels: Tensor, present: Tensor) -> Tensor:
        mean, std = self.constants(name, pixels)
        mask = present.reshape(-1, *(1 for _ in pixels.shape[1:]))
        # Images come channels last from the loader; models see them as they always did, so no result depends on it.
        return torch.where(mask, (pixels.float() - mean) / std, 0.0).contiguous()

    def _series(self, name: str, series: SeriesInput, present: Tensor) -> SeriesInput:
        mean, std = self.constants(name, series.values)
        observed = series.observed & present[:, None, None]
        values = torch.where(observed, (series.values - mean) / std, 0.0)
        return SeriesInput(values, observed, torch.where(present, series.length, 0))


def _constants(schema: DataSchema, stats: ReleaseStats, index: int) -> tuple[Tensor, Tensor]:
    spec = schema.modalities[index]
    if isinstance(spec, ImageSpec | VolumeSpec):
        image = stats.images.get(spec.name)
        if image is None:
            raise _unlike(spec.name, "no statistics")
        return torch.tensor(image.mean), torch.tensor(_scale(image))
    variables = stats.variables.get(spec.name, ())
    if len(variables) != len(spec.variables):
        raise _unlike(spec.name, f"{len(variables)} variables")
    as_stored = [variable.type != "numeric" for variable in spec.variables]
    mean = [0.0 if flag else one.mean for flag, one in zip(as_stored, variables, strict=True)]
    std = [1.0 if flag else _scale(one) for flag, one in zip(as_stored, variables, strict=True)]
    return torch.tensor(mean), torch.tensor(std)


def _categories(spec: ModalitySpec, stats: ReleaseStats) -> dict[int, tuple[int, ...]]:
    """Counts of every category of every categorical variable; of one that was never observed all categories count alike."""
    if isinstance(spec, ImageSpec | VolumeSpec):
        return {}
    found = {}
    for at, (variable, one) in enumerate(zip(spec.variables, stats.variables[spec.name], strict=True)):
        if not variable.categories:
            continue
        if len(one.categories) != len(variable.categories):
            raise _unlike(spec.name, f"{len(one.categories)} categories of {variable.name}")
        found[at] = one.categories if any(one.categories) else (1,) * len(variable.categories)
    return found


def _scale(stats: ImageStats | VariableStats) -> float:
    # A variable that never varied in training carries no scale: its z-score is the plain difference.
    return stats.std if stats.std > 0 else 1.0


def _unlike(modality: str, found: str) -> SpecError:
    return SpecError(
        explain(
            f"stats.json: {modality}",
            expected="statistics of every modality and variable of the schema",
            found=found,
            remedy="Use the stats.json that was stored with this release or model.",
        )
    )

"""What pre-training minimises: one objective a file. Adding one is one file and one line in the union."""

from typing import Annotated, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from draf_dist.models.encoders import EncoderConfig
from draf_dist.models.mc import name_streams
from draf_dist.objectives.pretrain_masked_values import MaskedValuesConfig
from draf_dist.objectives.pretrain_simclr import SimclrConfig
from draf_dist.schema.batch import Batch, Term
from draf_dist.schema.modality import DataSchema

PretrainObjectiveConfig = Annotated[SimclrConfig | MaskedValuesConfig, Field(discriminator="kind")]


class PretrainObjective(Protocol):
    """What `build` of every member of the union gives."""

    def __call__(self, model: nn.Module, batch: Batch, keys: Tensor, /) -> dict[str, Term]:
        """The terms of a normalised batch with keys (S, B), of which the first pass counts.

        Terms of scale 0 are measurements: nothing is trained by them.
        """
        ...

    def numbers(self, means: dict[str, float]) -> dict[str, float]:
        """What validation reports, from the global mean of every term: `loss`, which is to fall, among it."""
        ...


def build_network(
    objective: PretrainObjectiveConfig, schema: DataSchema, encoder: EncoderConfig | None, width: int, seed: int
) -> nn.Module:
    """The network of an objective; its `encoder` is what fine-tuning loads. encoder None: the default of the modality's kind.

    Starting parameters depend on the arguments only; the global generator stays as it was.

    Raises:
        SpecError: no such modality, or one that objective or encoder can't read.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = objective.network(schema, encoder, width)
    name_streams(network)
    return network

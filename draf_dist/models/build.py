"""A model from its config, the data schema and a seed, and nothing else."""

import torch
from torch import nn

from draf_dist.models.backbones import Backbones
from draf_dist.models.kinds import ModelConfig
from draf_dist.schema.modality import DataSchema


def build_model(config: ModelConfig, schema: DataSchema, seed: int) -> nn.Module:
    """The model with starting parameters that depend on (config, schema, seed) only; the global generator stays as it was.

    Models of one seed start from the same backbones if those are the same, so comparisons differ in the fusion alone.

    Raises:
        SpecError: an encoder does not fit its modality, or does not sample although it has MC dropout.
    """
    with torch.random.fork_rng(devices=[]):
        # Only the CPU generator: parameters are made on the CPU and moved later.
        torch.default_generator.manual_seed(seed)
        model = config.build(schema)
    check_sampling(model)
    return model


def check_sampling(model: nn.Module) -> None:
    """The start-up guard of rule D5 for every backbone of a model.

    Raises:
        SpecError: two passes of an encoder that has MC dropout are equal.
    """
    for module in model.modules():
        if isinstance(module, Backbones):
            module.check_sampling()

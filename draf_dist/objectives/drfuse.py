"""What a step of training DrFuse minimises (arXiv 2403.06197; spec 4.6)."""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from draf_dist.config.spec import Spec
from draf_dist.errors import SpecError, explain
from draf_dist.losses.drfuse import Divergence, orthogonality, output_losses, ranking, shared_divergence
from draf_dist.losses.task import is_known, modality_losses, task_loss
from draf_dist.objectives.fusion import FusionObjective, FusionObjectiveConfig
from draf_dist.schema.batch import Batch, FusionOutput, Term


class DrfuseObjectiveConfig(Spec):
    """All weights are 1 in the paper. jsd: `published` leaves half of the divergence out and counts unpaired rows (spec 4.6 b)."""

    kind: Literal["drfuse"] = "drfuse"
    lambda_distinct: float = Field(1.0, ge=0)
    lambda_shared: float = Field(1.0, ge=0)
    lambda_orthogonality: float = Field(1.0, ge=0)
    lambda_jsd: float = Field(1.0, ge=0)
    lambda_ranking: float = Field(1.0, ge=0)
    jsd: Divergence = "bernoulli"

    def build(self) -> "DrfuseObjective":
        """The objective."""
        return DrfuseObjective(self)


class DrfuseObjective:
    """Terms of one batch by name, here for modalities a and b.

    task, and shared, distinct_a, distinct_b: losses of the other heads. orthogonality_a, orthogonality_b, jsd. ranking_b_a,
    ranking_shared_a, ranking_shared_b: of every pair of tokens; their mean is the paper's. signal_...: as the model gives them.
    """

    def __init__(self, config: DrfuseObjectiveConfig) -> None:
        self.config = config
        self.fusion = FusionObjective(FusionObjectiveConfig())

    def __call__(self, model: nn.Module, batch: Batch, keys: Tensor) -> dict[str, Term]:
        """Runs the model on a normalised batch with keys (S, B).

        Raises:
            SpecError: the model is not DrFuse.
        """
        output: FusionOutput = model(batch, keys)
        if output.modality_logits is None or "shared_logits" not in output.parts:
            remedy = "Set model.kind: drfuse, or objective.kind: fusion."
            raise SpecError(explain("objective drfuse", expected="model.kind drfuse", found="another model", remedy=remedy))
        return self.terms(output, output.modality_logits, batch)

    def terms(self, output: FusionOutput, distinct_logits: Tensor, batch: Batch) -> dict[str, Term]:
        """The terms of an output that is already there; distinct_logits (S, B, M, K)."""
        config, present, weight, parts = self.config, batch.present, batch.weight, output.parts
        shared_logits = parts["shared_logits"].transpose(0, 1)
        # The heads' losses have names and scales of their own here.
        terms = self.fusion.terms(replace(output, modality_logits=None), batch)
        terms["shared"] = replace(task_loss(shared_logits, batch.target, weight), scale=config.lambda_shared)
        terms |= _named("distinct", batch, _each(distinct_logits, batch), config.lambda_distinct)
        apart = orthogonality(parts["shared"], parts["distinct"], present, weight)
        terms |= _named("orthogonality", batch, apart, config.lambda_orthogonality)
        terms["jsd"] = replace(shared_divergence(parts["shared"], present, weight, config.jsd), scale=config.lambda_jsd)
        return terms | self._rankings(parts["attention"], distinct_logits.detach(), shared_logits.detach(), batch)

    def _rankings(self, attention: Tensor, distinct_logits: Tensor, shared_logits: Tensor, batch: Batch) -> dict[str, Term]:
        tokens = torch.cat([distinct_logits, shared_logits.unsqueeze(2)], dim=2)
        passes, rows, number, outputs = tokens.shape
        losses, known = output_losses(tokens.transpose(1, 2).reshape(passes * number, rows, outputs), batch.target)
        by_token = losses.view(passes, number, rows, outputs).permute(2, 0, 3, 1)
        there = torch.cat([batch.present, batch.present.any(1, keepdim=True)], dim=1)
        found = ranking(attention, by_token, there, known, batch.weight)
        names = (*batch.modalities, "shared")
        pairs = [(names[x], names[y]) for x in range(number) for y in range(x)]
        scale = self.config.lambda_ranking / len(pairs)
        return {f"ranking_{x}_{y}": replace(term, scale=scale) for (x, y), term in zip(pairs, found, strict=True)}


def _each(distinct_logits: Tensor, batch: Batch) -> list[Term]:
    """The loss of every modality's own head, mean over the rows where it is present and the target known."""
    losses = modality_losses(distinct_logits, batch.target)
    rows = (batch.weight * is_known(batch.target)).unsqueeze(1) * batch.present
    numerators = (rows * torch.where(batch.present, losses, 0.0)).sum(0)
    return [Term(*pair) for pair in zip(numerators.unbind(), rows.sum(0).unbind(), strict=True)]


def _named(part: str, batch: Batch, terms: list[Term], scale: float) -> dict[str, Term]:
    """One term per modality."""
    return {f"{part}_{name}": replace(term, scale=scale) for name, term in zip(batch.modalities, terms, strict=True)}

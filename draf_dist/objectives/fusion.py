"""What a step of fine-tuning a fusion model minimises."""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from draf_dist.config.spec import Spec
from draf_dist.errors import SpecError, explain
from draf_dist.losses.acd import acd
from draf_dist.losses.task import task_loss, unimodal_task_loss
from draf_dist.schema.batch import Batch, FusionOutput, Term


class FusionObjectiveConfig(Spec):
    """L = L_main + lambda_acd L_aux + lambda_uni L_uni (DRAF 3.3 and spec 1.2); parts a model has no head for are left out."""

    kind: Literal["fusion"] = "fusion"
    lambda_acd: float = Field(0.1, ge=0)
    lambda_uni: float = Field(0.3, ge=0)

    def build(self) -> "FusionObjective":
        """The objective."""
        return FusionObjective(self)


class FusionObjective:
    """Terms of one batch by name: task, acd, unimodal, and whatever the model adds; Term.scale holds the lambda.

    signal_...: how the model's mechanism is doing, of scale 0.

    A term of lambda 0 stays in: every parameter must be reached by some loss on every rank (rule D2).
    """

    def __init__(self, config: FusionObjectiveConfig) -> None:
        self.config = config

    def __call__(self, model: nn.Module, batch: Batch, keys: Tensor) -> dict[str, Term]:
        """Runs the model on a normalised batch with keys (S, B).

        Raises:
            SpecError: no term with a positive scale has a gradient, so that nothing would be learned.
        """
        terms = self.terms(model(batch, keys), batch)
        if torch.is_grad_enabled() and not any(term.numerator.requires_grad and term.scale > 0 for term in terms.values()):
            remedy = "Set objective.lambda_uni above 0: late fusion learns from the unimodal losses only."
            raise SpecError(explain("objective", expected="a term that trains the model", found="none", remedy=remedy))
        return terms

    def terms(self, output: FusionOutput, batch: Batch) -> dict[str, Term]:
        """The terms of an output that is already there.

        parts["present"] of the output, where a model says so, is what it took for present: what it rejected is missing in the
        losses too, or its heads would learn from the zeros in its place.
        """
        present = output.parts.get("present", batch.present)
        terms = {"task": task_loss(output.logits, batch.target, batch.weight)}
        if output.corruption_logits is not None:
            term = acd(output.corruption_logits, batch.corrupted, present, batch.weight)
            terms["acd"] = replace(term, scale=self.config.lambda_acd)
        if output.modality_logits is not None:
            term = unimodal_task_loss(output.modality_logits, batch.target, present, batch.weight)
            terms["unimodal"] = replace(term, scale=self.config.lambda_uni)
        signals = {f"signal_{name}": _mean(values, batch.weight) for name, values in output.signals.items()}
        return terms | output.terms | signals


def _mean(values: Tensor, weight: Tensor) -> Term:
    """A number that is logged and trains nothing."""
    return Term(numerator=(weight * values.detach()).sum(), weight=weight.sum(), scale=0.0)

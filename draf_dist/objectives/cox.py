"""What a step minimises where patients are to be ranked by their risk: the likelihood of hazards, and Cox's beside it."""

from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from draf_dist.config.spec import Spec
from draf_dist.errors import SpecError, explain
from draf_dist.losses.cox import Risks, Ties, cox
from draf_dist.losses.gather import Gather, one_process
from draf_dist.objectives.fusion import FusionObjectiveConfig
from draf_dist.schema.batch import Batch, SurvivalTarget, Term
from draf_dist.schema.label import SurvivalSpec
from draf_dist.schema.modality import DataSchema


class CoxObjectiveConfig(Spec):
    """L = lambda_nll L_task + lambda_acd L_aux + lambda_uni L_uni + lambda_cox L_cox.

    The log risk of Cox's partial likelihood (losses/cox.py) is that by which patients are ranked anyway, -sum_k S_k of the fused
    hazards [ours]: so the hazards stay a distribution of times. lambda_nll 0 leaves the ranking alone to train them.
    """

    kind: Literal["cox"] = "cox"
    lambda_nll: float = Field(1.0, ge=0)
    lambda_cox: float = Field(1.0, ge=0)
    lambda_acd: float = Field(0.1, ge=0)
    lambda_uni: float = Field(0.3, ge=0)
    ties: Ties = "efron"

    def build(self, schema: DataSchema, gather: Gather = one_process) -> "CoxObjective":
        """The objective. gather: the rows of all ranks.

        Raises:
            SpecError: the label is not the time of an event.
        """
        if not isinstance(schema.label, SurvivalSpec):
            remedy = "Choose a survival label in the card, or objective.kind: fusion."
            raise SpecError(explain("objective cox", expected="a label of kind survival", found=schema.label.name, remedy=remedy))
        return CoxObjective(self, gather)


class CoxObjective:
    """Terms of one batch by name: those of the fusion objective, and cox. A CoupledObjective: who is at risk is a matter of all."""

    def __init__(self, config: CoxObjectiveConfig, gather: Gather) -> None:
        self.config, self.gather = config, gather
        self.fusion = FusionObjectiveConfig(lambda_acd=config.lambda_acd, lambda_uni=config.lambda_uni).build()

    def __call__(self, model: nn.Module, batch: Batch, keys: Tensor, /) -> dict[str, Term]:
        """All terms of a batch that is not cut into parts; keys (S, B)."""
        rows, terms = self.embed(model, batch, keys)
        return terms | self.couple(rows)

    def embed(self, model: nn.Module, batch: Batch, keys: Tensor) -> tuple[Risks, dict[str, Term]]:
        """The risk of every pass with what is known of the outcome, and the terms that are sums over rows."""
        output = model(batch, keys)
        terms = self.fusion.terms(output, batch)
        target = batch.target
        assert isinstance(target, SurvivalTarget), "the schema was asked when the objective was built"
        survival = output.logits.neg().sigmoid().cumprod(-1)
        rows = Risks(-survival.sum(-1).T, target.time, target.event, target.observed & (batch.weight > 0))
        return rows, terms | {"task": replace(terms["task"], scale=self.config.lambda_nll)}

    def couple(self, rows: Risks) -> dict[str, Term]:
        """Cox's term over the rows of all ranks."""
        return {"cox": replace(cox(rows, ties=self.config.ties, gather=self.gather), scale=self.config.lambda_cox)}

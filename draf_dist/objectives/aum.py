"""What a step of AUM minimises: the task, MUSE's contrastive pair over the global batch, the information bottleneck."""

from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from draf_dist.config.spec import Spec
from draf_dist.errors import SpecError, explain
from draf_dist.losses.gather import Embeddings, Gather, one_process
from draf_dist.losses.patient_contrast import labels_of, num_labels, patient_contrast, with_labels
from draf_dist.objectives.fusion import FusionObjectiveConfig
from draf_dist.schema.batch import Batch, Term
from draf_dist.schema.modality import DataSchema


class AumObjectiveConfig(Spec):
    """L = L_task + lambda_cl (L_unsupervised + L_supervised) + beta KL (AUM eq. 6-7 in the reading of spec 2.3).

    lambda_cl: MUSE's. beta: ours. Nothing here knows of the two stages: they are the model's (models/fusion/aum.py).
    """

    kind: Literal["aum"] = "aum"
    lambda_cl: float = Field(0.5, ge=0)
    beta: float = Field(1e-3, ge=0)

    def build(self, schema: DataSchema, gather: Gather = one_process) -> "AumObjective":
        """The objective. schema: says how many labels a study has. gather: the rows of all ranks."""
        return AumObjective(self, num_labels(schema.label), gather)


class AumObjective:
    """Terms of one batch by name: those of the fusion objective; vib, contrastive, supervised. A CoupledObjective.

    Those of scale 0 stay in: every parameter must be reached by some loss on every rank (rule D2).
    """

    def __init__(self, config: AumObjectiveConfig, num_labels: int, gather: Gather) -> None:
        self.config, self.num_labels, self.gather = config, num_labels, gather
        self.fusion = FusionObjectiveConfig().build()

    def __call__(self, model: nn.Module, batch: Batch, keys: Tensor, /) -> dict[str, Term]:
        """All terms of an Aum on a batch that is not cut into parts; keys (S, B)."""
        rows, terms = self.embed(model, batch, keys)
        return terms | self.couple(rows)

    def embed(self, model: nn.Module, batch: Batch, keys: Tensor) -> tuple[Embeddings, dict[str, Term]]:
        """Embeddings of both views with their labels, and the terms that are sums over rows.

        Raises:
            SpecError: the model gives no embeddings of patients.
        """
        output = model(batch, keys)
        if not {"kl", "first", "second"} <= output.parts.keys():
            remedy = "Set model.kind to aum, or objective.kind to fusion."
            raise SpecError(explain("objective.kind: aum", expected="the model aum", found="another model", remedy=remedy))
        divergence = Term((batch.weight * output.parts["kl"]).sum(), batch.weight.sum(), self.config.beta)
        rows = Embeddings(output.parts["first"], output.parts["second"], batch.uid, batch.weight > 0)
        return with_labels(rows, labels_of(batch.target)), self.fusion.terms(output, batch) | {"vib": divergence}

    def couple(self, rows: Embeddings) -> dict[str, Term]:
        """Both contrastive terms over the rows of all ranks."""
        terms = patient_contrast(rows, self.num_labels, self.gather)
        return {name: replace(term, scale=self.config.lambda_cl) for name, term in terms.items()}

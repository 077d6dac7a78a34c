"""What a step of pre-training an image encoder without labels minimises."""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from draf_dist import noise
from draf_dist.augment import ViewsConfig
from draf_dist.config.spec import Spec
from draf_dist.errors import SpecError, explain
from draf_dist.losses.cross_entropy import cross_entropy
from draf_dist.losses.gather import Embeddings, Gather, one_process
from draf_dist.losses.nt_xent import nt_xent
from draf_dist.models.contrastive import ContrastiveOutput
from draf_dist.schema.batch import Batch, ClassTarget, Term


class SimclrConfig(Spec):
    """L = L_con + lambda_region L_region (BSSL; values by spec 3.1)."""

    kind: Literal["simclr"] = "simclr"
    modality: str
    views: ViewsConfig = ViewsConfig()
    tau: float = Field(0.1, gt=0)
    lambda_region: float = Field(0.2, ge=0)

    def build(self, seed: int, gather: Gather = one_process) -> "SimclrObjective":
        """The objective. seed: of the job, for the views. gather: the rows of all ranks."""
        return SimclrObjective(self, seed, gather)


class SimclrObjective:
    """Terms `contrastive` and `region` of one batch; rows without the modality, and padding, have no part in either."""

    def __init__(self, config: SimclrConfig, seed: int, gather: Gather) -> None:
        self.config, self.seed, self.gather = config, seed, gather

    def __call__(self, model: nn.Module, batch: Batch, keys: Tensor) -> dict[str, Term]:
        """Runs a ContrastiveNet on two views of a normalised batch with keys (S, B), of which the first pass counts.

        Raises:
            SpecError: the modality is not in the batch or is no image.
        """
        embeddings, region = self.embed(model, batch, keys)
        return {"contrastive": nt_xent(embeddings, tau=self.config.tau, gather=self.gather), "region": region}

    def embed(self, model: nn.Module, batch: Batch, keys: Tensor) -> tuple[Embeddings, Term]:
        """Embeddings of both views, and the region term: the part of a step that looks at no other row."""
        image, valid = self._image(batch)
        views = self.config.views.make(image, stream=self.config.modality, seed=self.seed, epoch=batch.epoch, uid=batch.uid)
        # Each view has its own dropout, as it has its own parameters.
        first, second = (
            model(view.image, noise.hash64(keys[0], torch.full_like(keys[0], number)))
            for number, view in enumerate((views.first, views.second))
        )
        return Embeddings(first.embedding, second.embedding, batch.uid, valid), self._region(first, second, views.region, valid)

    def _region(self, first: ContrastiveOutput, second: ContrastiveOutput, region: Tensor, valid: Tensor) -> Term:
        """The mean over valid rows and both views of the cross-entropy of the crop's cell."""
        logits = torch.stack([first.region_logits, second.region_logits])
        term = cross_entropy(logits, ClassTarget(region, valid), valid.to(logits.dtype))
        return replace(term, scale=self.config.lambda_region)

    def _image(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The images, 0 where there is none, and which rows have one: bool (B,)."""
        name = self.config.modality
        image = batch.inputs.get(name)
        if not isinstance(image, Tensor):
            remedy = f"Choose one of {', '.join(batch.modalities)} that is an image."
            raise SpecError(explain("objective.modality", expected="an image of the release", found=repr(name), remedy=remedy))
        valid = batch.present[:, batch.modalities.index(name)] & (batch.weight > 0)
        return torch.where(valid[:, None, None, None], image, 0.0), valid

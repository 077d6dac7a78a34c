"""SimCLR: an encoder of images or volumes learns, without labels, to tell two views of one study from those of all others."""

from dataclasses import fields
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from draf_dist import noise
from draf_dist.augment import AnyViews, ViewsConfig
from draf_dist.augment.views import AS_STORED, Scale
from draf_dist.config.spec import Spec
from draf_dist.losses.gather import Embeddings, Gather, one_process
from draf_dist.losses.nt_xent import nt_xent
from draf_dist.losses.task import task_loss
from draf_dist.models.contrastive import ContrastiveNet, ContrastiveOutput
from draf_dist.models.encoders import EncoderConfig
from draf_dist.objectives.pretrain_modality import encoder_config, no_picture, picture_of
from draf_dist.schema.batch import Batch, ClassTarget, Term
from draf_dist.schema.modality import DataSchema, ImageSpec

ACCURACIES = ("region_accuracy", "protocol_accuracy_f", "protocol_accuracy_g")


class SimclrConfig(Spec):
    """L = L_con + lambda_region L_region + lambda_protocol L_protocol (BSSL; values by spec 3.1).

    The protocol of an acquisition is its site. protocol_adversarial: the encoder is trained against the protocol head (gradient
    reversal) instead of with it.
    """

    kind: Literal["simclr"] = "simclr"
    modality: str
    views: AnyViews = ViewsConfig()
    tau: float = Field(0.1, gt=0)
    lambda_region: float = Field(0.2, ge=0)
    lambda_protocol: float = Field(0.2, ge=0)
    protocol_adversarial: bool = False

    def build(self, seed: int, gather: Gather = one_process, scale: Scale = AS_STORED) -> "SimclrObjective":
        """The objective. seed: of the views. gather: the rows of all ranks. scale: with which the images were standardised."""
        return SimclrObjective(self, seed, gather, scale)

    def network(self, schema: DataSchema, encoder: EncoderConfig | None, width: int) -> ContrastiveNet:
        """The network that the objective trains.

        Raises:
            SpecError: the modality is no image or volume of this schema, or the encoder does not read it.
        """
        spec = picture_of(schema, self.modality)
        built = encoder_config(encoder, spec).build(spec, width)
        regions, protocols = self.views.crop.regions_of(2 if isinstance(spec, ImageSpec) else 3), len(schema.sites)
        return ContrastiveNet(built, width, regions, protocols, protocol_adversarial=self.protocol_adversarial)


class SimclrObjective:
    """Terms of one batch; rows without the modality, and padding, have no part in any.

    contrastive, region, protocol: those of the loss. probe_f, probe_g: of the probes, which train themselves alone.
    region_accuracy, protocol_accuracy_f, protocol_accuracy_g: shares, of scale 0. All are means over both views.
    """

    def __init__(self, config: SimclrConfig, seed: int, gather: Gather, scale: Scale) -> None:
        self.config, self.seed, self.gather, self.scale = config, seed, gather, scale

    def __call__(self, model: nn.Module, batch: Batch, keys: Tensor, /) -> dict[str, Term]:
        """All terms of a ContrastiveNet on a batch that is not cut into parts.

        Raises:
            SpecError: the modality is not in the batch or is no image.
        """
        rows, terms = self.embed(model, batch, keys)
        return self.couple(rows) | terms

    def embed(self, model: nn.Module, batch: Batch, keys: Tensor) -> tuple[Embeddings, dict[str, Term]]:
        """Embeddings of both views, and the terms of the heads: the part of a step that looks at no other row."""
        image, valid = self._image(batch)
        config = self.config
        views = config.views.make(image, scale=self.scale, stream=config.modality, seed=self.seed, epoch=batch.epoch, uid=batch.uid)
        seen = self._both(model, (views.first.image, views.second.image), keys[0])
        embeddings = Embeddings(seen[0].embedding, seen[1].embedding, batch.uid, valid)
        return embeddings, self._heads(seen, ClassTarget(views.region, valid), ClassTarget(batch.site, valid))

    def _both(self, model: nn.Module, images: tuple[Tensor, Tensor], keys: Tensor) -> list[ContrastiveOutput]:
        """What the network says of either view, each with a dropout of its own as it has parameters of its own."""
        own = torch.cat([noise.hash64(keys, torch.full_like(keys, number)) for number in range(len(images))])
        # In one forward: larger operators, and under ZeRO 3 parameters are gathered once. No row looks at another.
        output: ContrastiveOutput = model(torch.cat(images), own)
        halves = {part.name: getattr(output, part.name).chunk(len(images)) for part in fields(output)}
        return [ContrastiveOutput(**{name: parts[number] for name, parts in halves.items()}) for number in range(len(images))]

    def couple(self, rows: Embeddings) -> dict[str, Term]:
        """NT-Xent over the rows of all ranks."""
        return {"contrastive": nt_xent(rows, tau=self.config.tau, gather=self.gather)}

    def numbers(self, means: dict[str, float]) -> dict[str, float]:
        """The accuracies, and as `loss` what the encoder is to lower: not the probes, nor a protocol head that it works against."""
        config = self.config
        protocol = 0.0 if config.protocol_adversarial else config.lambda_protocol * means["protocol"]
        loss = means["contrastive"] + config.lambda_region * means["region"] + protocol
        return {"loss": loss, "contrastive": means["contrastive"], **{name: means[name] for name in ACCURACIES}}

    def _heads(self, seen: list[ContrastiveOutput], region: ClassTarget, site: ClassTarget) -> dict[str, Term]:
        where, protocol, probe_f, probe_g = (
            torch.stack([getattr(view, head) for view in seen])
            for head in ("region_logits", "protocol_logits", "probe_f", "probe_g")
        )
        return {
            "region": _of_both_views(where, region, self.config.lambda_region),
            "protocol": _of_both_views(protocol, site, self.config.lambda_protocol),
            "probe_f": _of_both_views(probe_f, site, 1.0),
            "probe_g": _of_both_views(probe_g, site, 1.0),
            "region_accuracy": _accuracy(where, region),
            "protocol_accuracy_f": _accuracy(probe_f, site),
            "protocol_accuracy_g": _accuracy(probe_g, site),
        }

    def _image(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The images, 0 where there is none, and which rows have one: bool (B,)."""
        name = self.config.modality
        image = batch.inputs.get(name)
        if not isinstance(image, Tensor):
            known = tuple(other for other, value in batch.inputs.items() if isinstance(value, Tensor))
            raise no_picture(name, known)
        valid = batch.present[:, batch.modalities.index(name)] & (batch.weight > 0)
        return torch.where(valid.view(-1, *[1] * (image.dim() - 1)), image, 0.0), valid


def _of_both_views(logits: Tensor, target: ClassTarget, scale: float) -> Term:
    """The mean cross-entropy of logits (2, B, K)."""
    term = task_loss(logits, target, target.observed.to(logits.dtype))
    return Term(term.numerator, term.weight, scale)


def _accuracy(logits: Tensor, target: ClassTarget) -> Term:
    """The share of rows and views that are classified rightly."""
    right = (logits.argmax(-1) == target.label).to(logits.dtype).mean(0)
    counted = target.observed.to(logits.dtype)
    return Term((right * counted).sum(), counted.sum(), 0.0)

"""What a step of the Bayesian stage minimises (BSSL proposal 2.4; spec 3.4-3.6).

L_total = L_task + lambda_kl KL / N + lambda_adv L_adv + lambda_att L_att + lambda_clinical L_clinical + lambda_anat L_anat, each
lambda once (the proposal has two of them in the losses too).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from draf_dist import noise
from draf_dist.config.spec import Spec
from draf_dist.errors import SpecError, explain, together
from draf_dist.losses.alignment import (
    AttentionTarget,
    ClinicalScaling,
    anatomical,
    clinical_alignment,
    uncertainty_alignment,
)
from draf_dist.losses.kl import kl_term, kl_warmup
from draf_dist.losses.segmentation import segmentation_terms, voxel_cross_entropy
from draf_dist.losses.task import is_known, task_loss, task_losses
from draf_dist.models.absent import clear_absent
from draf_dist.models.variational import weight_keys
from draf_dist.objectives.adversarial import AdversarialConfig, Reduce, uncertainty_weights
from draf_dist.objectives.annotations import annotation, check_annotation, mask_annotation
from draf_dist.schema.batch import Batch, FusionOutput, SegmentationTarget, Target, Term
from draf_dist.schema.modality import DataSchema

HEAD = "logits/"
# What a head besides the label is to say of a batch.
HeadTarget = Callable[[Batch], Target]


class BayesianObjectiveConfig(Spec):
    """The lambdas of L_total and what its parts are made of; defaults by spec 3.6.

    kl_per: `voxel` divides by the voxels that training looks at, N V, as the cross-entropy of a mask is a mean over V of them and
    the sum of both is then an evidence lower bound at lambda_kl 1; `row` divides by N as spec 3.4 writes it. Without masks they are
    the same. kl_warmup: share of all steps in which KL comes in. estimator: local reparameterisation, or sampled weights.
    clinical_map, body_mask: the modality that holds the experts' maps, or the masks of the body; None: there are none. head_masks:
    head -> the modality that holds its masks, of two structures.
    """

    kind: Literal["bayesian"] = "bayesian"
    prior_sigma: float = Field(0.1, gt=0)
    lambda_kl: float = Field(1.0, ge=0)
    kl_per: Literal["voxel", "row"] = "voxel"
    kl_warmup: float = Field(0.2, ge=0, le=1)
    estimator: Literal["local", "weights"] = "local"
    lambda_adv: float = Field(0.5, ge=0)
    adversarial: AdversarialConfig | None = None
    lambda_att: float = Field(0.01, ge=0)
    attention_target: AttentionTarget = "uncertainty"
    lambda_clinical: float = Field(0.1, ge=0)
    clinical_map: str | None = None
    clinical_scaling: ClinicalScaling = "peak"
    lambda_anat: float = Field(0.1, ge=0)
    body_mask: str | None = None
    head_masks: dict[str, str] = {}

    @property
    def least_passes(self) -> int:
        """Passes of a training step: two where the loss looks at an uncertainty, which one does not show."""
        return 2 if self.lambda_att > 0 or (self.lambda_adv > 0 and self.adversarial is not None) else 1

    def check(self, image: str, schema: DataSchema) -> None:
        """Whether the release has the annotations of the image that the model reads.

        Raises:
            SpecError: one line for each that it has not, or on another grid.
        """
        problems = []
        named = {"clinical_map": self.clinical_map, "body_mask": self.body_mask}
        for key, name in ((key, name) for key, name in named.items() if name is not None):
            try:
                check_annotation(f"objective.{key}", name, image, schema)
            except SpecError as error:
                problems.append(str(error))
        if problems:
            raise SpecError(together(problems))

    def build(
        self,
        *,
        modality: str,
        num_train: int,
        num_steps: int,
        seed: int,
        reduce: Reduce = lambda values: values,
        heads: Mapping[str, HeadTarget] | None = None,
    ) -> "BayesianObjective":
        """The objective at step 0. modality: what the model reads. num_train: N, studies whose target training may use.

        num_steps: of the whole run. seed: of sampled weights. reduce: the sum over ranks. heads: the targets of those besides the
        label.
        """
        return BayesianObjective(self, modality, num_train, num_steps, seed, reduce, heads or {})


@dataclass(frozen=True)
class BayesianObjective:
    """Terms of one batch by name, for a model whose output is that of models/segmentation.py; Term.scale holds the lambda.

    task of the label, of a mask dice and cross_entropy; <head>_task, ... of every other head; kl; adversarial_task, ... and
    adversarial_clean_task, ...; attention; clinical; anatomical; signal_..., of scale 0. A part with a lambda of 0 is left out: all
    parameters are reached by the task. Rows without the image count nothing.
    """

    config: BayesianObjectiveConfig
    modality: str
    num_train: int
    num_steps: int
    seed: int
    reduce: Reduce
    heads: Mapping[str, HeadTarget]
    step: int = 0

    def at(self, step: int) -> "BayesianObjective":
        """The objective of an optimizer step, counted from 0: warm-up and sampled weights are functions of it."""
        return replace(self, step=step)

    def __call__(self, model: nn.Module, batch: Batch, keys: Tensor) -> dict[str, Term]:
        """Runs the model on a normalised batch with keys (S, B).

        Raises:
            SpecError: one pass, where two are needed to see an uncertainty.
        """
        self._check_passes(keys)
        output: FusionOutput = model(batch, keys, *self._weight_keys(keys))
        task = task_terms(output, self.targets(batch), self.counted(batch))
        signals = {f"signal_{name}": _mean(values, batch.weight) for name, values in output.signals.items()}
        return (
            task | self.divergence(output, batch) | self._adversarial(model, batch, keys, task) | self.maps(output, batch) | signals
        )

    def targets(self, batch: Batch) -> Target | Mapping[str, Target]:
        """The target of the label, or of all heads by name."""
        if not self.heads:
            return batch.target
        return {"": batch.target, **{name: target(batch) for name, target in self.heads.items()}}

    def divergence(self, output: FusionOutput, batch: Batch) -> dict[str, Term]:
        """lambda_kl KL / N, or of N V."""
        config = self.config
        count = self.num_train * (_num_voxels(self.targets(batch)) if config.kl_per == "voxel" else 1)
        scale = config.lambda_kl * kl_warmup(self.step, self.num_steps, config.kl_warmup) / count
        return {"kl": kl_term(output.parts["posterior"], batch.weight, prior_sigma=config.prior_sigma, scale=scale)}

    def maps(self, output: FusionOutput, batch: Batch) -> dict[str, Term]:
        """What is asked of the attention maps."""
        config, terms = self.config, {}
        attention, counted = output.parts["attention"], self.counted(batch)
        if config.lambda_att > 0:
            uncertainty = output.parts["epistemic_map"]
            term = uncertainty_alignment(attention, uncertainty, counted, target=config.attention_target)
            terms["attention"] = replace(term, scale=config.lambda_att)
        if config.lambda_clinical > 0 and config.clinical_map is not None:
            expert, known = annotation(batch, config.clinical_map)
            term = clinical_alignment(attention, expert, known, counted, scaling=config.clinical_scaling)
            terms["clinical"] = replace(term, scale=config.lambda_clinical)
        if config.lambda_anat > 0 and config.body_mask is not None:
            body, known = mask_annotation(batch, config.body_mask)
            terms["anatomical"] = replace(anatomical(attention, body, known, counted), scale=config.lambda_anat)
        return terms

    def counted(self, batch: Batch) -> Tensor:
        """The weight of rows that have the image, f32 (B,)."""
        return batch.weight * batch.present[:, batch.modalities.index(self.modality)]

    def _adversarial(self, model: nn.Module, batch: Batch, keys: Tensor, task: dict[str, Term]) -> dict[str, Term]:
        config = self.config.adversarial
        if config is None or self.config.lambda_adv == 0:
            return {}
        attacked = self.attack(model, batch, keys, config)
        output: FusionOutput = model(attacked, keys, *self._weight_keys(keys))
        counted = self.counted(batch)
        axis = batch.modalities.index(self.modality)
        weights = uncertainty_weights(output.uncertainty["epistemic"][:, axis], counted, self.reduce)
        outside, inside = (self.config.lambda_adv * share for share in (1 - config.clean_weight, config.clean_weight))
        terms = {
            f"adversarial_{name}": Term(term.numerator, task[name].weight, outside)
            for name, term in task_terms(output, self.targets(batch), counted * weights).items()
        }
        if config.include_clean:
            terms |= {f"adversarial_clean_{name}": replace(term, scale=inside) for name, term in task.items()}
        return terms

    def attack(self, model: nn.Module, batch: Batch, keys: Tensor, config: AdversarialConfig) -> Batch:
        """The batch with attacked images, by the cross-entropies of all heads under K draws that stay the same in every step."""
        draws = torch.arange(config.samples, device=keys.device)
        eot = noise.chain(keys[:1], "attack", draws[:, None])
        weights = [noise.chain(chosen[:1], "attack", draws) for chosen in self._weight_keys(keys)]
        targets = self.targets(batch)

        def loss(image: Tensor) -> Tensor:
            seen = replace(batch, inputs={**batch.inputs, self.modality: image})
            return row_losses(model(seen, eot, *weights), targets)

        image = clear_absent(batch)[self.modality]
        assert isinstance(image, Tensor)  # the model reads no other
        return replace(batch, inputs={**batch.inputs, self.modality: config.craft(loss, image, keys[0])})

    def _weight_keys(self, keys: Tensor) -> tuple[Tensor, ...]:
        """The further argument of the model: none for local reparameterisation."""
        if self.config.estimator == "local":
            return ()
        return (weight_keys(self.seed, self.step, keys.shape[0], keys.device),)

    def _check_passes(self, keys: Tensor) -> None:
        if keys.shape[0] < self.config.least_passes:
            remedy = "Set it to 2 or more, or lambda_att to 0 and leave `adversarial` out: one pass shows no uncertainty."
            raise SpecError(explain("passes_train", expected="at least 2", found=str(keys.shape[0]), remedy=remedy))


def task_terms(output: FusionOutput, target: Target | Mapping[str, Target], weight: Tensor) -> dict[str, Term]:
    """L_task of all heads: cross-entropies, of masks soft Dice beside; a row counts where its target is known."""
    terms: dict[str, Term] = {}
    for name, (logits, wanted) in by_head(output, target).items():
        if isinstance(wanted, SegmentationTarget):
            found = segmentation_terms(logits, wanted, weight)
        else:
            found = {"task": task_loss(logits, wanted, weight)}
        terms |= {f"{name}_{part}" if name else part: term for part, term in found.items()}
    return terms


def row_losses(output: FusionOutput, target: Target | Mapping[str, Target]) -> Tensor:
    """What an attack raises: the cross-entropy of every row, (B,), mean over passes and voxels, sum over heads."""
    found = []
    for logits, wanted in by_head(output, target).values():
        if isinstance(wanted, SegmentationTarget):
            found.append(torch.where(is_known(wanted), voxel_cross_entropy(logits, wanted.mask).mean(0), 0.0))
        else:
            found.append(task_losses(logits, wanted).mean(0))
    return torch.stack(found).sum(0)


def by_head(output: FusionOutput, target: Target | Mapping[str, Target]) -> dict[str, tuple[Tensor, Target]]:
    """Logits (S, B, K, ...) and target of every head that has one; the name of the label's head is empty.

    target: of the label alone, or of several heads by name.

    Raises:
        SpecError: targets of a head that the model does not have.
    """
    if not isinstance(target, Mapping):
        return {"": (output.logits, target)}
    others = {name: value for name, value in target.items() if HEAD + name in output.parts}
    of_label = [name for name in target if name not in others]
    if len(of_label) > 1:
        known = ", ".join(name.removeprefix(HEAD) for name in output.parts if name.startswith(HEAD)) or "none"
        remedy = f"Heads besides the label: {known}."
        raise SpecError(explain("targets", expected="one for the label", found=", ".join(of_label), remedy=remedy))
    found = {name: (output.parts[HEAD + name].transpose(0, 1), value) for name, value in others.items()}
    return found | ({"": (output.logits, target[of_label[0]])} if of_label else {})


def _num_voxels(target: Target | Mapping[str, Target]) -> int:
    """V: places of a mask; 1 where there is none."""
    targets = target.values() if isinstance(target, Mapping) else (target,)
    return max((one.mask.shape[1:].numel() for one in targets if isinstance(one, SegmentationTarget)), default=1)


def _mean(values: Tensor, weight: Tensor) -> Term:
    """A number that is logged and trains nothing."""
    return Term(numerator=(weight * values.detach()).sum(), weight=weight.sum(), scale=0.0)

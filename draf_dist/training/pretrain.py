"""The stage of pre-training: an encoder of one modality, without labels."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from draf_dist import noise
from draf_dist.data.loader import Loader, SplitLoader
from draf_dist.data.normalise import Normaliser
from draf_dist.data.release import Release
from draf_dist.errors import DataError, DrafError, explain
from draf_dist.losses.gather import AllGather, Gather, one_process
from draf_dist.models.encoder_export import encoder_files
from draf_dist.objectives.pretrain import PretrainObjective, build_network
from draf_dist.objectives.pretrain_modality import encoder_config
from draf_dist.objectives.pretrain_simclr import SimclrConfig
from draf_dist.schema.batch import Batch, Term
from draf_dist.schema.modality import ModalitySpec
from draf_dist.training.backend import Backend
from draf_dist.training.loop import StepRules
from draf_dist.training.plan import TrainingPlan, build_plan
from draf_dist.training.pretrain_job import PretrainJob
from draf_dist.training.schedule import WarmupCosine
from draf_dist.training.stage import num_steps
from draf_dist.training.torch_engine import load_weights
from draf_dist.training.validate import EVALUATION_SEED, Passes, evaluation_keys


@dataclass(frozen=True)
class Pretraining:
    """The pure parts of a pre-training run; what changes is in TrainState and the engine. job names a pinned release."""

    job: PretrainJob
    release: Release
    device: torch.device
    model: nn.Module
    plan: TrainingPlan
    normaliser: Normaliser
    gather: Gather

    @cached_property
    def objective(self) -> PretrainObjective:
        """What a step minimises."""
        return self._objective(self.job.seed)

    def _objective(self, seed: int) -> PretrainObjective:
        config = self.job.objective
        if isinstance(config, SimclrConfig):
            return config.build(seed, self.gather, self.normaliser.constants(config.modality, torch.empty(0, device=self.device)))
        return config.build(seed, self.gather)

    @property
    def modality(self) -> ModalitySpec:
        """What the encoder reads."""
        return next(spec for spec in self.release.schema.modalities if spec.name == self.job.objective.modality)

    def loader(self, backend: Backend) -> Loader:
        """The training batches of this rank."""
        return self.plan.loader(backend, self.job)

    def rules(self, backend: Backend) -> StepRules:
        """How a training step treats a batch. Views and masks are made inside the objective, on the device."""
        job = self.job
        return StepRules(
            prepare=self.prepared,
            keys=lambda batch: noise.sample_keys(job.seed, "mc", batch.epoch, batch.uid, 1),
            learning_rate=WarmupCosine(job.optimizer.learning_rate, num_steps(self), job.optimizer.warmup_fraction),
            reduce=backend.reduce,
            accumulation=backend.accumulation,
        )

    def validate(self, module: nn.Module, backend: Backend, split: Passes) -> dict[str, float]:
        """The objective on the validation split: its views and masks have a seed of their own and epoch 0, whatever the job's.

        Raises:
            DataError: nothing of the validation split counts, so that there is no loss.
            DrafError: the loss is not finite.
        """
        objective = self._objective(EVALUATION_SEED)
        was_training = module.training
        module.eval()
        with torch.no_grad():
            parts = [objective(module, batch, evaluation_keys(batch, 1)) for batch in self.measured(split.batches())]
        module.train(was_training)
        sums, weights = (_sums(parts, backend, of) for of in ("numerator", "weight"))
        if not all(weights.values()):
            expected = f"studies with {self.job.objective.modality} in the val split"
            raise DataError(explain(self.release.pinned_url, expected=expected, found="none", remedy="Prepare more data."))
        numbers = objective.numbers({name: value / weights[name] for name, value in sums.items()})
        if not math.isfinite(numbers["loss"]):
            remedy = "Lower optimizer.learning_rate."
            raise DrafError(explain("validation", expected="a finite loss", found=str(numbers["loss"]), remedy=remedy))
        return numbers

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, bytes]:
        """The encoder alone: heads and decoder have served."""
        job, network = self.job, new_network(self.job, self.release)
        load_weights(network, weights)
        encoder = network.get_submodule("encoder")
        return encoder_files(
            encoder,
            config=encoder_config(job.encoder, self.modality),
            spec=self.modality,
            width=job.width,
            objective=job.objective.kind,
            release=self.release.pinned_url,
            stats=self.release.stats,
        )

    def prepared(self, batch: Batch) -> Batch:
        """A batch as loaded, on the device and normalised."""
        return self.normaliser(batch.to(self.device))

    def validation(self, backend: Backend) -> SplitLoader:
        """This rank's part of the validation split."""
        return self.plan.validation(backend, self.job)

    def measured(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Batches as loaded, prepared, as validation takes them: in epoch 0."""
        for batch in batches:
            prepared = self.prepared(batch)
            yield replace(prepared, epoch=torch.zeros_like(prepared.epoch))


def build_pretraining(job: PretrainJob, release: Release, backend: Backend, run: str | None = None) -> Pretraining:
    """Everything a run needs, with the parameters that the seed gives. run: its URL, once there is one."""
    return Pretraining(
        job=job,
        release=release,
        device=backend.device,
        model=new_network(job, release),
        plan=build_plan(job, release, run),
        normaliser=Normaliser(release.schema, release.stats),
        gather=AllGather() if backend.world > 1 else one_process,
    )


def new_network(job: PretrainJob, release: Release) -> nn.Module:
    """The network with the parameters that the seed gives."""
    return build_network(job.objective, release.schema, job.encoder, job.width, job.seed)


def _sums(parts: list[dict[str, Term]], backend: Backend, of: str) -> dict[str, float]:
    """A number of every term, over batches and ranks: the same on every rank, bit for bit."""
    local = torch.stack([torch.stack([getattr(term, of) for term in terms.values()]).double() for terms in parts]).sum(0)
    total: Tensor = backend.reduce(local)
    return dict(zip(parts[0], total.tolist(), strict=True))

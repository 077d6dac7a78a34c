"""What a fine-tuning job is made of, built from its spec and nothing else."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from draf_dist import noise
from draf_dist.data.corruption import Corruptor
from draf_dist.data.loader import Loader, evaluation_batches
from draf_dist.data.normalise import Normaliser
from draf_dist.data.order import Order
from draf_dist.data.release import Release, open_release
from draf_dist.errors import DataError, SpecError, explain
from draf_dist.models.build import build_model
from draf_dist.models.calibration import set_prevalence
from draf_dist.objectives.fusion import FusionObjective
from draf_dist.schema.batch import Batch
from draf_dist.training.backend import Backend
from draf_dist.training.job import FinetuneJob
from draf_dist.training.loop import StepRules
from draf_dist.training.schedule import WarmupCosine
from draf_dist.training.state import OrderState
from draf_dist.training.validate import evaluation_keys


@dataclass(frozen=True)
class Parts:
    """The pure parts of a run; what changes is in TrainState and the engine. job names a pinned release."""

    job: FinetuneJob
    release: Release
    order: Order
    model: nn.Module
    objective: FusionObjective
    normaliser: Normaliser
    corruptor: Corruptor
    device: torch.device

    @property
    def num_steps(self) -> int:
        """Optimizer steps of a run that is not stopped early."""
        return self.job.epochs * self.order.steps_per_epoch

    @property
    def order_state(self) -> OrderState:
        """The order at step 0."""
        return order_state(self.order)

    def loader(self, backend: Backend) -> Loader:
        """The training batches of this rank."""
        hook = self.corruptor.decode_hook()
        return Loader(self.release, "train", self.order, rank=backend.rank, world=backend.world, decode=hook)

    def rules(self, backend: Backend) -> StepRules:
        """How a training step treats a batch."""
        job = self.job
        return StepRules(
            prepare=lambda batch: self.corruptor.train(self.prepared(batch)),
            keys=lambda batch: noise.sample_keys(job.seed, "mc", batch.epoch, batch.uid, job.passes_train),
            learning_rate=WarmupCosine(job.optimizer.learning_rate, self.num_steps, job.optimizer.warmup_fraction),
            reduce=backend.reduce,
            accumulation=backend.accumulation,
        )

    def prepared(self, batch: Batch) -> Batch:
        """A batch as loaded, on the device and normalised."""
        return self.normaliser(batch.to(self.device))

    def validation(self) -> Iterator[Batch]:
        """The validation split, as loaded."""
        return evaluation_batches(self.release, "val", self.job.batch_size)

    def calibration(self) -> Iterator[tuple[Batch, Tensor]]:
        """The validation split, prepared, with evaluation keys."""
        for batch in self.validation():
            prepared = self.prepared(batch)
            yield prepared, evaluation_keys(prepared, self.job.passes_eval)


def pin(job: FinetuneJob) -> tuple[FinetuneJob, Release]:
    """The job with URL@version in place of a URL that moves.

    Raises:
        SpecError: there is no such release, or it can't fill a batch.
    """
    release = open_release(job.release)
    for split in ("train", "val"):
        if sum(shard.num_samples for shard in release.shards(split)) == 0:
            remedy = "Prepare a data set with more subjects."
            raise SpecError(explain(release.pinned_url, expected=f"studies in the {split} split", found="none", remedy=remedy))
    return job.model_copy(update={"release": release.pinned_url}), release


def build_parts(job: FinetuneJob, release: Release, device: torch.device) -> Parts:
    """Everything a run needs, with the parameters that the seed gives."""
    model = build_model(job.model, release.schema, job.seed)
    set_prevalence(model, class_counts(release))
    normaliser = Normaliser(release.schema, release.stats)
    return Parts(
        job=job,
        release=release,
        order=build_order(job, release),
        model=model,
        objective=job.objective.build(),
        normaliser=normaliser,
        corruptor=Corruptor(job.corruption, normaliser, seed=job.seed),
        device=device,
    )


def build_order(job: FinetuneJob, release: Release) -> Order:
    """The global sample order of the training split."""
    return Order(
        shard_sizes=tuple(shard.num_samples for shard in release.shards("train")),
        release=release.version,
        seed=job.seed,
        batch_size=job.batch_size,
        groups=job.groups,
        open_samples=job.open_samples,
    )


def order_state(order: Order) -> OrderState:
    """The order as a checkpoint stores it, at step 0."""
    return OrderState(
        release=order.release,
        seed=order.seed,
        groups=order.groups,
        open_samples=order.open_samples,
        batch_size=order.batch_size,
        step=0,
    )


def class_counts(release: Release) -> Tensor:
    """Studies of every class in the training split: int64 (K,).

    Raises:
        DataError: the subjects table names a class that the schema does not have.
    """
    table = release.subjects()
    labels = [
        label for split, label in zip(table["split"].to_pylist(), table["label"].to_pylist(), strict=True) if split == "train"
    ]
    classes = release.schema.label.classes
    if strange := sorted(set(labels) - set(classes)):
        found = f"{len(strange)} others"
        raise DataError(explain("subjects.parquet: label", expected=", ".join(classes), found=found, remedy="Prepare again."))
    return torch.tensor([labels.count(name) for name in classes])

"""What a kind of job brings to a run: its parameters, its data, its loss, its validation, its product."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from draf_dist.data.loader import Loader, SplitLoader
from draf_dist.data.release import Release
from draf_dist.training.backend import Backend
from draf_dist.training.job import TrainJob
from draf_dist.training.loop import Objective, StepRules
from draf_dist.training.plan import TrainingPlan
from draf_dist.training.validate import Passes


class Stage(Protocol):
    """A job made ready on one rank; every rank makes the same calls in the same order."""

    @property
    def job(self) -> TrainJob:
        """The job, with all that it reads pinned."""
        ...

    @property
    def release(self) -> Release:
        """What it trains on."""
        ...

    @property
    def plan(self) -> TrainingPlan:
        """The global sample order of the training split."""
        ...

    @property
    def model(self) -> nn.Module:
        """The model with the parameters that the job gives, before an engine takes it over."""
        ...

    @property
    def objective(self) -> Objective:
        """What a step minimises."""
        ...

    def loader(self, backend: Backend) -> Loader:
        """The training batches of this rank."""
        ...

    def validation(self, backend: Backend) -> SplitLoader:
        """This rank's part of the validation split."""
        ...

    def rules(self, backend: Backend) -> StepRules:
        """How a training step treats a batch."""
        ...

    def validate(self, module: nn.Module, backend: Backend, split: Passes) -> dict[str, float]:
        """The numbers of validation, `job.score` among them: bit for bit the same on all ranks. split: as from `validation`."""
        ...

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, bytes]:
        """The files of model/ by name, from the parameters and buffers of a checkpoint, in the order in which to write them.

        The one that tells that the others are whole comes last. Of one rank only: nothing here waits for others.
        """
        ...


def num_steps(stage: Stage) -> int:
    """Optimizer steps of a run that is not stopped early."""
    return stage.job.epochs * stage.plan.order.steps_per_epoch

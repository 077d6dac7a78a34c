"""The stage of fine-tuning: a fusion model on labelled studies."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from draf_dist import noise
from draf_dist.data.corruption import Corruptor
from draf_dist.data.loader import EVALUATION_PREFETCH, Loader, Portion, Reading, SplitLoader
from draf_dist.data.normalise import Normaliser
from draf_dist.data.release import Release
from draf_dist.errors import SpecError, explain
from draf_dist.losses.gather import Gather, one_process
from draf_dist.models.build import build_model
from draf_dist.models.calibration import calibrate, fit_on_clean, set_prevalence
from draf_dist.models.export import model_files
from draf_dist.models.fusion.aum import AumConfig
from draf_dist.models.fusion.draf import DrafConfig
from draf_dist.models.fusion.drifa import DrifaConfig
from draf_dist.models.kinds import ModelConfig
from draf_dist.models.seen_sites import trained_sites
from draf_dist.models.segmentation import BayesianUnetConfig
from draf_dist.objectives.adversarial import AdversarialConfig, Reduce
from draf_dist.objectives.bayesian import BayesianObjectiveConfig
from draf_dist.objectives.finetune import Course, FinetuneObjective, build_objective
from draf_dist.schema.batch import Batch, hide
from draf_dist.schema.label import SegmentationSpec
from draf_dist.schema.modality import DataSchema
from draf_dist.schema.release import ReleaseStats, Split
from draf_dist.training.backend import Backend
from draf_dist.training.job import FinetuneJob
from draf_dist.training.label_counts import LabelCounts, count_labels
from draf_dist.training.loop import StepRules
from draf_dist.training.plan import TrainingPlan, build_plan
from draf_dist.training.pretrained import start_from
from draf_dist.training.schedule import WarmupCosine
from draf_dist.training.stage import num_steps
from draf_dist.training.torch_engine import load_weights
from draf_dist.training.validate import Passes, evaluation_keys, validate
from draf_dist.training.warm_start import load_start

# Studies of a split, or a batch more, that show what clean inputs look like: enough for it, and little to read at every start.
CLEAN_STUDIES = 2048
_CLEAN_SPLITS: tuple[Split, ...] = ("train", "val")


@dataclass(frozen=True)
class Finetuning:
    """The pure parts of a fine-tuning run; what changes is in TrainState and the engine. job names a pinned release.

    stats: what the model's input is normalised with: the release's own, or those of the run that it goes on from.
    """

    job: FinetuneJob
    release: Release
    device: torch.device
    model: nn.Module
    labels: LabelCounts
    plan: TrainingPlan
    stats: ReleaseStats
    normaliser: Normaliser
    corruptor: Corruptor
    gather: Gather
    reduce: Reduce

    @cached_property
    def objective(self) -> FinetuneObjective:
        """What a step minimises."""
        num_train = _num_readable(self.job.model, self.release, self.labels.num_studies)
        course = Course(num_train, num_steps(self), self.job.seed, self.gather, self.reduce)
        return build_objective(self.job.objective, self.job.model, self.release.schema, course)

    def loader(self, backend: Backend) -> Loader:
        """The training batches of this rank."""
        return self.plan.loader(backend, self.job, self.corruptor.decode_hook())

    def rules(self, backend: Backend) -> StepRules:
        """How a training step treats a batch.

        Raises:
            SpecError: a model that looks at the whole batch, and several micro-batches per step.
        """
        job = self.job
        if backend.accumulation > 1 and (option := _of_whole_batches(job)):
            remedy = f"Set accumulation to 1 in the profile, or leave {option} out."
            found = f"accumulation {backend.accumulation}"
            raise SpecError(explain(option, expected="whole batches", found=found, remedy=remedy))
        return StepRules(
            prepare=lambda batch: self.corruptor.train(self.labelled(self.prepared(batch))),
            keys=lambda batch: noise.sample_keys(job.seed, "mc", batch.epoch, batch.uid, job.passes_train),
            learning_rate=WarmupCosine(job.optimizer.learning_rate, num_steps(self), job.optimizer.warmup_fraction),
            reduce=backend.reduce,
            accumulation=backend.accumulation,
        )

    def validate(self, module: nn.Module, backend: Backend, split: Passes) -> dict[str, float]:
        """Sets what the model learns from validation besides its loss, then measures there."""
        calibrate(module, self.calibration(split.batches()))
        return validate(module, split.batches(), self.prepared, self.job.passes_eval, backend.gather)

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, bytes]:
        """The exchange form of the model."""
        model = new_model(self.job, self.release, self.labels)
        load_weights(model, weights)
        return model_files(model, self.job.model, self.release.schema, self.stats, trained_sites(self.release.manifest.counts))

    def prepared(self, batch: Batch) -> Batch:
        """A batch as loaded, on the device and normalised."""
        return self.normaliser(batch.to(self.device))

    def labelled(self, batch: Batch) -> Batch:
        """The batch with the labels that `label_fraction` lets it have; what is hidden reads 0."""
        if self.job.label_fraction == 1:
            return batch
        return replace(batch, target=hide(batch.target, self.labels.has_label(batch.uid)))

    def validation(self, backend: Backend) -> SplitLoader:
        """This rank's part of the validation split."""
        return self.plan.validation(backend, self.job)

    def calibration(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Batches as loaded, prepared, with evaluation keys."""
        for batch in batches:
            prepared = self.prepared(batch)
            yield prepared, evaluation_keys(prepared, self.job.passes_eval)


def build_finetuning(
    job: FinetuneJob,
    release: Release,
    device: torch.device,
    run: str | None = None,
    *,
    gather: Gather = one_process,
    reduce: Reduce = lambda values: values,
) -> Finetuning:
    """Everything a run needs, with the parameters that the seed and the pre-trained encoders give, or an earlier run.

    run: its URL, once there is one. gather, reduce: rows, and sums, of all ranks, for losses over the whole batch.

    Raises:
        SpecError: label_fraction leaves no label; an encoder or an earlier run that is not there or does not fit; see build_plan.
    """
    labels = count_labels(job, release)
    if not labels.of.any():
        found = f"none of {release.manifest.receipts['train'].count}"
        raise SpecError(explain("label_fraction", expected="at least one label", found=found, remedy="Set a larger share."))
    model, stats = _start(job, release, labels)
    normaliser = Normaliser(release.schema, stats)
    if job.warm_start is None:
        reading = Reading(prefetch=EVALUATION_PREFETCH, bad_data=job.bad_data, job=run)
        train, validation = (SplitLoader(release, split, job.batch_size, reading=reading) for split in _CLEAN_SPLITS)
        fit_on_clean(model, lambda: _clean(train, normaliser), lambda: _clean(validation, normaliser), job.seed)
    stage = Finetuning(
        job=job,
        release=release,
        device=device,
        model=model,
        labels=labels,
        plan=build_plan(job, release, run),
        stats=stats,
        normaliser=normaliser,
        corruptor=Corruptor(job.corruption, normaliser, seed=job.seed, inputs=_inputs(job.model, release.schema)),
        gather=gather,
        reduce=reduce,
    )
    # Here, where nothing has begun yet, whoever asks for what can't be learned hears of it.
    _ = stage.objective
    return stage


def _start(job: FinetuneJob, release: Release, labels: LabelCounts) -> tuple[nn.Module, ReleaseStats]:
    """The model with the parameters that the job gives, and the statistics that its input is normalised with."""
    model = new_model(job, release, labels)
    if job.warm_start is None:
        start_from(model, job.pretrained, release.schema)
        return model, release.stats
    start = load_start(job.warm_start, job.model, release.schema)
    # All of its state, the shares of the classes that set_prevalence stored included: the other weights were trained with them.
    model.load_state_dict(start.model.state_dict())
    # What its weights take for 0 and 1 is what these statistics say. New ones would move the input of every study under weights
    # that were not trained for that: a shift that nobody meant, and in the champion's own sites first.
    return model, start.stats


def _of_whole_batches(job: FinetuneJob) -> str | None:
    """The option with which a model or an objective looks at all rows of a step, or moves something once a step."""
    match job.objective:
        case BayesianObjectiveConfig(adversarial=AdversarialConfig(), lambda_adv=weight) if weight > 0:
            return "objective.adversarial"
    match job.model:
        case DrafConfig(u_ema=float()):
            return "model.u_ema"
        case AumConfig(modality_node_update="sync" | "batch" as update):
            return f"model.modality_node_update {update}"
        case DrifaConfig(norm="batch"):
            return "model.norm batch"
    return None


def _inputs(model: ModelConfig, schema: DataSchema) -> frozenset[str]:
    """What the model reads, which the training law may corrupt: other modalities may hold masks or maps that it learns from."""
    return frozenset((model.image_of(schema).name,) if isinstance(model, BayesianUnetConfig) else schema.names)


def _num_readable(model: ModelConfig, release: Release, num_labelled: int) -> int:
    """How many of the labelled training studies have what the model reads: the share that all training studies have of it."""
    if not isinstance(model, BayesianUnetConfig) or isinstance(release.schema.label, SegmentationSpec):
        return num_labelled
    train = [counts["train"] for counts in release.manifest.counts.values()]
    present, studies = (sum(counts[name] for counts in train) for name in (model.image_of(release.schema).name, "studies"))
    return max(1, round(num_labelled * present / studies))


def _clean(split: SplitLoader, normaliser: Normaliser) -> Iterator[Batch]:
    """Clean batches of a split, normalised, spread over all of it: shards of later deliveries come last."""
    every = -(-split.num_samples // CLEAN_STUDIES) or 1
    return map(normaliser, split.studies(Portion(steps=range(0, split.num_batches, every))))


def new_model(job: FinetuneJob, release: Release, labels: LabelCounts) -> nn.Module:
    """The model with the parameters that the seed gives."""
    model = build_model(job.model, release.schema, job.seed)
    set_prevalence(model, labels.held, labels.of)
    return model

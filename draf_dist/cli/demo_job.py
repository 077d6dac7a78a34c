"""The jobs of the demo, and where they run: small enough for two cores and six minutes."""

from draf_dist.data.corruption import TrainingCorruption
from draf_dist.evaluation.job import EvaluateJob, SweepSettings
from draf_dist.launch.profile import RayProfile
from draf_dist.models.encoders import EncoderChoice
from draf_dist.models.encoders.image2d import Image2dConfig
from draf_dist.models.encoders.series import SeriesTransformerConfig
from draf_dist.models.encoders.tabular import TabularConfig
from draf_dist.models.fusion.draf import DrafConfig
from draf_dist.objectives.fusion import FusionObjectiveConfig
from draf_dist.objectives.pretrain_simclr import SimclrConfig
from draf_dist.training.deepspeed_config import DeepSpeedConfig
from draf_dist.training.job import CheckpointConfig, FinetuneJob, OptimizerConfig
from draf_dist.training.pretrain_job import PretrainJob

IMAGE = Image2dConfig(widths=(8, 16, 32), dropout=0.05, projection_dropout=0.1)
WIDTH = 32


def demo_profile() -> RayProfile:
    """Two workers on this machine, optimizer state and gradients shared."""
    return RayProfile(workers=2, cpus_per_worker=0.5, deepspeed=DeepSpeedConfig(zero_stage=2))


def demo_pretraining(release: str, *, seed: int) -> PretrainJob:
    """The image encoder of jobs/pretrain_synth.yaml for fewer epochs."""
    return PretrainJob(
        name="demo_pretrain",
        release=release,
        seed=seed,
        objective=SimclrConfig(modality="cxr"),
        encoder=IMAGE,
        width=WIDTH,
        batch_size=64,
        epochs=8,
        optimizer=OptimizerConfig(learning_rate=3e-3, clip_norm=1.0),
    )


def demo_job(release: str, encoder: str, *, seed: int) -> FinetuneJob:
    """The model of jobs/finetune_synth.yaml for fewer epochs, with checkpoints often enough to be killed between two.

    encoder: URL of the pre-training run.
    """
    encoders = EncoderChoice(
        image=IMAGE,
        series=SeriesTransformerConfig(hidden=32, heads=2, blocks=1),
        table=TabularConfig(hidden=64),
    )
    return FinetuneJob(
        name="demo",
        release=release,
        seed=seed,
        pretrained={"cxr": encoder},
        model=DrafConfig(width=WIDTH, presence_bits=True, encoders=encoders),
        objective=FusionObjectiveConfig(lambda_uni=1.0),
        corruption=TrainingCorruption(probability=0.3, modality_dropout=0.4),
        batch_size=32,
        epochs=15,
        optimizer=OptimizerConfig(learning_rate=3e-3, clip_norm=1.0),
        checkpoint=CheckpointConfig(every_steps=10),
        passes_eval=20,
    )


def demo_evaluation() -> EvaluateJob:
    """Everything that an evaluation reports, from fewer passes and resamples than the default."""
    return EvaluateJob(passes=20, bootstrap=500, sweep=SweepSettings(passes=5))

"""The jobs of the demo: small enough for two cores and three minutes."""

from draf_dist.data.corruption import TrainingCorruption
from draf_dist.evaluation.job import EvaluateJob, SweepSettings
from draf_dist.models.encoders import EncoderChoice
from draf_dist.models.encoders.image2d import Image2dConfig
from draf_dist.models.encoders.series import SeriesTransformerConfig
from draf_dist.models.encoders.tabular import TabularConfig
from draf_dist.models.fusion.draf import DrafConfig
from draf_dist.objectives.fusion import FusionObjectiveConfig
from draf_dist.training.job import CheckpointConfig, FinetuneJob, OptimizerConfig


def demo_job(release: str, *, seed: int) -> FinetuneJob:
    """The model of jobs/finetune_synth.yaml for fewer epochs, with checkpoints often enough to be killed between two."""
    encoders = EncoderChoice(
        image=Image2dConfig(widths=(8, 16, 32), dropout=0.05, projection_dropout=0.1),
        series=SeriesTransformerConfig(hidden=32, heads=2, blocks=1),
        table=TabularConfig(hidden=64),
    )
    return FinetuneJob(
        name="demo",
        release=release,
        seed=seed,
        model=DrafConfig(width=32, presence_bits=True, encoders=encoders),
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

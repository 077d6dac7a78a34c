"""The spec of an evaluation: what is predicted, how often, under which corruptions."""

from typing import Literal

from pydantic import Field

from draf_dist.config.spec import Spec
from draf_dist.data.corruption import (
    Downsample,
    EhrMask,
    EhrNoise,
    GaussianNoise,
    Jpeg,
    Missing,
    MissingNotAtRandom,
    Operation,
    Swap,
)


class SweepSettings(Spec):
    """The robustness sweep: every operation at every non-zero grid entry, on one modality at a time and on all it fits.

    passes is smaller than that of the clean evaluation and at most max_studies studies take part (those with the smallest uids,
    a keyed hash), so the cost is bounded; clean and corrupted are compared on the same studies with the same passes and masks.
    """

    operations: tuple[Operation, ...] = (
        GaussianNoise(),
        Downsample(),
        Jpeg(),
        EhrMask(),
        EhrNoise(),
        Swap(),
        Missing(),
        MissingNotAtRandom(),
    )
    split: Literal["val", "test", "ood"] = "test"
    passes: int = Field(default=10, ge=2)
    max_studies: int = Field(default=512, ge=1)


class EvaluateJob(Spec):
    """The evaluation of one finished run. Temperature is always fitted on `val`.

    splits: those reported. passes: Monte-Carlo passes of clean predictions. seed: of the evaluation's own noise, apart from
    training's. bootstrap: resamples of subjects behind every 95 % interval. threshold: the fixed one of PPV and recall.
    target_risk: the error rate of `coverage_at_risk`. warn_correlation: |Spearman(U, p)| on val above which U counts as a risk
    score. sweep: None leaves out corruptions and removals.
    """

    kind: Literal["evaluate"] = "evaluate"
    splits: tuple[Literal["test", "ood"], ...] = Field(("test", "ood"), min_length=1)
    passes: int = Field(30, ge=2)
    batch_size: int = Field(64, ge=1)
    seed: int = Field(0, ge=0)
    bootstrap: int = Field(1000, ge=0)
    threshold: float = Field(0.5, gt=0, lt=1)
    target_risk: float = Field(0.1, gt=0, lt=1)
    warn_correlation: float = Field(0.7, gt=0, le=1)
    sweep: SweepSettings | None = SweepSettings()

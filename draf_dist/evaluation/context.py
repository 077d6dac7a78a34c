"""What every description of predictions needs: the job, the temperature, whose studies they are."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from draf_dist.evaluation.follow_up import FollowUp
from draf_dist.evaluation.job import EvaluateJob
from draf_dist.evaluation.predictions import Predictions
from draf_dist.evaluation.regret import PlantedTruth
from draf_dist.evaluation.results import Metrics
from draf_dist.evaluation.scoring import AnyScores, scores_of
from draf_dist.evaluation.statistics import Resamples, estimate_all
from draf_dist.evaluation.task_scores import Scores

# Below this an interval says more about the resamples than about the group.
SMALLEST_GROUP = 10
ONE_CLASS = "needs studies of both kinds"


@dataclass(frozen=True)
class Context:
    """What every description needs.

    subject: uid -> number of the subject. truth: None where none is planted. follow_up: of the training subjects, for times alone.
    """

    job: EvaluateJob
    temperature: float
    subject: Mapping[int, int]
    truth: Mapping[int, PlantedTruth] | None
    follow_up: FollowUp | None = None

    def resamples(self, predictions: Predictions, replicates: int | None = None) -> Resamples:
        """Resamples of the subjects of these studies."""
        subject = np.array([self.subject[int(uid)] for uid in predictions.uid], dtype=np.int64)
        return Resamples(subject, replicates=self.job.bootstrap if replicates is None else replicates, seed=self.job.seed)

    def resamples_of_group(self, predictions: Predictions) -> Resamples:
        """The same; none of a group that is too small."""
        return self.resamples(predictions, None if predictions.num_studies >= SMALLEST_GROUP else 0)

    def scored(self, predictions: Predictions, *, scaled: bool) -> AnyScores:
        """The labelled predictions as metrics take them, temperature-scaled or not."""
        return scores_of(predictions, self.follow_up, self.temperature if scaled else 1.0)


def short_estimates(scored: Scores, resamples: Resamples) -> Metrics:
    """The metrics of tables, with intervals."""
    return estimate_all(lambda rows: scored.rows(rows).short(), resamples, reason=ONE_CLASS)


def all_estimates(scored: Scores, resamples: Resamples, job: EvaluateJob) -> Metrics:
    """Every metric, with intervals."""

    def scores(rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> dict[str, float]:
        return scored.rows(rows).all(threshold=job.threshold, risk=job.target_risk)

    return estimate_all(scores, resamples, reason=ONE_CLASS)

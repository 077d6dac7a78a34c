"""From predictions of any task to the scores of that task, at a temperature; and the temperature that validation asks for."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from draf_dist.errors import SpecError, explain
from draf_dist.evaluation import label_scores, scores, time_scores
from draf_dist.evaluation.answers import LabelAnswers, TimeAnswers
from draf_dist.evaluation.follow_up import FollowUp
from draf_dist.evaluation.label_scores import LabelScores
from draf_dist.evaluation.predictions import Predictions
from draf_dist.evaluation.scores import Scored
from draf_dist.evaluation.task_scores import MetricInfo, TaskName
from draf_dist.evaluation.time_scores import TimeScores
from draf_dist.metrics.classification import Floats
from draf_dist.metrics.temperature import Questions, Temperature, fit_temperature, fit_temperature_of_each, scale, scale_each
from draf_dist.schema.label import LabelSpec, MultiLabelSpec, SurvivalSpec, TaskSpec

AnyScores = Scored | LabelScores | TimeScores


@dataclass(frozen=True)
class TaskMetrics:
    """What is reported of a task. primary: the metric that ranks models. columns: those of tables by group."""

    primary: str
    metrics: Mapping[str, MetricInfo]
    columns: tuple[str, ...]

    @property
    def title(self) -> str:
        """Of the primary metric."""
        return self.metrics[self.primary].title

    @property
    def short_title(self) -> str:
        """The same for tables and axes, without the name of who defined it."""
        return self.heading(self.primary)

    def heading(self, name: str) -> str:
        """A metric above its column."""
        return self.metrics[name].title.replace(" (Harrell)", "").replace(" (nats)", "")


TASKS: dict[TaskName, TaskMetrics] = {
    "class": TaskMetrics(scores.PRIMARY, scores.METRICS, scores.COLUMNS),
    "multilabel": TaskMetrics(label_scores.PRIMARY, label_scores.METRICS, label_scores.COLUMNS),
    "survival": TaskMetrics(time_scores.PRIMARY, time_scores.METRICS, time_scores.COLUMNS),
}


def task_asked(label: TaskSpec, *, where: str) -> TaskName:
    """The task of a label; where: what asks for it.

    Raises:
        SpecError: the label is a mask.
    """
    match label:
        case LabelSpec():
            return "class"
        case MultiLabelSpec():
            return "multilabel"
        case SurvivalSpec():
            return "survival"
        case _:
            remedy = "Masks have no prediction of a study; draf evaluate measures those of a bayesian_unet, in masks.json."
            raise SpecError(
                explain(f"{where}: label {label.name}", expected="classes, labels or times", found="masks", remedy=remedy)
            )


def task_of(predictions: Predictions) -> TaskName:
    """What was asked for."""
    match predictions.answers:
        case LabelAnswers():
            return "multilabel"
        case TimeAnswers():
            return "survival"
        case None:
            return "class"


def scores_of(predictions: Predictions, follow_up: FollowUp | None, temperature: float | None = None) -> AnyScores:
    """The scores of predictions whose outcome is known (`labelled`), at a temperature or as they are.

    follow_up: of the model's training, for times alone.
    """
    as_they_are = predictions.probability.astype(np.float64)
    probability = as_they_are if temperature is None else scaled_probability(predictions, temperature)
    match predictions.answers:
        case LabelAnswers(label, observed):
            return LabelScores(probability, label, observed, predictions.epistemic.astype(np.float64))
        case TimeAnswers(time, event, _, _):
            assert follow_up is not None, "whoever scores times knows how the training subjects were followed"
            return TimeScores.of(probability, time.astype(np.float64), event, predictions.target, follow_up)
        case None:
            return Scored(probability, predictions.target, predictions.epistemic.astype(np.float64))


def scaled(predictions: Predictions, temperature: float) -> Predictions:
    """The predictions with their probabilities at a temperature: of labels and hazards each by itself."""
    return replace(predictions, probability=scaled_probability(predictions, temperature).astype(np.float32))


def scaled_probability(predictions: Predictions, temperature: float) -> Floats:
    """Probabilities (n, K) at a temperature, in double precision."""
    rule = scale if predictions.answers is None else scale_each
    return rule(predictions.probability.astype(np.float64), temperature)


def temperature_of(validation: Predictions) -> Temperature:
    """The temperature that minimises the NLL of predictions of validation."""
    known = validation.labelled()
    probability = known.probability.astype(np.float64)
    match known.answers:
        case LabelAnswers(label, observed):
            return fit_temperature_of_each(Questions.of_labels(probability, label, observed))
        case TimeAnswers(_, event, _, _):
            return fit_temperature_of_each(Questions.of_hazards(probability, known.target, event))
        case None:
            return fit_temperature(probability, known.target)

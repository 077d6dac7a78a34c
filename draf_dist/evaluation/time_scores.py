"""The metrics of the time to an event: order of the risks, and survival probabilities, corrected for censoring."""

from dataclasses import dataclass

import numpy as np

from draf_dist.evaluation.follow_up import FollowUp
from draf_dist.evaluation.task_scores import MetricInfo
from draf_dist.metrics import survival
from draf_dist.metrics.classification import Flags, Floats, Integers, mean_or_nan

METRICS = {
    "c_index": MetricInfo(
        "C-index (Harrell)", "higher", "of two studies one of which outlives the other, the share ranked rightly; .5 is guessing"
    ),
    "c_index_ipcw": MetricInfo(
        "C-index (Uno)",
        "higher",
        "the same up to the horizon, each pair weighed by how seldom the training subjects are seen for so long",
    ),
    "nll": MetricInfo(
        "NLL (nats)", "lower", "mean -ln of the probability of the interval of the event, or of outliving that of the last visit"
    ),
    "ibs": MetricInfo(
        "Integrated Brier",
        "lower",
        "mean squared error of S(t) over all t up to the horizon, corrected for censoring; .25 is S = .5 throughout",
    ),
    "brier_horizon": MetricInfo("Brier at the horizon", "lower", "squared error of S at the horizon, corrected for censoring"),
}
COLUMNS = ("c_index", "c_index_ipcw", "nll", "ibs")
PRIMARY = "c_index"


@dataclass(frozen=True)
class TimeScores:
    """What is predicted: hazard (n, K). What is known: time, event, and interval, that of the time. All but hazard are (n,).

    Worked out once, so that resamples are quick: risk; uno: weight of a study's event in Uno's C; brier: what it adds to the
    integrated Brier score; last: to the Brier score at the horizon.
    """

    hazard: Floats
    time: Floats
    event: Flags
    interval: Integers
    risk: Floats
    uno: Floats
    brier: Floats
    last: Floats

    @classmethod
    def of(cls, hazard: Floats, time: Floats, event: Flags, interval: Integers, follow_up: FollowUp) -> "TimeScores":
        """follow_up: that of the training subjects of the model."""
        uno, scores = _uno(time, event, follow_up), _brier(hazard, time, event, follow_up)
        return cls(hazard, time, event, interval, survival.risk(hazard), uno, *scores)

    def rows(self, index: Integers) -> "TimeScores":
        """Some of the studies, with repeats if asked for."""
        return TimeScores(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def short(self) -> dict[str, float]:
        """Both C-indices, NLL and the integrated Brier score."""
        return {
            "c_index": survival.concordance_index(self.time, self.event, self.risk),
            "c_index_ipcw": survival.weighted_concordance(self.time, self.event, self.risk, self.uno),
            "nll": mean_or_nan(self.pointwise_nll()),
            "ibs": mean_or_nan(self.brier),
        }

    def all(self, *, threshold: float, risk: float) -> dict[str, float]:  # noqa: ARG002
        """Every metric: no alarm and no error of one study is defined under censoring, so threshold and risk play no part."""
        return {**self.short(), "brier_horizon": mean_or_nan(self.last)}

    def pointwise_nll(self) -> Floats:
        """-ln of the likelihood of each time, in nats, (n,)."""
        return survival.pointwise_survival_negative_log_likelihood(self.hazard, self.interval, self.event)

    def primary_of_resamples(self, counts: Floats) -> Floats:
        """Harrell's C of R resamples. (R,)."""
        return survival.concordance_of_resamples(self.time, self.event, self.risk, counts)

    def right(self) -> None:
        """A probability of an event is neither right nor wrong where it is not known."""
        return


def _uno(time: Floats, event: Flags, follow_up: FollowUp) -> Floats:
    return survival.concordance_weights(time, event, follow_up.censoring, tau=follow_up.horizon)


def _brier(hazard: Floats, time: Floats, event: Flags, follow_up: FollowUp) -> tuple[Floats, Floats]:
    """Integrated up to the horizon, and there; NaN without a horizon."""
    if follow_up.horizon <= 0:
        nothing = np.full(len(time), np.nan)
        return nothing, nothing
    times = follow_up.grid
    predicted = survival.survival_at(hazard, np.array(follow_up.edges), times)
    every = survival.pointwise_brier_score(time, event, predicted, times, follow_up.censoring)
    return survival.integrated_over(times, every), every[:, -1]

"""What every task's metrics have in common: how they are asked for, which one ranks models, how each is to be read."""

from dataclasses import dataclass
from typing import Literal, Protocol, Self

from draf_dist.metrics.classification import Flags, Floats, Integers

TaskName = Literal["class", "multilabel", "survival"]


@dataclass(frozen=True)
class MetricInfo:
    """Title and one line of explanation of a metric; `better` is the direction of a good value, "" where there is none."""

    title: str
    better: str
    meaning: str


class Scores(Protocol):
    """What metrics need of n studies whose outcome is known, with the metrics of their task."""

    def rows(self, index: Integers) -> Self:
        """Some of the studies, with repeats if asked for."""
        ...

    def short(self) -> dict[str, float]:
        """The metrics of tables with many rows; `nll` and the primary one of the task are among them."""
        ...

    def all(self, *, threshold: float, risk: float) -> dict[str, float]:
        """Every metric; threshold is that of PPV and recall, risk that of the coverage."""
        ...

    def pointwise_nll(self) -> Floats:
        """-ln of the probability that the model gave to what is known of each study, in nats, (n,). Its mean is `nll`."""
        ...

    def primary_of_resamples(self, counts: Floats) -> Floats:
        """The primary metric of R resamples at once; counts (R, n) says how often each study occurs in each of them. (R,)."""
        ...

    def right(self) -> Flags | None:
        """Whether the prediction of each study is right, (n,); None where a prediction is neither right nor wrong."""
        ...

"""How long the subjects of a training split were followed: what corrects scores of times for censoring, and how far they reach."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from draf_dist.data.release import Release
from draf_dist.metrics.classification import Floats
from draf_dist.metrics.survival import Censoring
from draf_dist.schema.label import SurvivalSpec
from draf_dist.schema.label_text import read_label
from draf_dist.schema.study import TimeToEvent

# Where fewer of the training subjects are left uncensored, one study would weigh as much as more than ten. [ours]
LEAST_UNCENSORED = 0.1
GRID = 100


@dataclass(frozen=True)
class FollowUp:
    """censoring: of the training subjects. edges: of the label. horizon: until when survival is scored, in its unit; 0: nowhere."""

    censoring: Censoring
    edges: tuple[float, ...]
    horizon: float

    @property
    def grid(self) -> Floats:
        """Evenly spaced times from 0 to the horizon, (GRID + 1,)."""
        return np.linspace(0, self.horizon, GRID + 1)

    def until(self, horizon: float) -> "FollowUp":
        """The same, scored up to another time, or to its own if that is earlier."""
        return FollowUp(self.censoring, self.edges, min(self.horizon, horizon))


def follow_up_of(release: Release) -> FollowUp | None:
    """That of a release's training split; None where the label is not a time.

    The horizon is the last edge, or, if that is earlier, the last time at which a tenth of the training subjects is not yet
    censored: beyond it their number says nothing of the censoring.
    """
    task = release.schema.label
    if not isinstance(task, SurvivalSpec):
        return None
    table = release.subjects()
    pairs = zip(table["split"].to_pylist(), table["label"].to_pylist(), strict=True)
    labels = [read_label(task, text) for split, text in pairs if split == "train"]
    times = [label for label in labels if isinstance(label, TimeToEvent)]
    # Batches hold times in single precision: the same time must be the same here.
    time = np.array([label.time for label in times], dtype=np.float32).astype(np.float64)
    censoring = Censoring.of(time, np.array([label.event for label in times], dtype=np.bool_))
    enough = censoring.time[censoring.probability >= LEAST_UNCENSORED]
    last = float(enough[-1]) if len(enough) else 0.0
    return FollowUp(censoring, task.edges, min(task.edges[-1], last))


def follow_ups_of(releases: Sequence[Release]) -> list[FollowUp | None]:
    """Those of several models whose studies are pooled: each its own censoring, all the earliest of their horizons."""
    found = [follow_up_of(release) for release in releases]
    horizon = min((each.horizon for each in found if each is not None), default=0.0)
    return [None if each is None else each.until(horizon) for each in found]

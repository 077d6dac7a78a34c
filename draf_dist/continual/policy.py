"""The policy of a gate: what a challenger must show before it may replace the champion, fixed before anyone sees its numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from draf_dist.config.spec import Spec, load_spec


class GatePolicy(Spec):
    """Margins, levels and demands of one comparison; harm = NLL(challenger) - NLL(champion), in nats a study.

    overall_margin, site_margin: harm up to which a challenger still counts as no worse, over all studies and at one site.
    confidence: 1 - alpha, the nominal level of promoting wrongly and of naming a harmed site wrongly, however many sites there
    are. It holds for harm that the holdout shows: harm to fewer than about 3 / n of the subjects may be absent from n of them, and
    no bound knows of it. power: what the number of subjects needed is worked out for, of each slice by itself. min_subjects: a
    slice with fewer decides nothing; 3 / (share of subjects in the rarest harm that matters). require: whether being no worse is
    enough. sites: those that must be shown no worse, None for every one; the others may only not be harmed. split: of the holdout
    release. replicates: resamples of subjects. passes, seed: Monte-Carlo passes and noise of both models.
    """

    kind: Literal["gate"] = "gate"
    overall_margin: float = Field(0.02, gt=0)
    site_margin: float = Field(0.05, gt=0)
    confidence: float = Field(0.95, gt=0.5, lt=1)
    power: float = Field(0.8, gt=0.5, lt=1)
    min_subjects: int = Field(30, ge=10)
    require: Literal["improvement", "non_inferior"] = "improvement"
    sites: tuple[str, ...] | None = None
    split: Literal["test", "ood"] = "test"
    replicates: int = Field(4000, ge=1000)
    passes: int = Field(30, ge=2)
    seed: int = Field(0, ge=0)

    @property
    def alpha(self) -> float:
        """The error rate of every claim."""
        return 1 - self.confidence


def load_policy(path: Path | str, overrides: Sequence[str] = ()) -> GatePolicy:
    """The policy in a YAML file.

    Raises:
        SpecError: one line for every problem.
    """
    return load_spec(path, GatePolicy, overrides)

"""A registered version of a model: what the registry knows of it."""

from dataclasses import dataclass

from draf_dist.continual.verdict import Verdict

CHAMPION, CHALLENGER = "champion", "challenger"


@dataclass(frozen=True)
class ModelVersion:
    """A finished fine-tuning run under a name and a number.

    run_url: of its folder, absolute for local ones. release: that it was trained on, URL@version. temperature: that its predictions
    are served at. verdict: the newest one on it, which decides; None before any. aliases: among champion and challenger.
    model_sha256: of model.json; "" where the registry has none. earlier_verdicts: those before the newest, oldest first.
    """

    name: str
    version: int
    run_url: str
    weights_sha256: str
    job_sha256: str
    release: str
    temperature: float
    verdict: Verdict | None
    aliases: tuple[str, ...]
    model_sha256: str = ""
    earlier_verdicts: tuple[Verdict, ...] = ()

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """All of them, oldest first."""
        return self.earlier_verdicts if self.verdict is None else (*self.earlier_verdicts, self.verdict)

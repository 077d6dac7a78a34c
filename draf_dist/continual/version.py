"""A registered version of a model: what the registry knows of it."""

from dataclasses import dataclass

from draf_dist.continual.verdict import Verdict

CHAMPION, CHALLENGER = "champion", "challenger"


@dataclass(frozen=True)
class ModelVersion:
    """A finished fine-tuning run under a name and a number.

    run_url: of its folder, absolute for local ones. release: that it was trained on, URL@version. temperature: that its predictions
    are served at. verdict: the last one on it, None before any. aliases: among champion and challenger.
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

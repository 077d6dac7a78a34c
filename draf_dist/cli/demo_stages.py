"""What the demo does, stage by stage, and how long each takes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from draf_dist.cli.output import errors
from draf_dist.errors import DataError, explain

# The runs of the demo, beneath its folder: `run` lost a worker and recovered, `reference` never did.
PRETRAINED, RUN, REFERENCE = "pretrained", "run", "reference"


@dataclass
class Stages:
    """Names and seconds of what was done, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Announces a stage on standard error and times it."""
        errors.print(f"[bold]{name}[/] ...", highlight=False)
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 2)


def hold(holds: bool, where: str, expected: str, found: str) -> None:
    """Raises DataError unless a check of the demo holds."""
    if not holds:
        raise DataError(
            explain(f"demo check, {where}", expected=expected, found=found, remedy="This is a bug: report it with demo.json.")
        )

"""What the loaders of all ranks did, for the ledger; and what they left out, told on the terminal and kept in the run folder."""

import json
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, field
from types import TracebackType

import torch
from rich.console import Console

from draf_dist.data.bad_data import LeftOut
from draf_dist.data.loader import Loader, SplitLoader
from draf_dist.data.loader_stats import LoaderStats
from draf_dist.errors import DrafError
from draf_dist.storage import Store
from draf_dist.training.backend import Backend
from draf_dist.training.ledger import Supplied

LEFT_OUT = "left_out"


@dataclass
class Supply:
    """Of one rank in one attempt, which began at step `start`. Leaving it on an error tells what was left out before."""

    training: Loader
    validation: SplitLoader
    store: Store
    rank: int
    start: int
    console: Console
    _settled: tuple[LoaderStats, LoaderStats] = (LoaderStats(), LoaderStats())
    _told: set[str] = field(default_factory=set)

    def __enter__(self) -> "Supply":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, DrafError):
            # That there is no writing any more must not hide what ended the run.
            with suppress(DrafError):
                self._tell()

    def stats(self) -> LoaderStats:
        """Of training on this rank since the attempt began."""
        return self.training.stats()

    def settle(self, backend: Backend) -> Supplied:
        """Of all ranks since the last call; every rank calls it. What was left out meanwhile is durable then."""
        self._tell()
        now = self.training.stats(), self.validation.stats()
        since = [astuple(new - old) for new, old in zip(now, self._settled, strict=True)]
        self._settled = now
        totals = backend.gather(torch.tensor([since], dtype=torch.int64, device=backend.device)).sum(dim=0).tolist()
        return Supplied(*(LoaderStats(*total) for total in totals))

    def _tell(self) -> None:
        found = [("train", one) for one in self.training.left_out] + [("val", one) for one in self.validation.left_out]
        fresh = [(split, one) for split, one in found if one.message not in self._told]
        for split, one in fresh:
            where = f"at step {one.step}" if split == "train" else "of validation"
            self.console.print(f"left out {where}: {one.message}", markup=False, highlight=False, soft_wrap=True)
        if fresh:
            path = f"{LEFT_OUT}/step-{self.start:08d}-rank-{self.rank}.jsonl"
            self.store.write(path, "".join(_line(split, one) for split, one in found).encode())
            self._told |= {one.message for _, one in fresh}


def _line(split: str, one: LeftOut) -> str:
    return json.dumps({"split": split, **asdict(one)}) + "\n"

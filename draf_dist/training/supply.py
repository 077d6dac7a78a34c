"""What the loaders of all ranks did, for the ledger; and what they left out, told on the terminal and kept in the run folder."""

import json
from dataclasses import asdict, astuple, dataclass, field

import torch
from rich.console import Console

from draf_dist.data.loader import Loader
from draf_dist.data.loader_stats import LoaderStats
from draf_dist.storage import Store
from draf_dist.training.backend import Backend

LEFT_OUT = "left_out"


@dataclass
class Supply:
    """Of one rank in one attempt, which began at step `start`."""

    loader: Loader
    store: Store
    rank: int
    start: int
    console: Console
    _settled: LoaderStats = LoaderStats()
    _told: int = field(default=0)

    def stats(self) -> LoaderStats:
        """Of this rank since the attempt began."""
        return self.loader.stats()

    def settle(self, backend: Backend) -> LoaderStats:
        """Of all ranks since the last call; every rank calls it. What was left out meanwhile is durable then."""
        self._tell()
        now = self.stats()
        mine = torch.tensor([astuple(now - self._settled)], dtype=torch.int64, device=backend.device)
        self._settled = now
        return LoaderStats(*backend.gather(mine).sum(dim=0).tolist())

    def _tell(self) -> None:
        found = self.loader.left_out
        for one in found[self._told :]:
            self.console.print(f"left out at step {one.step}: {one.message}", markup=False, highlight=False, soft_wrap=True)
        if len(found) > self._told:
            lines = "".join(json.dumps(asdict(one)) + "\n" for one in found)
            self.store.write(f"{LEFT_OUT}/step-{self.start:08d}-rank-{self.rank}.jsonl", lines.encode())
            self._told = len(found)

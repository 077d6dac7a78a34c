"""What the ranks consumed since the last commit, by source epoch."""

from dataclasses import dataclass, field

import numpy as np
import torch

from draf_dist.data.order import rank_entries
from draf_dist.data.receipts import add_receipts, receipt
from draf_dist.schema.release import Receipt
from draf_dist.training.backend import Backend
from draf_dist.training.ledger import NOTHING, SourceEpoch
from draf_dist.training.loop import StepReport
from draf_dist.training.plan import TrainingPlan

BITS = 1 << 64
SIGN = 1 << 63


@dataclass
class Consumption:
    """The receipts of one rank of a run that follows a plan. By the number of a source and its epoch."""

    plan: TrainingPlan
    rank: int
    world: int
    _receipts: dict[tuple[int, int], Receipt] = field(default_factory=dict)

    def add(self, report: StepReport) -> None:
        """Counts the rows of one step: which they were the batch says, from which source they should be the plan."""
        entries = self.plan.entry_sources(report.step - 1)
        sources = entries[rank_entries(len(entries), self.plan.order.batch_size, self.rank, self.world)]
        uids, epochs = report.uids.numpy().astype(np.int64), report.epochs.numpy()
        for source, epoch in sorted(set(zip(sources.tolist(), epochs.tolist(), strict=True))):
            part = receipt(uids[(sources == source) & (epochs == epoch)])
            self._receipts[source, epoch] = add_receipts(self._receipts.get((source, epoch), NOTHING), part)

    def settle(self, backend: Backend) -> dict[SourceEpoch, Receipt]:
        """The receipts of all ranks together, and an empty count from here on; every rank calls it."""
        rows = [[*of, part.count, _signed(int(part.uid_sum, 16))] for of, part in sorted(self._receipts.items())]
        self._receipts = {}
        mine = torch.tensor(rows, dtype=torch.int64, device=backend.device).reshape(-1, 4)
        totals: dict[SourceEpoch, Receipt] = {}
        for source, epoch, count, uid_sum in backend.gather(mine).tolist():
            of = self.plan.sources[source].name, epoch
            totals[of] = add_receipts(totals.get(of, NOTHING), Receipt(count=count, uid_sum=f"{uid_sum % BITS:016x}"))
        return totals


def _signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    return (value + SIGN) % BITS - SIGN

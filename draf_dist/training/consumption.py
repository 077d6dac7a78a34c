"""What the ranks consumed since the last commit, by source epoch."""

from dataclasses import dataclass, field

import numpy as np
import torch

from draf_dist.data.receipts import add_receipts, receipt
from draf_dist.schema.release import Receipt
from draf_dist.training.backend import Backend
from draf_dist.training.ledger import NOTHING
from draf_dist.training.loop import StepReport

BITS = 1 << 64
SIGN = 1 << 63


@dataclass
class Consumption:
    """The receipts of one rank."""

    _receipts: dict[int, Receipt] = field(default_factory=dict)

    def add(self, report: StepReport) -> None:
        """Counts the rows of one step."""
        for epoch in sorted(set(report.epochs.tolist())):
            part = receipt(report.uids[report.epochs == epoch].numpy().astype(np.int64))
            self._receipts[epoch] = add_receipts(self._receipts.get(epoch, NOTHING), part)

    def settle(self, backend: Backend) -> dict[int, Receipt]:
        """The receipts of all ranks together, and an empty count from here on; every rank calls it."""
        rows = [[epoch, part.count, _signed(int(part.uid_sum, 16))] for epoch, part in sorted(self._receipts.items())]
        self._receipts = {}
        mine = torch.tensor(rows, dtype=torch.int64, device=backend.device).reshape(-1, 3)
        totals: dict[int, Receipt] = {}
        for epoch, count, uid_sum in backend.gather(mine).tolist():
            part = Receipt(count=count, uid_sum=f"{uid_sum % BITS:016x}")
            totals[epoch] = add_receipts(totals.get(epoch, NOTHING), part)
        return totals


def _signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    return (value + SIGN) % BITS - SIGN

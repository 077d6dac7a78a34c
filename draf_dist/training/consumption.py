"""What the ranks consumed since the last commit, by source epoch."""

from collections import Counter
from dataclasses import dataclass, field

import torch

from draf_dist.data.order import rank_entries
from draf_dist.data.receipts import add_receipts, receipt
from draf_dist.schema.release import Receipt
from draf_dist.training.backend import Backend
from draf_dist.training.ledger import NOTHING, Consumed, SourceEpoch
from draf_dist.training.loop import StepReport
from draf_dist.training.plan import TrainingPlan

BITS = 1 << 64
SIGN = 1 << 63


@dataclass
class Consumption:
    """The receipts of one rank of a run that follows a plan, and what was left out. By the number of a source and its epoch."""

    plan: TrainingPlan
    rank: int
    world: int
    _receipts: dict[tuple[int, int], Receipt] = field(default_factory=dict)
    _left_out: Counter[tuple[int, int]] = field(default_factory=Counter)

    def add(self, report: StepReport) -> None:
        """Counts the rows of one step: which they were the batch says, from which source they should be the plan."""
        step = report.step - 1
        entries = self.plan.entry_sources(step)
        mine = rank_entries(len(entries), self.plan.order.batch_size, self.rank, self.world)
        sources = entries[mine]
        uids, epochs = (part.numpy()[: len(sources)] for part in (report.uids, report.epochs))
        real = uids >= 0
        for source, epoch in sorted(set(zip(sources[real].tolist(), epochs[real].tolist(), strict=True))):
            part = receipt(uids[real & (sources == source) & (epochs == epoch)])
            self._receipts[source, epoch] = add_receipts(self._receipts.get((source, epoch), NOTHING), part)
        if not real.all():
            # A row that was left out says nothing of itself, not even its epoch.
            planned = self.plan.order.draws(step).epoch[mine]
            self._left_out.update(zip(sources[~real].tolist(), planned[~real].tolist(), strict=True))

    def settle(self, backend: Backend) -> Consumed:
        """What all ranks together consumed and left out, and an empty count from here on; every rank calls it."""
        keys = sorted({*self._receipts, *self._left_out})
        parts = [(self._receipts.get(of, NOTHING), self._left_out[of]) for of in keys]
        rows = [[*of, part.count, _signed(int(part.uid_sum, 16)), lost] for of, (part, lost) in zip(keys, parts, strict=True)]
        self._receipts, self._left_out = {}, Counter()
        mine = torch.tensor(rows, dtype=torch.int64, device=backend.device).reshape(-1, 5)
        receipts: dict[SourceEpoch, Receipt] = {}
        left_out: Counter[SourceEpoch] = Counter()
        for source, epoch, count, uid_sum, lost in backend.gather(mine).tolist():
            of = self.plan.sources[source].name, epoch
            if count:
                part = Receipt(count=count, uid_sum=f"{uid_sum % BITS:016x}")
                receipts[of] = add_receipts(receipts.get(of, NOTHING), part)
            if lost:
                left_out[of] += lost
        return Consumed(receipts, left_out)


def _signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    return (value + SIGN) % BITS - SIGN

"""Validation: the NLL of the Monte-Carlo prediction, the same numbers whenever the weights are the same."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from draf_dist import noise
from draf_dist.errors import DrafError, explain
from draf_dist.schema.batch import Batch, ClassTarget
from draf_dist.training.validation_scores import Columns, columns_of, scores

# Evaluation noise has a seed of its own, so that runs with different seeds are measured with the same masks.
EVALUATION_SEED = 0


class Passes(Protocol):
    """What a validation reads: a split, once a pass."""

    def batches(self) -> Iterator[Batch]:
        """One pass; every rank gets the same number of batches."""
        ...


class GivenUp(Exception):  # noqa: N818 - no error: it was asked for
    """A validation that was ended between two batches."""


@dataclass(frozen=True)
class Interruptible:
    """The same passes, asked before every batch whether to go on. asked: the same on all ranks.

    Its passes raise GivenUp.
    """

    split: Passes
    asked: Callable[[], bool]

    def batches(self) -> Iterator[Batch]:
        """One pass, or the beginning of one."""
        for batch in self.split.batches():
            if self.asked():
                raise GivenUp
            yield batch


def evaluation_keys(batch: Batch, passes: int) -> Tensor:
    """Noise keys (S, B) of an evaluation: by pass and uid, no epoch."""
    return noise.sample_keys(EVALUATION_SEED, "mc", None, batch.uid, passes)


@torch.no_grad()
def validate(
    module: nn.Module,
    batches: Iterable[Batch],
    prepare: Callable[[Batch], Batch],
    passes: int,
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> dict[str, float]:
    """NLL in nats and the other numbers of the task over the studies whose target is known: see validation_scores.py.

    batches: of this rank. gather: rows of all ranks; all ranks get the same numbers, bit for bit.

    Raises:
        DrafError: no target is known, or the NLL is not a number.
    """
    was_training = module.training
    module.eval()
    found: list[Columns] = []
    target: type = ClassTarget
    for batch in batches:
        prepared = prepare(batch)
        target = type(prepared.target)
        found.append(columns_of(module(prepared, evaluation_keys(prepared, passes)).logits, prepared))
    module.train(was_training)
    columns = [gather(torch.cat(parts)).cpu().numpy() for parts in zip(*found, strict=True)]
    if len(columns[0]) == 0:
        raise DrafError(explain("validation split", expected="studies with a label", found="none", remedy="Prepare more data."))
    numbers = scores(target, columns)
    if not math.isfinite(numbers["nll"]):
        found_nll = str(numbers["nll"])
        raise DrafError(explain("validation", expected="a finite NLL", found=found_nll, remedy="Lower optimizer.learning_rate."))
    return {name: value for name, value in numbers.items() if math.isfinite(value)}

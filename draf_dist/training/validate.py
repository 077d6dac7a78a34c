"""Validation: the NLL of the Monte-Carlo prediction, the same numbers whenever the weights are the same."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from draf_dist import noise
from draf_dist.errors import DrafError, explain
from draf_dist.metrics.classification import accuracy, auroc
from draf_dist.metrics.temperature import fit_temperature
from draf_dist.schema.batch import Batch

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


def log_prediction(logits: Tensor) -> Tensor:
    """Log of the mean over passes of the probabilities: logits (S, B, K) to (B, K)."""
    return torch.logsumexp(logits.log_softmax(-1), 0) - math.log(logits.shape[0])


@torch.no_grad()
def validate(
    module: nn.Module,
    batches: Iterable[Batch],
    prepare: Callable[[Batch], Batch],
    passes: int,
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> dict[str, float]:
    """NLL in nats, accuracy, and AUROC where it is defined, over the studies whose label is known.

    temperature: the one that these predictions ask for; nll_scaled: the NLL with it.

    batches: of this rank. gather: rows of all ranks; all ranks get the same numbers, bit for bit.

    Raises:
        DrafError: no label is known, or the NLL is not a number.
    """
    was_training = module.training
    module.eval()
    found = [_log_probability_of_known(module, prepare(batch), passes) for batch in batches]
    module.train(was_training)
    log_probability = gather(torch.cat([part for part, _ in found])).cpu().numpy()
    label = gather(torch.cat([part for _, part in found])).cpu().numpy()
    if len(label) == 0:
        raise DrafError(explain("validation split", expected="studies with a label", found="none", remedy="Prepare more data."))
    nll = -float(log_probability[np.arange(len(label)), label].mean())
    if not math.isfinite(nll):
        raise DrafError(explain("validation", expected="a finite NLL", found=str(nll), remedy="Lower optimizer.learning_rate."))
    probability = np.exp(log_probability)
    fitted = fit_temperature(probability, label)
    assert fitted.nll_scaled is not None
    numbers = {"nll": nll, "temperature": fitted.value, "nll_scaled": fitted.nll_scaled}
    numbers |= {"auroc": auroc(probability, label), "accuracy": accuracy(probability, label)}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _log_probability_of_known(module: nn.Module, batch: Batch, passes: int) -> tuple[Tensor, Tensor]:
    """Log probabilities f64 (n, K) and labels int64 (n,) of the rows whose label counts."""
    log_probability = log_prediction(module(batch, evaluation_keys(batch, passes)).logits)
    known = batch.classes.observed & (batch.weight > 0)
    return log_probability[known].double(), batch.classes.label[known]

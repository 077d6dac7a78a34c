"""Validation: the NLL of the Monte-Carlo prediction, the same numbers whenever the weights are the same."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from draf_dist import noise
from draf_dist.errors import DrafError, explain
from draf_dist.models.segmentation import BayesianUnet
from draf_dist.models.variational import weight_keys
from draf_dist.schema.batch import Batch, ClassTarget, SegmentationTarget
from draf_dist.training.mask_scores import Columns, mask_columns, score_masks
from draf_dist.training.risk_correlation import risk_columns, risk_correlations
from draf_dist.training.validation_scores import columns_of, scores

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

    Also how each modality's uncertainty goes with its risk, over all studies: see risk_correlation.py.
    batches: of this rank. gather: rows of all ranks; all ranks get the same numbers, bit for bit.

    Raises:
        DrafError: no target is known, or the NLL is not a number.
    """
    was_training = module.training
    module.eval()
    found: list[Columns] = []
    risks: list[Columns] = []
    target: type = ClassTarget
    modalities: tuple[str, ...] = ()
    for batch in batches:
        prepared = prepare(batch)
        target, modalities = type(prepared.target), prepared.modalities
        columns_here, risks_here = _columns(module, prepared, passes)
        found.append(columns_here)
        risks.append(risks_here)
    module.train(was_training)
    columns, of_risk = (_of_all_ranks(parts, gather) for parts in (found, risks))
    if len(columns[0]) == 0:
        raise DrafError(explain("validation split", expected="studies with a label", found="none", remedy="Prepare more data."))
    numbers = scores(target, columns)
    if not math.isfinite(numbers["nll"]):
        found_nll = str(numbers["nll"])
        raise DrafError(explain("validation", expected="a finite NLL", found=found_nll, remedy="Lower optimizer.learning_rate."))
    numbers |= risk_correlations(of_risk[0], of_risk[1], modalities) if of_risk else {}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _of_all_ranks(parts: Sequence[Columns], gather: Callable[[Tensor], Tensor]) -> list[NDArray[np.float64]]:
    return [gather(torch.cat(column)).cpu().numpy() for column in zip(*parts, strict=True)]


def _columns(module: nn.Module, batch: Batch, passes: int) -> tuple[Columns, Columns]:
    """The columns of a prepared batch: see validation_scores.py; and those of risk_correlation.py, of a model of modalities."""
    keys = evaluation_keys(batch, passes)
    if not isinstance(module, BayesianUnet):
        output = module(batch, keys)
        return columns_of(output.logits, batch), risk_columns(output, batch)
    # One set of weights a pass: with local reparameterisation the places of a map would draw apart, and what is pooled from them
    # would seem more certain than it is.
    weights = weight_keys(EVALUATION_SEED, None, passes, keys.device)
    if isinstance(batch.target, SegmentationTarget):
        structures = len(module.tasks[module.label].outputs)
        return mask_columns(score_masks(module, batch, keys, weights), structures, batch.weight.device), ()
    # Of a study without the image nothing is said.
    readable = replace(batch, weight=batch.weight * batch.present[:, module.axis])
    return columns_of(torch.stack([*module.passes(batch, keys, weights)]), readable), ()

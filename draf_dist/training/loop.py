"""The loop: batches in, one report per optimizer step out. What happens between steps is the caller's business."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from draf_dist.errors import DrafError, explain
from draf_dist.schema.batch import Batch, Term
from draf_dist.training.engine import Engine
from draf_dist.training.state import TrainState

Objective = Callable[[nn.Module, Batch, Tensor], dict[str, Term]]


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did.

    step: optimizer steps done so far, this one included. loss: what was minimised; terms: its parts before scaling, each a mean
    over the global batch. samples: rows of this rank without padding; uids, epochs: int64, of those rows. gradient_norm: before
    clipping. wait_s, compute_s: seconds spent waiting for data and computing.
    """

    step: int
    loss: float
    terms: dict[str, float]
    learning_rate: float
    gradient_norm: float
    samples: int
    uids: Tensor
    epochs: Tensor
    wait_s: float
    compute_s: float


@dataclass(frozen=True)
class StepRules:
    """What a step needs besides model and data, all pure functions.

    prepare: from a batch as loaded to one as the model takes it. keys: noise keys (S, B) of a prepared batch. learning_rate: of a
    step counted from 0. reduce: sum over ranks. accumulation: micro-batches per step.
    """

    prepare: Callable[[Batch], Batch]
    keys: Callable[[Batch], Tensor]
    learning_rate: Callable[[int], float]
    reduce: Callable[[Tensor], Tensor] = lambda values: values
    accumulation: int = 1


def train_steps(
    state: TrainState, engine: Engine, batches: Iterable[tuple[int, Batch]], objective: Objective, rules: StepRules
) -> Iterator[StepReport]:
    """One optimizer step per batch, one report per step; `state.step` moves on with each.

    Raises:
        DrafError: the loss or the gradient is not finite; the last checkpoint is from before.
    """
    engine.module.train()
    began = time.perf_counter()
    for step, batch in batches:
        if step != state.step:
            raise ValueError(f"the loader is at step {step}, the optimizer at {state.step}")
        loaded = time.perf_counter()
        learning_rate = rules.learning_rate(step)
        means, loss = _accumulate(engine, rules.prepare(batch), objective, rules)
        if not math.isfinite(loss):
            raise _diverged(step, "loss", loss)
        norm = engine.step(learning_rate)
        if not math.isfinite(norm):
            raise _diverged(step, "gradient", norm)
        state.step = step + 1
        rows = batch.weight > 0
        computed = time.perf_counter()
        yield StepReport(
            step=state.step,
            loss=loss,
            terms=means,
            learning_rate=learning_rate,
            gradient_norm=norm,
            samples=int(rows.sum()),
            uids=batch.uid[rows].cpu(),
            epochs=batch.epoch[rows].cpu(),
            wait_s=loaded - began,
            compute_s=computed - loaded,
        )
        # What the caller did meanwhile (validation, a checkpoint) is no waiting for data.
        began = time.perf_counter()


def _diverged(step: int, what: str, value: float) -> DrafError:
    return DrafError(
        explain(f"step {step}", expected=f"a finite {what}", found=str(value), remedy="Lower optimizer.learning_rate.")
    )


def micro_batches(batch: Batch, num: int) -> Iterator[Batch]:
    """The batch in `num` parts that differ by at most one row."""
    for part in range(num):
        yield batch.rows(batch.num_rows * part // num, batch.num_rows * (part + 1) // num)


def _accumulate(engine: Engine, batch: Batch, objective: Objective, rules: StepRules) -> tuple[dict[str, float], float]:
    """Backward over all micro-batches; the global mean of every term, and the loss."""
    parts = [(part, rules.keys(part)) for part in micro_batches(batch, rules.accumulation)]
    weights = None
    if len(parts) > 1:
        # A term's weight is known only once it is computed, yet the first backward needs the sum over all micro-batches. Noise
        # has no state, so a first pass without gradients finds the weights of the second; in eval mode: running means move once.
        engine.module.eval()
        with torch.no_grad():
            weights = _global_weights([objective(engine.module, part, keys) for part, keys in parts], rules)
        engine.module.train()
    numerators: dict[str, float] = {}
    scales: dict[str, float] = {}
    for part, keys in parts:
        terms = objective(engine.module, part, keys)
        weights = _global_weights([terms], rules) if weights is None else weights
        engine.backward(
            torch.stack([term.numerator * (term.scale * _inverse(weights[name])) for name, term in terms.items()]).sum()
        )
        summed = rules.reduce(torch.stack([term.numerator.detach() for term in terms.values()])).tolist()
        for (name, term), value in zip(terms.items(), summed, strict=True):
            numerators[name] = numerators.get(name, 0.0) + value
            scales[name] = term.scale
    assert weights is not None
    means = {name: value * _inverse(weights[name]) for name, value in numerators.items()}
    return means, sum(scales[name] * mean for name, mean in means.items())


def _global_weights(parts: list[dict[str, Term]], rules: StepRules) -> dict[str, float]:
    """The weight of every term, summed over micro-batches and ranks."""
    local = torch.stack([torch.stack([terms[name].weight.detach() for terms in parts]).sum() for name in parts[0]])
    return dict(zip(parts[0], rules.reduce(local).tolist(), strict=True))


def _inverse(weight: float) -> float:
    # A term that applies to no row of the global batch counts nothing; its branch still runs on every rank.
    return 1.0 / weight if weight > 0 else 0.0

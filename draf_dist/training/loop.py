"""The loop: batches in, one report per optimizer step out. What happens between steps is the caller's business."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from draf_dist.losses.gather import carry, leaves
from draf_dist.schema.batch import Batch, Term
from draf_dist.training.engine import Engine
from draf_dist.training.state import TrainState
from draf_dist.training.watch.health import Health, Skipped

# A batch with its noise keys (S, B).
Part = tuple[Batch, Tensor]


class Objective(Protocol):
    """What a step minimises: terms that are sums over rows, by name."""

    def __call__(self, model: nn.Module, batch: Batch, keys: Tensor, /) -> dict[str, Term]:
        """The terms of a prepared batch with keys (S, B)."""
        ...


@runtime_checkable
class CoupledObjective(Protocol):
    """What a step minimises where some terms look at all rows of the global batch together.

    Such a term is no sum over micro-batches: the rows of one would be no negatives of those of another, and its gradient would
    be off by half (tests/parity/test_contrastive.py). The loop therefore gives `couple` all rows at once.
    """

    def embed(self, model: nn.Module, batch: Batch, keys: Tensor) -> tuple[Any, dict[str, Term]]:
        """What the coupled terms look at, Rows of losses/gather.py, and the terms that are sums over rows."""
        ...

    def couple(self, rows: Any) -> dict[str, Term]:
        """The coupled terms of all rows of this rank. A collective: every rank calls it once per step."""
        ...


@runtime_checkable
class ScheduledObjective(Protocol):
    """What a step minimises where that depends on how far training is: a warm-up, weights that are drawn anew."""

    def at(self, step: int) -> Objective:
        """The objective of a step, counted from 0: a function of it alone."""
        ...


AnyObjective = Objective | CoupledObjective | ScheduledObjective


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did.

    step: optimizer steps done so far, this one included. loss: what was minimised; terms: its parts before scaling, each a mean
    over the global batch. samples: rows of this rank without padding. uids, epochs: int64 (B,), row i is entry i of the rank's cut
    of the global batch; uid -1 where it was left out, and past the cut. gradient_norm: before clipping. wait_s, compute_s: seconds
    spent waiting for data and computing. skipped: why there was no update; then nothing was computed after the loss, or not even
    that, and what was not is NaN.
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
    skipped: Skipped | None = None


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
    state: TrainState,
    engine: Engine,
    batches: Iterable[tuple[int, Batch]],
    objective: AnyObjective,
    rules: StepRules,
    health: Health | None = None,
) -> Iterator[StepReport]:
    """One optimizer step per batch, one report per step; `state.step` moves on with each.

    health: what is done about bad steps, and which ones are skipped; without it a bad one ends everything.

    Raises:
        DrafError: the loss or the gradient is not finite; the last checkpoint is from before.
        BadStep: the same, and `health` asks to roll back.
    """
    health = health or Health()
    engine.module.train()
    began = time.perf_counter()
    for step, batch in batches:
        if step != state.step:
            raise ValueError(f"the loader is at step {step}, the optimizer at {state.step}")
        loaded = time.perf_counter()
        learning_rate = rules.learning_rate(step)
        now = objective.at(step) if isinstance(objective, ScheduledObjective) else objective
        done = _step(engine, (step, batch), now, rules, health)
        state.step = step + 1
        rows = batch.weight > 0
        computed = time.perf_counter()
        yield StepReport(
            step=state.step,
            loss=done.loss,
            terms=done.terms,
            learning_rate=learning_rate,
            gradient_norm=done.gradient_norm,
            samples=int(rows.sum()),
            uids=torch.where(rows, batch.uid, -1).cpu(),
            epochs=batch.epoch.cpu(),
            wait_s=loaded - began,
            compute_s=computed - loaded,
            skipped=done.skipped,
        )
        # What the caller did meanwhile (validation, a checkpoint) is no waiting for data.
        began = time.perf_counter()


@dataclass(frozen=True)
class _Done:
    """A step, up to where it was skipped."""

    loss: float = math.nan
    terms: dict[str, float] = field(default_factory=dict)
    gradient_norm: float = math.nan
    skipped: Skipped | None = None


def _step(
    engine: Engine, batch: tuple[int, Batch], objective: Objective | CoupledObjective, rules: StepRules, health: Health
) -> _Done:
    step, rows = batch
    known = health.skipped_at(step)
    if known is not None:
        return _Done(skipped=known)
    terms, loss, why = _accumulate(engine, rules.prepare(rows), objective, rules, health)
    if why is not None:
        return _Done(loss, terms, skipped=health.skip_or_raise(step, why))
    norm = engine.step(rules.learning_rate(step))
    why = health.judge("gradient", norm)
    if why is not None:
        raise health.bad(step, why)
    return _Done(loss, terms, norm)


def micro_batches(batch: Batch, num: int) -> Iterator[Batch]:
    """The batch in `num` parts that differ by at most one row."""
    for part in range(num):
        yield batch.rows(batch.num_rows * part // num, batch.num_rows * (part + 1) // num)


def _accumulate(
    engine: Engine, batch: Batch, objective: Objective | CoupledObjective, rules: StepRules, health: Health
) -> tuple[dict[str, float], float, str | None]:
    """Backward over all micro-batches, unless the loss is bad; the global mean of every term, the loss, and why it is bad."""
    parts = [(part, rules.keys(part)) for part in micro_batches(batch, rules.accumulation)]
    if isinstance(objective, CoupledObjective):
        return _accumulate_coupled(engine, parts, objective, rules, health)
    return _accumulate_rows(engine, parts, objective, rules, health)


def _accumulate_rows(
    engine: Engine, parts: Sequence[Part], objective: Objective, rules: StepRules, health: Health
) -> tuple[dict[str, float], float, str | None]:
    """The same for terms that are sums over rows."""
    if len(parts) > 1:
        # A term's weight is known only once it is computed, yet the first backward needs the sum over all micro-batches.
        with first_look(engine.module):
            first = [objective(engine.module, part, keys) for part, keys in parts]
    else:
        first = [objective(engine.module, part, keys) for part, keys in parts]
    sums = _sums(first, rules)
    why = health.judge("loss", sums.loss)
    if why is not None:
        return sums.means, sums.loss, why
    if len(parts) == 1:
        engine.backward(_loss(first[0], sums.weights))
        return sums.means, sums.loss, None
    seen = []
    for part, keys in parts:
        terms = objective(engine.module, part, keys)
        engine.backward(_loss(terms, sums.weights))
        seen.append(_detached(terms))
    sums = _sums(seen, rules)
    return sums.means, sums.loss, None


def _accumulate_coupled(
    engine: Engine, parts: Sequence[Part], objective: CoupledObjective, rules: StepRules, health: Health
) -> tuple[dict[str, float], float, str | None]:
    """The same by gradient caching (Gao et al. 2021): the gradient with respect to all embeddings first, then part by part.

    d loss / d parameters = sum over rows of (d embedding / d parameters) (d loss / d embedding), and the last factor is known
    once all embeddings are, without any graph behind them. With one part its own graph serves; no forward is repeated.
    """
    # Lazily: the graph of one micro-batch is gone before the next is made.
    forward = (objective.embed(engine.module, part, keys) for part, keys in parts)
    if len(parts) > 1:
        # In training's own mode: the gradient is taken at these very embeddings, and `early` and `aum` draw in training alone. What
        # would move twice, once a forward, is refused with accumulation.
        with torch.no_grad():
            first = [objective.embed(engine.module, part, keys) for part, keys in parts]
    else:
        first = [next(forward)]
        forward = (found for found in first)
    rows_of_all = leaves([rows for rows, _ in first])
    coupled = objective.couple(rows_of_all)
    sums = _sums([coupled, *(terms for _, terms in first)], rules)
    why = health.judge("loss", sums.loss)
    if why is not None:
        return sums.means, sums.loss, why
    # Outside of engine.backward, so that the collectives of this gradient never meet those of the engine.
    wanted = torch.autograd.grad(_loss(coupled, sums.weights), [getattr(rows_of_all, name) for name in rows_of_all.carried])
    sizes = [part.num_rows for part, _ in parts]
    gradients = zip(*(torch.split(gradient, sizes) for gradient in wanted), strict=True)
    seen = [_detached(coupled)]
    for (rows, terms), gradient in zip(forward, gradients, strict=True):
        engine.backward(_loss(terms, sums.weights) + carry(rows, gradient))
        seen.append(_detached(terms))
    sums = _sums(seen, rules) if len(parts) > 1 else sums
    return sums.means, sums.loss, None


@contextmanager
def first_look(module: nn.Module) -> Iterator[None]:
    """A forward whose result only prepares another one: no gradients, and running means move once.

    Of the terms only their weights are used, and these do not depend on what a few layers do in training alone.
    """
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train()


def _loss(terms: dict[str, Term], weights: dict[str, float]) -> Tensor:
    """What the rows of these terms contribute to the loss of the global batch."""
    return torch.stack([term.numerator * (term.scale * _inverse(weights[name])) for name, term in terms.items()]).sum()


@dataclass(frozen=True)
class _Sums:
    """Of every term, over parts and ranks: its weight, its mean; and the loss of all."""

    weights: dict[str, float]
    means: dict[str, float]
    loss: float


def _sums(parts: Sequence[dict[str, Term]], rules: StepRules) -> _Sums:
    """One collective."""
    numerators, weights = (_local(parts, of) for of in (lambda term: term.numerator, lambda term: term.weight))
    total = rules.reduce(torch.stack([*numerators.values(), *weights.values()])).tolist()
    above, below = dict(zip(numerators, total, strict=False)), dict(zip(weights, total[len(numerators) :], strict=True))
    means = {name: above[name] * _inverse(below[name]) for name in above}
    scales = {name: term.scale for terms in parts for name, term in terms.items()}
    return _Sums(below, means, sum(scales[name] * mean for name, mean in means.items()))


def _local(parts: Sequence[dict[str, Term]], of: Callable[[Term], Tensor]) -> dict[str, Tensor]:
    """A number of every term, summed over parts."""
    local: dict[str, Tensor] = {}
    for terms in parts:
        for name, term in terms.items():
            # In f64, so that how a batch was cut does not show.
            value = of(term).detach().double()
            local[name] = local[name] + value if name in local else value
    return local


def _detached(terms: dict[str, Term]) -> dict[str, Term]:
    return {name: Term(term.numerator.detach(), term.weight.detach(), term.scale) for name, term in terms.items()}


def _inverse(weight: float) -> float:
    # A term that applies to no row of the global batch counts nothing; its branch still runs on every rank.
    return 1.0 / weight if weight > 0 else 0.0

"""Mixtures of releases with integer weights, endless and exact at every prefix (docs/order.md, 5)."""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from draf_dist.data.horizon import Horizon
from draf_dist.data.order import Draws, Order, require_positive
from draf_dist.data.permutation import IntArray
from draf_dist.errors import SpecError, explain

MAX_PERIOD = 10_000


@lru_cache(maxsize=8)
def chairman_table(weights: tuple[int, ...]) -> IntArray:
    """The source of every position of one period, D = sum(weights): int64 (D,), each source i exactly weights[i] times.

    Chairman assignment by the earliest deadline (Tijdeman 1980): the j-th draw of a source of weight w (j from 1) may take
    positions floor((j - 1) D / w) .. ceil(j D / w) - 1, counted from 0; of the sources whose next draw may come, the one with the
    earliest deadline comes, the first of them on a tie. After t positions a source's count is less than 1 away from t w / D.
    """
    weight = np.array(weights, np.int64)
    period = int(weight.sum())
    drawn = np.zeros(len(weight), np.int64)
    table = np.empty(period, np.int64)
    for position in range(period):
        released = drawn * period // weight <= position
        deadline = -(-(drawn + 1) * period // weight)
        table[position] = np.argmin(np.where(released, deadline, period + 1))
        drawn[table[position]] += 1
    return table


@dataclass(frozen=True)
class Mixture:
    """Draws from several releases in fixed proportions; it never ends, and every release has epochs of its own.

    Args:
        orders: one per source. Their batch_size is replaced: a source's own order is cut by what a batch holds of it.
        weights: one positive integer per source; their sum D is at most 10,000.
        batch_size: B, of the mixture.

    Raises:
        SpecError: other numbers of weights than of sources, a weight below 1, a sum above 10,000.
    """

    orders: tuple[Order, ...]
    weights: tuple[int, ...]
    batch_size: int

    def __post_init__(self) -> None:
        require_positive("batch_size", self.batch_size)
        if not self.orders or len(self.weights) != len(self.orders) or min(self.weights) < 1 or sum(self.weights) > MAX_PERIOD:
            raise SpecError(
                explain(
                    "mixture",
                    expected=f"one weight of at least 1 for each of {len(self.orders)} releases, their sum at most {MAX_PERIOD}",
                    found=f"weights {self.weights}",
                    remedy="Use small integers: 3 and 1 for three quarters of the first.",
                )
            )

    @property
    def steps_per_epoch(self) -> int:
        """ceil(N_0 D / (w_0 B)): after k times as many the first source was drawn whole at least k times."""
        return -(-self.orders[0].num_samples * sum(self.weights) // (self.weights[0] * self.batch_size))

    def num_drawn(self, steps: int) -> tuple[int, ...]:
        """Draws of every source in the first `steps` steps."""
        return tuple(self._counts(steps * self.batch_size))

    def draws(self, step: int) -> Draws:
        """The global batch of a step, ordered by source and then by draw; always full."""
        start, stop = self._counts(step * self.batch_size), self._counts((step + 1) * self.batch_size)
        return concatenate([self._source_draws(source, start[source], stop[source]) for source in range(len(self.orders))])

    def locate(self, source: int, epoch: int, sample: int) -> tuple[int, int]:
        """The (step, entry) at which a sample is drawn in an epoch of its source; exact inverse of draws."""
        order = self.cut_orders[source]
        step, entry = order.locate(0, epoch, sample)
        # Of a source, draw number (epoch N + position in the epoch), wherever the mixture's batches are cut.
        draw = epoch * order.num_samples + (step - epoch * order.steps_per_epoch) * order.batch_size + entry
        mixture_step = int(self._step_of(source, np.array([draw]))[0])
        start, stop = self._counts(mixture_step * self.batch_size), self._counts((mixture_step + 1) * self.batch_size)
        return mixture_step, sum(stop[:source]) - sum(start[:source]) + draw - start[source]

    def last_use(self, source: int, epoch: int, samples: IntArray) -> IntArray:
        """A step after which each sample is not drawn any more in an epoch of its source; less than two windows and a step late."""
        return self.horizon(source, epoch).last_use(samples)

    def horizon(self, source: int, epoch: int) -> Horizon:
        """Between which steps samples of an epoch of a source can be drawn."""
        order = self.cut_orders[source]
        return replace(order.horizon(0, epoch), step_of=lambda draw: self._step_of(source, epoch * order.num_samples + draw))

    def _step_of(self, source: int, draws: IntArray) -> IntArray:
        """The steps of a source's draws, counted through its epochs."""
        periods, rest = np.divmod(draws, self.weights[source])
        return (periods * len(self._table) + self._places[source][rest]) // self.batch_size

    @cached_property
    def _table(self) -> IntArray:
        return chairman_table(self.weights)

    @cached_property
    def _places(self) -> tuple[IntArray, ...]:
        """Of every source: its positions in a period."""
        return tuple(np.flatnonzero(self._table == source) for source in range(len(self.weights)))

    @cached_property
    def _prefix_counts(self) -> IntArray:
        """Draws of every source before each position of a period: int64 (D + 1, sources)."""
        drawn = self._table[:, None] == np.arange(len(self.weights))
        return np.concatenate([np.zeros((1, len(self.weights)), np.int64), np.cumsum(drawn, axis=0, dtype=np.int64)])

    def _counts(self, position: int) -> list[int]:
        """Draws of every source before a position of the endless mixture."""
        periods, rest = divmod(position, len(self._table))
        return [periods * weight + int(count) for weight, count in zip(self.weights, self._prefix_counts[rest], strict=True)]

    @cached_property
    def cut_orders(self) -> tuple[Order, ...]:
        """The orders of the sources as they are drawn from."""
        # A batch holds about B w / D samples of a source; were its order cut into larger batches, one batch of the mixture would
        # meet only some of the groups.
        period = sum(self.weights)
        shares = (-(-self.batch_size * weight // period) for weight in self.weights)
        return tuple(replace(order, batch_size=share) for order, share in zip(self.orders, shares, strict=True))

    def _source_draws(self, source: int, start: int, stop: int) -> Draws:
        """Draws number [start, stop) of a source: the c-th is of its epoch c // N."""
        order = self.cut_orders[source]
        parts = []
        while start < stop:
            epoch, position = divmod(start, order.num_samples)
            batch, entry = divmod(position, order.batch_size)
            drawn = order.draws(epoch * order.steps_per_epoch + batch)
            parts.append(take(drawn, slice(entry, entry + stop - start)))
            start += len(parts[-1].sample)
        joined = concatenate(parts)
        return replace(joined, source=np.full_like(joined.sample, source))


def take(draws: Draws, entries: slice) -> Draws:
    """Some entries of a batch."""
    return Draws(draws.source[entries], draws.epoch[entries], draws.sample[entries])


def concatenate(parts: list[Draws]) -> Draws:
    """Entries of several batches, one after the other."""
    empty = [np.zeros(0, np.int64)]
    return Draws(
        source=np.concatenate([part.source for part in parts] or empty),
        epoch=np.concatenate([part.epoch for part in parts] or empty),
        sample=np.concatenate([part.sample for part in parts] or empty),
    )

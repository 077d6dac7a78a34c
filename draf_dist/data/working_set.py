"""What a node that follows a plan holds of a release's shards at once, in blocks of bytes (docs/order.md, 8).

A block of a shard is fetched `ahead_steps` before the first step that draws one of its samples, and may go after the last use
(`horizon`) of all of them. A manifest says how many bytes and samples a shard has, not where each sample lies: samples of one shard
are taken as equally large, and a block to hold also what lies less than a block before or after it. Where sizes differ so much
that samples stray further, blocks open sooner here and later there: the sum stays the same but for chance, for which there is room.

Shards may differ in bytes per sample, and every epoch lays them in another order: which of them are open at once is chance too.
So all are first taken as alike, at the mean of their bytes per sample; to that comes by how much those that are open at once can
exceed the mean (`_excess`).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from draf_dist.data.horizon import Horizon
from draf_dist.data.order import Plan
from draf_dist.data.permutation import IntArray

# Where a source has more blocks, neighbours are looked at together, and where it has more steps, so are these: the bound gets
# looser, and takes seconds instead of minutes. So many pieces at a time keep the memory small.
MAX_PIECES = 2**21
MAX_TIMES = 2**18
PIECES_AT_ONCE = 2**16
# Sizes of samples are taken to scatter by their mean, and the sum of those that are open by at most so many standard deviations.
DEVIATIONS = 4
# What the shards that are open at once exceed at a moment with a probability of at most e to the minus this: one in 10^9.
CERTAINTY = 9 * math.log(10)
# t in `_excess`, times the largest excess of a part: where the least is looked for.
EXPONENTS = np.geomspace(0.01, 50, 48)


@dataclass(frozen=True)
class WorkingSet:
    """The most that is open at once, an upper bound. by_source: bytes of every source, each at its own worst moment."""

    bytes: int
    blocks: int
    by_source: tuple[int, ...]


@dataclass(frozen=True)
class Fetch:
    """So many bytes in so many blocks."""

    bytes: int
    blocks: int


@dataclass(frozen=True)
class _Pieces:
    """Runs of neighbouring blocks of one shard: the first and last step that can need one of them; how many; bytes, samples."""

    first: IntArray
    last: IntArray
    blocks: IntArray
    bytes: IntArray
    samples: IntArray


@dataclass(frozen=True)
class _Open:
    """The most blocks, bytes and samples that are open at once, each at its own worst moment."""

    blocks: int
    bytes: int
    samples: int


class _Curve:
    """How much is open at every step, found from when each piece opens and closes. ahead: steps by which all open earlier."""

    def __init__(self, num_steps: int, ahead: int) -> None:
        self._ahead, self._steps_at_once = ahead, -(-num_steps // MAX_TIMES)
        num_times = num_steps // self._steps_at_once + 2
        self._changes = np.zeros((3, num_times), np.int64)

    def add(self, pieces: _Pieces) -> None:
        """Counts pieces from their first to their last step."""
        opens = np.maximum(pieces.first - self._ahead, 0) // self._steps_at_once
        closes = pieces.last // self._steps_at_once + 1
        for change, weight in zip(self._changes, (pieces.blocks, pieces.bytes, pieces.samples), strict=True):
            np.add.at(change, opens, weight)
            np.subtract.at(change, closes, weight)

    def peak(self) -> _Open:
        """The most of each."""
        return _Open(*np.cumsum(self._changes, axis=1).max(axis=1).tolist())


def working_set(plan: Plan, shard_bytes: Sequence[Sequence[int]], *, block_bytes: int, ahead_steps: int) -> int:
    """Upper bound of the bytes of blocks that are open at once, in bytes; see `open_blocks`."""
    return open_blocks(plan, shard_bytes, block_bytes=block_bytes, ahead_steps=ahead_steps).bytes


def open_blocks(plan: Plan, shard_bytes: Sequence[Sequence[int]], *, block_bytes: int, ahead_steps: int) -> WorkingSet:
    """The working set of a plan, whole: of a node that reads for all ranks.

    Found from the steps of the first two epochs of every source: others only lay the same shards in another order.

    Args:
        plan: what is followed.
        shard_bytes: for every source the size of each shard, in manifest order.
        block_bytes: what is fetched at once; a shard's last block is shorter.
        ahead_steps: how many steps before its use a block is fetched.
    """
    found = [
        _source_peak(plan, source, np.array(sizes, np.int64), block_bytes, ahead_steps) for source, sizes in enumerate(shard_bytes)
    ]
    return WorkingSet(sum(peak.bytes for peak in found), sum(peak.blocks for peak in found), tuple(peak.bytes for peak in found))


def epoch_fetch(shard_sizes: Sequence[int], shard_bytes: Sequence[int], block_bytes: int) -> Fetch:
    """What an epoch of a source fetches if every block is fetched once; shards without samples are never read."""
    sizes = np.array(shard_bytes, np.int64)[np.array(shard_sizes) > 0]
    return Fetch(int(sizes.sum()), int(_num_blocks(sizes, block_bytes).sum()))


def step_fetch(plan: Plan, shard_bytes: Sequence[Sequence[int]], *, block_bytes: int, step: int = 0) -> Fetch:
    """What a step needs of an empty cache: about, as samples of a shard are taken as equally large."""
    draws = plan.draws(step)
    total = Fetch(0, 0)
    for source, sizes in enumerate(shard_bytes):
        line = plan.horizon(source, 0).line
        samples = np.unique(draws.sample[draws.source == source])
        shard = np.searchsorted(line.manifest_ends, samples, side="right")
        place = line.place[shard]
        row, num_samples = samples - line.manifest_starts[place], (line.ends - line.starts)[place]
        size = np.array(sizes, np.int64)[shard]
        first, stop = row * size // num_samples // block_bytes, _num_blocks((row + 1) * size // num_samples, block_bytes)
        # Where two neighbours share a block it is the second one's that counts.
        shared = np.concatenate([[False], (shard[1:] == shard[:-1]) & (first[1:] < stop[:-1])])
        first = np.where(shared, np.concatenate([[0], stop[:-1]]), first)
        needed = np.minimum(stop * block_bytes, size) - np.minimum(first * block_bytes, size)
        total = Fetch(total.bytes + int(needed.sum()), total.blocks + int((stop - first).sum()))
    return total


def _source_peak(plan: Plan, source: int, shard_bytes: IntArray, block_bytes: int, ahead_steps: int) -> Fetch:
    horizons = [plan.horizon(source, epoch) for epoch in range(2)]
    num_samples = np.diff(horizons[0].line.manifest_ends, prepend=0)
    whole = epoch_fetch(num_samples.tolist(), shard_bytes.tolist(), block_bytes)
    # Of a source of weight w, any n positions hold less than 2 more than n w / D; from the start they hold at most 1 less.
    most_ahead = min(plan.num_drawn(ahead_steps)[source] + 3, ahead_steps * plan.batch_size)
    most_a_step = min(plan.num_drawn(1)[source] + 3, plan.batch_size)
    if most_ahead + 2 * most_a_step >= num_samples.sum():
        # More than two epochs may be open at once.
        return whole
    # Either all that may be drawn ahead is there, or each draw ahead has brought the blocks of one sample.
    num_steps = int(horizons[1].step_of(num_samples.sum(keepdims=True) - 1)[0]) + 1
    curves = [_Curve(num_steps, ahead_steps), _Curve(num_steps, 0)]
    alike = np.ceil(num_samples * (whole.bytes / num_samples.sum())).astype(np.int64)
    for horizon in horizons:
        for pieces in _pieces(horizon, alike, block_bytes):
            for curve in curves:
                curve.add(pieces)
    ahead, now = (curve.peak() for curve in curves)
    more = most_ahead * _blocks_of_a_sample(num_samples, shard_bytes, block_bytes)
    num_groups = len(horizons[0].groups.window)
    release = _Shares(num_samples[num_samples > 0], shard_bytes[num_samples > 0])
    ends = 4 * num_groups * release.longer_ends(block_bytes)
    size = min(
        ahead.bytes + _excess(release, ahead.samples, num_groups),
        now.bytes + _excess(release, now.samples, num_groups) + more * block_bytes,
    )
    size += ends + _chance(size, release.scatter_bytes, block_bytes * num_groups)
    # Of a shard, all blocks but the last are whole.
    blocks = min(ahead.blocks, now.blocks + more) - (-(size - min(ahead.bytes, now.bytes)) // block_bytes)
    return Fetch(min(size, whole.bytes), min(blocks, whole.blocks))


@dataclass(frozen=True)
class _Shares:
    """Shards with samples. num_samples, bytes: int64 (n,)."""

    num_samples: IntArray
    bytes: IntArray

    @property
    def scatter_bytes(self) -> float:
        """Mean square over mean of the bytes of a sample, if all of a shard are equally large."""
        return float((self.bytes * (self.bytes / self.num_samples)).sum() / self.bytes.sum())

    def longer_ends(self, block_bytes: int) -> int:
        """By how much the blocks at an end of what a group holds, and their slack, may be longer than those of the mean shard."""
        most = 2 * block_bytes
        return max(0, min(most, int(self.bytes.max())) - min(most, int(self.bytes.mean())))


def _excess(release: _Shares, num_open: int, num_groups: int) -> int:
    """The most bytes by which samples that are open may exceed as many of the mean size: neighbours in each group.

    Whatever the order, it is no more than that of the largest samples. An order that is drawn hardly ever meets that: the sum over
    m parts of shards drawn without replacement, a of them above the mean, exceeds x with a probability of at most
    exp(m log mean(exp(t a)) - t x) for any t > 0 (Chernoff; Hoeffding 1963, section 6).
    """
    mean = release.bytes.sum() / release.num_samples.sum()
    above = release.bytes / release.num_samples - mean
    order = np.argsort(-above)
    num_samples = release.num_samples[order]
    taken = np.clip(num_open - (np.cumsum(num_samples) - num_samples), 0, num_samples)
    most = float((taken * above[order]).sum())
    if most < 1:
        return 0
    # Of a shard no more is open together than of a group.
    part = np.minimum(release.num_samples, -(-num_open // num_groups))
    parts, excess = release.num_samples / part, part * above
    num_parts, largest = parts.sum() * min(num_open / num_samples.sum(), 1.0), float(excess.max())
    parts /= parts.sum()
    rare = min((CERTAINTY + num_parts * math.log(parts @ np.exp(t * excess / largest))) / t * largest for t in EXPONENTS)
    return int(min(most, rare))


def _chance(size: int, sample_bytes: float, group_slack_bytes: int) -> int:
    """What samples of such a scatter may have more together, beyond the slack at both ends of what every group holds."""
    return max(0, int(DEVIATIONS * (size * sample_bytes) ** 0.5) - 2 * group_slack_bytes)


def _blocks_of_a_sample(num_samples: IntArray, shard_bytes: IntArray, block_bytes: int) -> int:
    """The most blocks that one sample lies in, if all of a shard are equally large."""
    kept = num_samples > 0
    return 1 + int(_num_blocks(shard_bytes[kept] // num_samples[kept] + 1, block_bytes).max())


def _pieces(horizon: Horizon, shard_bytes: IntArray, block_bytes: int) -> Iterator[_Pieces]:
    """All pieces of the line, some shards at a time."""
    line, groups = horizon.line, horizon.groups
    kept = line.ends > line.starts
    shards = _Shards(line.starts[kept], (line.ends - line.starts)[kept], shard_bytes[line.shard[kept]])
    blocks = _num_blocks(shards.bytes, block_bytes)
    together = np.full(len(blocks), -(-int(blocks.sum()) // MAX_PIECES))
    # A piece that two groups share stays open all epoch: there a piece is one block.
    together[groups.of(shards.starts) != groups.of(shards.starts + shards.num_samples - 1)] = 1
    num_pieces = -(-blocks // together)
    part = np.cumsum(num_pieces) // PIECES_AT_ONCE
    cuts = [0, *(np.flatnonzero(np.diff(part)) + 1).tolist(), len(blocks)]
    for start, stop in pairwise(cuts):
        shard = np.repeat(np.arange(start, stop), num_pieces[start:stop])
        number = np.arange(len(shard)) - np.repeat(
            np.cumsum(num_pieces[start:stop]) - num_pieces[start:stop], num_pieces[start:stop]
        )
        first = number * together[shard]
        yield _cut(horizon, shards.at(shard), first, np.minimum(first + together[shard], blocks[shard]), block_bytes)


@dataclass(frozen=True)
class _Shards:
    """starts: along the line; int64 (n,) each."""

    starts: IntArray
    num_samples: IntArray
    bytes: IntArray

    def at(self, index: IntArray) -> "_Shards":
        return _Shards(self.starts[index], self.num_samples[index], self.bytes[index])


def _cut(horizon: Horizon, shards: _Shards, first: IntArray, stop: IntArray, block_bytes: int) -> _Pieces:
    """Of each shard the piece of blocks [first, stop)."""
    start_byte, stop_byte = first * block_bytes, np.minimum(stop * block_bytes, shards.bytes)
    # The slack of a block at either end.
    before, behind = np.maximum(start_byte - block_bytes, 0), np.minimum(stop_byte + block_bytes, shards.bytes)
    first_sample = before * shards.num_samples // shards.bytes
    last_sample = -(-behind * shards.num_samples // shards.bytes) - 1
    opens, closes = _span(horizon, shards.starts + first_sample, shards.starts + last_sample)
    num_before = [edge * shards.num_samples // shards.bytes for edge in (start_byte, stop_byte)]
    return _Pieces(opens, closes, stop - first, stop_byte - start_byte, num_before[1] - num_before[0])


def _span(horizon: Horizon, first: IntArray, last: IntArray) -> tuple[IntArray, IntArray]:
    """The first and the last step that can draw one of the samples between two positions of the line."""
    groups = horizon.groups
    start, stop = horizon.span(first)[0], horizon.span(last)[1]
    # One group ends with the epoch, the next begins with it.
    several = groups.of(first) != groups.of(last)
    whole = horizon.step_of(np.array([0, groups.num_samples - 1]))
    return np.where(several, whole[0], start), np.where(several, whole[1], stop)


def _num_blocks(size: IntArray, block_bytes: int) -> IntArray:
    return -(-size // block_bytes)

"""Blocks of shards for a node cache: what each holds, where it comes from, what of it lies on the disk."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence

from draf_dist.data.node_cache import Block, BlockKey, Lease, NodeCache

SIZE = 1000
JOB = "plan-of-release-a"


def key(number: int) -> BlockKey:
    """The blocks of two shards in turn."""
    return f"{number % 2:064x}", number // 2


def content(block: BlockKey, size: int = SIZE) -> bytes:
    """What belongs into a block; no two blocks are alike."""
    return (hashlib.sha256(f"{block}".encode()).digest() * (size // 32 + 1))[:size]


class Origin:
    """Where blocks come from; remembers what was asked of it."""

    def __init__(self, sizes: dict[BlockKey, int] | None = None) -> None:
        self.sizes, self.calls = sizes or {}, list[list[BlockKey]]()

    def __call__(self, keys: Sequence[BlockKey]) -> list[bytes]:
        self.calls.append(list(keys))
        return [content(block, self.sizes.get(block, SIZE)) for block in keys]

    @property
    def counts(self) -> Counter[BlockKey]:
        return Counter(block for call in self.calls for block in call)


def lying(cache: NodeCache) -> dict[BlockKey, int]:
    """What lies on the disk, whatever the index says."""
    files = (path for path in (cache.folder / "blocks").rglob("*") if path.is_file())
    return {(path.name[:64], int(path.name[65:])): path.stat().st_size for path in files}


def get(lease: Lease, origin: Callable[[Sequence[BlockKey]], Sequence[bytes]], numbers: Sequence[int], until: int) -> list[Block]:
    return lease.get([key(number) for number in numbers], [until] * len(numbers), origin)

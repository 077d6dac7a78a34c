"""What a loader did, in numbers that add up over passes and ranks."""

from collections.abc import Iterable
from dataclasses import astuple, dataclass

from draf_dist.data.bad_data import BadDataDesk
from draf_dist.data.node_cache import CacheStats
from draf_dist.storage import Store


@dataclass(frozen=True)
class LoaderStats:
    """Counts since a loader was made, of what that loader did.

    Blocks found in the cache of the node and fetched into it; requests to the stores, bytes read from them (or from shards on a
    disk), requests made again; members read, and those of them that were left out; samples of which nothing was left.
    """

    cache_hits: int = 0
    cache_misses: int = 0
    requests: int = 0
    read_bytes: int = 0
    retries: int = 0
    members: int = 0
    left_out: int = 0
    lost_samples: int = 0

    def __add__(self, other: "LoaderStats") -> "LoaderStats":
        return LoaderStats(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: "LoaderStats") -> "LoaderStats":
        return LoaderStats(*(one - two for one, two in zip(astuple(self), astuple(other), strict=True)))

    @property
    def hit_rate(self) -> float | None:
        """The share of blocks that were in the cache; None where nothing is fetched."""
        asked = self.cache_hits + self.cache_misses
        return self.cache_hits / asked if asked else None


def of_cache(stats: CacheStats) -> LoaderStats:
    """What a lease counted. A block that another thread or process was fetching was there without a request of ours."""
    return LoaderStats(cache_hits=stats.hits + stats.waited, cache_misses=stats.misses)


def of_desk(desk: BadDataDesk) -> LoaderStats:
    """What decoding counted."""
    return LoaderStats(read_bytes=desk.local_bytes, members=desk.num_read, left_out=desk.num_left_out, lost_samples=desk.num_lost)


def of_stores(stores: Iterable[Store]) -> LoaderStats:
    """What the stores counted since they were opened."""
    counts = [store.traffic.snapshot() for store in stores]
    return LoaderStats(
        requests=sum(count.requests for count in counts),
        read_bytes=sum(count.bytes_read for count in counts),
        retries=sum(count.retries for count in counts),
    )

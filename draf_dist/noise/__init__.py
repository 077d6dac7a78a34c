"""Random numbers without a state: pure functions of integers, the same bits on any device, rank, batch and chunk."""

from draf_dist.noise.draws import bernoulli, normal, uniform
from draf_dist.noise.hashing import chain, chain_np, hash64, hash64_np, sample_keys

__all__ = ["bernoulli", "chain", "chain_np", "hash64", "hash64_np", "normal", "sample_keys", "uniform"]

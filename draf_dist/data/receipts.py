"""Receipts: proof of what was read, in a form in which parts add up."""

from draf_dist.data.permutation import IntArray
from draf_dist.noise import hash64_np
from draf_dist.schema.release import Receipt

MODULUS = 1 << 64


def receipt(uids: IntArray) -> Receipt:
    """Number of samples and sum of hash64(0, uid) modulo 2**64; padding (uid -1) does not count."""
    real = uids[uids >= 0]
    # numpy sums int64 modulo 2**64.
    return _receipt(len(real), int(hash64_np(0, real).sum()))


def add_receipts(first: Receipt, second: Receipt) -> Receipt:
    """The receipt of both together."""
    return _receipt(first.count + second.count, int(first.uid_sum, 16) + int(second.uid_sum, 16))


def _receipt(count: int, uid_sum: int) -> Receipt:
    return Receipt(count=count, uid_sum=f"{uid_sum % MODULUS:016x}")

"""What a release stores beside its shards: manifest, statistics, receipts."""

from typing import Literal

from pydantic import Field

from draf_dist.schema.modality import Record

Split = Literal["train", "val", "test", "ood"]
SPLITS: tuple[Split, ...] = ("train", "val", "test", "ood")


class Receipt(Record):
    """What was read: the number of samples and an order-independent hash of their uids.

    uid_sum is the sum over samples of hash64(key=0, uid) modulo 2**64, as 16 hex digits, so that receipts of parts add up to
    that of the whole.
    """

    count: int = Field(ge=0)
    uid_sum: str = Field(pattern=r"^[0-9a-f]{16}$")


class ShardRecord(Record):
    """One tar and its index, both stored under their sha256."""

    split: Split
    sha256: str
    size_bytes: int
    index_sha256: str
    num_samples: int


class VariableStats(Record):
    """Mean and standard deviation over what is observed in the training split; (0, 1) for binary or never observed."""

    mean: float
    std: float
    num_observed: int


class ImageStats(Record):
    """Mean and standard deviation of the pixels (0..255) of the training split."""

    mean: float
    std: float
    num_images: int


class ReleaseStats(Record):
    """stats.json: what normalisation needs; a trained model carries its own copy."""

    images: dict[str, ImageStats]
    variables: dict[str, tuple[VariableStats, ...]]


class ReleaseManifest(Record):
    """release.json, written last. counts: site -> split -> {"studies": n, "<modality>": n present}."""

    version: str
    name: str
    parent: str | None = None
    schema_sha256: str
    stats_sha256: str
    subjects_sha256: str
    card_sha256: str
    counts: dict[str, dict[str, dict[str, int]]]
    quarantined: dict[str, int]
    receipts: dict[Split, Receipt]
    shards: tuple[ShardRecord, ...]

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


class QuarantinedStudy(Record):
    """One study that could not be used: a file and row, never a subject."""

    site: str
    where: str
    reason: str


class Quarantine(Record):
    """quarantine.json: what was left out, and values taken for not observed because their variable's range excludes them.

    limit is the share of studies that may be quarantined. out_of_range: "<modality>.<variable>" -> values.
    """

    num_studies: int = Field(ge=0)
    limit: float = Field(ge=0, le=1)
    reasons: dict[str, int]
    studies: tuple[QuarantinedStudy, ...]
    out_of_range: dict[str, int]


class Head(Record):
    """HEAD.json: the newest release of a data set, the only object that changes."""

    version: str


class ReleaseManifest(Record):
    """release.json, written last. counts: site -> split -> {"studies": n, "<modality>": n present}.

    version is the first 16 hex digits of the sha256 of everything else here but the parent. subject_key_check names the key
    that the subjects were hashed with, without giving it away; studies of held_out_sites are in split `ood` only.
    """

    version: str
    name: str
    parent: str | None = None
    schema_sha256: str
    stats_sha256: str
    subjects_sha256: str
    quarantine_sha256: str
    card_sha256: str
    subject_key_check: str
    held_out_sites: tuple[str, ...] = ()
    counts: dict[str, dict[str, dict[str, int]]]
    quarantined: dict[str, int]
    receipts: dict[Split, Receipt]
    shards: tuple[ShardRecord, ...]

"""What a release stores beside its shards: manifest, statistics, receipts."""

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from draf_dist.schema.record import Record

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
    """One tar and its index, both stored under their sha256.

    url: where a tar lies that is not the release's own (`draf prepare --from-webdataset`): a path, absolute or from the folder of
    the data set, or s3://bucket/key. Such a tar is only pointed to, may hold samples of other splits too, and has another index for
    each; num_samples is what the index lists.
    """

    split: Split
    sha256: str
    size_bytes: int
    index_sha256: str
    num_samples: int
    url: str | None = None

    @model_serializer(mode="wrap")
    def _without_url_of_own_shards(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Or every release without foreign tars had another version than before there were any.
        plain: dict[str, Any] = handler(self)
        return {name: value for name, value in plain.items() if value is not None or name != "url"}


class VariableStats(Record):
    """Mean and standard deviation over what is observed in the training split; (0, 1) unless numeric and ever observed.

    categories: of a categorical variable, how often each category is observed there.
    """

    mean: float
    std: float
    num_observed: int
    # Left out of what is stored where empty, as below, or every older release had another version.
    categories: tuple[int, ...] = Field((), exclude_if=lambda categories: categories == ())


class ImageStats(Record):
    """Mean and standard deviation of the pixels (0..255), or of the voxels of a volume, of the training split."""

    mean: float
    std: float
    num_images: int


class ReleaseStats(Record):
    """stats.json: what normalisation needs; a trained model carries its own copy."""

    images: dict[str, ImageStats]
    variables: dict[str, tuple[VariableStats, ...]]


class ImageSums(Record):
    """Sums over pixels or voxels of the training split, whole numbers: what ImageStats follow from.

    Those of float16 volumes count in steps of 2**-24, of which every float16 is a multiple.
    """

    num_images: int = Field(ge=0)
    num_pixels: int = Field(ge=0)
    total: int
    total_squares: int = Field(ge=0)


class VariableSums(Record):
    """Of one modality, per variable: values observed, their mean, the sum of their squared deviations from it.

    categories: by categorical variable, in their order, how often each category is observed.
    """

    count: tuple[int, ...]
    mean: tuple[float, ...]
    squares: tuple[float, ...]
    categories: tuple[tuple[int, ...], ...] = Field((), exclude_if=lambda categories: categories == ())


class TrainingSums(Record):
    """sums.json: what stats.json follows from, so that a later delivery goes on exactly where this release ended.

    stats.json alone would not do: of a constant variable it says deviation 1, of a binary one nothing but the count.
    """

    images: dict[str, ImageSums]
    variables: dict[str, VariableSums]


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


class DeliveryRecord(Record):
    """One delivery that a release took in. sha256: of the canonical JSON of its delivery.json.

    num_studies: added by it. num_duplicates: that were there already, with the same content. num_quarantined: left out.
    """

    delivery_id: str
    sha256: str
    card_sha256: str
    num_studies: int = Field(ge=0)
    num_duplicates: int = Field(ge=0)
    num_quarantined: int = Field(ge=0)


# Fields of a manifest that only a release with deliveries has. Left out where empty, or every older release had another version.
LATER_FIELDS = ("deliveries", "sums_sha256")


class ReleaseManifest(Record):
    """release.json, written last. counts: site -> split -> {"studies": n, "<modality>": n present}; of masks, by the label's name.

    version is the first 16 hex digits of the sha256 of everything else here but the parent. subject_key_check names the key
    that the subjects were hashed with, without giving it away; studies of held_out_sites are in split `ood` only.
    deliveries: in the order in which they were taken in; with one or more, the first shards are those of the parent.
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
    sums_sha256: str | None = None
    deliveries: tuple[DeliveryRecord, ...] = ()

    @model_serializer(mode="wrap")
    def _without_empty_later_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        plain: dict[str, Any] = handler(self)
        return {name: value for name, value in plain.items() if value or name not in LATER_FIELDS}

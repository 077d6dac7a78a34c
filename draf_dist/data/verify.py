"""Recomputes everything that a release says of itself: `draf release verify`."""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from draf_dist.data.decode import UndecodableError, decode_study
from draf_dist.data.descent import broken, check_descent, leak
from draf_dist.data.foreign_verify import read_foreign
from draf_dist.data.masks import mask_problem
from draf_dist.data.patches import check_mask_grid
from draf_dist.data.receipts import receipt
from draf_dist.data.release import SUBJECTS_SCHEMA, Release, index_path, tar_path
from draf_dist.data.shards import META, READ_BLOCK_BYTES, Member, ShardIndex, extension, index_tar, sha256_of
from draf_dist.data.splits import component_of
from draf_dist.data.stats import StatsBuilder, decode_member
from draf_dist.data.volumes import read_whole
from draf_dist.data.volumes_check import check_volume
from draf_dist.schema.identity import uid_name
from draf_dist.schema.label import SegmentationSpec
from draf_dist.schema.label_text import read_label
from draf_dist.schema.modality import DataSchema, ImageSpec, VolumeSpec
from draf_dist.schema.release import SPLITS, ShardRecord, Split
from draf_dist.schema.study import MaskLabel, StudyLabel
from draf_dist.schema.volume import VolumePointer
from draf_dist.storage import MissingError, room_on


@dataclass(frozen=True)
class VerifyReport:
    """What was found to be whole."""

    version: str
    num_shards: int
    num_samples: int
    num_members: int
    num_subjects: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Study:
    subject: str
    site: str
    split: Split
    label: str


def verify(release: Release, on_progress: Callable[[int, int], None] = lambda done, total: None) -> VerifyReport:
    """Reads every byte of the release; memory holds one record a study and one sample at a time.

    on_progress is called with (samples checked, all samples).

    Raises:
        DataError: names the first file, member or rule that is broken.
        UnreachableError: the store does not answer, or refuses the credentials.
        StorageFullError: a remote shard does not fit on the temporary disk.
    """
    studies = _studies(release)
    release.quarantine()
    check_descent(release)
    contents = _Contents(release, studies)
    total = sum(shard.num_samples for shard in release.manifest.shards)
    foreign = _by_tar(release)
    # In manifest order: sums of values depend on it in their last bits.
    for shard in release.manifest.shards:
        if shard.url is None:
            with _local_tar(release, shard) as path:
                contents.check_shard(shard, path)
        elif shards := foreign.pop(shard.url, ()):
            contents.check_foreign(shards)
        on_progress(contents.num_samples, total)
    contents.check_totals()
    # A foreign tar may be a shard of several splits.
    tars = {shard.sha256: shard.size_bytes for shard in release.manifest.shards}
    return VerifyReport(
        version=release.version,
        num_shards=len(release.manifest.shards),
        num_samples=contents.num_samples,
        num_members=contents.num_members,
        num_subjects=len({study.subject for study in studies.values()}),
        size_bytes=sum(tars.values()) + contents.volume_bytes,
    )


def _by_tar(release: Release) -> dict[str, list[ShardRecord]]:
    """The shards that point to each foreign tar: it is read once for all of them."""
    found: dict[str, list[ShardRecord]] = {}
    for shard in release.manifest.shards:
        if shard.url is not None:
            found.setdefault(shard.url, []).append(shard)
    return found


def _studies(release: Release) -> dict[int, _Study]:
    """subjects.parquet by uid, after the checks of which subject may be in which split."""
    table = release.subjects()
    where = f"{release.pinned_url}: subjects.parquet"
    if not table.schema.equals(SUBJECTS_SCHEMA):
        raise broken(where, f"columns {SUBJECTS_SCHEMA.names}", f"{table.schema.names}")
    studies: dict[int, _Study] = {}
    split_of: dict[str, str] = {}
    held_out: dict[str, bool] = {}
    for row in table.to_pylist():
        if row["uid"] in studies:
            raise broken(where, "every study once", f"{uid_name(row['uid'])} twice")
        if row["component"] != component_of(row["subject"]) or split_of.setdefault(row["component"], row["split"]) != row["split"]:
            found = f"the subject of study {uid_name(row['uid'])} also in another"
            raise leak(where, "every subject in one split", found)
        held_out[row["component"]] = held_out.get(row["component"], False) or row["site"] in release.manifest.held_out_sites
        studies[row["uid"]] = _Study(row["subject"], row["site"], row["split"], row["label"])
    for uid, study in studies.items():
        if (study.split == "ood") != held_out[component_of(study.subject)]:
            expected = "subjects of held-out sites, and no others, in ood"
            found = f"study {uid_name(uid)} of site {study.site} in {study.split}"
            raise leak(where, expected, found)
    return studies


@contextmanager
def _local_tar(release: Release, shard: ShardRecord) -> Iterator[Path]:
    """The tar as a local file: a remote one is copied block by block to a temporary file."""
    store, where = release.store, release.store.where(tar_path(shard))
    try:
        size = store.size(tar_path(shard))
        if size is None:
            raise broken(where, f"a shard of {shard.num_samples} samples", "nothing")
        if (local := store.local_path(tar_path(shard))) is not None:
            yield local
            return
        with tempfile.TemporaryDirectory(prefix="draf-verify-") as name, room_on(Path(name)):
            copy = Path(name) / f"{shard.sha256}.tar"
            with copy.open("wb") as file:
                for start in range(0, size, READ_BLOCK_BYTES):
                    file.write(store.read_range(tar_path(shard), start, min(start + READ_BLOCK_BYTES, size)))
            yield copy
    except MissingError as error:
        raise broken(where, "a shard", "nothing") from error


class _Contents:
    """Reads the shards one after the other and sums up what they hold, to be held against the manifest."""

    def __init__(self, release: Release, studies: dict[int, _Study]) -> None:
        self.num_members = 0
        self._release, self._studies = release, studies
        self._stats = StatsBuilder(release.schema)
        self._uids: dict[Split, list[int]] = {split: [] for split in SPLITS}
        self._counts: Counter[tuple[str, Split, str]] = Counter()
        # Digest of a stored image -> the study in which it was first seen.
        self._images: dict[bytes, int] = {}
        # Digest of a volume that was found to be whole -> its bytes.
        self._volumes: dict[str, int] = {}
        # Of masks whose values are structures of the schema.
        self._masks: set[str] = set()

    @property
    def num_samples(self) -> int:
        """Samples read so far."""
        return sum(len(uids) for uids in self._uids.values())

    def check_shard(self, shard: ShardRecord, path: Path) -> None:
        """Members first, so that what is broken has a name; then the file as a whole."""
        index = self._release.index(shard)
        where = self._release.store.where(tar_path(shard))
        if index.num_samples != shard.num_samples:
            raise broken(self._release.store.where(index_path(shard)), f"{shard.num_samples} samples", f"{index.num_samples}")
        with path.open("rb") as file:
            for i in range(index.num_samples):
                self._check_sample(shard, index, i, file, where)
        size, digest = path.stat().st_size, sha256_of(path)
        if size != shard.size_bytes or digest != shard.sha256:
            expected = f"{shard.size_bytes} bytes with sha256 {shard.sha256[:16]}..."
            raise broken(
                where, expected, f"{size} bytes with sha256 {digest[:16]}... (no member is damaged, but what lies between is)"
            )
        actual = index_tar(path, self._release.schema)
        if not (np.array_equal(actual.uids, index.uids) and np.array_equal(actual.members, index.members)):
            raise broken(where, "the members that its index names", "others")

    def check_foreign(self, shards: Sequence[ShardRecord]) -> None:
        """All shards that point to one tar that is not ours."""
        schema, where = self._release.schema, self._release.where_tar(shards[0])
        for sample in read_foreign(self._release, shards):
            stem = f"{where}: {uid_name(sample.uid)}"
            site, label = schema.sites[sample.site], schema.classes[sample.label]
            self._check_row(sample.uid, _Study("", site, sample.shard.split, label), stem)
            self._check_inputs(sample.shard, sample.uid, sample.members, stem)

    def _check_sample(self, shard: ShardRecord, index: ShardIndex, i: int, file: BinaryIO, where: str) -> None:
        uid = int(index.uids[i])
        stem = f"{where}: {uid_name(uid)}"
        label = self._check_meta(shard, uid, _read(f"{stem}.{META}", index.meta(i), file), f"{stem}.{META}")
        members = {spec.name: (index.member(i, spec.name), extension(spec)) for spec in self._release.schema.stored}
        found = {name: _read(f"{stem}.{suffix}", member, file) for name, (member, suffix) in members.items() if member is not None}
        if (spec := self._release.schema.mask) is not None and (label == MaskLabel(drawn=True)) != (spec.name in found):
            raise broken(f"{stem}.{META}", "a mask where the label says so, and nowhere else", "the contrary")
        self._check_inputs(shard, uid, found, stem)
        self.num_members += 1

    def _check_inputs(self, shard: ShardRecord, uid: int, members: Mapping[str, bytes], stem: str) -> None:
        """Decodes a sample and counts it. members: modality -> its bytes."""
        inputs = {}
        for spec in self._release.schema.modalities:
            if (data := members.get(spec.name)) is None:
                continue
            place = f"{stem}.{extension(spec)}"
            try:
                inputs[spec.name] = decode_member(data, spec)
            except UndecodableError as error:
                raise broken(place, f"the {spec.kind} of schema.json", str(error)) from error
            if isinstance(spec, ImageSpec | VolumeSpec):
                self._check_owner(place, data, uid)
            if isinstance(spec, VolumeSpec):
                self._check_volume(decode_member(data, spec))
        if shard.split == "train":
            self._stats.add(inputs)
        masks = self._check_mask(members, stem)
        self._uids[shard.split].append(uid)
        self._counts.update((self._studies[uid].site, shard.split, name) for name in ("studies", *inputs, *masks))
        self.num_members += len(inputs) + len(masks)

    def _check_mask(self, members: Mapping[str, bytes], stem: str) -> tuple[str, ...]:
        """The mask of a sample, if there is one, down to its voxels; as what it counts. Equal ones of two subjects are no leak."""
        schema = self._release.schema
        if (spec := schema.mask) is None or spec.name not in members:
            return ()
        assert isinstance(schema.label, SegmentationSpec)  # or there were no spec
        place = f"{stem}.{extension(spec)}"
        image = next(one for one in schema.modalities if one.name == schema.label.modality)
        if image.name not in members:
            raise broken(place, f"a mask beside its {image.name}", f"no {image.name}")
        assert isinstance(image, VolumeSpec)
        try:
            pointer = decode_member(members[spec.name], spec)
            check_mask_grid(pointer, decode_member(members[image.name], image))
        except UndecodableError as error:
            raise broken(place, "a mask as schema.json describes it", str(error)) from error
        self._check_volume(pointer)
        if pointer.digest not in self._masks:
            self._masks.add(pointer.digest)
            if problem := mask_problem(read_whole(self._release.store, pointer), schema.num_outputs):
                raise broken(place, "the structures of schema.json", problem)
        return (spec.name,)

    def _check_meta(self, shard: ShardRecord, uid: int, data: bytes, where: str) -> StudyLabel:
        """The label that the json says."""
        schema = self._release.schema
        try:
            meta = decode_study(data)
        except UndecodableError as error:
            raise broken(where, "the json of a sample", str(error)) from error
        label = _label(schema, meta.label)
        if meta.uid != uid or meta.site not in schema.sites or label is None:
            raise broken(where, "its uid, and a site and label of schema.json", "others")
        self._check_row(uid, _Study(meta.subject, meta.site, shard.split, meta.label), where)
        return label

    def _check_row(self, uid: int, study: _Study, where: str) -> None:
        """Against its row in subjects.parquet; a subject that nothing beside it names is not compared."""
        row = self._studies.get(uid)
        if row is None:
            raise broken(where, "a row in subjects.parquet", "none")
        if row != (study if study.subject else replace(study, subject=row.subject)):
            raise broken(where, f"the subject, site, label and split {study.split} of its row in subjects.parquet", "others")

    def _check_owner(self, where: str, data: bytes, uid: int) -> None:
        first = self._images.setdefault(hashlib.sha256(data).digest()[:16], uid)
        if self._studies[first].subject != self._studies[uid].subject:
            found = f"the image of study {uid_name(first)} (split {self._studies[first].split})"
            raise leak(where, "an image that belongs to one subject", found)

    def _check_volume(self, pointer: VolumePointer) -> None:
        # Several studies of a subject may share one.
        if pointer.digest not in self._volumes:
            self._volumes[pointer.digest] = check_volume(self._release.store, pointer)

    @property
    def volume_bytes(self) -> int:
        """Of all volumes that were checked, as they are stored."""
        return sum(self._volumes.values())

    def check_totals(self) -> None:
        """What all shards together must add up to."""
        manifest, where = self._release.manifest, self._release.pinned_url
        uids = {uid for split in SPLITS for uid in self._uids[split]}
        if not len(uids) == self.num_samples == len(self._studies):
            raise broken(where, f"{len(self._studies)} studies, each once", f"{self.num_samples} samples of {len(uids)} studies")
        for split in SPLITS:
            if manifest.receipts[split] != receipt(np.array(self._uids[split], dtype=np.int64)):
                raise broken(where, f"the receipt of {split} in release.json", "other studies in its shards")
        stated = {
            (s, d, n): c for s, splits in manifest.counts.items() for d, names in splits.items() for n, c in names.items() if c
        }
        if stated != dict(self._counts):
            raise broken(where, "the counts of release.json", "others in its shards")
        if self._stats.result() != self._release.stats:
            raise broken(where, "stats.json to be the statistics of the training split", "others")
        if self._release.sums() not in (None, self._stats.sums()):
            raise broken(where, "sums.json to be the sums of the training split", "others")


def _label(schema: DataSchema, text: str) -> StudyLabel | None:
    """None where the text is no label of the schema."""
    try:
        return read_label(schema.label, text)
    except ValueError:
        return None


def _read(where: str, member: Member, file: BinaryIO) -> bytes:
    """The bytes of a member, as its index has them."""
    file.seek(member.offset)
    data = file.read(member.size)
    if len(data) != member.size:
        raise broken(where, f"{member.size} bytes", f"{len(data)}: the shard is cut short")
    if not member.matches(data):
        raise broken(where, f"{member.size} bytes with crc32 {member.crc32:08x}", "other bytes")
    return data

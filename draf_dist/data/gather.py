"""One pass over a source: fit studies encoded into a spool on local disk, the others into quarantine, leaks refused."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from draf_dist.data.encode import EncodedStudy, UnfitError, all_bounds, encode_study
from draf_dist.data.in_order import in_order
from draf_dist.data.shards import META, SampleMeta, encode_meta, extension
from draf_dist.errors import DataError, explain, together
from draf_dist.schema.identity import study_uid, subject_pseudonym, uid_name
from draf_dist.schema.label_text import label_text, stratum
from draf_dist.schema.modality import ImageSpec, VolumeSpec
from draf_dist.schema.release import Quarantine, QuarantinedStudy
from draf_dist.schema.study import Rejection, Study
from draf_dist.sources.base import Source

# done, total (None while it is not known)
Progress = Callable[[int, int | None], None]
LISTED_REASONS = 5
LISTED_LEAKS = 10
TAR_BLOCK_BYTES = 512


@dataclass(frozen=True, slots=True)
class Row:
    """A study whose members lie in the spool: parts are (suffix, size).

    subject: a pseudonym. label: as it is stored. stratum: what the split rule counts it in.

    where: its place in the export, for messages. objects: (path in the release's store, size) of what lies beside the shards, in
    the order to write it; in the spool it follows the members.
    """

    uid: int
    subject: str
    site: str
    label: str
    stratum: int
    present: tuple[str, ...]
    offset: int
    parts: tuple[tuple[str, int], ...]
    where: str
    objects: tuple[tuple[str, int], ...] = ()

    @property
    def tar_bytes(self) -> int:
        """What the study takes in a tar, headers included."""
        return sum(TAR_BLOCK_BYTES * (1 + -(-size // TAR_BLOCK_BYTES)) for _, size in self.parts)


class Spool:
    """Encoded studies, one after the other in a local file, so that memory does not grow with the data set."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("w+b")
        self._end = 0

    def add(self, members: Mapping[str, bytes]) -> tuple[int, tuple[tuple[str, int], ...]]:
        """Keeps the members; returns where they begin and how long each is."""
        offset = self._end
        for data in members.values():
            self._file.write(data)
            self._end += len(data)
        return offset, tuple((suffix, len(data)) for suffix, data in members.items())

    def read(self, row: Row) -> dict[str, bytes]:
        """The members of a study; several threads may read."""
        data, start = self._read(row.offset, sum(size for _, size in row.parts)), 0
        members = {}
        for suffix, size in row.parts:
            members[suffix] = data[start : start + size]
            start += size
        return members

    def read_object(self, row: Row, path: str) -> bytes:
        """One of the objects of a study."""
        offset = row.offset + sum(size for _, size in row.parts)
        for name, size in row.objects:
            if name == path:
                return self._read(offset, size)
            offset += size
        raise KeyError(path)

    def _read(self, offset: int, size: int) -> bytes:
        # Not by the file's own position, which all threads share; what it still holds back must be there first.
        self._file.flush()
        return os.pread(self._file.fileno(), size, offset)

    def close(self) -> None:
        """Gives the disk space back."""
        self._path.unlink(missing_ok=True)
        self._file.close()


@dataclass
class Leaks:
    """Watches for one image under two subjects: the same file, or the same pixels once stored."""

    problems: list[str] = field(default_factory=list)
    _owners: dict[bytes, tuple[str, str]] = field(default_factory=dict)

    def check(self, row: Row, contents: Mapping[str, tuple[bytes, ...]], *, where: str = "") -> None:
        """contents: modality -> the digests under which its image is known. where: the place of the study in the export."""
        for modality, digests in contents.items():
            name = f"{modality} of study {uid_name(row.uid)} (site {row.site}{', ' if where else ''}{where})"
            for digest in digests:
                owner, other = self._owners.setdefault(digest, (row.subject, name))
                if owner != row.subject:
                    expected = "images that belong to one subject"
                    remedy = "Find out whose it is; take the other row out of the export."
                    self.problems.append(explain(name, expected=expected, found=f"the image that is also {other}", remedy=remedy))
                    break

    def refuse(self) -> None:
        """Raises DataError if there was a leak; names the studies by their uids and their places in the export."""
        if self.problems:
            more = len(self.problems) - LISTED_LEAKS
            raise DataError(together([*self.problems[:LISTED_LEAKS], *([f"... and {more} more."] if more > 0 else [])]))


@dataclass
class Gathered:
    """What one pass found. rows are in the order of their uids, rejections in the order met."""

    rows: list[Row]
    rejections: list[Rejection]
    out_of_range: Counter[str]

    @property
    def num_studies(self) -> int:
        """Good and bad ones."""
        return len(self.rows) + len(self.rejections)

    def quarantine(self, limit: float) -> Quarantine:
        """The record of what was left out."""
        return Quarantine(
            num_studies=len(self.rejections),
            limit=limit,
            reasons=dict(sorted(Counter(rejection.reason for rejection in self.rejections).items())),
            studies=tuple(QuarantinedStudy(site=r.site, where=r.where, reason=r.reason) for r in self.rejections),
            out_of_range=dict(sorted(self.out_of_range.items())),
        )


def gather(source: Source, spool: Spool, *, subject_key: bytes, limit: float, on_progress: Progress, jobs: int = 1) -> Gathered:
    """Reads the whole source; `jobs` studies at once are encoded, and what is found does not depend on that.

    Raises:
        DataError: one image under two subjects, no usable study, or more than `limit` of the studies unusable.
    """
    rows: dict[int, Row] = {}
    rejections: list[Rejection] = []
    out_of_range: Counter[str] = Counter()
    leaks = Leaks()
    bounds = all_bounds(source.schema)

    def encode(study: Study | Rejection) -> EncodedStudy | None:
        return None if isinstance(study, Rejection) else encode_study(study, source.schema, bounds)

    for number, (study, encoded_study) in enumerate(in_order(source.studies(), encode, jobs), start=1):
        on_progress(number, None)
        if isinstance(study, Rejection):
            rejections.append(study)
            continue
        uid = study_uid(subject_key, site=study.site, subject=study.subject, anchor=study.anchor)
        try:
            if uid in rows:
                raise UnfitError("duplicate study", "the same subject, site and anchor a second time")
            encoded = encoded_study()
            assert encoded is not None
        except UnfitError as error:
            where = study.where or f"study {number} of {source.name}"
            rejections.append(Rejection(site=study.site, where=where, reason=error.reason, detail=error.detail))
            continue
        subject = subject_pseudonym(subject_key, study.subject)
        rows[uid] = row = _keep(spool, study, encoded, uid=uid, subject=subject, source=source)
        leaks.check(row, _image_contents(study, encoded, source), where=study.where)
        out_of_range.update(encoded.out_of_range)
    out_of_range.update({name: counts.out_of_range for name, counts in source.counts.variables.items() if counts.out_of_range})
    leaks.refuse()
    gathered = Gathered([rows[uid] for uid in sorted(rows)], rejections, out_of_range)
    if not gathered.rows:
        raise _unusable(gathered, source.name, limit)
    refuse_too_many(gathered, source.name, limit)
    return gathered


def _keep(spool: Spool, study: Study, encoded: EncodedStudy, *, uid: int, subject: str, source: Source) -> Row:
    label = label_text(source.schema.label, study.label)
    quality = {name: float(value) for name, value in sorted(study.quality.items()) if name in encoded.present}
    meta = encode_meta(SampleMeta(uid, subject, study.site, label, quality))
    offset, parts = spool.add({**encoded.members, META: meta})
    _, objects = spool.add(encoded.objects)
    return Row(uid, subject, study.site, label, stratum(study.label), encoded.present, offset, parts, study.where, objects)


def _image_contents(study: Study, encoded: EncodedStudy, source: Source) -> dict[str, tuple[bytes, ...]]:
    contents: dict[str, tuple[bytes, ...]] = {}
    for spec in source.schema.modalities:
        if isinstance(spec, ImageSpec | VolumeSpec) and spec.name in encoded.present:
            stored = hashlib.sha256(encoded.members[extension(spec)]).digest()[:16]
            raw = study.image_digests.get(spec.name)
            contents[spec.name] = (stored,) if raw is None else (bytes.fromhex(raw)[:16], stored)
    return contents


def refuse_too_many(gathered: Gathered, name: str, limit: float) -> None:
    """Raises DataError where more than `limit` of the studies are unusable; tells the most frequent reasons."""
    if len(gathered.rejections) > limit * gathered.num_studies:
        raise _unusable(gathered, name, limit)


def _unusable(gathered: Gathered, name: str, limit: float) -> DataError:
    num_bad, num_studies = len(gathered.rejections), gathered.num_studies
    reasons = Counter(rejection.reason for rejection in gathered.rejections).most_common(LISTED_REASONS)
    first = {rejection.reason: rejection for rejection in reversed(gathered.rejections)}
    listed = "; ".join(f"{reason} {count} (first: {first[reason].where}: {first[reason].detail})" for reason, count in reasons)
    return DataError(
        explain(
            name,
            expected=f"at most {limit:.1%} of the studies unusable" if num_studies else "studies",
            found=f"{num_bad} of {num_studies}: {listed}" if num_studies else "none",
            remedy="Nothing was written. Mend the export or its card, or allow more with --limit.",
        )
    )

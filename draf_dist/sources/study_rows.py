"""The studies of one site: who, when, with which label; and which rows of another table belong to them."""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from draf_dist.schema.study import Rejection
from draf_dist.sources import tables
from draf_dist.sources.base import TableCounts
from draf_dist.sources.card_model import Anchor, Card
from draf_dist.sources.study_labels import DETAILS, Labels, read_labels
from draf_dist.sources.tables import NO_TIME, Table


@dataclass(frozen=True)
class StudyRows:
    """n studies of one site in the order of the file.

    subject, anchor_text: as the hospital wrote them. anchor_us: int64 (n,), the anchor in microseconds. label: None where it
    can't be read, and then a rejection says why.
    position: int64 (n,), rows of `table` (the studies table). study_key: text (n,), or None where studies have no identifier.
    """

    site: str
    table: Table
    position: NDArray[np.int64]
    subject: pa.Array
    study_key: pa.Array | None
    anchor_us: NDArray[np.int64]
    anchor_text: tuple[str, ...]
    label: Labels

    def __len__(self) -> int:
        """The number of studies, n."""
        return len(self.position)

    def where(self, study: int) -> str:
        """The place of a study, for messages."""
        return self.table.where(int(self.position[study]))


@dataclass(frozen=True)
class MatchedRows:
    """Pairs of a table's row and a study. position, study: int64 (m,); age_us: int64 (m,), time of the row minus the anchor."""

    position: NDArray[np.int64]
    study: NDArray[np.int64]
    age_us: NDArray[np.int64]

    def select(self, mask: NDArray[np.bool_]) -> "MatchedRows":
        """The pairs where the mask holds."""
        return MatchedRows(self.position[mask], self.study[mask], self.age_us[mask])


def study_columns(card: Card) -> set[str]:
    """Columns of the studies table that every study needs."""
    table, anchor = card.tables[card.studies.table], card.studies.anchor
    named = (table.study, table.subject, *card.chosen_label.columns, anchor.column if anchor is not None else None)
    return {name for name in named if name is not None}


def read_studies(card: Card, table: Table, site: str, position: NDArray[np.int64]) -> tuple[StudyRows, list[Rejection]]:
    """The studies in the rows `position` of the studies table, and a rejection for every row that can't be one."""
    table_card = card.tables[card.studies.table]
    taken = pa.array(position)
    label, reasons = read_labels(card.chosen_label, table, position)
    event_us, anchor_us, anchor_text = _anchors(card, table, position)
    if table_card.subject is None:
        # Nothing says which rows are one person's, so each is a person of its own.
        subject = pa.array([f"{site}:{table.row[row]}" for row in position], pa.string())
    else:
        subject = table.text(table_card.subject).take(taken)
    key = None if table_card.study is None else table.text(table_card.study).take(taken)
    reasons = reasons.astype("U32")
    reasons[event_us == NO_TIME] = "bad time"
    reasons[np.asarray(subject.is_null())] = "no subject"
    if key is not None:
        reasons[np.asarray(key.is_null())] = "no study id"
    rejections = [
        Rejection(site, table.where(int(position[i])), str(reasons[i]), _DETAILS[str(reasons[i])])
        for i in np.flatnonzero(reasons != "")
    ]
    studies = StudyRows(site, table, position, subject, key, anchor_us, anchor_text, label)
    studies = _select(studies, np.flatnonzero(reasons == ""))
    studies, repeated = _without_repeats(_chosen(studies, card.studies.repeat), site)
    return studies, rejections + repeated


_DETAILS = {
    **DETAILS,
    "bad time": "the time of the event is missing or unreadable",
    "no subject": "the subject is missing",
    "no study id": "the study id is missing",
}


def _anchors(card: Card, table: Table, position: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], tuple[str, ...]]:
    """Event and anchor in microseconds, and the anchor as text; NO_TIME events are still to be rejected."""
    anchor = card.studies.anchor
    key = card.tables[card.studies.table].study
    nothing = np.zeros(len(position), np.int64)
    if anchor is None or anchor.column is None:
        # Without a clock nothing but the study's own identifier tells two studies of a person apart.
        texts = [""] * len(position) if key is None else table.text(key).take(pa.array(position)).to_pylist()
        return nothing, nothing + _offset_us(anchor), tuple(text or "" for text in texts)
    texts = table.text(anchor.column).take(pa.array(position))
    event_us = tables.times(texts, time_format=anchor.format, number_unit=anchor.number_unit, decimal=table.decimal)
    anchor_us = np.where(event_us == NO_TIME, 0, event_us) + _offset_us(anchor)
    # 9999-12-31 stands for "not known" in many exports, and a day later there is no date.
    outside = (anchor_us < tables.FIRST_DATE_US) | (anchor_us > tables.LAST_DATE_US)
    event_us, anchor_us = np.where(outside, NO_TIME, event_us), np.where(outside, 0, anchor_us)
    if anchor.number_unit is not None:
        return event_us, anchor_us, tuple(text or "" for text in texts.to_pylist())
    return event_us, anchor_us, tuple(stamp.isoformat() for stamp in anchor_us.astype("datetime64[us]").tolist())


def _offset_us(anchor: Anchor | None) -> int:
    return 0 if anchor is None else round(anchor.offset_h * tables.MICROSECONDS_PER_HOUR)


def _select(studies: StudyRows, index: NDArray[np.int64]) -> StudyRows:
    taken = pa.array(index)
    return replace(
        studies,
        position=studies.position[index],
        subject=studies.subject.take(taken),
        study_key=None if studies.study_key is None else studies.study_key.take(taken),
        anchor_us=studies.anchor_us[index],
        anchor_text=tuple(studies.anchor_text[i] for i in index),
        label=tuple(studies.label[i] for i in index),
    )


def _chosen(studies: StudyRows, repeat: str) -> StudyRows:
    """All studies, or the first or last of every subject by anchor (and by row where anchors are equal)."""
    if repeat == "each":
        return studies
    order = np.argsort(studies.anchor_us, kind="stable")
    subjects = studies.subject.to_pylist()
    chosen = {subjects[i]: i for i in (order if repeat == "last" else order[::-1])}
    return _select(studies, np.array(sorted(chosen.values()), np.int64))


def _without_repeats(studies: StudyRows, site: str) -> tuple[StudyRows, list[Rejection]]:
    """A study is a subject at an anchor at a site: what says the same again, or uses a study id again, is rejected."""
    seen: set[tuple[str, ...]] = set()
    keep, rejections = [], []
    keys = [None] * len(studies) if studies.study_key is None else studies.study_key.to_pylist()
    for i, (subject, anchor, key) in enumerate(zip(studies.subject.to_pylist(), studies.anchor_text, keys, strict=True)):
        marks = {("study", subject, anchor), *([("key", key)] if key is not None else [])}
        if marks & seen:
            detail = "an earlier row has the same subject and anchor, or the same study id"
            rejections.append(Rejection(site, studies.where(i), "repeated study", detail))
        else:
            keep.append(i)
        seen |= marks
    return _select(studies, np.array(keep, np.int64)), rejections


def join_rows(card: Card, table_name: str, table: Table, studies: StudyRows) -> MatchedRows:
    """All rows of a table that belong to a study, with age_us NO_TIME where the time is unknown, 0 where rows have none."""
    table_card, anchor = card.tables[table_name], card.studies.anchor
    position, study = _joined(card, table_name, table, studies)
    if table_card.time is None or anchor is None:
        return MatchedRows(position, study, np.zeros(len(position), np.int64))
    texts, unit = table.text(table_card.time), anchor.number_unit
    time_us = tables.times(texts, time_format=table_card.time_format, number_unit=unit, decimal=table.decimal)[position]
    known = time_us != NO_TIME
    return MatchedRows(position, study, np.where(known, np.where(known, time_us, 0) - studies.anchor_us[study], NO_TIME))


def in_window(rows: MatchedRows, window_h: tuple[float, float] | None, counts: TableCounts) -> MatchedRows:
    """The rows inside the window, both ends included; all of them where there is no window, for then they have no time.

    This is the only way in for what has a time: a row after the anchor never gets past it, for no window ends after 0.
    """
    if window_h is None:
        return rows
    start_us, end_us = (round(hours * tables.MICROSECONDS_PER_HOUR) for hours in window_h)
    known = rows.age_us != NO_TIME
    admitted = known & (rows.age_us >= start_us) & (rows.age_us <= min(end_us, 0))
    counts.bad_time += int((~known).sum())
    counts.outside_window += int((known & ~admitted).sum())
    return rows.select(admitted)


def count_rows(rows: MatchedRows, table: Table, counts: TableCounts, *, shared: bool) -> None:
    """Tallies rows read and rows of no study; a shared file serves all sites, and every site takes its own rows from it."""
    matched = len(np.unique(rows.position))
    if shared:
        counts.unmatched = max((counts.unmatched if counts.rows else table.num_rows) - matched, 0)
        counts.rows, counts.not_wanted = table.num_rows, table.not_wanted
    else:
        counts.rows += table.num_rows
        counts.not_wanted += table.not_wanted
        counts.unmatched += table.num_rows - matched


def _joined(card: Card, table_name: str, table: Table, studies: StudyRows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All pairs (row, study) in the order of the file: by study id, else by subject, else (the studies table) each its own row."""
    if table_name == card.studies.table:
        return studies.position, np.arange(len(studies), dtype=np.int64)
    table_card = card.tables[table_name]
    if table_card.study is not None:
        assert studies.study_key is not None, "the card's checks see to it"
        return _pairs(table.text(table_card.study), studies.study_key)
    assert table_card.subject is not None, "the card's checks see to it"
    return _pairs(table.text(table_card.subject), studies.subject)


def _pairs(left: pa.Array, right: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All (i, j) with left[i] == right[j], by i, then j; nulls match nothing."""
    different = pc.unique(right)
    right_id = np.asarray(pc.index_in(right, value_set=different)).astype(np.int64)
    left_id = np.asarray(pc.index_in(left, value_set=different, skip_nulls=True).fill_null(-1)).astype(np.int64)
    order = np.argsort(right_id, kind="stable")
    count = np.bincount(right_id, minlength=len(different))
    first = np.concatenate([[0], np.cumsum(count)])
    matching = np.flatnonzero(left_id >= 0)
    repeats = count[left_id[matching]]
    position = np.repeat(matching, repeats)
    within = np.arange(len(position)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    return position.astype(np.int64), order[first[left_id[position]] + within].astype(np.int64)

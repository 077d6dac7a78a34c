"""The labels of studies, as the columns of the studies table say them."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from draf_dist.schema.study import MaskLabel, StudyLabel, TimeToEvent
from draf_dist.sources import tables
from draf_dist.sources.card_labels import AnyLabelCard, LabelCard, MultiLabelCard, SurvivalCard
from draf_dist.sources.card_segmentation import SegmentationCard
from draf_dist.sources.tables import Table

# None where a reason stands.
Labels = tuple[StudyLabel | None, ...]
Reasons = NDArray[np.str_]
DETAILS = {
    "unknown label": "the label is none that the card lists; of a time, no number or below 0",
    "no label": "the label is missing",
}


def read_labels(card: AnyLabelCard, table: Table, position: NDArray[np.int64]) -> tuple[Labels, Reasons]:
    """The labels of the studies in the rows `position`, and why there is none: a key of DETAILS, or ''."""
    match card:
        case LabelCard():
            return _classes(card, table, position)
        case MultiLabelCard():
            return _answers(card, table, position)
        case SurvivalCard():
            return _times(card, table, position)
        case SegmentationCard():
            # Until its mask is read, which is a file, no study is known to have one.
            return (MaskLabel(drawn=False),) * len(position), np.full(len(position), "")


def _classes(card: LabelCard, table: Table, position: NDArray[np.int64]) -> tuple[Labels, Reasons]:
    index = {name: float(i) for i, name in enumerate(card.classes)}
    values = {text: index[name] for text, name in card.values.items()} if card.values else index
    texts = table.text(card.column).take(position)
    found = tables.mapped(texts, values)
    reasons = _reasons(np.isnan(found), np.asarray(texts.is_null()))
    return tuple(None if reason else int(label) for reason, label in zip(reasons, found, strict=True)), reasons


def _answers(card: MultiLabelCard, table: Table, position: NDArray[np.int64]) -> tuple[Labels, Reasons]:
    """NaN is not known, -1 a word that the card doesn't list."""
    values = dict.fromkeys(card.yes, 1.0) | dict.fromkeys(card.no, 0.0)
    unknown = {tables.token(text) for text in card.unknown}
    columns = []
    for column in card.columns:
        texts = table.text(column).take(position)
        said = tables.mapped(texts, values)
        strange = np.isnan(said) & ~np.asarray(texts.is_null())
        strange &= tables.lookup(texts, lambda text: float(tables.token(text) in unknown)) != 1.0
        columns.append(np.where(strange, -1.0, said))
    found = np.stack(columns, axis=1)
    reasons = _reasons((found == -1).any(1), np.isnan(found).all(1))
    return tuple(None if reason else _known(row) for reason, row in zip(reasons, found, strict=True)), reasons


def _times(card: SurvivalCard, table: Table, position: NDArray[np.int64]) -> tuple[Labels, Reasons]:
    texts, events = (table.text(column).take(position) for column in (card.time, card.event))
    time = tables.numbers(texts, decimal=table.decimal)
    event = tables.mapped(events, dict.fromkeys(card.happened, 1.0) | dict.fromkeys(card.censored, 0.0))
    nothing = np.asarray(texts.is_null()) | np.asarray(events.is_null())
    reasons = _reasons(~(time >= 0) | np.isnan(event), nothing)
    return tuple(
        None if reason else TimeToEvent(float(t), bool(happened)) for reason, t, happened in zip(reasons, time, event, strict=True)
    ), reasons


def _known(row: Iterable[float]) -> tuple[bool | None, ...]:
    return tuple(None if np.isnan(answer) else bool(answer) for answer in row)


def _reasons(unknown: NDArray[np.bool_], missing: NDArray[np.bool_]) -> Reasons:
    return np.where(missing, "no label", np.where(unknown, "unknown label", ""))

"""What is stored of every prediction: one row a study, one parquet file per split and corruption. No subject is in it."""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from draf_dist.errors import DataError, explain
from draf_dist.evaluation.answer_columns import about_answers, outcome_columns, read_answers, read_probability
from draf_dist.evaluation.answers import Answers, risk_of
from draf_dist.storage import Store
from draf_dist.storage.parquet import read_parquet

Array = NDArray[Any]

CLEAN: Final = "none"
ALL = "all"


@dataclass(frozen=True)
class Applied:
    """The corruption under which predictions were made: operation, its grid index, and the modality hit, or "all"."""

    operation: str = CLEAN
    index: int = 0
    modality: str = ALL


@dataclass(frozen=True)
class Predictions:
    """Predictions of n studies; axes n, K classes, M modalities. Floats are float32, NaN where a number does not exist.

    target: class index, -1 where the label is unknown. probability: mean over Monte-Carlo passes, (n, K). epistemic, aleatoric,
    total: variance of the label and its parts, (n,). reliability: (n, M), 0 where absent. uncertainty: kind -> (n, M), NaN where
    absent. corruption_probability: c_hat (n, M), NaN where absent or where the model has no such head. unimodal: probability
    (n, M) of class 1 by the modality alone, NaN where there is no such head or K > 2. severity: (n, M) in [0, 1].

    Where classes are not what is asked for, `classes` are the names of the outputs and `answers` holds what is known. Of labels:
    probability of each by itself; target: how many are known to hold. Of times: probability is the hazard of each interval;
    target: the interval of the time. unimodal is the risk (see answers.py) by the modality alone; epistemic, aleatoric and
    total are means over labels or intervals. target is -1 where nothing is known.
    """

    modalities: tuple[str, ...]
    classes: tuple[str, ...]
    split: str
    applied: Applied
    uid: NDArray[np.int64]
    site: NDArray[np.str_]
    target: NDArray[np.int64]
    probability: NDArray[np.float32]
    epistemic: NDArray[np.float32]
    aleatoric: NDArray[np.float32]
    total: NDArray[np.float32]
    present: NDArray[np.bool_]
    corrupted: NDArray[np.bool_]
    severity: NDArray[np.float32]
    reliability: NDArray[np.float32]
    corruption_probability: NDArray[np.float32]
    unimodal: NDArray[np.float32]
    uncertainty: dict[str, NDArray[np.float32]]
    answers: Answers | None = None

    @property
    def num_studies(self) -> int:
        """Rows."""
        return len(self.uid)

    def rows(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> "Predictions":
        """Some of the studies."""
        return _each_array([self], lambda parts: parts[0][index])

    @property
    def risk(self) -> NDArray[np.float64]:
        """What rises with the risk of each study, NaN of more than two classes. (n,)."""
        return risk_of(self.probability.astype(np.float64), self.answers)

    def labelled(self) -> "Predictions":
        """The studies whose label is known: all that a metric can use."""
        return self.rows(self.target >= 0)


def concatenate(parts: Sequence[Predictions]) -> Predictions:
    """Parts of one split under one corruption, end to end."""
    return _each_array(parts, np.concatenate)


def _each_array(parts: Sequence[Predictions], change: Callable[[list[Array]], Array]) -> Predictions:
    first = parts[0]
    uncertainty = {kind: change([part.uncertainty[kind] for part in parts]) for kind in first.uncertainty}
    answers = None if first.answers is None else replace(first.answers, **_changed([part.answers for part in parts], change))
    return replace(first, **_changed(parts, change), uncertainty=uncertainty, answers=answers)


def _changed(parts: Sequence[Any], change: Callable[[list[Array]], Array]) -> dict[str, Any]:
    return {
        field.name: change([getattr(part, field.name) for part in parts])
        for field in fields(parts[0])
        if isinstance(getattr(parts[0], field.name), np.ndarray)
    }


def to_table(predictions: Predictions) -> pa.Table:
    """The stored form; NaN is null.

    Columns: uid, site, split, corruption, corruption_index, corrupted_modality, target, probability_<class>, epistemic,
    aleatoric, total, and per modality m present_<m>, corrupted_<m>, severity_<m>, reliability_<m>,
    corruption_probability_<m>, unimodal_<m>, uncertainty_<m> (a struct with one field a kind; not there for a model without).
    Of labels also label_<label> (null where not observed). Of times, in place of probabilities, hazard_<k> of interval k from 0 and
    survival_<k> at its end, and risk, time and event.
    """
    n, applied = predictions.num_studies, predictions.applied
    columns: dict[str, pa.Array] = {
        "uid": pa.array(predictions.uid),
        "site": pa.array(predictions.site.tolist(), pa.string()),
        "split": _constant(predictions.split, n, pa.string()),
        "corruption": _constant(applied.operation, n, pa.string()),
        "corruption_index": _constant(applied.index, n, pa.int32()),
        "corrupted_modality": _constant(applied.modality, n, pa.string()),
        "target": pa.array(predictions.target, mask=predictions.target < 0),
    }
    columns |= outcome_columns(predictions.classes, predictions.probability, predictions.answers)
    columns |= {name: _floats(getattr(predictions, name)) for name in ("epistemic", "aleatoric", "total")}
    for m, name in enumerate(predictions.modalities):
        columns |= _modality_columns(predictions, m, name)
    kinds = sorted(predictions.uncertainty)
    about = {"modalities": list(predictions.modalities), "classes": list(predictions.classes), "uncertainty": kinds}
    about |= about_answers(predictions.answers)
    return pa.table(columns).replace_schema_metadata({"draf_dist": json.dumps(about, sort_keys=True)})


def from_table(table: pa.Table) -> Predictions:
    """Predictions from their stored form; the inverse of `to_table`. The table holds one corruption.

    Raises:
        DataError: the table was not written by `to_table`.
    """
    about = json.loads((table.schema.metadata or {}).get(b"draf_dist", b"null"))
    if about is None:
        raise DataError(
            explain("predictions", expected="a table of predictions", found="another", remedy="Evaluate the run again.")
        )
    modalities, classes = tuple(about["modalities"]), tuple(about["classes"])
    first = {name: table[name][0].as_py() for name in ("split", "corruption", "corruption_index", "corrupted_modality")}
    return Predictions(
        modalities=modalities,
        classes=classes,
        split=first["split"],
        applied=Applied(first["corruption"], first["corruption_index"], first["corrupted_modality"]),
        uid=table["uid"].to_numpy(),
        site=np.array(table["site"].to_pylist(), dtype=np.str_),
        target=table["target"].fill_null(-1).to_numpy(),
        probability=read_probability(table, classes, about),
        epistemic=_vector(table["epistemic"], np.float32),
        aleatoric=_vector(table["aleatoric"], np.float32),
        total=_vector(table["total"], np.float32),
        present=_matrix(table, "present", modalities, np.bool_),
        corrupted=_matrix(table, "corrupted", modalities, np.bool_),
        severity=_matrix(table, "severity", modalities, np.float32),
        reliability=_matrix(table, "reliability", modalities, np.float32),
        corruption_probability=_matrix(table, "corruption_probability", modalities, np.float32),
        unimodal=_matrix(table, "unimodal", modalities, np.float32),
        uncertainty={kind: _uncertainty(table, kind, modalities) for kind in about["uncertainty"]},
        answers=read_answers(table, classes, about),
    )


def file_name(split: str, operation: str = CLEAN) -> str:
    """Where predictions lie in a run folder: predictions/<split>[@<corruption>].parquet."""
    return f"predictions/{split}.parquet" if operation == CLEAN else f"predictions/{split}@{operation}.parquet"


def write_predictions(store: Store, path: str, parts: Sequence[Predictions]) -> None:
    """Writes one file at once: a reader sees all of it or none. The same predictions give the same bytes."""
    store.write(path, to_parquet(parts))


def read_predictions(store: Store, path: str) -> list[Predictions]:
    """The predictions in a file, one entry per corruption, in the order written."""
    return from_parquet(store.read(path))


def to_parquet(parts: Sequence[Predictions]) -> bytes:
    """The content of a file of predictions of one model, at least one part."""
    buffer = io.BytesIO()
    pq.write_table(pa.concat_tables([to_table(part) for part in parts]), buffer, compression="zstd")
    return buffer.getvalue()


def from_parquet(data: bytes) -> list[Predictions]:
    """The inverse of `to_parquet`; parts with equal corruptions next to each other come back as one."""
    table = read_parquet(data)
    names = ("corruption", "corruption_index", "corrupted_modality")
    keys = list(zip(*(table[name].to_pylist() for name in names), strict=True))
    starts = [i for i in range(len(keys)) if i == 0 or keys[i] != keys[i - 1]]
    stops = [*starts[1:], len(keys)]
    return [from_table(table.slice(start, stop - start)) for start, stop in zip(starts, stops, strict=True)]


def _modality_columns(predictions: Predictions, m: int, name: str) -> dict[str, pa.Array]:
    kinds = sorted(predictions.uncertainty)
    fields_ = [_floats(predictions.uncertainty[kind][:, m]) for kind in kinds]
    # Parquet knows no struct without fields: a model that measures no uncertainty has no such column.
    uncertainty = {f"uncertainty_{name}": pa.StructArray.from_arrays(fields_, kinds)} if kinds else {}
    return {
        f"present_{name}": pa.array(predictions.present[:, m]),
        f"corrupted_{name}": pa.array(predictions.corrupted[:, m]),
        f"severity_{name}": _floats(predictions.severity[:, m]),
        f"reliability_{name}": _floats(predictions.reliability[:, m]),
        f"corruption_probability_{name}": _floats(predictions.corruption_probability[:, m]),
        f"unimodal_{name}": _floats(predictions.unimodal[:, m]),
        **uncertainty,
    }


def _floats(values: NDArray[np.float32]) -> pa.Array:
    return pa.array(values, pa.float32(), mask=np.isnan(values))


def _constant(value: str | int, count: int, kind: pa.DataType) -> pa.Array:
    return pa.array([value] * count, kind)


def _matrix(table: pa.Table, prefix: str, names: Sequence[str], kind: type[np.generic]) -> Array:
    return np.stack([_vector(table[f"{prefix}_{name}"], kind) for name in names], axis=1)


def _vector(column: pa.ChunkedArray, kind: type[np.generic]) -> Array:
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=kind)


def _uncertainty(table: pa.Table, kind: str, modalities: Sequence[str]) -> NDArray[np.float32]:
    columns = [table[f"uncertainty_{name}"].combine_chunks().field(kind) for name in modalities]
    return np.stack([column.to_numpy(zero_copy_only=False).astype(np.float32) for column in columns], axis=1)

"""The columns of stored predictions that differ from task to task: what is predicted, and what is known."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from draf_dist.evaluation.answers import Answers, LabelAnswers, TimeAnswers, risk_of
from draf_dist.metrics.survival import survival_function

HAZARD, SURVIVAL, LABEL = "hazard", "survival", "label"


def outcome_columns(names: Sequence[str], probability: NDArray[np.float32], answers: Answers | None) -> dict[str, pa.Array]:
    """Of probabilities (n, K) of outputs with these names; see predictions.to_table."""
    match answers:
        case TimeAnswers():
            hazard = probability.astype(np.float64)
            survival, risk = survival_function(hazard), risk_of(hazard, answers)
            columns = {f"{HAZARD}_{k}": _floats(probability[:, k]) for k in range(len(names))}
            # The last interval has no end.
            columns |= {f"{SURVIVAL}_{k}": _floats(survival[:, k]) for k in range(len(names) - 1)}
            return columns | {"risk": _floats(risk), "time": _floats(answers.time), "event": pa.array(answers.event)}
        case LabelAnswers():
            columns = {f"probability_{name}": _floats(probability[:, k]) for k, name in enumerate(names)}
            known = answers.observed
            return columns | {f"{LABEL}_{name}": pa.array(answers.label[:, k], mask=~known[:, k]) for k, name in enumerate(names)}
        case None:
            return {f"probability_{name}": _floats(probability[:, k]) for k, name in enumerate(names)}


def about_answers(answers: Answers | None) -> dict[str, Any]:
    """What the columns don't say, for the metadata of the table."""
    match answers:
        case TimeAnswers(_, _, edges, unit):
            return {"task": "survival", "edges": list(edges), "unit": unit}
        case LabelAnswers():
            return {"task": "multilabel"}
        case None:
            return {}


def read_probability(table: pa.Table, names: Sequence[str], about: Mapping[str, Any]) -> NDArray[np.float32]:
    """The probabilities (n, K) of a stored table."""
    is_hazard = about.get("task") == "survival"
    columns = [f"{HAZARD}_{k}" if is_hazard else f"probability_{name}" for k, name in enumerate(names)]
    return np.stack([_vector(table[column]).astype(np.float32) for column in columns], axis=1)


def read_answers(table: pa.Table, names: Sequence[str], about: Mapping[str, Any]) -> Answers | None:
    """What is known, of a stored table."""
    match about.get("task"):
        case "survival":
            time, event = _vector(table["time"]).astype(np.float32), _vector(table["event"]).astype(np.bool_)
            return TimeAnswers(time, event, tuple(about["edges"]), about["unit"])
        case "multilabel":
            columns = [table[f"{LABEL}_{name}"] for name in names]
            label = np.stack([_vector(column.fill_null(False)).astype(np.bool_) for column in columns], axis=1)
            observed = np.stack([_vector(column.is_valid()).astype(np.bool_) for column in columns], axis=1)
            return LabelAnswers(label, observed)
        case _:
            return None


def _vector(column: pa.ChunkedArray) -> NDArray[Any]:
    return np.asarray(column.to_numpy(zero_copy_only=False))


def _floats(values: NDArray[Any]) -> pa.Array:
    return pa.array(values.astype(np.float32), pa.float32(), mask=np.isnan(values))

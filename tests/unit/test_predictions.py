"""Predictions come back from parquet as they were, name no subject, and are written at once."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hand_made_predictions import studies

from draf_dist.errors import DataError
from draf_dist.evaluation.predictions import (
    Applied,
    Predictions,
    concatenate,
    file_name,
    from_table,
    read_predictions,
    to_table,
    write_predictions,
)
from draf_dist.storage import open_store


def same(first: Predictions, second: Predictions) -> None:
    for name, value in vars(first).items():
        other = getattr(second, name)
        if isinstance(value, np.ndarray):
            assert value.dtype.kind == other.dtype.kind, name
            np.testing.assert_array_equal(value, other, err_msg=name)
        elif name == "uncertainty":
            assert value.keys() == other.keys()
            for kind in value:
                np.testing.assert_array_equal(value[kind], other[kind])
        else:
            assert value == other, name


def test_predictions_survive_parquet(tmp_path: Path) -> None:
    first, _ = studies(7)
    unlabelled = type(first)(**{**vars(first), "target": np.array([0, 1, -1, 0, 1, -1, 0])})
    store = open_store(str(tmp_path))
    write_predictions(store, file_name("test"), [unlabelled])
    (back,) = read_predictions(store, "predictions/test.parquet")
    same(back, unlabelled)
    assert back.labelled().num_studies == 5


def test_one_file_holds_all_levels_of_a_corruption(tmp_path: Path) -> None:
    parts = [studies(5, applied=Applied("gaussian", index, modality))[0] for index in (1, 2) for modality in ("cxr", "labs")]
    store = open_store(str(tmp_path))
    write_predictions(store, file_name("test", "gaussian"), parts)
    back = read_predictions(store, "predictions/test@gaussian.parquet")
    assert [part.applied for part in back] == [part.applied for part in parts]
    same(back[2], parts[2])


def test_the_same_predictions_give_the_same_bytes(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for name in ("a.parquet", "b.parquet"):
        write_predictions(store, name, [studies(5)[0]])
    assert store.read("a.parquet") == store.read("b.parquet")


def test_absence_is_null_and_weight_zero() -> None:
    predictions, _ = studies(50)
    table = to_table(predictions)
    absent = ~predictions.present[:, 0]
    assert absent.any()
    assert table["uncertainty_cxr"].combine_chunks().field("epistemic").null_count == absent.sum()
    assert np.array(table["reliability_cxr"])[absent].tolist() == [0.0] * absent.sum()


def test_columns_hold_what_was_agreed_and_no_subject() -> None:
    names = set(to_table(studies(3)[0]).column_names)
    assert {
        "uid",
        "site",
        "split",
        "target",
        "probability_survived",
        "probability_died",
        "epistemic",
        "aleatoric",
        "total",
    } <= names
    assert {
        "reliability_cxr",
        "uncertainty_cxr",
        "corruption_probability_cxr",
        "severity_cxr",
        "present_cxr",
        "corruption",
    } <= names
    assert not any("subject" in name for name in names)


def test_parts_end_to_end_are_the_whole() -> None:
    whole, _ = studies(9)
    same(concatenate([whole.rows(np.arange(4)), whole.rows(np.arange(4, 9))]), whole)


def test_another_table_is_refused() -> None:
    with pytest.raises(DataError, match="table of predictions"):
        from_table(pa.table({"a": [1]}))


def test_a_model_without_uncertainty_survives_parquet_too(tmp_path: Path) -> None:
    """Parquet refuses a struct without fields, so there is no such column."""
    bare = replace(studies(7)[0], uncertainty={})
    store = open_store(str(tmp_path))
    write_predictions(store, file_name("test"), [bare])
    (back,) = read_predictions(store, "predictions/test.parquet")
    same(back, bare)

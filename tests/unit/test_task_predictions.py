"""Predictions of labels and times are stored, cut and put together without losing what is known."""

import io
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hand_made_predictions import studies
from task_predictions import EDGES, LABELS, of_labels, of_times

from draf_dist.errors import DataError
from draf_dist.evaluation.answers import LabelAnswers, TimeAnswers
from draf_dist.evaluation.predictions import Predictions, concatenate, from_parquet, to_parquet
from draf_dist.evaluation.regret import posterior
from draf_dist.metrics.survival import risk, survival_function


def assert_same(one: Predictions, other: Predictions) -> None:
    assert type(one.answers) is type(other.answers)
    for name, value in vars(one.answers).items():
        np.testing.assert_array_equal(value, getattr(other.answers, name))
    for name in ("uid", "site", "target", "probability", "unimodal", "present"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.classes == other.classes


@pytest.mark.parametrize("make", [of_labels, of_times])
def test_they_come_back_as_they_were(make) -> None:
    made = make()
    (back,) = from_parquet(to_parquet([made]))
    assert_same(back, made)
    assert to_parquet([back]) == to_parquet([made])


@pytest.mark.parametrize("make", [of_labels, of_times])
def test_parts_end_to_end_are_the_whole(make) -> None:
    made = make(30)
    assert_same(concatenate([made.rows(np.arange(11)), made.rows(np.arange(11, 30))]), made)
    known = made.labelled()
    assert known.num_studies == 29
    assert (known.target >= 0).all()


def test_the_columns_of_labels_say_what_was_not_observed() -> None:
    made = of_labels()
    table = pq.read_table(io.BytesIO(to_parquet([made])))
    assert isinstance(made.answers, LabelAnswers)
    for k, name in enumerate(LABELS):
        expected = [
            bool(y) if seen else None for y, seen in zip(made.answers.label[:, k], made.answers.observed[:, k], strict=True)
        ]
        assert table[f"label_{name}"].to_pylist() == expected
        assert table[f"probability_{name}"].null_count == 0


def test_the_columns_of_times_hold_hazards_the_curve_and_the_risk() -> None:
    made = of_times()
    table = pq.read_table(io.BytesIO(to_parquet([made])))
    hazard = made.probability.astype(np.float64)
    for k in range(len(EDGES)):
        assert table[f"survival_{k}"].to_numpy() == pytest.approx(survival_function(hazard)[:, k], rel=1e-6)
    assert f"survival_{len(EDGES)}" not in table.column_names
    assert table["risk"].to_numpy() == pytest.approx(risk(hazard), rel=1e-6)
    assert isinstance(made.answers, TimeAnswers)
    assert table["event"].to_pylist() == made.answers.event.tolist()


def test_a_table_of_classes_is_as_it_was() -> None:
    made, _ = studies(20)
    names = pq.read_table(io.BytesIO(to_parquet([made]))).column_names
    assert names[6:9] == ["target", "probability_survived", "probability_died"]
    assert not {"label_died", "hazard_0", "risk", "time"} & set(names)


def test_a_planted_truth_of_classes_is_refused_for_two_labels() -> None:
    made = of_labels()
    two = replace(made, classes=LABELS[:2], probability=made.probability[:, :2])
    with pytest.raises(DataError, match="found several labels, or times"):
        posterior(two, {})


def test_risk_rises_with_what_is_feared() -> None:
    labels, times = of_labels(5), of_times(5)
    assert labels.risk == pytest.approx(labels.probability.mean(1), rel=1e-6)
    sooner = replace(times, probability=times.probability * 1.2)
    assert (sooner.risk > times.risk).all()

"""Modalities that go missing: at random, and more often in the sicker."""

import numpy as np
import pytest
import torch
from batches import same
from corrupted_batches import corruptor, normalised

from draf_dist import noise
from draf_dist.data.corruption import (
    Missing,
    fit_not_at_random,
)
from draf_dist.data.corruption.missing import find_offset
from draf_dist.errors import DataError
from draf_dist.schema.batch import Batch, ClassTarget


@pytest.mark.parametrize("index", [1, 2, 3, 4])
def test_missing_at_random_keeps_at_least_one_and_has_its_rate(index: int) -> None:
    batch = normalised(6000, all_present=True)
    rate = Missing().grid[index]
    present = corruptor().apply(batch, Missing(), index, seed=1).present
    assert present.any(dim=1).all()
    # All three go with probability rate^3; then one of the three comes back.
    assert float((~present).double().mean()) == pytest.approx(rate - rate**3 / 3, abs=0.012)
    assert torch.allclose((~present).double().mean(dim=0), (~present).double().mean(), atol=0.02)


def test_what_goes_missing_leaves_nothing_behind() -> None:
    batch = normalised(200)
    result = corruptor().apply(batch, Missing(), 4, seed=1)
    gone = batch.present & ~result.present
    assert gone.any(dim=0).all()
    assert not result.present[~batch.present].any()
    assert not result.inputs["cxr"][gone[:, 0]].any()
    assert not result.inputs["vitals"].values[gone[:, 1]].any()
    assert not result.inputs["vitals"].observed[gone[:, 1]].any()
    assert not result.corrupted.any()


def test_one_modality_can_go_missing_alone() -> None:
    batch = normalised(300)
    result = corruptor().apply(batch, Missing(grid=(0.0, 1.0)), 1, modality="vitals", seed=1)
    alone = batch.present[:, 1] & ~batch.present[:, 0] & ~batch.present[:, 2]
    assert torch.equal(result.present[:, 1], alone)
    assert torch.equal(result.present[:, [0, 2]], batch.present[:, [0, 2]])


def test_dropout_of_everything_keeps_one_at_random() -> None:
    result = corruptor(modality_dropout=1.0).train(normalised(3000, all_present=True))
    assert (result.present.sum(dim=1) == 1).all()
    assert torch.allclose(result.present.double().mean(dim=0), torch.tensor(1 / 3, dtype=torch.float64), atol=0.03)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("slope", [0.5, 1.0, 3.0])
def test_bisection_reaches_the_marginal(rate: float, slope: float) -> None:
    score = noise.normal(torch.tensor([3]), (5000,))[0].double()
    offset = find_offset(score, rate=rate, slope=slope)
    assert float(torch.sigmoid(offset + slope * score).mean()) == pytest.approx(rate, abs=1e-9)


def test_without_slope_the_offset_is_the_logit_of_the_rate() -> None:
    assert find_offset(torch.zeros(9).double(), rate=0.3, slope=0.0) == pytest.approx(np.log(0.3 / 0.7), abs=1e-9)


@pytest.mark.parametrize("score", ["label", "ehr"])
def test_the_sicker_miss_more_at_the_same_rate(score: str) -> None:
    batch = normalised(8000)
    law = fit_not_at_random([batch.rows(0, 3000), batch.rows(3000, 8000)], rate=0.3, slope=1.5, score=score)
    probability = law.probability(batch)
    for column in range(3):
        assert float(probability[batch.present[:, column], column].mean()) == pytest.approx(0.3, abs=0.005)
    result = law.apply(batch, seed=1)
    missing = (batch.present & ~result.present)[:, 1][batch.present[:, 1]].double()
    assert float(torch.corrcoef(torch.stack([missing, probability[batch.present[:, 1], 1]]))[0, 1]) > 0.2
    assert result.present.any(dim=1).all()
    assert same(law.apply(batch.rows(10, 20), seed=1), result.rows(10, 20))


def test_a_severity_that_never_varies_is_refused() -> None:
    batch = normalised(10)
    flat = Batch(**{**vars(batch), "target": ClassTarget(torch.ones(10, dtype=torch.int64), batch.target.observed)})
    with pytest.raises(DataError, match="severity that varies, found one label for all 10"):
        fit_not_at_random([flat], rate=0.3, slope=1.0, score="label")

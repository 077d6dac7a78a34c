"""Corruption of codes: how often they are drawn again, from which shares, and what stays as it is."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from draf_dist import noise
from draf_dist.data.corruption import EhrMask, EhrNoise
from draf_dist.data.corruption.operations import Scale
from draf_dist.schema.batch import SeriesInput
from draf_dist.schema.modality import TableSpec, VariableSpec

ROWS = 20_000
COUNTS = (10, 0, 30, 60)
SPEC = TableSpec(
    name="clinic",
    variables=(VariableSpec(name="age"), VariableSpec.categorical("pain", tuple("abcd")), VariableSpec(name="sex", type="binary")),
)
KEYS = noise.sample_keys(3, "test", None, torch.arange(ROWS), 1)[0]


def clean() -> SeriesInput:
    """Codes with the shares of training, in an order of their own; one row in ten without."""
    code = torch.searchsorted(torch.tensor([0.1, 0.1, 0.4, 1.0]), noise.uniform(noise.chain(1, KEYS), (1,)), right=True).float()
    values = torch.stack([noise.normal(noise.chain(2, KEYS), (1,)), code, (code > 1).float()], dim=-1)
    observed = torch.ones_like(values, dtype=torch.bool)
    observed[::10, :, 1] = False
    return SeriesInput(torch.where(observed, values, 0.0), observed, torch.ones(ROWS, dtype=torch.int64))


def noisy(index: int, categories: Mapping[int, tuple[int, ...]] | None = None) -> SeriesInput:
    scale = Scale(SPEC, torch.zeros(3), torch.ones(3), {1: COUNTS} if categories is None else categories)
    changed = EhrNoise().apply(clean(), torch.full((ROWS,), index), KEYS, scale)
    assert isinstance(changed, SeriesInput)
    return changed


def codes(series: SeriesInput) -> Tensor:
    return series.values[series.observed[:, 0, 1], 0, 1]


@pytest.mark.parametrize("index", range(1, 6))
def test_a_code_keeps_as_much_of_itself_as_a_number_does(index: int) -> None:
    """The correlation of every indicator with the clean one is 1 / sqrt(1 + sigma^2), and so is that of the number."""
    expected = (1 + EhrNoise().grid[index] ** 2) ** -0.5
    before, after = codes(clean()), codes(noisy(index))
    for category in (0, 2, 3):
        pair = torch.stack([before == category, after == category]).double()
        assert float(torch.corrcoef(pair)[0, 1]) == pytest.approx(expected, abs=0.03)
    numbers = torch.stack([clean().values[:, 0, 0], noisy(index).values[:, 0, 0]])
    assert float(torch.corrcoef(numbers)[0, 1]) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("index", [2, 5])
def test_shares_stay_those_of_training(index: int) -> None:
    shares = torch.bincount(codes(noisy(index)).long(), minlength=4) / len(codes(clean()))
    np.testing.assert_allclose(shares, np.array(COUNTS) / 100, atol=0.015)
    assert shares[1] == 0


def test_where_the_shares_are_others_codes_move_towards_them() -> None:
    shares = torch.bincount(codes(noisy(5, {1: (0, 1, 0, 0)})).long(), minlength=4) / len(codes(clean()))
    assert float(shares[1]) == pytest.approx(1 - (1 + 10.0**2) ** -0.5, abs=0.01)


def test_a_sweep_sees_one_draw_grow() -> None:
    before = codes(clean())
    changed = [codes(noisy(index)) != before for index in range(6)]
    assert not changed[0].any()
    for weaker, stronger in zip(changed, changed[1:], strict=False):
        assert not (weaker & ~stronger).any()
        assert int(stronger.sum()) > int(weaker.sum())
    strongest = codes(noisy(5))
    assert torch.equal(codes(noisy(3))[changed[3]], strongest[changed[3]])


def test_binary_values_and_what_was_not_observed_stay() -> None:
    before, after = clean(), noisy(5)
    assert torch.equal(before.values[..., 2], after.values[..., 2])
    assert torch.equal(before.observed, after.observed)
    assert not after.values[::10, 0, 1].any()


def test_a_row_is_changed_alike_in_any_batch() -> None:
    whole, some = noisy(3), torch.tensor([5, 17, 4000])
    part = SeriesInput(*(getattr(clean(), name)[some] for name in ("values", "observed", "length")))
    scale = Scale(SPEC, torch.zeros(3), torch.ones(3), {1: COUNTS})
    alone = EhrNoise().apply(part, torch.full((3,), 3), KEYS[some], scale)
    assert isinstance(alone, SeriesInput)
    assert torch.equal(alone.values, whole.values[some])


def test_numbers_meet_the_noise_that_they_met_without_codes_beside_them() -> None:
    assert torch.equal(noisy(3).values[..., 0], noisy(3, {}).values[..., 0])
    assert torch.equal(noisy(3, {}).values[..., 1], clean().values[..., 1])


def test_a_table_of_codes_alone_can_be_noisy_and_one_of_binary_values_cannot() -> None:
    assert EhrNoise().fits(TableSpec(name="codes", variables=SPEC.variables[1:2]))
    assert not EhrNoise().fits(TableSpec(name="bits", variables=SPEC.variables[2:]))


def test_a_masked_code_is_not_observed() -> None:
    masked = EhrMask().apply(clean(), torch.full((ROWS,), 3), KEYS, Scale(SPEC, torch.zeros(3), torch.ones(3), {1: COUNTS}))
    assert isinstance(masked, SeriesInput)
    lost = clean().observed[:, 0, 1] & ~masked.observed[:, 0, 1]
    assert float(lost.sum() / clean().observed[:, 0, 1].sum()) == pytest.approx(0.5, abs=0.02)
    assert not masked.values[lost, 0, 1].any()

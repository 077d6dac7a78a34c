"""What is hidden of a series, and how the error of its reconstruction is counted."""

from dataclasses import replace

import pytest
import torch
from model_inputs import pass_keys, small_batch, small_schema
from torch import Tensor, nn

from draf_dist.errors import SpecError
from draf_dist.models.encoders import EncoderConfig, SeriesTransformerConfig, TabularConfig
from draf_dist.models.encoders.gru import GruConfig
from draf_dist.models.encoders.patch_bag import PatchBagConfig
from draf_dist.models.masked_values import MaskedValuesNet
from draf_dist.objectives.pretrain_masked_values import MaskedValuesConfig
from draf_dist.schema.batch import Batch, SeriesInput

CONFIG = MaskedValuesConfig(modality="vitals")


def series_batch(rows: int = 200) -> Batch:
    return small_batch(small_schema(), rows)


def counted(batch: Batch) -> Tensor:
    """Which values are observed and count, bool (B, T, F)."""
    series = batch.inputs["vitals"]
    assert isinstance(series, SeriesInput)
    within = torch.arange(5) < series.length[:, None]
    there = batch.present[:, 1] & (batch.weight > 0)
    return series.observed & within[:, :, None] & there[:, None, None]


class Watching(nn.Module):
    """Notes what it is shown and answers with a constant."""

    def __init__(self, answer: float) -> None:
        super().__init__()
        self.answer = answer
        self.shown: list[SeriesInput] = []

    def forward(self, series: SeriesInput, keys: Tensor) -> Tensor:
        self.shown.append(series)
        return torch.full_like(series.values, self.answer)


def test_a_share_of_the_observed_values_is_hidden_and_neither_its_value_nor_its_bit_is_shown() -> None:
    batch, model = series_batch(), Watching(0.0)
    CONFIG.build(seed=0)(model, batch, pass_keys(batch, 1))
    shown, available = model.shown[0], counted(batch)
    hidden = available & ~shown.observed
    assert hidden.sum() / available.sum() == pytest.approx(0.3, abs=0.04)
    assert not (shown.observed & ~available).any()
    assert not shown.values[~shown.observed].any()
    series = batch.inputs["vitals"]
    assert isinstance(series, SeriesInput)
    assert torch.equal(shown.values[shown.observed], series.values[shown.observed])


def test_the_error_is_the_mean_square_over_the_hidden_values_alone() -> None:
    batch, model = series_batch(), Watching(0.5)
    batch = replace(batch, weight=torch.where(torch.arange(200) < 150, 1.0, 0.0))
    terms = CONFIG.build(seed=0)(model, batch, pass_keys(batch, 1))
    hidden = counted(batch) & ~model.shown[0].observed
    series = batch.inputs["vitals"]
    assert isinstance(series, SeriesInput)
    values = series.values[hidden]
    assert terms["masked_values"].weight.item() == terms["baseline"].weight.item() == hidden.sum().item()
    assert terms["masked_values"].numerator.item() == pytest.approx((values - 0.5).square().sum().item(), rel=1e-5)
    assert terms["baseline"].numerator.item() == pytest.approx(values.square().sum().item(), rel=1e-5)
    assert terms["baseline"].scale == 0


def test_a_study_has_the_same_values_hidden_in_any_batch_and_others_in_another_epoch() -> None:
    batch = series_batch(20)
    objective = CONFIG.build(seed=0)
    models = [Watching(0.0) for _ in range(3)]
    objective(models[0], batch, pass_keys(batch, 1))
    objective(models[1], batch.rows(5, 9), pass_keys(batch.rows(5, 9), 1))
    objective(models[2], replace(batch, epoch=batch.epoch + 1), pass_keys(batch, 1))
    whole, part, later = (model.shown[0].observed for model in models)
    assert torch.equal(whole[5:9], part)
    assert not torch.equal(whole, later)


def test_saying_the_mean_explains_nothing_and_saying_the_value_everything() -> None:
    numbers = CONFIG.build(seed=0).numbers
    assert numbers({"masked_values": 0.8, "baseline": 0.8}) == {"loss": 0.8, "baseline": 0.8, "explained": 0.0}
    assert numbers({"masked_values": 0.2, "baseline": 0.8})["explained"] == pytest.approx(0.75)
    assert numbers({"masked_values": 0.0, "baseline": 0.0})["explained"] == 0.0


def test_what_is_hidden_can_be_told_from_the_rest_of_a_series_that_repeats_itself() -> None:
    """Every value of a study is its own constant; the network learns to read it off the values that are left."""
    batch = series_batch(64)
    level = torch.randn(64, 1, 1, generator=torch.Generator().manual_seed(0))
    everything = torch.ones(64, 5, 3, dtype=torch.bool)
    series = SeriesInput(level.expand(64, 5, 3).contiguous(), everything, torch.full((64,), 5))
    batch = replace(batch, inputs={**batch.inputs, "vitals": series}, present=torch.ones_like(batch.present))
    torch.manual_seed(0)
    encoder = SeriesTransformerConfig(hidden=16, heads=2, blocks=1, dropout=0.0, projection_dropout=0.0)
    net, objective = CONFIG.network(small_schema(), encoder, 16), CONFIG.build(seed=0)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(150):
        now = replace(batch, epoch=torch.full_like(batch.epoch, step))
        term = objective(net, now, pass_keys(now, 1))["masked_values"]
        optimizer.zero_grad()
        (term.numerator / term.weight).backward()
        optimizer.step()
    unseen = replace(batch, epoch=torch.full_like(batch.epoch, 1000))
    terms = objective(net, unseen, pass_keys(unseen, 1))
    assert objective.numbers({name: (term.numerator / term.weight).item() for name, term in terms.items()})["explained"] > 0.9


@pytest.mark.parametrize("config", [SeriesTransformerConfig(hidden=8, heads=2), GruConfig(hidden=8)], ids=lambda c: c.kind)
def test_the_features_that_fine_tuning_reads_are_those_that_were_trained(config: EncoderConfig) -> None:
    """The decoder reads tokens and features; the encoder's own forward is tokens, then pool."""
    batch = series_batch(6)
    torch.manual_seed(0)
    net = CONFIG.network(small_schema(), config, 16)
    assert isinstance(net, MaskedValuesNet)
    series, keys = batch.inputs["vitals"], pass_keys(batch, 3)
    assert isinstance(series, SeriesInput)
    tokens = net.encoder.tokens(series, keys)
    assert tokens.shape == (3, 6, 5, 8)
    assert torch.equal(net.encoder.pool(tokens, series, keys), net.encoder(series, keys))


def test_an_encoder_that_reads_no_series_is_refused() -> None:
    with pytest.raises(SpecError, match="tabular for vitals: expected a modality of kind table, found series"):
        CONFIG.network(small_schema(), TabularConfig(), 16)


def test_an_encoder_that_says_nothing_of_single_steps_is_refused() -> None:
    with pytest.raises(SpecError, match="expected an encoder with a token of every step"):
        CONFIG.network(small_schema(), PatchBagConfig(), 16)


def test_a_batch_without_the_series_is_refused() -> None:
    batch = series_batch(4)
    with pytest.raises(SpecError, match="objective.modality"):
        MaskedValuesConfig(modality="cxr").build(seed=0)(Watching(0.0), batch, pass_keys(batch, 1))

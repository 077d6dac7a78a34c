"""The cross-modal score: what it is by its equations, that it tells swapped pairs, and what it must not look at."""

from dataclasses import replace

import pytest
import torch
from model_inputs import small_batch, small_schema, with_absent_slots
from planted_views import NAMES, VIEWS, noisy, planted, swapped
from torch import Tensor, nn

from draf_dist.metrics.classification import auroc
from draf_dist.models.cross_modal import (
    NETS,
    WIDTH,
    CleanRows,
    Comparison,
    CrossModalScore,
    comparable,
    draw,
)
from draf_dist.models.fusion.severity_gate import SeverityGateConfig
from draf_dist.schema.batch import SeriesInput

SCHEMA = small_schema()


@pytest.fixture(scope="module")
def fitted() -> CrossModalScore:
    torch.manual_seed(0)
    score = CrossModalScore(VIEWS)
    score.fit([planted(800, seed=10)], [planted(400, seed=20)], seed=0)
    return score


def told(true: Tensor, strange: Tensor) -> float:
    """AUROC of z for strange rows against true ones."""
    values = torch.cat([true, strange]).double().numpy()
    label = torch.cat([torch.zeros(len(true)), torch.ones(len(strange))]).long().numpy()
    return auroc(torch.stack([-torch.tensor(values), torch.tensor(values)], dim=1).numpy(), label)


@pytest.mark.parametrize("column", range(3))
def test_swapped_pairs_are_told_from_true_ones(fitted: CrossModalScore, column: int) -> None:
    batch = planted(500, seed=30)
    strange = fitted(swapped(batch, NAMES[column]))
    assert told(fitted(batch)[:, column], strange[:, column]) > 0.85
    # It is the swapped one that is strange, not its neighbours.
    assert (strange.mean(0).argmax() == column).all()


def test_before_the_fit_nothing_is_strange() -> None:
    assert not CrossModalScore(VIEWS)(planted(20, seed=1)).any()


def test_one_is_what_99_of_100_clean_rows_stay_below_and_0_their_median(fitted: CrossModalScore) -> None:
    found = fitted(planted(400, seed=20))
    torch.testing.assert_close(found.median(0).values, torch.zeros(3), rtol=0.0, atol=0.02)
    torch.testing.assert_close((found < 1).float().mean(0), torch.full((3,), 0.99), rtol=0.0, atol=0.006)


def test_a_modality_alone_is_compared_with_nothing(fitted: CrossModalScore) -> None:
    batch = planted(30, seed=40)
    alone = replace(batch, present=torch.tensor([[True, False, False]]).expand(30, 3))
    assert not fitted(alone).any()
    pair = replace(batch, present=torch.tensor([[True, True, False]]).expand(30, 3))
    found = fitted(pair)
    assert found[:, :2].all()
    assert not found[:, 2].any()
    assert comparable(pair.present).sum() == 60


@pytest.mark.parametrize("filler", [float("nan"), 1e6, float("inf")])
def test_it_looks_neither_at_absent_slots_nor_at_other_rows(filler: float) -> None:
    torch.manual_seed(0)
    score = CrossModalScore(SCHEMA)
    score.fit([small_batch(SCHEMA, rows=64, seed=1)], [small_batch(SCHEMA, rows=64, seed=2)], seed=0)
    batch = small_batch(SCHEMA, seed=3)
    whole = score(batch)
    assert whole[comparable(batch.present)].any()
    assert not whole[~batch.present].any()
    assert torch.equal(score(with_absent_slots(batch, filler)), whole)
    parts = [score(batch.rows(start, stop)) for start, stop in ((0, 3), (3, 8))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)


def test_the_score_is_its_equation() -> None:
    """cs_m = w . relu(A [e * ctx, |e - ctx|]) + t cos(e, ctx) + b, ctx_m = mean over present j != m of V_mj e_j."""
    torch.manual_seed(1)
    comparison = Comparison(3)
    comparison.cosine.fill_(1.5)
    comparison.bias.fill_(-0.25)
    embedded, present = torch.randn(NETS, 2, 3, WIDTH), torch.tensor([[True, True, True], [True, False, True]])
    found = comparison(embedded, present)
    others = {(0, 0): [1, 2], (0, 1): [0, 2], (0, 2): [0, 1], (1, 0): [2], (1, 2): [0]}
    for (row, own), rest in others.items():
        for net in range(NETS):
            e = embedded[net, row, own]
            ctx = torch.stack([embedded[net, row, j] @ comparison.context[net, own, j] for j in rest]).mean(0)
            looked = (torch.cat([e * ctx, (e - ctx).abs()]) @ comparison.compare[net]).relu()
            cosine = nn.functional.cosine_similarity(e, ctx, dim=0)
            expected = (looked @ comparison.weigh[net]).squeeze() + 1.5 * cosine - 0.25
            torch.testing.assert_close(found[net, row, own], expected)


def test_the_fit_is_a_function_of_the_rows_and_the_seed() -> None:
    def state(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        score = CrossModalScore(VIEWS)
        torch.manual_seed(seed + 50)
        score.fit([planted(100, seed=10)], [planted(100, seed=20)], seed=seed)
        return score.state_dict()

    first, again, other = state(1), state(1), state(2)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["median"], other["median"])


def test_the_fit_leaves_generators_gradients_and_parameters_alone() -> None:
    score = CrossModalScore(VIEWS)
    before = torch.random.get_rng_state()
    with torch.no_grad():
        score.fit([planted(60, seed=10)], [planted(60, seed=20)], seed=0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not list(score.parameters())
    assert not any(buffer.requires_grad for buffer in score.buffers())


def test_partners_have_the_modality_and_are_never_oneself() -> None:
    batch = planted(40, seed=1)
    rows = CleanRows.of([replace(batch, present=torch.rand(40, 3, generator=torch.Generator().manual_seed(2)) < 0.6)])
    share = []
    for key in range(30):
        chosen, partners, swap = draw(rows, key)
        for column in range(3):
            assert rows.present[partners[swap[:, column], column], column].all()
        assert (rows.uid[partners] != rows.uid[chosen].unsqueeze(1))[swap].all()
        assert rows.present[chosen][swap].all()
        share.append(swap[rows.present[chosen]].float().mean())
    assert float(torch.stack(share).mean()) == pytest.approx(0.25, abs=0.02)


def test_a_fit_without_pairs_or_without_rows_says_nothing() -> None:
    score = CrossModalScore(VIEWS)
    batch = planted(30, seed=1)
    alone = replace(batch, present=torch.tensor([[True, False, False]]).expand(30, 3))
    score.fit([alone], [alone], seed=0)
    assert not score(batch).any()
    score.fit([], [], seed=0)
    assert not score(batch).any()


def test_padding_is_not_fitted_on() -> None:
    batch = planted(50, seed=3)
    padded = replace(batch, weight=(torch.arange(50) < 40).float(), uid=torch.where(torch.arange(50) < 40, batch.uid, -1))
    rows = CleanRows.of([padded])
    assert len(rows.uid) == len(rows.present) == len(rows.contents["labs"]) == 40


def test_rows_are_copied_because_a_loader_uses_its_memory_again() -> None:
    batch = planted(10, seed=3)
    rows = CleanRows.of([batch])
    before = {name: value.clone() for name, value in rows.contents.items()}
    for value in batch.inputs.values():
        assert isinstance(value, SeriesInput)
        value.values.zero_()
    batch.present.zero_()
    batch.uid.zero_()
    assert all(torch.equal(value, before[name]) for name, value in rows.contents.items())
    assert rows.present.all()
    assert rows.uid.all()


def test_noise_is_the_severity_s_business_and_the_gate_hears_both(fitted: CrossModalScore) -> None:
    """A view under noise goes badly with the others too: the two parts of the gate are not exclusive."""
    batch = planted(300, seed=50)
    assert fitted(noisy(batch, "labs", 10.0))[:, 0].median() > fitted(batch)[:, 0].quantile(0.9)


def test_nothing_of_it_is_trained_with_the_fusion() -> None:
    model = SeverityGateConfig().build(VIEWS)
    names = {name for name, _ in model.named_parameters()}
    assert not [name for name in names if name.startswith(("cross_modal", "severity"))]

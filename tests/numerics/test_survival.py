"""The losses of survival: O14, closed forms of the partial likelihood, and that training on it finds the planted effect."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from draf_dist.losses.cox import Risks, Ties, cox
from draf_dist.losses.survival import survival_nll
from draf_dist.losses.task import task_loss
from draf_dist.schema.batch import SurvivalTarget

HAZARD = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
both_ties = pytest.mark.parametrize("ties", ["efron", "breslow"])


def flags(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


def rows(log_risk: list[float] | Tensor, time: list[float], event: list[int], valid: list[int] | None = None) -> Risks:
    score = torch.as_tensor(log_risk, dtype=torch.float64)
    score = score[:, None] if score.dim() == 1 else score
    return Risks(score, torch.tensor(time), flags(event), flags(valid or [1] * len(time)))


def mean_of(risks: Risks, ties: Ties = "efron") -> float:
    term = cox(risks, ties=ties)
    return (term.numerator / term.weight).item()


def random_rows(count: int = 12, passes: int = 2, seed: int = 0) -> Risks:
    """On few levels of time, so that most events are tied."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.randint(1, 5, (count,), generator=generator).float()
    event = torch.rand(count, generator=generator) < 0.7
    score = torch.randn(count, passes, generator=generator, dtype=torch.float64)
    return Risks(score, time, event, torch.ones(count, dtype=torch.bool))


def by_hand(risks: Risks, ties: Ties) -> float:
    """The sums as they are written down, one event time after the other, mean over events and passes."""
    total, events = 0.0, int((risks.event & risks.valid).sum())
    for score in risks.log_risk.T:
        for at in risks.time[risks.event & risks.valid].unique():
            tied = risks.valid & risks.event & (risks.time == at)
            at_risk = score[risks.valid & (risks.time >= at)].exp().sum()
            d = int(tied.sum())
            for number in range(d):
                less = number / d * score[tied].exp().sum() if ties == "efron" else 0.0
                total += math.log(at_risk - less)
            total -= float(score[tied].sum())
    return total / (events * risks.log_risk.shape[1])


# The hazards of intervals.


def test_oracle_nll_of_hazards_with_and_without_an_event() -> None:
    logits = HAZARD.logit().expand(1, 2, 4)
    found = survival_nll(logits, torch.tensor([2, 2]), flags([1, 0]))
    assert found[0].tolist() == pytest.approx([1.5324769, 0.4111074], abs=1e-6)


def test_without_the_weight_it_is_the_likelihood_of_all_that_can_happen() -> None:
    """An event in one of K intervals, or none by the end: probabilities that sum to 1, whatever the logits."""
    logits = torch.randn(3, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).expand(3, 5, 4)
    found = survival_nll(logits, torch.tensor([0, 1, 2, 3, 3]), flags([1, 1, 1, 1, 0]), uncensored=0.0)
    torch.testing.assert_close((-found).exp().sum(1), torch.ones(3, dtype=torch.float64))


def test_an_event_teaches_nothing_about_later_intervals() -> None:
    logits = HAZARD.logit()[None, None].clone().requires_grad_()
    survival_nll(logits, torch.tensor([1]), flags([1])).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 0].tolist() == pytest.approx([0.1, 0.2 - 1, 0, 0])


def test_gradients_of_the_hazards_are_right() -> None:
    logits = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    interval, event = torch.tensor([0, 3, 2, 1, 3]), flags([1, 0, 1, 0, 1])
    assert torch.autograd.gradcheck(lambda values: survival_nll(values, interval, event), (logits,))


def test_sure_hazards_cost_a_finite_number_of_nats() -> None:
    found = survival_nll(torch.full((1, 2, 3), 80.0), torch.tensor([2, 2]), flags([1, 0]))
    assert found[0].tolist() == pytest.approx([160, 0.6 * 240])


def test_half_precision_does_not_coarsen_a_sum_over_many_intervals() -> None:
    logits = torch.full((1, 1, 200), -3.0)
    exact = survival_nll(logits, torch.tensor([199]), flags([0]))
    assert survival_nll(logits.bfloat16(), torch.tensor([199]), flags([0])).item() == exact.item()


def test_a_study_of_which_nothing_is_known_counts_nothing() -> None:
    target = SurvivalTarget(torch.tensor([3.0, 0.0]), flags([1, 0]), torch.tensor([2, 0]), flags([1, 0]))
    logits = HAZARD.logit().float().expand(1, 2, 4)
    term = task_loss(logits, target, torch.ones(2))
    assert (term.numerator.item(), term.weight.item()) == (pytest.approx(1.5324769, abs=1e-5), 1.0)


# The partial likelihood.


@both_ties
def test_three_events_in_a_row(ties: Ties) -> None:
    s = (0.5, -0.2, 1.0)
    expected = math.log(sum(map(math.exp, s))) - s[0] + math.log(math.exp(s[1]) + math.exp(s[2])) - s[1]
    assert mean_of(rows([*s], [1, 2, 3], [1, 1, 1]), ties) == pytest.approx(expected / 3)


@both_ties
def test_equal_risks_give_the_log_of_the_number_at_risk(ties: Ties) -> None:
    assert mean_of(rows([0.3] * 4, [1, 2, 3, 4], [1, 1, 0, 1]), ties) == pytest.approx(math.log(4 * 3 * 1) / 3)


def test_ties_by_hand() -> None:
    """Two of four die at once: both before the other in Efron's mean, both of all four in Breslow's."""
    tied = rows([0.0] * 4, [2, 2, 5, 5], [1, 1, 0, 0])
    assert mean_of(tied, "breslow") == pytest.approx(math.log(4))
    assert mean_of(tied, "efron") == pytest.approx((math.log(4) + math.log(3)) / 2)


@both_ties
@pytest.mark.parametrize("seed", range(5))
def test_sums_as_they_are_written_down(ties: Ties, seed: int) -> None:
    risks = random_rows(seed=seed)
    assert mean_of(risks, ties) == pytest.approx(by_hand(risks, ties), rel=1e-12)


def test_efron_lies_between_breslow_and_the_exact_likelihood_of_the_orders() -> None:
    """Kalbfleisch and Prentice average over the orders in which tied events may have come."""
    risks = random_rows(8, passes=1, seed=3)
    score = risks.log_risk[:, 0]
    exact = 0.0
    for at in risks.time[risks.event].unique():
        tied = torch.nonzero(risks.event & (risks.time == at))[:, 0].tolist()
        others = float(score[risks.time >= at].exp().sum()) - float(score[tied].exp().sum())
        orders = list(itertools.permutations([math.exp(float(score[i])) for i in tied]))
        chances = [math.prod(order[k] / (others + sum(order[k:])) for k in range(len(order))) for order in orders]
        exact -= math.log(sum(chances) / math.factorial(len(tied)))
    exact /= int(risks.event.sum())
    efron, breslow = mean_of(risks, "efron"), mean_of(risks, "breslow")
    assert abs(efron - exact) < 0.2 * abs(breslow - exact)
    assert efron < breslow


@both_ties
def test_gradients_are_right(ties: Ties) -> None:
    risks = random_rows(7)
    score = risks.log_risk.requires_grad_()

    def loss(values: Tensor) -> Tensor:
        return cox(Risks(values, risks.time, risks.event, risks.valid), ties=ties).numerator

    assert torch.autograd.gradcheck(loss, (score,))


@both_ties
def test_rows_that_are_not_valid_change_neither_value_nor_gradient(ties: Ties) -> None:
    plain = random_rows(6)
    nan = torch.full((2, 2), float("nan"), dtype=torch.float64)
    padded = Risks(
        torch.cat([plain.log_risk, nan]).requires_grad_(),
        torch.cat([plain.time, torch.tensor([float("nan"), 9.0])]),
        torch.cat([plain.event, flags([1, 1])]),
        flags([1] * 6 + [0] * 2),
    )
    alone = Risks(plain.log_risk.requires_grad_(), plain.time, plain.event, plain.valid)
    one, other = cox(alone, ties=ties), cox(padded, ties=ties)
    assert one.weight == other.weight == alone.event.sum()
    torch.testing.assert_close(other.numerator, one.numerator, rtol=1e-12, atol=0)
    (mine,), (theirs,) = (torch.autograd.grad(term.numerator, risks.log_risk) for term, risks in ((one, alone), (other, padded)))
    torch.testing.assert_close(theirs[:6], mine)
    assert not theirs[6:].any()


@both_ties
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_not_even_what_is_masked_later_is_nan(ties: Ties) -> None:
    """Of a padding row nobody is at risk, nor is anyone tied with it: log 0."""
    risks = rows([0.1, 0.2, 0.3], [1, 1, float("nan")], [1, 0, 1], [1, 1, 0])
    score = risks.log_risk.requires_grad_()
    with torch.autograd.detect_anomaly(check_nan=True):
        cox(risks, ties=ties).numerator.backward()
    assert score.grad is not None
    assert torch.isfinite(score.grad).all()


@both_ties
def test_a_batch_without_an_event_is_zero_with_a_gradient(ties: Ties) -> None:
    risks = rows([1.0, 2.0], [1, 2], [0, 0])
    score = risks.log_risk.requires_grad_()
    term = cox(risks, ties=ties)
    assert (term.numerator.item(), term.weight.item()) == (0.0, 0.0)
    term.numerator.backward()
    assert score.grad is not None
    assert not score.grad.any()


@both_ties
def test_only_the_order_of_times_and_the_differences_of_risks_count(ties: Ties) -> None:
    risks = random_rows()
    moved = Risks(risks.log_risk + 3, risks.time.square() * 7, risks.event, risks.valid)
    assert mean_of(moved, ties) == pytest.approx(mean_of(risks, ties))


@both_ties
def test_large_risks_overflow_nothing(ties: Ties) -> None:
    risks = rows([500.0, -500.0, 500.0], [1, 1, 2], [1, 1, 0])
    score = risks.log_risk.float().requires_grad_()
    term = cox(Risks(score, risks.time, risks.event, risks.valid), ties=ties)
    term.numerator.backward()
    assert score.grad is not None
    assert torch.isfinite(score.grad).all()
    assert torch.isfinite(term.numerator)


def test_autocast_does_not_coarsen_it() -> None:
    risks = random_rows()
    wide = Risks(risks.log_risk.float(), risks.time, risks.event, risks.valid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = cox(wide).numerator
    assert inside.dtype is torch.float32
    assert inside.item() == cox(wide).numerator.item()


def fitted_effect(x: Tensor, time: Tensor, event: Tensor, ties: Ties) -> float:
    """The minimum over b of the loss of b x."""
    effect = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([effect], max_iter=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        term = cox(Risks((effect * x)[:, None], time, event, torch.ones(len(x), dtype=torch.bool)), ties=ties)
        loss = term.numerator / term.weight
        loss.backward()
        return loss

    optimizer.step(closure)
    return effect.item()


def test_its_minimum_is_the_planted_effect_and_with_many_ties_efrons_alone() -> None:
    """h(t) = exp(.8 x) h_0, a third of the times censored."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(800, generator=generator, dtype=torch.float64)
    died = torch.empty(800, dtype=torch.float64).exponential_(generator=generator) / (0.8 * x).exp()
    seen = torch.empty(800, dtype=torch.float64).exponential_(0.5, generator=generator)
    time, event = torch.minimum(died, seen), died <= seen
    exact = {ties: fitted_effect(x, time, event, ties) for ties in ("efron", "breslow")}
    assert exact["efron"] == pytest.approx(exact["breslow"], abs=1e-6)
    # Its standard error is about 1 / sqrt(number of events) = .045.
    assert exact["efron"] == pytest.approx(0.8, abs=3 / math.sqrt(int(event.sum())))
    tied = {ties: fitted_effect(x, torch.ceil(time * 10), event, ties) for ties in ("efron", "breslow")}
    assert abs(tied["efron"] - exact["efron"]) < 0.02
    assert tied["breslow"] < exact["efron"] - 0.05

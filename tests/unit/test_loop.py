"""The loop: one step per batch, losses that do not depend on how a batch is cut."""

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from draf_dist.errors import DrafError
from draf_dist.losses.gather import Embeddings
from draf_dist.schema.batch import Batch, ClassTarget, Term
from draf_dist.training.backend import EngineFiles
from draf_dist.training.fragments import HostCopy, WholeTensors
from draf_dist.training.job import OptimizerConfig
from draf_dist.training.loop import StepReport, StepRules, micro_batches, train_steps
from draf_dist.training.schedule import EarlyStopping
from draf_dist.training.state import TrainState
from draf_dist.training.torch_engine import OneProcess, TorchEngine

NUM_FEATURES = 5


def batch_of(rows: int, step: int, padding: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, NUM_FEATURES, generator=generator)
    weight = torch.ones(rows)
    weight[rows - padding :] = 0
    uid = torch.where(weight > 0, torch.arange(rows) + 100 * step, -1)
    flags = torch.zeros(rows, 1, dtype=torch.bool)
    zeros = torch.zeros(rows, 1)
    label = (x.sum(1) > 0).long()
    target = ClassTarget(label, torch.ones(rows, dtype=torch.bool))
    corrupted = torch.rand(rows, 1, generator=generator) < 0.3
    integers = torch.zeros(rows, dtype=torch.int64)
    return Batch(("x",), {"x": x}, ~flags, corrupted, zeros, zeros, flags, target, integers, uid, integers + step // 3, weight)


def objective(model: nn.Module, batch: Batch, keys: Tensor) -> dict[str, Term]:
    x = batch.inputs["x"]
    assert isinstance(x, Tensor)
    logits = model(x) + 0 * keys.sum()
    rows = nn.functional.cross_entropy(logits, batch.target.label, reduction="none")
    picked = batch.corrupted[:, 0].float() * batch.weight
    penalty = logits.pow(2).sum(1)
    return {
        "task": Term((rows * batch.weight).sum(), batch.weight.sum()),
        "extra": Term((penalty * picked).sum(), picked.sum(), scale=0.1),
    }


RULES = StepRules(prepare=lambda batch: batch, keys=lambda batch: batch.uid[None], learning_rate=lambda step: 0.01)


def new_module() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(NUM_FEATURES, 8), nn.Tanh(), nn.Linear(8, 2))


def train(
    batches: list[Batch], rules: StepRules = RULES, optimizer: OptimizerConfig | None = None
) -> tuple[list[StepReport], dict[str, Tensor]]:
    module = new_module()
    engine, files = OneProcess().start(module, optimizer or OptimizerConfig())
    state = TrainState(0, EarlyStopping(patience=1))
    reports = list(train_steps(state, engine, enumerate(batches), objective, rules))
    assert state.step == len(batches)
    return reports, module.state_dict()


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("accumulation", [2, 3, 7])
def test_accumulation_changes_neither_losses_nor_weights(accumulation: int) -> None:
    batches = [batch_of(7, step, padding=step % 3) for step in range(12)]
    once, weights_once = train(batches)
    parts, weights_parts = train(batches, replace(RULES, accumulation=accumulation))
    for a, b in zip(once, parts, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-6)
        assert a.terms == pytest.approx(b.terms, rel=1e-5)
    assert_close(weights_once, weights_parts)


def test_padding_rows_change_nothing() -> None:
    plain = [batch_of(6, step) for step in range(5)]
    padded = [_padded(batch) for batch in plain]
    reports_plain, weights_plain = train(plain)
    reports_padded, weights_padded = train(padded)
    assert [r.samples for r in reports_padded] == [r.samples for r in reports_plain] == [6] * 5
    assert_close(weights_plain, weights_padded)


def test_the_loss_equals_plain_torch() -> None:
    batch = batch_of(6, 1)
    reports, _ = train([batch])
    module = new_module()
    expected = nn.functional.cross_entropy(module(batch.inputs["x"]), batch.target.label)
    assert reports[0].terms["task"] == pytest.approx(expected.item(), rel=1e-6)
    assert reports[0].loss == pytest.approx(reports[0].terms["task"] + 0.1 * reports[0].terms["extra"], rel=1e-12)


class Meeting:
    """An all-reduce between threads: what ranks do, without processes."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=30)
        self.values: dict[int, Tensor] = {}

    def reduce(self, rank: int, values: Tensor) -> Tensor:
        self.values[rank] = values
        self.barrier.wait()
        total = torch.stack([self.values[r] for r in sorted(self.values)]).sum(0)
        self.barrier.wait()
        return total


class RankEngine(TorchEngine):
    """Sums gradients over the ranks of a meeting before it steps."""

    def __init__(self, module: nn.Module, meeting: Meeting, rank: int) -> None:
        config = OptimizerConfig()
        optimizer = torch.optim.AdamW(module.parameters(), weight_decay=config.weight_decay)
        super().__init__(module, optimizer, clip_norm=config.clip_norm)
        self.meeting, self.rank = meeting, rank

    def step(self, learning_rate: float) -> float:
        for parameter in self.module.parameters():
            assert parameter.grad is not None
            parameter.grad = self.meeting.reduce(self.rank, parameter.grad)
        return super().step(learning_rate)


@pytest.mark.parametrize("cuts", [(0, 4, 7), (0, 1, 3, 7)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_of_unequal_size_equal_one_process(cuts: tuple[int, ...], accumulation: int) -> None:
    """Every rank divides by the global weight and gradients are summed; the corrupted rows lie unevenly."""
    batches = [batch_of(7, step, padding=step % 2) for step in range(8)]
    expected, expected_weights = train(batches)
    world = len(cuts) - 1
    meeting = Meeting(world)

    def rank_run(rank: int) -> tuple[list[StepReport], nn.Module]:
        mine = [batch.rows(cuts[rank], cuts[rank + 1]) for batch in batches]
        rules = replace(RULES, reduce=lambda values: meeting.reduce(rank, values), accumulation=accumulation)
        engine = RankEngine(modules[rank], meeting, rank)
        return list(train_steps(TrainState(0, EarlyStopping(patience=1)), engine, enumerate(mine), objective, rules)), engine.module

    modules = [new_module() for _ in range(world)]
    with ThreadPoolExecutor(world) as pool:
        ranks = list(pool.map(rank_run, range(world)))
    for reports, module in ranks:
        assert [r.loss for r in reports] == pytest.approx([r.loss for r in expected], rel=1e-6)
        assert_close(expected_weights, module.state_dict())
    assert sum(reports[0].samples for reports, _ in ranks) == expected[0].samples


class Spread:
    """A coupled objective with a closed form: the variance of the outputs of all valid rows; other rows hold NaN."""

    def __init__(self) -> None:
        self.coupled = 0

    def embed(self, model: nn.Module, batch: Batch, keys: Tensor) -> tuple[Embeddings, dict[str, Term]]:
        x = batch.inputs["x"]
        assert isinstance(x, Tensor)
        valid = batch.weight > 0
        rows = torch.where(valid[:, None], model(x), math.nan)
        return Embeddings(rows, rows.square(), batch.uid, valid), {"extra": objective(model, batch, keys)["extra"]}

    def couple(self, rows: Embeddings) -> dict[str, Term]:
        self.coupled += 1
        first, second = (torch.where(rows.valid[:, None], view, 0.0).sum() for view in (rows.first, rows.second))
        num = rows.valid.sum()
        return {"spread": Term(second - first.square() / num, num.float())}


def variance_and_gradient(batch: Batch) -> tuple[float, Tensor]:
    """By plain torch on the whole batch, with the term that is a sum over rows."""
    module, x = new_module(), batch.inputs["x"]
    assert isinstance(x, Tensor)
    valid = batch.weight > 0
    outputs = module(x)[valid]
    extra = objective(module, batch, batch.uid[None])["extra"]
    loss = (outputs.square().sum() - outputs.sum().square() / valid.sum()) / valid.sum() + 0.1 * extra.numerator / extra.weight
    return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])


@pytest.mark.parametrize("accumulation", [1, 2, 3, 9])
def test_a_term_that_couples_rows_is_taken_over_the_whole_batch(accumulation: int) -> None:
    batch = batch_of(7, 3, padding=2)
    expected, gradient = variance_and_gradient(batch)
    spread, counted = Spread(), CountingEngine(new_module(), torch.optim.SGD([torch.zeros(1)]), clip_norm=None)
    rules = replace(RULES, accumulation=accumulation)
    (report,) = train_steps(TrainState(0, EarlyStopping(patience=1)), counted, [(0, batch)], spread, rules)
    assert report.loss == pytest.approx(expected, rel=1e-6)
    assert report.terms["spread"] + 0.1 * report.terms["extra"] == pytest.approx(report.loss, rel=1e-9)
    found = torch.cat([p.grad.flatten() for p in counted.module.parameters() if p.grad is not None])
    assert (found - gradient).norm() < 1e-5 * gradient.norm()
    assert (counted.num_backward, spread.coupled) == (accumulation, 1)


class CountingEngine(TorchEngine):
    """Counts, and keeps the gradient: its optimizer knows no parameter of the module."""

    num_backward = 0

    def backward(self, loss: Tensor) -> None:
        self.num_backward += 1
        super().backward(loss)


def test_a_loss_that_is_no_number_stops_the_run_before_the_step() -> None:
    broken = batch_of(6, 0)
    broken = replace(broken, inputs={"x": torch.full((6, NUM_FEATURES), math.inf)})
    with pytest.raises(DrafError, match=r"step 2: expected a finite loss, found nan\. Lower optimizer\.learning_rate"):
        train([batch_of(6, 0), broken])


def test_a_gradient_that_is_no_number_stops_the_run() -> None:
    def steep(model: nn.Module, batch: Batch, keys: Tensor) -> dict[str, Term]:
        parameter = next(model.parameters())
        # sqrt has an infinite slope at 0.
        return {"task": Term((parameter * 0).abs().sqrt().sum(), torch.ones(()))}

    engine, _ = OneProcess().start(new_module(), OptimizerConfig())
    with pytest.raises(DrafError, match="step 1: expected a finite gradient"):
        next(train_steps(TrainState(0, EarlyStopping(patience=1)), engine, [(0, batch_of(2, 0))], steep, RULES))


def test_clipping_happens_only_where_the_job_asks_for_it() -> None:
    batches = [batch_of(6, 0)]
    free, _ = train(batches)
    clipped, _ = train(batches, optimizer=OptimizerConfig(clip_norm=1e-3))
    assert free[0].gradient_norm == pytest.approx(clipped[0].gradient_norm)
    assert free[0].gradient_norm > 1e-3


def first_moment(files: EngineFiles) -> float:
    (found,) = (each.values for each in files.fragments() if each.key == "exp_avg/weight@0")
    return float(found)


def test_clipping_bounds_the_gradient_that_is_applied() -> None:
    module = nn.Linear(1, 1, bias=False)
    engine, files = OneProcess().start(module, OptimizerConfig(clip_norm=0.5, weight_decay=0.0))
    engine.backward((module.weight * 3.0).sum())
    assert engine.step(0.0) == pytest.approx(3.0)
    assert first_moment(files) == pytest.approx(0.1 * 0.5)


def test_weight_decay_shrinks_weights_without_entering_the_moments() -> None:
    module = nn.Linear(1, 1, bias=False)
    before = float(module.weight.detach())
    engine, files = OneProcess().start(module, OptimizerConfig(weight_decay=0.1))
    engine.backward((module.weight * 0.0).sum())
    engine.step(0.5)
    assert float(module.weight.detach()) == pytest.approx(before * (1 - 0.5 * 0.1))
    assert first_moment(files) == 0.0


class WarmUp:
    """The task, and the extra term from the third step on."""

    def at(self, step: int) -> Any:
        def now(model: nn.Module, batch: Batch, keys: Tensor) -> dict[str, Term]:
            terms = objective(model, batch, keys)
            return terms | {"extra": replace(terms["extra"], scale=0.1 * (step >= 2))}

        return now


def test_an_objective_may_follow_the_step_and_a_run_that_goes_on_does_the_same() -> None:
    batches = [batch_of(8, step) for step in range(4)]

    def losses(first: int, engine: TorchEngine, state: TrainState) -> list[float]:
        return [report.loss for report in train_steps(state, engine, enumerate(batches[first:], first), WarmUp(), RULES)]

    engine, _ = OneProcess().start(new_module(), OptimizerConfig())
    state = TrainState(0, EarlyStopping(patience=1))
    assert isinstance(engine, TorchEngine)
    reports = list(train_steps(state, engine, enumerate(batches), WarmUp(), RULES))
    extra = [report.loss - report.terms["task"] for report in reports]
    assert extra[:2] == [0, 0]
    assert extra[2:] == pytest.approx([0.1 * report.terms["extra"] for report in reports[2:]])
    resumed, _ = OneProcess().start(new_module(), OptimizerConfig())
    assert isinstance(resumed, TorchEngine)
    with torch.no_grad():
        for mine, theirs in zip(resumed.module.parameters(), engine.module.parameters(), strict=True):
            mine.copy_(theirs)
    later = losses(3, resumed, TrainState(3, EarlyStopping(patience=1)))
    terms = objective(engine.module, batches[3], RULES.keys(batches[3]))
    assert later == pytest.approx([sum((0.1 if n == "extra" else 1) * (t.numerator / t.weight).item() for n, t in terms.items())])


def test_reports_say_what_was_consumed() -> None:
    reports, _ = train([batch_of(4, step, padding=1) for step in range(4)])
    assert [report.step for report in reports] == [1, 2, 3, 4]
    assert all(report.samples == 3 for report in reports)
    assert reports[2].uids.tolist() == [200, 201, 202, -1]
    assert reports[3].epochs.tolist()[:3] == [1, 1, 1]


def test_a_loader_at_another_position_is_refused() -> None:
    engine, files = OneProcess().start(nn.Linear(NUM_FEATURES, 2), OptimizerConfig())
    state = TrainState(5, EarlyStopping(patience=1))
    with pytest.raises(ValueError, match="the loader is at step 4, the optimizer at 5"):
        next(train_steps(state, engine, [(4, batch_of(2, 0))], objective, RULES))


def test_micro_batches_differ_by_at_most_one_row_and_cover_the_batch() -> None:
    sizes = [part.num_rows for part in micro_batches(batch_of(11, 0), 4)]
    assert sum(sizes) == 11
    assert max(sizes) - min(sizes) <= 1


def _padded(batch: Batch) -> Batch:
    def pad(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, torch.zeros_like(tensor[:2])])

    longer = batch.map(pad)
    return replace(longer, uid=torch.cat([batch.uid, torch.full((2,), -1)]))


def batches_from(start: int, stop: int) -> Iterator[tuple[int, Batch]]:
    return ((step, batch_of(6, step)) for step in range(start, stop))


def test_engine_state_restores_bit_for_bit() -> None:
    backend = OneProcess()
    whole, whole_state = nn.Linear(NUM_FEATURES, 2), TrainState(0, EarlyStopping(patience=1))
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    engine, files = backend.start(whole, OptimizerConfig())
    losses = [report.loss for report in train_steps(whole_state, engine, batches_from(0, 10), objective, RULES)]

    first = nn.Linear(NUM_FEATURES, 2)
    first.load_state_dict(start)
    engine, files = backend.start(first, OptimizerConfig())
    half = TrainState(0, EarlyStopping(patience=1))
    before = [report.loss for report in train_steps(half, engine, batches_from(0, 4), objective, RULES)]
    saved = WholeTensors([HostCopy().take(files.fragments())], "here")

    second = nn.Linear(NUM_FEATURES, 2)
    engine, files = backend.start(second, OptimizerConfig())
    files.load(saved)
    after = [report.loss for report in train_steps(half, engine, batches_from(4, 10), objective, RULES)]
    assert before + after == losses
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())

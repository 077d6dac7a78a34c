"""Every fusion model reads a table with categorical variables; those that read numbers alone see indicators in place of codes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from fusion_members import SMALL
from model_inputs import pass_keys, small_batch, small_schema, with_absent_slots
from torch import nn

from draf_dist.models.build import build_model
from draf_dist.models.cross_modal import CrossModalScore
from draf_dist.models.severity import Severity
from draf_dist.schema.batch import Batch, SeriesInput
from draf_dist.schema.categories import batch_as_numbers
from draf_dist.schema.modality import DataSchema, TableSpec, VariableSpec

LABS = (
    VariableSpec(name="age"),
    VariableSpec.categorical("ward", ("medicine", "surgery", "heart")),
    VariableSpec(name="sex", type="binary"),
    VariableSpec.categorical("source", ("home", "hospital")),
)
SPREAD = tuple(VariableSpec(name=name, type="binary") for name in ("ward0", "ward1", "ward2", "sex", "home", "hospital"))


def schema(variables: tuple[VariableSpec, ...]) -> DataSchema:
    plain = small_schema(num_classes=3)
    return plain.model_copy(update={"modalities": (*plain.modalities[:2], TableSpec(name="labs", variables=variables))})


CODED, AS_NUMBERS = schema(LABS), schema((LABS[0], *SPREAD))


def coded_batch(rows: int = 8, seed: int = 0) -> Batch:
    batch = small_batch(CODED, rows, seed)
    labs = batch.inputs["labs"]
    assert isinstance(labs, SeriesInput)
    generator = torch.Generator().manual_seed(seed + 1)
    values = labs.values.clone()
    for column, count in ((1, 3), (2, 2), (3, 2)):
        values[..., column] = torch.randint(0, count, (rows, 1), generator=generator).float()
    values = torch.where(labs.observed, values, 0.0)
    return replace(batch, inputs={**batch.inputs, "labs": SeriesInput(values, labs.observed, labs.length)})


def built(config: Any, data: DataSchema) -> nn.Module:
    return build_model(config, data, seed=3).eval()


@pytest.mark.parametrize("config", [member.config for member in SMALL.values()], ids=lambda config: config.kind)
def test_every_model_reads_codes_whatever_stands_where_nothing_was_measured(config: Any) -> None:
    batch = coded_batch()
    keys = pass_keys(batch)
    model = built(config, CODED)
    logits = model(batch, keys).logits
    assert torch.isfinite(logits).all()
    assert torch.equal(logits, model(with_absent_slots(batch, float("nan")), keys).logits)


@pytest.mark.parametrize("kind", SMALL)
def test_another_category_is_another_answer(kind: str) -> None:
    batch = coded_batch()
    batch = replace(batch, present=torch.ones_like(batch.present))
    labs = batch.inputs["labs"]
    assert isinstance(labs, SeriesInput)
    observed = torch.ones_like(labs.observed)
    wards = [labs.values.clone() for _ in range(3)]
    for ward, values in enumerate(wards):
        values[..., 1] = ward
    found = []
    for values in wards:
        changed = replace(batch, inputs={**batch.inputs, "labs": SeriesInput(values, observed, torch.ones_like(labs.length))})
        model = built(SMALL[kind].config, CODED)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        found.append(model(changed, pass_keys(batch)).logits)
    assert all(not torch.equal(found[i], found[j]) for i, j in ((0, 1), (1, 2), (0, 2)))


@pytest.mark.parametrize(("kind", "options"), [("early", {}), ("early", {"observed_bits": True}), ("healnet", {})])
def test_codes_are_read_as_their_indicators_would_be(kind: str, options: dict[str, bool]) -> None:
    config = SMALL[kind].config.model_copy(update=options)
    batch = coded_batch()
    spread = batch_as_numbers(CODED, batch)
    keys = pass_keys(batch)
    assert torch.equal(built(config, CODED)(batch, keys).logits, built(config, AS_NUMBERS)(spread, keys).logits)


def test_severity_and_the_cross_modal_score_are_fitted_on_indicators() -> None:
    clean = [replace(coded_batch(64, seed), uid=torch.arange(64) + 64 * seed) for seed in range(3)]
    clean = [replace(batch, corrupted=torch.zeros_like(batch.corrupted)) for batch in clean]
    spread = [batch_as_numbers(CODED, batch) for batch in clean]
    answers = []
    for data, batches in ((CODED, clean), (AS_NUMBERS, spread)):
        torch.manual_seed(0)
        score, severity = CrossModalScore(data), Severity(data)
        score.fit(batches[:2], batches[2:], seed=0)
        severity.measures["m_labs"].fit(_vectors(severity, data, batches))
        answers.append((score(batches[2]), severity.energy("labs", _labs(batches[2]))))
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.abs().sum() > 0


def _labs(batch: Batch) -> SeriesInput:
    labs = batch.inputs["labs"]
    assert isinstance(labs, SeriesInput)
    return labs


def _vectors(severity: Severity, data: DataSchema, batches: list[Batch]) -> Any:
    from draf_dist.models.severity import Vectors, clean_vectors

    return Vectors(*(torch.cat(part) for part in zip(*clean_vectors(data, batches)["labs"], strict=True)))

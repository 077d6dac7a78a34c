"""Columns that hold codes: a vector for each, one for what is not known, and no column that is a number."""

import pytest
import torch
from model_inputs import variables
from torch import Tensor
from torch.nn import functional

from draf_dist import noise
from draf_dist.errors import SpecError
from draf_dist.models.encoders.genomics import GenomicsConfig
from draf_dist.models.encoders.tabular import CodeEmbedding, TabularConfig
from draf_dist.models.mc import name_streams
from draf_dist.schema.batch import SeriesInput
from draf_dist.schema.modality import TableSpec, VariableSpec

NAMES = ["age", "ward", "sodium", "sex"]
CODES = {"sex": 2, "ward": 3}


def embedding() -> CodeEmbedding:
    torch.manual_seed(0)
    return CodeEmbedding(NAMES, CODES, 4)


def test_each_column_has_its_own_vectors_and_the_others_stay_as_they_are() -> None:
    codes = embedding()
    row = codes(torch.tensor([[70.0, 2.0, -1.5, 0.0]]), torch.tensor([[True, True, False, True]]))
    # The table: of ward "not known", 0, 1, 2; of sex "not known", 0, 1.
    expected = torch.cat([torch.tensor([70.0, -1.5, 1.0, 0.0]), codes.table.weight[3], codes.table.weight[5]])
    assert torch.equal(row[0], expected)
    assert codes.table.weight.shape == (7, 4)


@pytest.mark.parametrize(("code", "observed"), [(1.0, False), (-1.0, True), (3.0, True), (0.5, True), (1e30, True)])
def test_what_is_no_code_of_the_column_is_not_known(code: float, observed: bool) -> None:
    codes = embedding()
    row = codes(torch.tensor([[70.0, code, 0.0, 1.0]]), torch.tensor([[True, observed, True, True]]))
    assert torch.equal(row[0, 4:8], codes.table.weight[0])


def test_codes_in_another_order_can_be_learned_alike() -> None:
    """The encoder sees names, not numbers: renamed codes with renamed vectors give the same features."""
    spec = TableSpec(name="history", variables=coded(NAMES, CODES))
    torch.manual_seed(0)
    encoder = TabularConfig(codes=CODES, embedding=4).build(spec, 8)
    name_streams(encoder)
    values = torch.tensor([[0.1, 0.0, 0.2, 1.0], [0.1, 1.0, 0.2, 1.0], [0.1, 2.0, 0.2, 1.0]]).unsqueeze(1)
    before = encoder(of(values), keys(2, 3))
    renamed = values.clone()
    renamed[:, :, 1] = 2 - values[:, :, 1]
    assert encoder.codes is not None
    with torch.no_grad():
        encoder.codes.table.weight[1:4] = encoder.codes.table.weight[1:4].flip(0)
    torch.testing.assert_close(encoder(of(renamed), keys(2, 3)), before)


def test_the_state_of_an_encoder_holds_parameters_alone() -> None:
    spec = TableSpec(name="history", variables=coded(NAMES, CODES))
    encoder = TabularConfig(codes=CODES).build(spec, 8)
    assert list(encoder.state_dict()) == [name for name, _ in encoder.named_parameters()]
    plain = TabularConfig().build(spec, 8)
    assert set(encoder.state_dict()) - set(plain.state_dict()) == {"codes.table.weight"}


def test_a_table_without_codes_is_stored_as_it_always_was() -> None:
    assert set(TabularConfig().model_dump()) == {"kind", "hidden", "dropout", "projection_dropout"}
    config = TabularConfig(codes=CODES, embedding=4)
    assert TabularConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("codes", "problem"),
    [
        ({"wards": 3}, "codes: expected columns of the table, found 'wards'. Did you mean 'ward'"),
        ({"age": 3}, "expected columns that are no numbers, found age, numeric"),
    ],
)
def test_columns_that_hold_no_codes_are_refused(codes: dict[str, int], problem: str) -> None:
    with pytest.raises(SpecError, match=problem):
        TabularConfig(codes=codes).build(TableSpec(name="history", variables=coded(NAMES, CODES)), 8)


CATEGORICAL = TableSpec(
    name="history",
    variables=(
        VariableSpec(name="age"),
        VariableSpec.categorical("ward", ("medicine", "surgery", "heart")),
        VariableSpec(name="sodium"),
        VariableSpec(name="sex", type="binary"),
    ),
)


def test_categorical_columns_of_the_release_are_embedded_without_being_named() -> None:
    named = TableSpec(name="history", variables=coded(NAMES, CODES))
    torch.manual_seed(0)
    by_job = TabularConfig(codes={"ward": 3}).build(named, 8)
    torch.manual_seed(0)
    by_release = TabularConfig().build(CATEGORICAL, 8)
    name_streams(by_job)
    name_streams(by_release)
    values = torch.tensor([[70.0, 2.0, -1.5, 0.0], [70.0, 0.0, -1.5, 1.0]]).unsqueeze(1)
    assert torch.equal(by_job(of(values), keys(2, 2)), by_release(of(values), keys(2, 2)))
    # Naming it beside the release, or another column, is allowed; another number of codes is not.
    both = TabularConfig(codes=CODES).build(CATEGORICAL, 8)
    assert both.codes is not None
    assert both.codes.table.weight.shape == (7, 8)
    with pytest.raises(SpecError, match="expected 5 codes, found ward, of 3 categories"):
        TabularConfig(codes={"ward": 5}).build(CATEGORICAL, 8)


def test_a_network_of_numbers_refuses_codes() -> None:
    with pytest.raises(
        SpecError, match=r"genomics for history: expected numbers alone, found categorical ward\. Read the table with"
    ):
        GenomicsConfig().build(CATEGORICAL, 8)


def test_what_no_order_of_codes_separates_is_learned() -> None:
    """The planted truth: ill are wards 0 and 2 and not 1 and 3; no threshold on the code tells them apart."""
    spec = TableSpec(name="history", variables=(VariableSpec.categorical("ward", tuple("abcd")), VariableSpec(name="age")))
    generator = torch.Generator().manual_seed(0)
    ward = torch.randint(0, 4, (400,), generator=generator)
    values = torch.stack([ward.float(), torch.randn(400, generator=generator)], dim=1).unsqueeze(1)
    target = (ward % 2 == 0).float()
    torch.manual_seed(0)
    encoder = TabularConfig(hidden=16).build(spec, 8)
    name_streams(encoder)
    head = torch.nn.Linear(8, 1)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=0.02)
    for _ in range(60):
        loss = functional.binary_cross_entropy_with_logits(head(encoder(of(values), keys(1, 400)))[0, :, 0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = head(encoder(of(values), keys(1, 400)))[0, :, 0] > 0
    assert float((found == target.bool()).float().mean()) > 0.98
    assert float(torch.corrcoef(torch.stack([ward.float(), target]))[0, 1].abs()) < 0.6


def coded(names: list[str], codes: dict[str, int]) -> tuple[object, ...]:
    """Variables by these names; those with codes are none that is standardised."""
    return tuple(
        variable.model_copy(update={"name": name, "type": "binary" if name in codes else "numeric"})
        for name, variable in zip(names, variables(len(names)), strict=True)
    )


def of(values: Tensor) -> SeriesInput:
    return SeriesInput(values, torch.ones_like(values, dtype=torch.bool), torch.ones(len(values), dtype=torch.int64))


def keys(passes: int, rows: int) -> Tensor:
    return noise.sample_keys(0, "model", None, torch.arange(rows), passes)

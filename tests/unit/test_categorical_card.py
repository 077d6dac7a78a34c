"""Categorical columns of a card: words to codes, what is no category, what a card may not say, and the stored form."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from draf_dist.config.spec import apply_overrides, parse_yaml, validate_spec
from draf_dist.data.encode import UnfitError, encode_study, in_range
from draf_dist.data.loader import evaluation_batches
from draf_dist.data.normalise import Normaliser
from draf_dist.data.prepare import prepare
from draf_dist.data.training_sums import training_sums
from draf_dist.errors import DataError, SpecError
from draf_dist.schema.batch import SeriesInput
from draf_dist.schema.modality import SeriesSpec, TableSpec, VariableSpec
from draf_dist.schema.study import Study
from draf_dist.sources.card import Card
from draf_dist.sources.delivery import card_of_sites
from draf_dist.sources.hospital_export import HospitalExport

PAIN = "{name: pain, type: categorical, categories: {typical: '1', atypical: '2', other: ['3', '4']}}"
CARD = """
name: hearts
licence: {name: none}
sites: {folders: [rome, oslo]}
tables:
  visits: {path: "{site}.csv", study: visit, subject: person, static: true}
  wards: {path: "{site}_wards.csv", study: visit, time: at}
studies: {table: visits, anchor: {column: day, number_unit: day}}
label: disease
labels: {disease: {column: ill, classes: [absent, present], values: {0: absent, 1: present}}}
modalities:
  - kind: table
    name: clinic
    table: visits
    variables: [{name: age, unit: year}, PAIN]
  - kind: table
    name: wards
    table: wards
    window_h: [-240, 0]
    aggregate: mean
    variables: [{name: ward, type: categorical, categories: [medicine, surgery, heart]}]
"""
SPEC = VariableSpec.categorical("pain", ("typical", "atypical", "other"))


def write(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    words = ["1", "2.0", "3", "4", "?", "5"]
    for site in ("rome", "oslo"):
        visits = [[f"{site}{i}", f"{site}{i}", 100, 40 + i, word, i % 2] for i, word in enumerate(words)]
        write(tmp_path / f"{site}.csv", ["visit", "person", "day", "age", "pain", "ill"], visits)
        stays = [
            [0, 99, "heart"],
            [0, 95, "surgery"],
            [1, 98, "medicine"],
            [2, 101, "heart"],
            [3, 97, "maternity"],
            [3, 96, "heart"],
        ]
        write(tmp_path / f"{site}_wards.csv", ["visit", "at", "ward"], [[f"{site}{i}", at, ward] for i, at, ward in stays])
    return tmp_path


def card(pain: str = PAIN, *overrides: str) -> Card:
    tree = parse_yaml(CARD.replace("PAIN", pain), where="card")
    apply_overrides(tree, overrides)
    return validate_spec(tree, Card, where="card")


def read(raw: Path, pain: str = PAIN, *overrides: str) -> tuple[HospitalExport, list[Study]]:
    export = HospitalExport(card(pain, *overrides), raw)
    return export, [item for item in export.studies() if isinstance(item, Study)]


def test_words_become_the_place_of_their_category(raw: Path) -> None:
    export, studies = read(raw)
    spec = export.schema.modalities[0]
    assert isinstance(spec, TableSpec)
    assert spec.variables[1] == SPEC
    assert (SPEC.unit, SPEC.low, SPEC.high, SPEC.type) == ("", 0, 2, "categorical")
    rome = [study.inputs["clinic"][0, 1] for study in studies if study.site == "rome"]
    np.testing.assert_array_equal(rome, [0, 1, 2, 2, np.nan, np.nan])


def test_the_last_row_of_the_window_counts_whatever_the_modality_aggregates(raw: Path) -> None:
    studies = {study.subject: study for study in read(raw)[1]}
    # The first of visit 0 in the file is its last in time; that of visit 2 is from after the anchor; one of visit 3 is unknown.
    assert [float(studies[f"rome{i}"].inputs["wards"][0, 0]) for i in (0, 1, 3)] == [2, 0, 2]
    assert "wards" not in studies["rome2"].inputs


def test_what_is_no_category_is_not_observed_and_counted(raw: Path) -> None:
    export, _ = read(raw)
    pain, ward = export.counts.variables["clinic.pain"], export.counts.variables["wards.ward"]
    assert (pain.observed, pain.unreadable, pain.out_of_range, pain.converted) == (8, 2, 0, 0)
    assert (ward.observed, ward.unreadable) == (8, 2)


def test_a_strict_variable_refuses_other_words_without_showing_them(raw: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(raw, PAIN.replace("type:", "strict: true, type:"))
    assert str(caught.value) == (
        "rome.csv: variable pain: expected one of the categories typical, atypical, other, found another word in 1 rows "
        "(the first is row 7). Add it to `categories`, or to `missing` of the table; without `strict` it is not observed."
    )
    table = "{path: '{site}.csv', study: visit, subject: person, static: true, missing: ['5']}"
    studies = read(raw, PAIN.replace("type:", "strict: true, type:"), f"tables.visits={table}")[1]
    assert np.isnan(studies[5].inputs["clinic"][0, 1])


def test_sites_may_say_a_category_in_words_of_their_own(raw: Path) -> None:
    path = raw / "oslo.csv"
    path.write_text(path.read_text().replace(",2.0,", ",b,").replace(",1,", ",a,", 1))
    per_site = (
        "{name: pain, type: categorical, categories: {typical: {rome: 1, oslo: a}, other: {rome: [2, 3, 4], oslo: [b, 3, 4]}}}"
    )
    studies = read(raw, per_site)[1]
    codes = {site: [study.inputs["clinic"][0, 1] for study in studies if study.site == site] for site in ("rome", "oslo")}
    np.testing.assert_array_equal(codes["rome"], [0, 1, 1, 1, np.nan, np.nan])
    np.testing.assert_array_equal(codes["oslo"], codes["rome"])
    alone = card_of_sites(card(per_site), ["oslo"])
    assert HospitalExport(alone, raw).schema.modalities == HospitalExport(card(per_site), raw).schema.modalities


@pytest.mark.parametrize(("changed", "problem"), [
    ("{name: pain, type: categorical}", "belong together"),
    ("{name: pain, categories: [a, b]}", "belong together"),
    ("{name: pain, type: categorical, categories: [a]}", "two or more categories"),
    ("{name: pain, type: categorical, categories: [a, b, a]}", "each once"),
    ("{name: pain, type: categorical, categories: [a, '']}", "none of them empty"),
    ("{name: pain, type: categorical, categories: [a, b], unit: mg}", "no unit"),
    ("{name: pain, type: categorical, categories: [a, b], range: [0, 1]}", "no unit, range"),
    ("{name: pain, type: categorical, categories: [a, b], values: {x: 1}}", "values"),
    ("{name: pain, type: categorical, categories: [a, b], missing: [-9]}", "numbers that mean missing"),
    ("{name: pain, type: categorical, categories: [a, b], aggregate: mean}", "codes have no mean"),
    ("{name: pain, strict: true}", "`strict` is for categorical"),
])  # fmt: skip
def test_what_a_categorical_variable_can_not_have_is_refused(changed: str, problem: str) -> None:
    with pytest.raises(SpecError, match=problem):
        card(changed)


@pytest.mark.parametrize(("changed", "problem"), [
    ("{name: pain, type: categorical, categories: {a: '1', b: ['2', '1.0']}}", "every word in one category, found '1.0' in two"),
    ("{name: pain, type: categorical, categories: ['1', NA]}", "words that are known, found 'NA', which means missing"),
    ("{name: pain, type: categorical, categories: {a: {rome: x}, b: y}}", "categories: a: expected a code for every site"),
    ("{name: pain, type: categorical, categories: {a: {rome: x, oslo: x, bari: x}, b: y}}", "expected a site of this card"),
])  # fmt: skip
def test_words_that_do_not_tell_categories_apart_are_refused(raw: Path, changed: str, problem: str) -> None:
    with pytest.raises(SpecError) as caught:
        read(raw, changed)
    assert problem in str(caught.value)


def test_a_series_has_no_categories(raw: Path) -> None:
    text = CARD.replace("PAIN", PAIN).replace("kind: table\n    name: wards", "kind: series\n    name: wards")
    with pytest.raises(SpecError, match="expected a modality of kind table, found a series, which holds numbers"):
        HospitalExport(validate_spec(parse_yaml(text, where="card"), Card, where="card"), raw)
    with pytest.raises(ValidationError, match=r"a series holds numbers, not codes \(pain\)"):
        SeriesSpec(name="s", variables=(SPEC,), num_steps=2, step_h=1)


def test_the_stored_form_of_other_variables_is_as_it_was() -> None:
    assert set(VariableSpec(name="age").model_dump()) == {"name", "unit", "low", "high", "type"}
    clinic = card("{name: pain, type: binary}").model_dump()["modalities"][0]
    assert not {"categories", "strict"} & clinic["variables"][1].keys()
    assert {"categories", "strict"} - card().model_dump()["modalities"][0]["variables"][1].keys() == {"strict"}
    assert VariableSpec.model_validate_json(SPEC.model_dump_json()) == SPEC


@pytest.mark.parametrize("changes", [
    {"categories": ()}, {"categories": ("a", "a", "b")}, {"high": 5}, {"unit": "mg"}, {"type": "numeric"}, {"low": None},
])  # fmt: skip
def test_a_schema_that_contradicts_itself_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        VariableSpec.model_validate({**SPEC.model_dump(), **changes})


def test_a_code_that_is_none_is_out_of_range() -> None:
    spec = TableSpec(name="clinic", variables=(VariableSpec(name="age"), SPEC))
    for code, kept in ((2, True), (3, False), (-1, False), (0.5, False), (np.inf, False)):
        values, excluded = in_range(np.array([[70.5, code]], np.float32), spec)
        assert (np.isnan(values[0, 1]), excluded) == (not kept, {} if kept else {"pain": 1})
    values, excluded = in_range(np.array([[70.5, np.nan]], np.float32), spec)
    assert (np.isnan(values[0, 1]), excluded) == (True, {})


def test_statistics_count_categories_and_normalisation_leaves_codes_alone(raw: Path) -> None:
    release = prepare(HospitalExport(card(), raw), str(raw / "release"), subject_key=b"k" * 32)
    train = list(evaluation_batches(release, "train", 4))
    tables = [table for batch in train if isinstance(table := batch.inputs["clinic"], SeriesInput)]
    seen = np.concatenate([table.values[table.observed[..., 1], 1].numpy() for table in tables])
    age, pain = release.stats.variables["clinic"]
    assert (pain.mean, pain.std, pain.num_observed) == (0, 1, len(seen))
    assert pain.categories == tuple(np.bincount(seen.astype(int), minlength=3).tolist())
    assert sum(pain.categories) > 0
    assert "categories" not in age.model_dump()
    normaliser = Normaliser(release.schema, release.stats)
    for batch in train:
        before, after = batch.inputs["clinic"], normaliser(batch).inputs["clinic"]
        assert isinstance(before, SeriesInput)
        assert isinstance(after, SeriesInput)
        np.testing.assert_array_equal(after.values[..., 1], np.where(before.observed[..., 1], before.values[..., 1], 0))
        np.testing.assert_array_equal(after.observed, before.observed)
    # Going on from sums is as one pass.
    assert training_sums(release).variables["clinic"].categories == (pain.categories,)
    assert normaliser.categories("clinic") == {1: pain.categories}


def test_statistics_of_other_categories_are_refused(raw: Path) -> None:
    release = prepare(HospitalExport(card(), raw), str(raw / "release"), subject_key=b"k" * 32)
    age, pain = release.stats.variables["clinic"]
    other = {**release.stats.variables, "clinic": (age, pain.model_copy(update={"categories": (1, 2)}))}
    with pytest.raises(SpecError, match="found 2 categories of pain"):
        Normaliser(release.schema, release.stats.model_copy(update={"variables": other}))


def test_a_study_of_codes_alone_is_one(raw: Path) -> None:
    spec = HospitalExport(card(), raw).schema
    with pytest.raises(UnfitError, match="no modality with an observed value"):
        encode_study(Study("s", "rome", "", {"clinic": np.array([[np.nan, 7]], np.float32)}, 0), spec)
    assert encode_study(Study("s", "rome", "", {"clinic": np.array([[np.nan, 1]], np.float32)}, 0), spec).present == ("clinic",)

"""Codes of categories where only numbers are read: indicators; and where a table is described, the names of the categories."""

from pathlib import Path

import numpy as np
import pytest
import torch
from memory_source import KEY, SCHEMA, MemorySource

from draf_dist.continual.fit import joined_schema
from draf_dist.data.category_counts import CategoryCounts
from draf_dist.data.corruption import Corruptor, MissingNotAtRandom, TrainingCorruption
from draf_dist.data.corruption.sweep import CorruptedSplit
from draf_dist.data.loader import SplitLoader, evaluation_batches
from draf_dist.data.normalise import Normaliser
from draf_dist.data.prepare import prepare
from draf_dist.data.release import Release
from draf_dist.data.stats import StatsBuilder
from draf_dist.errors import SpecError
from draf_dist.evaluation.baselines import examples_of
from draf_dist.models.card import model_card
from draf_dist.models.encoder_export import encoder_files, read_encoder
from draf_dist.models.encoders.tabular import TabularConfig
from draf_dist.models.fusion.mean import MeanConfig
from draf_dist.objectives.pretrain_masked_values import MaskedValuesConfig
from draf_dist.schema.batch import SeriesInput
from draf_dist.schema.categories import as_numbers, category_counts, num_numbers
from draf_dist.schema.modality import DataSchema, TableSpec, VariableSpec
from draf_dist.schema.study import Study

WARD = VariableSpec.categorical("ward", ("medicine", "surgery", "heart"))
TABLE = TableSpec(
    name="history", variables=(VariableSpec(name="age", low=0, high=120), WARD, VariableSpec(name="icd", type="binary"))
)
CODED = SCHEMA.model_copy(update={"modalities": (*SCHEMA.modalities[1:2], TABLE)})


def series(values: list[list[float]]) -> SeriesInput:
    tensor = torch.tensor(values).unsqueeze(1)
    return SeriesInput(tensor.nan_to_num(0.0), ~tensor.isnan(), torch.ones(len(values), dtype=torch.int64))


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """Studies whose ward is (index of the study) % 3, unknown in every fifth; no images."""

    def change(i: int, study: Study) -> Study:
        generator = np.random.default_rng(i)
        vitals = generator.normal(80, 5, (4, 2)).astype(np.float32)
        history = np.array([[generator.integers(20, 90), np.nan if i % 5 == 0 else i % 3, i % 2]], np.float32)
        return Study(study.subject, study.site, study.anchor, {"vitals": vitals, "history": history}, study.label)

    source = MemorySource(schema=CODED, change=change)
    return prepare(source, str(tmp_path_factory.mktemp("codes") / "release"), subject_key=KEY)


def test_a_code_becomes_an_indicator_of_every_category() -> None:
    found = as_numbers(TABLE, series([[70, 2, 1], [60, 0, 0], [50, float("nan"), 1]]))
    assert isinstance(found, SeriesInput)
    expected = [[70, 0, 0, 1, 1], [60, 1, 0, 0, 0], [50, 0, 0, 0, 1]]
    assert found.values[:, 0].tolist() == expected
    assert found.observed[:, 0].tolist() == [[True] * 5, [True] * 5, [True, False, False, False, True]]
    assert (num_numbers(TABLE), category_counts(TABLE)) == (5, {"ward": 3})


def test_a_table_without_codes_is_passed_on_as_it_is() -> None:
    plain = SCHEMA.modalities[2]
    table = series([[70, 1]])
    assert as_numbers(plain, table) is table
    assert isinstance(plain, TableSpec)
    assert num_numbers(plain) == 2


def test_counts_go_on_where_they_ended() -> None:
    samples = [np.array([[1, code, 0]], np.float32) for code in (0, 2, np.nan, 2, 1, 2)]
    whole, first = CategoryCounts(TABLE), CategoryCounts(TABLE)
    for sample in samples:
        whole.add(sample)
    for sample in samples[:3]:
        first.add(sample)
    rest = CategoryCounts(TABLE, first.sums())
    for sample in samples[3:]:
        rest.add(sample)
    assert rest.sums() == whole.sums() == ((1, 1, 3),)
    assert whole.by_column() == {1: (1, 1, 3)}


def test_a_delivery_continues_the_counts_of_its_release(release: Release) -> None:
    builder = StatsBuilder(release.schema)
    for sample in ({"history": np.array([[50, 1, 0]], np.float32)}, {"history": np.array([[60, 2, 0]], np.float32)}):
        builder.add(sample)
    again = StatsBuilder(release.schema, builder.sums())
    again.add({"history": np.array([[60, 2, 0]], np.float32)})
    assert again.result().variables["history"][1].categories == (0, 1, 2)
    assert again.result().variables["history"][0].categories == ()


def test_baselines_read_indicators(release: Release) -> None:
    normaliser = Normaliser(release.schema, release.stats)
    batches = [normaliser(batch) for batch in evaluation_batches(release, "train", 16)]
    table = np.concatenate([value.values[:, 0].numpy() for b in batches if isinstance(value := b.inputs["history"], SeriesInput)])
    known = np.concatenate([value.observed[:, 0].numpy() for b in batches if isinstance(value := b.inputs["history"], SeriesInput)])
    features = examples_of(batches, release.schema).features[:, -5:]
    for category in range(3):
        expected = np.where(known[:, 1], table[:, 1] == category, np.nan)
        np.testing.assert_array_equal(features[:, 1 + category], expected)
    np.testing.assert_array_equal(features[:, 4], table[:, 2])


def test_how_sick_somebody_is_is_not_read_from_codes(release: Release) -> None:
    corruptor = Corruptor(TrainingCorruption(), Normaliser(release.schema, release.stats), seed=0)
    split = CorruptedSplit(SplitLoader(release, "train", 16), corruptor)
    with pytest.raises(SpecError, match=r"score ehr: expected series and tables of numbers, found categorical ward\."):
        split.batches(MissingNotAtRandom(score="ehr"), 1)
    assert next(iter(split.batches(MissingNotAtRandom(score="label"), 1))).num_rows == 16


def test_training_draws_codes_from_the_release(release: Release) -> None:
    """The law as it is met in a run: some codes change, to codes that the training split has."""
    normaliser = Normaliser(release.schema, release.stats)
    corruptor = Corruptor(TrainingCorruption(probability=1.0, modality_dropout=0.0), normaliser, seed=0)
    changed = 0
    for batch in evaluation_batches(release, "train", 64):
        clean = normaliser(batch)
        before, after = clean.inputs["history"], corruptor.train(clean).inputs["history"]
        assert isinstance(before, SeriesInput)
        assert isinstance(after, SeriesInput)
        still = before.observed & after.observed
        assert set(after.values[..., 1].unique().tolist()) <= {0.0, 1.0, 2.0}
        changed += int(((before.values != after.values) & still)[..., 1].sum())
    assert changed > 0


def test_a_pretrained_encoder_of_other_categories_is_another_one() -> None:
    torch.manual_seed(0)
    config = TabularConfig(hidden=8)
    stats = StatsBuilder(CODED).result()
    files = encoder_files(
        config.build(TABLE, 4), config=config, spec=TABLE, width=4, objective="simclr", release="data/x@0123", stats=stats
    )
    description = read_encoder(files, where="there").description
    description.check_fits(TABLE, config, 4, where="job")
    assert "ward [categorical: medicine / surgery / heart]" in files["README.md"].decode()
    other = VariableSpec.categorical("ward", ("surgery", "medicine", "heart"))
    reordered = TABLE.model_copy(update={"variables": (TABLE.variables[0], other, TABLE.variables[2])})
    with pytest.raises(SpecError, match="expected age .*surgery / medicine / heart.*, found age .*medicine / surgery / heart"):
        description.check_fits(reordered, config, 4, where="job")


def test_a_delivery_with_other_categories_does_not_fit_the_release() -> None:
    other = VariableSpec.categorical("ward", ("medicine", "surgery", "heart", "eye"))
    for variable, expected in ((other, "categories"), (VariableSpec(name="ward"), "type 'categorical'")):
        changed = TABLE.model_copy(update={"variables": (TABLE.variables[0], variable, TABLE.variables[2])})
        schema = CODED.model_copy(update={"modalities": (CODED.modalities[0], changed)})
        with pytest.raises(SpecError, match=f"modality history, variable ward: {expected}"):
            joined_schema(CODED, schema, "card")
        with pytest.raises(SpecError, match="variable ward"):
            joined_schema(schema, CODED, "card")


def test_the_model_card_names_categorical_variables() -> None:
    text = model_card(MeanConfig(width=4), CODED, 10)
    assert "| history | table | 3 variables (categorical: ward, 3 categories) |" in text
    assert "| vitals | series | 2 variables, 4 steps of 1 h |" in text


def test_masked_value_pretraining_reads_no_table() -> None:
    with pytest.raises(SpecError, match="history"):
        MaskedValuesConfig(modality="history").network(CODED, None, 4)


def test_the_release_states_its_categories(release: Release) -> None:
    path = Path(release.url) / "releases" / release.manifest.version / "schema.json"
    assert DataSchema.model_validate_json(path.read_text()) == release.schema
    table = release.schema.modalities[1]
    assert isinstance(table, TableSpec)
    assert table.variables[1].categories == ("medicine", "surgery", "heart")

"""What the tables of findings on records are worked out by (benchmarks/findings_records.py): closed forms."""

from pathlib import Path

import findings_records
import numpy as np
import pytest
import torch
from findings_alarms import alarms
from findings_signals import detection, where_hit
from findings_sites import explained, over_folds, paired, shrunken, told_by_energy, variances
from findings_statistics import averaged, ranked, told_apart, uncertainty, weight, with_level
from findings_study import Study, in_order
from findings_treatments import clamp, forget, reject
from hand_made_predictions import studies
from model_inputs import small_batch, small_schema

from draf_dist.evaluation.bench import Prepared
from draf_dist.evaluation.bench_folds import FoldPlan
from draf_dist.evaluation.bench_job import load_bench_job
from draf_dist.models.severity import SIGMAS, Severity
from draf_dist.schema.batch import Batch, SeriesInput
from draf_dist.schema.label import LabelSpec, SurvivalSpec, TaskSpec
from draf_dist.schema.modality import TableSpec, VariableSpec
from draf_dist.sources.card import load_card
from draf_dist.storage import open_store

ROOT = Path(__file__).resolve().parents[2]

EVERY = np.arange(100)
LEVELS = (0.0, 3.2, 10.0)


@pytest.fixture
def risks() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    probability = generator.uniform(0.01, 0.9, 1000)
    return probability, (generator.random(1000) < probability).astype(np.int64)


# Signals.


def test_a_signal_ranks_as_itself_and_against_its_negative() -> None:
    signal = np.random.default_rng(0).normal(size=(2, 100))
    assert ranked(signal, np.exp(signal))(1, EVERY) == pytest.approx(1)
    assert ranked(signal, -signal)(0, EVERY) == pytest.approx(-1)


def test_a_study_without_the_modality_has_no_say() -> None:
    signal = np.random.default_rng(0).normal(size=(1, 100))
    other = signal.copy()
    other[0, :50] = np.nan
    assert ranked(signal, other)(0, EVERY) == pytest.approx(1)
    assert told_apart(signal, other + 100)(0, EVERY) == 1
    assert averaged(other)(0, EVERY) == pytest.approx(signal[0, 50:].mean())


def test_a_signal_that_noise_leaves_alone_tells_nothing_apart_and_one_that_rises_tells_everything() -> None:
    clean = np.random.default_rng(0).normal(size=(1, 100))
    assert told_apart(clean, clean)(0, EVERY) == pytest.approx(0.5)
    assert told_apart(clean, clean + 100)(0, EVERY) == 1
    assert with_level([clean, clean, clean], LEVELS)(0, EVERY) == pytest.approx(0, abs=1e-12)
    # What rises with the level and within no level: ties are all that is between the ranks.
    constant = np.zeros((1, 100))
    assert with_level([constant, constant + 1, constant + 2], LEVELS)(0, EVERY) == pytest.approx(1)


def test_noise_on_one_modality_of_each_study_is_not_seen_in_a_weight_that_it_leaves_alone() -> None:
    """Weights of 1 / n: who has one modality alone is always hit, and weighs most; the same studies clean weigh the same."""
    generator = np.random.default_rng(0)
    present = generator.random((1000, 3)) < 0.5
    present[:, 0] = True
    equal = (1 / present.sum(1))[None]
    hits_one, hits_half = generator.random((2, 1, 1000)) < np.stack([equal, np.full_like(equal, 0.5)])
    by_one, by_half = np.where(hits_one, equal, np.nan), np.where(hits_half, equal, np.nan)
    rows = generator.integers(0, 1000, 1000)
    assert np.nanmean(by_one) > equal.mean() + 0.1
    assert told_apart(equal, by_one)(0, rows) == 0.5
    assert with_level([equal, by_half, by_one], LEVELS)(0, rows) == pytest.approx(0, abs=1e-12)


def test_two_conditions_of_one_sigma_have_one_level() -> None:
    constant = np.zeros((1, 100))
    signals = [constant, constant + 1, constant + 1]
    assert with_level(signals, (0.0, 10.0, 10.0))(0, EVERY) == pytest.approx(1)
    assert with_level(signals, LEVELS)(0, EVERY) < 0.9


def test_of_a_disturbed_fold_those_count_that_were_hit() -> None:
    part, _ = studies(40)
    part.corrupted[::2] = True
    found = in_order([part], where_hit(uncertainty("epistemic", 0), 0))
    assert np.isnan(found[1::2]).all()
    kept = found[::2]
    assert np.array_equal(np.isfinite(kept), part.present[::2, 0])


def test_the_weight_of_what_is_absent_is_no_weight() -> None:
    part, _ = studies(40)
    found = in_order([part], weight(1))
    assert np.array_equal(np.isnan(found), ~part.present[:, 1])


def test_studies_of_two_folds_come_in_one_order() -> None:
    part, _ = studies(40)
    halves = [part.rows(np.arange(20, 40)), part.rows(np.arange(20))]
    assert np.array_equal(in_order(halves, lambda one: one.uid), part.uid)


# Alarms.


def test_abstention_of_nobody_leaves_recall_and_ppv_as_they_are(risks: tuple[np.ndarray, np.ndarray]) -> None:
    probability, label = risks
    recall, ppv, number = alarms(probability, label, threshold=0.2, coverage=1.0)
    above = probability >= 0.2
    assert recall == pytest.approx(above[label == 1].mean())
    assert ppv == pytest.approx(label[above].mean())
    assert number == above.sum()


def test_the_alarms_nearest_to_a_half_are_those_that_go() -> None:
    probability, label = np.array([0.01, 0.02, 0.03, 0.3, 0.95]), np.array([0, 0, 0, 1, 1])
    assert alarms(probability, label, threshold=0.2, coverage=1.0) == (1.0, 1.0, 2.0)
    # A fifth is left out: the study at .3, an event that now raises no alarm and still counts.
    assert alarms(probability, label, threshold=0.2, coverage=0.8) == (0.5, 1.0, 1.0)


def test_without_an_alarm_there_is_no_ppv() -> None:
    recall, ppv, number = alarms(np.array([0.1, 0.1]), np.array([0, 1]), threshold=0.2, coverage=1.0)
    assert (recall, number) == (0, 0)
    assert np.isnan(ppv)


def test_without_a_positive_there_is_no_recall() -> None:
    recall, ppv, number = alarms(np.array([0.1, 0.3]), np.array([0, 0]), threshold=0.2, coverage=1.0)
    assert np.isnan(recall)
    assert (ppv, number) == (0, 1)


# Hospitals.


def test_a_hospital_explains_everything_where_its_studies_are_alike_and_nothing_where_they_are_shuffled() -> None:
    generator = np.random.default_rng(0)
    site = np.repeat(np.arange(40), 25)
    effect = generator.normal(size=40)[site]
    assert explained(effect, site) == pytest.approx(1)
    assert explained(generator.permutation(effect), site) == pytest.approx(0, abs=0.02)


def test_many_small_hospitals_explain_nothing_by_their_number() -> None:
    """The share of the sum of squares would be (K - 1) / (N - 1) = .5 by chance; this share is unbiased but for its floor at 0."""
    generator = np.random.default_rng(0)
    site = np.repeat(np.arange(500), 2)
    assert explained(generator.normal(size=1000), site) < 0.1


def test_variances_are_those_that_were_planted() -> None:
    generator = np.random.default_rng(0)
    site = np.repeat(np.arange(2000), np.tile([2, 4, 9], 2000)[:2000])
    between, within = variances(2 * generator.normal(size=2000)[site] + 3 * generator.normal(size=len(site)), site)
    assert between == pytest.approx(4, rel=0.1)
    assert within == pytest.approx(9, rel=0.1)


def test_the_mean_of_a_hospital_is_shrunken_by_hand() -> None:
    """Two hospitals of 2: means 1 and 5, of all 3; MSW = 4 / 2 = 2, MSB = 2 (4 + 4) / 1 = 16, between (16 - 2) / 2 = 7."""
    found = shrunken(np.array([0.0, 2.0, 4.0, 6.0]), np.array([7, 7, 8, 8]))
    assert found == pytest.approx({7: -2 * 7 / (7 + 2 / 2), 8: 2 * 7 / (7 + 2 / 2)})


@pytest.fixture
def unequal() -> tuple[np.ndarray, np.ndarray]:
    """Hospitals of 2 and 6 studies with means 5 and 0, 5/4 of all; MSW = (2 + 6) / 6 = 4/3, MSB = 2 (15/4)^2 + 6 (5/4)^2 = 75/2."""
    return np.array([4.0, 6.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0]), np.repeat([7, 8], [2, 6])


def test_variances_of_few_and_unequal_hospitals_by_hand(unequal: tuple[np.ndarray, np.ndarray]) -> None:
    """n0 = 8 - (4 + 36) / 8 = 3, where the mean size is 4."""
    assert variances(*unequal) == pytest.approx(((75 / 2 - 4 / 3) / 3, 4 / 3))


def test_the_effect_of_unequal_hospitals_is_taken_from_the_generalised_least_squares_mean(
    unequal: tuple[np.ndarray, np.ndarray],
) -> None:
    """Weights 18/229 and 18/221 of the means 5 and 0: mu = 5 * 221 / 450, and 217/229 and 217/221 of what is left."""
    assert shrunken(*unequal) == pytest.approx({7: 217 / 90, 8: -217 / 90})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("site", [[0, 0, 0], [0, 1, 2], [0]])
def test_of_one_hospital_or_of_one_study_each_no_variance_is_known(site: list[int]) -> None:
    value = np.arange(len(site), dtype=np.float64)
    assert np.isnan(variances(value, np.array(site))).all()
    assert np.isnan(explained(value, np.array(site)))
    assert set(shrunken(value, np.array(site)).values()) == {0.0}
    assert over_folds([0.5, explained(value, np.array(site))])["least"].value is None


def test_where_hospitals_do_not_differ_nothing_is_subtracted() -> None:
    assert shrunken(np.array([-1.0, 1.0, -1.0, 1.0]), np.array([0, 0, 1, 1])) == {0: 0.0, 1: 0.0}


def test_energy_that_rises_with_every_noise_ranks_by_level_alone() -> None:
    clean = np.random.default_rng(0).uniform(size=50)
    found = told_by_energy(np.array([clean + 2 * level for level in range(len(SIGMAS))]))
    assert all(value == 1 for name, value in found.items() if name.startswith("AUROC"))
    # Seven levels of 50: what is lost to 1 is the order within levels, (50^2 - 1) / (350^2 - 1) of the variance of ranks.
    assert found["Spearman"] == pytest.approx(np.sqrt(1 - (50**2 - 1) / (350**2 - 1)))


def test_the_interval_over_folds_is_students() -> None:
    found = paired(np.array([0.1, 0.2, 0.3, 0.4, 0.5]), np.zeros(5))
    reach = 2.776 * np.sqrt(0.025 / 5)
    assert (found.value, found.low, found.high) == pytest.approx((0.3, 0.3 - reach, 0.3 + reach), abs=1e-4)


def test_a_fold_without_a_number_leaves_no_mean() -> None:
    found = paired(np.array([0.1, np.nan]), np.zeros(2))
    assert (found.value, found.low, found.high) == (None, None, None)
    assert found.reason


# What is done at test.


@pytest.fixture
def batch() -> Batch:
    return small_batch(small_schema(), rows=64)


def series(batch: Batch, name: str) -> SeriesInput:
    value = batch.inputs[name]
    assert isinstance(value, SeriesInput)
    return value


def test_a_limit_that_nothing_exceeds_changes_nothing(batch: Batch) -> None:
    for treatment in (clamp(small_schema(), 50.0), forget(small_schema(), 50.0)):
        assert torch.equal(treatment(batch).present, batch.present)
        for name in ("vitals", "labs"):
            before, after = series(batch, name), series(treatment(batch), name)
            assert torch.equal(before.observed, after.observed)
            assert torch.equal(before.values[before.observed], after.values[after.observed])


def test_a_clamped_value_is_at_the_limit_and_still_observed(batch: Batch) -> None:
    before, after = series(batch, "labs"), series(clamp(small_schema(), 1.0)(batch), "labs")
    assert after.values.abs().max() == 1
    assert torch.equal(before.observed, after.observed)


def test_a_forgotten_value_was_not_observed(batch: Batch) -> None:
    before, after = series(batch, "labs"), series(forget(small_schema(), 1.0)(batch), "labs")
    assert torch.equal(after.observed, before.observed & (before.values.abs() <= 1))
    assert (after.values[~after.observed] == 0).all()


def test_codes_and_binary_variables_are_left_alone(batch: Batch) -> None:
    schema = small_schema()
    labs = schema.modalities[2]
    assert isinstance(labs, TableSpec)
    code = VariableSpec(name="v0", type="categorical", categories=("a", "b", "c", "d"), low=0, high=3)
    flag = VariableSpec(name="v1", type="binary")
    coded = schema.model_copy(
        update={"modalities": (*schema.modalities[:2], labs.model_copy(update={"variables": (code, flag, *labs.variables[2:])}))}
    )
    value = series(batch, "labs")
    value.values[..., 0], value.values[..., 1] = 3.0, 1.0
    for treatment in (clamp(coded, 0.5), forget(coded, 0.5)):
        after = series(treatment(batch), "labs")
        assert torch.equal(after.observed[..., :2], value.observed[..., :2])
        known = value.observed[..., :2]
        assert torch.equal(after.values[..., :2][known], value.values[..., :2][known])
        assert after.values[..., 2:][after.observed[..., 2:]].abs().max() <= 0.5


def test_a_modality_of_which_everything_is_forgotten_is_missing_but_the_last(batch: Batch) -> None:
    """Labs beyond any limit: they go where something else is left, and nobody loses all; what was never measured is as it was."""
    value = series(batch, "labs")
    value.values.fill_(100.0)
    value.observed[:8] = False
    after = forget(small_schema(), 50.0)(batch)
    assert not series(after, "labs").observed.any()
    assert torch.equal(after.present[:, :2], batch.present[:, :2])
    had = batch.present[:, 2]
    lost = had & ~after.present[:, 2]
    alone = had & (batch.present.sum(1) == 1)
    assert lost.any()
    assert alone.any()
    assert torch.equal(lost, had & ~alone & value.observed.flatten(1).any(1))


@pytest.fixture(scope="module")
def severity() -> Severity:
    found = Severity(small_schema())
    found.fit(
        [small_batch(small_schema(), rows=64, seed=seed) for seed in range(3)], [small_batch(small_schema(), rows=64, seed=3)]
    )
    return found


def test_rejection_takes_out_the_modality_that_noise_made_unusable_and_keeps_the_last_one(severity: Severity, batch: Batch) -> None:
    treatment = reject(severity, 6.0)
    assert torch.equal(treatment(batch).present, batch.present)
    hit = batch.map(lambda tensor: tensor)
    labs = series(hit, "labs")
    hit.inputs["labs"] = SeriesInput(labs.values * 1000, labs.observed, labs.length)
    rejected = treatment(hit).present[:, 2]
    alone = hit.present.sum(1) == 1
    unmeasured = ~labs.observed.flatten(1).any(1)
    assert torch.equal(rejected, hit.present[:, 2] & (alone | unmeasured))


def test_the_limit_of_rejection_is_sigma_6(severity: Severity, batch: Batch) -> None:
    """Labs of one study, larger and larger: sigma_hat rises with them, and they go between 5.8 and 6.2."""
    labs = series(batch, "labs")
    (row, *_) = torch.nonzero(batch.present[:, 2] & (batch.present.sum(1) > 1) & labs.observed.flatten(1).all(1))[:, 0].tolist()
    grown = batch.map(lambda tensor: tensor[[row] * 400])
    one = series(grown, "labs")
    factor = torch.logspace(0, 2, 400).view(-1, 1, 1)
    grown.inputs["labs"] = SeriesInput(one.values * factor, one.observed, one.length)
    sigma = severity(grown)[:, 2].expm1()
    kept = reject(severity, 6.0)(grown).present[:, 2]
    below, above = (sigma > 5.8) & (sigma < 6), (sigma > 6) & (sigma < 6.2)
    assert below.any()
    assert above.any()
    assert kept[below].all()
    assert not kept[above].any()


# The command.


def records(capsys: pytest.CaptureFixture[str], *given: str) -> str:
    """What it says when it refuses."""
    with pytest.raises(SystemExit) as stopped:
        findings_records.main(given)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_folder_without_a_benchmark_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    said = records(capsys, "jobs/bench_zoo_eicu.yaml", "--raw", str(tmp_path), "--out", str(tmp_path / "mistyped"))
    assert "expected the folder of a finished benchmark, found no folds.json. Correct --out." in said
    assert not any(tmp_path.iterdir())


TWO_CLASSES = LabelSpec(name="death", classes=("survived", "died"))


def lacking(job: str, label: TaskSpec = TWO_CLASSES) -> set[str]:
    """The parts that are left out."""
    found = load_bench_job(ROOT / "jobs" / f"{job}.yaml")
    return {name for name, part in findings_records.PARTS.items() if part.lacks(found, label)}


def test_parts_whose_systems_or_conditions_a_job_lacks_are_left_out() -> None:
    assert lacking("bench_findings_eicu") == set()
    assert lacking("bench_zoo_eicu") == {"treatments"}
    # Neither gate nor rejection nor means without bits.
    assert lacking("bench_parts_eicu") == {"sites", "known", "treatments"}
    assert lacking("bench_bits_eicu") == {"sites", "treatments"}


def test_of_a_job_without_noise_no_signal_is_asked(tmp_path: Path) -> None:
    job = load_bench_job(ROOT / "jobs" / "bench_bits_eicu.yaml")
    prepared = Prepared(job, load_card(ROOT / job.card), open_store(str(tmp_path)), FoldPlan(identity="", folds=()), (), ())
    assert detection(Study(prepared, None)) == {}


def test_alarms_are_of_two_classes() -> None:
    assert "abstention" in lacking("bench_findings_eicu", LabelSpec(name="unit", classes=("mixed", "medical", "surgical")))
    assert "abstention" in lacking("bench_findings_eicu", SurvivalSpec(name="death", edges=(7.0,)))

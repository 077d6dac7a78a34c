"""What the tables of findings on records are worked out by (benchmarks/findings_records.py): closed forms."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hand_made_predictions import studies
from model_inputs import small_batch, small_schema

from draf_dist.models.severity import SIGMAS, Severity
from draf_dist.schema.batch import Batch, SeriesInput

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from findings_alarms import alarms  # noqa: E402
from findings_signals import where_hit  # noqa: E402
from findings_sites import explained, paired, shrunken, told_by_energy, variances  # noqa: E402
from findings_statistics import averaged, ranked, told_apart, uncertainty, weight, with_level  # noqa: E402
from findings_study import in_order  # noqa: E402
from findings_treatments import clamp, forget, reject  # noqa: E402

EVERY = np.arange(100)


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
    assert with_level([clean, clean, clean])(0, EVERY) == pytest.approx(0, abs=1e-12)
    # What rises with the level and within no level: ties are all that is between the ranks.
    constant = np.zeros((1, 100))
    assert with_level([constant, constant + 1, constant + 2])(0, EVERY) == pytest.approx(1)


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


# What is done at test.


@pytest.fixture
def batch() -> Batch:
    return small_batch(small_schema(), rows=64)


def series(batch: Batch, name: str) -> SeriesInput:
    value = batch.inputs[name]
    assert isinstance(value, SeriesInput)
    return value


def test_a_limit_that_nothing_exceeds_changes_nothing(batch: Batch) -> None:
    for treatment in (clamp(50.0), forget(50.0)):
        for name in ("vitals", "labs"):
            before, after = series(batch, name), series(treatment(batch), name)
            assert torch.equal(before.observed, after.observed)
            assert torch.equal(before.values[before.observed], after.values[after.observed])


def test_a_clamped_value_is_at_the_limit_and_still_observed(batch: Batch) -> None:
    before, after = series(batch, "labs"), series(clamp(1.0)(batch), "labs")
    assert after.values.abs().max() == 1
    assert torch.equal(before.observed, after.observed)


def test_a_forgotten_value_was_not_observed(batch: Batch) -> None:
    before, after = series(batch, "labs"), series(forget(1.0)(batch), "labs")
    assert torch.equal(after.observed, before.observed & (before.values.abs() <= 1))
    assert (after.values[~after.observed] == 0).all()


def test_rejection_takes_out_the_modality_that_noise_made_unusable_and_keeps_the_last_one() -> None:
    schema = small_schema()
    clean = [small_batch(schema, rows=64, seed=seed) for seed in range(4)]
    severity = Severity(schema)
    severity.fit(clean[:3], clean[3:])
    treatment = reject(severity, 6.0)
    assert torch.equal(treatment(clean[0]).present, clean[0].present)
    hit = clean[0].map(lambda tensor: tensor)
    labs = series(hit, "labs")
    hit.inputs["labs"] = SeriesInput(labs.values * 1000, labs.observed, labs.length)
    rejected = treatment(hit).present[:, 2]
    alone = hit.present.sum(1) == 1
    unmeasured = ~labs.observed.flatten(1).any(1)
    assert torch.equal(rejected, hit.present[:, 2] & (alone | unmeasured))

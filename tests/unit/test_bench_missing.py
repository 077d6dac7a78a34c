"""Studies of which more is missing the sicker they are, from the start."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from memory_source import SCHEMA, MemorySource
from pydantic import ValidationError

from draf_dist.config.spec import fingerprint
from draf_dist.data.parent import key_check
from draf_dist.errors import DataError, SpecError
from draf_dist.evaluation.bench_folds import identity_of
from draf_dist.evaluation.bench_missing import Axis, MissingFromStart, MissingSource, fit_loss
from draf_dist.schema.study import MaskLabel, RawVolume, Study, TimeToEvent

BY_LABEL = MissingFromStart(rate=0.3, slope=1.0, score="label")
NUM_STUDIES = 3000


def source_of(**changes: Any) -> MemorySource:
    """Studies with all modalities; changes: field of a study -> function of its number."""
    source = MemorySource(num_studies=NUM_STUDIES, image_shape=(1, 2, 2))
    full = source._study(2)
    plain: dict[str, Any] = {"inputs": lambda i: full.inputs, "image_digests": lambda i: {}, "quality": lambda i: {"cxr": 0.5}}
    source.change = lambda i, study: replace(study, **{name: value(i) for name, value in {**plain, **changes}.items()})
    return source


def after(source: Any, law: MissingFromStart) -> list[Study]:
    return [study for study in MissingSource(source, law, fit_loss(source, law)).studies() if isinstance(study, Study)]


def share_lost(studies: list[Study], label: Any) -> float:
    mine = [len(SCHEMA.names) - len(study.inputs) for study in studies if study.label == label]
    return sum(mine) / len(mine) / len(SCHEMA.names)


def test_the_sicker_lose_more_as_the_law_says_and_the_mean_is_the_rate() -> None:
    source = source_of(label=lambda i: int(i % 5 == 0))
    law = fit_loss(source, BY_LABEL)
    # Of a label that holds in a fifth, the standardised values are 2 and -1/2: classes are 1 / sqrt(.2 .8) apart.
    died, survived = (law.probability("vitals", severity) for severity in (2.0, -0.5))
    assert law.severity(source._study(0)) in (pytest.approx(2.0), pytest.approx(-0.5))
    assert 0.2 * died + 0.8 * survived == pytest.approx(0.3, abs=1e-9)
    assert math.log(died / (1 - died)) - math.log(survived / (1 - survived)) == pytest.approx(1 / math.sqrt(0.16), abs=1e-9)
    found = after(source, BY_LABEL)
    # All three go with probability p^3; then one of the three comes back.
    assert share_lost(found, 1) == pytest.approx(died - died**3 / 3, abs=0.03)
    assert share_lost(found, 0) == pytest.approx(survived - survived**3 / 3, abs=0.02)


def test_without_slope_the_label_says_nothing() -> None:
    found = after(source_of(label=lambda i: int(i % 5 == 0)), MissingFromStart(rate=0.3, slope=0, score="label"))
    assert share_lost(found, 1) == pytest.approx(share_lost(found, 0), abs=0.04)


def test_the_first_principal_axis_is_found_and_points_to_the_sick() -> None:
    generator = np.random.default_rng(0)
    severity = generator.normal(size=2000)
    label = (severity + generator.normal(size=2000) > 1).astype(float)
    # Two variables fall with the severity, in units of their own; the third knows nothing and was often not measured.
    records = np.stack([5 - 3 * severity, 100 - 20 * severity + 4 * generator.normal(size=2000), generator.normal(size=2000)], 1)
    records[generator.random(2000) < 0.4, 2] = np.nan
    axis = Axis.of(records, label)
    assert axis.direction[:2] == pytest.approx([-(0.5**0.5)] * 2, abs=0.02)
    found = np.array([axis.score(record) for record in records])
    assert np.corrcoef(found, severity)[0, 1] > 0.98
    # Nothing observed counts as the mean.
    assert axis.score(np.full(3, np.nan)) == 0


def test_by_the_records_score_who_is_sicker_within_a_class_loses_more_too() -> None:
    """Heart rate and temperature rise together; the law sees them before they are lost."""
    full = MemorySource()._study(2)

    def inputs(i: int) -> dict[str, Any]:
        values = np.full((4, 2), [80 + 20 * (i % 3), 37 + i % 3], dtype=np.float32)
        return {**full.inputs, "vitals": values, "history": np.array([[50.0, 0.0]], dtype=np.float32)}

    source = source_of(inputs=inputs, label=lambda i: int(i % 3 == 2 and i % 2))
    law = fit_loss(source, MissingFromStart(rate=0.3, slope=2.0))
    severities = [law.severity(replace(full, inputs=inputs(i))) for i in range(3)]
    assert severities == pytest.approx([-(1.5**0.5), 0.0, 1.5**0.5], abs=1e-6)
    kept = after(source, MissingFromStart(rate=0.3, slope=2.0))
    cxr = [np.mean(["cxr" in study.inputs for study in kept[i::3]]) for i in range(3)]
    assert cxr[0] > cxr[1] + 0.1 > cxr[2] + 0.2


def test_one_modality_stays_and_of_the_others_nothing() -> None:
    volume = RawVolume(np.zeros((1, 2, 2, 2), dtype=np.int16), (1.0, 1.0, 1.0))
    inner = source_of(volumes=lambda i: {"history": volume}, image_digests=lambda i: {"cxr": "0" * 64}, label=lambda i: i % 2)
    studies = after(inner, MissingFromStart(rate=0.9, score="label"))
    before = {(study.subject, study.anchor, study.site): study for study in inner.studies() if isinstance(study, Study)}
    assert len(studies) == NUM_STUDIES
    assert sum(len(study.inputs) == 1 for study in studies) > NUM_STUDIES / 2
    for study in studies:
        old = before[study.subject, study.anchor, study.site]
        assert study.inputs
        assert study.volumes.keys() == {"history"} & study.inputs.keys()
        assert study.image_digests.keys() == study.quality.keys() == {"cxr"} & study.inputs.keys()
        assert (study.label, study.where) == (old.label, old.where)


def test_which_one_stays_is_drawn_apart_of_what_is_lost() -> None:
    """History is there in the sick alone, so its law is milder; of three that are all lost each comes back as often."""
    full = MemorySource()._study(2).inputs
    without = {name: value for name, value in full.items() if name != "history"}
    source = source_of(inputs=lambda i: full if i % 4 == 0 else without, label=lambda i: int(i % 4 == 0))
    law = MissingFromStart(rate=0.6, slope=2.5, score="label")
    fitted = fit_loss(source, law)
    cxr, history = (fitted.probability(name, math.sqrt(3)) for name in ("cxr", "history"))
    assert (cxr, history) == (pytest.approx(0.99, abs=0.01), pytest.approx(0.6))
    sick = [study for study in after(source, law) if study.label]
    alone = sum(set(study.inputs) == {"history"} for study in sick) / len(sick)
    assert alone == pytest.approx(cxr**2 * (1 - history + history / 3), abs=0.05)


def test_what_holds_no_number_is_no_modality_to_keep() -> None:
    """A release takes an array of gaps for absent: kept for the last one, the study would be left with nothing."""
    full = MemorySource()._study(2).inputs
    gaps = {**full, "history": np.full((1, 2), np.nan, dtype=np.float32)}
    studies = after(source_of(inputs=lambda i: gaps, label=lambda i: i % 2), MissingFromStart(rate=0.8, score="label"))
    assert all({"cxr", "vitals"} & study.inputs.keys() for study in studies)


def test_a_study_loses_the_same_in_every_fold_and_another_with_another_seed() -> None:
    def left(held_out: frozenset[str], seed: int = 0) -> list[frozenset[str]]:
        inner = MemorySource(num_studies=200, held_out_sites=held_out)
        return [frozenset(study.inputs) for study in after(inner, MissingFromStart(rate=0.5, seed=seed))]

    assert left(frozenset({"west"})) == left(frozenset({"north"}))
    assert left(frozenset({"west"})) != left(frozenset({"west"}), seed=1)


def test_times_count_by_their_event_and_answers_by_how_many_hold() -> None:
    by_events = fit_loss(source_of(label=lambda i: TimeToEvent(float(i), i % 2 == 0)), BY_LABEL)
    study = MemorySource()._study(2)
    assert by_events.severity(replace(study, label=TimeToEvent(1e6, event=False))) == pytest.approx(-1)
    assert by_events.severity(replace(study, label=TimeToEvent(1.0, event=True))) == pytest.approx(1)
    by_answers = fit_loss(source_of(label=lambda i: (i % 2 == 0, None, True)), BY_LABEL)
    assert by_answers.severity(replace(study, label=(True, None, True))) == pytest.approx(1)


def test_what_gives_no_law_is_refused() -> None:
    with pytest.raises(DataError, match=r"missing_from_start: score label: .* found the same for all 3000 studies.*Take the other"):
        fit_loss(source_of(label=lambda i: 1), BY_LABEL)
    with pytest.raises(SpecError, match="missing_from_start: expected a label that says how sick, found a mask"):
        fit_loss(source_of(label=lambda i: MaskLabel(drawn=True)), BY_LABEL)
    with pytest.raises(DataError, match="missing_from_start: expected studies to fit its law to, found none"):
        fit_loss(MemorySource(num_studies=0), BY_LABEL)
    images = replace(MemorySource(), schema=SCHEMA.model_copy(update={"modalities": SCHEMA.modalities[:1]}))
    with pytest.raises(SpecError, match="score ehr: expected series or tables of numbers, found none.*score: label"):
        fit_loss(images, MissingFromStart(rate=0.3))


@pytest.mark.parametrize("slope", [math.nan, math.inf, 1e3])
def test_a_slope_that_no_offset_balances_is_refused(slope: float) -> None:
    with pytest.raises(ValidationError):
        MissingFromStart(rate=0.3, slope=slope)


def test_folds_without_it_keep_their_identity() -> None:
    class Card:
        sha256 = "0" * 64

    card: Any = Card()
    plain = identity_of(card, None, 5, 0, b"sixteen or more bytes")
    assert plain == fingerprint({"card": "0" * 64, "folds": 5, "seed": 0, "key": key_check(b"sixteen or more bytes")})
    laws = (BY_LABEL, MissingFromStart(rate=0.7), MissingFromStart(rate=0.3))
    assert len({plain, *(identity_of(card, law, 5, 0, b"sixteen or more bytes") for law in laws)}) == 4

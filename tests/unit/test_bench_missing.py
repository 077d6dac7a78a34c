"""Studies of which more is missing the sicker they are, from the start."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from memory_source import SCHEMA, MemorySource

from draf_dist.errors import DataError, SpecError
from draf_dist.evaluation.bench_folds import identity_of
from draf_dist.evaluation.bench_missing import MissingByLabel, MissingSource
from draf_dist.schema.study import MaskLabel, Study, StudyLabel

LAW = MissingByLabel(rate=0.3, slope=1.0)


def labelled(label: Any) -> MemorySource:
    """3,000 studies with all modalities."""
    source = MemorySource(num_studies=3000, image_shape=(1, 2, 2))
    full = source._study(2)
    source.change = lambda i, study: replace(study, inputs=full.inputs, image_digests={}, quality={"cxr": 0.5}, label=label(i))
    return source


def lost(source: MemorySource, law: MissingByLabel = LAW) -> list[tuple[StudyLabel, int]]:
    """Label and number of modalities lost."""
    studies = [study for study in MissingSource(source, law).studies() if isinstance(study, Study)]
    return [(study.label, len(SCHEMA.names) - len(study.inputs)) for study in studies]


def share(found: Sequence[tuple[StudyLabel, int]], label: StudyLabel) -> float:
    mine = [number for own, number in found if own == label]
    return sum(mine) / len(mine) / len(SCHEMA.names)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_sicker_lose_more_as_the_law_says_and_the_mean_is_the_rate() -> None:
    source = labelled(lambda i: int(i % 5 == 0))
    law = MissingSource(source, LAW).law
    # Of a label that holds in a fifth, the standardised values are 2 and -1/2.
    died, survived = (law.probability("vitals", label) for label in (1, 0))
    assert 0.2 * died + 0.8 * survived == pytest.approx(0.3, abs=1e-9)
    assert math.log(died / (1 - died)) - math.log(survived / (1 - survived)) == pytest.approx(2.5, abs=1e-9)
    found = lost(source)
    # All three go with probability p^3; then one of the three comes back.
    assert share(found, 1) == pytest.approx(died - died**3 / 3, abs=0.03)
    assert share(found, 0) == pytest.approx(survived - survived**3 / 3, abs=0.02)


def test_without_slope_the_label_says_nothing() -> None:
    found = lost(labelled(lambda i: int(i % 5 == 0)), MissingByLabel(rate=0.3, slope=0))
    assert share(found, 1) == pytest.approx(share(found, 0), abs=0.04)


def test_one_modality_stays_and_of_the_others_nothing() -> None:
    source = MissingSource(MemorySource(num_studies=400), MissingByLabel(rate=0.9))
    before = {(s.subject, s.anchor, s.site): s for s in MemorySource(num_studies=400).studies() if isinstance(s, Study)}
    studies = [study for study in source.studies() if isinstance(study, Study)]
    assert len(studies) == len(before) == 400
    assert {len(study.inputs) for study in studies} == {1, 2}
    for study in studies:
        old = before[study.subject, study.anchor, study.site]
        assert study.inputs.keys() <= old.inputs.keys()
        assert {*study.image_digests, *study.quality} <= {"cxr"} & study.inputs.keys() | ({"cxr"} - old.inputs.keys())
        assert (study.label, study.where) == (old.label, old.where)


def test_a_study_loses_the_same_in_every_fold_and_another_with_another_seed() -> None:
    def left(held_out: frozenset[str], seed: int = 0) -> list[frozenset[str]]:
        inner = MemorySource(num_studies=200, held_out_sites=held_out)
        studies = MissingSource(inner, MissingByLabel(rate=0.5, seed=seed)).studies()
        return [frozenset(study.inputs) for study in studies if isinstance(study, Study)]

    assert left(frozenset({"west"})) == left(frozenset({"north"}))
    assert left(frozenset({"west"})) != left(frozenset({"west"}), seed=1)


def test_times_count_by_their_event_and_answers_by_how_many_hold() -> None:
    by_answers = MissingSource(labelled(lambda i: (i % 2 == 0, None, True)), LAW).law
    assert by_answers.probability("cxr", (True, None, True)) > 0.3 > by_answers.probability("cxr", (False, None, True))


def test_labels_that_say_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="a severity that varies, found one label for all 3000"):
        list(MissingSource(labelled(lambda i: 1), LAW).studies())
    with pytest.raises(SpecError, match="missing_by_label: expected a label that says how sick, found a mask"):
        list(MissingSource(labelled(lambda i: MaskLabel(drawn=True)), LAW).studies())


def test_folds_without_it_keep_their_identity() -> None:
    card: Any = MemoryCard()
    plain = identity_of(card, None, 5, 0, b"key")
    assert plain != identity_of(card, LAW, 5, 0, b"key") != identity_of(card, MissingByLabel(rate=0.7), 5, 0, b"key")


class MemoryCard:
    """What the identity asks of a card."""

    sha256 = "0" * 64

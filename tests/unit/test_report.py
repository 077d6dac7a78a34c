"""The report is one page that fetches nothing, escapes what it shows, and holds what evaluation.json holds."""

import json
import re
from html.parser import HTMLParser

import pytest
from hand_made_predictions import evaluation

from draf_dist.evaluation.report import estimate_text, number, render, signed
from draf_dist.evaluation.results import Evaluation
from draf_dist.evaluation.scores import METRICS
from draf_dist.evaluation.statistics import Estimate


@pytest.fixture(scope="module")
def made() -> Evaluation:
    return evaluation()


@pytest.fixture(scope="module")
def page(made: Evaluation) -> str:
    return render(made)


def test_the_page_loads_nothing_from_anywhere(page: str) -> None:
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?\s*(https?:)?//""", page)
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    assert "<script" not in page


def test_what_comes_from_data_is_escaped(page: str) -> None:
    assert "draf-&lt;script&gt;" in page
    assert "south &amp; &lt;east&gt;" in page


def test_every_tag_is_closed(page: str) -> None:
    class Balance(HTMLParser):
        void = frozenset({"meta", "br"})

        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in self.void:
                self.open.append(tag)

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    checker = Balance()
    checker.feed(page)
    assert checker.open == []


def test_every_part_of_the_evaluation_is_on_the_page(page: str, made: Evaluation) -> None:
    for heading in ("Headline", "Calibration", "Abstention", "Sites and missing patterns", "Robustness", "planted truth"):
        assert heading in page
    for split in made.splits:
        for name, estimate in split.scaled.items():
            assert METRICS[name].title in page
            assert number(estimate.value) in page
    for warning in made.warnings:
        assert warning.split("'")[0].split("<")[0][:40] in page


def test_without_a_planted_truth_the_page_does_not_speak_of_it() -> None:
    page = render(evaluation(with_truth=False, bootstrap=0))
    assert "nats lost" not in page.lower()
    assert "exact posterior" not in page


def test_the_stored_form_holds_no_nan_and_comes_back_equal(made: Evaluation) -> None:
    text = json.dumps(made.model_dump(mode="json"), allow_nan=False)
    assert Evaluation.model_validate_json(text) == made


def test_a_null_always_has_a_reason(made: Evaluation) -> None:
    def walk(value: object) -> list[dict]:
        if isinstance(value, dict):
            own = [value] if "value" in value and "reason" in value else []
            return own + [found for item in value.values() for found in walk(item)]
        return [found for item in value for found in walk(item)] if isinstance(value, list) else []

    estimates = walk(made.model_dump(mode="json"))
    assert len(estimates) > 100
    assert all(estimate["value"] is not None or estimate["reason"] for estimate in estimates)


def test_numbers_are_written_for_people() -> None:
    assert number(None) == "–"
    assert signed(0.0001) == "0.000"
    assert signed(-0.0001) == "0.000"
    assert signed(0.25, 1) == "+0.2"
    assert estimate_text(Estimate(value=0.8, low=0.7, high=0.9)) == "0.800 [0.700, 0.900]"

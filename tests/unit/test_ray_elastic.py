"""When workers are started, stopped for another number, or given up: decided without a cluster."""

import pytest

from draf_dist.launch.profile import RayProfile
from draf_dist.launch.ray_desk import Papers
from draf_dist.launch.ray_elastic import (
    PREEMPTION,
    RESIZE,
    SETTLE_S,
    Failures,
    Look,
    Steady,
    reason_to_stop,
    workers_to_start,
)


def look(*, ranks_on: str = "ab", leaving: str = "", more: int = 0, steady_s: float = SETTLE_S, running_s: float = 60.0) -> Look:
    """Nodes have names of one letter."""
    return Look(frozenset(ranks_on), frozenset(leaving), more, steady_s, running_s)


@pytest.mark.parametrize(
    ("places", "steady_s", "workers"),
    [
        (4, 0.0, 4),  # nothing to wait for
        (9, 0.0, 4),
        (2, 0.0, None),  # others may come any moment, or these be gone
        (2, SETTLE_S, 2),
        (1, SETTLE_S, 1),
        (0, 1e9, None),
    ],
)
def test_a_run_of_one_to_four_workers_starts_with_what_there_is(places: int, steady_s: float, workers: int | None) -> None:
    assert workers_to_start(places, steady_s, least=1, most=4) == workers


def test_a_run_of_a_fixed_number_waits_for_all_of_them() -> None:
    assert workers_to_start(3, 1e9, least=4, most=4) is None
    assert workers_to_start(4, 0.0, least=4, most=4) == 4


@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        (look(), None),
        (look(leaving="b"), PREEMPTION),
        (look(leaving="b", running_s=0.0), PREEMPTION),  # a notice can't wait
        (look(leaving="c"), None),  # no rank is there
        (look(more=1), RESIZE),
        (look(more=1, steady_s=SETTLE_S - 0.1), None),  # another node may follow it
        (look(more=1, running_s=59.9), None),
        (look(more=1, leaving="a"), PREEMPTION),
    ],
)
def test_running_workers_stop_for_a_notice_at_once_and_for_more_places_after_a_while(seen: Look, reason: str | None) -> None:
    assert reason_to_stop(seen, pause_s=60.0) == reason


def test_a_number_of_places_is_steady_from_the_moment_it_changed() -> None:
    steady = Steady()
    assert [steady.seen(value, now) for value, now in [(2, 10.0), (2, 12.5), (1, 13.0), (1, 14.0), (2, 15.0)]] == [
        0,
        2.5,
        0,
        1.0,
        0,
    ]


def test_a_run_that_gets_on_survives_any_number_of_failures() -> None:
    failures = Failures(allowed=1)
    for newest in range(0, 1000, 10):
        failures = failures.after(newest)
        assert not failures.are_too_many


def test_a_run_that_fails_without_getting_on_ends() -> None:
    """A checkpoint that turned out to be broken is no progress when it is written again."""
    failures, ended = Failures(allowed=2), []
    for newest in [0, 20, 20, 10, 20]:
        failures = failures.after(newest)
        ended.append(failures.are_too_many)
    assert ended == [False, False, False, True, True]
    assert Failures(allowed=0).after(0).are_too_many


def test_whoever_ends_a_run_is_not_overruled_by_a_change_of_its_nodes() -> None:
    papers = Papers()
    papers.ask_to_stop(RESIZE)
    assert papers.goes_on()
    assert papers.stop_reason() is None
    papers.ask_to_stop(RESIZE)
    papers.ask_to_stop("SIGTERM")
    papers.ask_to_stop(PREEMPTION)
    assert papers.stop_reason() == "SIGTERM"
    assert not papers.goes_on()


def test_every_failure_gets_its_own_verdict() -> None:
    papers = Papers()
    first = papers.fail("rank 0")
    assert (papers.open_failure(), papers.verdict(first)) == ("rank 0", None)
    papers.decide(True)
    second = papers.fail("rank 1")
    assert (papers.open_failure(), papers.verdict(first), papers.verdict(second)) == ("rank 1", True, None)
    papers.decide(False)
    assert (papers.open_failure(), papers.verdict(second)) == (None, False)


def test_the_least_number_of_workers_is_all_of_them_unless_said_otherwise() -> None:
    assert RayProfile(workers=4).least == 4
    assert RayProfile(workers=4, min_workers=1).least == 1
    with pytest.raises(ValueError, match="min_workers: expected at most workers, 4"):
        RayProfile(workers=4, min_workers=5)

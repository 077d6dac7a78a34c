"""A campaign's folder and study: what is continued, what is told late, what is refused."""

import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna import Trial
from optuna.trial import TrialState
from ray.tune import TuneError
from small_runs import ENCODERS, small_job, small_release

from draf_dist.errors import DataError, GateError, SpecError
from draf_dist.launch.profile import OneProcessProfile, RayProfile
from draf_dist.training.job import FinetuneJob
from draf_dist.training.jobs import load_job
from draf_dist.training.run import begin
from draf_dist.training.run_folder import Fence
from draf_dist.tuning.campaign import own_errors
from draf_dist.tuning.campaign_job import CampaignJob
from draf_dist.tuning.checks import check_campaign
from draf_dist.tuning.folder import Books, enter_campaign, find_campaign, open_books, orphans, settle
from draf_dist.tuning.leaderboard import rank_trials
from draf_dist.tuning.outcome import write_outcome
from draf_dist.tuning.places import profile_text
from draf_dist.tuning.records import TrialRecord
from draf_dist.tuning.rungs import RungEntry
from draf_dist.tuning.search import CampaignSearch, DurableHalving, budget_spent
from draf_dist.tuning.space import distribution, suggest

ALPHA, ACD = "finetune.model.reliability_alpha", "finetune.objective.lambda_acd"
SPACE = {ALPHA: {"low": 0.1, "high": 100, "log": True}, ACD: {"low": 0.01, "high": 1}}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_release(tmp_path_factory.mktemp("campaign"), num_subjects=40, seed=0)


def campaign(release: str, **changes: Any) -> CampaignJob:
    tree = {"name": "sought", "base": {"finetune": small_job(release)}, "budget": {"trials": 3}, "space": SPACE}
    return CampaignJob.model_validate({**tree, **changes})


@contextmanager
def books_of(release: str, out: Path, **changes: Any) -> Iterator[Books]:
    with open_books(enter_campaign(campaign(release, **changes), str(out)), 3) as books:
        yield books


def ask(books: Books) -> Trial:
    return books.study.ask({path: distribution(parameter) for path, parameter in books.folder.campaign.space.items()})


def record(trial: Trial, objective: float | None, **changes: Any) -> TrialRecord:
    state = "failed" if objective is None else "finished"
    found = {"trial": trial.number, "parameters": trial.params, "state": state, "objective": objective, "time": time.time()}
    return TrialRecord.model_validate({**found, **changes})


def states(books: Books) -> list[str]:
    return [trial.state.name for trial in books.study.trials]


def test_a_trial_that_was_written_down_is_told_and_one_that_was_not_is_continued(release: str, tmp_path: Path) -> None:
    with books_of(release, tmp_path / "c") as books:
        trials = [ask(books) for _ in range(3)]
        # As if the driver had been killed after the line, before the study heard of it.
        books.record(record(trials[0], 0.5))
        books.record(record(trials[1], None))
        begun = trials[2].params
    with books_of(release, tmp_path / "c") as books:
        assert states(books) == ["COMPLETE", "FAIL", "RUNNING"]
        assert books.study.trials[0].value == 0.5
        (orphan,) = orphans(books.study, books.records())
        assert (orphan.number, orphan.params) == (2, begun)


def test_a_trial_killed_between_its_parameters_gets_the_missing_ones(release: str, tmp_path: Path) -> None:
    with books_of(release, tmp_path / "a") as books:
        whole = ask(books).params
    with books_of(release, tmp_path / "b") as books:
        half = books.study.ask()
        suggest(half, ALPHA, books.folder.campaign.space[ALPHA])
    with books_of(release, tmp_path / "b") as books:
        (orphan,) = orphans(books.study, books.records())
        continued = Trial(books.study, orphan._trial_id)
        for path, parameter in books.folder.campaign.space.items():
            suggest(continued, path, parameter)
        assert continued.params == whole


def test_restarts_change_no_parameters(release: str, tmp_path: Path) -> None:
    def points(out: Path, *, restart: bool) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        # More than the ten that are drawn blindly.
        while len(found) < 14:
            with books_of(release, out, budget={"trials": 20}) as books:
                for _ in range(7 if restart else 14):
                    trial = ask(books)
                    found.append(trial.params)
                    value = abs(trial.params[ACD] - 0.3)
                    books.record(record(trial, value))
                    settle(books.study, books.records())
        return found

    once = points(tmp_path / "once", restart=False)
    assert points(tmp_path / "often", restart=True) == once
    assert len({point[ALPHA] for point in once}) == 14


def test_an_older_driver_writes_nothing_more(release: str, tmp_path: Path) -> None:
    with books_of(release, tmp_path / "c") as older, books_of(release, tmp_path / "c") as newer:
        trial = ask(newer)
        with pytest.raises(GateError, match="a later one"):
            older.record(record(trial, 0.5))
        with pytest.raises(GateError):
            older.enter(RungEntry(rung=1, trial=0, value=0.5, cutoff=None, stopped=False))
        newer.record(record(trial, 0.4))
        assert [each.objective for each in newer.folder.records()] == [0.4]


def test_a_changed_campaign_is_refused_and_says_in_what_it_differs(release: str, tmp_path: Path) -> None:
    enter_campaign(campaign(release), str(tmp_path / "c"))
    with pytest.raises(SpecError) as raised:
        enter_campaign(campaign(release, seed=1, base={"finetune": small_job(release, epochs=9)}), str(tmp_path / "c"))
    assert "base.finetune.epochs: expected 3 as before, found 9" in str(raised.value)
    assert "seed: expected 0 as before, found 1" in str(raised.value)
    with pytest.raises(SpecError, match="expected at least 3 as before"):
        enter_campaign(campaign(release, budget={"trials": 2}), str(tmp_path / "c"))


def test_a_campaign_can_be_extended(release: str, tmp_path: Path) -> None:
    first = enter_campaign(campaign(release), str(tmp_path / "c"))
    more = enter_campaign(campaign(release, budget={"trials": 9}, concurrent=4), str(tmp_path / "c"))
    assert (more.url, more.campaign.budget.trials) == (first.url, 9)
    # Without --out the folder is the same too.
    assert first.campaign.folder_name == more.campaign.folder_name


def test_a_delivery_that_has_come_since_changes_nothing(tmp_path: Path) -> None:
    release = small_release(tmp_path, num_subjects=40, seed=0)
    first = enter_campaign(campaign(release), str(tmp_path / "c"))
    small_release(tmp_path, num_subjects=60, seed=1)
    again = enter_campaign(campaign(release), str(tmp_path / "c"))
    assert again.campaign.base.finetune.release == first.campaign.base.finetune.release


def test_a_folder_of_something_else_is_left_alone(release: str, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.txt").write_text("mine")
    with pytest.raises(SpecError, match="an empty folder"):
        enter_campaign(campaign(release), str(tmp_path / "c"))


def test_trials_without_their_study_are_not_continued(release: str, tmp_path: Path) -> None:
    with books_of(release, tmp_path / "c") as books:
        books.record(record(ask(books), 0.5))
    (tmp_path / "c" / "study.db").unlink()
    with pytest.raises(DataError, match="expected the study of the trials"), books_of(release, tmp_path / "c"):
        pass


def test_the_best_finished_trial_wins_and_edges_are_named(release: str, tmp_path: Path) -> None:
    with books_of(release, tmp_path / "c") as books:
        trials = [ask(books) for _ in range(4)]
    numbers = [(0.4, "finished"), (0.3, "stopped"), (None, "failed"), (0.35, "finished")]
    records = [
        record(trial, objective, state=state, parameters={ALPHA: 99.9, ACD: 0.5}, epochs=2, best_epoch=1)
        for trial, (objective, state) in zip(trials, numbers, strict=True)
    ]
    board = rank_trials(campaign(release), records)
    assert [(row.trial, row.rank) for row in board.rows] == [(1, 1), (3, 2), (0, 3), (2, None)]
    assert board.best.trial == 3
    assert [warning.split(":")[0] for warning in board.warnings if "edge" in warning] == [ALPHA]
    assert any("1 trials failed" in warning for warning in board.warnings)


def test_a_state_the_study_knows_is_not_told_again(release: str, tmp_path: Path) -> None:
    with books_of(release, tmp_path / "c") as books:
        trial = ask(books)
        books.study.tell(trial, 0.7, state=TrialState.COMPLETE)
        settle(books.study, [record(trial, 0.1)])
        assert books.study.trials[0].value == 0.7


def test_decisions_are_on_disk_before_a_trial_hears_of_them(release: str, tmp_path: Path) -> None:
    reports = [(0, 1, 0.3), (1, 1, 0.5), (2, 1, 0.2)]

    def decisions(books: Books) -> list[str]:
        halving = DurableHalving(books)
        found = ({"epochs_done": epoch, "objective": value} for _, epoch, value in reports)
        trials = (SimpleNamespace(config={"number": number, "point": {ACD: 0.1 * number}}) for number, _, _ in reports)
        return [halving.on_trial_result(None, trial, result) for trial, result in zip(trials, found, strict=True)]

    with books_of(release, tmp_path / "c") as books:
        first = decisions(books)
        written = books.folder.entries()
    assert first == ["CONTINUE", "STOP", "CONTINUE"]
    assert [(entry.trial, entry.stopped) for entry in written] == [(0, False), (1, True), (2, False)]
    with books_of(release, tmp_path / "c") as books:
        assert decisions(books) == first
        assert books.folder.entries() == written


def test_worker_hours_are_those_of_all_workers_of_a_trial(release: str, tmp_path: Path) -> None:
    with books_of(release, tmp_path / "c", budget={"trials": 3, "worker_hours": 1}) as books:
        books.record(record(ask(books), 0.5, training_s=1200))
        assert not budget_spent(books, workers=2)
        assert budget_spent(books, workers=3)


def test_an_encoder_that_fine_tuning_could_not_take_over_is_refused_before_anything_runs(release: str) -> None:
    objective = {"kind": "masked_values", "modality": "vitals"}
    pretrain = {"name": "pre", "release": "data/none", "objective": objective, "encoder": ENCODERS["series"], "width": 8}
    finetune = small_job("data/none")
    good, wide = ({"finetune": finetune, "pretrain": {**pretrain, "width": width}} for width in (8, 16))
    # The campaign's release stands in for those of its jobs.
    here = {"release": release}
    check_campaign(campaign("", base=good).model_copy(update=here))
    with pytest.raises(SpecError, match=r"base\.finetune\.model: expected the encoder and the width of base\.pretrain"):
        check_campaign(campaign("", base=wide).model_copy(update=here))
    with pytest.raises(SpecError, match="data/none"):
        check_campaign(campaign("", base=good))


class Never:
    requested = None


def search_of(books: Books) -> CampaignSearch:
    return CampaignSearch(books, OneProcessProfile(), Never(), lambda _: None, lambda _: None)


def decision(books: Books, number: int, point: dict[str, Any], epoch: int, value: float) -> str:
    trial = SimpleNamespace(config={"number": number, "point": point})
    return DurableHalving(books).on_trial_result(None, trial, {"epochs_done": epoch, "objective": value})


def end(run: str, epochs: int = 1, **changes: Any) -> dict[str, Any]:
    progress = {"run": run, "pretraining": None, "epochs": epochs, "best_epoch": 1, "numbers": {"nll": 0.5}, **changes}
    return {"epochs_done": epochs, "objective": 0.5, "progress": json.dumps(progress), "ended": "finished"}


def wrapped(error: Exception) -> None:
    """As Ray Tune does."""
    try:
        raise error
    except Exception:  # noqa: BLE001
        raise TuneError("as text")  # noqa: B904


def test_what_ray_tune_wraps_comes_out_as_itself() -> None:
    with pytest.raises(GateError, match="taken over"), own_errors():
        wrapped(GateError("taken over"))
    with pytest.raises(TuneError), own_errors():
        wrapped(KeyError("a bug"))


def test_a_driver_that_was_taken_over_tells_the_study_nothing(release: str, tmp_path: Path) -> None:
    with books_of(release, tmp_path / "c") as books:
        search = search_of(books)
        search.suggest("a")
        Fence.take(books.folder.store)
        with pytest.raises(GateError, match="a later one"):
            search.on_trial_result("a", {"epochs_done": 1, "objective": 0.5})
        assert books.study.trials[0].intermediate_values == {}


def test_an_epoch_that_the_study_knows_from_another_driver_raises_no_warning(release: str, tmp_path: Path) -> None:
    with books_of(release, tmp_path / "c") as books:
        begun = ask(books)
        search = search_of(books)
        # By the driver that was taken over, after this one had looked.
        begun.report(0.4, 1)
        search.suggest("a")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            search.on_trial_result("a", {"epochs_done": 1, "objective": 0.5})
        assert books.study.trials[0].intermediate_values == {1: 0.4}


def test_a_trial_that_ends_at_a_rung_does_not_stand_there(release: str, tmp_path: Path) -> None:
    space = {"finetune.epochs": {"low": 1, "high": 9, "integer": True}}
    with open_books(enter_campaign(campaign(release, space=space), str(tmp_path / "c")), 9) as books:
        assert [decision(books, number, {"finetune.epochs": 9}, 1, 0.1) for number in (0, 1)] == ["CONTINUE", "CONTINUE"]
        assert decision(books, 2, {"finetune.epochs": 1}, 1, 0.9) == "CONTINUE"
        assert decision(books, 3, {"finetune.epochs": 2}, 1, 0.9) == "STOP"
        assert [entry.trial for entry in books.folder.entries()] == [0, 1, 3]


def test_trials_with_the_same_settings_stand_at_a_rung_once_and_book_their_run_once(release: str, tmp_path: Path) -> None:
    space = {"finetune.model.presence_bits": {"choices": [True, False]}}
    with books_of(release, tmp_path / "c", space=space, budget={"trials": 8}) as books:
        search = search_of(books)
        points = [search.suggest(str(number))["point"] for number in range(8)]
        for number, point in enumerate(points):
            run, again = str(point), point in points[:number]
            decision(books, number, point, 1, 0.5)
            search.on_trial_complete(str(number), end(run, training_s=10.0, spent_s=0.0 if again else 10.0))
        assert len(books.folder.entries()) == 2
        assert sum(record.training_s for record in books.records()) == 20
        board = rank_trials(books.folder.campaign, books.records())
        assert "6 trials repeated the settings of others: they trained nothing anew." in board.warnings
        assert {record.profile for record in books.records()} == {profile_text(OneProcessProfile())}


def test_a_repeated_trial_stops_where_the_first_one_did(release: str, tmp_path: Path) -> None:
    space = {"finetune.model.presence_bits": {"choices": [True, False]}}
    with books_of(release, tmp_path / "c", space=space, budget={"trials": 8}) as books:
        points = [ask(books).params for _ in range(16)]
        other = next(number for number, point in enumerate(points) if point != points[0])
        last = max(number for number, point in enumerate(points) if point == points[other])
        decisions = [decision(books, number, points[number], 1, value) for number, value in ((0, 0.1), (other, 0.9), (last, 0.05))]
        assert other < last
        assert decisions == ["CONTINUE", "STOP", "STOP"]


def test_a_look_at_the_folder_refuses_what_the_command_would_and_writes_nothing(release: str, tmp_path: Path) -> None:
    out = tmp_path / "c"
    store, there, _ = find_campaign(campaign(release), str(out))
    assert (store.url, there, out.exists()) == (str(out), None, False)
    enter_campaign(campaign(release), str(out))
    before = (out / "campaign.yaml").read_bytes()
    with pytest.raises(SpecError, match="seed: expected 0 as before, found 1"):
        find_campaign(campaign(release, seed=1), str(out))
    assert find_campaign(campaign(release, concurrent=4), str(out))[1] is not None
    assert [path.name for path in out.iterdir()] == ["campaign.yaml"]
    assert (out / "campaign.yaml").read_bytes() == before


def test_a_choice_with_which_no_encoder_could_be_taken_over_is_refused(release: str) -> None:
    objective = {"kind": "masked_values", "modality": "vitals"}
    pretrain = {"name": "pre", "release": release, "objective": objective, "encoder": ENCODERS["series"], "width": 8}
    base = {"finetune": small_job(release), "pretrain": pretrain}
    ours, theirs = "finetune.model.width", "pretrain.width"
    with pytest.raises(SpecError, match=r"^campaign: space\.finetune\.model\.width = 16: expected the encoder") as raised:
        check_campaign(campaign(release, base=base, space={ours: {"choices": [8, 16]}}))
    assert len(str(raised.value).splitlines()) == 1
    # Some of the trials can be trained with either of the two.
    both = {path: {"choices": [8, 16]} for path in (ours, theirs)}
    check_campaign(campaign(release, base=base, space=both))
    with pytest.raises(SpecError, match=r"space\.pretrain\.width = 32: expected"):
        check_campaign(campaign(release, base=base, space={**both, theirs: {"choices": [8, 16, 32]}}))


def test_what_is_missing_of_the_outcome_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_release(tmp_path, num_subjects=40, seed=0)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "c"
    with books_of("release", out) as books:
        folder = books.folder
        job = folder.campaign.base.finetune
        begin(job, f"{folder.trials_url}/{job.run_name}")
        books.record(record(ask(books), 0.5, run=job.run_name, epochs=3, best_epoch=2))
        settle(books.study, books.records())
    board = write_outcome(folder)
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert write_outcome(folder) == board
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == made
    for pattern in ("report.html", "winner.yaml", "hparams/*/events*"):
        (gone,) = out.glob(pattern)
        gone.unlink()
        write_outcome(folder)
        assert len(list(out.glob(pattern))) == 1
    winner = load_job(out / "winner.yaml")
    assert isinstance(winner, FinetuneJob)
    # From whatever folder it is used.
    assert winner.release.startswith(f"{tmp_path}/release@")


def test_the_release_of_a_relative_path_stays_that_of_the_campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_release(tmp_path, num_subjects=40, seed=0)
    monkeypatch.chdir(tmp_path)
    first = enter_campaign(campaign("release"), "c")
    small_release(tmp_path, num_subjects=60, seed=1)
    assert enter_campaign(campaign("release"), "c").campaign == first.campaign


def test_profiles_that_differ_are_named(release: str) -> None:
    found = {"parameters": {ALPHA: 1.0, ACD: 0.5}, "state": "finished", "objective": 0.5, "time": 0.0}
    profiles = (OneProcessProfile(device="cpu"), RayProfile(workers=2))
    records = [TrialRecord(trial=n, profile=profile_text(profile), **found) for n, profile in enumerate(profiles)]
    warned = "Trials ran under different profiles (one_process, 1 on cpu, fp32; ray, 2 on cpu, fp32)"
    assert any(warning.startswith(warned) for warning in rank_trials(campaign(release), records).warnings)
    assert not any("profiles" in warning for warning in rank_trials(campaign(release), records[:1]).warnings)


def test_a_grace_beyond_the_last_epoch_is_warned_of(release: str) -> None:
    found = {"parameters": {ALPHA: 1.0, ACD: 0.5}, "state": "finished", "objective": 0.5, "time": 0.0}
    boards = [rank_trials(campaign(release, stopping={"grace_epochs": grace}), [TrialRecord(trial=0, **found)]) for grace in (2, 3)]
    assert [any("nothing is ever stopped" in warning for warning in board.warnings) for board in boards] == [False, True]

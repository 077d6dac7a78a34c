"""Several evaluations of one run at the same time: none is harmed, and the results are all of one of them."""

import hashlib
import json
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hand_made_predictions import evaluation, studies

from draf_dist.data.bad_data import BadData
from draf_dist.data.loader_stats import LoaderStats
from draf_dist.errors import DataError, GateError
from draf_dist.evaluation.evaluate import check_predictions, read_evaluation, write_results
from draf_dist.evaluation.parts import Found, Part, Place, Setting, write_part
from draf_dist.evaluation.report import render
from draf_dist.evaluation.results import Evaluation
from draf_dist.evaluation.run_parts import GIVEN_UP_S, MARK, predict_all, remove_parts
from draf_dist.executor import Done, Outcome, ResultT, TaskT
from draf_dist.storage import LocalStore, Store

SETTING = Setting("run", "evaluating/0a", "a" * 64, 64, 0, BadData(), Place(), "visit")
PART = Part(SETTING, "release@1", "test", 0, 2, passes=3)
UIDS = {("release@1", "test"): np.arange(120, dtype=np.int64)}
FOUND = Found((studies()[0],), LoaderStats(members=240))
FEWER = Found((studies(119)[0],), LoaderStats(members=240))


@dataclass
class Predicting:
    """Stores what it is told for every part, and lets something happen before anyone reads it."""

    store: Store
    happens: Callable[[int], None] = lambda times: None
    found: Found = FOUND
    times: int = field(default=0)

    def map(self, function: Callable[[TaskT], ResultT], tasks: Sequence[TaskT]) -> Generator[Outcome[ResultT], None, None]:
        for index in range(len(tasks)):
            write_part(self.store, PART, self.found)
            self.times += 1
            self.happens(self.times)
            yield Done(index, None)


def predicted(store: Store, executor: Predicting) -> set[Part]:
    return set(predict_all(store, [PART], UIDS, executor, lambda done, total: None))


def test_a_part_that_another_evaluation_removed_is_made_again(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    executor = Predicting(store, lambda times: remove_parts(store, SETTING.folder) if times < 4 else None)
    assert predicted(store, executor) == {PART}
    assert executor.times == 4


def test_a_part_that_is_removed_while_it_is_read_is_made_again(tmp_path: Path) -> None:
    class Emptied(LocalStore):
        """What is listed is gone when it is read."""

        def list(self, prefix: str = "") -> list[str]:
            found = super().list(prefix)
            if executor.times < 4:
                remove_parts(LocalStore(tmp_path), SETTING.folder)
            return found

    store = Emptied(tmp_path)
    executor = Predicting(store)
    assert predicted(store, executor) == {PART}
    assert executor.times == 4


def test_parts_that_are_always_removed_are_not_blamed_on_the_disk(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with pytest.raises(GateError, match="found nothing in 1 of 1 parts, after 6 attempts"):
        predicted(store, Predicting(store, lambda _: remove_parts(store, SETTING.folder)))


def test_a_part_that_is_wrong_twice_ends_the_evaluation(tmp_path: Path) -> None:
    executor = Predicting(LocalStore(tmp_path), found=FEWER)
    with pytest.raises(DataError, match="another content in 1 of 1 parts, twice"):
        predicted(executor.store, executor)
    assert executor.times == 2


def test_parts_of_others_stay_until_nobody_has_been_at_them_for_a_day(tmp_path: Path) -> None:
    store, now = LocalStore(tmp_path), time.time()
    ages = {"working": 60.0, "given_up": GIVEN_UP_S + 60, "from_the_future": -GIVEN_UP_S - 60}
    for name, age in ages.items():
        write_part(store, replace(PART, setting=replace(SETTING, folder=f"evaluating/{name}")), FOUND)
        store.write(f"evaluating/{name}/{MARK}", json.dumps({"at": now - age}).encode())
    write_part(store, replace(PART, setting=replace(SETTING, folder="evaluating/unmarked")), FOUND)
    # Where parts lay before every evaluation had a folder.
    write_part(store, replace(PART, setting=replace(SETTING, folder="evaluating")), FOUND)
    predicted(store, Predicting(store))
    assert {path.split("/")[1] for path in store.list("evaluating")} == {"0a", "working"}
    remove_parts(store, SETTING.folder)
    assert {path.split("/")[1] for path in store.list("evaluating")} == {"working"}


def test_an_evaluation_at_work_renews_its_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, clock = LocalStore(tmp_path), [1e9]
    monkeypatch.setattr(time, "time", lambda: clock[0])

    def two_hours(_: int) -> None:
        clock[0] += 7200

    predicted(store, Predicting(store, two_hours))
    assert json.loads(store.read(f"{SETTING.folder}/{MARK}")) == {"at": 1e9 + 7200}


@pytest.fixture(scope="module")
def two() -> tuple["Results", "Results"]:
    """Of two evaluations of one run with different settings; only the first has a sweep's file."""
    made = evaluation(bootstrap=0)
    first = {"predictions/val.parquet": b"val 1", "predictions/test.parquet": b"test 1", "predictions/test@blur.parquet": b"blur 1"}
    second = {"predictions/val.parquet": b"val 2", "predictions/test.parquet": b"test 2"}
    return Results.of(made, first), Results.of(made.model_copy(update={"warnings": ("another",)}), second)


@dataclass(frozen=True)
class Results:
    """What an evaluation writes."""

    evaluation: Evaluation
    files: dict[str, bytes]

    @classmethod
    def of(cls, made: Evaluation, files: dict[str, bytes]) -> "Results":
        sha256 = {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
        about = made.about.model_copy(update={"trained_on": f"release@{made.about.release_version}"})
        return cls(made.model_copy(update={"about": about, "predictions": sha256}), files)

    def write(self, store: Store) -> None:
        write_results(store, self.evaluation, self.files)

    def are_in(self, store: Store) -> bool:
        """All of them, and of predictions nothing else."""
        return (
            read_evaluation(store) == self.evaluation
            and store.read("report.html") == render(self.evaluation).encode()
            and {path: store.read(path) for path in store.list("predictions")} == self.files
        )


class Interrupted(LocalStore):
    """Before one of the first writes or deletions, or before each, something else happens."""

    def __init__(self, root: Path, before: Callable[[int], None]) -> None:
        super().__init__(root)
        self.changes = 0
        self.before = before

    def write(self, path: str, data: bytes | memoryview) -> None:
        self._change()
        super().write(path, data)

    def delete(self, path: str) -> None:
        self._change()
        super().delete(path)

    def _change(self) -> None:
        self.changes += 1
        self.before(self.changes)


@pytest.mark.parametrize("turned", [False, True])
def test_whenever_another_evaluation_writes_its_results_all_are_of_one(
    turned: bool, two: tuple[Results, Results], tmp_path: Path
) -> None:
    one, other = two[::-1] if turned else two
    for moment in range(1, 7):
        plain = LocalStore(tmp_path / str(moment))
        store = Interrupted(plain.root, lambda n, plain=plain, moment=moment: other.write(plain) if n == moment else None)
        one.write(store)
        assert one.are_in(plain)
        check_predictions(plain, one.evaluation)


def test_two_evaluations_that_write_over_each_other_for_ever_end_as_refused(two: tuple[Results, Results], tmp_path: Path) -> None:
    one, other = two
    plain = LocalStore(tmp_path)

    def again(_: int) -> None:
        plain.write("predictions/val.parquet", other.files["predictions/val.parquet"])

    with pytest.raises(GateError, match="expected the results of this evaluation, found those of another"):
        one.write(Interrupted(tmp_path, again))


def test_predictions_of_another_evaluation_than_the_numbers_are_refused(two: tuple[Results, Results], tmp_path: Path) -> None:
    one, other = two
    store = LocalStore(tmp_path)
    one.write(store)
    # The other is killed when it has written one file.
    store.write("predictions/test.parquet", other.files["predictions/test.parquet"])
    found = read_evaluation(store)
    assert found is not None
    with pytest.raises(DataError, match=r"test\.parquet: expected the predictions of evaluation\.json beside it, found .* 1 of 3"):
        check_predictions(store, found)
    store.delete("predictions/test@blur.parquet")
    with pytest.raises(DataError, match="or none, in 2 of 3 files"):
        check_predictions(store, found)
    other.write(store)
    check_predictions(store, other.evaluation)

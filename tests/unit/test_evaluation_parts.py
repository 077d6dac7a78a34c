"""Parts of an evaluation: every study in one of them, names that say what a part is of, nothing read that is not whole."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hand_made_predictions import studies

from draf_dist.cli.evaluate import workers_of
from draf_dist.data.bad_data import BadData
from draf_dist.data.corruption import GaussianNoise, Missing
from draf_dist.data.loader_stats import LoaderStats
from draf_dist.errors import DataError
from draf_dist.evaluation.job import SweepSettings
from draf_dist.evaluation.parts import (
    CLEAN_STUDIES,
    REMOVALS,
    SWEEP_STUDIES,
    Found,
    Part,
    Place,
    Setting,
    clean_parts,
    is_covered,
    read_part,
    sweep_parts,
    write_part,
)
from draf_dist.evaluation.predictions import CLEAN, Applied
from draf_dist.evaluation.run_parts import predict_all
from draf_dist.evaluation.spread import read_together
from draf_dist.executor import Serial
from draf_dist.launch.profile import RayProfile
from draf_dist.launch.ray_executor import RayExecutor
from draf_dist.storage import LocalStore

SETTING = Setting("run", "evaluating/0a", "a" * 64, 64, 0, BadData(), Place(), "visit")
PART = Part(SETTING, "release@1", "test", 0, 2, passes=3)
UIDS = {("release@1", "test"): np.arange(120, dtype=np.int64)}
FOUND = Found((studies()[0],), LoaderStats(members=240))


@pytest.mark.parametrize(("num_studies", "batch_size"), [(1, 64), (64, 64), (1025, 64), (700, 1000), (5000, 48)])
def test_the_parts_of_a_split_are_all_of_its_batches_once(num_studies: int, batch_size: int) -> None:
    setting = replace(SETTING, batch_size=batch_size)
    uids = np.random.default_rng(0).permutation(num_studies).astype(np.int64)
    num_batches = -(-num_studies // batch_size)
    parts = clean_parts(setting, "release@1", "test", num_studies, 3)
    assert [step for part in parts for step in part.steps] == list(range(num_batches))
    assert all(len(part.steps) * batch_size <= max(CLEAN_STUDIES, batch_size) for part in parts)
    settings = SweepSettings(operations=(GaussianNoise(), Missing()), max_studies=200)
    swept = sweep_parts(setting, "release@1", settings, uids)
    for condition in (CLEAN, GaussianNoise(), Missing(), REMOVALS):
        mine = [part for part in swept if part.condition == condition]
        assert [step for part in mine for step in part.steps] == list(range(num_batches))
        assert {part.largest_uid for part in mine} == {min(num_studies, 200) - 1}
    chosen = [(uids[part.start * batch_size : part.stop * batch_size] < 200).sum() for part in swept]
    assert np.mean(chosen) <= max(2 * SWEEP_STUDIES, batch_size)


def test_a_part_is_named_by_all_that_its_numbers_depend_on_and_nothing_else() -> None:
    shared = {
        "model_sha256": "b" * 64,
        "batch_size": 32,
        "seed": 1,
        "bad_data": BadData(policy="quarantine"),
        "place": Place(threads=2),
    }
    others = [replace(PART, setting=replace(SETTING, **{name: value})) for name, value in shared.items()]
    others += [replace(PART, setting=replace(SETTING, place=Place("cuda")))]
    own = {"release": "release@2", "split": "val", "start": 1, "stop": 1, "passes": 4, "largest_uid": 9}
    others += [replace(PART, **{name: value}) for name, value in own.items()]
    others += [replace(PART, condition=one) for one in (REMOVALS, GaussianNoise(), GaussianNoise(grid=(0, 0.5)))]
    assert len({part.path for part in [PART, *others]}) == len(others) + 1
    elsewhere = replace(SETTING, run="s3://bucket/run", place=Place(decode_threads=9), visit="another")
    assert replace(PART, setting=elsewhere, release="s3://bucket/release@1").path == PART.path


def test_a_part_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    write_part(store, PART, FOUND)
    found = read_part(store, PART)
    assert found is not None
    assert found.read == FOUND.read
    (before,), (after,) = FOUND.predictions, found.predictions
    for name in ("uid", "site", "target", "probability", "total", "present", "reliability", "corruption_probability"):
        assert np.array_equal(getattr(before, name), getattr(after, name), equal_nan=name == "corruption_probability")
    nothing = replace(PART, condition=REMOVALS)
    write_part(store, nothing, Found((), LoaderStats()))
    assert read_part(store, nothing) == Found((), LoaderStats())


def test_what_is_damaged_cut_short_or_of_another_model_is_no_part(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert read_part(store, PART) is None
    write_part(store, PART, FOUND)
    data = store.read(PART.path)
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    other = replace(PART, setting=replace(SETTING, model_sha256="b" * 64))
    write_part(store, other, FOUND)
    for wrong in (bytes(flipped), data[:-1], data[:20], b"", b"[]\n", store.read(other.path)):
        store.write(PART.path, wrong)
        assert read_part(store, PART) is None


def test_a_part_covers_its_studies_each_once_in_order() -> None:
    uids, predictions = UIDS["release@1", "test"], FOUND.predictions[0]
    assert is_covered(PART, FOUND, uids)
    one_less = Found((predictions.rows(np.arange(1, 120)),), FOUND.read)
    twice = Found((predictions.rows(np.r_[0, 0:119]),), FOUND.read)
    turned = Found((predictions.rows(np.arange(120)[::-1]),), FOUND.read)
    for wrong in (one_less, twice, turned, Found((), FOUND.read)):
        assert not is_covered(PART, wrong, uids)
    spared = replace(PART, setting=replace(SETTING, bad_data=BadData(policy="quarantine")))
    assert is_covered(spared, replace(one_less, read=LoaderStats(members=240, left_out=2, lost_samples=1)), uids)
    assert not is_covered(spared, one_less, uids)
    some = replace(PART, largest_uid=49, condition=GaussianNoise())
    hit = replace(predictions.rows(np.arange(50)), applied=Applied("gaussian", 1))
    assert is_covered(some, Found((hit,), FOUND.read), uids)
    assert not is_covered(some, FOUND, uids)
    assert not is_covered(some, Found((hit.rows(np.arange(1, 50)),), FOUND.read), uids)


def test_what_is_whole_is_not_made_again(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    write_part(store, PART, FOUND)
    seen: list[tuple[int, int]] = []
    found = predict_all(store, [PART], UIDS, Serial(), lambda done, total: seen.append((done, total)))
    assert found.keys() == {PART}
    assert seen == [(1, 1)]


def test_what_may_be_left_out_is_asked_of_all_parts_of_a_split_together() -> None:
    rule, clean, bad = BadData(policy="quarantine", limit=0.01), LoaderStats(members=1500), LoaderStats(members=500, left_out=20)
    assert read_together([Found((), clean), Found((), bad)], rule, "split test") == clean + bad
    with pytest.raises(DataError, match=r"split test: expected at most 1\.0% of the members unusable, found 21 of 2001"):
        read_together([Found((), clean), Found((), bad), Found((), LoaderStats(members=1, left_out=1))], rule, "split test")


def test_a_profile_says_where_parts_are_predicted(tmp_path: Path) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text("kind: ray\nworkers: 3\ngpus_per_worker: 1\nthreads: 2\ndecode_threads: 5\n")
    workers = workers_of(profile, "s3://bucket/run")
    assert workers.executor == RayExecutor(RayProfile(workers=3, gpus_per_worker=1, threads=2, decode_threads=5), "s3://bucket/run")
    assert workers.place == Place("cuda", threads=2, decode_threads=5)
    profile.write_text("kind: one_process\ndevice: cpu\nthreads: 2\ndecode_threads: 5\n")
    here = workers_of(profile, "run")
    assert isinstance(here.executor, Serial)
    assert here.place == Place("cpu", threads=2, decode_threads=5)

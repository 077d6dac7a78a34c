"""A Ray cluster of the command's own that does not come up, as on a machine that is too busy for it."""

from pathlib import Path

import pytest
import ray

from draf_dist.errors import UnreachableError
from draf_dist.launch import ray_cluster
from draf_dist.launch.profile import RayProfile


def test_an_error_that_is_no_late_start_stays_what_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(**arguments: object) -> None:
        raise TypeError("init() got an unexpected keyword argument")

    monkeypatch.setattr(ray, "init", wrong)
    monkeypatch.setattr(ray_cluster, "TEMPORARY", str(tmp_path))
    with pytest.raises(TypeError, match="unexpected keyword"), ray_cluster.ray_cluster(RayProfile(workers=2)):
        pass
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_does_not_come_up_is_no_bug_and_leaves_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def too_late(**arguments: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because ...")

    # Whether Ray's processes are up in time can't be asked for otherwise.
    monkeypatch.setattr(ray, "init", too_late)
    monkeypatch.setattr(ray_cluster, "TEMPORARY", str(tmp_path))
    with (
        pytest.raises(UnreachableError, match="did not come up .* The same command tries again"),
        ray_cluster.ray_cluster(RayProfile(workers=2)),
    ):
        pass
    assert not list(tmp_path.iterdir())

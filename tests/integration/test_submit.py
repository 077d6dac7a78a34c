"""A job to a real Ray cluster with a token, of two raylets in processes of their own: submitted, followed, stopped, continued."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from forked_ranks import run_on_ranks
from small_runs import silent, small_model, small_release

from draf_dist.cli.app import main
from draf_dist.errors import GateError, SpecError, UnreachableError
from draf_dist.launch.bundle import Bundle, bundle
from draf_dist.launch.cluster_profile import ClusterProfile, load_cluster
from draf_dist.launch.local_ray import LocalRay
from draf_dist.launch.local_s3 import LocalS3
from draf_dist.launch.package import Package, find_token, pack
from draf_dist.launch.ray_cluster import TOKEN
from draf_dist.launch.ray_dashboard import Dashboard
from draf_dist.launch.ray_jobs import check_succeeded, follow, submit
from draf_dist.storage import open_store
from draf_dist.training.deepspeed_config import DeepSpeedConfig
from draf_dist.training.deepspeed_engine import DeepSpeedRanks
from draf_dist.training.interrupt import Interrupt
from draf_dist.training.jobs import load_job
from draf_dist.training.journal import read_lines
from draf_dist.training.run import attempt, begin

EPOCHS = 24
PAUSE_S = 3.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class World:
    """A cluster that runs, and the files that a user would have. folder: where the run folders and files lie."""

    ray: LocalRay
    folder: Path
    storage: str

    @property
    def job(self) -> Path:
        return self.folder / "job.yaml"

    @property
    def cluster(self) -> Path:
        return self.folder / "cluster.yaml"

    @property
    def profile(self) -> ClusterProfile:
        return load_cluster(self.cluster)

    @property
    def bundle(self) -> Bundle:
        return bundle(load_job(self.job), self.profile)

    def start(self, *options: str, cluster: Path | None = None, **variables: str) -> "subprocess.Popen[str]":
        """`draf submit` in a process of its own."""
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "draf_dist.cli.app",
                "submit",
                str(self.job),
                "--cluster",
                str(cluster or self.cluster),
                *options,
            ],
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def here(self, *options: str) -> tuple[int, str]:
        """`draf submit` in this process, which has waited for its imports already: exit code and standard output."""
        said = io.StringIO()
        with redirect_stdout(said), pytest.raises(SystemExit) as ended:
            main(["submit", str(self.job), "--cluster", str(self.cluster), *options])
        return int(str(ended.value.code)), said.getvalue()

    def write_profile(self, name: str, dashboard: str) -> Path:
        shape = {"cpus": 1, "memory_gib": 4}
        train = {"kind": "ray", "address": "auto", "workers": 2, "collective_timeout_s": 60}
        profile = {
            "kind": "cluster",
            "name": "here",
            "image": "draf_dist:0.1.0-cpu",
            "storage": self.storage,
            "dashboard": dashboard,
        }
        path = self.folder / name
        path.write_text(json.dumps({**profile, "head": shape, "workers": {**shape, "cpus": 2, "count": 1}, "train": train}))
        return path


@pytest.fixture(scope="module")
def world(s3_server: LocalS3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("submit")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        bucket = s3_server.create_bucket("test-submit")
        release = small_release(folder, num_subjects=120, seed=1, out=f"{bucket}/release")
        with LocalRay(TOKEN, cpus=1, more_raylets=1) as ray:
            for name, value in ray.environment.items():
                patch.setenv(name, value)
            job = {"name": "submitted", "release": release, "model": small_model("mean"), "batch_size": 12, "epochs": EPOCHS}
            (folder / "job.yaml").write_text(json.dumps({**job, "patience": EPOCHS, "passes_train": 2, "passes_eval": 3}))
            made = World(ray, folder, f"{bucket}/runs")
            made.write_profile("cluster.yaml", ray.dashboard)
            yield made
            pids = ray.pids
    assert len(pids) > 8
    assert not [pid for pid in pids if lives(pid)]


def lives(pid: int) -> bool:
    """A process that has ended stays in the table until its parent, or the system, has taken note of it."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Tunnel:
    """A port that leads to another one, and can be cut."""

    def __init__(self, target: str) -> None:
        self._target = int(target.rpartition(":")[2])
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self.refused = 0
        self._is_cut = False
        threading.Thread(target=self._accept, daemon=True).start()

    @contextmanager
    def cut(self) -> Iterator[None]:
        """No connection lives or begins meanwhile."""
        self._is_cut = True
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        yield
        self._is_cut = False

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._server.accept()
                if self._is_cut:
                    self.refused += 1
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self._target))
                self._open += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=pair, daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def tunnel(world: World) -> Iterator[Tunnel]:
    made = Tunnel(world.ray.dashboard)
    yield made
    made.close()


@dataclass(frozen=True)
class Story:
    """What was said and left by a job that was stopped in mid-run and then submitted again."""

    submitted: list[str]
    second: list[str]
    again: list[str]
    codes: dict[str, int]
    after_ctrl_c: dict[str, Any]
    after_stop: dict[str, Any]
    losses_after_stop: list[tuple[int, float]]
    in_the_end: dict[str, Any]
    refused_by_tunnel: int


@pytest.fixture(scope="module")
def story(world: World, tunnel: Tunnel) -> Story:
    """Submitted; followed by a second process until Ctrl-C; stopped; submitted again and followed through a tunnel that is cut."""
    submitter = world.start()
    submitted = until(submitter, "Submitted as")
    follower = world.start()
    submitted += until(submitter, "epoch 1/")
    second = until(follower, "epoch 1/")
    follower.send_signal(signal.SIGINT)
    second += until(follower)
    after_ctrl_c = json.loads(world.here("--status", "--json")[1])
    stopped, _ = world.here("--stop")
    submitted += until(submitter)
    after_stop = json.loads(world.here("--status", "--json")[1])
    before = losses(after_stop["run_url"])
    resubmitter = world.start(cluster=world.write_profile("tunnel.yaml", tunnel.url))
    again = until(resubmitter, "epoch ")
    with tunnel.cut():
        time.sleep(PAUSE_S)
    again += until(resubmitter)
    processes = {"submitted": submitter, "second": follower, "again": resubmitter}
    codes = {"stop": stopped, **{name: process.wait() for name, process in processes.items()}}
    in_the_end = json.loads(world.here("--status", "--json")[1])
    return Story(submitted, second, again, codes, after_ctrl_c, after_stop, before, in_the_end, tunnel.refused)


def until(process: "subprocess.Popen[str]", start: str | None = None) -> list[str]:
    """The lines that it prints, up to the first that begins so; without one to its end."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if start is not None and line.startswith(start):
            return lines
    assert start is None, "\n".join(lines)
    return lines


def losses(run_url: str) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_lines(open_store(run_url), "metrics.jsonl") if line["event"] == "step"]


def epochs_in(lines: list[str]) -> list[int]:
    return [int(line.split()[1].partition("/")[0]) for line in lines if line.startswith("epoch ")]


def test_a_wrong_token_ends_with_code_6_and_says_where_the_token_comes_from(world: World) -> None:
    refused = world.start(RAY_AUTH_TOKEN="not-the-token-of-this-cluster")
    (error,) = [line for line in until(refused) if line.startswith("error:")]
    assert refused.wait() == UnreachableError.exit_code
    assert f"{world.ray.dashboard}: expected this cluster's token, found one that the cluster refuses" in error
    assert "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH" in error
    assert "not-the-token" not in error


def test_without_a_token_the_cluster_is_not_reached_either(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    with pytest.raises(UnreachableError, match="expected this cluster's token, found none"):
        Dashboard(world.ray.dashboard)


def test_what_will_be_uploaded_is_shown_before_it_is_sent(story: Story) -> None:
    text = [" ".join(line.split()) for line in story.submitted]
    sent = next(number for number, line in enumerate(text) if line.startswith("Submitted as"))
    assert all(any(name in line for line in text[:sent]) for name in ("job.yaml", "cluster.yaml", "all"))


def test_a_run_that_is_active_is_followed_and_no_second_one_is_started(story: Story) -> None:
    (told,) = [line for line in story.second if line.endswith("already; no other one is started.")]
    assert told.startswith(story.after_stop["id"])
    assert story.after_stop["attempt"] == 1


def test_ctrl_c_ends_the_following_and_not_the_job(story: Story) -> None:
    assert story.codes["second"] == 5
    assert "It goes on: the same command follows it again, --stop stops it." in story.second[-1]
    assert story.after_ctrl_c["state"] == "RUNNING"


def test_a_stopped_run_has_its_checkpoint_and_ends_with_code_5(story: Story) -> None:
    assert story.codes["stop"] == 0
    assert story.codes["submitted"] == 5
    assert "found that it was stopped" in story.submitted[-1]
    assert story.after_stop["state"] == "STOPPED"
    assert story.after_stop["run_folder"]["state"] == "interrupted"
    # To the last step: nothing of what was computed is lost.
    assert story.after_stop["run_folder"]["steps"] == story.losses_after_stop[-1][0]


def test_submitted_again_the_run_continues_where_it_stopped(story: Story) -> None:
    assert story.codes["again"] == 0
    assert (story.in_the_end["state"], story.in_the_end["attempt"], story.in_the_end["exit_code"]) == ("SUCCEEDED", 2, 0)
    assert story.in_the_end["run_url"] == story.after_stop["run_url"]
    assert story.in_the_end["run_folder"] | {"steps": 0} == {"state": "finished", "attempts": 2, "epochs": EPOCHS, "steps": 0}
    done = story.after_stop["run_folder"]["epochs"]
    assert 0 < done < EPOCHS
    assert losses(story.in_the_end["run_url"])[: len(story.losses_after_stop)] == story.losses_after_stop


def test_a_connection_that_is_cut_loses_no_line_and_shows_none_twice(story: Story) -> None:
    assert story.refused_by_tunnel > 0
    assert epochs_in(story.again) == list(range(story.after_stop["run_folder"]["epochs"] + 1, EPOCHS + 1))


def test_nothing_but_the_job_is_printed(story: Story) -> None:
    """Epochs, then where the wall time went, then the result; and which rank is slow, on a machine that has other work too."""
    begin, end = (next(n for n, line in enumerate(story.again) if line.startswith(what)) for what in ("Submitted as", "Finished"))
    books = next(number for number, line in enumerate(story.again) if line.startswith("wall "))
    assert begin < books < end
    said = story.again[begin + 1 : books] + story.again[end:]
    words = {line.split()[0] for line in said if line and not re.match(r"warning: step \d+: rank \d+", line)}
    assert words <= {"epoch", "Finished", "Run:"}


def run_rank(rank: int, world: int, url: str, config: DeepSpeedConfig) -> None:
    """A rank of this machine, without any cluster."""
    assert attempt(url, DeepSpeedRanks(config, torch.device("cpu")), silent(), Interrupt()).finished


def test_the_losses_of_a_submitted_run_are_those_of_plain_ranks_bit_for_bit(world: World, story: Story, tmp_path: Path) -> None:
    local = begin(load_job(world.job), str(tmp_path / "local")).url
    run_on_ranks(run_rank, world.profile.train.workers, local, world.profile.train.deepspeed)
    assert losses(local) == losses(story.in_the_end["run_url"])
    model = "model/model.safetensors"
    assert open_store(local).read(model) == open_store(story.in_the_end["run_url"]).read(model)


def test_the_cluster_is_told_no_secret(world: World, story: Story) -> None:
    dashboard = Dashboard(world.ray.dashboard)
    told = repr(dashboard.get_job_info(story.after_stop["id"])) + dashboard.get_job_logs(story.after_stop["id"])
    assert story.after_stop["run_url"] in told
    for name in ("RAY_AUTH_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert os.environ[name] not in told


def test_a_job_that_fails_ends_with_its_own_exit_code(world: World) -> None:
    code, said = world.here("--set", f"release={world.profile.storage}/nothing")
    assert code == SpecError.exit_code
    assert "error: " in said


def test_uploaded_code_goes_before_the_installed_one(world: World) -> None:
    made = world.bundle
    code = dict(pack(made, with_code=True).files) | {"draf_dist/cli/app.py": b"raise SystemExit(4)"}
    begun = submit(Bundle("other-code", made.run_url, made.files), world.profile, Package(code))
    ended = follow(begun, world.profile, lambda line: None)
    assert (ended.state, ended.exit_code) == ("FAILED", 4)
    with pytest.raises(GateError, match="found exit code 4"):
        check_succeeded(ended)


def test_what_was_never_submitted_has_no_state(world: World) -> None:
    assert world.here("--status", "--set", "seed=7")[0] == SpecError.exit_code
    with pytest.raises(UnreachableError, match="expected a cluster that knows this submission, found another"):
        Dashboard(world.ray.dashboard).get_job_info("never-submitted-1")


def test_the_token_is_looked_for_where_ray_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_token({}) is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of the home folder\n")
    (tmp_path / "named").write_text("of the file\n")
    assert find_token({}) == "of the home folder"
    named = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "named")}
    assert find_token(named) == "of the file"
    assert find_token({**named, "RAY_AUTH_TOKEN": "of the variable"}) == "of the variable"
    assert find_token({**named, "RAY_AUTH_MODE": "disabled"}) is None
    with pytest.raises(SpecError, match="RAY_AUTH_TOKEN_PATH: expected a file"):
        find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "nothing")})


def test_where_nothing_answers_the_address_is_named() -> None:
    with pytest.raises(UnreachableError, match="http://127.0.0.1:9: expected the dashboard of a Ray cluster, found none") as caught:
        Dashboard("http://127.0.0.1:9")
    assert caught.value.exit_code == 6


def test_ray_address_does_not_lead_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:7")
    with pytest.raises(UnreachableError, match="127.0.0.1:9"):
        Dashboard("http://127.0.0.1:9")

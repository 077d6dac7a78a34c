"""The way to a dashboard, against a server that says what a test tells it: the token goes there alone, and no line is lost."""

import json
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray

from draf_dist.errors import DrafError, UnreachableError
from draf_dist.launch import ray_dashboard, ray_jobs
from draf_dist.launch.cluster_profile import ClusterProfile, load_cluster
from draf_dist.launch.ray_dashboard import Dashboard
from draf_dist.launch.ray_jobs import Submission, check_succeeded, follow

LAPTOP = load_cluster(Path(__file__).resolve().parents[2] / "cluster" / "profiles" / "laptop.yaml")
TOKEN = "the-token-of-the-tests"
BEGUN = Submission("first-01234567-1", 1, "RUNNING", "s3://b/run", None, None, None, "")
VERSION = "/api/version"
JOB = f"/api/jobs/{BEGUN.id}"
LOGS = f"{JOB}/logs"


def job(state: str) -> tuple[int, dict[str, object]]:
    return 200, {"type": "SUBMISSION", "entrypoint": "true", "submission_id": BEGUN.id, "status": state}


def log(text: str) -> tuple[int, dict[str, object]]:
    return 200, {"logs": text}


@dataclass
class Server:
    """Answers as told, the last answer of a path for ever. seen: (path, header Authorization) of every request."""

    url: str
    answers: dict[str, deque[tuple[int, dict[str, object]]]] = field(default_factory=dict)
    seen: list[tuple[str, str | None]] = field(default_factory=list)

    def will_say(self, path: str, *answers: tuple[int, dict[str, object]]) -> None:
        self.answers[path] = deque(answers)

    def answer(self, path: str) -> tuple[int, dict[str, object]]:
        told = self.answers.get(path, deque([(404, {})]))
        return told.popleft() if len(told) > 1 else told[0]

    @property
    def profile(self) -> ClusterProfile:
        return LAPTOP.model_copy(update={"dashboard": self.url})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.seen.append((self.path, self.headers.get("Authorization")))
            status, content = made.answer(self.path)
            self.send_response(status)
            if status == 302:
                self.send_header("Location", str(content["to"]))
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made = Server(f"http://127.0.0.1:{listening.server_port}")
    made.will_say(VERSION, (200, {"ray_version": ray.__version__}))
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    for module in (ray_dashboard, ray_jobs):
        monkeypatch.setattr(module, "PATIENCE_S", 0.3)
        monkeypatch.setattr(module, "RETRY_INTERVAL_S", 0.01)
    monkeypatch.setattr(ray_jobs, "POLL_S", 0.01)
    yield made
    listening.shutdown()
    listening.server_close()
    thread.join()


def test_the_token_goes_through_no_proxy_to_this_machine(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    Dashboard(server.url)
    assert set(server.seen) == {(VERSION, f"Bearer {TOKEN}")}


def test_to_another_machine_the_proxy_of_the_environment_is_taken(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    server.will_say(f"http://ray.example.org:8265{VERSION}", (200, {"ray_version": ray.__version__}))
    Dashboard("http://ray.example.org:8265")
    assert {path for path, _ in server.seen} == {f"http://ray.example.org:8265{VERSION}"}


def test_a_netrc_file_does_not_replace_the_token(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password hunter2\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    Dashboard(server.url)
    assert set(server.seen) == {(VERSION, f"Bearer {TOKEN}")}


def test_without_a_token_none_is_sent_even_if_ray_remembers_one(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's core reads a token once per process, and its client adds that one to every request."""
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    dashboard = Dashboard(server.url)
    dashboard._headers = {"Authorization": "Bearer of-another-cluster"}
    dashboard.get_version()
    assert {authorization for _, authorization in server.seen} == {None}


def test_the_token_follows_no_answer_that_leads_elsewhere(server: Server) -> None:
    server.will_say(VERSION, (302, {"to": f"{server.url}/elsewhere"}))
    with pytest.raises(UnreachableError, match="found something else"):
        Dashboard(server.url)
    assert [path for path, _ in server.seen] == [VERSION]


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_refused_is_named_and_not_repeated(server: Server, status: int) -> None:
    server.will_say(VERSION, (status, {}))
    with pytest.raises(UnreachableError, match="expected this cluster's token, found one that the cluster refuses") as caught:
        Dashboard(server.url)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_in_front_of_a_cluster_that_is_away_is_no_cluster(server: Server, status: int) -> None:
    server.will_say(VERSION, (status, {}))
    with pytest.raises(UnreachableError, match="expected the dashboard of a Ray cluster"):
        Dashboard(server.url)


@pytest.mark.parametrize("status", [502, 503, 504])
def test_while_following_a_dashboard_that_is_away_is_asked_again(server: Server, status: int) -> None:
    server.will_say(JOB, job("RUNNING"), (status, {}), (status, {}), job("SUCCEEDED"))
    server.will_say(LOGS, log("one\n"), (status, {}), log("one\ntwo\n"))
    shown: list[str] = []
    assert follow(BEGUN, server.profile, shown.append).state == "SUCCEEDED"
    assert shown == ["one", "two"]


def test_a_dashboard_that_stays_away_ends_the_following(server: Server) -> None:
    server.will_say(JOB, job("RUNNING"), (503, {}))
    server.will_say(LOGS, log("one\n"))
    with pytest.raises(UnreachableError, match=r"none that answers \(HTTP 503\)"):
        follow(BEGUN, server.profile, lambda line: None)


def test_the_end_of_the_log_is_asked_for_until_it_comes(server: Server) -> None:
    server.will_say(JOB, job("RUNNING"), job("SUCCEEDED"))
    server.will_say(LOGS, (500, {}), (500, {}), (500, {}), log("one\ntwo\n"))
    shown: list[str] = []
    follow(BEGUN, server.profile, shown.append)
    assert shown == ["one", "two"]


def test_a_log_whose_end_can_not_be_had_is_no_success(server: Server) -> None:
    server.will_say(JOB, job("RUNNING"), job("SUCCEEDED"))
    server.will_say(LOGS, log("one\n"), (500, {}))
    with pytest.raises(
        UnreachableError, match="expected the end of its log, found none that can be read. The job itself is SUCCEEDED"
    ):
        follow(BEGUN, server.profile, lambda line: None)


@pytest.mark.parametrize(("exit_code", "continues"), [(1, True), (2, False), (3, False), (4, False), (6, True)])
def test_what_would_fail_again_is_to_be_mended_first(exit_code: int, continues: bool) -> None:
    failed = Submission(BEGUN.id, 1, "FAILED", BEGUN.run_url, None, None, exit_code, "")
    with pytest.raises(DrafError) as caught:
        check_succeeded(failed)
    assert caught.value.exit_code == exit_code
    assert ("Submitted again, the run continues" in str(caught.value)) is continues
    assert ("Mend the cause first" in str(caught.value)) is not continues

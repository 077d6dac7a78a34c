"""A real S3 server behind a proxy that breaks things: the right bytes or the right error, in time, and counted."""

import json
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from conftest import S3
from fault_server import FaultServer

from draf_dist.errors import SpecError, UnreachableError
from draf_dist.launch.local_s3 import LocalS3
from draf_dist.storage import MissingError, Store, open_store
from draf_dist.storage.retry import Reason, RetryPolicy

CONTENT = bytes(range(256)) * 1024
STALL_S = 0.75  # long for a healthy server, also on a busy machine
SPANS = [(0, 1000), (5, 200_000), (261_000, 300_000)]


@pytest.fixture(scope="module")
def opened(s3_server: LocalS3) -> Iterator[tuple[FaultServer, Store]]:
    """One for all tests: to open a store takes longer than most of them."""
    url = s3_server.create_bucket(f"test-{secrets.token_hex(6)}")
    with FaultServer(s3_server.endpoint) as faults, pytest.MonkeyPatch.context() as patch:
        for name, value in (s3_server.environment | {"AWS_ENDPOINT_URL": faults.url}).items():
            patch.setenv(name, value)
        patch.setenv("DRAF_RETRY_FOR_S", "20")
        patch.setenv("DRAF_STALL_TIMEOUT_S", str(STALL_S))
        yield faults, open_store(f"{url}/p")


@pytest.fixture
def faults(opened: tuple[FaultServer, Store]) -> FaultServer:
    opened[0].clear()
    opened[0].log.clear()
    return opened[0]


@pytest.fixture
def store(opened: tuple[FaultServer, Store], faults: FaultServer) -> Store:
    store = opened[1]
    for path in store.list():
        store.delete(path)
    store.write("a/x", CONTENT)
    return store


def since(store: Store, act: Callable[[], object]) -> tuple[object, int, int, dict[Reason, int], float]:
    """What act returns, and the requests, bytes read and retries that it cost, and its seconds."""
    before, start = store.traffic.snapshot(), time.monotonic()
    result = act()
    seconds, after = time.monotonic() - start, store.traffic.snapshot()
    reasons = {reason: n - before.by_reason.get(reason, 0) for reason, n in after.by_reason.items()}
    num_bytes = after.bytes_read - before.bytes_read
    return result, after.requests - before.requests, num_bytes, {reason: n for reason, n in reasons.items() if n}, seconds


FAULTS: dict[str, tuple[Callable[[FaultServer], None], Reason, int]] = {
    "busy": (lambda faults: faults.next(503, times=5), Reason.THROTTLED, 5),
    "too many requests": (lambda faults: faults.next(429), Reason.THROTTLED, 1),
    "broken": (lambda faults: faults.next(500, times=2), Reason.SERVER, 2),
    "gateway": (lambda faults: faults.next(502), Reason.SERVER, 1),
    "reset": (lambda faults: faults.reset(times=3), Reason.CONNECTION, 3),
    "reset in the body": (lambda faults: faults.reset(after_bytes=400), Reason.SHORT, 1),
    "cut": (lambda faults: faults.cut(after_bytes=400), Reason.SHORT, 1),
    "short": (lambda faults: faults.shorten(to_bytes=400), Reason.SHORT, 1),
    "silence": (lambda faults: faults.stall(30), Reason.STALLED, 1),
    "silence in the body": (lambda faults: faults.stall(30, after_bytes=400), Reason.STALLED, 1),
}


@pytest.mark.parametrize("name", FAULTS)
def test_ranges_arrive_whole_whatever_the_network_does(store: Store, faults: FaultServer, name: str) -> None:
    inject, reason, times = FAULTS[name]
    inject(faults)
    found, requests, num_bytes, reasons, seconds = since(store, lambda: store.read_ranges("a/x", SPANS))
    assert found == [CONTENT[start:stop] for start, stop in SPANS]
    assert reasons == {reason: times}
    assert requests == len(SPANS) + times == faults.num_requests(key="a/x", method="GET")
    assert num_bytes == sum(map(len, found))
    assert seconds < (STALL_S if reason == Reason.STALLED else 0) + RetryPolicy().ceiling_s(times) * times + 3


METHODS: dict[str, Callable[[Store], object]] = {
    "read": lambda store: store.read("a/x") == CONTENT,
    "read_range": lambda store: store.read_range("a/x", 3, 9) == CONTENT[3:9],
    "read_with_etag": lambda store: store.read_with_etag("a/x")[0] == CONTENT,
    "size": lambda store: store.size("a/x") == len(CONTENT),
    "list": lambda store: store.list() == ["a/x"],
    "write": lambda store: store.write("a/x", CONTENT) or store.read("a/x") == CONTENT,
    "write from memory of others": lambda store: store.write("a/v", memoryview(bytearray(CONTENT))) or store.read("a/v") == CONTENT,
    "upload": lambda store: store.upload("a/f", Path(__file__)) or store.read("a/f") == Path(__file__).read_bytes(),
    "create": lambda store: store.create("b", b"new") and not store.create("b", b"new"),
    "swap": lambda store: store.swap("a/x", b"new", store.read_with_etag("a/x")[1]) and store.read("a/x") == b"new",
    "delete": lambda store: store.delete("a/x") or not store.exists("a/x"),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_outlasts_a_burst_and_a_silence(store: Store, faults: FaultServer, name: str) -> None:
    faults.next(503, times=2)
    faults.next(500)
    faults.stall(30)
    found, _, _, reasons, seconds = since(store, lambda: METHODS[name](store))
    assert found is True
    assert reasons == {Reason.THROTTLED: 2, Reason.SERVER: 1, Reason.STALLED: 1}
    assert seconds < 10


def test_one_who_wins_and_hears_nothing_of_it_has_won(store: Store, faults: FaultServer) -> None:
    faults.lose_answer(method="PUT")
    assert store.create("b", b"1")
    assert faults.num_requests(key="/b", method="PUT") == 2
    faults.stall(30, method="PUT")
    assert store.swap("b", b"2", store.read_with_etag("b")[1])
    assert faults.num_requests(key="/b", method="PUT") == 4
    assert store.read("b") == b"2"


def test_one_who_loses_against_the_same_content_has_lost(store: Store, faults: FaultServer) -> None:
    other = open_store(store.url)
    faults.lose_answer(method="PUT")
    assert store.create("b", b"same")
    assert not other.create("b", b"same")
    tag = store.read_with_etag("b")[1]
    faults.next(500, method="PUT")
    assert other.swap("b", b"next", tag)
    assert not store.swap("b", b"next", tag)


def test_a_slow_link_is_no_silence(store: Store, faults: FaultServer) -> None:
    """A body that takes longer than any limit on silence: as 64 MiB at 1 MB/s do with the real ones."""
    faults.slow(100_000)
    (found, requests, _, _, seconds) = since(store, lambda: store.read_range("a/x", 0, len(CONTENT)))
    assert found == CONTENT
    assert (requests, seconds > 3 * STALL_S) == (1, True)


def test_a_server_that_drips_is_given_up(store: Store, faults: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then is no silence, but it is no answer either; the real limit is ten minutes."""
    monkeypatch.setattr("draf_dist.storage.s3_ranges.LONGEST_REQUEST", timedelta(seconds=2))
    monkeypatch.setenv("DRAF_STALL_TIMEOUT_S", "1.75")  # another one: the connections of this place are not used again
    dripped = open_store(store.url)
    faults.slow(1_000)
    threading.Timer(3.0, faults.clear).start()
    found, _, _, reasons, seconds = since(dripped, lambda: dripped.read("a/x"))
    assert (found, set(reasons), seconds < 10) == (CONTENT, {Reason.STALLED}, True)


def test_a_server_that_takes_no_data_is_given_up(store: Store, faults: FaultServer) -> None:
    large = CONTENT * 64  # more than the buffers of the connection hold
    faults.deaf(12)
    _, _, _, reasons, seconds = since(store, lambda: store.write("large", large))
    assert set(reasons) == {Reason.STALLED}
    assert seconds < 10
    assert store.size("large") == len(large)


def test_a_flipped_byte_is_for_the_reader_to_notice(store: Store, faults: FaultServer) -> None:
    faults.flip(10, key="a/x")
    assert store.read_range("a/x", 8, 12) == bytes([8, 9, 10 ^ 255, 11])
    assert store.read_range("a/x", 20, 22) == bytes([20, 21])


def test_a_service_that_stays_busy_is_given_up_and_named(
    store: Store, faults: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "policy", RetryPolicy(retry_for_s=1))
    faults.next(503, times=None)
    given_up = rf"/p/a/x: expected an S3 endpoint that answers at {faults.url[7:]}, found SlowDown \(tried \d+ times in 1 s\)"
    for act in (lambda: store.read_range("a/x", 0, 9), lambda: store.write("a/x", b"")):
        start = time.monotonic()
        with pytest.raises(UnreachableError, match=given_up) as caught:
            act()
        assert "DRAF_RETRY_FOR_S" in str(caught.value)
        assert 1 <= time.monotonic() - start < 4


def test_a_busy_service_is_waited_for_when_a_store_is_opened(store: Store, faults: FaultServer) -> None:
    faults.next(503, times=3)
    assert open_store(store.url).traffic.snapshot().by_reason == {Reason.THROTTLED: 3}


EVERY_REQUEST: dict[str, Callable[[Store], object]] = {
    "read": lambda store: store.read("a/x"),
    "read_ranges": lambda store: store.read_ranges("a/x", SPANS),
    "write": lambda store: store.write("a/x", b""),
    "create": lambda store: store.create("c", b""),
    "size": lambda store: store.size("a/x"),
    "list": lambda store: store.list("a"),
    "delete": lambda store: store.delete("a/x"),
}


def test_credentials_that_expire_are_told_at_once_with_what_to_do(store: Store, faults: FaultServer) -> None:
    faults.deny("ExpiredToken")
    for name, act in EVERY_REQUEST.items():
        before, start = store.traffic.snapshot(), time.monotonic()
        with pytest.raises(UnreachableError, match="expected credentials that") as caught:
            act(store)
        assert time.monotonic() - start < 3
        assert store.traffic.snapshot().retries == before.retries
        if name != "size":  # an answer to HEAD has no body that could say so
            assert "found expired ones (ExpiredToken). Renew them" in str(caught.value)
            assert "AWS_SESSION_TOKEN" in str(caught.value)


def test_credentials_that_are_withdrawn_are_told_at_once(store: Store, faults: FaultServer) -> None:
    faults.deny("AccessDenied")
    before = store.traffic.snapshot()
    for act in EVERY_REQUEST.values():
        with pytest.raises(UnreachableError, match="credentials that the store accepts"):
            act(store)
    assert store.traffic.snapshot().retries == before.retries


def test_what_is_not_there_is_told_without_a_second_try(store: Store) -> None:
    before = store.traffic.snapshot()
    with pytest.raises(MissingError, match=r"/p/nothing: expected a file"):
        store.read_ranges("nothing", SPANS)
    assert store.read_ranges("a/x", [(len(CONTENT), len(CONTENT) + 5), (7, 7)]) == [b"", b""]
    assert store.traffic.snapshot().retries == before.retries


def test_names_with_odd_characters_are_read(store: Store) -> None:
    for name in ("a b", "1+1%20=2", "ü#?&", "x~[1]{2}*'"):
        store.write(name, name.encode())
        assert store.read_range(name, 0, 99) == name.encode()
    with pytest.raises(SpecError, match="expected a valid name"):
        store.read_range("a//b", 0, 9)


def test_reads_go_on_when_the_server_comes_back(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAF_RETRY_FOR_S", "60")
    store = open_store(s3.url)
    store.write("x", CONTENT)
    stop, reads = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            assert store.read_range("x", 5, 100_000) == CONTENT[5:100_000]
            reads.append(time.monotonic())

    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(read) for _ in range(4)]
        time.sleep(0.3)
        s3.server.stop()
        gone = time.monotonic()
        try:
            time.sleep(0.5)
        finally:
            s3.server.start()
        back = time.monotonic()
        while sum(1 for moment in reads if moment > back) < 20 and not any(each.done() for each in running):
            time.sleep(0.05)
        stop.set()
        for each in running:
            each.result()
    assert any(moment < gone for moment in reads)
    store.write("y", b"1")
    assert store.traffic.snapshot().by_reason[Reason.CONNECTION] >= 4


def test_a_forked_child_is_refused_and_does_not_hang(store: Store) -> None:
    store.read_range("a/x", 0, 1)
    child = os.fork()
    if child == 0:
        refused = 0
        for act in (lambda: store.read_range("a/x", 0, 1), lambda: store.write("y", b""), lambda: open_store(store.url)):
            try:
                act()
            except SpecError as error:
                refused += "spawn" in str(error)
        os._exit(refused)
    until = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < until:
        time.sleep(0.02)
    if ended[0] == 0:
        os.kill(child, signal.SIGKILL)
        ended = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(ended[1]) == 3


def test_credentials_of_a_container_are_found_and_renewed(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            asked.append(self.path)
            until = datetime.now(UTC) + timedelta(minutes=2)  # botocore renews what has less than ten
            names = {"AccessKeyId": "AWS_ACCESS_KEY_ID", "SecretAccessKey": "AWS_SECRET_ACCESS_KEY"}
            found = {name: s3.environment[variable] for name, variable in names.items()}
            body = json.dumps({**found, "Token": "", "Expiration": until.isoformat()}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:{server.server_address[1]}/keys")
        monkeypatch.setattr("draf_dist.storage.s3_ranges.CREDENTIALS_FOR", timedelta(seconds=1))
        store = open_store(s3.url)
        store.write("x", b"0123")
        assert store.read_range("x", 1, 3) == b"12"
        before = len(asked)
        time.sleep(0.2)
        assert store.read_range("x", 0, 3) == b"012"
        assert before >= 2
        assert len(asked) > before
    finally:
        server.shutdown()
        server.server_close()

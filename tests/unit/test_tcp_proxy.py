"""The proxy that makes a server look far away: what it adds is what it says, and nothing is lost on the way."""

import http.client
import http.server
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from tcp_proxy import TcpProxy

BODY = bytes(range(256)) * 8 * 2**10  # 2 MiB


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        body = BODY[: int(self.path[1:])]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Says nothing."""


class Server(http.server.ThreadingHTTPServer):
    # With 5, as by default, the sixth of several connections at once waits a second for its turn.
    request_queue_size = 64


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def get(connection: http.client.HTTPConnection, size: int) -> float:
    """Seconds of one request; the body must be right."""
    start = time.perf_counter()
    connection.request("GET", f"/{size}")
    assert connection.getresponse().read() == BODY[:size]
    return time.perf_counter() - start


def seconds_of_requests(port: int, num: int = 15) -> list[float]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    times = [get(connection, 10) for _ in range(num)]
    connection.close()
    return times


def together(port: int, sizes: list[int]) -> float:
    """Seconds in which all are fetched, each on a connection of its own."""

    def fetch(size: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        get(connection, size)
        connection.close()

    threads = [threading.Thread(target=fetch, args=(size,)) for size in sizes]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


def test_a_round_trip_takes_the_latency_longer(port: int) -> None:
    direct = seconds_of_requests(port)
    with TcpProxy("127.0.0.1", port, latency_s=0.02) as proxy:
        through = seconds_of_requests(proxy.port)
    # A busy machine makes some later, none earlier: so the fastest are compared.
    assert min(through) > 0.02
    assert min(through[1:]) - min(direct) == pytest.approx(0.02, abs=0.005)
    # The first one waits for its connection too.
    assert through[0] > 0.04


def test_latency_is_paid_once_by_what_is_under_way_together(port: int) -> None:
    with TcpProxy("127.0.0.1", port, latency_s=0.1) as proxy:
        assert 0.2 < together(proxy.port, [1000] * 10) < 0.5


def test_latency_alone_does_not_slow_a_long_answer(port: int) -> None:
    with TcpProxy("127.0.0.1", port, latency_s=0.1) as proxy:
        # 32 chunks that would each wait take 3 s.
        assert together(proxy.port, [len(BODY)]) < 0.4
        assert proxy.bytes_down > len(BODY)


@pytest.mark.parametrize("num_connections", [1, 4])
def test_all_connections_together_get_the_cap(port: int, num_connections: int) -> None:
    size, cap = len(BODY) // num_connections, 8e6
    with TcpProxy("127.0.0.1", port, bytes_per_s=cap) as proxy:
        rates = []
        # A busy machine makes it slower at times, nothing may make it faster.
        while len(rates) < 8 and max(rates, default=0.0) < 0.9 * cap:
            rates.append(num_connections * size / together(proxy.port, [size] * num_connections))
    assert max(rates) == pytest.approx(cap, rel=0.1)


def test_connections_share_the_cap_by_turns(port: int) -> None:
    with TcpProxy("127.0.0.1", port, bytes_per_s=8e6) as proxy:
        finished: dict[int, float] = {}

        def fetch(size: int) -> None:
            finished[size] = together(proxy.port, [size])

        threads = [threading.Thread(target=fetch, args=(size,)) for size in (len(BODY), 100_000)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # The short answer doesn't wait for the end of the long one, which takes a quarter of a second.
    assert finished[100_000] < 0.15


def test_a_server_that_is_gone_is_a_connection_that_breaks() -> None:
    with TcpProxy("127.0.0.1", 1) as proxy, pytest.raises((ConnectionError, http.client.HTTPException)):
        seconds_of_requests(proxy.port, num=1)

"""A TCP proxy on 127.0.0.1 that makes a server on this machine look far away: latency, a cap on the bandwidth, a count of bytes.

    python benchmarks/tcp_proxy.py HOST:PORT [--latency-ms 20] [--bytes-per-s 50e6]

What the server sends is handed on `latency_s` after it came, in order and without waiting for what came before it: a request costs
one latency however many are under way, as on a long line. Making a connection is a round trip too. The cap is one line that all
connections share, 64 KiB at a time by turns. What is not imitated: slow start, loss, and the way from client to server, which is
neither delayed nor capped (a round trip is delayed once, on the way back).
"""

import argparse
import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType

HOST = "127.0.0.1"
CHUNK_BYTES = 64 * 2**10
# What a connection may have under way: 400 MB/s at 20 ms.
WINDOW_BYTES = 8 * 2**20
# A sleep ends up to a millisecond late: what the line lost by that may be made up for.
CATCH_UP_S = 0.01
STOP_TIMEOUT_S = 5.0


class TcpProxy:
    """A context manager: the proxy runs in a thread of its own inside the `with` block.

    latency_s: added to every round trip, 0 for none. bytes_per_s: of all connections together, from the server, None for no cap.
    """

    def __init__(self, target_host: str, target_port: int, *, latency_s: float = 0.0, bytes_per_s: float | None = None) -> None:
        self.target = (target_host, target_port)
        self.latency_s, self._line = latency_s, _Line(bytes_per_s)
        self.port, self.num_connections, self.bytes_up, self.bytes_down = 0, 0, 0, 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._done: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="tcp-proxy", daemon=True)
        self._started: Future[int] = Future()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> "TcpProxy":
        self._thread.start()
        self.port = self._started.result(STOP_TIMEOUT_S)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._loop is not None
        assert self._done is not None
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._done = asyncio.get_running_loop(), asyncio.Event()
        connections: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.ensure_future(self._connection(reader, writer))
            connections.add(task)
            task.add_done_callback(connections.discard)

        server = await asyncio.start_server(accept, HOST, 0, limit=CHUNK_BYTES)
        self._started.set_result(server.sockets[0].getsockname()[1])
        await self._done.wait()
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _connection(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        await asyncio.sleep(self.latency_s)
        try:
            server, to_server = await asyncio.open_connection(*self.target, limit=CHUNK_BYTES)
        except OSError:
            to_client.transport.abort()  # nobody listens: the client sees a reset
            return
        under_way = _UnderWay()
        try:
            await asyncio.gather(
                self._requests(client, to_server), self._collect(server, under_way), self._deliver(under_way, to_client)
            )
        except ConnectionError:
            to_client.transport.abort()
            to_server.transport.abort()
        finally:
            to_server.close()
            to_client.close()

    async def _requests(self, client: asyncio.StreamReader, to_server: asyncio.StreamWriter) -> None:
        while data := await client.read(CHUNK_BYTES):
            self.bytes_up += len(data)
            to_server.write(data)
            await to_server.drain()
        with contextlib.suppress(OSError):
            to_server.write_eof()

    async def _collect(self, server: asyncio.StreamReader, under_way: "_UnderWay") -> None:
        while data := await server.read(CHUNK_BYTES):
            await under_way.put(data, _now() + self.latency_s)
        await under_way.put(b"", _now() + self.latency_s)

    async def _deliver(self, under_way: "_UnderWay", to_client: asyncio.StreamWriter) -> None:
        while True:
            data, due = await under_way.get()
            await _until(due)
            await _until(self._line.reserve(len(data), due))
            if not data:
                break
            self.bytes_down += len(data)
            to_client.write(data)
            await to_client.drain()
        to_client.close()


class _UnderWay:
    """What a connection's server has sent and its client has not yet: at most WINDOW_BYTES, with the time at which each is due."""

    def __init__(self) -> None:
        self._chunks: deque[tuple[bytes, float]] = deque()
        self._size = 0
        self._changed = asyncio.Condition()

    async def put(self, data: bytes, due: float) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._size < WINDOW_BYTES)
            self._chunks.append((data, due))
            self._size += len(data)
            self._changed.notify_all()

    async def get(self) -> tuple[bytes, float]:
        async with self._changed:
            await self._changed.wait_for(lambda: bool(self._chunks))
            data, due = self._chunks.popleft()
            self._size -= len(data)
            self._changed.notify_all()
        return data, due


class _Line:
    """A wire of a given rate: whoever wants to send gets the time at which the last of its bytes has passed."""

    def __init__(self, bytes_per_s: float | None, now: Callable[[], float] | None = None) -> None:
        self._bytes_per_s, self._free, self._now = bytes_per_s, 0.0, now or _now

    def reserve(self, size: int, due: float) -> float:
        if self._bytes_per_s is None:
            return due
        self._free = max(self._free, due, self._now() - CATCH_UP_S) + size / self._bytes_per_s
        return self._free


def _now() -> float:
    return asyncio.get_running_loop().time()


async def _until(moment: float) -> None:
    wait = moment - _now()
    if wait > 0:
        await asyncio.sleep(wait)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="HOST:PORT")
    parser.add_argument("--latency-ms", type=float, default=20.0)
    parser.add_argument("--bytes-per-s", type=float)
    options = parser.parse_args()
    host, _, port = options.target.rpartition(":")
    with TcpProxy(host, int(port), latency_s=options.latency_ms / 1000, bytes_per_s=options.bytes_per_s) as proxy:
        print(proxy.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()

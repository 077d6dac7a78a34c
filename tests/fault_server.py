"""An HTTP proxy on 127.0.0.1 that stands before a real S3 server and makes of it what networks and busy services make of one.

    with FaultServer(server.endpoint) as faults:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faults.url)         # clients sign for this address, which is passed on as it is
        faults.next(503, times=5)                                  # five answers 503 SlowDown; the server is not asked
        faults.next(500, key="a.tar", method="GET")                # one 500, for GETs of keys that contain a.tar
        faults.next(503, times=None, share=0.05)                   # every twentieth request, until clear()
        faults.deny()                                              # 403 ExpiredToken, until clear()
        faults.reset(times=3)                                      # the connection is reset and nothing was answered
        faults.reset(after_bytes=1000)                             # ... or after 1000 bytes of the body
        faults.cut(after_bytes=1000)                               # the connection ends in good order, too early
        faults.shorten(to_bytes=1000)                              # an answer that is complete and too short
        faults.stall(10)                                           # silence for 10 s before the answer
        faults.stall(10, after_bytes=1000)                         # ... or in the middle of the body
        faults.deaf(10)                                            # the body that a client sends is not read for 10 s
        faults.lose_answer(method="PUT")                           # the server does it, the client gets a reset
        faults.flip(5, key="a.tar")                                # byte 5 of the object is wrong in every answer with it
        faults.slow(1e6)                                           # bodies at 1 MB/s, until clear()
        faults.clear()                                             # no faults from here on; what was counted stays
        faults.num_requests(key="a.tar", method="GET"), faults.num_bytes(key="a.tar")

Every fault takes `times` (the number of turns, None: until clear()), `key` (a part of the path), `method` (the HTTP verb) and
`share` (of the fitting requests, drawn from a fixed seed). A request takes a turn of the first rule, in the order of their making,
that fits and has one left. While the server itself is down, connections are reset. Silence ends early when the proxy is left.
"""

import http.client
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

HOST = "127.0.0.1"
PIECE_BYTES = 2**16
SLOW_PIECES_PER_S = 20
CODES = {500: "InternalError", 503: "SlowDown", 429: "TooManyRequests", 403: "AccessDenied", 400: "RequestTimeout"}
BETWEEN_HOPS = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass
class Request:
    """One request that came in; status: the server's answer, 0 before it and without one; num_bytes: of its body that went out."""

    method: str
    key: str
    status: int = 0
    num_bytes: int = 0


@dataclass
class Rule:
    """What happens to requests that fit; see the top of this file."""

    times: int | None = 1
    key: str = ""
    method: str = ""
    share: float = 1.0
    status: int = 0
    code: str = ""
    ends: str = ""  # "reset" or "cut"
    after_bytes: int | None = None
    stall_s: float = 0.0
    deaf_s: float = 0.0
    asked: bool = True
    to_bytes: int | None = None
    flip_at: int | None = None
    bytes_per_s: float = 0.0


class Answer(NamedTuple):
    status: int
    headers: list[tuple[str, str]]
    body: bytes
    length: int  # what Content-Length says: for HEAD, that of a body which is not sent


class FaultServer:
    """A context manager: the proxy listens at `url` inside the `with` block. All methods may be called while requests run."""

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.log: list[Request] = []
        self.leaving = threading.Event()
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._random = random.Random(0)
        self._server = _Server((HOST, 0), _Handler)
        self._server.faults = self
        self.url = f"http://{HOST}:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.leaving.set()
        self._server.shutdown()
        self._server.server_close()

    def next(self, status: int, times: int | None = 1, *, code: str = "", **where: Any) -> None:
        self._add(Rule(times, status=status, code=code or CODES.get(status, "Error"), asked=False, **where))

    def deny(self, code: str = "ExpiredToken", times: int | None = None, **where: Any) -> None:
        self._add(Rule(times, status=403, code=code, asked=False, **where))

    def reset(self, times: int | None = 1, *, after_bytes: int | None = None, **where: Any) -> None:
        self._add(Rule(times, ends="reset", after_bytes=after_bytes, asked=after_bytes is not None, **where))

    def cut(self, after_bytes: int, times: int | None = 1, **where: Any) -> None:
        self._add(Rule(times, ends="cut", after_bytes=after_bytes, **where))

    def shorten(self, to_bytes: int, times: int | None = 1, **where: Any) -> None:
        self._add(Rule(times, to_bytes=to_bytes, **{"method": "GET"} | where))

    def stall(self, seconds: float, times: int | None = 1, *, after_bytes: int | None = None, **where: Any) -> None:
        self._add(Rule(times, stall_s=seconds, after_bytes=after_bytes, **where))

    def deaf(self, seconds: float, times: int | None = 1, **where: Any) -> None:
        self._add(Rule(times, deaf_s=seconds, **{"method": "PUT"} | where))

    def lose_answer(self, times: int | None = 1, **where: Any) -> None:
        self._add(Rule(times, ends="reset", **where))

    def flip(self, byte: int, times: int | None = None, **where: Any) -> None:
        self._add(Rule(times, flip_at=byte, **{"method": "GET"} | where))

    def slow(self, bytes_per_s: float, times: int | None = None, **where: Any) -> None:
        self._add(Rule(times, bytes_per_s=bytes_per_s, **where))

    def clear(self) -> None:
        with self._lock:
            self._rules.clear()

    def num_requests(self, *, key: str = "", method: str = "") -> int:
        return sum(1 for _ in self._fitting(key, method))

    def num_bytes(self, *, key: str = "", method: str = "") -> int:
        return sum(request.num_bytes for request in self._fitting(key, method))

    def note(self, request: Request) -> Request:
        with self._lock:
            self.log.append(request)
        return request

    def rule_for(self, method: str, key: str) -> Rule:
        """Takes a turn of the first rule that fits; an empty one where none does."""
        with self._lock:
            for rule in self._rules:
                fits = rule.key in key and rule.method in ("", method) and rule.times != 0
                if fits and (rule.share >= 1 or self._random.random() < rule.share):
                    rule.times = None if rule.times is None else rule.times - 1
                    return replace(rule)
        return Rule()

    def _add(self, rule: Rule) -> None:
        with self._lock:
            self._rules.append(rule)

    def _fitting(self, key: str, method: str) -> Iterator[Request]:
        with self._lock:
            log = list(self.log)
        return (request for request in log if key in request.key and method in ("", request.method))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    faults: FaultServer

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that break are what this server is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = PIECE_BYTES
    server: _Server

    def _exchange(self) -> None:
        faults, key = self.server.faults, unquote(urlsplit(self.path).path).lstrip("/")
        rule = faults.rule_for(self.command, key)
        self._pause(rule.deaf_s)
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = faults.note(Request(self.command, key))
        try:
            answer = self._ask(data) if rule.asked else _refusal(rule)
            request.status = answer.status
            # What answers a HEAD has the length of a body and none.
            answer = answer._replace(body=b"") if self.command == "HEAD" else _spoilt(answer, rule)
            self._answer(answer, rule, request)
        except (http.client.HTTPException, OSError):
            self._end(reset=True)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _exchange  # noqa: N815

    def handle_expect_100(self) -> bool:
        going_on = super().handle_expect_100()
        self.wfile.flush()
        return going_on

    def _ask(self, data: bytes) -> Answer:
        """The server's answer. The head goes on unchanged: its Host is part of what the client signed."""
        connection = http.client.HTTPConnection(self.server.faults.upstream, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders(data)
            answer = connection.getresponse()
            body = answer.read()
            length = int(answer.getheader("Content-Length") or len(body))
            headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in BETWEEN_HOPS]
            return Answer(answer.status, headers, body, length)
        finally:
            connection.close()

    def _answer(self, answer: Answer, rule: Rule, request: Request) -> None:
        """Sends the answer, or as much of it as the rule lets through."""
        stop = len(answer.body) if rule.after_bytes is None else min(rule.after_bytes, len(answer.body))
        if rule.after_bytes is None:
            self._pause(rule.stall_s)
            if rule.ends:
                self._end(reset=True)
                return
        self._head(answer)
        self._send(answer.body[:stop], rule, request)
        if rule.ends:
            time.sleep(0.05)  # a reset overtakes what was sent just before it
            self._end(reset=rule.ends == "reset")
        elif stop < len(answer.body):
            self._pause(rule.stall_s)
            self._send(answer.body[stop:], rule, request)

    def _send(self, body: bytes, rule: Rule, request: Request) -> None:
        piece_bytes = int(rule.bytes_per_s / SLOW_PIECES_PER_S) or PIECE_BYTES
        for start in range(0, len(body), piece_bytes):
            piece = body[start : start + piece_bytes]
            request.num_bytes += len(piece)  # before it is sent: who has read it may count
            self.wfile.write(piece)
            self.wfile.flush()
            self._pause(len(piece) / rule.bytes_per_s if rule.bytes_per_s else 0)

    def _pause(self, seconds: float) -> None:
        if seconds:
            self.server.faults.leaving.wait(seconds)

    def _head(self, answer: Answer) -> None:
        self.send_response_only(answer.status)
        for name, value in answer.headers:
            self.send_header(name, value)
        if answer.status not in (204, 304):
            self.send_header("Content-Length", str(answer.length))
        self.end_headers()
        self.wfile.flush()

    def _end(self, *, reset: bool) -> None:
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True

    def finish(self) -> None:
        try:
            super().finish()
        except (OSError, ValueError):
            return  # the connection was ended on purpose


def _refusal(rule: Rule) -> Answer:
    if not rule.status:
        return Answer(0, [], b"", 0)
    text = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{rule.code}</Code><Message>made by the test</Message></Error>"
    return Answer(rule.status, [("Content-Type", "application/xml")], text.encode(), len(text))


def _spoilt(answer: Answer, rule: Rule) -> Answer:
    """The answer with the byte flipped, or fewer bytes, where the rule says so."""
    body = answer.body
    if rule.to_bytes is not None:
        return answer._replace(body=body[: rule.to_bytes], length=min(rule.to_bytes, len(body)))
    if rule.flip_at is None:
        return answer
    found = {name.lower(): value for name, value in answer.headers}.get("content-range", "bytes 0-")
    at = rule.flip_at - int(found.removeprefix("bytes ").partition("-")[0])
    if not 0 <= at < len(body):
        return answer
    return answer._replace(body=body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :])

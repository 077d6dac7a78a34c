"""A store in an S3 bucket. Credentials and endpoint come from the environment, as for any AWS tool.

Contents are read through obstore, everything else goes through s3fs. Neither repeats a request by itself: that is decided here.
"""

import difflib
import os
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import s3fs
from fsspec.asyn import sync

from draf_dist.errors import SpecError, explain
from draf_dist.storage.base import MissingError, Store, checked
from draf_dist.storage.retry import GivenUpError, RequestError, RetryPolicy, policy_from_environment, repeated, stall_timeout_s
from draf_dist.storage.s3_errors import BEYOND_STATUS, RAISED, STALE_CODES, explained, request_error
from draf_dist.storage.s3_ranges import CONNECT_TIMEOUT_S, Place, RangeReader, claim_process, forked
from draf_dist.storage.s3_upload import Watched, WatchedBytes, WatchedFile, WatchedView, put
from draf_dist.storage.traffic import Traffic

Result = TypeVar("Result")

PROBE_TIMEOUT_S = 8
# A busy service is waited for when a store is opened too, but a user waits with it.
OPEN_RETRY_FOR_S = 20.0
# A page of a listing, or the answer to an upload that has arrived, may take a server longer than a byte of a body.
ANSWER_STALLS = 3
# S3 takes up to 5 GB in one PUT; parts would make the write visible in steps only to us, but cost the single ETag.
ONE_PUT_BYTES = 5 * 10**9
# Ranges of one call that are read at once: at 50 ms for an answer, 16 requests of 8 MiB fill 20 Gbit/s.
READS_AT_ONCE = 16
# An object that is asked for to see whether its bucket is there.
PROBE = ".draf-probe"
# Metadata of an object that says which call wrote it.
WRITER = "draf-writer"


class S3Store(Store):
    """A prefix of a bucket that exists. A store belongs to the process that opened it; a pickled one is opened anew.

    Raises:
        SpecError: there is no such bucket; this process was forked off one that had used S3.
        UnreachableError: the endpoint does not answer within seconds, or refuses the credentials.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.bucket, _, self.prefix = url.removeprefix("s3://").partition("/")
        self.policy, self._stall_timeout_s = policy_from_environment(), stall_timeout_s()
        self.traffic = Traffic()
        self._endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
        self._process = os.getpid()
        claim_process()
        self._check_endpoint()
        self._files = _files(self._stall_timeout_s)
        self._reader = RangeReader(self._place(), self._stall_timeout_s)
        self._check_bucket()
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["S3Store"], tuple[str]]:
        # A connection belongs to the process that opened it.
        return S3Store, (self.url,)

    def read(self, path: str) -> bytes:
        """See Store."""
        data = self._repeated(path, lambda: self._reader.read(self._name(path)))
        self.traffic.add_read(len(data))
        return bytes(data)

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """See Store."""
        return bytes(self._read_range(path, start, stop))

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes | memoryview]:
        """See Store; up to READS_AT_ONCE of all calls together are read at once, and one that fails is repeated alone."""
        if len(ranges) == 1:
            return [self._read_range(path, *ranges[0])]
        return list(self._threads().map(lambda span: self._read_range(path, *span), ranges))

    def read_with_etag(self, path: str) -> tuple[bytes, str]:
        """See Store."""
        data, etag = self._repeated(path, lambda: self._reader.read_with_etag(self._name(path)))
        self.traffic.add_read(len(data))
        return bytes(data), etag

    def write(self, path: str, data: bytes | memoryview) -> None:
        """See Store."""
        self._put(path, WatchedView(data) if isinstance(data, memoryview) else WatchedBytes(data))

    def upload(self, path: str, local: Path) -> None:
        """See Store."""
        with WatchedFile(local) as content:
            self._put(path, content)

    def create(self, path: str, data: bytes) -> bool:
        """See Store."""
        return self._put_if(path, data, IfNoneMatch="*")

    def swap(self, path: str, data: bytes, etag: str) -> bool:
        """See Store."""
        return self._put_if(path, data, IfMatch=etag)

    def size(self, path: str) -> int | None:
        """See Store."""
        try:
            info = self._info(path)
        except MissingError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def list(self, prefix: str = "") -> list[str]:
        """See Store."""
        try:
            keys = self._repeated(prefix, lambda: self._files.find(self._key(prefix)))
        except MissingError:
            return []
        root, below = (self._key(path).rstrip("/") + "/" for path in ("", prefix))
        # SeaweedFS keeps a marker for a prefix whose last object was deleted.
        return sorted(key.removeprefix(root) for key in keys if key.startswith(below))

    def delete(self, path: str) -> None:
        """See Store."""
        try:
            self._repeated(path, lambda: self._brief(self._files._rm_file, self._key(path)))
        except MissingError:
            return

    def local_path(self, path: str) -> Path | None:
        """See Store."""
        return None

    def _key(self, path: str) -> str:
        return "/".join(part for part in (self.bucket, self._name(path)) if part)

    def _name(self, path: str) -> str:
        return "/".join(part for part in (self.prefix, checked(path)) if part)

    def _read_range(self, path: str, start: int, stop: int) -> bytes | memoryview:
        if stop <= start:
            return b""

        def read() -> bytes | memoryview:
            try:
                return self._reader.read(self._name(path), start, stop)
            except RequestError as error:
                if error.status == BEYOND_STATUS:
                    return b""
                raise

        data = self._repeated(path, read)
        self.traffic.add_read(len(data))
        return data

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(READS_AT_ONCE, "s3-read")
            return self._pool

    def _info(self, path: str) -> Any:
        return self._repeated(path, lambda: self._brief(self._files._info, self._key(path)))

    def _put_if(self, path: str, data: bytes, **condition: str) -> bool:
        """One conditional PUT; whether the object is what this call wrote.

        An attempt whose answer is lost may have done it: the next one, ours or one that aiohttp makes unseen, then finds its
        condition broken by ourselves. So the object says who wrote it, and a refusal is believed only if that is someone else.
        (One who replaced it in between counts as the winner: that is what the caller would find.)
        """
        writer = secrets.token_hex(16)
        try:
            self._put(path, WatchedBytes(data), Metadata={WRITER: writer}, **condition)
        except StaleError:
            return self._writer(path) == writer
        return True

    def _put(self, path: str, content: Watched, **options: Any) -> None:
        """One PUT, made again from its beginning while it fails."""

        def attempt() -> None:
            if content.size >= ONE_PUT_BYTES:
                content.seek(0)
                self._files.pipe_file(self._key(path), content.read(), chunksize=ONE_PUT_BYTES, **options)
            else:
                put(self._files, self._key(path), content, self._stall_timeout_s, **options)

        self._repeated(path, attempt)
        self.traffic.add_written(content.size)

    def _writer(self, path: str) -> str:
        bucket, _, name = self._key(path).partition("/")
        try:
            head = self._repeated(path, lambda: self._brief(self._files._call_s3, "head_object", Bucket=bucket, Key=name))
        except MissingError:
            return ""
        return str(head.get("Metadata", {}).get(WRITER, ""))

    def _repeated(self, path: str, act: Callable[[], Result], policy: RetryPolicy | None = None) -> Result:
        """What act returns, under the store's policy: every request of this store passes here and is counted here."""
        if os.getpid() != self._process:
            raise forked()

        def attempt() -> Result:
            self.traffic.add_request()
            try:
                return act()
            except RAISED as error:
                raise request_error(error) from error

        try:
            return repeated(attempt, policy or self.policy, on_retry=self.traffic.add_retry)
        except (RequestError, GivenUpError) as error:
            if isinstance(error, RequestError) and error.status == 404:
                raise self.missing(path) from error
            if isinstance(error, RequestError) and error.code in STALE_CODES:
                raise StaleError from error
            raise explained(error, self.where(path), self._endpoint) from error

    def _brief(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """A request with a small answer: as a whole it may take as long as one byte of a large one."""
        return sync(self._files.loop, method, *arguments, timeout=self._stall_timeout_s, **options)

    def _check_endpoint(self) -> None:
        """A connection that is refused or times out, told within seconds and not after every retry."""
        endpoint = self._endpoint
        if endpoint == "AWS":
            return
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SpecError(
                explain("AWS_ENDPOINT_URL", expected="http(s)://host[:port]", found=repr(endpoint), remedy="Correct the variable.")
            )
        try:
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
            socket.create_connection((parts.hostname, port), timeout=CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise explained(request_error(error), self.url, endpoint) from error

    def _place(self) -> Place:
        """Where the bucket is. AWS tells the region with any answer; an endpoint that is named takes whichever it is asked in."""
        if self._endpoint != "AWS":
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
            return Place(self.bucket, self._endpoint, region)
        answer = self._opened(lambda: self._call("list_objects_v2", Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1))
        client = self._files._s3.meta
        region = answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region") or client.region_name or "us-east-1"
        by_region = (urlsplit(client.endpoint_url).hostname or "").endswith(".amazonaws.com")
        return Place(self.bucket, None if by_region else client.endpoint_url, region)

    def _check_bucket(self) -> None:
        """Asks whether it exists and lets us read, with an object that need not be there.

        The first request of s3fs would take a quarter of a second of processor time.
        """
        if self._endpoint == "AWS":
            return  # _place has asked it

        def probe() -> None:
            try:
                self._reader.read(self._name(PROBE), 0, 1)
            except RequestError as error:
                if error.status not in (404, BEYOND_STATUS) or error.code == "NoSuchBucket":
                    raise

        self._opened(probe)

    def _opened(self, probe: Callable[[], Result]) -> Result:
        """What the first request returns. A store that answers is waited for, one that does not is not."""

        def patiently() -> Result:
            try:
                return probe()
            except (*RAISED, RequestError) as error:
                failed = error if isinstance(error, RequestError) else request_error(error)
                failed.reason = failed.reason if failed.status else None
                raise failed from error

        policy = replace(self.policy, retry_for_s=min(self.policy.retry_for_s, OPEN_RETRY_FOR_S))
        try:
            return self._repeated("", patiently, policy)
        except MissingError as error:
            raise self._no_bucket() from error

    def _call(self, method: str, **arguments: Any) -> Any:
        return sync(self._files.loop, self._files._call_s3, method, timeout=PROBE_TIMEOUT_S, **arguments)

    def _no_bucket(self) -> SpecError:
        try:
            names = [bucket["Name"] for bucket in self._call("list_buckets")["Buckets"]]
        except RAISED:
            names = []  # these credentials may not list buckets: then there is no name to propose
        near = difflib.get_close_matches(self.bucket, names, n=1)
        hint = f"Did you mean s3://{near[0]}?" if near else f"Create it: aws s3 mb s3://{self.bucket}"
        return SpecError(explain(self.url, expected="a bucket that exists", found=f"no bucket {self.bucket!r}", remedy=hint))


class StaleError(Exception):
    """The condition of a PUT did not hold."""


def _files(stall_timeout_s: float) -> s3fs.S3FileSystem:
    # A listing that was cached can name objects that are gone, and an instance that was cached old credentials.
    files = s3fs.S3FileSystem(
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": ANSWER_STALLS * stall_timeout_s,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
        },
    )
    files.retries = 1  # attempts
    return files

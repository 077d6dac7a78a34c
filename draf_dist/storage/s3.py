"""A store in an S3 bucket, through s3fs. Credentials and endpoint come from the environment, as for any AWS tool."""

import difflib
import errno
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import s3fs
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
from fsspec.asyn import sync
from fsspec.exceptions import FSTimeoutError

from draf_dist.errors import DrafError, SpecError, StorageFullError, UnreachableError, explain
from draf_dist.storage.base import Store, checked

CONNECT_TIMEOUT_S = 3
PROBE_TIMEOUT_S = 8
READ_TIMEOUT_S = 30
# S3 takes up to 5 GB in one PUT; parts would make the write visible in steps only to us, but cost the single ETag.
ONE_PUT_BYTES = 5 * 10**9
STALE_CODES = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
BEYOND_CODES = ("InvalidRange", "416")
FULL_CODES = ("InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "507")


class S3Store(Store):
    """A prefix of a bucket that exists.

    Raises:
        SpecError: there is no such bucket.
        UnreachableError: the endpoint does not answer within seconds, or refuses the credentials.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.bucket, _, self.prefix = url.removeprefix("s3://").partition("/")
        # A listing that was cached can name objects that are gone, and an instance that was cached old credentials.
        self._files = s3fs.S3FileSystem(
            use_listings_cache=False,
            skip_instance_cache=True,
            config_kwargs={
                "connect_timeout": CONNECT_TIMEOUT_S,
                "read_timeout": READ_TIMEOUT_S,
                "retries": {"max_attempts": 2, "mode": "standard"},
            },
        )
        self._check_endpoint()
        self._check_bucket()

    def __reduce__(self) -> tuple[type["S3Store"], tuple[str]]:
        # A connection belongs to the process that opened it.
        return S3Store, (self.url,)

    def read(self, path: str) -> bytes:
        """See Store."""
        with self._translated(path):
            # One request: with more s3fs asks for the size first.
            return bytes(self._files.cat_file(self._key(path), max_concurrency=1))

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """See Store."""
        if stop <= start:
            return b""
        with self._translated(path):
            try:
                return bytes(self._files.cat_file(self._key(path), start=start, end=stop))
            except (OSError, ClientError) as error:
                if _code(error) in BEYOND_CODES:
                    return b""
                raise

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """See Store; the requests are sent together."""
        starts, stops = [start for start, _ in ranges], [stop for _, stop in ranges]
        with self._translated(path):
            try:
                found = self._files.cat_ranges([self._key(path)] * len(ranges), starts, stops, on_error="raise")
            except (OSError, ClientError) as error:
                if _code(error) in BEYOND_CODES:
                    return super().read_ranges(path, ranges)
                raise
        return [bytes(data) for data in found]

    def read_with_etag(self, path: str) -> tuple[bytes, str]:
        """See Store."""
        with self._translated(path):
            while True:
                before = self._files.info(self._key(path))["ETag"]
                data = self.read(path)
                # Content and tag come in two requests: a writer in between would pair the old content with the new tag.
                if self._files.info(self._key(path))["ETag"] == before:
                    return data, str(before)

    def write(self, path: str, data: bytes) -> None:
        """See Store."""
        self._put(path, data)

    def upload(self, path: str, local: Path) -> None:
        """See Store."""
        self._put(path, local.read_bytes())

    def create(self, path: str, data: bytes) -> bool:
        """See Store."""
        return self._put(path, data, mode="create")

    def swap(self, path: str, data: bytes, etag: str) -> bool:
        """See Store."""
        return self._put(path, data, IfMatch=etag)

    def size(self, path: str) -> int | None:
        """See Store."""
        with self._translated(path):
            try:
                info = self._files.info(self._key(path))
            except FileNotFoundError:
                return None
        return int(info["size"]) if info["type"] == "file" else None

    def list(self, prefix: str = "") -> list[str]:
        """See Store."""
        with self._translated(prefix):
            try:
                keys = self._files.find(self._key(prefix))
            except FileNotFoundError:
                return []
        root = self._key("").rstrip("/") + "/"
        # SeaweedFS keeps a marker for a prefix whose last object was deleted.
        return sorted(key.removeprefix(root) for key in keys if key.startswith(root))

    def delete(self, path: str) -> None:
        """See Store."""
        with self._translated(path):
            try:
                self._files.rm_file(self._key(path))
            except FileNotFoundError:
                return

    def local_path(self, path: str) -> Path | None:
        """See Store."""
        return None

    def _key(self, path: str) -> str:
        return "/".join(part for part in (self.bucket, self.prefix, checked(path)) if part)

    def _put(self, path: str, data: bytes, **condition: str) -> bool:
        """One PUT; False where its condition did not hold."""
        with self._translated(path):
            try:
                self._files.pipe_file(self._key(path), data, chunksize=ONE_PUT_BYTES, **condition)
            except (OSError, ClientError) as error:
                if condition and (isinstance(error, FileExistsError) or _code(error) in STALE_CODES):
                    return False
                raise
        return True

    def _check_endpoint(self) -> None:
        """A connection that is refused or times out, told within seconds and not after every retry."""
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if not endpoint:
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
            raise self._unreachable(error) from error

    def _check_bucket(self) -> None:
        try:
            self._call("list_objects_v2", Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1)
        except FileNotFoundError as error:
            raise self._no_bucket() from error
        except (OSError, BotoCoreError, ClientError) as error:
            raise self._explained(error, "") from error

    def _call(self, method: str, **arguments: Any) -> Any:
        return sync(self._files.loop, self._files._call_s3, method, timeout=PROBE_TIMEOUT_S, **arguments)

    def _no_bucket(self) -> SpecError:
        try:
            names = [bucket["Name"] for bucket in self._call("list_buckets")["Buckets"]]
        except (OSError, BotoCoreError, ClientError):
            names = []  # these credentials may not list buckets: then there is no name to propose
        near = difflib.get_close_matches(self.bucket, names, n=1)
        hint = f"Did you mean s3://{near[0]}?" if near else f"Create it: aws s3 mb s3://{self.bucket}"
        return SpecError(explain(self.url, expected="a bucket that exists", found=f"no bucket {self.bucket!r}", remedy=hint))

    @contextmanager
    def _translated(self, path: str) -> Iterator[None]:
        try:
            yield
        except (OSError, BotoCoreError, ClientError) as error:
            raise self._explained(error, path) from error

    def _explained(self, error: Exception, path: str) -> DrafError:
        code = _code(error)
        if isinstance(error, FileNotFoundError):
            return self.missing(path)
        if isinstance(error, PermissionError | NoCredentialsError):
            return self._refused(path, code)
        if code in FULL_CODES or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
            remedy = "Free space or raise the quota, then run the same command again."
            return StorageFullError(explain(self.where(path), expected="room in the store", found=code or "none", remedy=remedy))
        if code == "InvalidBucketName":
            return SpecError(explain(self.url, expected="a valid bucket name", found=repr(self.bucket), remedy="Correct the URL."))
        return self._unreachable(error)

    def _refused(self, path: str, code: str) -> UnreachableError:
        return UnreachableError(
            explain(
                self.where(path),
                expected="credentials that the store accepts",
                found=f"them refused ({code})" if code else "none",
                remedy="Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL.",
            )
        )

    def _unreachable(self, error: Exception) -> UnreachableError:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
        host = urlsplit(endpoint).netloc.rpartition("@")[2] or endpoint
        timed_out = isinstance(error, TimeoutError | FSTimeoutError)
        found = _code(error) or ("no answer in time" if timed_out else getattr(error, "strerror", None) or type(error).__name__)
        return UnreachableError(
            explain(
                self.url,
                expected=f"an S3 endpoint that answers at {host}",
                found=found,
                remedy="Check AWS_ENDPOINT_URL and that the server runs.",
            )
        )


def _code(error: BaseException) -> str:
    """The code in S3's answer, which s3fs keeps as the cause; empty where there was no answer."""
    for candidate in (error, error.__cause__):
        if isinstance(candidate, ClientError):
            return str(candidate.response.get("Error", {}).get("Code", ""))
    return ""

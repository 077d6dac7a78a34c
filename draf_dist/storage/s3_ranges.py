"""Reading objects of a bucket through obstore: a third of the CPU time of s3fs, and a time limit on silence, not on the request."""

import os
import re
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import botocore.session
import obstore
from botocore.credentials import RefreshableCredentials
from obstore.exceptions import BaseError
from obstore.store import S3Store as Bucket

from draf_dist.errors import SpecError, UnreachableError, explain
from draf_dist.storage.retry import Reason, RequestError, reason_of

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ClientConfig

CONNECT_TIMEOUT_S = 3
# obstore's limit on a whole request is 30 s unless told: too short for a large range over a slow link. Silence is noticed within
# the stall timeout; this is for a server that sends a byte now and then: below 14 kB/s, the 8 MiB that we ask for count as stalled.
LONGEST_REQUEST = timedelta(minutes=10)
# obstore asks anew when less than 5 minutes are left, so once a minute; botocore renews well before the end.
CREDENTIALS_FOR = timedelta(minutes=6)
_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z0-9.]{1,80})</Code>")
_SYSTEM = re.compile(r'(?:message|error): "([^"\n]{1,200})"')

# Its threads are started once in a process and don't survive a fork: a child that uses them waits for ever.
_first_process: int | None = None


@dataclass(frozen=True)
class Place:
    """Where a bucket is; endpoint None: AWS."""

    bucket: str
    endpoint: str | None
    region: str


class RangeReader:
    """Reads a bucket from any number of threads. Makes its client when first used, in the process that uses it."""

    def __init__(self, place: Place, stall_timeout_s: float) -> None:
        self.place, self.stall_timeout_s = place, stall_timeout_s
        self._lock = threading.Lock()
        self._client: Bucket | None = None

    def read(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        """Bytes [start, stop) of an object, less where it ends before; the whole object without a stop.

        Raises as `read_with_etag`.
        """
        return self.read_with_etag(key, start, stop)[0]

    def read_with_etag(self, key: str, start: int = 0, stop: int | None = None) -> tuple[memoryview, str]:
        """The same, and the tag of the object that they are of. One request, one try.

        Raises:
            RequestError: anything that went wrong; fewer bytes than the answer announced is Reason.SHORT.
        """
        options: GetOptions = {} if stop is None else {"range": (start, stop)}
        try:
            answer = obstore.get(self._bucket(), key, options=options)
            data = memoryview(answer.bytes())
        except (BaseError, OSError, ValueError) as error:
            raise _failed(error) from error
        first, last = answer.range
        end = answer.meta["size"] if stop is None else min(stop, answer.meta["size"])
        if (first, last) != (start, end) or len(data) != end - start:
            raise RequestError(f"{len(data)} bytes instead of {end - start}", reason=Reason.SHORT)
        return data, str(answer.meta["e_tag"])

    def _bucket(self) -> Bucket:
        with self._lock:
            if self._client is None:
                claim_process()
                self._client = _client(self.place, self.stall_timeout_s, os.environ.get("AWS_CA_BUNDLE"), _Credentials())
            return self._client


def claim_process() -> None:
    """Notes the process that uses obstore.

    Raises:
        SpecError: it was forked off one that already did.
    """
    global _first_process  # as global as the threads it stands for
    if _first_process not in (None, os.getpid()):
        raise forked()
    _first_process = os.getpid()


def forked() -> SpecError:
    """The error for a store in a child that was forked off a process which used S3."""
    return SpecError(
        explain(
            "S3",
            expected="a process that opened its stores itself",
            found="one forked off a process that had used S3, whose connections and threads do not survive that",
            remedy='Start processes with multiprocessing.get_context("spawn"), or use threads.',
        )
    )


@lru_cache(maxsize=16)
def _client(place: Place, stall_timeout_s: float, authority: str | None, credentials: "_Credentials") -> Bucket:
    """One for all stores in a bucket, which so share connections. authority: a file of certificates."""
    endpoint: dict[str, Any] = {"endpoint": place.endpoint} if place.endpoint else {}
    options: ClientConfig = {
        "allow_http": (place.endpoint or "").startswith("http://"),
        "timeout": LONGEST_REQUEST,
        "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
        "read_timeout": timedelta(seconds=stall_timeout_s),
    }
    if authority:
        options["root_certificate"] = Path(authority).read_bytes()
    return Bucket(
        place.bucket,
        region=place.region,
        **endpoint,
        credential_provider=credentials,
        client_options=options,
        retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=0)},
    )


class _Credentials:
    """Those that botocore finds, as s3fs does; ones that expire (of an instance, a container, a login) are renewed by botocore."""

    def __init__(self) -> None:
        self._found = botocore.session.get_session().get_credentials()
        if self._found is None:
            remedy = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use whatever else AWS tools take."
            raise UnreachableError(explain("S3", expected="credentials", found="none", remedy=remedy))
        # Those that change by themselves are like no others.
        lasting = not isinstance(self._found, RefreshableCredentials)
        self._same: object = tuple(self._found.get_frozen_credentials()) if lasting else object()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Credentials) and self._same == other._same

    def __hash__(self) -> int:
        return hash(self._same)

    def __call__(self) -> Any:
        frozen = self._found.get_frozen_credentials()
        lasting = not isinstance(self._found, RefreshableCredentials)
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": None if lasting else datetime.now(UTC) + CREDENTIALS_FOR,
        }


def _failed(error: Exception) -> RequestError:
    """Obstore tells what happened in the text of its errors only."""
    text = str(error)
    if answered := _STATUS.search(text):
        status, code = int(answered[1]), (_CODE.search(text) or ["", ""])[1]
        return RequestError(code or f"status {status}", reason=reason_of(status, code), status=status, code=code)
    if "BareRedirect" in text:
        return RequestError("a bucket of another region", status=301, code="PermanentRedirect")
    if "External AWS credential provider" in text:
        return RequestError("credentials that could not be renewed", status=401, code="CredentialRetrievalError")
    if "Could not parse path" in text:
        return RequestError("a name with an empty part or control characters", status=400, code="InvalidName")
    if "TimedOut" in text or "kind: Timeout" in text:
        return RequestError("no answer in time", reason=Reason.STALLED)
    system = _SYSTEM.search(text)
    if "kind: Body" in text or "IncompleteMessage" in text:
        return RequestError("a connection that broke in the middle", reason=Reason.SHORT)
    if "HttpError" in text and "invalid peer certificate" not in text:
        return RequestError(system[1] if system else "a broken connection", reason=Reason.CONNECTION)
    return RequestError(type(error).__name__)

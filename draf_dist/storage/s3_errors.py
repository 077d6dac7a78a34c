"""From what s3fs, botocore and the network say to one kind of failure, and from that to the messages of the project."""

import errno
import socket
from urllib.parse import urlsplit

import aiohttp
from botocore.exceptions import (
    BotoCoreError,
    ChecksumError,
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    HTTPClientError,
    MetadataRetrievalError,
    NoCredentialsError,
    ReadTimeoutError,
    SSLError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.parsers import ResponseParserError

from draf_dist.errors import DrafError, SpecError, StorageFullError, UnreachableError, explain
from draf_dist.storage.retry import GivenUpError, Reason, RequestError, reason_of

# What any request through s3fs can raise.
RAISED = (OSError, BotoCoreError, ClientError, ResponseParserError, aiohttp.ClientError)
FULL_CODES = ("InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "507")
STALE_CODES = ("PreconditionFailed", "412", "409")
BEYOND_STATUS = 416
EXPIRED_CODES = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired", "CredentialRetrievalError")
ELSEWHERE_CODES = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")
TIMEOUTS = (TimeoutError, ConnectTimeoutError, ReadTimeoutError)
# A busy service sometimes answers what is no XML, see S3_RETRYABLE_ERRORS of s3fs.
BROKEN = (
    ConnectionError,
    socket.gaierror,
    aiohttp.ClientError,
    HTTPClientError,
    BotoConnectionError,
    ResponseParserError,
    ChecksumError,
)
BROKEN_NUMBERS = (errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN)


def request_error(error: Exception) -> RequestError:
    """One of RAISED as a failed request."""
    for candidate in (error, error.__cause__):
        if isinstance(candidate, ClientError):
            return _answered(candidate)
    if isinstance(error, FileNotFoundError):
        return RequestError("nothing", status=404)
    if isinstance(error, NoCredentialsError):
        return RequestError("none", status=401, code="NoCredentials")
    if isinstance(error, CredentialRetrievalError | MetadataRetrievalError):
        return RequestError("credentials that could not be renewed", status=401, code="CredentialRetrievalError")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return RequestError("none", code="InsufficientStorage")
    if isinstance(error, TIMEOUTS):
        return RequestError("no answer in time", reason=Reason.STALLED)
    if isinstance(error, aiohttp.ClientPayloadError):
        return RequestError("a connection that broke in the middle", reason=Reason.SHORT)
    if isinstance(error, PermissionError):
        return RequestError("them refused", status=403)
    broken = isinstance(error, BROKEN) or getattr(error, "errno", None) in BROKEN_NUMBERS
    # A certificate that is not trusted stays so.
    return RequestError(_in_words(error), reason=Reason.CONNECTION if broken and not isinstance(error, SSLError) else None)


def explained(error: RequestError | GivenUpError, where: str, endpoint: str) -> DrafError:
    """The error for a user; a path that is missing is the store's own matter.

    Args:
        error: What happened.
        where: URL of the object, or of the store.
        endpoint: URL of the service, or "AWS".
    """
    if isinstance(error, GivenUpError):
        return _given_up(error, where, endpoint)
    if error.code in ELSEWHERE_CODES:
        remedy = "Set AWS_DEFAULT_REGION to the region of the bucket."
        return UnreachableError(explain(where, expected="a bucket of this region", found=error.code, remedy=remedy))
    if error.status in (401, 403):
        return _refused(error, where)
    if error.code in FULL_CODES:
        remedy = "Free space or raise the quota, then run the same command again."
        return StorageFullError(explain(where, expected="room in the store", found=error.code, remedy=remedy))
    if error.code in ("InvalidBucketName", "InvalidName"):
        return SpecError(explain(where, expected="a valid name", found=error.found, remedy="Correct the URL."))
    remedy = "Check AWS_ENDPOINT_URL and that the server runs."
    return UnreachableError(explain(where, expected=_service(endpoint), found=error.found, remedy=remedy))


def _given_up(error: GivenUpError, where: str, endpoint: str) -> DrafError:
    times = f"{error.attempts} times in {error.seconds:.0f} s" if error.attempts > 1 else "once"
    remedy = "Check AWS_ENDPOINT_URL and that the server runs, then run the same command again (DRAF_RETRY_FOR_S: how long to try)."
    found = f"{error.last.found} (tried {times})"
    return UnreachableError(explain(where, expected=_service(endpoint), found=found, remedy=remedy))


def _refused(error: RequestError, where: str) -> DrafError:
    if error.code in EXPIRED_CODES:
        remedy = (
            "Renew them (aws sso login, or new AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN), then run the "
            "same command again."
        )
        found = f"expired ones ({error.code})"
        return UnreachableError(explain(where, expected="credentials that are valid now", found=found, remedy=remedy))
    if error.code == "RequestTimeTooSkewed":
        remedy = "Set the clock of this machine."
        return UnreachableError(explain(where, expected="the time that the store has", found="another", remedy=remedy))
    none = error.code == "NoCredentials"
    return UnreachableError(
        explain(
            where,
            expected="credentials that the store accepts",
            found="none" if none else f"them refused ({error.code or error.status})",
            remedy="Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL.",
        )
    )


def _answered(error: ClientError) -> RequestError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    # An answer to HEAD has no body: its code is its status.
    reason = reason_of(status, "" if code.isdigit() else code)
    return RequestError(code or f"status {status}", reason=reason, status=status, code=code)


def _in_words(error: Exception) -> str:
    system = getattr(error, "strerror", None) or getattr(error.__cause__, "strerror", None)
    return str(system or type(error).__name__)


def _service(endpoint: str) -> str:
    host = urlsplit(endpoint).netloc.rpartition("@")[2] or endpoint
    return f"an S3 endpoint that answers at {host}"

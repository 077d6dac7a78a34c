"""One URL and the environment in, a handle to read and write out: local folders and S3."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from draf_dist.errors import SpecError, explain
from draf_dist.storage.base import MissingError, Store
from draf_dist.storage.local import LocalStore, room_on
from draf_dist.storage.s3 import S3Store

# What pins a release or a run (`@` and hex digits at the end) is no credential, also where it names a bucket.
_PIN = re.compile(r"@(?:[0-9a-f]{16}|[0-9a-f]{64})/*\Z")
_AUTHORITY = re.compile(r"(?:(?P<bucket>s3):/+|[a-z][a-z0-9+.-]*:/{1,2})(?P<authority>[^/?#]*)", re.IGNORECASE)
_EXPECTED = "a local path, file:///path or s3://bucket/prefix"

__all__ = ["LocalStore", "MissingError", "S3Store", "Store", "has_credentials", "open_store", "room_on"]


def open_store(url: str, *, must_exist: bool = False) -> Store:
    """The store at a local path, a file:// URL or s3://bucket/prefix.

    S3 takes AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL from the environment (or whatever else AWS tools
    look at). A local folder need not exist unless must_exist.

    Raises:
        SpecError: a scheme that is not allowed, a bucket that does not exist, a folder that must exist and does not; a URL with
            credentials, which is not repeated.
        UnreachableError: the endpoint does not answer, or refuses the credentials.
    """
    if has_credentials(url):
        remedy = "Put them into the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY."
        raise SpecError(explain("URL", expected="one without credentials", found="one with", remedy=remedy))
    scheme, separator, rest = url.partition("://")
    if not separator:
        # An unset shell variable would mean the working folder, and s3:/bucket a folder of that name.
        if not url.strip() or re.match(r"[a-z][a-z0-9]+:/", url, re.IGNORECASE):
            found = repr(url) if url.strip() else "nothing"
            raise SpecError(explain(url or "URL", expected=_EXPECTED, found=found, remedy="Correct the URL."))
        return _open_folder(Path(url), must_exist=must_exist)
    if scheme == "file":
        return _open_folder(Path(unquote(urlsplit(url).path)), must_exist=must_exist)
    if scheme == "s3" and rest.strip("/"):
        return S3Store(url.rstrip("/"))
    raise SpecError(explain(url, expected=_EXPECTED, found=repr(scheme + "://"), remedy="Correct the URL."))


def has_credentials(url: str) -> bool:
    """Whether a user or a password stands before its host or bucket. A bucket has no port: a colon there is before a password."""
    found = _AUTHORITY.match(_PIN.sub("", url))
    return found is not None and ("@" in found["authority"] or (found["bucket"] is not None and ":" in found["authority"]))


def _open_folder(root: Path, *, must_exist: bool) -> LocalStore:
    root = root.expanduser().absolute()
    if root.exists() and not root.is_dir():
        raise SpecError(explain(str(root), expected="a folder", found="a file", remedy="Name the folder."))
    if beneath := next((parent for parent in root.parents if parent.exists() and not parent.is_dir()), None):
        raise SpecError(explain(str(root), expected="a folder", found=f"{beneath}, which is a file", remedy="Name another folder."))
    if must_exist and not root.is_dir():
        raise SpecError(explain(str(root), expected="a folder", found="nothing", remedy=_hint(root)))
    return LocalStore(root)


def _hint(root: Path) -> str:
    beside = sorted(path.name for path in root.parent.iterdir() if path.is_dir()) if root.parent.is_dir() else []
    return f"Beside it are: {', '.join(beside[:8])}." if beside else "Check the path."

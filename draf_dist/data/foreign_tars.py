"""Which tars a URL means: one tar, a folder of them, a pattern, or names with braces; in a local folder or on S3."""

import fnmatch
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from draf_dist.errors import SpecError, explain, together
from draf_dist.storage import LocalStore, Store, open_store

# A range such as {00..999999} is quickly written.
MAX_NAMES = 1_000_000
LISTED_TARS = 10
_WILD = re.compile(r"[*?\[]")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|lzma|z)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_REMEDY = "Check --from-webdataset."


@dataclass(frozen=True)
class ForeignTar:
    """One tar. url: as the release stores it (see ShardRecord); folder and name: where it is opened; name is that of the file."""

    url: str
    folder: str
    name: str


def find_tars(url: str, data_set: Store) -> tuple[ForeignTar, ...]:
    """All tars that a URL means, in the order of their names; for names with braces in the order in which these say them.

    Local paths that were given relative to the working folder are stored relative to the data set's, if that is local too, so that
    both can be moved together; all others as they are. Patterns (`*`, `?`, `[...]`) hold within a file's name.

    Raises:
        SpecError: no tar there, a name that is not there, compressed tars, or a URL that is none or carries credentials.
        UnreachableError: the store does not answer, or refuses the credentials.
    """
    found: list[ForeignTar] = []
    missing: list[str] = []
    stores: dict[str, Store] = {}
    for name in expanded(url):
        if _COMPRESSED.search(name):
            raise _packed(name, name.rpartition("/")[2])
        tars = _tars_at(name, data_set, stores)
        found += tars
        if not tars:
            missing.append(name)
    if missing:
        more = [f"... and {len(missing) - LISTED_TARS} more."] if len(missing) > LISTED_TARS else []
        expected = "a tar, or a folder of tars"
        problems = [explain(name, expected=expected, found="none", remedy=_REMEDY) for name in missing[:LISTED_TARS]]
        raise SpecError(together(problems + more))
    return tuple({tar.url: tar for tar in found}.values())


def expanded(url: str) -> Iterator[str]:
    """Braces written out: {a,b} is each of the two, {00..12} every number with as many digits.

    Raises:
        SpecError: a range that ends before it begins, or more than a million names.
    """
    names = [""]
    rest = url
    while found := _BRACES.search(rest):
        choices = _choices(found[1], url)
        if len(names) * len(choices) > MAX_NAMES:
            raise SpecError(explain(url, expected=f"at most {MAX_NAMES} names", found="more", remedy=_REMEDY))
        names = [name + rest[: found.start()] + choice for name in names for choice in choices]
        rest = rest[found.end() :]
    yield from (name + rest for name in names)


def _choices(text: str, url: str) -> list[str]:
    numbers = _RANGE.fullmatch(text)
    if numbers is None:
        return text.split(",")
    first, last = numbers[1], numbers[2]
    if int(last) < int(first) or int(last) - int(first) >= MAX_NAMES:
        raise SpecError(explain(url, expected="a range from low to high", found=f"{{{text}}}", remedy=_REMEDY))
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]


def _tars_at(url: str, data_set: Store, stores: dict[str, Store]) -> list[ForeignTar]:
    """Those of one URL without braces; stores are kept by their folders, for many names lie in one."""
    folder, _, name = url.rpartition("/")
    if not _WILD.search(name) and not name.endswith(".tar"):
        folder, name = url.rstrip("/"), "*.tar"
    if _WILD.search(folder):
        raise SpecError(explain(url, expected="a pattern in the name of the tars alone", found="one of a folder", remedy=_REMEDY))
    if folder not in stores:
        stores[folder] = open_store(folder or ("/" if url.startswith("/") else "."))
    store = stores[folder]
    names = [name] if not _WILD.search(name) else _fitting(url, store, name)
    is_relative = "://" not in url and not Path(url).expanduser().is_absolute()
    return [_tar(store, found, data_set, is_relative=is_relative) for found in names if store.exists(found)]


def _fitting(url: str, store: Store, pattern: str) -> list[str]:
    """Names of files that fit a pattern.

    Raises:
        SpecError: one of them is a compressed tar, or none fits and compressed ones would.
    """
    files = sorted(_names(store))
    fitting = [name for name in files if fnmatch.fnmatchcase(name, pattern)]
    meant = fitting or [name for name in files if fnmatch.fnmatchcase(_COMPRESSED.sub(".tar", name), pattern)]
    if packed := next((name for name in meant if _COMPRESSED.search(name)), None):
        raise _packed(url, packed)
    return fitting


def _packed(url: str, name: str) -> SpecError:
    remedy = "Unpack them first (gunzip, bunzip2, unxz, zstd -d): bytes in the middle of a compressed tar can't be read."
    return SpecError(explain(url, expected="tars that are not compressed", found=name, remedy=remedy))


def _names(store: Store) -> list[str]:
    """Files of the folder itself."""
    if isinstance(store, LocalStore):
        return [path.name for path in store.root.glob("*") if path.is_file()]
    return [path for path in store.list() if "/" not in path]


def _tar(store: Store, name: str, data_set: Store, *, is_relative: bool) -> ForeignTar:
    url = f"{store.url.rstrip('/')}/{name}"
    if is_relative and isinstance(data_set, LocalStore):
        url = Path(os.path.relpath(url, data_set.root)).as_posix()
    return ForeignTar(url, store.url, name)

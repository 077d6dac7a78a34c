"""A file of a raw export as its bytes, unpacked where the name says that it is packed: `.gz`, or `.zip` with one file in it."""

import gzip
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, cast

from draf_dist.errors import DataError, explain

# The last: a zip whose content is packed in a way that Python does not know.
_BROKEN = (gzip.BadGzipFile, zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError)
# Macintoshes put a second file beside every file that they pack.
_NO_CONTENT = "__MACOSX/"
_ENCRYPTED = 0x1


@contextmanager
def opened(path: Path, file: str) -> Iterator[IO[bytes]]:
    """The bytes of a file, streamed; nothing is written anywhere, so no name in an archive can lead out of the raw folder.

    file: what messages call it.

    Raises:
        DataError: a broken archive (that may show only while it is read), a zip with no file, with several or with a password.
    """
    with ExitStack() as stack:
        try:
            yield stack.enter_context(_bytes_of(stack, path, file))
        except _BROKEN as error:
            kind = "a gzip file" if path.suffix == ".gz" else "a zip file"
            raise DataError(explain(file, expected=kind, found="a broken one", remedy="Copy or export it again.")) from error


def _bytes_of(stack: ExitStack, path: Path, file: str) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path))
    if path.suffix != ".zip":
        return path.open("rb")
    archive = stack.enter_context(zipfile.ZipFile(path))
    members = [member for member in archive.infolist() if not member.is_dir() and not member.filename.startswith(_NO_CONTENT)]
    if len(members) != 1:
        remedy = "Unpack it, and name the file in it in the card."
        raise DataError(explain(file, expected="a zip of one file", found=f"{len(members)} files", remedy=remedy))
    if members[0].flag_bits & _ENCRYPTED:
        remedy = "Unpack it, or export it without one."
        raise DataError(explain(file, expected="a zip without a password", found="one with a password", remedy=remedy))
    return archive.open(members[0])

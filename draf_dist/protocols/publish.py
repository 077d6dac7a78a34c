"""Publishing a release: its files, the one that completes it last of them, then HEAD.json by compare-and-swap.

A release is named by its content, of which its parent is a part: no two releases share a file that differs, and HEAD.json never
comes back to what it was. So what it holds tells whose move it was, and nobody's release is lost unseen.
"""

from collections.abc import Mapping

from draf_dist.protocols.operations import Create, Read, Size, Steps, Swap, Write


def write_release(files: Mapping[str, bytes], last: str, data: bytes) -> Steps[None]:
    """Writes files by path, those that are not there yet, and then the file that says that all are there."""
    for path, content in files.items():
        if (yield Size(path)) != len(content):
            yield Write(path, content)
    # Whoever made it first has made the same.
    yield Create(last, data)


def move_head(path: str, data: bytes, etag: str | None) -> Steps[bool]:
    """Replaces what HEAD held when the release was begun; says whether it holds `data` now.

    etag: of what it held then; None: there was nothing. Not moved is also who did move it, was not told, and was followed by
    another before it could look: then the release is among the ancestors of the newest, and to publish it again changes nothing.
    """
    moved: bool = (yield Create(path, data)) if etag is None else (yield Swap(path, data, etag))
    return moved or (yield Read(path)) == data

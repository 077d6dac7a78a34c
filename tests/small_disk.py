"""A disk that is soon full."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size_mb: int) -> Iterator[Path]:
    """A disk of its own, a few MiB large."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(folder)]
    try:
        made = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("a full disk needs the program mount")
    if made.returncode:
        pytest.skip(f"a full disk needs the right to mount a tmpfs: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        # Lazy: where a test has failed, its files may still be open.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)

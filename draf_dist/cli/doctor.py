"""`draf doctor`: what this machine has, what is missing, and how to mend it."""

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from draf_dist.cli.output import JsonOption, console, print_json, table
from draf_dist.cli.subject_key import SHORTEST_BYTES, VARIABLE
from draf_dist.errors import DrafError

GIB = 2**30
DISK_NEEDED_BYTES = 2 * GIB
MEMORY_NEEDED_BYTES = 4 * GIB


@dataclass(frozen=True)
class Finding:
    """One check. `level` is ok, note (works, but know it) or bad (draf will not work); `remedy` is empty when ok."""

    check: str
    level: str
    found: str
    remedy: str = ""


def doctor(
    store: Annotated[str | None, typer.Option(help="Also write to, read from and delete in this URL (s3://bucket/prefix).")] = None,
    json: JsonOption = False,
) -> None:
    """Check Python, libraries, disk, memory, accelerator, the demo's S3 server and, if asked, a store.

    Exits 1 if anything is bad. Example: draf doctor --store s3://my-bucket/draf
    """
    findings = list(examine(store))
    if json:
        print_json({"findings": [asdict(finding) for finding in findings]})
    else:
        colour = {"ok": "green", "note": "yellow", "bad": "red"}
        rows = [(f.check, f"[{colour[f.level]}]{f.level}[/]", f.found, f.remedy) for f in findings]
        console.print(table("draf doctor", ("check", "", "found", "what to do"), rows))
    if any(finding.level == "bad" for finding in findings):
        raise typer.Exit(1)


def examine(store: str | None) -> Iterator[Finding]:
    """Every check in turn."""
    yield _python()
    yield from _libraries()
    yield _accelerator()
    yield _room("disk here", shutil.disk_usage(Path.cwd()).free, DISK_NEEDED_BYTES, "Free some space or work in another folder.")
    temporary = tempfile.gettempdir()
    yield _room("disk for temporary files", shutil.disk_usage(temporary).free, DISK_NEEDED_BYTES, "Point TMPDIR to a larger disk.")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield _room("memory", memory, MEMORY_NEEDED_BYTES, "Use a machine with more memory, or smaller batches.")
    yield _s3_server()
    yield _subject_key()
    if store is not None:
        yield _store(store)


def _python() -> Finding:
    needed = SpecifierSet(importlib.metadata.metadata("draf_dist")["Requires-Python"])
    fits = needed.contains(platform.python_version(), prereleases=True)
    return Finding("Python", "ok" if fits else "bad", platform.python_version(), "" if fits else f"Install Python {needed}.")


def _libraries() -> Iterator[Finding]:
    # Extras (markers) are what tests and the demo need; a user may do without.
    for text in importlib.metadata.requires("draf_dist") or []:
        requirement = Requirement(text)
        if requirement.marker is not None:
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(requirement.name, "bad", "not installed", f'pip install "{text}" -c constraints.txt')
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        remedy = "" if fits else f'pip install "{text}" -c constraints.txt'
        yield Finding(requirement.name, "ok" if fits else "bad", version, remedy)


def _accelerator() -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding("accelerator", "ok", torch.cuda.get_device_name(0))
    return Finding("accelerator", "note", f"none; {os.cpu_count()} CPU cores", "Everything runs on CPU; large models want a GPU.")


def _room(check: str, free: int, needed: int, remedy: str) -> Finding:
    found = f"{free / GIB:.1f} GiB"
    return (
        Finding(check, "ok", found) if free >= needed else Finding(check, "bad", found, f"Needs {needed / GIB:.0f} GiB. {remedy}")
    )


def _s3_server() -> Finding:
    from draf_dist.launch.local_s3 import find_weed

    return _attempt("S3 server of the demo", lambda: str(find_weed().name), level="note")


def _subject_key() -> Finding:
    length = len(os.environ.get(VARIABLE, "").encode())
    if length >= SHORTEST_BYTES:
        return Finding(VARIABLE, "ok", "set")
    remedy = "Synthetic data need none. For real data: openssl rand -hex 32, keep it for ever."
    return Finding(VARIABLE, "note", "too short" if length else "not set", remedy)


def _store(url: str) -> Finding:
    from draf_dist.storage import open_store

    def round_trip() -> str:
        store = open_store(url)
        probe, content = ".draf-doctor", b"draf doctor"
        store.write(probe, content)
        same = store.read(probe) == content
        store.delete(probe)
        return "written, read, deleted" if same else "read back other bytes than were written"

    return _attempt(f"store {url}", round_trip, level="bad")


def _attempt(check: str, probe: Callable[[], str], *, level: str) -> Finding:
    try:
        return Finding(check, "ok", probe())
    except DrafError as error:
        return Finding(check, level, "failed", str(error))

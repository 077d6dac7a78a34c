"""Runs that others start from: finished ones, pinned by the digest of the weights that are taken from them."""

import re

from draf_dist.errors import DataError, SpecError, explain
from draf_dist.training.run_folder import MODEL, RunFolder, open_run

_PINNED = re.compile(r"(?P<url>.+)@(?P<sha256>[0-9a-f]{64})")


def split_pin(url: str) -> tuple[str, str | None]:
    """URL@sha256 as (URL, sha256); the digest is None where none is given."""
    pinned = _PINNED.fullmatch(url)
    return (pinned["url"], pinned["sha256"]) if pinned else (url, None)


def finished_run(url: str, *, kind: str, what: str, description: str) -> RunFolder:
    """The finished run at a URL. kind: of its job; what: it is called in messages; description: its file that is written last.

    Raises:
        SpecError: there is no run, it is of another kind, or not finished.
        DataError: it has no such file.
    """
    run = open_run(url)
    if run.job.kind != kind:
        remedy = f"Name the folder of a run of kind {kind}."
        raise SpecError(explain(url, expected=f"a {what} run", found=f"a run of kind {run.job.kind}", remedy=remedy))
    if run.end() is None:
        remedy = f"Finish it first: draf train {run.url}/job.yaml --out {run.url}"
        raise SpecError(explain(url, expected="a finished run", found="one that is not", remedy=remedy))
    if not run.store.exists(f"{MODEL}/{description}"):
        remedy = "Copy the whole run again."
        raise DataError(explain(url, expected="an exported model", found=f"no {MODEL}/{description}", remedy=remedy))
    return run


def check_pin(url: str, wanted: str | None, found: str, *, what: str) -> None:
    """Refuses weights other than the pinned ones, by their sha256; None pins nothing.

    Raises:
        SpecError: the run was trained again since.
    """
    if wanted not in (None, found):
        remedy = f"That run was trained again: start this one with --fresh, or bring the {what} back."
        raise SpecError(explain(url, expected=f"the {what} {str(wanted)[:12]}", found=found[:12], remedy=remedy))

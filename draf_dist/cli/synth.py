"""`draf synth`: a raw hospital export of which the truth is known."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from draf_dist.cli.output import JsonOption, console, print_json
from draf_dist.errors import SpecError, explain


def synth(
    out: Annotated[Path, typer.Argument(help="Folder to write; must be new or empty.")],
    sites: Annotated[int, typer.Option(min=1, max=26, help="Number of hospitals.")] = 4,
    subjects: Annotated[int, typer.Option(min=8, help="Number of subjects over all hospitals.")] = 400,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    json: JsonOption = False,
) -> None:
    """Write a raw export of synthetic hospitals, its card, and the planted truth.

    Example: draf synth data/raw --sites 4 --subjects 400 --seed 0
    """
    from draf_dist.sources.synth import synthesise
    from draf_dist.storage import room_on

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SpecError(explain(str(out), expected="a new or empty folder", found="something in it", remedy="Name another folder."))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        found = os.strerror(error.errno or errno.EIO)
        raise SpecError(explain(str(out), expected="a folder that can be made", found=found, remedy="Name another one.")) from error
    with room_on(out), _whole_or_nothing(out):
        synthesise(out, num_sites=sites, num_subjects=subjects, seed=seed)
    if json:
        print_json({"raw": str(out / "raw"), "card": str(out / "card.yaml"), "truth": str(out / "truth")})
        return
    console.print(f"Raw export of {sites} hospitals with {subjects} subjects: {out / 'raw'}", soft_wrap=True)
    console.print(f"Card: {out / 'card.yaml'}   Planted truth: {out / 'truth'}", soft_wrap=True)
    console.print(f"Next: draf prepare {out / 'card.yaml'} --raw {out / 'raw'} --out data/release", soft_wrap=True)


@contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[None]:
    """Empties the folder if the block fails, so that the same command can run again."""
    try:
        yield
    except BaseException:
        for child in folder.iterdir():
            shutil.rmtree(child) if child.is_dir() else child.unlink()
        raise

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
    sites: Annotated[int | None, typer.Option(min=1, max=26, help="Number of hospitals.  [default: 4]")] = None,
    subjects: Annotated[int, typer.Option(min=8, help="Number of subjects over all hospitals.")] = 400,
    hospital: Annotated[int | None, typer.Option(min=1, max=26, help="Write a sealed delivery of this hospital alone.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    json: JsonOption = False,
) -> None:
    """Write a raw export of synthetic hospitals, or a delivery of one of them, with its card and the planted truth.

    Example: draf synth data/raw --sites 4 --subjects 400 --seed 0. A delivery: draf synth data/new --hospital 5 --subjects 300
    """
    from draf_dist.sources.synth import synthesise, synthesise_delivery
    from draf_dist.storage import room_on

    if sites is not None and hospital is not None:
        found, remedy = "both", "Leave --sites out for a delivery."
        raise SpecError(explain("draf synth", expected="--sites or --hospital", found=found, remedy=remedy))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SpecError(explain(str(out), expected="a new or empty folder", found="something in it", remedy="Name another folder."))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        found = os.strerror(error.errno or errno.EIO)
        raise SpecError(explain(str(out), expected="a folder that can be made", found=found, remedy="Name another one.")) from error
    with room_on(out), _whole_or_nothing(out):
        if hospital is None:
            synthesise(out, num_sites=sites or 4, num_subjects=subjects, seed=seed)
        else:
            synthesise_delivery(out, site_number=hospital, num_subjects=subjects, seed=seed)
    raw = out / ("raw" if hospital is None else "delivery")
    if json:
        print_json({"raw": str(raw), "card": str(out / "card.yaml"), "truth": str(out / "truth")})
        return
    what = f"Raw export of {sites or 4} hospitals" if hospital is None else f"Delivery of hospital {hospital}"
    follow = f"prepare {out / 'card.yaml'} --raw {raw} --out" if hospital is None else f"ingest {out / 'card.yaml'} {raw} --release"
    console.print(f"{what} with {subjects} subjects: {raw}", soft_wrap=True)
    console.print(f"Card: {out / 'card.yaml'}   Planted truth: {out / 'truth'}", soft_wrap=True)
    console.print(f"Next: draf {follow} data/release", soft_wrap=True)


@contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[None]:
    """Empties the folder if the block fails, so that the same command can run again."""
    try:
        yield
    except BaseException:
        for child in folder.iterdir():
            shutil.rmtree(child) if child.is_dir() else child.unlink()
        raise

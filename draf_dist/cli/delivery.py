"""`draf delivery seal | verify`."""

from pathlib import Path
from typing import Annotated

import typer

from draf_dist.cli.output import JsonOption, console, print_json

app = typer.Typer(no_args_is_help=True)
FolderArgument = Annotated[Path, typer.Argument(help="The folder of raw files.")]


@app.command("seal")
def seal(
    folder: FolderArgument,
    delivery_id: Annotated[str, typer.Option("--id", help="A name for this delivery, for ever; nothing about a patient.")],
    site: Annotated[list[str] | None, typer.Option(help="A site that the files are of, as the card calls it. Repeatable.")] = None,
    previous: Annotated[str | None, typer.Option(help="The delivery that must be taken in before this one.")] = None,
    json: JsonOption = False,
) -> None:
    """Write delivery.json: every file below the folder with its size and sha256. Do this last, when all files are there.

    A folder that is sealed so already stays as it is; another delivery.json is never overwritten.
    Example: draf delivery seal outbox/2026-05 --id northgate-2026-05 --site northgate
    """
    from draf_dist.sources.delivery import delivery_sha256
    from draf_dist.sources.delivery import seal as seal_folder

    delivery = seal_folder(folder, delivery_id, sites=site or (), previous_delivery=previous)
    _tell(folder, "sealed", delivery.delivery_id, len(delivery.files), delivery.size_bytes, delivery_sha256(delivery), json=json)


@app.command("verify")
def verify(folder: FolderArgument, json: JsonOption = False) -> None:
    """Read every file of a sealed folder and hold it against delivery.json.

    Exits 2 if it has not arrived (no delivery.json), 3 if files are missing, changed or not listed.
    Example: draf delivery verify inbox/2026-05
    """
    from draf_dist.sources.delivery import check_files, delivery_sha256, read_delivery

    delivery = read_delivery(folder)
    check_files(folder, delivery)
    _tell(folder, "as sealed", delivery.delivery_id, len(delivery.files), delivery.size_bytes, delivery_sha256(delivery), json=json)


def _tell(folder: Path, state: str, delivery_id: str, num_files: int, size_bytes: int, sha256: str, *, json: bool) -> None:
    if json:
        print_json({"delivery_id": delivery_id, "files": num_files, "size_bytes": size_bytes, "sha256": sha256})
        return
    told = f"{folder} is {state}: delivery {delivery_id}, {num_files} files, {size_bytes / 2**20:.1f} MiB, {sha256[:16]}."
    console.print(told, soft_wrap=True, highlight=False)

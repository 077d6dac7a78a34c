"""`draf run export`."""

from typing import Annotated

import typer

from draf_dist.cli.output import JsonOption, console, errors, print_json


def export(
    run: Annotated[str, typer.Argument(help="URL of the run folder; the run may still be going on.")],
    out: Annotated[str, typer.Option(help="Folder to write into, in no run folder: a path or s3://bucket/folder.")],
    step: Annotated[
        int | None, typer.Option(help="Steps done at the checkpoint (draf run show); the newest good one if not given.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Write the model of a checkpoint as safetensors, as model/ of a finished run has it, whatever ranks and ZeRO stage saved it.

    Example: draf run export runs/first --step 40 --out exported
    """
    from draf_dist.training.exporting import export_checkpoint

    exported = export_checkpoint(
        run, step, out, warn=lambda message: errors.print(f"warning: {message}", markup=False, highlight=False, soft_wrap=True)
    )
    if json:
        print_json({"run": run, "step": exported.step, "out": out, "files": exported.files})
        return
    console.print(f"Step {exported.step}: {', '.join(exported.files)} in {out}", soft_wrap=True, highlight=False)

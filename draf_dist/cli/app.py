"""The `draf` command: parses, calls one verb, turns errors into a message and an exit code.

Every verb is imported to parse any of them, so none imports torch, Ray or a module that does at its top: the function that needs it
does. Otherwise --help alone would wait for seconds.
"""

import os
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Annotated

import typer
from rich.markup import escape

from draf_dist.cli import (
    bench,
    delivery,
    demo,
    doctor,
    evaluate,
    ingest,
    models,
    plan,
    prepare,
    release,
    retrain,
    run,
    run_diff,
    run_export,
    run_replay,
    schema,
    submit,
    synth,
    train,
    tune,
)
from draf_dist.cli.output import errors
from draf_dist.errors import DrafError, InterruptedRunError

app = typer.Typer(
    help="Distributed training of reliability-aware clinical models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)
app.command("synth")(synth.synth)
app.command("prepare")(prepare.prepare)
app.command("ingest")(ingest.ingest)
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("bench")(bench.bench)
app.command("tune")(tune.tune)
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)
app.command("schema")(schema.schema)
app.command("submit")(submit.submit)
app.command("retrain")(retrain.retrain)
app.add_typer(models.app, name="models", help="Registered models: list, show, gate, promote, roll back, predict.")
app.add_typer(delivery.app, name="delivery", help="Deliveries of raw files: seal, verify.")
app.add_typer(release.app, name="release", help="Releases: verify, log.")
app.add_typer(run.app, name="run", help="Runs: show, report, trace, replay, diff, export.")
run.app.command("replay")(run_replay.replay)
run.app.command("diff")(run_diff.diff)
run.app.command("export")(run_export.export)

DEBUG = "--debug"
# What typer makes of a KeyboardInterrupt.
_ABORTED = 130


@app.callback()
def options(
    debug: Annotated[bool, typer.Option(DEBUG, help="Show the traceback of an error (may stand anywhere).")] = False,
) -> None:
    """Options of every verb; --debug is read by main() before anything is parsed."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; exits 0, or with the exit code of the error (see `draf --help`)."""
    words = sys.argv[1:] if arguments is None else arguments
    debug = DEBUG in words
    if not debug:
        # An error that no one foresaw is one line too: a traceback is for developers.
        sys.excepthook = _one_line
    try:
        typer.main.get_command(app)([word for word in words if word != DEBUG], prog_name="draf")
    except DrafError as error:
        if debug:
            raise
        _print_error(str(error))
        raise SystemExit(error.exit_code) from None
    except SystemExit as end:
        if end.code != _ABORTED:
            raise
        # Ctrl-C where no checkpoint is due: nothing half-written counts anywhere, so there is nothing to repair first.
        _print_error("interrupted. Run the same command again.")
        raise SystemExit(InterruptedRunError.exit_code) from None


def _one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Without the error's own text: a library may quote a cell or a file's name there, and so a patient."""
    frames = [frame for frame in traceback.extract_tb(trace) if "draf_dist" in frame.filename]
    place = f" in {Path(frames[-1].filename).name} line {frames[-1].lineno}" if frames else ""
    if _out_of_memory(error):
        _print_error(
            f"memory: expected room for what the command computes, found none left{place}. Set a smaller model (width, widths, "
            "hidden), batch_size or number of passes, or run where there is more."
        )
        return
    reason = f" ({os.strerror(error.errno)})" if isinstance(error, OSError) and error.errno else ""
    _print_error(
        f"{kind.__name__}{reason}{place}: expected no such error, found one that nobody foresaw. This is a bug: "
        f"run again with {DEBUG} (its text may quote the data) and report it."
    )


def _out_of_memory(error: BaseException) -> bool:
    """Of the host or a device. torch has a class for the second alone, and is not imported for it here."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _print_error(message: str) -> None:
    errors.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()

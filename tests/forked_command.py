"""What is to be killed, in a process of its own that has waited for its imports already."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from forked_ranks import IMPORTED


def started(run: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process that calls run(*arguments) under the environment of this moment; ends with the exit code of a command."""
    multiprocessing.set_forkserver_preload(list(IMPORTED))
    process = multiprocessing.get_context("forkserver").Process(target=_run, args=(dict(os.environ), run, arguments))
    process.start()
    return process


def draf(said: Path, *words: str) -> None:
    """The command line; all that it says goes into a file."""
    from draf_dist.cli.app import main

    with said.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    main(list(words))


def _run(environment: Mapping[str, str], run: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    # That of the process from which this one is forked may be an older one.
    os.environ.update(environment)
    torch.set_num_threads(1)
    run(*arguments)

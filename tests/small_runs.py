"""A release and a job small enough to train in seconds."""

import os
from pathlib import Path
from typing import Any

from rich.console import Console

from draf_dist.data.prepare import prepare
from draf_dist.sources.card import load_card
from draf_dist.sources.synth import synthesise
from draf_dist.training.job import FinetuneJob

SUBJECT_KEY = b"a key of the tests"
ENCODERS = {
    "image": {"kind": "image2d", "widths": [4, 8], "groups": 2},
    "series": {"kind": "series_transformer", "hidden": 8, "heads": 2, "blocks": 1},
    "table": {"kind": "tabular", "hidden": 8},
}


def small_model(kind: str = "draf", **options: Any) -> dict[str, Any]:
    return {"kind": kind, "width": 8, "encoders": ENCODERS, **options}


def small_release(folder: Path, *, num_subjects: int, seed: int, out: str | None = None) -> str:
    """The URL of a release of two synthetic hospitals; out: where it is to lie, else in the folder, as their export does."""
    synthesise(folder / "export", num_sites=2, num_subjects=num_subjects, seed=seed)
    source = load_card(folder / "export" / "card.yaml").build(folder / "export" / "raw")
    return prepare(source, out or str(folder / "release"), subject_key=SUBJECT_KEY).url


def small_job(release: str, *, model: dict[str, Any] | None = None, **changes: Any) -> FinetuneJob:
    tree = {"name": "small", "release": release, "model": model or small_model(), "batch_size": 8, "epochs": 3}
    return FinetuneJob.model_validate({**tree, "passes_train": 2, "passes_eval": 3, **changes})


def silent() -> Console:
    return Console(file=open(os.devnull, "w"))  # noqa: PTH123, SIM115

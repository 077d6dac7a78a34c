"""Predictions made by hand, for tests of what is computed from them: no model, no release."""

from dataclasses import dataclass

import numpy as np

from draf_dist.evaluation.compare import Reference, compare
from draf_dist.evaluation.context import Context
from draf_dist.evaluation.describe import describe_split
from draf_dist.evaluation.job import EvaluateJob
from draf_dist.evaluation.predictions import Applied, Predictions
from draf_dist.evaluation.results import About, Cell, Evaluation, Sweep
from draf_dist.evaluation.signals import find_warnings, measure_signals
from draf_dist.metrics.temperature import fit_temperature

MODALITIES = ("cxr", "labs")


@dataclass(frozen=True)
class Truth:
    """One study's planted truth."""

    prior_logit: float
    llr: dict[str, float]


def studies(n: int = 120, *, seed: int = 0, sharpness: float = 1.0, split: str = "test", applied: Applied | None = None) -> tuple:
    """Predictions whose probability is the exact posterior to the power of `sharpness`, and the truth by uid."""
    generator = np.random.default_rng(seed)
    present = generator.random((n, 2)) < 0.8
    present[~present.any(axis=1), 0] = True
    y = (generator.random(n) < 0.3).astype(np.int64)
    llr = np.where(present, generator.normal(0, 1, (n, 2)) * 1.2 + np.where(y == 1, 0.72, -0.72)[:, None], 0.0)
    prior = float(np.log(0.3 / 0.7))
    p = 1 / (1 + np.exp(-sharpness * (prior + llr.sum(axis=1))))
    uid = np.arange(n, dtype=np.int64) + 1000 * seed
    truth = {int(u): Truth(prior, dict(zip(MODALITIES, row.tolist(), strict=True))) for u, row in zip(uid, llr, strict=True)}
    absent = np.where(present, 0.0, np.nan)
    weight = present / present.sum(axis=1, keepdims=True)
    predictions = Predictions(
        modalities=MODALITIES,
        classes=("survived", "died"),
        split=split,
        applied=applied or Applied(),
        uid=uid,
        site=np.where(generator.random(n) < 0.5, "north", "south & <east>").astype(np.str_),
        target=y,
        probability=np.stack([1 - p, p], axis=1).astype(np.float32),
        epistemic=(p * (1 - p) * 0.1).astype(np.float32),
        aleatoric=(p * (1 - p) * 0.9).astype(np.float32),
        total=(p * (1 - p)).astype(np.float32),
        present=present,
        corrupted=np.full((n, 2), applied is not None),
        severity=np.full((n, 2), 0.0 if applied is None else applied.index / 2, dtype=np.float32),
        reliability=weight.astype(np.float32),
        corruption_probability=(absent + 0.4).astype(np.float32),
        unimodal=(absent + p[:, None]).astype(np.float32),
        uncertainty={
            "epistemic": (absent + (p * (1 - p))[:, None]).astype(np.float32),
            "used": (absent + p[:, None]).astype(np.float32),
        },
    )
    return predictions, truth


def context(truth: dict | None, *, bootstrap: int = 50, temperature: float = 1.0) -> Context:
    """A context in which every study has a subject of its own."""
    job = EvaluateJob(bootstrap=bootstrap)
    return Context(job, temperature, {uid: uid for uid in range(10_000)}, truth)


def evaluation(*, with_truth: bool = True, bootstrap: int = 50) -> Evaluation:
    """A whole evaluation: test and ood, a sweep of one operation, one removal."""
    validation, _ = studies(seed=3, sharpness=2.0, split="val")
    test, truth = studies(seed=1, sharpness=2.0)
    ood, truth_ood = studies(40, seed=2, sharpness=2.0, split="ood")
    temperature = fit_temperature(validation.probability.astype(np.float64), validation.target)
    made = context({**truth, **truth_ood} if with_truth else None, bootstrap=bootstrap, temperature=temperature.value)
    reference = Reference(test, made)
    corrupted, cells = [], []
    for modality in (*MODALITIES, "all"):
        for index in (1, 2):
            part, _ = studies(seed=1, sharpness=2.0 - 0.9 * index, applied=Applied("gaussian", index, modality))
            corrupted.append(part)
            cells.append(_cell("gaussian", index, modality, compare(reference, part)))
    for index in (1, 2):
        part, _ = studies(seed=1, sharpness=1.5, applied=Applied("missing", index))
        cells.append(_cell("missing", index, "all", compare(reference, part)))
    weight = dict.fromkeys(MODALITIES, 0.5)
    removals = (_cell("remove", 1, "cxr", compare(reference, corrupted[0])),)
    sweep = Sweep(
        split="test",
        passes=10,
        num_studies=100,
        clean=reference.estimates(),
        clean_reliability=weight,
        cells=tuple(cells),
        removals=removals,
    )
    splits = [describe_split(part, made) for part in (test, ood)]
    signals = measure_signals(validation, test, corrupted)
    return Evaluation(
        about=ABOUT,
        temperature=temperature,
        splits=tuple(splits),
        sweep=sweep,
        signals=signals,
        warnings=find_warnings(made.job, temperature, splits, signals, sweep),
    )


def _cell(operation: str, index: int, modality: str, metrics: dict) -> Cell:
    weight = {"cxr": 0.5 - 0.1 * index, "labs": 0.5 + 0.1 * index}
    return Cell(
        operation=operation,
        index=index,
        level=f"{index / 2:g}",
        severity=index / 2,
        modality=modality,
        num_studies=120,
        metrics=metrics,
        reliability=weight,
        corruption_probability=dict.fromkeys(MODALITIES, 0.4),
    )


ABOUT = About(
    run="draf-<script>alert(1)</script>",
    job_name="draf",
    release="s3://bucket/data",
    release_version="0123456789abcdef",
    trained_on="s3://bucket/data@0123456789abcdef",
    model="draf",
    num_parameters=12345,
    weights_sha256="ab" * 32,
    modalities=MODALITIES,
    label="death",
    classes=("survived", "died"),
    settings=EvaluateJob(),
)

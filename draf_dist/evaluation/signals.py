"""What uncertainty and reliability go with: risk, severity, the corruption head. And the warnings in plain words."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from draf_dist.evaluation.job import EvaluateJob
from draf_dist.evaluation.predictions import Predictions
from draf_dist.evaluation.results import Cell, Signal, SplitResult, Sweep
from draf_dist.evaluation.scoring import TASKS, TaskMetrics
from draf_dist.evaluation.statistics import Estimate, Floats
from draf_dist.evaluation.task_scores import TaskName
from draf_dist.metrics.rank import correlation_warning, risk_correlation, spearman
from draf_dist.metrics.temperature import Temperature

# What the weights use, where a model says so; else the proposal's own uncertainty.
USED, LITERAL = "used", "epistemic"
# Of a class, of those with a label, or of events.
SMALL_COUNT = 20
# A paired loss of AUROC, or of the C-index, below this is of no practical weight, whatever its interval.
NOTABLE_LOSS = 0.02


def measure_signals(validation: Predictions, clean: Predictions | None, corrupted: Sequence[Predictions]) -> tuple[Signal, ...]:
    """One Signal per modality; clean and corrupted are those of the sweep (None and empty without one)."""
    return tuple(_signal(m, name, validation, clean, corrupted) for m, name in enumerate(validation.modalities))


def used_kind(uncertainty: dict[str, float | None]) -> str | None:
    """The uncertainty that counts for warnings."""
    return next((kind for kind in (USED, LITERAL) if kind in uncertainty), None)


def find_warnings(
    job: EvaluateJob,
    temperature: Temperature,
    splits: Sequence[SplitResult],
    signals: Sequence[Signal],
    sweep: Sweep | None,
    *,
    task: TaskName = "class",
) -> tuple[str, ...]:
    """Everything a reader should know before quoting a number, most general first."""
    metrics = TASKS[task]
    found = [f"Temperature: {temperature.note}."] if temperature.note else []
    for split in splits:
        found += _split_warnings(split, metrics)
    found += _risk_warnings(job, signals)
    if sweep is not None:
        found += _sweep_warnings(sweep, splits, metrics)
    return tuple(found)


def _signal(m: int, name: str, validation: Predictions, clean: Predictions | None, corrupted: Sequence[Predictions]) -> Signal:
    risk = {
        kind: Estimate.of(_with_risk(validation, values[:, m], m)).value for kind, values in sorted(validation.uncertainty.items())
    }
    hit = [part for part in corrupted if part.applied.modality == name and part.corrupted[:, m].any()]
    if clean is None or not hit:
        return Signal(
            modality=name,
            uncertainty_risk=risk,
            severity_reliability=None,
            severity_uncertainty=None,
            severity_corruption=None,
            corruption_uncertainty=None,
        )
    parts = [clean, *hit]
    severity = _pool(parts, m, [part.severity for part in parts])
    reliability = _pool(parts, m, [part.reliability for part in parts])
    c_hat = _pool(parts, m, [part.corruption_probability for part in parts])
    kind = used_kind(risk)
    uncertainty = _pool(parts, m, [part.uncertainty[kind] for part in parts]) if kind else np.full_like(severity, np.nan)
    return Signal(
        modality=name,
        uncertainty_risk=risk,
        severity_reliability=Estimate.of(spearman(severity, reliability)).value,
        severity_uncertainty=Estimate.of(spearman(severity, uncertainty)).value,
        severity_corruption=Estimate.of(spearman(severity, c_hat)).value,
        corruption_uncertainty=Estimate.of(spearman(c_hat, uncertainty)).value,
    )


def _with_risk(validation: Predictions, uncertainty: NDArray[np.float32], m: int) -> float:
    """Spearman of U with the risk that the modality itself sees, or with the fused one where no head of its own says."""
    own = validation.unimodal[:, m]
    risk = own if np.isfinite(own).any() else np.where(validation.present[:, m], validation.risk, np.nan)
    return risk_correlation(uncertainty.astype(np.float64), risk.astype(np.float64))


def _pool(parts: Sequence[Predictions], m: int, values: Sequence[NDArray[np.float32]]) -> Floats:
    chosen = [value[part.present[:, m], m] for part, value in zip(parts, values, strict=True)]
    return np.concatenate(chosen).astype(np.float64)


def _split_warnings(split: SplitResult, metrics: TaskMetrics) -> list[str]:
    found = []
    what, rarest = _rarest(split)
    if rarest < SMALL_COUNT:
        found.append(
            f"Split {split.split}: {what} {rarest} studies. Intervals are wide; compare models by paired differences only."
        )
    primary, title = split.scaled[metrics.primary], metrics.title
    if primary.low is not None and primary.low == primary.high:
        found.append(
            f"Split {split.split}: every resample has the same {title}, {primary.value:.3f}. Its interval has no width because the "
            f"{split.num_subjects} subjects are too few to bound it, not because it is certain."
        )
    if split.num_unlabelled:
        found.append(f"Split {split.split}: {split.num_unlabelled} studies without a label were predicted but are in no metric.")
    if split.times is None:
        found += _calibration_warnings(split)
    return found


def _rarest(split: SplitResult) -> tuple[str, int]:
    """What there is least of, in words, and how much."""
    if split.times is not None:
        return "an event was seen in", split.class_counts[1]
    return f"the rarest {'label' if split.labels else 'class'} has", min(split.class_counts)


def _calibration_warnings(split: SplitResult) -> list[str]:
    parts = [("", split.scaled["ece"].value, split.ece_floor.high)]
    if split.labels:
        parts = [(f" of {label.name}", label.metrics["ece"].value, label.ece_floor.high) for label in split.labels]
    return [
        f"Split {split.split}: ECE{what} after temperature scaling is {ece:.3f}; a perfectly calibrated model would stay below "
        f"{floor:.3f} at this number of studies in 95 of 100 cases. The probabilities are miscalibrated here."
        for what, ece, floor in parts
        if ece is not None and floor is not None and ece > floor
    ]


def _risk_warnings(job: EvaluateJob, signals: Sequence[Signal]) -> list[str]:
    found = []
    for signal in signals:
        kind = used_kind(signal.uncertainty_risk)
        rho = signal.uncertainty_risk.get(kind) if kind else None
        if rho is not None and (warning := correlation_warning(signal.modality, rho, largest=job.warn_correlation)):
            found.append(warning)
    return found


def _sweep_warnings(sweep: Sweep, splits: Sequence[SplitResult], metrics: TaskMetrics) -> list[str]:
    total = next((split.num_studies for split in splits if split.split == sweep.split), sweep.num_studies)
    found = []
    if total > sweep.num_studies:
        found.append(f"The sweep used {sweep.num_studies} of the {total} studies of {sweep.split}, to bound its cost.")
    found += [
        f"The sweep leaves out {operation}: all studies of {sweep.split} have one label, so none counts as sicker."
        for operation in sweep.left_out
    ]
    worst = _worst(sweep.cells, f"{metrics.primary}_difference")
    if worst is not None:
        loss = worst.metrics[f"{metrics.primary}_difference"]
        found.append(
            f"The largest certain loss of {metrics.short_title} under a corruption is {loss.value:.3f} "
            f"[{loss.low:.3f}, {loss.high:.3f}], from {worst.operation} at {worst.level} on {worst.modality}."
        )
    return found


def _worst(cells: Sequence[Cell], difference: str) -> Cell | None:
    """The cell with the largest loss whose interval lies above 0."""
    certain = [
        cell
        for cell in cells
        if (loss := cell.metrics[difference]).value is not None
        and loss.low is not None
        and loss.low > 0
        and loss.value >= NOTABLE_LOSS
    ]
    return max(certain, key=lambda cell: cell.metrics[difference].value or 0.0, default=None)

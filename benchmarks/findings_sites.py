"""What depends on the hospital: the energy that severity is made from, and what a system gains over another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from findings_study import AS_THEY_ARE, Study, trained
from findings_tables import Table

from draf_dist.data.corruption.operations import has_numbers
from draf_dist.data.loader import evaluation_batches
from draf_dist.evaluation.bench import result_of
from draf_dist.evaluation.bench_cell import Cell
from draf_dist.evaluation.predictions import Predictions, file_name, read_predictions
from draf_dist.evaluation.scoring import scaled_probability
from draf_dist.evaluation.statistics import Estimate, Floats, Rows
from draf_dist.metrics.calibration import negative_log_likelihood
from draf_dist.metrics.classification import auroc
from draf_dist.metrics.paired import paired_t
from draf_dist.metrics.rank import spearman
from draf_dist.models.absent import clear_absent
from draf_dist.models.fusion.severity_rejection import SeverityRejection
from draf_dist.models.severity import SIGMAS, Severity, measurable
from draf_dist.schema.batch import Batch
from draf_dist.schema.release import Split
from draf_dist.storage import open_store

REJECTION = "severity_rejection"
# System and what it is compared with: gate, rejection and presence bits.
GAINS = (("severity_cross_modal_gate", "mean_mc"), (REJECTION, "mean_mc"), ("mean_mc", "mean_no_bits"))


@dataclass(frozen=True)
class Measured:
    """Clean studies of a split that have something measured of one modality: energy, severity, uid, site, (n,) each."""

    energy: Floats
    severity: Floats
    uid: Rows
    site: Rows


@dataclass(frozen=True)
class Energies:
    """Of one modality in one fold. noisy: energy of the validation studies under every one of SIGMAS, (7, n)."""

    largest: float
    train: Measured
    validation: Measured
    held_out: Measured
    noisy: Floats


def variances(value: Floats, group: Rows) -> tuple[float, float]:
    """Of a one-way random-effects model: variance between groups and within, by the ANOVA estimator for unequal sizes.

    Between = (MSB - MSW) / n0, n0 = (N - sum n_k^2 / N) / (K - 1); 0 where that is negative. It does not rise with the number of
    groups as the share of the sum of squares does, which is (K - 1) / (N - 1) by chance. Both are NaN of fewer than two groups, and
    where every group is a single study.
    """
    _, index, count = np.unique(group, return_inverse=True, return_counts=True)
    total, num = len(value), len(count)
    if num < 2 or total == num:
        return float("nan"), float("nan")
    mean = np.bincount(index, value) / count
    within = float(((value - mean[index]) ** 2).sum() / (total - num))
    between = float((count * (mean - value.mean()) ** 2).sum() / (num - 1))
    size = (total - (count**2).sum() / total) / (num - 1)
    return max(0.0, (between - within) / size), within


def explained(value: Floats, group: Rows) -> float:
    """The share of the variance that lies between groups, 0 to 1; NaN where nothing varies or nothing is known of it."""
    between, within = variances(value, group)
    return between / (between + within) if between + within > 0 else float("nan")


def shrunken(value: Floats, group: Rows) -> dict[int, float]:
    """Group -> (mean_k - mu) between / (between + within / n_k), the best linear unbiased prediction of its effect (Robinson 1991).

    mu is the generalised least-squares mean: of the groups' means, by weights 1 / (between + within / n_k). 0 where between is 0 or
    not known.
    """
    between, within = variances(value, group)
    groups, index, count = np.unique(group, return_inverse=True, return_counts=True)
    if not between > 0:
        return dict.fromkeys(groups.tolist(), 0.0)
    mean, weight = np.bincount(index, value) / count, 1 / (between + within / count)
    effect = between * weight * (mean - (weight * mean).sum() / weight.sum())
    return dict(zip(groups.tolist(), effect.tolist(), strict=True))


def site_tables(study: Study) -> dict[str, Table]:
    """The tables of severity and the hospital, by title."""
    by_fold = [_energies(cell) for cell in study.cells(REJECTION, study.seeds[0])]
    names = list(by_fold[0])
    of = {name: [fold[name] for fold in by_fold] for name in names}
    return {
        "Share of the variance of E that lies between hospitals, clean training studies": {
            name: over_folds([explained(one.train.energy, one.train.site) for one in of[name]]) for name in names
        },
        "E under noise, validation studies: pooled, and less the shrunken mean of the hospital (difference: t over folds)": {
            row: columns for name in names for row, columns in _site_means(name, of[name]).items()
        },
        "Clean studies with s > 0, and with sigma_hat above the limit of rejection": {
            name: _shares(study, of[name]) for name in names
        },
    }


def severity_of(cell: Cell) -> Severity:
    """The severity of a fold, as the rejection carries it; that of all seeds is the same."""
    model = trained(cell).exported.model
    assert isinstance(model, SeverityRejection)
    return model.severity


@torch.no_grad()
def _energies(cell: Cell) -> dict[str, Energies]:
    subject = trained(cell)
    model = subject.exported.model
    assert isinstance(model, SeverityRejection)
    severity, schema = model.severity.eval(), subject.release.schema
    splits: tuple[Split, ...] = ("train", "val", "ood")
    batches = {
        split: list(map(subject.normaliser, evaluation_batches(subject.release, split, cell.batch_size))) for split in splits
    }
    found = {}
    for spec in schema.modalities:
        if not has_numbers(spec):
            continue
        noisy = torch.cat([severity.under_noise(spec, batch) for batch in batches["val"]], dim=1)
        train, validation, held_out = (_measured(severity, spec.name, batches[split]) for split in splits)
        found[spec.name] = Energies(
            float(np.log1p(model.config.largest_sigma)), train, validation, held_out, noisy.double().numpy()
        )
    return found


def _measured(severity: Severity, name: str, batches: Sequence[Batch]) -> Measured:
    columns: list[list[torch.Tensor]] = []
    for batch in batches:
        value, m = clear_absent(batch)[name], batch.modalities.index(name)
        rows = measurable(batch, name, value)
        columns.append([one[rows] for one in (severity.energy(name, value), severity(batch)[:, m], batch.uid, batch.site)])
    energy, s, uid, site = (torch.cat(parts) for parts in zip(*columns, strict=True))
    return Measured(energy.double().numpy(), s.double().numpy(), uid.numpy(), site.numpy())


def _site_means(name: str, folds: Sequence[Energies]) -> Table:
    effects = [shrunken(one.train.energy, one.train.site) for one in folds]
    shifts = [
        np.array([effect.get(int(site), 0.0) for site in one.validation.site]) for effect, one in zip(effects, folds, strict=True)
    ]
    pooled = [told_by_energy(one.noisy) for one in folds]
    less = [told_by_energy(one.noisy - shift) for one, shift in zip(folds, shifts, strict=True)]
    columns = list(pooled[0])
    before, after = ({column: np.array([one[column] for one in each]) for column in columns} for each in (pooled, less))
    return {
        f"{name}, pooled": {column: Estimate.of(float(before[column].mean())) for column in columns},
        f"{name}, less site": {column: Estimate.of(float(after[column].mean())) for column in columns},
        f"{name}, difference": {column: paired(after[column], before[column]) for column in columns},
    }


def told_by_energy(noisy: Floats) -> dict[str, float]:
    """Spearman of energies (levels, n) with the level, AUROC of every noise against clean."""
    level, n = np.repeat(np.arange(len(noisy)), noisy.shape[1]).astype(np.float64), noisy.shape[1]
    found = {"Spearman": spearman(noisy.ravel(), level)}
    for sigma, one in zip(SIGMAS[1:], noisy[1:], strict=True):
        both = np.concatenate([noisy[0], one])
        found[f"AUROC, sigma {sigma:g}"] = float(auroc(np.stack([-both, both], axis=1), np.repeat([0, 1], n)))
    return found


def _shares(study: Study, folds: Sequence[Energies]) -> dict[str, Estimate]:
    """At hospitals known from training, mean of folds; held out, of the studies that each fold counts, over subjects.

    Of studies above the limit not all are rejected: where every modality of one is, the model keeps the least severe.
    """
    found: dict[str, Estimate] = {}
    for name, largest in (("s > 0", 0.0), (f"sigma_hat above {np.expm1(folds[0].largest):g}", folds[0].largest)):
        known = over_folds([float((one.validation.severity > largest).mean()) for one in folds])
        found |= {f"{name}, known: {column}": value for column, value in known.items()}
        of_uid = {
            int(uid): s > largest for one, own in zip(folds, study.own, strict=True) for uid, s in _counted(one.held_out, own)
        }
        each = np.array([of_uid.get(int(uid), np.nan) for uid in study.uid], dtype=np.float64)
        found[f"{name}, held out"] = study.of_studies(_mean_of(each))
    return found


def _counted(held_out: Measured, own: Rows) -> list[tuple[int, float]]:
    counts = np.isin(held_out.uid, own)
    return list(zip(held_out.uid[counts].tolist(), held_out.severity[counts].tolist(), strict=True))


def _mean_of(each: Floats) -> Callable[[Rows], float]:
    return lambda rows: float(np.nanmean(each[rows]))


def over_folds(values: Sequence[float]) -> dict[str, Estimate]:
    """Mean, least and greatest, none where one of them is NaN."""
    return {name: Estimate.of(float(of(values))) for name, of in (("mean", np.mean), ("least", np.min), ("greatest", np.max))}


def paired(first: Floats, second: Floats) -> Estimate:
    """The mean of first - second, (folds,) both, with the t interval over folds; none where a fold has no number."""
    found = paired_t(first, second)
    if np.isnan(found.mean):
        return Estimate.of(found.mean)
    return Estimate(value=found.mean, low=found.low, high=found.high)


def known(study: Study) -> Table:
    """Gains on clean studies of hospitals known from training (validation) and held out, means over seeds, t interval over folds.

    The known hospitals' studies are those of validation, on which stopping and temperature were chosen. A gain of NLL is better
    when negative. Folds share most of their training studies, so these intervals are if anything too narrow.
    """
    found: Table = {}
    for system, reference in GAINS:
        if {system, reference} <= set(study.prepared.job.systems):
            gains = [_by_fold(study, system, where) - _by_fold(study, reference, where) for where in ("val", "ood")]
            found[f"{system} - {reference}"] = {
                f"{metric}, {name}": paired(first, second)
                for place, metric in enumerate(("AUROC", "NLL"))
                for name, first, second in (
                    ("known", gains[0][place], 0 * gains[0][place]),
                    ("held out", gains[1][place], 0 * gains[1][place]),
                    ("held out - known", gains[1][place], gains[0][place]),
                )
            }
    return found


def _by_fold(study: Study, system: str, split: Split) -> Floats:
    """AUROC and NLL, (2, folds), mean over seeds, temperature-scaled."""
    return np.asarray(np.mean([_scores(study, system, seed, split) for seed in study.seeds], axis=0), dtype=np.float64)


def _scores(study: Study, system: str, seed: int, split: Split) -> Floats:
    cells = study.cells(system, seed)
    parts = study.predictions(system, seed, AS_THEY_ARE) if split == "ood" else [_validation(cell) for cell in cells]
    each = []
    for cell, part in zip(cells, parts, strict=True):
        probability = scaled_probability(part, result_of(cell).temperature.value)
        each.append((auroc(probability, part.target), negative_log_likelihood(probability, part.target)))
    return np.array(each).T


def _validation(cell: Cell) -> Predictions:
    (found,) = read_predictions(open_store(cell.url), file_name("val"))
    return found.labelled()

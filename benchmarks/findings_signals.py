"""What uncertainties, corruption heads, weights and severities of the modalities of a record follow: risk, noise, or chance."""

from collections.abc import Callable, Sequence

import numpy as np
from findings_statistics import alone, corruption, ranked, told_apart, uncertainty, weight, with_level
from findings_study import AS_THEY_ARE, Read, Statistic, Study, in_order, trained
from findings_tables import Table

from draf_dist.data.loader import evaluation_batches
from draf_dist.evaluation.bench_cell import Cell
from draf_dist.evaluation.bench_conditions import BenchCondition
from draf_dist.evaluation.bench_job import BenchJob
from draf_dist.evaluation.predict import Predictor
from draf_dist.evaluation.predictions import Predictions
from draf_dist.evaluation.statistics import Estimate

# Those with every uncertainty and a corruption head; those with weights that are to fall with corruption; that measure severity.
DRAF = ("draf_alpha_0", "draf_alpha_1")
WEIGHING = ("draf_learned", "aum", "aum_precision", "severity_cross_modal_gate")
MEASURING = ("severity_rejection",)
FEW, MANY = 4, 30
# Neither shares a pass with the other, or with the stored predictions.
SEED_OF_FEW, SEED_OF_MANY = 1, 2
# Of modality m.
Reader = Callable[[int], Read]


def summary(study: Study, name: str, statistics: Sequence[Statistic]) -> dict[str, Estimate]:
    """The mean over modalities and models with its interval over subjects, and the least and greatest of them."""
    each = study.by_model(statistics, np.arange(len(study.fold)))
    mean, least, greatest = study.over_models(*statistics), Estimate.of(each.min()), Estimate.of(each.max())
    return {name: mean, f"least of {each.size}": least, f"greatest of {each.size}": greatest}


def risk(study: Study) -> Table:
    """Spearman of U_m with p_m, what the modality itself gives for the probability, of clean studies that have it."""
    found = {}
    for system in _there(study, DRAF):
        own = [study.signals(system, AS_THEY_ARE, alone(m)) for m in range(len(study.schema.names))]
        for kind in ("epistemic", "total", "entropy"):
            u = [study.signals(system, AS_THEY_ARE, uncertainty(kind, m)) for m in range(len(own))]
            found[f"{system}, {kind}"] = summary(study, "Spearman", [ranked(a, b) for a, b in zip(u, own, strict=True)])
    return found


def detection(study: Study) -> Table:
    """Spearman of each signal with sigma, 0 and those of the job, and AUROC of the largest against clean; none without noise.

    Of one modality in one model, and of the same studies clean and noisy: those that the noise hits, of Spearman those that every
    noise of the job hits. Noise on one modality of a study (`hits: one`) rarely hits it where there are many, and there its weight
    is small: against all clean studies a signal that noise leaves alone would seem to follow it. A weight that falls with
    corruption has a negative Spearman and an AUROC above .5.
    """
    found: Table = {}
    noises = noises_of(study.prepared.job)
    if not noises:
        return found
    modalities = [study.schema.names.index(name) for name in noises[0][1].fitting(study.schema)]
    sigmas = [0.0, *(one.level for _, one in noises)]
    for signal, (system, reader, sign) in _signals(study).items():
        by_level, apart = [], []
        for m in modalities:
            clean = study.signals(system, AS_THEY_ARE, reader(m))
            places = [(name, _case(study, one.hits, m)) for name, one in noises]
            hit = [study.signals(system, where, where_hit(reader(m), m)) for where in places]
            by_level.append(with_level([clean, *hit], sigmas))
            apart.append(told_apart(sign * clean, sign * hit[-1]))
        found[signal] = summary(study, "Spearman with sigma", by_level) | {
            f"AUROC: {column}": value for column, value in summary(study, "largest sigma", apart).items()
        }
    return found


def _signals(study: Study) -> dict[str, tuple[str, Reader, int]]:
    """Name -> system, reader, and -1 of what is to fall with corruption."""
    found: dict[str, tuple[str, Reader, int]] = {}
    for system in _there(study, DRAF):
        found[f"{system}, U epistemic"] = (system, lambda m: uncertainty("epistemic", m), 1)
        found[f"{system}, corruption head"] = (system, corruption, 1)
    found |= {f"{system}, severity": (system, lambda m: uncertainty("severity", m), 1) for system in _there(study, MEASURING)}
    found |= {f"{system}, weight": (system, weight, -1) for system in _there(study, WEIGHING)}
    return found


def noises_of(job: BenchJob) -> list[tuple[str, BenchCondition]]:
    """The conditions with noise on records, the mildest first."""
    conditions = [(name, one) for name, one in job.conditions.items() if one.operation.kind == "ehr_noise"]
    return sorted(conditions, key=lambda pair: pair[1].level)


def _case(study: Study, hits: str, m: int) -> str:
    return study.schema.names[m] if hits == "each" else hits


def where_hit(read: Read, m: int) -> Read:
    """A signal where the modality was corrupted, else NaN."""
    return lambda part: np.where(part.corrupted[:, m], read(part), np.nan)


def _there(study: Study, systems: Sequence[str]) -> list[str]:
    return [name for name in systems if name in study.prepared.job.systems]


def passes(study: Study) -> Table:
    """Spearman of the epistemic U_m of few Monte-Carlo passes with that of many others, of clean studies that have modality m."""
    found = {}
    for system in _there(study, DRAF):
        parts = {count: _drawn(study, system, count, seed) for count, seed in ((FEW, SEED_OF_FEW), (MANY, SEED_OF_MANY))}
        statistics = []
        for m in range(len(study.schema.names)):
            few, many = (np.array([in_order(one, uncertainty("epistemic", m)) for one in parts[count]]) for count in (FEW, MANY))
            statistics.append(ranked(few, many))
        found[system] = summary(study, f"Spearman, {FEW} and {MANY} passes", statistics)
    return found


def _drawn(study: Study, system: str, count: int, seed: int) -> list[list[Predictions]]:
    """By seed of training, of every fold."""
    each = [[_predicted(cell, count, seed) for cell in study.cells(system, one)] for one in study.seeds]
    return [study.of_folds(parts) for parts in each]


def _predicted(cell: Cell, count: int, seed: int) -> Predictions:
    subject = trained(cell)
    predictor = Predictor(subject.exported.model, subject.release.schema, count, seed)
    return predictor.predict(map(subject.normaliser, evaluation_batches(subject.release, "ood", cell.batch_size)), split="ood")

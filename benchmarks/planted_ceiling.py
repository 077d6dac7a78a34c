"""What a reliability could gain: readers who know the planted posterior meet noise, swaps and absence with different weights.

    python benchmarks/planted_ceiling.py [--subjects 20000] [--seed 0] [--json FILE]

No network and no file: evidence, labels and posteriors of a synthetic cohort (docs/synth.md). One modality at a time gets noise
N(0, sigma^2) on every component of its evidence, which has unit variance within a class, so sigma is that of docs/corruption.md for
a standardised measurement. Three readers see the same noisy evidence, and all else as it is:

    weighted   the exact posterior; for uncorrelated components of unit variance its ratio is that of `trusting` times
               1 / (1 + sigma^2), and in general w(sigma) times at best
    trusting   takes the noisy evidence for clean: a model without reliability that has not learned to bear noise
    rejecting  takes the modality for missing: what an oracle does that knows it to be corrupted

`lost` is what the noise took, mean KL(posterior of clean || weighted): nobody's fault. The regret of the other two is the mean KL
from `weighted`. Intervals: 95 %, over studies, which are independent here.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar
from scipy.special import expit, log_expit
from scipy.stats import rankdata

from draf_dist.sources.synth.evidence import EVIDENCE, EXTRA_SD, MODALITIES, PREVALENCE, prior_logit
from draf_dist.sources.synth.population import Population, draw_population

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
NOISY = ("cxr", "vitals", "labs")
SIGMAS = (0.4, 0.8, 1.6, 3.2, 10.0)
RATES = (0.1, 0.3, 0.5, 0.7)
NUM_PARTS = 20
COVERAGE = 0.7


@dataclass(frozen=True)
class Readers:
    """Log odds of death (n,) of the studies that have the modality, before and after it was hit."""

    clean: Floats
    weighted: Floats
    trusting: Floats
    rejecting: Floats
    y: NDArray[np.int64]


def under_noise(population: Population, name: str, sigma: float, seed: int = 0) -> Readers:
    """The readers where every study's modality `name` has noise sigma on its evidence."""
    m, model = MODALITIES.index(name), EVIDENCE[name]
    evidence, severity = population.evidence[name], population.severity[:, m]
    noisy = evidence + sigma * np.random.default_rng((seed, m)).standard_normal(evidence.shape)
    # Severities add up in variance: the noise of the file and this one.
    both = np.sqrt(severity**2 + (sigma / EXTRA_SD) ** 2)
    observed = population.observed[name]
    return _readers(population, m, model.llr(noisy, observed, both), model.llr(noisy, observed, severity))


def under_swap(population: Population, name: str, seed: int = 0) -> Readers:
    """The same where each has the modality of another study, and `weighted` knows it: such a modality says nothing."""
    m, has = MODALITIES.index(name), np.flatnonzero(population.present[:, MODALITIES.index(name)])
    partner = np.arange(len(population.y))
    ring = np.random.default_rng((seed, m)).permutation(has)
    partner[ring] = np.roll(ring, 1)
    return _readers(population, m, np.zeros(len(partner)), population.llr[partner, m])


def _readers(population: Population, m: int, weighted: Floats, trusting: Floats) -> Readers:
    has = population.present[:, m]
    clean = prior_logit() + population.llr.sum(axis=1)
    others = clean - population.llr[:, m]
    weighted, trusting = others + weighted, others + trusting
    return Readers(clean[has], weighted[has], trusting[has], others[has], population.y[has])


def divergence(truth: Floats, reader: Floats) -> Floats:
    """KL of two Bernoulli distributions from their log odds, in nats, (n,)."""
    p = expit(truth)
    return np.asarray(p * (log_expit(truth) - log_expit(reader)) + (1 - p) * (log_expit(-truth) - log_expit(-reader)))


def best_weight(readers: Readers) -> float:
    """The one factor on what a trusting reader takes from the modality that gives the least loss."""
    gained = readers.trusting - readers.rejecting
    return float(
        minimize_scalar(
            lambda w: float(divergence(readers.weighted, readers.rejecting + w * gained).mean()),
            bounds=(0, 1.2),
            method="bounded",
            options={"xatol": 1e-3},
        ).x
    )


@dataclass(frozen=True)
class NotAtRandom:
    """Log odds of death where modalities went missing by the label: of what is left, without and with presence bits."""

    without_bits: Floats
    with_bits: Floats
    y: NDArray[np.int64]


def missing_not_at_random(population: Population, rate: float, slope: float = 1.0, seed: int = 0) -> NotAtRandom:
    """logit P(missing) = a + slope * standardised label of every modality present (docs/corruption.md); none is kept by force."""
    standard = (population.y - PREVALENCE) / np.sqrt(PREVALENCE * (1 - PREVALENCE))
    sick, well = ((one - PREVALENCE) / np.sqrt(PREVALENCE * (1 - PREVALENCE)) for one in (1, 0))
    a = brentq(lambda x: PREVALENCE * expit(x + slope * sick) + (1 - PREVALENCE) * expit(x + slope * well) - rate, -50, 50)
    lost = np.random.default_rng(seed).random(population.present.shape) < expit(a + slope * standard)[:, None]
    left = population.present & ~lost
    without = prior_logit() + np.where(left, population.llr, 0.0).sum(axis=1)
    p1, p0 = expit(a + slope * sick), expit(a + slope * well)
    bit = np.where(left, np.log((1 - p1) / (1 - p0)), np.log(p1 / p0))
    return NotAtRandom(without, without + np.where(population.present, bit, 0.0).sum(axis=1), population.y)


def abstaining(population: Population, name: str, sigma: float, seed: int = 0) -> dict[str, dict[str, Floats]]:
    """Half of the studies have noise on the modality; a trusting reader answers 70 %: by what it leaves the others out.

    Each kind of loss (n_kept,) of those answered: entropy of the exact posterior, which nobody could have avoided, and regret.
    """
    noisy, hit = under_noise(population, name, sigma, seed), _half(population, name, seed)
    truth, reader = np.where(hit, noisy.weighted, noisy.clean), np.where(hit, noisy.trusting, noisy.clean)
    tie = np.random.default_rng(seed + 1).random(len(hit))
    entropy = -(expit(truth) * log_expit(truth) + expit(-truth) * log_expit(-truth))
    losses = {"entropy": entropy, "regret": divergence(truth, reader), "error": expit(np.where(reader > 0, -truth, truth))}
    orders = {
        "nothing (chance)": tie,
        "own uncertainty": -np.abs(reader),
        "severity": hit + tie * 0.5,
        "regret itself": losses["regret"],
    }
    kept = {how: np.argsort(order)[: round(COVERAGE * len(hit))] for how, order in orders.items()}
    return {how: {kind: loss[rows] for kind, loss in losses.items()} for how, rows in kept.items()}


def _half(population: Population, name: str, seed: int) -> Bools:
    count = int(population.present[:, MODALITIES.index(name)].sum())
    return np.asarray(np.random.default_rng((seed, 17)).random(count) < 0.5)


def of_mean(values: Floats) -> tuple[float, float, float]:
    """Mean with its 95 % interval, by the normal approximation: n is in the thousands."""
    half = 1.96 * float(values.std()) / np.sqrt(len(values))
    return float(values.mean()), float(values.mean()) - half, float(values.mean()) + half


def auroc(logit: Floats, y: NDArray[np.int64]) -> float:
    """Chance that who died outranks who survived, by the sum of ranks."""
    died = int(y.sum())
    return float((rankdata(logit)[y == 1].sum() - died * (died + 1) / 2) / (died * (len(y) - died)))


def of_auroc(first: Floats, second: Floats, y: NDArray[np.int64]) -> tuple[float, float, float]:
    """AUROC of the first less that of the second, with a 95 % interval from how it varies over disjoint parts of the studies."""
    parts = np.array_split(np.arange(len(y)), NUM_PARTS)
    each = [auroc(first[rows], y[rows]) - auroc(second[rows], y[rows]) for rows in parts]
    value, half = auroc(first, y) - auroc(second, y), 1.96 * float(np.std(each, ddof=1)) / NUM_PARTS**0.5
    return value, value - half, value + half


Row = Mapping[str, tuple[float, float, float] | float | str]


def noise_rows(population: Population) -> list[Row]:
    """A row for every modality and noise, and for its swap."""
    found: list[Row] = []
    for name in NOISY:
        for sigma in (*SIGMAS, None):
            readers = under_swap(population, name) if sigma is None else under_noise(population, name, sigma)
            trusting, rejecting = (divergence(readers.weighted, one) for one in (readers.trusting, readers.rejecting))
            found.append(
                {
                    "modality": name,
                    "sigma": "swap" if sigma is None else f"{sigma:g}",
                    "n": float(len(readers.y)),
                    "lost": of_mean(divergence(readers.clean, readers.weighted)),
                    "regret trusting": of_mean(trusting),
                    "regret rejecting": of_mean(rejecting),
                    "rejecting - trusting": of_mean(rejecting - trusting),
                    "AUROC rejecting - trusting": of_auroc(readers.rejecting, readers.trusting, readers.y),
                    "AUROC weighted - trusting": of_auroc(readers.weighted, readers.trusting, readers.y),
                    "best weight": best_weight(readers),
                }
            )
    return found


def bits_rows(population: Population) -> list[Row]:
    """A row for every rate of what goes missing not at random."""
    found: list[Row] = []
    for rate in RATES:
        one = missing_not_at_random(population, rate)
        found.append(
            {
                "rate": f"{rate:g}",
                "n": float(len(one.y)),
                "AUROC without bits": auroc(one.without_bits, one.y),
                "AUROC gained by bits": of_auroc(one.with_bits, one.without_bits, one.y),
                "regret without bits": of_mean(divergence(one.with_bits, one.without_bits)),
            }
        )
    return found


def abstention_rows(population: Population) -> list[Row]:
    """A row for every order."""
    found: list[Row] = []
    for sigma in (0.8, 3.2, 10.0):
        for how, losses in abstaining(population, "cxr", sigma).items():
            row: dict[str, tuple[float, float, float] | float | str] = {"sigma": f"{sigma:g}", "left out by": how}
            found.append(row | {kind: of_mean(values) for kind, values in losses.items()})
    return found


def table(rows: list[Row]) -> str:
    """As markdown."""
    lines = [f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(show, row.values()))} |" for row in rows)])


def show(value: tuple[float, float, float] | float | str) -> str:
    """A number, with its interval where it has one."""
    match value:
        case (mean, low, high):
            return f"{mean:.4f} [{low:.4f}, {high:.4f}]"
        case float():
            return f"{value:.0f}" if value > 10 else f"{value:.3f}"
    return str(value)


def main() -> None:
    """Prints the three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    population = draw_population(4, given.subjects, given.seed)
    tables = {"noise": noise_rows(population), "bits": bits_rows(population), "abstention": abstention_rows(population)}
    for title, rows in tables.items():
        print(f"\n{title}\n\n{table(rows)}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()

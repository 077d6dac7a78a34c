"""What each modality knows about the label, and its exact log-likelihood ratio.

Given the label y, the modalities are independent. A modality carries a vector e that is Gaussian with the same covariance for both
labels and means 0 (survived) and `shift` (died); history carries diagnosis codes as well, independent Bernoulli given y. Corruption
of severity v in (0, 1] adds N(0, (EXTRA_SD v)^2) to every component of e and flips every code with probability FLIP v. So, with the
components that are observed alone (a marginal of a Gaussian is Gaussian):

    C = S + (EXTRA_SD v)^2 I        llr = shift' C^-1 (e - shift / 2)        q_y = p_y (1 - FLIP v) + (1 - p_y) FLIP v
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_expit, ndtr

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

PREVALENCE = 0.3
EXTRA_SD = 3.0
FLIP = 0.4
# Severities of the synthetic corruption: grid index / last index.
NUM_LEVELS = 5

# Rendered quantities must stay plausible however far out in its tail e lies: they are affine in BOUND tanh(e / BOUND).
BOUND = 6.0


@dataclass(frozen=True)
class GaussianEvidence:
    """e | y ~ N(y shift, covariance), both in units of the standard deviation within a class."""

    names: tuple[str, ...]
    shift: tuple[float, ...]
    correlation: tuple[tuple[int, int, float], ...] = ()

    @property
    def covariance(self) -> Floats:
        """(k, k), unit diagonal."""
        matrix = np.eye(len(self.names))
        for i, j, value in self.correlation:
            matrix[i, j] = matrix[j, i] = value
        return matrix

    def sample(self, y: NDArray[np.int64], normal: Floats) -> Floats:
        """Evidence without corruption, (n, k), from standard normal numbers of the same shape."""
        return np.asarray(y[:, None] * np.asarray(self.shift) + normal @ np.linalg.cholesky(self.covariance).T)

    def llr(self, evidence: Floats, observed: Bools, severity: Floats) -> Floats:
        """The ratio log p(e | died) - log p(e | survived) of the observed components; (n,), 0 where none is observed."""
        both = observed[:, :, None] & observed[:, None, :]
        identity = np.eye(len(self.names))
        # A component that is not observed gets unit variance, no correlation and no shift: it drops out.
        covariance = np.where(both, self.covariance + (EXTRA_SD * severity[:, None, None]) ** 2 * identity, identity)
        shift = np.where(observed, np.asarray(self.shift), 0.0)
        centred = np.where(observed, evidence - np.asarray(self.shift) / 2, 0.0)
        weights = np.linalg.solve(covariance, shift[:, :, None])[:, :, 0]
        return np.asarray((weights * centred).sum(axis=1))

    def separation(self, severity: float = 0.0) -> float:
        """Separation d' = sqrt(shift' C^-1 shift), everything observed: the llr is N(+-d'^2 / 2, d'^2)."""
        covariance = self.covariance + (EXTRA_SD * severity) ** 2 * np.eye(len(self.names))
        shift = np.asarray(self.shift)
        return float(np.sqrt(shift @ np.linalg.solve(covariance, shift)))


@dataclass(frozen=True)
class CodeEvidence:
    """Diagnosis codes, independent Bernoulli given y: p0 for survived, p1 for died. p0 = p1 carries nothing."""

    names: tuple[str, ...]
    p0: tuple[float, ...]
    p1: tuple[float, ...]

    def sample(self, y: NDArray[np.int64], severity: Floats, uniform: Floats) -> Bools:
        """Codes as recorded, flips included, (n, k)."""
        return np.asarray(uniform < np.where(y[:, None] == 1, self.recorded(self.p1, severity), self.recorded(self.p0, severity)))

    def llr(self, codes: Bools, severity: Floats) -> Floats:
        """The ratio log p(codes | died) - log p(codes | survived), (n,)."""
        q0, q1 = self.recorded(self.p0, severity), self.recorded(self.p1, severity)
        return np.asarray(np.where(codes, np.log(q1 / q0), np.log((1 - q1) / (1 - q0))).sum(axis=1))

    @staticmethod
    def recorded(p: tuple[float, ...], severity: Floats) -> Floats:
        """Probability that a code is recorded, (n, k), when each is flipped with probability FLIP severity."""
        flip = FLIP * severity[:, None]
        return np.asarray(np.asarray(p) * (1 - flip) + (1 - np.asarray(p)) * flip)


# cxr: contrast of three opacities. vitals: levels, and the slope of the pressure. labs: logarithms but for haemoglobin.
EVIDENCE: dict[str, GaussianEvidence] = {
    "cxr": GaussianEvidence(("left_base", "right_base", "right_upper"), (0.92, 0.92, 0.92)),
    "vitals": GaussianEvidence(("heart_rate", "resp_rate", "temperature", "map_slope"), (0.65, 0.6, 0.35, -0.55)),
    "labs": GaussianEvidence(("creatinine", "urea", "lactate", "haemoglobin"), (0.5, 0.7, 0.8, -0.45), ((0, 1, 0.5),)),
    "history": GaussianEvidence(("age",), (0.4,)),
}
MODALITIES: tuple[str, ...] = tuple(EVIDENCE)
CODES = CodeEvidence(
    names=(
        "heart_failure",
        "copd",
        "kidney_disease",
        "diabetes",
        "hypertension",
        "cancer",
        "atrial_fibrillation",
        "stroke",
        "cirrhosis",
        "dementia",
    ),
    p0=(0.15, 0.14, 0.12, 0.25, 0.45, 0.08, 0.15, 0.08, 0.04, 0.06),
    p1=(0.22, 0.18, 0.18, 0.25, 0.45, 0.15, 0.19, 0.10, 0.08, 0.10),
)


def squash(evidence: Floats) -> Floats:
    """Evidence as it is rendered: strictly increasing, slope 1 at 0, within +-BOUND."""
    return np.asarray(BOUND * np.tanh(evidence / BOUND))


def prior_logit() -> float:
    """Log odds of the label before anything is seen."""
    return float(np.log(PREVALENCE / (1 - PREVALENCE)))


def binary_entropy(p: Floats) -> Floats:
    """Nats."""
    return np.asarray(-(p * np.log(p) + (1 - p) * np.log1p(-p)))


@cache
def strength(modality: str) -> dict[str, float]:
    """How much of the label a modality carries alone, clean and complete: d' of its Gaussian part, AUROC, nats.

    Exact up to quadrature: given y and the codes the llr is normal, so the AUROC is a finite sum of normal probabilities and the
    mutual information I(y; e) = H(y) - E[NLL of the posterior] a finite sum of Gauss-Hermite integrals.
    """
    separation = EVIDENCE[modality].separation()
    atoms, p0, p1 = _code_atoms() if modality == "history" else (np.zeros(1), np.ones(1), np.ones(1))
    gap = atoms[:, None] - atoms[None, :] + separation**2
    auroc = float((p1[:, None] * p0[None, :] * ndtr(gap / (np.sqrt(2.0) * separation))).sum())
    nodes, weights = np.polynomial.hermite_e.hermegauss(101)
    weights = weights / weights.sum()
    died = prior_logit() + atoms[:, None] + separation**2 / 2 + separation * nodes
    survived = prior_logit() + atoms[:, None] - separation**2 / 2 + separation * nodes
    nll = -PREVALENCE * p1 @ log_expit(died) @ weights - (1 - PREVALENCE) * p0 @ log_expit(-survived) @ weights
    nats = float(binary_entropy(np.asarray(PREVALENCE)) - nll)
    return {"separation": separation, "auroc": auroc, "nats": nats}


def posterior(logit: Floats) -> Floats:
    """p(died | ...) of a log odds."""
    return np.asarray(expit(logit))


def _code_atoms() -> tuple[Floats, Floats, Floats]:
    """Every combination of codes: llr (2^k,), its probability given survived, and given died."""
    k = len(CODES.names)
    codes = (np.arange(2**k)[:, None] >> np.arange(k)) & 1 == 1
    given = [np.where(codes, np.asarray(p), 1 - np.asarray(p)).prod(axis=1) for p in (CODES.p0, CODES.p1)]
    return CODES.llr(codes, np.zeros(2**k)), given[0], given[1]

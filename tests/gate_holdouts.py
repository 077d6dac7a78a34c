"""Predictions of a holdout made by hand: what a gate compares, without a model."""

import numpy as np
from numpy.typing import NDArray

from draf_dist.evaluation.predictions import Applied, Predictions

Floats = NDArray[np.float64]


def of_nll(nll: Floats, site: list[str] | NDArray[np.str_], *, first_uid: int = 0) -> Predictions:
    """Predictions with these NLLs (n,); labels alternate."""
    n = len(nll)
    target = np.arange(n, dtype=np.int64) % 2
    probability = np.empty((n, 2), dtype=np.float64)
    probability[np.arange(n), target] = np.exp(-nll)
    probability[np.arange(n), 1 - target] = 1 - np.exp(-nll)
    one, floats = np.ones((n, 1), dtype=bool), np.zeros((n, 1), dtype=np.float32)
    return Predictions(
        modalities=("labs",),
        classes=("survived", "died"),
        split="test",
        applied=Applied(),
        uid=np.arange(first_uid, first_uid + n, dtype=np.int64),
        site=np.asarray(site, dtype=np.str_),
        target=target,
        # Of double precision, so that a test knows the NLL exactly.
        probability=probability,  # type: ignore[arg-type]
        epistemic=floats[:, 0],
        aleatoric=floats[:, 0],
        total=floats[:, 0],
        present=one,
        corrupted=~one,
        severity=floats,
        reliability=floats + 1,
        corruption_probability=floats,
        unimodal=floats,
        uncertainty={},
    )


def own_subjects(predictions: Predictions) -> dict[int, int]:
    """A subject of its own for every study."""
    return {int(uid): int(uid) for uid in predictions.uid}


def pair(harm: Floats, site: list[str] | NDArray[np.str_], *, seed: int = 0) -> tuple[Predictions, Predictions]:
    """Champion and challenger whose NLLs differ by harm, (n,)."""
    before = np.random.default_rng(seed).uniform(2.0, 2.5, len(harm))
    return of_nll(before, site), of_nll(before + harm, site)

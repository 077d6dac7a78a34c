"""Predictions of labels and of times, made by hand: no model, no release."""

import numpy as np

from draf_dist.evaluation.answers import Answers, LabelAnswers, TimeAnswers
from draf_dist.evaluation.predictions import Applied, Predictions

MODALITIES = ("heart", "lungs")
LABELS = ("edema", "effusion", "mass")
EDGES = (4.0, 8.0, 16.0)


def of_labels(n: int = 200, *, seed: int = 0, sharpness: float = 1.0, applied: Applied | None = None) -> Predictions:
    """Probabilities that are the truth to the power of `sharpness` in odds; a fifth of the answers is unknown, one study's all."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(-0.5, 1.5, (n, len(LABELS)))
    label = generator.random(logits.shape) < _sigmoid(logits)
    observed = generator.random(logits.shape) < 0.8
    observed[0] = False
    answers = LabelAnswers(label & observed, observed)
    target = np.where(observed.any(1), answers.label.sum(1), -1)
    return _predictions(LABELS, target, _sigmoid(sharpness * logits), answers, applied)


def of_times(n: int = 200, *, seed: int = 0, sharpness: float = 1.0, applied: Applied | None = None) -> Predictions:
    """Times drawn from known hazards; probabilities are those hazards, to the power of `sharpness` in odds; one is not known.

    Whoever leaves does so at the end of an interval, so that the likelihood of a censored time is exactly that of outliving it.
    """
    generator = np.random.default_rng(seed)
    hazard = 1 - np.exp(-0.25 * np.exp(generator.normal(0, 1, (n, 1))) * np.ones(4))
    dies = generator.random((n, 4)) < hazard
    death = np.where(dies.any(1), dies.argmax(1), 4)
    leaves = np.minimum(generator.geometric(0.2, n) - 1, 3)
    event = death <= leaves
    target = np.minimum(death, leaves)
    ends = np.array([0.0, *EDGES, 40.0])
    share = np.where(event, generator.uniform(0.01, 0.99, n), 0.999)
    time = ends[target] + share * np.diff(ends)[target]
    hazard = _sigmoid(sharpness * np.log(hazard / (1 - hazard)))
    target[0] = -1
    answers = TimeAnswers(time.astype(np.float32), event, EDGES, "months")
    return _predictions(("first", "second", "third", "fourth"), target, hazard, answers, applied)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def _predictions(
    classes: tuple[str, ...], target: np.ndarray, probability: np.ndarray, answers: Answers, applied: Applied | None
) -> Predictions:
    n = len(target)
    present = np.ones((n, 2), dtype=np.bool_)
    present[n // 2 :, 1] = False
    absent = np.where(present, 0.0, np.nan)
    spread = (probability * (1 - probability)).mean(1)
    return Predictions(
        modalities=MODALITIES,
        classes=classes,
        split="test",
        applied=applied or Applied(),
        uid=np.arange(n, dtype=np.int64),
        site=np.where(np.arange(n) % 2 == 0, "north", "south").astype(np.str_),
        target=target.astype(np.int64),
        probability=probability.astype(np.float32),
        epistemic=(0.1 * spread).astype(np.float32),
        aleatoric=(0.9 * spread).astype(np.float32),
        total=spread.astype(np.float32),
        present=present,
        corrupted=np.full((n, 2), applied is not None),
        severity=np.full((n, 2), 0.0 if applied is None else 0.5, dtype=np.float32),
        reliability=(present / present.sum(1, keepdims=True)).astype(np.float32),
        corruption_probability=(absent + 0.4).astype(np.float32),
        unimodal=(absent + probability.mean(1)[:, None]).astype(np.float32),
        uncertainty={"epistemic": (absent + spread[:, None]).astype(np.float32)},
        answers=answers,
    )

"""What validation says of the predictions of one split, by the kind of target."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from draf_dist.metrics import multilabel
from draf_dist.metrics.classification import accuracy, auroc
from draf_dist.metrics.survival import concordance_index, risk, survival_negative_log_likelihood
from draf_dist.metrics.temperature import fit_temperature
from draf_dist.schema.batch import Batch, ClassTarget, MultiLabelTarget, SegmentationTarget, SurvivalTarget
from draf_dist.training.mask_scores import Arrays, Columns, of_masks


def log_prediction(logits: Tensor) -> Tensor:
    """Log of the mean over passes of the probabilities: logits (S, B, K) to (B, K)."""
    return torch.logsumexp(logits.log_softmax(-1), 0) - math.log(logits.shape[0])


def columns_of(logits: Tensor, batch: Batch) -> Columns:
    """The columns of logits (S, B, K), f64; probabilities are the mean over passes.

    Of a class: log probability (n, K), label (n,). Of labels: probability, label, observed (n, K). Of times: hazard (n, K), and
    time, event, interval (n,).
    """
    match batch.target:
        case ClassTarget(label, observed):
            columns: Columns = (log_prediction(logits), label)
        case MultiLabelTarget(label, observed):
            columns = (logits.double().sigmoid().mean(0), label, observed)
            observed = observed.any(1)
        case SurvivalTarget(time, event, interval, observed):
            columns = (logits.double().sigmoid().mean(0), time, event, interval)
        case _:
            raise TypeError(f"{type(batch.target).__name__} is validated pass by pass, see mask_scores.py")
    known = observed & (batch.weight > 0)
    # One dtype: integers and flags are exact in it, and one gather serves all.
    return tuple(column[known].double() for column in columns)


def scores(target: type, columns: Arrays) -> dict[str, float]:
    """The numbers of a validation, NLL first, in nats a study; target: the type of Batch.target. Undefined ones are NaN."""
    if target is ClassTarget:
        return _of_classes(columns[0], columns[1].astype(np.int64))
    if target is MultiLabelTarget:
        return _of_labels(columns[0], columns[1] > 0, columns[2] > 0)
    if target is SegmentationTarget:
        return of_masks(columns)
    hazard, time, event, interval = columns
    nll = survival_negative_log_likelihood(hazard, interval.astype(np.int64), event > 0)
    return {"nll": nll, "c_index": concordance_index(time, event > 0, risk(hazard))}


def _of_classes(log_probability: NDArray[np.float64], label: NDArray[np.int64]) -> dict[str, float]:
    """temperature: the one that these predictions ask for; nll_scaled: the NLL with it."""
    nll = -float(log_probability[np.arange(len(label)), label].mean())
    if not math.isfinite(nll):
        return {"nll": nll}
    probability = np.exp(log_probability)
    fitted = fit_temperature(probability, label)
    assert fitted.nll_scaled is not None
    numbers = {"nll": nll, "temperature": fitted.value, "nll_scaled": fitted.nll_scaled}
    return numbers | {"auroc": auroc(probability, label), "accuracy": accuracy(probability, label)}


def _of_labels(probability: NDArray[np.float64], label: NDArray[np.bool_], observed: NDArray[np.bool_]) -> dict[str, float]:
    """The NLL as the loss has it, a mean over each study's known labels; AUROC and AUPRC are means over labels."""
    right = np.where(label, probability, 1 - probability).clip(1e-12)
    nll = -(np.where(observed, np.log(right), 0.0).sum(1) / observed.sum(1)).mean()
    auprc = multilabel.auprc(probability, label, observed).mean
    return {"nll": float(nll), "auroc": multilabel.auroc(probability, label, observed).mean, "auprc": auprc}

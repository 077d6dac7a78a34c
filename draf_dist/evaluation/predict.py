"""From batches to predictions: T Monte-Carlo passes keyed by (seed, pass, uid), every study exactly once."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from draf_dist import noise
from draf_dist.data.receipts import receipt
from draf_dist.errors import DataError, explain
from draf_dist.evaluation.answers import Answers, answers_of, risk_of, targets_of
from draf_dist.evaluation.predictions import Applied, Predictions, concatenate
from draf_dist.models.link import Link, link_of
from draf_dist.models.segmentation import BayesianUnet
from draf_dist.models.variational import weight_keys
from draf_dist.schema.batch import Batch, FusionOutput
from draf_dist.schema.modality import DataSchema
from draf_dist.schema.release import Receipt

# That of the validation during training: with the same seed and passes, the same numbers come out.
STREAM = "mc"


@dataclass(frozen=True)
class Predictor:
    """A model with what its predictions depend on: the number of passes and the evaluation's own seed.

    The noise of a study is a function of (seed, pass, uid) alone, so its prediction doesn't depend on its batch, and all
    corruptions of one study meet the same dropout masks: differences between them are due to the corruption.
    """

    model: nn.Module
    schema: DataSchema
    passes: int
    seed: int

    def predict(self, batches: Iterable[Batch], *, split: str, applied: Applied | None = None) -> Predictions:
        """Predictions of normalised batches, one batch in memory at a time.

        Raises:
            DataError: there is no study in the batches.
        """
        found = self.predict_any(batches, split, applied or Applied())
        if found is None:
            raise DataError(
                explain(f"split {split}", expected="at least one study", found="none", remedy="Evaluate another split.")
            )
        return found

    @torch.no_grad()
    def predict_any(self, batches: Iterable[Batch], split: str, applied: Applied) -> Predictions | None:
        """The same; None where there is no study in the batches."""
        self.model.eval()
        parts = [self._predict_batch(batch, split, applied) for batch in batches]
        return concatenate(parts) if parts else None

    def _predict_batch(self, batch: Batch, split: str, applied: Applied) -> Predictions:
        keys = noise.sample_keys(self.seed, STREAM, None, batch.uid, self.passes)
        output, readable = self._passes(batch, keys)
        link, answers = link_of(self.schema.label), answers_of(batch, self.schema.label)
        # In double precision the parts add up to the total, and the mean does not depend on how it is summed.
        logits = output.logits.double()
        parts = link.uncertainties(logits)
        absent = ~batch.present
        return Predictions(
            modalities=batch.modalities,
            classes=self.schema.label.outputs,
            split=split,
            applied=applied,
            uid=_int64(batch.uid),
            site=np.array(self.schema.sites, dtype=np.str_)[_int64(batch.site)],
            target=np.where(readable, targets_of(batch), -1),
            probability=_floats(link.probability(logits).mean(0)),
            epistemic=_floats(parts["epistemic"]),
            aleatoric=_floats(parts["aleatoric"]),
            total=_floats(parts["total"]),
            present=batch.present.cpu().numpy(),
            corrupted=batch.corrupted.cpu().numpy(),
            severity=_floats(batch.severity),
            reliability=_floats(output.reliability),
            corruption_probability=_corruption_probability(output, absent),
            unimodal=_unimodal(output, absent, link, answers),
            uncertainty={kind: _floats(value.masked_fill(absent, torch.nan)) for kind, value in output.uncertainty.items()},
            answers=answers,
        )

    def _passes(self, batch: Batch, keys: Tensor) -> tuple[FusionOutput, NDArray[np.bool_]]:
        """What the model says, and of which studies, (B,): one that reads a single modality says nothing of those without it.

        Sampled weights are drawn once a pass, as in validation, so that a study's prediction doesn't depend on its batch either.
        """
        if not isinstance(self.model, BayesianUnet):
            return self.model(batch, keys), np.ones(batch.num_rows, dtype=np.bool_)
        output = self.model(batch, keys, weight_keys(self.seed, None, self.passes, keys.device))
        return output, batch.present[:, self.model.axis].cpu().numpy()


def check_coverage(predictions: Predictions, expected: Receipt, num_lost: int = 0) -> None:
    """Every study of the split was predicted, none twice (rule D7). num_lost: studies that were left out as unusable.

    Raises:
        DataError: the studies predicted are not those of the release.
    """
    found = receipt(predictions.uid)
    covered = found == expected if num_lost == 0 else found.count + num_lost == expected.count
    if not covered or len(np.unique(predictions.uid)) != len(predictions.uid):
        raise DataError(
            explain(
                f"split {predictions.split}",
                expected=f"the {expected.count} studies of the release, each once (uid sum {expected.uid_sum})",
                found=f"{found.count} (uid sum {found.uid_sum})" + (f", and {num_lost} left out" if num_lost else ""),
                remedy="Run `draf release verify` on it.",
            )
        )


def _corruption_probability(output: FusionOutput, absent: Tensor) -> NDArray[np.float32]:
    if output.corruption_logits is None:
        return np.full(tuple(absent.shape), np.nan, dtype=np.float32)
    return _floats(output.corruption_logits.sigmoid().masked_fill(absent, torch.nan))


def _unimodal(output: FusionOutput, absent: Tensor, link: Link, answers: Answers | None) -> NDArray[np.float32]:
    logits = output.modality_logits
    if logits is None:
        return np.full(tuple(absent.shape), np.nan, dtype=np.float32)
    probability = link.probability(logits).mean(0).cpu().numpy()
    alone = [risk_of(probability[:, m], answers) for m in range(probability.shape[1])]
    return np.where(absent.cpu().numpy(), np.nan, np.stack(alone, axis=1)).astype(np.float32)


def _floats(value: Tensor) -> NDArray[np.float32]:
    return value.detach().float().cpu().numpy()


def _int64(value: Tensor) -> NDArray[np.int64]:
    return value.cpu().numpy().astype(np.int64)

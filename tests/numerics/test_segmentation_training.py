"""A tiny Bayesian U-Net learns discs, knows where it errs, and looks where experts point (spec 3.4, 3.6)."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from bayesian_inputs import MASK, disc_batch, model_keys, schema_of
from sklearn.metrics import roc_auc_score
from torch import Tensor

from draf_dist.models.link import link_of
from draf_dist.models.segmentation import BayesianUnet, BayesianUnetConfig
from draf_dist.models.streamed import streamed
from draf_dist.models.variational import weight_keys
from draf_dist.objectives.bayesian import BayesianObjectiveConfig
from draf_dist.schema.batch import Batch

SCHEMA = schema_of(MASK, 2, 24, annotated=True)
ROWS = 16


def trained(num_steps: int, *, noise_sd: float, **options: Any) -> tuple[BayesianUnet, list[float]]:
    """A model and the cross-entropies of its steps."""
    torch.manual_seed(0)
    model = BayesianUnetConfig(widths=(8, 16), groups=4).build(SCHEMA)
    data = disc_batch(SCHEMA, 8 * ROWS, seed=1, noise_sd=noise_sd, gaps=False)
    objective = BayesianObjectiveConfig(**options).build(modality="scan", num_train=8 * ROWS, num_steps=num_steps, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    history = []
    for step in range(num_steps):
        first = step % 8 * ROWS
        batch = data.rows(first, first + ROWS)
        batch = replace(batch, epoch=torch.full_like(batch.epoch, step // 8))
        terms = objective.at(step)(model, batch, model_keys(batch))
        history.append((terms["cross_entropy"].numerator / ROWS).item())
        optimizer.zero_grad()
        torch.stack([term.scale * term.numerator / term.weight for term in terms.values()]).sum().backward()
        optimizer.step()
    return model, history


def unseen(rows: int, noise_sd: float) -> Batch:
    return disc_batch(SCHEMA, rows, seed=2, noise_sd=noise_sd, gaps=False)


def dice_of(predicted: Tensor, mask: Tensor) -> float:
    overlap = (predicted * mask).flatten(1).sum(1)
    return (2 * overlap / (predicted + mask).flatten(1).sum(1)).mean().item()


@pytest.fixture(scope="module")
def plain() -> tuple[BayesianUnet, list[float]]:
    torch.set_num_threads(1)
    return trained(40, noise_sd=1.0, lambda_att=0.0)


@pytest.mark.parametrize("way", ["local", "weights"])
def test_it_finds_discs_it_has_not_seen_and_its_uncertainty_finds_its_errors(
    way: str, plain: tuple[BayesianUnet, list[float]]
) -> None:
    model, history = plain
    batch = unseen(24, 1.0)
    keys = model_keys(batch, 20)
    with torch.no_grad():
        found = streamed(model.passes(batch, keys, weight_keys(0, None, 20) if way == "weights" else None), link_of(MASK))
    mask: Tensor = batch.target.mask
    predicted = found.probability.argmax(1)
    wrong = (predicted != mask).flatten()
    assert history[-1] < 0.4 * history[0]
    assert dice_of(predicted, mask) > 0.75
    scores = {name: roc_auc_score(wrong, value.flatten()) for name, value in found.uncertainties().items()}
    assert min(scores["epistemic"], scores["mi"], scores["total"]) > 0.7, scores


def test_experts_maps_draw_attention_to_the_disc(plain: tuple[BayesianUnet, list[float]]) -> None:
    drawn, _ = trained(40, noise_sd=1.0, lambda_att=0.0, lambda_clinical=5.0, clinical_map="expert")
    batch = unseen(24, 1.0)

    def share_on_disc(model: BayesianUnet) -> float:
        with torch.no_grad():
            attention = model.encode(batch).attention.composite
        return (attention * batch.target.mask).flatten(1).sum(1).mean().item()

    even = batch.target.mask.float().mean().item()
    assert share_on_disc(drawn) > max(2 * even, 1.5 * share_on_disc(plain[0]))

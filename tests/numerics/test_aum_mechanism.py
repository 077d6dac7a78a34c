"""AUM on planted truth: does a variance learn what noise is, and from which term?"""

from dataclasses import replace

import pytest
import torch
from model_inputs import pass_keys, variables
from scipy.stats import spearmanr
from torch import Tensor

from draf_dist.models.build import build_model
from draf_dist.models.encoders import EncoderChoice
from draf_dist.models.encoders.tabular import TabularConfig
from draf_dist.models.fusion.aum import Aum, AumConfig
from draf_dist.objectives.aum import AumObjectiveConfig
from draf_dist.schema.batch import Batch, ClassTarget, SeriesInput
from draf_dist.schema.label import LabelSpec
from draf_dist.schema.modality import DataSchema, TableSpec

NOISE = torch.tensor([0.3, 4.0])
READINGS = 6


def planted(rows: int, seed: int) -> tuple[Batch, Tensor]:
    """Two tables of six readings of one sign, each with a noise of its own; the noise (rows, 2) comes along."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 2, (rows,), generator=generator)
    level = torch.randint(0, 2, (rows, 2), generator=generator)
    sigma = NOISE[level]
    values = (2.0 * label - 1).view(-1, 1, 1) + sigma.unsqueeze(2) * torch.randn(rows, 2, READINGS, generator=generator)
    both = torch.ones(rows, 2, dtype=torch.bool)
    observed = torch.ones(rows, 1, READINGS, dtype=torch.bool)
    one = torch.ones(rows, dtype=torch.int64)
    inputs = {name: SeriesInput(values[:, m, None], observed, one) for m, name in enumerate(PLANTED.names)}
    zeros = torch.zeros(rows, 2)
    target = ClassTarget(label, one.bool())
    uid = torch.arange(rows) + 10_000 * seed
    batch = Batch(PLANTED.names, inputs, both, zeros.bool(), zeros, zeros, zeros.bool(), target, 0 * one, uid, 0 * one, one.float())
    return batch, sigma


PLANTED = DataSchema(
    modalities=tuple(TableSpec(name=name, variables=variables(READINGS)) for name in ("first", "second")),
    label=LabelSpec(name="sign", classes=("minus", "plus")),
    sites=("north",),
)


def train_planted(attention: str, *left_out: str, steps: int = 300) -> Aum:
    config = AumConfig.model_validate(
        {"width": 16, "encoders": EncoderChoice(table=TabularConfig(hidden=32)), "attention": attention, "warm_epochs": 2}
    )
    model = build_model(config, PLANTED, seed=1)
    assert isinstance(model, Aum)
    objective = AumObjectiveConfig().build(PLANTED)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for step in range(steps):
        batch, _ = planted(64, seed=step + 1)
        batch = replace(batch, epoch=torch.full((64,), step // 50))
        optimizer.zero_grad()
        terms = objective(model, batch, pass_keys(batch, 2, seed=step))
        sum(term.scale * term.numerator / term.weight for name, term in terms.items() if name not in left_out).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def noise_seen(model: Aum) -> tuple[float, list[float]]:
    """Spearman's correlation of variances with the noise of their modality, and the mean weight at either noise."""
    batch, sigma = planted(1000, seed=99_999)
    output = model(batch, pass_keys(batch, 4))
    right = (output.logits.softmax(-1).mean(0).argmax(-1) == batch.classes.label).float().mean()
    rank = float(spearmanr(output.uncertainty["variance"].flatten(), sigma.flatten()).statistic)
    weight = [float(output.reliability[sigma == level].mean()) for level in NOISE]
    print(f"Spearman of variance with noise {rank:.2f}, mean weight {weight}, accuracy {right:.3f}")
    return rank, weight


@pytest.mark.parametrize(
    ("attention", "left_out"), [("softmax_inv", ("contrastive", "supervised")), ("precision", ("contrastive",))]
)
def test_variances_that_learn_from_labels_rise_with_noise_and_attention_leaves_it(
    attention: str, left_out: tuple[str, ...]
) -> None:
    rank, weight = noise_seen(train_planted(attention, *left_out))
    assert rank > 0.5
    assert weight[0] > weight[1] + 0.05


def test_telling_patients_apart_works_against_that() -> None:
    """What tells a patient from all others is noise above all: with the unsupervised term the mechanism does not show here."""
    rank, weight = noise_seen(train_planted("precision"))
    assert rank < 0.3
    assert weight[0] < weight[1] + 0.05

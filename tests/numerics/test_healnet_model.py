"""HEALNet on a batch: modalities as tokens, and a trained model that goes on with what is there (spec 4.5)."""

from dataclasses import replace

import pytest
import torch
from model_inputs import pass_keys, small_batch, small_schema, variables
from sklearn.metrics import roc_auc_score
from torch import Tensor

from draf_dist.models.build import build_model
from draf_dist.models.fusion.healnet import HealnetConfig
from draf_dist.models.latent_attention import FourierCode
from draf_dist.models.raw_tokens import GridTokens, RowTokens, smallest_patch, tokens_of
from draf_dist.objectives.fusion import FusionObjectiveConfig
from draf_dist.schema.batch import Batch, ClassTarget, SeriesInput
from draf_dist.schema.label import LabelSpec
from draf_dist.schema.modality import DataSchema, ImageSpec, ModalitySpec, SeriesSpec, TableSpec, VolumeSpec

CODE = FourierCode(bands=2, max_freq=10.0)


def tokens_for(spec: ModalitySpec, max_tokens: int = 1728) -> GridTokens | RowTokens:
    return tokens_of(spec, max_tokens=max_tokens, patch_width=7, code=CODE)


@pytest.mark.parametrize(
    ("spec", "width", "number"),
    [
        (ImageSpec(name="x", channels=3, height=9, width=12), 3 + 2 * 5, 108),
        (ImageSpec(name="x", channels=3, height=64, width=64), 7 + 2 * 5, 32 * 32),
        (VolumeSpec(name="x", spacing_mm=(1, 1, 1), shape=(96, 96, 96), chunk=(8, 8, 8)), 7 + 3 * 5, 12**3),
        (SeriesSpec(name="x", variables=variables(6), num_steps=24, step_h=1.0), 2 * 6 + 5, 24),
        (TableSpec(name="x", variables=variables(4)), 2 * 4 + 5, 1),
    ],
)
def test_widths_and_numbers_of_tokens(spec: ModalitySpec, width: int, number: int) -> None:
    found = tokens_for(spec).spec
    assert (found.width, found.number) == (width, number)


def test_pixels_are_tokens_in_reading_order() -> None:
    image = torch.arange(2 * 3 * 8 * 9.0).view(2, 3, 8, 9)
    tokens = tokens_for(ImageSpec(name="x", channels=3, height=8, width=9))(image)
    assert tokens.attended is None
    assert torch.equal(tokens.values[1, 9 * 5 + 4, :3], image[1, :, 5, 4])
    # Of the last code of either axis, x itself.
    assert tokens.values[1, 9 * 5 + 4, [7, 12]].tolist() == pytest.approx([-1 + 2 * 5 / 7, 0], abs=1e-6)


def test_a_patch_sees_its_pixels_alone_and_none_is_lost() -> None:
    """10 x 9 in patches of 4: 3 x 3, the last ones continued with zeros."""
    reader = tokens_for(ImageSpec(name="x", channels=1, height=10, width=9), max_tokens=9)
    assert smallest_patch((10, 9), 9) == 4
    image = torch.randn(1, 1, 10, 9)
    before = reader(image).values
    assert before.shape == (1, 9, 7 + 2 * 5)
    image[0, 0, 9, 8] += 1
    changed = (reader(image).values != before).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [8]


def test_steps_past_the_length_are_not_attended_to() -> None:
    reader = tokens_for(SeriesSpec(name="x", variables=variables(2), num_steps=3, step_h=1.0))
    values = torch.randn(2, 3, 2)
    tokens = reader(SeriesInput(values, values > 0, torch.tensor([2, 0])))
    assert tokens.attended is not None
    assert tokens.attended.tolist() == [[True, True, False], [False, False, False]]
    assert torch.equal(tokens.values[..., :4], torch.cat([values, (values > 0).float()], dim=-1))


def test_a_part_of_the_passes_is_the_same_as_in_all() -> None:
    schema = small_schema()
    batch = small_batch(schema)
    model = build_model(HealnetConfig(depth=1, latents=2, width=8, heads=2, head_width=4), schema, seed=0)
    keys = pass_keys(batch, passes=20)
    with torch.no_grad():
        torch.testing.assert_close(model(batch, keys).logits[9:12], model(batch, keys[9:12]).logits)


SCHEMA = DataSchema(
    modalities=(
        SeriesSpec(name="vitals", variables=variables(2), num_steps=6, step_h=1.0),
        TableSpec(name="labs", variables=variables(3)),
    ),
    label=LabelSpec(name="death", classes=("no", "yes")),
    sites=("north",),
)


def planted(rows: int, seed: int) -> Batch:
    """A class that shows in one step of the series that is marked, and more clearly in the table."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 2, (rows,), generator=generator)
    sign = 2.0 * label - 1
    marked = torch.randint(0, 6, (rows,), generator=generator)
    series = torch.randn(rows, 6, 2, generator=generator)
    series[..., 1] = 0
    series[torch.arange(rows), marked, 1] = 3.0
    series[torch.arange(rows), marked, 0] += sign
    table = torch.randn(rows, 1, 3, generator=generator)
    table[:, 0, 0] += 1.2 * sign
    ones, flags = torch.ones(rows, 2), torch.zeros(rows, 2, dtype=torch.bool)
    return Batch(
        modalities=SCHEMA.names,
        inputs={
            "vitals": SeriesInput(series, torch.ones_like(series, dtype=torch.bool), torch.full((rows,), 6)),
            "labs": SeriesInput(table, torch.ones_like(table, dtype=torch.bool), torch.ones(rows, dtype=torch.int64)),
        },
        present=~flags,
        corrupted=flags,
        severity=0 * ones,
        quality=0 * ones,
        quality_known=flags,
        target=ClassTarget(label, torch.ones(rows, dtype=torch.bool)),
        site=torch.zeros(rows, dtype=torch.int64),
        uid=torch.arange(rows) + 10_000 * seed,
        epoch=torch.zeros(rows, dtype=torch.int64),
        weight=torch.ones(rows),
    )


def scores(model: torch.nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(batch, pass_keys(batch, passes=4)).logits.softmax(-1).mean(0)[:, 1]


def test_trained_on_all_it_skips_what_is_absent_and_goes_on_with_the_rest() -> None:
    """Each modality alone is still of use, the two together of more, and nothing of an absent one is left."""
    torch.set_num_threads(1)
    model = build_model(HealnetConfig(depth=2, latents=4, width=16, heads=2, head_width=8), SCHEMA, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    objective = FusionObjectiveConfig().build()
    for step in range(100):
        batch = planted(64, seed=step + 1)
        # Half of the studies lack one of the two.
        lacking = torch.arange(64)
        batch.present[lacking % 4 == 0, 0], batch.present[lacking % 4 == 1, 1] = False, False
        optimizer.zero_grad()
        term = objective(model, batch, pass_keys(batch, passes=1, seed=step))["task"]
        (term.numerator / term.weight).backward()
        optimizer.step()

    test = planted(1000, seed=0)
    found = {}
    for name, pattern in {"both": (True, True), "vitals": (True, False), "labs": (False, True)}.items():
        batch = replace(test, present=torch.tensor(pattern).expand(1000, -1))
        found[name] = float(roc_auc_score(test.classes.label, scores(model, batch)))
        other = planted(1000, seed=999)
        gone = {
            key: (value if here else other.inputs[key]) for (key, value), here in zip(test.inputs.items(), pattern, strict=True)
        }
        assert torch.equal(scores(model, batch), scores(model, replace(batch, inputs=gone)))
    assert found["both"] > max(found["vitals"], found["labs"]) + 0.02, found
    assert min(found["vitals"], found["labs"]) > 0.7, found

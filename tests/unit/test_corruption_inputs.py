"""What the training law leaves alone: modalities that are no inputs, such as experts' maps; and volumes that go missing."""

import pytest
import torch
from bayesian_inputs import MASK, SIDE_OF, disc_batch, schema_of
from torch import Tensor

from draf_dist.data.corruption import Corruptor, TrainingCorruption
from draf_dist.data.normalise import Normaliser
from draf_dist.schema.batch import Batch
from draf_dist.schema.modality import DataSchema
from draf_dist.schema.release import ImageStats, ReleaseStats, VariableStats

HARSH = TrainingCorruption(probability=1.0, modality_dropout=0.6)


def corruptor(schema: DataSchema, inputs: frozenset[str] | None) -> Corruptor:
    images = {name: ImageStats(mean=0, std=1, num_images=9) for name in schema.names if name != "labs"}
    stats = ReleaseStats(images=images, variables={"labs": (VariableStats(mean=0, std=1, num_observed=9),)})
    return Corruptor(HARSH, Normaliser(schema, stats), seed=0, inputs=inputs)


def changed(batch: Batch, before: Batch, name: str) -> Tensor:
    """Which rows hold another image, bool (B,)."""
    found, expected = batch.inputs[name], before.inputs[name]
    assert isinstance(found, Tensor)
    return (found != expected).flatten(1).any(1)


def test_annotations_are_neither_corrupted_nor_dropped_and_the_image_is_never_lost_for_them() -> None:
    schema = schema_of(SIDE_OF, annotated=True)
    batch = disc_batch(schema, 40, gaps=False)
    law = corruptor(schema, frozenset({"scan"}))
    found = law.train(batch)
    for name in ("expert", "body"):
        assert not changed(found, batch, name).any()
    assert torch.equal(found.present, batch.present)
    assert found.corrupted[:, 0].sum() > 20
    assert not found.corrupted[:, 1:].any()
    hook = law.decode_hook()
    assert hook is not None
    assert hook.levels(batch.uid, batch.epoch).keys() == {"scan"}


def test_without_it_they_would_be() -> None:
    schema = schema_of(SIDE_OF, annotated=True)
    batch = disc_batch(schema, 40, gaps=False)
    found = corruptor(schema, None).train(batch)
    assert changed(found, batch, "expert").any()
    assert not torch.equal(found.present, batch.present)


def test_one_of_several_inputs_is_kept_whatever_else_is_there() -> None:
    schema = schema_of(SIDE_OF, annotated=True)
    batch = disc_batch(schema, 40, gaps=False)
    found = corruptor(schema, frozenset({"scan", "labs"})).train(batch).present
    assert (found[:, 0] | found[:, 3]).all()
    assert not found[:, 0].all()
    assert not found[:, 3].all()


@pytest.mark.parametrize("dimensions", [2, 3])
def test_an_image_or_a_volume_that_goes_missing_holds_zeros_in_its_own_row_alone(dimensions: int) -> None:
    schema = schema_of(MASK, dimensions, 8)
    batch = disc_batch(schema, 12, gaps=False)
    found = corruptor(schema, None).train(batch)
    lost = ~found.present[:, 0]
    assert 0 < int(lost.sum()) < 12
    scan = found.inputs["scan"]
    assert isinstance(scan, Tensor)
    assert scan.shape == batch.inputs["scan"].shape
    assert (scan[lost] == 0).all()
    assert (scan[~lost].flatten(1) != 0).any(1).all()

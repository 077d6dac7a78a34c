"""The loader: the order of the plan, whoever reads it, corrupted where samples are read."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import same, tensors
from memory_source import MemorySource
from sharded import BATCH_SIZE, order_of, real_rows, sharded_release, uids

from draf_dist.data.corruption import (
    Corruptor,
    EhrNoise,
    GaussianNoise,
    Jpeg,
    Missing,
    MissingNotAtRandom,
    Swap,
    TrainingCorruption,
)
from draf_dist.data.corruption.sweep import CorruptedSplit, _next_of_another, swap_partners
from draf_dist.data.loader import Loader, Reading, SplitLoader, evaluation_batches
from draf_dist.data.mixture import Mixture
from draf_dist.data.normalise import Normaliser
from draf_dist.data.prepare import prepare
from draf_dist.data.receipts import receipt
from draf_dist.data.release import Release
from draf_dist.data.shard_reader import ShardReader
from draf_dist.errors import SpecError


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return sharded_release(tmp_path_factory.mktemp("release"))


# What a batch holds.


def test_an_epoch_is_every_sample_once_and_its_receipt_the_releases(release: Release) -> None:
    order = order_of(release)
    batches = [batch for _, batch in Loader(release, "train", order).batches(0, order.steps_per_epoch)]
    assert len(release.shards("train")) > 2
    assert receipt(np.array(uids(batches))) == release.manifest.receipts["train"]


def test_evaluation_reads_every_sample_once_in_stored_order_without_padding(release: Release) -> None:
    batches = list(evaluation_batches(release, "test", 7))
    stored = np.concatenate([release.index(shard).uids for shard in release.shards("test")])
    assert uids(batches) == stored.tolist()
    assert {batch.num_rows for batch in batches[:-1]} <= {7}
    assert all((batch.weight == 1).all() and (batch.epoch == 0).all() for batch in batches)


def test_a_batch_holds_what_the_source_gave(release: Release) -> None:
    schema = release.schema
    table = {row["uid"]: row for row in release.subjects().to_pylist()}
    for split in ("train", "ood"):
        for batch in evaluation_batches(release, split, 32):
            for row, uid in enumerate(batch.uid.tolist()):
                assert schema.sites[batch.site[row]] == table[uid]["site"]
                assert schema.classes[batch.target.label[row]] == table[uid]["label"]
            vitals, present = batch.inputs["vitals"], batch.present
            assert torch.equal(vitals.length, present[:, 1] * 4)
            assert torch.equal(vitals.observed.flatten(1).any(dim=1), present[:, 1])
            assert not vitals.values[~vitals.observed].any()
            assert batch.inputs["cxr"].dtype == torch.uint8
            assert torch.equal(batch.inputs["cxr"].flatten(1).any(dim=1), present[:, 0])
            known = batch.quality_known
            assert (batch.quality[known] == 0.5).all()
            assert not known[:, 1:].any()
            assert not batch.corrupted.any()


def test_the_normalised_training_split_has_mean_zero_and_deviation_one(release: Release) -> None:
    normaliser = Normaliser(release.schema, release.stats)
    batches = [normaliser(batch) for batch in evaluation_batches(release, "train", 50)]
    heart_rate = torch.cat([batch.inputs["vitals"].values[..., 0][batch.inputs["vitals"].observed[..., 0]] for batch in batches])
    pixels = torch.cat([batch.inputs["cxr"][batch.present[:, 0]].flatten() for batch in batches])
    for values in (heart_rate, pixels):
        assert float(values.mean()) == pytest.approx(0, abs=1e-3)
        assert float(values.std(correction=0)) == pytest.approx(1, abs=1e-3)


def test_the_last_batch_is_padded_as_the_design_says(release: Release) -> None:
    order = order_of(release, batch_size=64)
    loader = Loader(release, "train", order)
    *_, (_, last) = loader.batches(0, order.steps_per_epoch)
    num_real = order.num_samples % 64
    assert 0 < num_real < last.num_rows == loader.num_rows == 64
    padding = last.rows(num_real, 64)
    assert torch.equal(last.weight, (torch.arange(64) < num_real).float())
    assert (padding.uid == -1).all()
    assert torch.equal(padding.present, torch.tensor([True, False, False]).expand_as(padding.present))
    assert not any(tensor.any() for tensor in tensors(replace(padding, present=padding.corrupted, uid=padding.epoch)))


def test_images_reach_a_model_in_plain_strides(release: Release) -> None:
    """Whatever they lie like in the loader: on strides of its own oneDNN has ended the process in a backward pass."""
    normaliser = Normaliser(release.schema, release.stats)
    for _, batch in Loader(release, "train", order_of(release)).batches(0, 2):
        pixels = batch.inputs["cxr"]
        assert pixels.stride() == normaliser(batch).inputs["cxr"].stride() == torch.empty(pixels.shape).stride()
    colour = torch.zeros(2, 5, 4, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    shown = normaliser._image("cxr", colour, torch.tensor([True, False]))
    assert shown.stride() == torch.empty(shown.shape).stride()


# What must not matter.


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 0), (1, 3), (3, 1), (4, 9)])
def test_threads_and_prefetch_change_nothing(release: Release, threads: int, prefetch: int) -> None:
    order = order_of(release)
    expected = Loader(release, "train", order).batches(0, order.steps_per_epoch + 3)
    found = Loader(release, "train", order, threads=threads, reading=Reading(prefetch=prefetch)).batches(
        0, order.steps_per_epoch + 3
    )
    for (step, one), (same_step, other) in zip(expected, found, strict=True):
        assert step == same_step
        assert same(one, other)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_ranks_together_hold_the_global_batch(release: Release, world: int) -> None:
    order = order_of(release)
    whole = [batch for _, batch in Loader(release, "train", order).batches(0, order.steps_per_epoch)]
    loaders = [Loader(release, "train", order, rank=rank, world=world) for rank in range(world)]
    parts = [[batch for _, batch in loader.batches(0, order.steps_per_epoch)] for loader in loaders]
    rows = [loader.num_rows for loader in loaders]
    assert sum(rows) == BATCH_SIZE
    assert max(rows) - min(rows) <= 1
    for step, batch in enumerate(whole):
        mine = [ranked[step] for ranked in parts]
        assert [part.num_rows for part in mine] == rows
        assert uids(mine) == uids([batch])
        one, other = real_rows([batch]), real_rows(mine)
        assert all(torch.equal(a, b) for uid in one for a, b in zip(one[uid], other[uid], strict=True))


def test_a_run_goes_on_from_any_step_on_any_number_of_ranks(release: Release) -> None:
    order = order_of(release)
    whole = dict(Loader(release, "train", order).batches(0, 2 * order.steps_per_epoch))
    for start in (1, order.steps_per_epoch - 1, order.steps_per_epoch):
        for world in (1, 3):
            resumed = [Loader(release, "train", order, rank=rank, world=world).batches(start, start + 2) for rank in range(world)]
            for parts in zip(*resumed, strict=True):
                assert {step for step, _ in parts} <= {start, start + 1}
                assert uids([batch for _, batch in parts]) == uids([whole[parts[0][0]]])


def test_epochs_differ_and_are_named(release: Release) -> None:
    order = order_of(release)
    batches = [batch for _, batch in Loader(release, "train", order).batches(0, 2 * order.steps_per_epoch)]
    first, second = batches[: order.steps_per_epoch], batches[order.steps_per_epoch :]
    assert uids(first) != uids(second)
    assert sorted(uids(first)) == sorted(uids(second))
    assert all((batch.epoch[batch.weight > 0] == 1).all() for batch in second)


def test_a_mixture_draws_each_release_at_its_weight(release: Release, tmp_path: Path) -> None:
    small = prepare(MemorySource(num_studies=40, name="second"), str(tmp_path), subject_key=b"another key, as long as it must be")
    plan = Mixture(orders=(order_of(release), order_of(small)), weights=(3, 1), batch_size=BATCH_SIZE)
    mine = {
        one.version: set(np.concatenate([one.index(shard).uids for shard in one.shards("train")]).tolist())
        for one in (release, small)
    }
    drawn = uids([batch for _, batch in Loader([release, small], "train", plan).batches(0, 12)])
    assert len(drawn) == 12 * BATCH_SIZE
    assert sum(uid in mine[small.version] for uid in drawn) == 12 * BATCH_SIZE // 4
    assert set(drawn) <= mine[release.version] | mine[small.version]


def test_releases_of_different_schemas_do_not_mix(release: Release, tmp_path: Path) -> None:
    narrow = replace(release, schema=release.schema.model_copy(update={"modalities": release.schema.modalities[:2]}))
    with pytest.raises(SpecError, match="expected the schema of"):
        Loader([release, narrow], "train", order_of(release))


# Corruption where samples are read.


def test_jpeg_in_the_decode_thread_is_that_of_the_law(release: Release) -> None:
    order, normaliser = order_of(release), Normaliser(release.schema, release.stats)
    corruptor = Corruptor(TrainingCorruption(operations=(Jpeg(), GaussianNoise(), EhrNoise())), normaliser, seed=5)
    plain = real_rows([batch for _, batch in Loader(release, "train", order).batches(0, 5)])
    coded = [batch for _, batch in Loader(release, "train", order, threads=3, decode=corruptor.decode_hook()).batches(0, 5)]
    num_coded = 0
    for batch in coded:
        which, index = corruptor.config.choose(release.schema.modalities[0], seed=5, epoch=batch.epoch, uid=batch.uid)
        expected = torch.where((which == 0) & batch.present[:, 0] & (batch.weight > 0), index, 0)
        assert torch.equal(batch.corrupted[:, 0], expected > 0)
        assert torch.equal(batch.severity[:, 0], expected / 4)
        for row, uid in enumerate(batch.uid.tolist()):
            if uid == -1:
                continue
            image = plain[uid][0].numpy()
            assert np.array_equal(batch.inputs["cxr"][row].numpy(), Jpeg().encode(image, int(expected[row])))
        num_coded += int(batch.corrupted.sum())
    assert num_coded > 5


def test_a_swapped_modality_is_that_of_another_subject_and_nothing_else_changes(release: Release) -> None:
    normaliser = Normaliser(release.schema, release.stats)
    corruptor = Corruptor(TrainingCorruption(), normaliser, seed=0)
    clean = real_rows([normaliser(batch) for batch in evaluation_batches(release, "train", 20)])
    subject_of = {row["uid"]: row["subject"] for row in release.subjects().to_pylist()}
    swapped = list(CorruptedSplit(SplitLoader(release, "train", 16), corruptor, seed=2).batches(Swap(), 1, "cxr"))
    by_image = {image[0].numpy().tobytes(): uid for uid, image in clean.items()}
    for batch in swapped:
        assert torch.equal(batch.corrupted, batch.present & torch.tensor([True, False, False]))
        assert torch.equal(batch.severity, batch.corrupted.float())
        for row, uid in enumerate(batch.uid.tolist()):
            # All but the image (0) and the two flags of corruption (8, 9) are the sample's own.
            pairs = list(zip(tensors(batch), clean[uid], strict=True))
            assert all(torch.equal(one[row], other) for i, (one, other) in enumerate(pairs) if i not in (0, 8, 9))
            if batch.present[row, 0]:
                donor = by_image[batch.inputs["cxr"][row].numpy().tobytes()]
                assert subject_of[donor] != subject_of[uid]


def test_the_next_of_another_subject_is_found_across_several_studies_of_one() -> None:
    assert _next_of_another(["a", "a", "b", "a"]).tolist() == [2, 2, 3, 2]
    assert _next_of_another(["a", "a"]).tolist() == [0, 1]
    assert _next_of_another([]).tolist() == []


def test_partners_do_not_depend_on_the_batch_and_change_with_the_seed(release: Release) -> None:
    corruptor = Corruptor(TrainingCorruption(), Normaliser(release.schema, release.stats), seed=0)
    one, other = (
        real_rows(list(CorruptedSplit(SplitLoader(release, "train", size), corruptor, seed=2).batches(Swap(), 1)))
        for size in (7, 40)
    )
    assert all(torch.equal(a, b) for uid in one for a, b in zip(one[uid], other[uid], strict=True))
    partners = swap_partners(release, "train", "vitals", seed=2)
    assert not np.array_equal(partners, swap_partners(release, "train", "vitals", seed=3))
    has = ShardReader(release, "train").present(np.arange(len(partners)))[:, 1]
    assert np.array_equal(partners[~has], np.flatnonzero(~has))
    assert (partners[has] != np.flatnonzero(has)).all()


@pytest.mark.parametrize(
    "operation", [GaussianNoise(), Jpeg(), EhrNoise(), Missing(), Swap(), MissingNotAtRandom()], ids=lambda op: op.kind
)
def test_a_sweep_starts_clean_and_covers_the_split(release: Release, operation: object) -> None:
    corruptor = Corruptor(TrainingCorruption(), Normaliser(release.schema, release.stats), seed=0)
    clean = [corruptor.normaliser(batch) for batch in evaluation_batches(release, "train", 64)]
    split = CorruptedSplit(SplitLoader(release, "train", 64), corruptor)
    assert all(map(same, split.batches(operation, 0), clean))
    last = list(split.batches(operation, len(operation.grid) - 1))
    assert uids(last) == uids(clean)
    assert not all(map(same, last, clean))


def test_a_sweep_over_what_is_not_there_is_refused(release: Release) -> None:
    corruptor = Corruptor(TrainingCorruption(), Normaliser(release.schema, release.stats), seed=0)
    split = CorruptedSplit(SplitLoader(release, "train", 64), corruptor)
    with pytest.raises(SpecError, match="expected one of cxr, vitals, history, found 'ct'"):
        split.batches(GaussianNoise(), 1, "ct")
    with pytest.raises(SpecError, match="from 0 to 5, found 6"):
        split.batches(GaussianNoise(), 6)

"""The corruption protocol: closed forms of the operations, the training law, and what must not depend on the batch."""

import numpy as np
import pytest
import torch
from batches import same, tensors
from corrupted_batches import NORMALISER, OPERATIONS, SCHEMA, SEED, corruptor, join, normalised
from pydantic import ValidationError

from draf_dist.data.corruption import (
    Corruptor,
    Downsample,
    EhrMask,
    EhrNoise,
    GaussianNoise,
    Jpeg,
    Missing,
    MissingNotAtRandom,
    SignFlip,
    Swap,
    TrainingCorruption,
    UnitError,
    severity,
)
from draf_dist.errors import SpecError
from draf_dist.schema.batch import Batch

# Operations.


def test_gaussian_noise_has_the_sigma_of_its_grid() -> None:
    batch = normalised(400, all_present=True)
    for index, sigma in enumerate(GaussianNoise().grid):
        difference = corruptor().apply(batch, GaussianNoise(), index, seed=1).inputs["cxr"] - batch.inputs["cxr"]
        assert float(difference.mean()) == pytest.approx(0, abs=4 * max(sigma, 1e-9) / (400 * 256) ** 0.5)
        assert float(difference.std()) == pytest.approx(sigma, rel=0.01)


def test_a_sweep_sees_one_draw_grow() -> None:
    batch = normalised(5, all_present=True)
    clean = batch.inputs["cxr"]
    weak, strong = (corruptor().apply(batch, GaussianNoise(), index, seed=1).inputs["cxr"] - clean for index in (2, 4))
    assert torch.allclose(4 * weak, strong, atol=1e-5)


def test_downsampling_keeps_a_constant_and_the_mean_and_removes_detail() -> None:
    batch = normalised(8, all_present=True)
    flat = Batch(**{**vars(batch), "inputs": {**batch.inputs, "cxr": torch.full_like(batch.inputs["cxr"], 1.5)}})
    assert torch.allclose(corruptor().apply(flat, Downsample(), 3, seed=1).inputs["cxr"], torch.tensor(1.5))
    spread = [float(corruptor().apply(batch, Downsample(), index, seed=1).inputs["cxr"].std()) for index in range(4)]
    assert spread == sorted(spread, reverse=True)
    assert spread[0] == float(batch.inputs["cxr"].std())


def test_downsampling_by_two_is_the_mean_of_four_interpolated() -> None:
    batch = normalised(1, all_present=True)
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)
    result = (
        corruptor().apply(Batch(**{**vars(batch), "inputs": {**batch.inputs, "cxr": ramp}}), Downsample(), 1, seed=1).inputs["cxr"]
    )
    # Means of pairs lie at .5, 2.5, ...; linear interpolation gives the ramp back except at the border, where it is held.
    assert torch.allclose(result[0, 0, 3, 1:15], torch.arange(1.0, 15.0))
    assert result[0, 0, 3, 0] == 0.5
    assert result[0, 0, 3, 15] == 14.5


def test_jpeg_of_a_batch_is_that_of_the_decode_thread() -> None:
    batch = normalised(6, all_present=True)
    result = corruptor().apply(batch, Jpeg(), 3, seed=1).inputs["cxr"]
    pixels = (batch.inputs["cxr"] * 60 + 120).round().to(torch.uint8).numpy()
    coded = torch.from_numpy(np.stack([Jpeg().encode(image, 3) for image in pixels]))
    assert torch.equal(result, (coded.float() - 120) / 60)


def test_jpeg_error_rises_as_quality_falls() -> None:
    ys, xs = np.mgrid[0:32, 0:32]
    image = (127 + 60 * np.sin(xs / 3) + 60 * np.cos(ys / 5)).astype(np.uint8)
    for shape in ((1, 32, 32), (2, 32, 32), (3, 32, 32)):
        stacked = np.ascontiguousarray(np.broadcast_to(image, shape))
        error = [np.abs(Jpeg().encode(stacked, index).astype(int) - stacked).mean() for index in range(5)]
        assert error == sorted(error)
        assert error[0] == 0 < error[1]


def test_masking_forgets_the_value_and_its_bit_at_the_rate_of_the_grid() -> None:
    batch = normalised(3000, all_present=True)
    for index, rate in enumerate(EhrMask().grid):
        before, after = (b.inputs["vitals"] for b in (batch, corruptor().apply(batch, EhrMask(), index, seed=1)))
        assert not (after.observed & ~before.observed).any()
        assert torch.equal(after.values, torch.where(after.observed, before.values, 0.0))
        lost = float((before.observed & ~after.observed).sum() / before.observed.sum())
        assert lost == pytest.approx(rate, abs=0.01)


def test_noise_hits_observed_numbers_only() -> None:
    batch = normalised(2000, all_present=True)
    after = corruptor().apply(batch, EhrNoise(), 3, seed=1)
    before, noisy = batch.inputs["vitals"], after.inputs["vitals"]
    assert torch.equal(noisy.values[~before.observed], torch.zeros_like(noisy.values[~before.observed]))
    assert float((noisy.values - before.values)[before.observed].std()) == pytest.approx(1.6, rel=0.02)
    history = after.inputs["history"].values[:, 0]
    assert torch.equal(history[:, 1], batch.inputs["history"].values[:, 0, 1])
    assert float((history[:, 0] - 1).std()) == pytest.approx(1.6, rel=0.06)


@pytest.mark.parametrize("operation", [*OPERATIONS, Missing()], ids=lambda op: op.kind)
def test_grid_index_zero_changes_nothing(operation: object) -> None:
    batch = normalised(20)
    assert same(corruptor().apply(batch, operation, 0, seed=1), batch)


def test_severity_is_the_grid_index_over_the_last() -> None:
    assert [severity(GaussianNoise(), index) for index in (0, 1, 5)] == [0, 0.2, 1]
    assert severity(Jpeg(), 2) == 0.5
    assert severity(Swap(), 1) == 1
    with pytest.raises(SpecError, match="from 0 to 3, found 4"):
        severity(Downsample(), 4)


def test_flags_are_those_of_the_modality_that_was_hit() -> None:
    batch = normalised(30)
    result = corruptor().apply(batch, EhrNoise(), 2, modality="vitals", seed=1)
    assert torch.equal(result.corrupted[:, 1], batch.present[:, 1])
    assert torch.equal(result.severity[:, 1], batch.present[:, 1] * torch.tensor(2 / 5))
    assert not result.corrupted[:, [0, 2]].any()
    assert torch.equal(result.inputs["history"].values, batch.inputs["history"].values)
    everywhere = corruptor().apply(batch, EhrNoise(), 2, seed=1)
    assert torch.equal(everywhere.corrupted, batch.present & torch.tensor([False, True, True]))


@pytest.mark.parametrize("operation", [Swap(), MissingNotAtRandom()], ids=lambda op: op.kind)
def test_what_needs_the_whole_split_is_refused_on_a_batch(operation: object) -> None:
    with pytest.raises(TypeError, match="CorruptedSplit"):
        corruptor().apply(normalised(2), operation, 1, seed=1)


# The training law.


def test_a_sample_is_corrupted_alike_in_any_batch() -> None:
    batch = normalised(37, padding=2)
    whole = corruptor().train(batch)
    for cuts in ((0, 1, 20, 37), (0, 12, 13, 36, 37)):
        parts = [corruptor().train(batch.rows(start, stop)) for start, stop in zip(cuts, cuts[1:], strict=False)]
        assert all(torch.equal(a, b) for a, b in zip(tensors(whole), join(parts), strict=True))


def test_a_sample_has_its_signs_and_units_wrong_alike_in_any_batch() -> None:
    law = corruptor(operations=(SignFlip(), UnitError()), hold_out_last=False, modality_dropout=0.0)
    batch = normalised(60, padding=2)
    whole = law.train(batch)
    ratio = (whole.inputs["vitals"].values / batch.inputs["vitals"].values)[
        batch.inputs["vitals"].observed & (batch.weight > 0)[:, None, None]
    ]
    assert {round(float(found), 4) for found in ratio} == {-1.0, 1.0, 10.0}
    parts = [law.train(batch.rows(start, stop)) for start, stop in ((0, 7), (7, 60))]
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole), join(parts), strict=True))


def test_a_sample_is_corrupted_anew_in_every_epoch_and_under_another_seed() -> None:
    batch = normalised(200, all_present=True)
    later = Batch(**{**vars(batch), "epoch": batch.epoch + 3})
    other = Corruptor(TrainingCorruption(), NORMALISER, seed=SEED + 1)
    first = corruptor().train(batch)
    for result in (corruptor().train(later), other.train(batch)):
        assert not torch.equal(result.severity, first.severity)
        assert not torch.equal(result.present, first.present)
    assert same(corruptor().train(batch), first)


def test_the_noise_itself_is_drawn_anew_in_every_epoch() -> None:
    batch = normalised(200, all_present=True)
    later = Batch(**{**vars(batch), "epoch": batch.epoch + 3})
    law = corruptor(operations=(GaussianNoise(),), probability=1.0, modality_dropout=0.0)
    first, second = law.train(batch), law.train(later)
    alike = first.severity[:, 0] == second.severity[:, 0]
    assert alike.any()
    assert (first.inputs["cxr"][alike] != second.inputs["cxr"][alike]).flatten(1).any(dim=1).all()


def test_operations_and_severities_follow_the_law() -> None:
    num_rows = 20_000
    uid, epoch = torch.arange(num_rows), torch.zeros(num_rows, dtype=torch.int64)
    config = TrainingCorruption()
    for spec, names in zip(SCHEMA.modalities, (["gaussian", "downsample", "jpeg"], *[["ehr_mask", "ehr_noise"]] * 2), strict=True):
        operations = config.operations_for(spec)
        assert [operation.kind for operation in operations] == names
        which, index = config.choose(spec, seed=SEED, epoch=epoch, uid=uid)
        hit = index > 0
        assert float(hit.double().mean()) == pytest.approx(0.5, abs=0.015)
        for number, operation in enumerate(operations):
            levels = index[hit & (which == number)]
            assert len(levels) == pytest.approx(num_rows / 2 / len(operations), rel=0.06)
            counts = torch.bincount(levels, minlength=len(operation.grid))
            assert counts[0] == counts[-1] == 0
            assert torch.allclose(counts[1:-1] / len(levels), torch.tensor(1 / (len(operation.grid) - 2)), atol=0.03)


def test_the_last_severity_is_trained_on_only_when_asked() -> None:
    batch = normalised(500, all_present=True)
    assert float(corruptor(operations=(EhrNoise(),)).train(batch).severity.max()) == pytest.approx(0.8)
    assert float(corruptor(operations=(EhrNoise(),), hold_out_last=False).train(batch).severity.max()) == 1


def test_flags_say_exactly_what_was_changed() -> None:
    batch = normalised(300)
    result = corruptor(operations=(GaussianNoise(), EhrNoise()), modality_dropout=0.0).train(batch)
    changed = (result.inputs["cxr"] != batch.inputs["cxr"]).flatten(1).any(dim=1)
    assert torch.equal(result.corrupted[:, 0], changed)
    assert torch.equal(result.corrupted, result.severity > 0)
    assert not (result.corrupted & ~batch.present).any()
    assert 0.4 < float(result.corrupted[batch.present].double().mean()) < 0.6


def test_probability_zero_and_no_dropout_is_no_change() -> None:
    batch = normalised(50)
    assert same(corruptor(probability=0.0, modality_dropout=0.0).train(batch), batch)


def test_padding_rows_stay_as_they_are() -> None:
    batch = normalised(40, padding=10)
    result = corruptor(probability=1.0, modality_dropout=1.0).train(batch)
    assert same(result.rows(30, 40), batch.rows(30, 40))


def test_a_jpeg_by_the_loader_keeps_its_flag_unless_the_modality_is_dropped() -> None:
    batch = normalised(400, all_present=True)
    hook = corruptor(operations=(Jpeg(),)).decode_hook()
    assert hook is not None
    levels = torch.from_numpy(hook.levels(batch.uid, batch.epoch)["cxr"])
    flags, severities = batch.corrupted.clone(), batch.severity.clone()
    flags[:, 0], severities[:, 0] = levels > 0, levels / 4
    loaded = Batch(**{**vars(batch), "corrupted": flags, "severity": severities})
    result = corruptor(operations=(Jpeg(),)).train(loaded)
    assert torch.equal(result.corrupted[:, 0], flags[:, 0] & result.present[:, 0])
    assert torch.equal(result.severity[:, 0], severities[:, 0] * result.present[:, 0])
    assert 0 < int(result.corrupted.sum()) < int(flags.sum())


def test_the_hook_and_the_corruptor_share_one_choice() -> None:
    # No image meets two operations: what the hook encodes, the corruptor leaves, and the other way round.
    batch = normalised(500, all_present=True)
    hook = corruptor().decode_hook()
    assert hook is not None
    encoded = torch.from_numpy(hook.levels(batch.uid, batch.epoch)["cxr"]) > 0
    corrupted = corruptor(modality_dropout=0.0).train(batch).corrupted[:, 0]
    assert not (encoded & corrupted).any()
    assert float((encoded | corrupted).double().mean()) == pytest.approx(0.5, abs=0.08)


def test_without_jpeg_or_images_no_hook_is_needed() -> None:
    assert corruptor(operations=(GaussianNoise(),)).decode_hook() is None


# Specs.


@pytest.mark.parametrize(
    "wrong",
    [
        {"operations": [{"kind": "gaussian", "grid": [0.1, 0.2, 0.3]}]},
        {"operations": [{"kind": "gaussian", "grid": [0, 0.2]}]},
        {"operations": [{"kind": "ehr_mask", "grid": [0, 0.5, 1.5]}]},
        {"operations": [{"kind": "swap"}]},
        {"operations": [{"kind": "jpeg"}, {"kind": "jpeg"}]},
        {"probability": 1.2},
    ],
)
def test_a_law_that_makes_no_sense_is_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        TrainingCorruption.model_validate(wrong)


def test_the_law_survives_its_spec() -> None:
    law = TrainingCorruption(operations=(Jpeg(grid=(0, 80, 20)), EhrMask()), modality_dropout=0.3)
    assert TrainingCorruption.model_validate(law.model_dump(mode="json")) == law

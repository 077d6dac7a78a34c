import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_source import SCHEMA

from draf_dist.data.stats import ImageMoments, StatsBuilder, VariableMoments
from draf_dist.schema.release import TrainingSums


@given(st.integers(0, 2**32 - 1), st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_streamed_moments_equal_those_of_all_values_at_once(seed: int, num_samples: int) -> None:
    generator = np.random.default_rng(seed)
    samples = generator.normal((3, -1e4), (2, 0.5), (num_samples, 5, 2)).astype(np.float32)
    samples[generator.random(samples.shape) < 0.4] = np.nan
    moments = VariableMoments(2)
    for sample in samples:
        moments.add(sample)
    everything = samples.reshape(-1, 2).astype(np.float64)
    for i in range(2):
        observed = everything[~np.isnan(everything[:, i]), i]
        assert moments.count[i] == len(observed)
        if len(observed):
            assert moments.mean[i] == pytest.approx(observed.mean(), rel=1e-12)
            assert moments.squares[i] == pytest.approx(((observed - observed.mean()) ** 2).sum(), rel=1e-9, abs=1e-9)


def test_a_small_spread_on_a_large_mean_is_not_lost() -> None:
    moments = VariableMoments(1)
    for value in (2**22, 2**22 + 1):
        moments.add(np.full((1, 1), value, dtype=np.float32))
    assert np.sqrt(moments.squares[0] / 2) == 0.5


def test_pixels_are_counted_exactly_in_any_order() -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 1, 7, 5), dtype=np.uint8)
    results = []
    for order in (images, images[::-1]):
        moments = ImageMoments()
        for image in order:
            moments.add(image)
        results.append(moments.result())
    assert results[0] == results[1]
    assert results[0].mean == pytest.approx(images.mean(), rel=1e-14)
    assert results[0].std == pytest.approx(images.std(), rel=1e-12)


def test_what_can_not_be_standardised_is_left_as_it_is() -> None:
    builder = StatsBuilder(SCHEMA)
    for icd in (0.0, 1.0):
        builder.add({"history": np.array([[50.0, icd]], dtype=np.float32)})
    stats = builder.result()
    age, icd = stats.variables["history"]
    assert (age.mean, age.std, age.num_observed) == (50.0, 1.0, 2)  # a constant
    assert (icd.mean, icd.std, icd.num_observed) == (0.0, 1.0, 2)  # binary
    assert all((v.mean, v.std, v.num_observed) == (0.0, 1.0, 0) for v in stats.variables["vitals"])  # never observed
    assert (stats.images["cxr"].mean, stats.images["cxr"].std) == (0.0, 1.0)


@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.integers(0, 12))
@settings(max_examples=30, deadline=None)
def test_going_on_from_stored_sums_is_one_pass_over_all_bit_for_bit(seed: int, num_before: int, num_after: int) -> None:
    generator = np.random.default_rng(seed)
    samples = [
        {
            "cxr": generator.integers(0, 256, (1, 16, 12), dtype=np.uint8),
            "vitals": np.where(generator.random((4, 2)) < 0.4, np.nan, generator.normal(1e4, 0.1, (4, 2))).astype(np.float32),
        }
        for _ in range(num_before + num_after)
    ]
    before, whole = StatsBuilder(SCHEMA), StatsBuilder(SCHEMA)
    for sample in samples[:num_before]:
        before.add(sample)
    after = StatsBuilder(SCHEMA, TrainingSums.model_validate_json(before.sums().model_dump_json()))
    for sample in samples[num_before:]:
        after.add(sample)
    for sample in samples:
        whole.add(sample)
    assert after.sums() == whole.sums()
    assert after.result() == whole.result()

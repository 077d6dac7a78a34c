"""Severity: the energy of a hand-made PCA, the table from energy to sigma, and what of an image tells how badly it is corrupted."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from model_inputs import small_batch, small_schema, variables, with_absent_slots
from scipy.stats import spearmanr
from torch import Tensor

from draf_dist import noise
from draf_dist.models.severity import (
    SIGMAS,
    Energy,
    Severity,
    SeverityTable,
    Vectors,
    num_explaining,
    num_values,
    principal,
    with_noise,
)
from draf_dist.models.severity_image import band_energies, blockiness, detail, gradient_energy, image_statistics, num_bands
from draf_dist.schema.batch import Batch, ClassTarget, SeriesInput
from draf_dist.schema.label import LabelSpec
from draf_dist.schema.modality import DataSchema, ImageSpec, ModalitySpec, SeriesSpec, TableSpec, VariableSpec, VolumeSpec

SCHEMA = small_schema()


def vectors(rows: list[list[float]], observed: list[list[bool]] | None = None) -> Vectors:
    values = torch.tensor(rows)
    return Vectors(values, torch.ones_like(values, dtype=torch.bool) if observed is None else torch.tensor(observed))


def hand_made() -> Energy:
    """Four inputs about (1, 0, 0, 0): one component (3, 4, 0, 0) / 5 of variance 4, and .5 left beside it."""
    energy = Energy(4, standardise=False)
    energy.mean.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    energy.axes[:, 0] = torch.tensor([0.6, 0.8, 0.0, 0.0])
    energy.variances[0] = 4.0
    energy.residual.fill_(0.5)
    return energy


def test_energy_is_its_closed_form() -> None:
    # x - mu = 5 along the component, and (0, 0, 1, 2) beside it: 25 / 4 + 5 / .5, over 4 dimensions.
    found = hand_made()(vectors([[4.0, 4.0, 1.0, 2.0]]))
    torch.testing.assert_close(found, torch.tensor([math.log((25 / 4 + 10) / 4)]))


def test_what_was_not_observed_lies_at_the_mean_and_is_not_counted() -> None:
    energy = hand_made()
    # Without the last two: 25 / 4 over 2 dimensions, whatever they hold.
    found = energy(vectors([[4.0, 4.0, 9.0, -9.0]], [[True, True, False, False]]))
    torch.testing.assert_close(found, torch.tensor([math.log(25 / 4 / 2)]))
    # Without the second: 3 along the first axis are 1.8 along the component, and (1.92, -1.44) beside it.
    found = energy(vectors([[4.0, 4.0, 0.0, 0.0]], [[True, False, True, True]]))
    torch.testing.assert_close(found, torch.tensor([math.log((1.8**2 / 4 + (1.92**2 + 1.44**2) / 0.5) / 3)]))
    nothing = energy(vectors([[4.0, 4.0, 0.0, 0.0]], [[False] * 4]))
    assert float(nothing) == pytest.approx(math.log(1e-12))


def normal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_fit_finds_the_components_of_ninety_percent_and_leaves_the_rest_to_v() -> None:
    rows = normal(4000, 5, seed=0)
    centred = rows - rows.mean(0)
    # White, to the last bit: then variances are exactly those given.
    white = centred @ torch.linalg.inv(torch.linalg.cholesky(centred.T @ centred / 4000)).T
    deviations = torch.tensor([3.0, 2.0, 0.7, 0.5, 0.1])
    energy = Energy(5, standardise=False)
    energy.fit(Vectors(white * deviations + 7, torch.ones(4000, 5, dtype=torch.bool)))
    torch.testing.assert_close(energy.mean, torch.full((5,), 7.0))
    # 9 and 4 of 13.75 are 95 %, 9 alone 65 %.
    torch.testing.assert_close(energy.variances, torch.tensor([9.0, 4.0, 1.0, 1.0, 1.0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(energy.axes.abs()[:2, :2], torch.eye(2), rtol=1e-3, atol=1e-3)
    assert not energy.axes[:, 2:].any()
    assert float(energy.residual) == pytest.approx((0.49 + 0.25 + 0.01) / 5, rel=1e-4)


def test_v_has_a_floor_and_constant_inputs_have_an_energy() -> None:
    energy = Energy(3, standardise=False)
    energy.fit(Vectors(torch.full((10, 3), 2.0), torch.ones(10, 3, dtype=torch.bool)))
    assert float(energy.residual) == pytest.approx(1e-3)
    assert float(energy(vectors([[3.0, 2.0, 2.0]]))) == pytest.approx(math.log(1 / 1e-3 / 3))


def test_mean_is_over_what_was_observed() -> None:
    energy = Energy(2, standardise=False)
    energy.fit(vectors([[1.0, 5.0], [3.0, 99.0], [2.0, 7.0]], [[True, True], [True, False], [True, True]]))
    torch.testing.assert_close(energy.mean, torch.tensor([2.0, 6.0]))


def test_both_gram_matrices_give_the_same_components() -> None:
    rows = normal(20, 12, seed=1).double()
    rows -= rows.mean(0)
    variances, axes = principal(rows)
    # As many rows of zeros that the other matrix is the smaller one change nothing but the divisor.
    wide = torch.cat([rows, torch.zeros(20, 30, dtype=torch.float64)], dim=1)
    other_variances, other_axes = principal(wide)
    torch.testing.assert_close(other_variances[:12], variances)
    torch.testing.assert_close((other_axes[:12, :12] * axes).sum(0).abs(), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(other_axes[:, :12].T @ other_axes[:, :12], torch.eye(12, dtype=torch.float64))


def test_components_are_the_fewest_that_reach_ninety_percent() -> None:
    assert num_explaining(torch.tensor([9.0, 1.0])) == 1
    assert num_explaining(torch.tensor([8.9, 1.1])) == 2
    assert num_explaining(torch.zeros(3)) == 0


def fitted_table(knots: list[float], clean: list[float] | None = None) -> SeverityTable:
    """From one energy per sigma that all rows share; clean: those of the clean rows."""
    table = SeverityTable()
    rows = clean or [knots[0]] * 5
    table.fit(torch.stack([torch.tensor(rows), *(torch.full((len(rows),), knot) for knot in knots[1:])]))
    return table


def test_table_is_exact_at_its_knots_and_linear_between_them() -> None:
    knots = [0.0, 1.0, 2.0, 3.0, 5.0, 6.0, 8.0]
    table = fitted_table(knots)
    torch.testing.assert_close(table(torch.tensor(knots)), torch.tensor([math.log1p(sigma) for sigma in SIGMAS]))
    between = (math.log(4.2) + math.log(2.6)) / 2
    assert float(table(torch.tensor(4.0))) == pytest.approx(between, abs=1e-6)
    ends = table(torch.tensor([-50.0, 50.0]))
    assert ends.tolist() == pytest.approx([0.0, math.log(11)])


def test_table_starts_at_the_99th_percentile_of_clean_inputs() -> None:
    clean = torch.linspace(0, 1, 1001)
    table = fitted_table([0.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], clean.tolist())
    assert float(table.energies[0]) == pytest.approx(0.99)
    assert (table(clean) > 0).float().mean() <= 0.01


def test_table_never_falls_and_noise_that_can_not_be_seen_is_none() -> None:
    # .4 is below what clean inputs reach; 1.6 is below .8.
    table = fitted_table([1.0, 0.5, 2.0, 1.5, 3.0, 4.0, 5.0])
    line = table(torch.linspace(-1, 6, 500))
    assert (line.diff() >= 0).all()
    # No jump: no step of .014 in energy moves s by more than the steepest line allows.
    assert line.diff().max() < 0.05
    assert float(table(torch.tensor(1.0))) == 0
    assert float(table(torch.tensor(2.0))) == pytest.approx(math.log(1.8))
    flat = fitted_table([1.0] * 7)
    assert not flat(torch.linspace(-5, 50, 100)).any()


def series(rows: Tensor) -> SeriesInput:
    values = rows.unsqueeze(1)
    return SeriesInput(values, torch.ones_like(values, dtype=torch.bool), torch.ones(len(rows), dtype=torch.int64))


def batch_of(schema: DataSchema, inputs: dict[str, Tensor | SeriesInput], start: int = 0) -> Batch:
    first = next(iter(inputs.values()))
    count = len(first if isinstance(first, Tensor) else first.values)
    shape = (count, len(schema.modalities))
    nothing = torch.zeros(shape)
    return Batch(
        modalities=schema.names,
        inputs=inputs,
        present=torch.ones(shape, dtype=torch.bool),
        corrupted=nothing.bool(),
        severity=nothing,
        quality=nothing,
        quality_known=nothing.bool(),
        target=ClassTarget(torch.zeros(count, dtype=torch.int64), torch.ones(count, dtype=torch.bool)),
        site=torch.zeros(count, dtype=torch.int64),
        uid=torch.arange(start, start + count),
        epoch=torch.zeros(count, dtype=torch.int64),
        weight=torch.ones(count),
    )


LABEL = LabelSpec(name="death", classes=("no", "yes"))
TABLES = DataSchema(modalities=(TableSpec(name="labs", variables=variables(12)),), label=LABEL, sites=("north",))


def correlated(rows: int, seed: int) -> Tensor:
    """Twelve standardised values that three factors explain for the most part."""
    mixing = normal(3, 12, seed=99)
    values = normal(rows, 3, seed) @ mixing + 0.3 * normal(rows, 12, seed + 1)
    return values / (mixing.square().sum(0) + 0.09).sqrt()


@pytest.fixture(scope="module")
def fitted() -> Severity:
    severity = Severity(TABLES)
    batches = [batch_of(TABLES, {"labs": series(correlated(600, seed))}, start=seed) for seed in (1000, 3000)]
    severity.fit([batches[0]], [batches[1]])
    return severity


def test_severity_tells_how_much_noise_there_was(fitted: Severity) -> None:
    clean = batch_of(TABLES, {"labs": series(correlated(400, seed=5000))})
    value, keys = clean.inputs["labs"], noise.chain(7, clean.uid)
    found = []
    for sigma in SIGMAS:
        noisy = replace(clean, inputs={"labs": with_noise(TABLES.modalities[0], value, sigma, keys)})
        found.append(fitted(noisy)[:, 0])
    medians = torch.stack(found).median(1).values
    # In sigma itself: within a fifth of it, where it can be seen.
    torch.testing.assert_close(medians[1:].expm1(), torch.tensor(SIGMAS[1:]), rtol=0.2, atol=0.0)
    assert (found[0] == 0).float().mean() > 0.95
    truth = torch.tensor(SIGMAS).repeat_interleave(400)
    assert spearmanr(truth, torch.cat(found)).statistic > 0.9


def test_what_is_missing_is_hardly_taken_for_noise_and_noise_on_the_rest_is_seen(fitted: Severity) -> None:
    rows = batch_of(TABLES, {"labs": series(correlated(400, seed=5000))})
    value = rows.inputs["labs"]
    assert isinstance(value, SeriesInput)
    few = torch.rand(value.values.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    sparse = replace(value, observed=few)
    # A mean where its neighbours say otherwise is a little strange, in a fit to rows that had everything.
    assert fitted(replace(rows, inputs={"labs": sparse})).expm1().quantile(0.9) < 1.6
    noisy = with_noise(TABLES.modalities[0], sparse, 3.2, noise.chain(7, rows.uid))
    assert 2.2 < float(fitted(replace(rows, inputs={"labs": noisy})).expm1().median()) < 4.5
    # In a fit to rows as sparse, it is not strange at all.
    own = Severity(TABLES)
    own.fit([replace(rows, inputs={"labs": sparse})], [replace(rows, inputs={"labs": sparse})])
    assert own(replace(rows, inputs={"labs": sparse})).median() == 0


def test_noise_leaves_binary_and_unobserved_values_alone() -> None:
    spec = TableSpec(
        name="codes", variables=(VariableSpec(name="a", type="binary"), VariableSpec(name="b"), VariableSpec(name="c"))
    )
    value = SeriesInput(torch.ones(2, 1, 3), torch.tensor([[[True, True, False]]] * 2), torch.ones(2, dtype=torch.int64))
    noisy = with_noise(spec, value, 5.0, torch.tensor([1, 2]))
    assert isinstance(noisy, SeriesInput)
    assert (noisy.values == value.values)[..., [0, 2]].all()
    assert (noisy.values != value.values)[..., 1].all()


def test_codes_that_noise_can_not_touch_are_never_severe() -> None:
    spec = TableSpec(name="codes", variables=tuple(VariableSpec(name=f"c{index}", type="binary") for index in range(6)))
    schema = TABLES.model_copy(update={"modalities": (spec,)})
    rows = (torch.rand(300, 6, generator=torch.Generator().manual_seed(1)) < 0.1).float()
    severity = Severity(schema)
    severity.fit([batch_of(schema, {"codes": series(rows)})], [batch_of(schema, {"codes": series(rows)})])
    assert not severity(batch_of(schema, {"codes": series(torch.ones(4, 6))})).any()


def test_severity_before_the_fit_and_of_a_modality_that_nobody_has_is_zero() -> None:
    batch = small_batch(SCHEMA)
    severity = Severity(SCHEMA)
    assert not severity(batch).any()
    never = replace(batch, present=torch.tensor([[True, False, True]]).expand(8, 3))
    severity.fit([never], [never])
    assert not severity(batch)[:, 1].any()
    assert severity.tables["m_labs"].severities.any()


@pytest.mark.parametrize("filler", [float("nan"), 1e6, float("inf")])
def test_severity_looks_neither_at_absent_slots_nor_at_other_rows(filler: float) -> None:
    severity = Severity(SCHEMA)
    severity.fit([small_batch(SCHEMA, rows=64, seed=1)], [small_batch(SCHEMA, rows=64, seed=2)])
    batch = small_batch(SCHEMA, seed=3)
    shaken = replace(batch, inputs={name: scaled(value, 4.0) for name, value in batch.inputs.items()})
    whole = severity(shaken)
    assert whole[batch.present].any()
    assert not whole[~batch.present].any()
    assert torch.equal(severity(with_absent_slots(shaken, filler)), whole)
    parts = [severity(shaken.rows(start, stop)) for start, stop in ((0, 3), (3, 8))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)


def scaled(value: Tensor | SeriesInput, factor: float) -> Tensor | SeriesInput:
    return value * factor if isinstance(value, Tensor) else replace(value, values=value.values * factor)


def test_padding_is_not_fitted_on() -> None:
    batch = small_batch(SCHEMA, rows=32, seed=1)
    padded = replace(small_batch(SCHEMA, rows=40, seed=1), weight=(torch.arange(40) < 32).float())
    padded = replace(padded, inputs={name: appended(value, padded.inputs[name]) for name, value in batch.inputs.items()})
    padded = replace(padded, present=torch.cat([batch.present, torch.ones(8, 3, dtype=torch.bool)]))
    first, second = Severity(SCHEMA), Severity(SCHEMA)
    first.fit([batch], [batch])
    second.fit([padded], [padded])
    for name, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def appended(value: Tensor | SeriesInput, longer: Tensor | SeriesInput) -> Tensor | SeriesInput:
    """A value with the last rows of another one, made large."""
    if isinstance(value, Tensor):
        assert isinstance(longer, Tensor)
        return torch.cat([value, 100 * longer[len(value) :]])
    assert isinstance(longer, SeriesInput)
    rest = len(value.values)
    return SeriesInput(
        torch.cat([value.values, 100 * longer.values[rest:]]),
        torch.cat([value.observed, longer.observed[rest:]]),
        torch.cat([value.length, longer.length[rest:]]),
    )


SPECS: tuple[ModalitySpec, ...] = (
    ImageSpec(name="x", channels=3, height=40, width=32),
    ImageSpec(name="x", channels=1, height=8, width=8),
    VolumeSpec(name="x", spacing_mm=(1, 1, 1), shape=(6, 20, 18), chunk=(6, 20, 18)),
    VolumeSpec(name="x", spacing_mm=(1, 1, 1), shape=(1, 20, 18), chunk=(1, 20, 18)),
)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind} {num_values(spec)}")
def test_statistics_are_as_many_as_said_and_finite_on_flat_images(spec: ImageSpec | VolumeSpec) -> None:
    sides = (spec.height, spec.width) if isinstance(spec, ImageSpec) else spec.delivered
    for image in (torch.zeros(2, spec.channels, *sides), torch.randn(2, spec.channels, *sides)):
        found = image_statistics(image)
        assert found.shape == (2, num_values(spec))
        assert found.isfinite().all()


def white(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_band_energies_of_white_noise_and_of_a_checkerboard() -> None:
    found = band_energies(white(0, 1, 1, 512, 512), 3)
    for level, band in enumerate(found):
        assert float(band) == pytest.approx(0.75 / 4**level, rel=0.05)
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(8, 8).view(1, 1, 16, 16)
    assert [float(band) for band in band_energies(board, 3)] == pytest.approx([1.0, 0.0, 0.0], abs=1e-6)
    # An odd last row belongs to no block.
    assert [float(band) for band in band_energies(board[..., :15, :15], 1)] == pytest.approx([1.0], abs=1e-6)


def test_bands_add_up_to_the_energy_but_for_the_mean_of_what_is_left() -> None:
    image = white(1, 2, 1, 16, 16)
    left = torch.nn.functional.avg_pool2d(image, 16).square().flatten()
    torch.testing.assert_close(torch.stack(band_energies(image, 4)).sum(0).flatten() + left, image.square().mean((1, 2, 3)))
    assert num_bands((16, 16)) == 4
    assert num_bands((12, 40)) == 3
    assert num_bands((1, 40)) == 0


def test_a_ramp_has_its_gradient_and_no_finer_detail() -> None:
    ramp = torch.arange(32.0).expand(1, 1, 32, 32) * 0.5
    assert float(gradient_energy(ramp)) == pytest.approx(0.25)
    size, _ = detail(ramp)
    assert float(size) == pytest.approx(math.log(1e-3))
    # Differences along both axes of white noise have four times its variance; the median size of a normal number is .6745.
    size, kurtosis = detail(white(2, 1, 1, 256, 256))
    assert float(size) == pytest.approx(math.log(2 * 0.6745), abs=0.02)
    assert float(kurtosis) == pytest.approx(math.log(3), abs=0.05)


def test_blocks_show() -> None:
    smooth = white(3, 1, 1, 64, 64)
    assert abs(float(blockiness(smooth))) < 0.15
    blocks = white(4, 1, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert float(blockiness(blocks + 0.01 * smooth)) > 5


def anatomy(count: int, seed: int) -> Tensor:
    """Smooth pictures of random contrast, with a little of the noise that a clean picture has."""
    coarse = torch.nn.functional.interpolate(white(seed, count, 1, 5, 5), size=(40, 40), mode="bicubic")
    contrast = 0.7 + 0.6 * torch.rand(count, 1, 1, 1, generator=torch.Generator().manual_seed(seed + 1))
    return contrast * coarse + 0.03 * white(seed + 2, count, 1, 40, 40)


def pictures(seed: int) -> Iterator[Batch]:
    yield batch_of(PICTURES, {"cxr": anatomy(200, seed)})


PICTURES = DataSchema(modalities=(ImageSpec(name="cxr", height=40, width=40),), label=LABEL, sites=("north",))


def test_severity_of_pictures_rises_with_noise_and_with_lost_resolution() -> None:
    severity = Severity(PICTURES)
    severity.fit(pictures(10), pictures(20))
    clean = anatomy(100, 30)
    found = [severity(batch_of(PICTURES, {"cxr": clean + sigma * white(40, *clean.shape)}))[:, 0] for sigma in SIGMAS]
    assert (found[0] == 0).float().mean() > 0.9
    truth = torch.tensor(SIGMAS).repeat_interleave(100)
    assert spearmanr(truth, torch.cat(found)).statistic > 0.9
    blurred = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(clean, 4), size=(40, 40), mode="bilinear")
    assert severity(batch_of(PICTURES, {"cxr": blurred})).median() > found[0].median()


def test_series_are_measured_step_by_step() -> None:
    spec = SeriesSpec(name="vitals", variables=variables(3), num_steps=5, step_h=1.0)
    assert num_values(spec) == 15
    value = SeriesInput(torch.arange(30.0).view(2, 5, 3), torch.ones(2, 5, 3, dtype=torch.bool), torch.tensor([5, 5]))
    assert Vectors.of(value).values[0].tolist() == list(range(15))

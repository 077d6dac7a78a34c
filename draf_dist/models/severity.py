"""How badly a modality is corrupted, by how far its input lies from clean training inputs (findings, second part: Severity).

E_m = log[(sum_k c_k^2 / lambda_k + |res|^2 / v) / D_m] with c = V^T (x - mu), and from E_m by a table sigma_hat_m: the noise that
would have brought clean inputs there. s_m = log(1 + sigma_hat_m). Fitted once on clean data, then frozen: everything is a buffer,
so it is stored with the weights and no optimizer sees it.

From the findings: E_m, 90 % of the variance, the floor of v, the table and its sigmas. Ours, where they are silent: a value that
was not observed lies at the mean and D_m counts what was observed, so that E_m is an energy per measurement; images and volumes go
by `image_statistics`; at most 256 components; knots of the table that can't be told apart stand for the smallest sigma among them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from draf_dist import noise
from draf_dist.models.absent import clear_absent
from draf_dist.models.backbones import module_name
from draf_dist.models.severity_image import image_statistics, num_statistics
from draf_dist.schema.batch import Batch, ModalityInput, SeriesInput
from draf_dist.schema.categories import as_numbers, num_numbers
from draf_dist.schema.modality import DataSchema, ImageSpec, ModalitySpec, SeriesSpec, TableSpec, VolumeSpec

# Of the noise on standardised inputs that the table is made with.
SIGMAS = (0.0, 0.4, 0.8, 1.6, 3.2, 6.0, 10.0)
# What clean inputs rarely exceed: the energy up to which sigma_hat is 0.
CLEAN_QUANTILE = 0.99
EXPLAINED = 0.9
MAX_COMPONENTS = 256
LEAST_RESIDUAL = 1e-3
# A statistic of images that never varied in training has no scale.
_LEAST_SCALE = 1e-3
_LEAST_ENERGY = 1e-12


@dataclass(frozen=True)
class Vectors:
    """Inputs of one modality as rows: values f32 (B, D), observed bool (B, D)."""

    values: Tensor
    observed: Tensor

    @classmethod
    def of(cls, value: ModalityInput) -> "Vectors":
        """A series flattened, an image or volume by its statistics; the input holds no NaN (see clear_absent)."""
        if isinstance(value, SeriesInput):
            return cls(value.values.flatten(1), value.observed.flatten(1))
        statistics = image_statistics(value)
        return cls(statistics, torch.ones_like(statistics, dtype=torch.bool))

    def rows(self, chosen: Tensor) -> "Vectors":
        """The rows where chosen, bool (B,)."""
        return Vectors(self.values[chosen], self.observed[chosen])


def num_values(spec: ModalitySpec) -> int:
    """D of a modality's vectors."""
    match spec:
        case ImageSpec():
            return num_statistics(spec.channels, (spec.height, spec.width))
        case VolumeSpec():
            return num_statistics(spec.channels, spec.delivered)
        case SeriesSpec():
            return spec.num_steps * len(spec.variables)
    return num_numbers(spec)


class Energy(nn.Module):
    """E of one modality. Buffers: mean mu, scale (D,); axes V (D, K) and variances lambda (K,), 0 and 1 beyond those used; v.

    scale: 1 for series and tables, whose inputs are z-scores; of statistics of images their standard deviation in training.
    """

    mean: Tensor
    scale: Tensor
    axes: Tensor
    variances: Tensor
    residual: Tensor

    def __init__(self, num_inputs: int, *, standardise: bool) -> None:
        super().__init__()
        components = min(num_inputs, MAX_COMPONENTS)
        self.standardise = standardise
        self.register_buffer("mean", torch.zeros(num_inputs))
        self.register_buffer("scale", torch.ones(num_inputs))
        self.register_buffer("axes", torch.zeros(num_inputs, components))
        self.register_buffer("variances", torch.ones(components))
        self.register_buffer("residual", torch.ones(()))

    def forward(self, vectors: Vectors) -> Tensor:
        """E (B,) in nats; of a row in which nothing was observed that of 1e-12, which no clean row has."""
        deviation = torch.where(vectors.observed, (vectors.values - self.mean) / self.scale, 0.0)
        along = deviation @ self.axes
        beside = deviation - along @ self.axes.T
        total = (along.square() / self.variances).sum(1) + beside.square().sum(1) / self.residual
        return (total / vectors.observed.sum(1).clamp_min(1)).clamp_min(_LEAST_ENERGY).log()

    @torch.no_grad()
    def fit(self, vectors: Vectors) -> None:
        """The PCA of clean rows, in float64. v is the mean over the D dimensions of the variance that the components leave."""
        values, observed = vectors.values.double(), vectors.observed
        count = observed.sum(0).clamp_min(1)
        mean = torch.where(observed, values, 0.0).sum(0) / count
        scale = torch.ones_like(mean)
        if self.standardise:
            scale = (torch.where(observed, values - mean, 0.0).square().sum(0) / count).sqrt().clamp_min(_LEAST_SCALE)
        deviation = torch.where(observed, (values - mean) / scale, 0.0)
        variances, axes = principal(deviation)
        total = variances.sum()
        used = min(num_explaining(variances), self.axes.shape[1])
        self.mean.copy_(mean)
        self.scale.copy_(scale)
        self.axes.zero_()
        self.axes[:, :used] = axes[:, :used].to(self.axes)
        self.variances.fill_(1.0)
        self.variances[:used] = variances[:used].to(self.variances)
        self.residual.copy_(((total - variances[:used].sum()) / len(mean)).clamp_min(LEAST_RESIDUAL))


def principal(deviation: Tensor) -> tuple[Tensor, Tensor]:
    """Variances (K,), falling, and axes (D, K) of centred rows (N, D), K = min(N, D); by the smaller of the two Gram matrices."""
    rows, columns = deviation.shape
    if columns <= rows:
        variances, axes = torch.linalg.eigh(deviation.T @ deviation / rows)
        return variances.flip(0).clamp_min(0.0), axes.flip(1)
    variances, weights = torch.linalg.eigh(deviation @ deviation.T / rows)
    variances, weights = variances.flip(0).clamp_min(0.0), weights.flip(1)
    return variances, deviation.T @ weights / (variances * rows).sqrt().clamp_min(_LEAST_ENERGY)


def num_explaining(variances: Tensor) -> int:
    """The fewest of the falling variances that make 90 % of their sum; 0 where nothing varies."""
    if not bool(variances.sum() > 0):
        return 0
    reached = variances.cumsum(0) >= EXPLAINED * variances.sum() * (1 - 1e-12)
    return int((~reached).sum()) + 1


class SeverityTable(nn.Module):
    """s = log(1 + sigma_hat) as a rising, piecewise linear function of E. Buffers: energies, severities (7,), its knots.

    Until it is fitted it says 0 of everything.
    """

    energies: Tensor
    severities: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("energies", torch.arange(len(SIGMAS), dtype=torch.float32))
        self.register_buffer("severities", torch.zeros(len(SIGMAS)))

    def forward(self, energy: Tensor) -> Tensor:
        """S of energies of any shape: 0 up to the first knot, log 11 from the last one on."""
        width = self.energies.diff().clamp_min(_LEAST_ENERGY)
        passed = ((energy.unsqueeze(-1) - self.energies[:-1]) / width).clamp(0.0, 1.0)
        return (passed * self.severities.diff()).sum(-1)

    @torch.no_grad()
    def fit(self, energies: Tensor) -> None:
        """From energies (7, N) of N clean rows, under the noise of each of SIGMAS.

        The first knot is the 99th percentile, the others are medians, made to rise. A median that does not exceed the knots before
        it is a noise that can't be seen: its knot stands for the sigma of those.
        """
        clean = torch.quantile(energies[0].double(), CLEAN_QUANTILE)
        knots = torch.cat([clean.view(1), energies[1:].double().median(1).values]).cummax(0).values
        severities = torch.tensor([math.log1p(sigma) for sigma in SIGMAS], dtype=torch.float64, device=knots.device)
        seen = torch.cat([torch.ones_like(clean, dtype=torch.bool).view(1), knots.diff() > 0])
        first = torch.where(seen, torch.arange(len(SIGMAS), device=knots.device), 0).cummax(0).values
        self.energies.copy_(knots)
        self.severities.copy_(severities[first])


class Severity(nn.Module):
    """s (B, M) of a normalised batch; a row's severity looks at no other row."""

    def __init__(self, schema: DataSchema) -> None:
        super().__init__()
        self.schema = schema
        self.specs = {spec.name: spec for spec in schema.modalities}
        pictures = ImageSpec | VolumeSpec
        self.measures = nn.ModuleDict(
            {module_name(spec.name): Energy(num_values(spec), standardise=isinstance(spec, pictures)) for spec in schema.modalities}
        )
        self.tables = nn.ModuleDict({module_name(spec.name): SeverityTable() for spec in schema.modalities})

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor:
        """log(1 + sigma_hat), f32 (B, M), 0 where absent."""
        # PCA in bf16 would round small components away.
        with torch.autocast(batch.present.device.type, enabled=False):
            inputs = clear_absent(batch)
            columns = [self.tables[module_name(name)](self.energy(name, inputs[name])) for name in self.schema.names]
        return torch.where(batch.present, torch.stack(columns, dim=1), 0.0)

    def energy(self, name: str, value: ModalityInput) -> Tensor:
        """E (B,) of an input without NaN."""
        found: Tensor = self.measures[module_name(name)](Vectors.of(as_numbers(self.specs[name], value)))
        return found

    @torch.no_grad()
    def fit(self, train: Iterable[Batch], validation: Iterable[Batch]) -> None:
        """From clean, normalised batches; a modality that one of the two has nowhere keeps severity 0."""
        clean = clean_vectors(self.schema, train)
        for name, parts in clean.items():
            self._measure(name).fit(Vectors(*(torch.cat(one) for one in zip(*parts, strict=True))))
        found: dict[str, list[Tensor]] = {name: [] for name in clean}
        for batch in validation:
            for spec in self.schema.modalities:
                if spec.name in found:
                    found[spec.name].append(self.under_noise(spec, batch))
        for name, energies in found.items():
            if any(part.shape[1] for part in energies):
                self._table(name).fit(torch.cat(energies, dim=1))

    def _measure(self, name: str) -> Energy:
        measure = self.measures[module_name(name)]
        assert isinstance(measure, Energy)
        return measure

    def _table(self, name: str) -> SeverityTable:
        table = self.tables[module_name(name)]
        assert isinstance(table, SeverityTable)
        return table

    def under_noise(self, spec: ModalitySpec, batch: Batch) -> Tensor:
        """E (7, n) of the n rows that have the modality, under one draw of noise that grows through SIGMAS."""
        value = clear_absent(batch)[spec.name]
        keys = noise.sample_keys(0, f"severity/{spec.name}", None, batch.uid, 1)[0]
        energies = torch.stack([self.energy(spec.name, with_noise(spec, value, sigma, keys)) for sigma in SIGMAS])
        return energies[:, measurable(batch, spec.name, value)]


def clean_vectors(schema: DataSchema, batches: Iterable[Batch]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Modality -> values and observed of the rows that have it, batch by batch; a modality that no row has is left out."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for batch in batches:
        inputs = clear_absent(batch)
        for spec in schema.modalities:
            value = inputs[spec.name]
            rows = Vectors.of(as_numbers(spec, value)).rows(measurable(batch, spec.name, value))
            if len(rows.values):
                found.setdefault(spec.name, []).append((rows.values, rows.observed))
    return found


def measurable(batch: Batch, name: str, value: ModalityInput) -> Tensor:
    """Bool (B,): rows that count, have the modality, and something observed in it."""
    counts = batch.present[:, batch.modalities.index(name)] & (batch.weight > 0)
    return counts & value.observed.flatten(1).any(1) if isinstance(value, SeriesInput) else counts


def with_noise(spec: ModalitySpec, value: ModalityInput, sigma: float, keys: Tensor) -> ModalityInput:
    """The input plus sigma N(0, 1) for every pixel, voxel and observed numeric value: `gaussian` and `ehr_noise` at any sigma."""
    if isinstance(value, Tensor):
        return value + sigma * noise.normal(keys, tuple(value.shape[1:]))
    assert isinstance(spec, SeriesSpec | TableSpec)
    numeric = torch.tensor([variable.type == "numeric" for variable in spec.variables], device=value.values.device)
    noisy = value.values + sigma * noise.normal(keys, tuple(value.values.shape[1:]))
    return SeriesInput(torch.where(value.observed & numeric, noisy, value.values), value.observed, value.length)

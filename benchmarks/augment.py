"""Augmentations: a whole batch at once by `draf` beside MONAI's transforms, sample by sample, on the same images.

    python benchmarks/augment.py [--rounds 9] [--json FILE] [--quick]

On the CPU, one thread: 16 images of 224 x 224 and 4 volumes of 64 x 64 x 64. Every operation by itself, drawing its parameters
included, then the compositions of the presets from the operations that MONAI has too. MONAI's tensors track no metadata, and its
compositions turn, scale and deform in one interpolation as ours do. Rounds are interleaved, every round beginning with another arm;
times are CPU time of the process, so that what else runs counts less; medians over rounds, ratios in pairs.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from loader import machine
from monai.apps.reconstruction.transforms.array import RandomKspaceMask
from monai.data import set_track_meta
from monai.data.fft_utils import fftn_centered
from monai.transforms import (
    Compose,
    Rand2DElastic,
    Rand3DElastic,
    RandAdjustContrast,
    RandAffine,
    RandBiasField,
    RandCoarseDropout,
    RandGaussianNoise,
    RandGibbsNoise,
    RandRicianNoise,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor

from draf_dist import noise
from draf_dist.augment import (
    BeamHardening,
    BiasField,
    CtPreset,
    CuboidMask,
    Cupping,
    CxrPreset,
    Elastic,
    GaussianNoise,
    GibbsRinging,
    Intensity,
    KSpaceUndersampling,
    MriPreset,
    PoissonNoise,
    Preset,
    RicianNoise,
    RotateScale,
    Transform,
    Window,
)

IMAGES, VOLUMES = (16, 1, 224, 224), (4, 1, 64, 64, 64)
QUICK = {IMAGES: (2, 1, 32, 32), VOLUMES: (2, 1, 16, 16, 16)}
WANTED = 4.0
console = Console(width=132 if not sys.stdout.isatty() else None)

# One sample (C, ..) to another.
PerSample = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """What is compared: ours on the batch, MONAI's on every sample; None where MONAI has no such operation."""

    name: str
    shape: tuple[int, ...]
    ours: Callable[[Tensor], Tensor]
    monai: PerSample | None
    composed: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="two rounds of small images, to see that it works")
    options = parser.parse_args()
    torch.set_num_threads(1)
    set_track_meta(False)
    shapes = [QUICK[shape] if options.quick else shape for shape in (IMAGES, VOLUMES)]
    found = measure([case for shape in shapes for case in cases(shape)], 2 if options.quick else options.rounds)
    report(found)
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(found), indent=1) + "\n")


def cases(shape: tuple[int, ...]) -> list[Case]:
    size = shape[2:]
    made = [Case(name, shape, alone(ours), monai) for name, (ours, monai) in operations(size).items()]
    for name, preset, theirs in compositions(size):
        made.append(Case(name, shape, one_view(preset), Compose(theirs), composed=True))
    return made


def operations(size: tuple[int, ...]) -> dict[str, tuple[Transform, PerSample | None]]:
    """Ours, and MONAI's of about the same strength."""
    monai = peers(size)
    found: dict[str, Transform] = {
        "rotate_scale": RotateScale(max_degrees=10),
        "elastic": Elastic(displacement=(0.01, 0.03)),
        "intensity": Intensity(gamma=(0.7, 1.4)),
        "gaussian_noise": GaussianNoise(),
        "cuboid_mask": CuboidMask(),
        "bias_field": BiasField(),
        "k_space": KSpaceUndersampling(),
        "gibbs_ringing": GibbsRinging(),
        "rician_noise": RicianNoise(),
        "poisson_noise": PoissonNoise(white=1),
        "window": Window(),
        "cupping": Cupping(),
        "beam_hardening": BeamHardening(),
    }
    return {name: (ours, monai.get(name)) for name, ours in found.items()}


def peers(size: tuple[int, ...]) -> dict[str, PerSample]:
    least, most = [max(1, round(0.1 * n)) for n in size], [max(1, round(0.2 * n)) for n in size]
    return {
        "rotate_scale": RandAffine(prob=1, **posture(size), padding_mode="border"),
        "elastic": deformation(size),
        "intensity": RandAdjustContrast(prob=1, gamma=(0.7, 1.4)),
        "gaussian_noise": RandGaussianNoise(prob=1, std=0.1),
        "cuboid_mask": RandCoarseDropout(prob=1, holes=1, max_holes=3, spatial_size=least, max_spatial_size=most, fill_value=0),
        "bias_field": RandBiasField(prob=1, degree=3, coeff_range=(-0.3, 0.3)),
        "k_space": undersampling,
        "gibbs_ringing": RandGibbsNoise(prob=1, alpha=(0.1, 0.5)),
        "rician_noise": RandRicianNoise(prob=1, std=0.04),
    }


def posture(size: tuple[int, ...]) -> dict[str, object]:
    angles = 1 if len(size) == 2 else 3
    return {"rotate_range": (math.radians(10),) * angles, "scale_range": (0.1,) * len(size)}


def deformation(size: tuple[int, ...], **named: object) -> PerSample:
    """A control point every fifth of the image in 2-D, a Gaussian of 6 to 10 voxels in 3-D."""
    if len(size) == 2:
        spacing = tuple(n / 5 for n in size)
        return Rand2DElastic(spacing=spacing, magnitude_range=(1, 3), prob=1, padding_mode="border", **named)
    return Rand3DElastic(sigma_range=(6, 10), magnitude_range=(20, 60), prob=1, padding_mode="border", **named)


KSPACE_MASK = RandomKspaceMask(center_fractions=(0.08, 0.04, 0.08, 0.04), accelerations=(2, 4, 6, 8), spatial_dims=2)


def undersampling(image: Tensor) -> Tensor:
    """Slices are MONAI's first axis, channels its coils."""
    slices = image[None] if image.ndim == 3 else image.movedim(0, 1)
    found = KSPACE_MASK(fftn_centered(slices, spatial_dims=2, is_complex=False))[1]
    return found if image.ndim == 3 else found[None]


def compositions(size: tuple[int, ...]) -> list[tuple[str, Preset, list[PerSample]]]:
    """The presets without what MONAI lacks, and MONAI's operations in the same order."""
    monai = peers(size)
    moved = deformation(size, **posture(size))
    ct = CtPreset(acquisition=())
    cxr = CxrPreset(acquisition=())
    scan = [monai[step.kind] for step in MriPreset().acquisition]
    found = [
        ("CT", ct, [moved, *(monai[step.kind] for step in ct.transforms)]),
        ("MRI", MriPreset(), [*scan, standardise, moved, *(monai[step.kind] for step in MriPreset().transforms)]),
        ("CXR", cxr, [moved, *(monai[step.kind] for step in cxr.transforms)]),
    ]
    return found if len(size) == 2 else found[:2]


MEAN, DEVIATION = torch.tensor(0.3), torch.tensor(0.2)


def standardise(image: Tensor) -> Tensor:
    return (image - MEAN) / DEVIATION


def alone(transform: Transform) -> Callable[[Tensor], Tensor]:
    def run(image: Tensor) -> Tensor:
        keys = noise.sample_keys(0, "benchmark", None, torch.arange(len(image)), 1)[0]
        return transform.apply(image, transform.sample(keys, tuple(image.shape[2:])))

    return run


def one_view(preset: Preset) -> Callable[[Tensor], Tensor]:
    """A view of the whole image: the crop, which both views share, is no part of it."""

    def run(image: Tensor) -> Tensor:
        rows, size = len(image), tuple(image.shape[2:])
        whole = {"side": torch.ones(rows), "centre": torch.full((rows, len(size)), 0.5)}
        uid, epoch = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
        steps = (*preset.acquisition, preset.rotate_scale, preset.elastic, *preset.transforms)
        keys = {step.kind: noise.sample_keys(0, f"benchmark/{step.kind}", epoch, uid, 1)[0] for step in steps}
        return preset.view(image, (MEAN, DEVIATION), whole, {step.kind: step.sample(keys[step.kind], size) for step in steps}).image

    return run


@dataclass(frozen=True)
class Found:
    """Milliseconds of a sample, of every round."""

    name: str
    shape: tuple[int, ...]
    composed: bool
    ours: list[float]
    monai: list[float] | None

    @property
    def ratios(self) -> list[float]:
        return [] if self.monai is None else [theirs / ours for theirs, ours in zip(self.monai, self.ours, strict=True)]


def measure(made: list[Case], rounds: int) -> list[Found]:
    inputs = {case.shape: torch.rand(case.shape, generator=torch.Generator().manual_seed(0)) for case in made}
    found = [Found(case.name, case.shape, case.composed, [], None if case.monai is None else []) for case in made]
    pairs = list(zip(found, made, strict=True))
    for each, case in pairs:
        # What is imported, planned or cached at the first call does not count.
        run_once(case, inputs[case.shape], replace(each, ours=[], monai=None if each.monai is None else []))
    for number in range(rounds):
        turn = number * len(pairs) // rounds
        for each, case in pairs[turn:] + pairs[:turn]:
            run_once(case, inputs[case.shape], each, theirs_first=number % 2 == 1)
    return found


def run_once(case: Case, image: Tensor, found: Found, *, theirs_first: bool = False) -> None:
    def ours() -> None:
        found.ours.append(milliseconds(lambda: case.ours(image), len(image)))

    def theirs() -> None:
        if case.monai is not None and found.monai is not None:
            apply = case.monai
            found.monai.append(milliseconds(lambda: torch.stack([apply(one.clone()) for one in image]), len(image)))

    for arm in (theirs, ours) if theirs_first else (ours, theirs):
        arm()


def milliseconds(run: Callable[[], Tensor], samples: int, least_s: float = 0.05) -> float:
    """CPU time a sample, repeated until it can be told."""
    began, repeats = time.process_time(), 0
    while repeats == 0 or time.process_time() - began < least_s:
        result = run()
        repeats += 1
    spent = time.process_time() - began
    if result.shape[0] != samples or not bool(torch.isfinite(result).all()):
        raise RuntimeError(f"a result of shape {tuple(result.shape)}, or one that is not finite")
    return 1000 * spent / repeats / samples


def report(found: list[Found]) -> None:
    for shape in dict.fromkeys(each.shape for each in found):
        rows = [each for each in found if each.shape == shape]
        title = f"{shape[0]} x {' x '.join(map(str, shape[1:]))}, one thread; n = {len(rows[0].ours)} rounds; ms of CPU a sample"
        table = Table(title=title)
        for name in ("", "ours", "MONAI", "MONAI / ours, pairs", "least to greatest"):
            table.add_column(name, justify="left" if not name else "right")
        for each in rows:
            table.add_row(*row_of(each), end_section=each is [one for one in rows if not one.composed][-1])
        console.print(table)
    slower = [each for each in found if each.composed and statistics.median(each.ratios) < WANTED]
    told = ", ".join(f"{each.name} {each.shape}" for each in slower)
    console.print(f"compositions less than {WANTED:g} times as fast as MONAI's: {told or 'none'}", highlight=False)


def row_of(each: Found) -> tuple[str, ...]:
    name, ours = (f"{each.name}, composed" if each.composed else each.name), f"{statistics.median(each.ours):.3f}"
    if each.monai is None:
        return name, ours, "-", "-", "-"
    spread = f"{min(each.ratios):.2f} to {max(each.ratios):.2f}"
    return name, ours, f"{statistics.median(each.monai):.3f}", f"{statistics.median(each.ratios):.2f}", spread


def as_json(found: list[Found]) -> dict[str, object]:
    return {
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "monai", "numpy")},
        "cases": [{**asdict(each), "ratios": each.ratios} for each in found],
    }


if __name__ == "__main__":
    main()

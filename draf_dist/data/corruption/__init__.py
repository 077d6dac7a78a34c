"""Corruption and missing modalities: in training by a law, in evaluation one operation at one severity (docs/corruption.md)."""

from draf_dist.data.corruption.missing import NotAtRandom, fit_not_at_random
from draf_dist.data.corruption.operations import (
    AnyOperation,
    Downsample,
    EhrMask,
    EhrNoise,
    GaussianNoise,
    InputOperation,
    Jpeg,
    Missing,
    MissingNotAtRandom,
    Operation,
    SignFlip,
    Swap,
    UnitError,
    severity,
)
from draf_dist.data.corruption.sweep import CorruptedSplit, swap_partners
from draf_dist.data.corruption.training import Corruptor, JpegHook, TrainingCorruption

__all__ = [
    "AnyOperation",
    "CorruptedSplit",
    "Corruptor",
    "Downsample",
    "EhrMask",
    "EhrNoise",
    "GaussianNoise",
    "InputOperation",
    "Jpeg",
    "JpegHook",
    "Missing",
    "MissingNotAtRandom",
    "NotAtRandom",
    "Operation",
    "SignFlip",
    "Swap",
    "TrainingCorruption",
    "UnitError",
    "fit_not_at_random",
    "severity",
    "swap_partners",
]

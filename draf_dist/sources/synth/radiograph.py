"""Chest radiographs whose three opacities carry the evidence: contrast in fixed places, everything else orthogonal to it.

Linear intensity v = anatomy + noise + sum_k (CONTRAST + SLOPE squash(e_k)) T_k with compact, disjoint blobs T_k. Anatomy and noise
vary from study to study, but their projection on T_k is set to that of a lung of intensity LUNG. So e_k can be read back:

    squash(e_k) = (<v - LUNG, T_k> / |T_k|^2 - CONTRAST) / SLOPE

up to 8-bit rounding and clipping, while a network has to find the blobs among ribs, heart, grain and the scanner's gamma.
A corrupted radiograph (low dose) shows it: white noise of NOISE_PER_LEVEL intensity units per level, beside the extra variance
of its evidence.
"""

from functools import cache

import numpy as np

from draf_dist.sources.synth.draws import Draws
from draf_dist.sources.synth.evidence import Floats, squash
from draf_dist.sources.synth.population import Ints
from draf_dist.sources.synth.profiles import Scanner

SIDE = 96
LUNG = 85.0
CONTRAST = 20.0
SLOPE = 13.0
NOISE_PER_LEVEL = 6.0
GRID_CONTRAST = 40.0
# Row, column and radius of left_base, right_base (the patient's left is on the right), right_upper, in pixels.
BLOBS = ((62, 71), (66, 26), (32, 26))
BLOB_RADIUS = 11.0


@cache
def blobs() -> Floats:
    """T, (3, SIDE, SIDE): (1 - r^2 / R^2)^2 inside the radius, 0 outside."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    squared = np.stack([((rows - row) ** 2 + (columns - column) ** 2) / BLOB_RADIUS**2 for row, column in BLOBS])
    return np.asarray(np.clip(1 - squared, 0, None) ** 2)


def project(intensity: Floats) -> Floats:
    """<v - LUNG, T_k> / |T_k|^2 of linear intensities (n, SIDE, SIDE), (n, 3)."""
    flat = blobs().reshape(len(BLOBS), -1)
    return np.asarray((intensity.reshape(len(intensity), -1) - LUNG) @ flat.T / (flat**2).sum(axis=1))


def render(evidence: Floats, level: Ints, scanner: Scanner, draws: Draws) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Radiographs uint8 (n, SIDE, SIDE) of one site's scanner from evidence (n, 3) and corruption levels (n,)."""
    background = _anatomy(draws) + _texture(scanner, draws)
    background += NOISE_PER_LEVEL * level[:, None, None] * draws.normal("cxr noise", SIDE, SIDE)
    amplitude = CONTRAST + SLOPE * squash(evidence) - project(background)
    intensity = background + np.tensordot(amplitude, blobs(), axes=1)
    row, column = scanner.marker
    intensity[:, row : row + 6, column : column + 8] = 245.0
    return develop(intensity, scanner)


def develop(intensity: Floats, scanner: Scanner) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """What the scanner makes of linear intensities."""
    shown = 255 * (scanner.gain * np.clip(intensity, 0, 255) / 255) ** scanner.gamma + scanner.offset
    return np.asarray(np.clip(np.rint(shown), 0, 255).astype(np.uint8))


def _anatomy(draws: Draws) -> Floats:
    """A chest of this study's build, (n, SIDE, SIDE): body, lungs, heart, spine, ribs."""
    nuisance = draws.normal("anatomy", 8)[:, :, None, None]
    shift_x, shift_y, width, height, heart, brightness, rib_phase, tilt = (nuisance[:, i] for i in range(8))
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float64)
    x, y = columns - 48 - 0.8 * shift_x, rows - 50 - 0.8 * shift_y
    body = _inside((x / 45) ** 2 + ((y - 8) / 58) ** 4, 0.15)
    lungs = sum(_inside(((x - side * 21) / (15 + 0.7 * width)) ** 2 + (y / (33 + height)) ** 2, 0.3) for side in (-1, 1))
    heart_shape = _inside(((x - 3) / (10 + heart)) ** 2 + ((y - 16) / (11 + heart)) ** 2, 0.3)
    spine = np.clip(1 - (x / 5) ** 2, 0, None)
    # A triangle wave: ribs are bright stripes that fall towards the sides.
    stripes = np.abs(((y + 0.25 * np.abs(x) + 2 * rib_phase + tilt * x / 40) / 11) % 1.0 - 0.5)
    air = np.clip(lungs, 0, 1)
    tissue = (165 + 5 * brightness) * (1 - air) + (LUNG + 16 * (stripes - 0.25)) * air
    tissue = tissue + (178 - tissue) * np.clip(heart_shape, 0, 1) + 22 * spine * (1 - air)
    return np.asarray(18 + (tissue - 18) * body)


def _inside(distance: Floats, softness: float) -> Floats:
    """1 inside a shape (distance below 1), 0 outside, a cubic step between."""
    t = np.clip((1 + softness - distance) / (2 * softness), 0, 1)
    return np.asarray(t * t * (3 - 2 * t))


def _texture(scanner: Scanner, draws: Draws) -> Floats:
    """The scanner's own noise, (n, SIDE, SIDE): pixels, rows, columns, coarse grains, or pixels under stripes."""
    if scanner.texture == "white":
        return scanner.texture_sd * draws.normal("texture", SIDE, SIDE)
    if scanner.texture == "grid":
        return scanner.texture_sd * draws.normal("texture", SIDE, SIDE) + _stripes(*scanner.grid)
    if scanner.texture == "rows":
        return scanner.texture_sd * np.broadcast_to(draws.normal("texture", SIDE, 1), (len(draws.subject), SIDE, SIDE))
    if scanner.texture == "columns":
        return scanner.texture_sd * np.broadcast_to(draws.normal("texture", 1, SIDE), (len(draws.subject), SIDE, SIDE))
    coarse = draws.normal("texture", SIDE // 2, SIDE // 2)
    return scanner.texture_sd * coarse.repeat(2, axis=1).repeat(2, axis=2)


def _stripes(period: int, axis: int) -> Floats:
    """What an anti-scatter grid leaves on every image of a scanner, (SIDE, SIDE): a triangle wave of mean 0 along one axis."""
    place = np.indices((SIDE, SIDE))[axis] / period
    return np.asarray(GRID_CONTRAST * (np.abs(place % 1.0 - 0.5) - 0.25))

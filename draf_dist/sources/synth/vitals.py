"""Vital signs by the hour: levels of three variables and the slope of the pressure carry the evidence.

Over the hours that a variable was recorded, value = level + slope (t - 11.5 h) + residual, and the residual is orthogonal to both
terms on exactly these hours, so a least-squares line gives level and slope back. Corruption leaves gaps and makes the residual
(1 + level of corruption) times as large: its root mean square is exact too. spo2 carries nothing. Rows after the anchor shout the
label.
"""

from collections.abc import Iterator

import numpy as np

from draf_dist.sources.synth.evidence import Bools, Floats, squash
from draf_dist.sources.synth.local_units import written
from draf_dist.sources.synth.population import Ints
from draf_dist.sources.synth.profiles import VITALS
from draf_dist.sources.synth.site_cohort import OFFSET_H, SiteCohort

Row = tuple[str, ...]
HOURS = np.arange(OFFSET_H) - (OFFSET_H - 1) / 2

# In the order of VITALS: centre of the level; its units per unit of evidence or, where it carries none, of nuisance.
LEVEL_CENTRE = np.array([88.0, 20.0, 37.2, 85.0, 96.0])
LEVEL_SCALE = np.array([5.0, 1.3, 0.32, 6.0, 0.8])
SLOPE_SCALE = np.array([0.1, 0.03, 0.006, 0.35, 0.02])
RESIDUAL_RMS = np.array([1.5, 0.5, 0.1, 1.5, 0.5])
# Which component of the evidence is the level (heart rate, respiratory rate, temperature) and which the slope (pressure).
LEVELS = {0: 0, 1: 1, 2: 2}
SLOPES = {3: 3}

_NONSENSE = np.array([999.0, 0.0, 12.0, 999.0, 0.0])
_LEAK = {"heart_rate": (60.0, 145.0), "resp_rate": (12.0, 38.0), "map": (95.0, 45.0)}


def vitals_rows(cohort: SiteCohort) -> Iterator[Row]:
    """(study, time, code, value, unit) of one site: in the window where the modality is present, and around it."""
    valid, nonsense, empty = _recording(cohort)
    values = _values(cohort, valid)
    values = np.where(nonsense, _NONSENSE, values)
    for v, variable in enumerate(VITALS):
        study, hour = np.nonzero((valid | nonsense | empty)[:, :, v])
        minute = cohort.draws.integers(f"vitals minute {variable}", 2, 58, OFFSET_H)[study, hour]
        printed = written(variable, cohort.profile.vitals[variable][1], values[study, hour, v])
        shown = ["" if blank else text for blank, text in zip(empty[study, hour, v], printed, strict=True)]
        yield from _rows(cohort, variable, study, hour * 60 + minute, shown)
    yield from _before(cohort)
    yield from _after(cohort)


def fit_line(values: Floats, mask: Bools) -> tuple[Floats, Floats]:
    """Least-squares level (at mid-window) and slope per hour over the masked hours: (n, T, V) -> (n, V) each."""
    t = HOURS[None, :, None]
    weight = mask.astype(np.float64)
    filled = np.where(mask, values, 0.0)
    s0, s1, s2 = weight.sum(axis=1), (weight * t).sum(axis=1), (weight * t * t).sum(axis=1)
    r0, r1 = filled.sum(axis=1), (filled * t).sum(axis=1)
    determinant = s0 * s2 - s1 * s1
    return (s2 * r0 - s1 * r1) / determinant, (s0 * r1 - s1 * r0) / determinant


def _recording(cohort: SiteCohort) -> tuple[Bools, Bools, Bools]:
    """Which hours hold a good value, a nonsensical one, an empty cell: bool (n, T, V) each. Independent of label and evidence."""
    chosen = cohort.draws.uniform("vitals hours", OFFSET_H, len(VITALS))
    jitter = cohort.draws.integers("vitals gaps", -1, 2, len(VITALS))
    count = np.rint(OFFSET_H * (0.9 - 0.11 * cohort.level("vitals")))[:, None] + jitter
    rank = chosen.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    here = cohort.present("vitals")[:, None, None]
    valid = here & (rank < count[:, None, :])
    dirt = np.where(here & ~valid, cohort.draws.uniform("vitals dirt", OFFSET_H, len(VITALS)), 1.0)
    return valid, dirt < 0.05, (dirt >= 0.05) & (dirt < 0.1)


def _values(cohort: SiteCohort, valid: Bools) -> Floats:
    level_z, slope_z = cohort.draws.normal("vitals level", len(VITALS)), cohort.draws.normal("vitals slope", len(VITALS))
    evidence = squash(cohort.evidence("vitals"))
    for v, k in LEVELS.items():
        level_z[:, v] = evidence[:, k]
    for v, k in SLOPES.items():
        slope_z[:, v] = evidence[:, k]
    level, slope = LEVEL_CENTRE + LEVEL_SCALE * level_z, SLOPE_SCALE * slope_z
    line = level[:, None, :] + slope[:, None, :] * HOURS[None, :, None]
    values = line + _residual(cohort, valid)
    values[:, :, VITALS.index("spo2")] = np.minimum(values[:, :, VITALS.index("spo2")], 100.0)
    return np.asarray(values)


def _residual(cohort: SiteCohort, valid: Bools) -> Floats:
    raw = cohort.draws.normal("vitals residual", OFFSET_H, len(VITALS))
    counted = np.where(cohort.present("vitals")[:, None, None], valid, True)
    level, slope = fit_line(raw, counted)
    raw = np.where(counted, raw - level[:, None, :] - slope[:, None, :] * HOURS[None, :, None], 0.0)
    rms = np.sqrt((raw**2).sum(axis=1) / counted.sum(axis=1))
    target = RESIDUAL_RMS * (1 + cohort.level("vitals")[:, None])
    return np.asarray(raw * (target / rms)[:, None, :])


def _before(cohort: SiteCohort) -> Iterator[Row]:
    """An earlier stay of some: before the window, and about nothing."""
    study = np.flatnonzero(cohort.draws.uniform("vitals before") < 0.1)
    minutes = -60 * cohort.draws.integers("vitals before hour", 30, 300)[study]
    printed = written(
        "heart_rate", cohort.profile.vitals["heart_rate"][1], 60 + 80 * cohort.draws.uniform("vitals before value")[study]
    )
    yield from _rows(cohort, "heart_rate", study, minutes, printed)


def _after(cohort: SiteCohort) -> Iterator[Row]:
    """After the anchor of some: what dying and recovering patients look like. Must never enter."""
    study = np.flatnonzero(cohort.draws.uniform("vitals after") < 0.5)
    for variable, (survived, died) in _LEAK.items():
        noise = cohort.draws.normal(f"vitals after {variable}")[study]
        values = np.where(cohort.y[study] == 1, died, survived) + 2 * noise
        minutes = OFFSET_H * 60 + cohort.draws.integers(f"vitals after minute {variable}", 1, 600)[study]
        yield from _rows(cohort, variable, study, minutes, written(variable, cohort.profile.vitals[variable][1], values))


def _rows(cohort: SiteCohort, variable: str, study: Ints, minutes: Ints, shown: list[str]) -> Iterator[Row]:
    code, unit = cohort.profile.vitals[variable]
    times = np.datetime_as_string(cohort.admission[study] + minutes.astype("timedelta64[m]"), unit="s")
    for row, time, text in zip(study, times, shown, strict=True):
        yield cohort.study_id[row], str(time), code, text, unit

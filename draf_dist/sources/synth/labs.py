"""Laboratory values: the last good value before the anchor carries the evidence.

Earlier values in the window are the evidence plus independent noise: given the last one they say nothing about the label.
glucose and potassium carry nothing. The haemolysis index tells how much a sample is corrupted: below 20 when clean, in
[40 level, 40 level + 20) when corrupted. Rows after the anchor shout the label.
"""

from collections.abc import Iterator

import numpy as np

from draf_dist.sources.synth.evidence import Floats, squash
from draf_dist.sources.synth.local_units import written
from draf_dist.sources.synth.population import Ints
from draf_dist.sources.synth.site_cohort import OFFSET_H, SiteCohort

Row = tuple[str, ...]

# Canonical value = centre exp(scale z), or centre + scale z for those in LINEAR; z is evidence or, for the others, nuisance.
CENTRE = {"creatinine": 90.0, "urea": 7.0, "lactate": 1.6, "haemoglobin": 12.0, "glucose": 7.0, "potassium": 4.2}
SCALE = {"creatinine": 0.3, "urea": 0.28, "lactate": 0.28, "haemoglobin": 0.9, "glucose": 0.2, "potassium": 0.35}
LINEAR = ("haemoglobin", "potassium")
CARRIERS = ("creatinine", "urea", "lactate", "haemoglobin")
HAEMOLYSIS_PER_LEVEL = 40

_NONSENSE = 1e5
_LEAK = {"creatinine": (60.0, 400.0), "lactate": (0.7, 12.0), "potassium": (4.0, 7.0)}
_EARLIER_NOISE = 0.6
# Start and end in minutes after the admission of the last reading and of two earlier ones.
_LAST, _EARLIER = (14 * 60, 23 * 60 + 50), ((6 * 60, 13 * 60), (10, 5 * 60))


def labs_rows(cohort: SiteCohort) -> Iterator[Row]:
    """(study, time, code, value, unit) of one site: in the window where the modality is present, and around it."""
    everyone = np.arange(len(cohort.index))
    for variable in CENTRE:
        yield from _in_window(cohort, variable)
    index = HAEMOLYSIS_PER_LEVEL * cohort.level("labs") + cohort.draws.integers("haemolysis", 0, 20)
    yield from _rows(cohort, "haemolysis_index", everyone[cohort.present("labs")], _LAST, "haemolysis", index.astype(np.float64))
    before = everyone[cohort.draws.uniform("labs before") < 0.1]
    yield from _rows(
        cohort, "creatinine", before, (-300 * 60, -30 * 60), "before", 60 + 300 * cohort.draws.uniform("labs before value")
    )
    after = everyone[cohort.draws.uniform("labs after") < 0.5]
    for variable, (survived, died) in _LEAK.items():
        spread = 1 + 0.1 * cohort.draws.uniform(f"labs after {variable}")
        values = np.where(cohort.y == 1, died, survived) * spread
        yield from _rows(cohort, variable, after, (OFFSET_H * 60 + 1, OFFSET_H * 60 + 900), "after", values)


def value_of(variable: str, z: Floats) -> Floats:
    """The canonical value of evidence or nuisance z, which is already squashed."""
    if variable in LINEAR:
        return np.asarray(CENTRE[variable] + SCALE[variable] * z)
    return np.asarray(CENTRE[variable] * np.exp(SCALE[variable] * z))


def _in_window(cohort: SiteCohort, variable: str) -> Iterator[Row]:
    present, z = cohort.present("labs"), cohort.draws.normal(f"labs {variable}")
    good = present
    if variable in CARRIERS:
        k = CARRIERS.index(variable)
        z, good = cohort.evidence("labs")[:, k], cohort.observed("labs")[:, k]
        yield from _dirt(cohort, variable, np.flatnonzero(present & ~good))
    num_readings = cohort.draws.integers(f"labs readings {variable}", 1, 4)
    for i, window in enumerate(_EARLIER):
        rows = np.flatnonzero(good & (num_readings > i + 1))
        earlier = z + _EARLIER_NOISE * cohort.draws.normal(f"labs earlier {i} {variable}")
        yield from _rows(cohort, variable, rows, window, f"earlier {i}", value_of(variable, squash(earlier)))
    yield from _rows(cohort, variable, np.flatnonzero(good), _LAST, "last", value_of(variable, squash(z)))


def _dirt(cohort: SiteCohort, variable: str, study: Ints) -> Iterator[Row]:
    """Instead of a value: nothing, an empty cell, a word, or nonsense. All four mean not observed."""
    kind = cohort.draws.integers(f"labs dirt {variable}", 0, 4)
    values = np.full(len(kind), _NONSENSE)
    for which, text in ((1, ""), (2, "haemolysed"), (3, None)):
        for row in _rows(cohort, variable, study[kind[study] == which], _LAST, "dirt", values):
            yield row if text is None else (*row[:3], text, row[4])


def _rows(cohort: SiteCohort, variable: str, study: Ints, window: tuple[int, int], name: str, values: Floats) -> Iterator[Row]:
    """One row for each listed study at a minute within the window; values (n,) are those of all studies of the site."""
    code, unit = cohort.profile.labs[variable]
    minutes = cohort.draws.integers(f"labs minute {name} {variable}", *window)[study]
    times = np.datetime_as_string(cohort.admission[study] + minutes.astype("timedelta64[m]"), unit="s")
    for row, time, text in zip(study, times, written(variable, unit, values[study]), strict=True):
        yield cohort.study_id[row], str(time), code, text, unit

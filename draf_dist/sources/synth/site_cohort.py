"""The studies of one site, with what its files call them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from draf_dist.sources.synth.draws import Draws
from draf_dist.sources.synth.evidence import MODALITIES, Bools, Floats
from draf_dist.sources.synth.population import Ints, Population
from draf_dist.sources.synth.profiles import SiteProfile, site_profile

OFFSET_H = 24
_EPOCH = np.datetime64("2018-01-01T00:00", "m")
_NUM_MINUTES = 4 * 365 * 24 * 60

Times = NDArray[np.datetime64]


@dataclass(frozen=True)
class SiteCohort:
    """n studies of one site. index: their rows in the population. admission: datetime64[m] (n,)."""

    profile: SiteProfile
    population: Population
    index: Ints
    draws: Draws
    study_id: list[str]
    subject_id: list[str]
    admission: Times

    @property
    def anchor(self) -> list[str]:
        """ISO 8601 of admission + OFFSET_H, to the second, as the source writes it."""
        return [str(time) for time in np.datetime_as_string(self.admission + np.timedelta64(OFFSET_H, "h"), unit="s")]

    @property
    def y(self) -> Ints:
        """Label (n,)."""
        return self.population.y[self.index]

    def present(self, modality: str) -> Bools:
        """Whether the modality is there, (n,)."""
        return np.asarray(self.population.present[self.index, MODALITIES.index(modality)])

    def level(self, modality: str) -> Ints:
        """Corruption level 0..NUM_LEVELS, (n,)."""
        return np.asarray(self.population.level[self.index, MODALITIES.index(modality)])

    def evidence(self, modality: str) -> Floats:
        """(n, k)."""
        return self.population.evidence[modality][self.index]

    def observed(self, modality: str) -> Bools:
        """(n, k)."""
        return self.population.observed[modality][self.index]


def site_cohort(population: Population, number: int) -> SiteCohort:
    """The studies of site `number`, in the order of the population."""
    index = np.flatnonzero(population.site == number)
    profile = site_profile(number)
    draws = population.draws.rows(index)
    # The number in a study's name is the subject's and the visit's: nothing about the label.
    study_id = [f"{profile.prefix}-{s:06d}{v}" for s, v in zip(draws.subject, draws.visit, strict=True)]
    subject_id = [f"P{s:06d}" for s in draws.subject]
    admission = _EPOCH + draws.integers("admission", 0, _NUM_MINUTES).astype("timedelta64[m]")
    return SiteCohort(profile, population, index, draws, study_id, subject_id, admission)

"""The planted truth of a cohort: who, where, the label, what each modality knows of it, what is missing or corrupted."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from draf_dist.sources.synth.draws import Draws
from draf_dist.sources.synth.evidence import (
    CODES,
    EVIDENCE,
    EXTRA_SD,
    MODALITIES,
    NUM_LEVELS,
    PREVALENCE,
    Bools,
    Floats,
    posterior,
    prior_logit,
)
from draf_dist.sources.synth.profiles import site_profile

SECOND_SITE_RATE = 0.03
# Room for the subjects of one cohort, and of one site's newcomers.
NEWCOMERS = 1_000_000
# Components that a hospital did not record, or recorded as nonsense, in a modality that is there.
UNOBSERVED_RATE = {"cxr": 0.0, "vitals": 0.0, "labs": 0.06, "history": 0.02}

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Population:
    """n studies. subject, visit, site, y: int64 (n,); visit 1 is that of a subject at a second site.

    evidence: modality -> (n, k), what the files will show, corruption included. observed: modality -> bool (n, k). codes: bool
    (n, 10). present: bool (n, M). level: int64 (n, M), 0 clean to NUM_LEVELS; 0 where absent. llr: (n, M), nats, 0 where absent.
    sites: the numbers of all sites, also of those without a study.
    """

    sites: tuple[int, ...]
    draws: Draws
    site: Ints
    y: Ints
    evidence: dict[str, Floats]
    observed: dict[str, Bools]
    codes: Bools
    present: Bools
    level: Ints
    llr: Floats

    @property
    def severity(self) -> Floats:
        """(n, M) in [0, 1]."""
        return self.level / NUM_LEVELS

    @property
    def posterior(self) -> Floats:
        """p(died | everything present, and which of it is corrupted how much), (n,)."""
        return posterior(prior_logit() + self.llr.sum(axis=1))


def draw_population(num_sites: int, num_subjects: int, seed: int) -> Population:
    """A cohort of num_subjects subjects; with two sites or more, some of them have one more study at another site.

    The label of a second study is drawn anew: given its own files, a study's posterior depends on no other study.
    """
    return _known(*_studies(num_sites, num_subjects, seed), tuple(range(num_sites)))


def draw_newcomers(number: int, num_subjects: int, seed: int, *, first_subject: int = 0) -> Population:
    """Subjects of site `number` (from 0) whom no cohort has: its first_subject-th and those that follow.

    The numbers of a site's newcomers lie apart from those of cohorts (fewer than NEWCOMERS subjects) and of other sites.
    """
    subject = NEWCOMERS * (number + 1) + first_subject + np.arange(num_subjects, dtype=np.int64)
    return _known(Draws(seed, subject, np.zeros_like(subject)), np.full_like(subject, number), (number,))


def _known(draws: Draws, site: Ints, sites: tuple[int, ...]) -> Population:
    """Everything about the studies that the draws are of."""
    y = (draws.uniform("label") < PREVALENCE).astype(np.int64)
    present, level = _presence(draws, site)
    severity = level / NUM_LEVELS
    evidence, observed = {}, {}
    for m, (name, model) in enumerate(EVIDENCE.items()):
        k = len(model.names)
        clean = model.sample(y, draws.normal(f"evidence.{name}", k))
        evidence[name] = clean + EXTRA_SD * severity[:, m, None] * draws.normal(f"corruption.{name}", k)
        recorded = draws.uniform(f"observed.{name}", k) >= UNOBSERVED_RATE[name]
        observed[name] = recorded & present[:, m, None]
    codes = CODES.sample(y, severity[:, MODALITIES.index("history")], draws.uniform("codes", len(CODES.names)))
    llr = exact_llr(evidence, observed, codes, severity)
    return Population(sites, draws, site, y, evidence, observed, codes, present, level, llr)


def exact_llr(evidence: dict[str, Floats], observed: dict[str, Bools], codes: Bools, severity: Floats) -> Floats:
    """The ratios log p(modality | died, severity) - log p(modality | survived, severity), (n, M)."""
    columns = [model.llr(evidence[name], observed[name], severity[:, m]) for m, (name, model) in enumerate(EVIDENCE.items())]
    history = MODALITIES.index("history")
    columns[history] = columns[history] + CODES.llr(codes, severity[:, history])
    return np.stack(columns, axis=1)


def _studies(num_sites: int, num_subjects: int, seed: int) -> tuple[Draws, Ints]:
    subject = np.arange(num_subjects, dtype=np.int64)
    first = Draws(seed, subject, np.zeros_like(subject))
    home = subject % num_sites
    if num_sites == 1:
        return first, home
    twice = np.flatnonzero(first.uniform("second site") < SECOND_SITE_RATE)
    elsewhere = (home[twice] + first.rows(twice).integers("which second site", 1, num_sites)) % num_sites
    visit = np.concatenate([first.visit, np.ones(len(twice), dtype=np.int64)])
    return Draws(seed, np.concatenate([subject, twice]), visit), np.concatenate([home, elsewhere])


def _presence(draws: Draws, site: Ints) -> tuple[Bools, Ints]:
    """Presence and corruption level, (n, M) each: a function of the site and of nothing else about the study."""
    profiles = [site_profile(number) for number in range(int(site.max()) + 1)]
    missing = np.array([[profile.missing[m] for m in MODALITIES] for profile in profiles])
    corrupted = np.array([[profile.corrupted[m] for m in MODALITIES] for profile in profiles])
    m = len(MODALITIES)
    present = draws.uniform("missing", m) >= missing[site]
    hit = present & (draws.uniform("corrupted", m) < corrupted[site])
    return present, np.where(hit, draws.integers("level", 1, NUM_LEVELS + 1, m), 0)

"""studies.csv: one row a study with history (age, sex, diagnoses) and outcome.

Age and codes carry evidence, sex none. coding_completeness tells how much the history is corrupted: 96 to 99 when clean, in
[90 - 15 level, 99 - 15 level) when corrupted.
"""

from collections.abc import Iterator

import numpy as np

from draf_dist.sources.synth.evidence import CODES, Bools, squash
from draf_dist.sources.synth.site_cohort import SiteCohort

Row = tuple[str, ...]
COLUMNS = ("study_id", "subject_id", "admission", "age", "sex", "coding_completeness", "diagnoses", "outcome")

AGE_CENTRE, AGE_SCALE = 60.0, 6.5
AGE_RANGE = (15.0, 110.0)
_NONSENSE_AGE = "999"
# Outcome not yet known: such a study can't be used.
UNKNOWN_OUTCOME_RATE = 0.004
# A code that no variable of the card stands for.
OTHER_DIAGNOSIS = "OTHER"


def columns(cohort: SiteCohort) -> tuple[str, ...]:
    """The header as this site writes it."""
    return tuple(cohort.profile.columns.get(name, name) for name in COLUMNS)


def studies_rows(cohort: SiteCohort) -> Iterator[Row]:
    """One row for every study, in COLUMNS order."""
    profile, draws = cohort.profile, cohort.draws
    sex = np.where(draws.uniform("sex") < 0.5, profile.female, profile.male)
    level = cohort.level("history")
    completeness = np.where(level > 0, 90 - 15 * level + draws.integers("coding", 0, 9), 96 + draws.integers("coding clean", 0, 4))
    outcome = np.where(cohort.y == 1, profile.died, profile.survived)
    outcome[unknown_outcome(cohort)] = ""
    admission = np.datetime_as_string(cohort.admission, unit="s")
    shown = zip(
        cohort.study_id, cohort.subject_id, admission, _ages(cohort), sex, completeness, _diagnoses(cohort), outcome, strict=True
    )
    yield from (tuple(str(cell) for cell in row) for row in shown)


def unknown_outcome(cohort: SiteCohort) -> Bools:
    """Studies that are planned to be rejected, (n,)."""
    return cohort.draws.uniform("outcome unknown") < UNKNOWN_OUTCOME_RATE


def _ages(cohort: SiteCohort) -> list[str]:
    age = np.rint(AGE_CENTRE + AGE_SCALE * squash(cohort.evidence("history")[:, 0])).astype(np.int64)
    nonsense = cohort.draws.uniform("age dirt") < 0.5
    observed = cohort.observed("history")[:, 0]
    return [str(a) if good else _NONSENSE_AGE if bad else "" for a, good, bad in zip(age, observed, nonsense, strict=True)]


def _diagnoses(cohort: SiteCohort) -> list[str]:
    codes = cohort.population.codes[cohort.index]
    other = cohort.draws.uniform("other diagnosis") < 0.3
    local = [cohort.profile.diagnoses[name] for name in CODES.names]
    return [
        ";".join([code for code, has in zip(local, row, strict=True) if has] + [OTHER_DIAGNOSIS] * int(more))
        for row, more in zip(codes, other, strict=True)
    ]

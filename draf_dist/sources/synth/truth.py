"""The planted truth on disk: truth.csv, one row a study, and truth.json, the parameters it follows from.

    logit p(died | any subset of what is present) = prior_logit + sum of llr over the subset

holds for every subset because the modalities are independent given the label.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from draf_dist.errors import DataError, SpecError, explain
from draf_dist.schema.identity import study_uid
from draf_dist.sources.synth.admissions import unknown_outcome
from draf_dist.sources.synth.evidence import (
    CODES,
    EVIDENCE,
    EXTRA_SD,
    FLIP,
    MODALITIES,
    PREVALENCE,
    Floats,
    binary_entropy,
    prior_logit,
    strength,
)
from draf_dist.sources.synth.population import Ints, Population
from draf_dist.sources.synth.profiles import site_profile
from draf_dist.sources.synth.site_cohort import SiteCohort

_KEYS = ("site", "study_id", "subject_id", "anchor", "outcome_known", "y", "prior_logit", "posterior")


@dataclass(frozen=True)
class TruthRow:
    """What is known of one study. llr, present, corrupted, severity: by modality; llr is in nats and 0 where absent."""

    site: str
    y: int
    prior_logit: float
    posterior: float
    llr: dict[str, float]
    present: dict[str, bool]
    corrupted: dict[str, bool]
    severity: dict[str, float]


def write_truth(folder: Path, population: Population, cohorts: Sequence[SiteCohort], seed: int) -> None:
    """Writes truth.csv and truth.json."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "truth.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_columns())
        for cohort in cohorts:
            writer.writerows(_rows(cohort))
    text = json.dumps(describe(population, seed), indent=2, sort_keys=True)
    (folder / "truth.json").write_text(text + "\n", encoding="utf-8")


def posterior_by_uid(truth_dir: Path, subject_key: bytes) -> dict[int, TruthRow]:
    """The truth of every study under the uid that a release made with this subject key gives it.

    Raises:
        SpecError: there is no truth.csv in the folder.
        DataError: truth.csv lacks a column.
    """
    path = truth_dir / "truth.csv"
    if not path.is_file():
        raise SpecError(explain(str(path), expected="the planted truth", found="no such file", remedy="Give the folder `truth`."))
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = sorted(set(_columns()) - set(reader.fieldnames or ()))
        if missing:
            found = f"none named {', '.join(missing)}"
            raise DataError(explain(str(path), expected="the columns that synth writes", found=found, remedy="Synthesise anew."))
        return {
            study_uid(subject_key, site=row["site"], subject=row["subject_id"], anchor=row["anchor"]): _parse(row) for row in reader
        }


def describe(population: Population, seed: int) -> dict[str, object]:
    """truth.json: parameters, how much each modality carries, and what the best possible classifier scores on this cohort."""
    sites = [site_profile(number) for number in population.sites]
    return {
        "seed": seed,
        "num_studies": len(population.y),
        "prevalence": PREVALENCE,
        "label_entropy_nats": float(binary_entropy(np.asarray(PREVALENCE))),
        "extra_sd_at_severity_1": EXTRA_SD,
        "code_flip_at_severity_1": FLIP,
        "evidence": {
            name: {"components": given.names, "shift": given.shift, "covariance": given.covariance.tolist()}
            for name, given in EVIDENCE.items()
        },
        "codes": asdict(CODES),
        "alone_clean_complete": {name: strength(name) for name in MODALITIES},
        "missing_rate": {site.name: site.missing for site in sites},
        "corrupted_rate": {site.name: site.corrupted for site in sites},
        "bayes_optimal": scores(population.posterior, population.y),
    }


def scores(probability: Floats, y: Ints) -> dict[str, float | None]:
    """NLL in nats and AUROC of probabilities; an AUROC needs both labels and is None without."""
    nll = -np.where(y == 1, np.log(probability), np.log1p(-probability)).mean()
    num_died = int(y.sum())
    num_pairs = num_died * (len(y) - num_died)
    # Rank-sum statistic; ties get the mean of their ranks.
    _, inverse, count = np.unique(probability, return_inverse=True, return_counts=True)
    rank = (count.cumsum() - (count - 1) / 2)[inverse]
    auroc = float((rank[y == 1].sum() - num_died * (num_died + 1) / 2) / num_pairs) if num_pairs else None
    return {"nll": float(nll), "auroc": auroc}


def _columns() -> list[str]:
    by_modality = [f"{kind}_{name}" for kind in ("llr", "present", "corrupted", "severity") for name in MODALITIES]
    latent = [f"evidence_{name}_{component}" for name, given in EVIDENCE.items() for component in given.names]
    return [*_KEYS, *by_modality, *latent, *(f"code_{name}" for name in CODES.names)]


def _rows(cohort: SiteCohort) -> Iterator[list[str]]:
    population, anchors, unknown = cohort.population, cohort.anchor, unknown_outcome(cohort)
    prior = f"{prior_logit():.12g}"
    posterior, severity = population.posterior, population.severity
    for i, n in enumerate(cohort.index):
        keys = [cohort.profile.name, cohort.study_id[i], cohort.subject_id[i], anchors[i]]
        keys += [str(int(not unknown[i])), str(population.y[n]), prior]
        by_modality = [
            *(f"{value:.12g}" for value in population.llr[n]),
            *(str(int(value)) for value in population.present[n]),
            *(str(int(value > 0)) for value in population.level[n]),
            *(f"{value:.12g}" for value in severity[n]),
        ]
        latent = [
            f"{value:.12g}" if seen else ""
            for name in MODALITIES
            for value, seen in zip(population.evidence[name][n], population.observed[name][n], strict=True)
        ]
        yield [*keys, f"{posterior[n]:.12g}", *by_modality, *latent, *(str(int(code)) for code in population.codes[n])]


def _parse(row: dict[str, str]) -> TruthRow:
    return TruthRow(
        site=row["site"],
        y=int(row["y"]),
        prior_logit=float(row["prior_logit"]),
        posterior=float(row["posterior"]),
        llr={name: float(row[f"llr_{name}"]) for name in MODALITIES},
        present={name: row[f"present_{name}"] == "1" for name in MODALITIES},
        corrupted={name: row[f"corrupted_{name}"] == "1" for name in MODALITIES},
        severity={name: float(row[f"severity_{name}"]) for name in MODALITIES},
    )

"""The planted truth is the truth: closed forms against references, calibration, and evidence read back from the raw bytes."""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import expit, log_expit, ndtr
from scipy.stats import chi2_contingency, multivariate_normal

from draf_dist.schema.identity import study_uid
from draf_dist.schema.study import Rejection, Study
from draf_dist.sources.card import load_card
from draf_dist.sources.hospital_export import HospitalExport
from draf_dist.sources.synth import admissions, labs, radiograph, synthesise, vitals
from draf_dist.sources.synth.evidence import BOUND, CODES, EVIDENCE, EXTRA_SD, MODALITIES, NUM_LEVELS, prior_logit, strength
from draf_dist.sources.synth.population import Population, draw_population, exact_llr
from draf_dist.sources.synth.profiles import NAMES, Scanner, site_profile
from draf_dist.sources.synth.truth import TruthRow, posterior_by_uid, scores

KEY = b"public"
NUM_SITES = 4


@pytest.fixture(scope="module")
def population() -> Population:
    """Latents only: no file is written."""
    torch.set_num_threads(1)
    return draw_population(NUM_SITES, 60_000, 7)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("synth")
    synthesise(out, num_sites=NUM_SITES, num_subjects=400, seed=3)
    return out


@pytest.fixture(scope="module")
def studies(export: Path) -> list[tuple[Study, TruthRow]]:
    """Every study as the source reads it from the raw bytes, with its truth."""
    truth = posterior_by_uid(export / "truth", KEY)
    found = HospitalExport(load_card(export / "card.yaml"), export / "raw").studies()
    return [
        (study, truth[study_uid(KEY, site=study.site, subject=study.subject, anchor=study.anchor)])
        for study in found
        if not isinstance(study, Rejection)
    ]


def nll(logit: NDArray[np.float64], y: NDArray[np.int64]) -> float:
    return float(-log_expit(np.where(y == 1, logit, -logit)).mean())


@pytest.mark.parametrize("name", MODALITIES)
@pytest.mark.parametrize("severity", [0.0, 0.4, 1.0])
def test_log_likelihood_ratio_is_that_of_the_two_densities(name: str, severity: float) -> None:
    model = EVIDENCE[name]
    k = len(model.names)
    evidence = np.random.default_rng(0).normal(size=(2**k, k), scale=2.0)
    observed = (np.arange(2**k)[:, None] >> np.arange(k)) & 1 == 1
    found = model.llr(evidence, observed, np.full(2**k, severity))
    for row in range(2**k):
        seen = np.flatnonzero(observed[row])
        if len(seen) == 0:
            assert found[row] == 0.0
            continue
        covariance = (model.covariance + (EXTRA_SD * severity) ** 2 * np.eye(k))[np.ix_(seen, seen)]
        died = multivariate_normal(np.asarray(model.shift)[seen], covariance).logpdf(evidence[row, seen])
        survived = multivariate_normal(np.zeros(len(seen)), covariance).logpdf(evidence[row, seen])
        assert found[row] == pytest.approx(died - survived, abs=1e-10)


def test_codes_flipped_half_the_time_would_say_nothing() -> None:
    codes = np.random.default_rng(0).random((50, len(CODES.names))) < 0.3
    # FLIP is 0.4 at severity 1, so severity 1.25 is a coin.
    assert np.abs(CODES.llr(codes, np.full(50, 1.25))).max() < 1e-12
    assert np.abs(CODES.llr(codes, np.zeros(50))).max() > 0.5


@pytest.mark.parametrize("name", ["cxr", "vitals", "labs"])
def test_auroc_alone_is_that_of_two_normals(name: str) -> None:
    found = strength(name)
    assert found["auroc"] == pytest.approx(float(ndtr(found["separation"] / np.sqrt(2))), abs=1e-12)


def test_strength_of_every_modality_is_met_by_clean_complete_samples(population: Population) -> None:
    y = population.y
    for m, name in enumerate(MODALITIES):
        clean = population.present[:, m] & (population.level[:, m] == 0) & population.observed[name].all(axis=1)
        found = scores(expit(prior_logit() + population.llr[clean, m]), y[clean])
        entropy = -(0.3 * np.log(0.3) + 0.7 * np.log(0.7))
        assert found["auroc"] == pytest.approx(strength(name)["auroc"], abs=0.01)
        assert found["nll"] == pytest.approx(entropy - strength(name)["nats"], abs=0.012)


@pytest.mark.parametrize("subset", [MODALITIES, ("cxr",), ("vitals", "labs"), ("history",), ()])
def test_posterior_of_any_subset_is_calibrated(population: Population, subset: tuple[str, ...]) -> None:
    columns = [MODALITIES.index(name) for name in subset]
    p = expit(prior_logit() + population.llr[:, columns].sum(axis=1))
    order = p.argsort(kind="stable")
    for part in np.array_split(order, 15):
        error = population.y[part].mean() - p[part].mean()
        assert abs(error) < 4.5 * np.sqrt((p[part] * (1 - p[part])).mean() / len(part))


def test_corrupted_studies_alone_are_calibrated_too(population: Population) -> None:
    for m in range(len(MODALITIES)):
        for level in range(1, NUM_LEVELS + 1):
            rows = population.level[:, m] == level
            p = population.posterior[rows]
            error = population.y[rows].mean() - p.mean()
            assert abs(error) < 4.5 * np.sqrt((p * (1 - p)).mean() / rows.sum())


def test_nothing_beats_the_posterior(population: Population) -> None:
    y, llr = population.y, population.llr
    logit = prior_logit() + llr.sum(axis=1)
    best = nll(logit, y)
    wrong = {f"scaled {s}": s * logit for s in (0.8, 0.9, 1.1, 1.25)} | {f"shifted {s}": logit + s for s in (-0.15, 0.15)}
    wrong |= {f"without {name}": logit - llr[:, m] for m, name in enumerate(MODALITIES)}
    trusting = exact_llr(population.evidence, population.observed, population.codes, np.zeros_like(population.severity))
    wrong["corruption not noticed"] = prior_logit() + trusting.sum(axis=1)
    wrong["corrupted thrown away"] = prior_logit() + np.where(population.level > 0, 0.0, llr).sum(axis=1)
    assert {name: nll(other, y) for name, other in wrong.items() if nll(other, y) <= best} == {}
    # In expectation the NLL of the truth is its own entropy.
    p = expit(logit)
    assert best == pytest.approx(float(-(p * np.log(p) + (1 - p) * np.log1p(-p)).mean()), abs=0.006)


def test_missing_and_corrupted_say_nothing_about_the_label(population: Population) -> None:
    for site in range(NUM_SITES):
        at = population.site == site
        y = population.y[at]
        assert abs(y.mean() - 0.3) < 4.5 * np.sqrt(0.21 / at.sum())
        for m in range(len(MODALITIES)):
            state = np.where(population.present[at, m], population.level[at, m], -1)
            table = np.array([[np.sum((state == s) & (y == label)) for s in np.unique(state)] for label in (0, 1)])
            assert chi2_contingency(table).pvalue > 1e-4


def test_evidence_read_back_from_the_raw_bytes_gives_the_posterior(studies: list[tuple[Study, TruthRow]]) -> None:
    truth = np.array([row.posterior for _, row in studies])
    logit = np.array([prior_logit() + sum(read_llr(study).values()) for study, _ in studies])
    p = np.clip(expit(logit), 1e-12, 1 - 1e-12)
    divergence = truth * np.log(truth / p) + (1 - truth) * np.log((1 - truth) / (1 - p))
    print(f"mean KL {divergence.mean():.2e}, largest {divergence.max():.2e} nats over {len(p)} studies")
    assert divergence.mean() < 1e-4


def test_corruption_is_visible_in_the_raw_bytes(studies: list[tuple[Study, TruthRow]]) -> None:
    for study, row in studies:
        for name in study.inputs:
            assert READ_LEVEL[name](study) == round(row.severity[name] * NUM_LEVELS), name


def test_a_label_leaks_after_the_anchor(export: Path) -> None:
    """The trap is real: whoever takes the latest value instead of the latest before the anchor scores too well."""
    truth = {(row["site"], row["study_id"]): row for row in read_csv(export / "truth" / "truth.csv")}
    inside, anywhere, y = [], [], []
    for site in NAMES:
        code = site_profile(NAMES.index(site)).labs["lactate"][0]
        by_study: dict[str, list[tuple[str, float]]] = {}
        for row in read_csv(export / "raw" / site / "labs.csv"):
            if row["code"] == code and row["value"] not in ("", "haemolysed"):
                by_study.setdefault(row["study_id"], []).append((row["time"], float(row["value"])))
        for study_id, values in by_study.items():
            known = truth[site, study_id]
            before = [pair for pair in values if pair[0] <= known["anchor"]]
            if not before or max(values) == max(before):
                continue
            scale = 9.008 if site_profile(NAMES.index(site)).labs["lactate"][1] == "mg/dL" else 1.0
            inside.append(max(before)[1] / scale)
            anywhere.append(max(values)[1] / scale)
            y.append(int(known["y"]))
    label = np.array(y)
    assert len(label) > 100
    fair, leaking = (scores(expit(np.log(values)), label)["auroc"] for values in (inside, anywhere))
    assert fair is not None
    assert leaking is not None
    assert fair < 0.85
    assert leaking > 0.99


def read_csv(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


# Readers: what a perfect network would do. They know the model, not the study.


def unsquash(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(BOUND * np.arctanh(np.clip(x / BOUND, -1 + 1e-9, 1 - 1e-9)))


def linear_intensity(study: Study) -> NDArray[np.float64]:
    scanner = scanner_of(study)
    shown = np.clip(study.inputs["cxr"][0].astype(np.float64) - scanner.offset, 0, None)
    return np.asarray(255 * (shown / 255) ** (1 / scanner.gamma) / scanner.gain)


def scanner_of(study: Study) -> Scanner:
    return site_profile(NAMES.index(study.site)).scanner


def read_cxr(study: Study) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    amplitude = radiograph.project(linear_intensity(study)[None])[0]
    return unsquash((amplitude - radiograph.CONTRAST) / radiograph.SLOPE), np.ones(3, bool)


def read_vitals(study: Study) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    values = study.inputs["vitals"].astype(np.float64)
    level, slope = (found[0] for found in vitals.fit_line(values[None], ~np.isnan(values)[None]))
    squashed = np.empty(4)
    for v, k in vitals.LEVELS.items():
        squashed[k] = (level[v] - vitals.LEVEL_CENTRE[v]) / vitals.LEVEL_SCALE[v]
    for v, k in vitals.SLOPES.items():
        squashed[k] = slope[v] / vitals.SLOPE_SCALE[v]
    return unsquash(squashed), np.ones(4, bool)


def read_labs(study: Study) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    values = study.inputs["labs"][0, :4].astype(np.float64)
    squashed = [
        (value - labs.CENTRE[name]) / labs.SCALE[name]
        if name in labs.LINEAR
        else np.log(value / labs.CENTRE[name]) / labs.SCALE[name]
        for name, value in zip(labs.CARRIERS, values, strict=True)
    ]
    return unsquash(np.nan_to_num(squashed)), ~np.isnan(values)


def read_history(study: Study) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    age = study.inputs["history"][0, :1].astype(np.float64)
    return unsquash(np.nan_to_num((age - admissions.AGE_CENTRE) / admissions.AGE_SCALE)), ~np.isnan(age)


def level_of_cxr(study: Study) -> int:
    v = linear_intensity(study)
    # Rows, columns and anatomy cancel in mixed second differences; white noise keeps its variance.
    mixed = (v[:-1, :-1] - v[:-1, 1:] - v[1:, :-1] + v[1:, 1:]) / 2
    sd = np.median(np.abs(mixed[20:75, 10:86])) / 0.6745
    scanner = scanner_of(study)
    own = scanner.texture_sd if scanner.texture == "white" else 0.0
    return int(np.rint(np.sqrt(max(sd**2 - own**2, 0)) / radiograph.NOISE_PER_LEVEL))


def level_of_vitals(study: Study) -> int:
    values = study.inputs["vitals"].astype(np.float64)
    mask = ~np.isnan(values)
    level, slope = vitals.fit_line(values[None], mask[None])
    residual = np.where(mask, values - level - slope * vitals.HOURS[:, None], 0.0)
    rms = np.sqrt((residual**2).sum(axis=0) / mask.sum(axis=0))
    return int(np.rint((rms / vitals.RESIDUAL_RMS)[:4].mean() - 1))


def level_of_labs(study: Study) -> int:
    return int(study.inputs["labs"][0, 6]) // labs.HAEMOLYSIS_PER_LEVEL


def level_of_history(study: Study) -> int:
    completeness = int(study.inputs["history"][0, 2])
    return 0 if completeness >= 96 else (98 - completeness) // 15


READ = {"cxr": read_cxr, "vitals": read_vitals, "labs": read_labs, "history": read_history}
READ_LEVEL = {"cxr": level_of_cxr, "vitals": level_of_vitals, "labs": level_of_labs, "history": level_of_history}


def read_llr(study: Study) -> dict[str, float]:
    """Log-likelihood ratios from nothing but the study's raw inputs and the site's scanner."""
    found = {}
    for name in study.inputs:
        evidence, observed = READ[name](study)
        severity = np.array([READ_LEVEL[name](study) / NUM_LEVELS])
        found[name] = float(EVIDENCE[name].llr(evidence[None], observed[None], severity)[0])
        if name == "history":
            found[name] += float(CODES.llr(study.inputs["history"][:, 3:] == 1, severity)[0])
    return found

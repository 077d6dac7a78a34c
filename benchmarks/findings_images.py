"""What a finished benchmark knows of one image modality: docs/findings.md, section on images.

    python benchmarks/findings_images.py jobs/bench_findings_synth.yaml --raw synth/raw --truth synth/truth
        --out runs/bench_findings_synth [--modality cxr] [--set 'seeds=[0]'] [--json FILE]

Needs DRAF_SUBJECT_KEY as `draf bench` did, whose folder it reads. It trains nothing; it predicts the folds once more without the
image (kept beside the cells' other predictions). What is said of systems by name is left out where the job has no such system.
Numbers are means over seeds with 95 % percentiles over resamples of subjects (and of seeds where systems are compared).
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from findings_statistics import alone, averaged, corruption, ranked, told_apart, uncertainty, weight, with_level
from findings_study import CLEAN, WITHOUT, ImageStudy, Read, Silent, Statistic, Where
from findings_tables import Tables, comparison_tables, show_tables

from draf_dist.cli.subject_key import subject_key
from draf_dist.evaluation.bench import prepare_bench
from draf_dist.evaluation.bench_disturbed import Comparison
from draf_dist.evaluation.bench_job import load_bench_job
from draf_dist.evaluation.bench_results import ConditionResult
from draf_dist.evaluation.bench_scores import Pooled
from draf_dist.evaluation.regret import pointwise_divergence
from draf_dist.evaluation.statistics import Estimate, Floats, Rows, estimate
from draf_dist.metrics.classification import Flags, auroc
from draf_dist.sources.card import load_card
from draf_dist.sources.synth.truth import posterior_by_uid

# Those whose signals are asked for: equal weights with every uncertainty and a corruption head, and severity.
EQUAL, REJECTION = "draf_alpha_0", "severity_rejection"
ON_IMAGES = ("noise_08", "noise_3", "downsample_8", "jpeg_10")
# Sigma: none, and those of the first two.
NOISE = (0.0, 0.8, 3.0)
# Of abstention: the share of studies that is answered.
COVERAGE = 0.7


def risk(study: ImageStudy) -> dict[str, Estimate]:
    """Spearman of every uncertainty of every modality with the probability that the modality itself gives, clean."""
    clean: Where = (CLEAN, "all")
    found = {}
    for m, name in enumerate(study.prepared.releases[0].schema.names):
        own = study.signals(EQUAL, clean, alone(m))
        for kind in ("epistemic", "total", "entropy"):
            u = study.signals(EQUAL, clean, uncertainty(kind, m))
            found[f"{name} {kind}"] = study.over_models(ranked(u, own))
    return found


def detectors(study: ImageStudy) -> dict[str, tuple[str, Read]]:
    """What may tell that the image is corrupted: name -> system and signal."""
    m = study.m
    found: dict[str, tuple[str, Read]] = {
        "U epistemic": (EQUAL, uncertainty("epistemic", m)),
        "U entropy": (EQUAL, uncertainty("entropy", m)),
        "c_hat": (EQUAL, corruption(m)),
        "severity": (REJECTION, lambda part: part.uncertainty["severity"][:, m]),
    }
    return {name: pair for name, pair in found.items() if pair[0] in study.prepared.job.systems}


def detection(study: ImageStudy) -> dict[str, dict[str, Estimate]]:
    """By detector: AUROC of corrupted against clean images under every condition, Spearman with the level of noise."""
    found, truth = {}, study.truth
    for name, (system, read) in detectors(study).items():
        clean = study.signals(system, (CLEAN, "all"), read)
        hit = {
            where: study.signals(system, where, read) for where in [*((one, "all") for one in ON_IMAGES), ("swap", study.modality)]
        }
        each = {where[0]: study.over_models(told_apart(clean, values)) for where, values in hit.items()}
        each["level of noise"] = study.over_models(with_level([clean, hit["noise_08", "all"], hit["noise_3", "all"]], NOISE))
        if truth is not None:
            planted = study.signals(
                system, (CLEAN, "all"), lambda part: [truth[int(uid)].severity[study.modality] for uid in part.uid]
            )
            each["planted"] = study.over_models(ranked(clean, planted))
        found[name] = each
    return found


def weights(study: ImageStudy) -> dict[str, dict[str, Estimate]]:
    """The mean weight of the image where it is present; of the rejection, the share of images that it takes for missing."""
    places: list[Where] = [(CLEAN, "all"), *((one, "all") for one in ON_IMAGES), ("swap", study.modality)]
    found: dict[str, dict[str, Estimate]] = {}
    for system in study.prepared.job.systems:
        for where in places:
            value = study.signals(system, where, weight(study.m))
            value = (value == 0) * 1.0 + 0 * value if system == REJECTION else value
            found.setdefault(system, {})[where[0]] = study.over_models(averaged(value))
    return found


def compared(study: ImageStudy) -> list[ConditionResult]:
    """All systems clean, without the image and with it disturbed. regret: of the posterior of the *clean* files, so that it has
    the information that the disturbance took as well."""
    job = study.prepared.job
    comparison = Comparison(study.resamples, job.reference, job.bootstrap_seed)
    exact = None if study.truth is None else study.exact((CLEAN, "all"))
    places: list[Where] = [
        (CLEAN, "all"),
        (WITHOUT, study.modality),
        *((one, "all") for one in ON_IMAGES),
        ("swap", study.modality),
    ]
    return [
        comparison.compare(
            name,
            (case,),
            list(job.systems),
            _by_seed(study, (name, case)),
            exact=exact,
        )
        for name, case in places
    ]


def _by_seed(study: ImageStudy, where: Where) -> Callable[[str], list[list[Pooled]]]:
    return lambda system: [[study.pooled(system, seed, where)] for seed in study.seeds]


def adaptation(study: ImageStudy) -> dict[str, dict[str, Estimate]]:
    """What an oracle that takes the disturbed image for missing would save: NLL disturbed - NLL without, in nats, by system."""
    exact = None if study.truth is None else study.exact((CLEAN, "all"))

    def loss(system: str, where: Where) -> Floats:
        each = [study.pooled(system, seed, where) for seed in study.seeds]
        return np.array(
            [one.scored.pointwise_nll() if exact is None else pointwise_divergence(exact, one.probability) for one in each]
        )

    places: list[Where] = [*((one, "all") for one in ON_IMAGES), ("swap", study.modality)]
    found: dict[str, dict[str, Estimate]] = {}
    for system in study.prepared.job.systems:
        removed = loss(system, (WITHOUT, study.modality))
        for where in places:
            saved = (loss(system, where) - removed).mean(0)
            found.setdefault(system, {})[where[0]] = _mean_of(study, saved)
    return found


def _mean_of(study: ImageStudy, values: Floats) -> Estimate:
    return estimate(float(values.mean()), np.array([values[rows].mean() for rows in study.resamples]))


def information(study: ImageStudy) -> dict[str, Estimate]:
    """Nats of the image in these very studies: mean KL(posterior || posterior without it); entropy of the posterior."""
    full, less = study.exact((CLEAN, "all")), study.exact((WITHOUT, study.modality))
    return {
        "image": _mean_of(study, pointwise_divergence(full, less)),
        "entropy of the posterior": _mean_of(study, -(full * np.log(full)).sum(1)),
        "entropy of the posterior without the image": _mean_of(study, -(less * np.log(less)).sum(1)),
    }


def abstention(study: ImageStudy, condition: str) -> dict[str, dict[str, Estimate]]:
    """Half of the studies have their image disturbed; by what they are sorted, the loss of the 70 % that are answered.

    The predictions are those of DRAF with equal weights throughout. nll: what any data show. entropy: of the posterior, what nobody
    could have known. regret: KL from it, the model's own fault. Differences to answering all.
    """
    n = len(study.fold)
    hit = np.random.default_rng(0).permutation(n) % 2 == 1

    def mixed(system: str, read: Read) -> Floats:
        return np.where(hit, study.signals(system, (condition, "all"), read), study.signals(system, (CLEAN, "all"), read))

    sorts = {name: np.nan_to_num(mixed(system, read), nan=-np.inf) for name, (system, read) in detectors(study).items()}
    sorts["fused U epistemic"] = mixed(EQUAL, lambda part: part.epistemic)
    sorts["1 - greatest probability"] = mixed(EQUAL, lambda part: 1 - part.probability.max(1))
    losses = _losses(study, condition, hit)
    found: dict[str, dict[str, Estimate]] = {"nothing": {kind: _mean_of(study, value.mean(0)) for kind, value in losses.items()}}
    for name, score in sorts.items():
        found[name] = {kind: study.over_models(_answered(score, value)) for kind, value in losses.items()}
    return found


def _losses(study: ImageStudy, condition: str, hit: Flags) -> dict[str, Floats]:
    """Kind -> (seeds, n)."""
    pairs = [(study.pooled(EQUAL, seed, (CLEAN, "all")), study.pooled(EQUAL, seed, (condition, "all"))) for seed in study.seeds]
    probability = [np.where(hit[:, None], other.probability, clean.probability) for clean, other in pairs]
    label = pairs[0][0].label
    found = {"nll": np.array([-np.log(np.maximum(p[np.arange(len(label)), label], 1e-12)) for p in probability])}
    found["error"] = np.array([(p.argmax(1) != label) * 1.0 for p in probability])
    if study.truth is not None:
        exact = study.exact((CLEAN, "all"))
        found["regret"] = np.array([pointwise_divergence(exact, p) for p in probability])
        found["entropy"] = np.repeat(-(exact * np.log(exact)).sum(1)[None], len(probability), axis=0)
    return found


def _answered(score: Floats, loss: Floats) -> Statistic:
    """Ties (severity is 0 of most clean images) are broken by a fixed draw."""
    tie = np.random.default_rng(1).random((score.shape[1],))

    def statistic(seed: int, rows: Rows) -> float:
        order = np.lexsort((tie[rows], score[seed, rows]))
        kept = rows[order][: max(1, round(COVERAGE * len(rows)))]
        return float(loss[seed, kept].mean())

    return statistic


def signals_of_one(study: ImageStudy) -> dict[str, dict[str, Estimate]]:
    """AUROC of each modality by its own head, clean: whether the image was learned at all."""
    label = study.pooled(EQUAL, study.seeds[0], (CLEAN, "all")).label
    found = {}
    for m, name in enumerate(study.prepared.releases[0].schema.names):
        own = study.signals(EQUAL, (CLEAN, "all"), alone(m))

        def statistic(seed: int, rows: Rows, own: Floats = own) -> float:
            known = rows[np.isfinite(own[seed, rows])]
            return float(auroc(np.stack([1 - own[seed, known], own[seed, known]], axis=1), label[known]))

        found[name] = study.over_models(statistic)
    return {"AUROC alone": found}


def main() -> None:
    """Prints tables; with --json writes every number."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job")
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--truth", type=Path)
    parser.add_argument("--modality", default="cxr")
    parser.add_argument("--systems", nargs="+", help="of these alone; the first is the reference")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    job = load_bench_job(given.job, given.overrides)
    key = subject_key(public=load_card(job.card).split.public_subject_key)
    truth = None if given.truth is None else posterior_by_uid(given.truth, key)
    if given.systems:
        systems = {name: job.systems[name] for name in given.systems}
        job = job.model_copy(update={"systems": systems, "reference": given.systems[0]})
    study = ImageStudy(prepare_bench(job, given.raw, given.out, key, Silent()), truth, given.modality)
    found: Tables = {
        "Alone": signals_of_one(study),
        "Spearman of U with the probability": {"rho": risk(study)},
        "Detection": detection(study),
        "Weight of the image (rejection: share taken for missing)": weights(study),
    }
    found |= comparison_tables(compared(study))
    found["Saved by an oracle that rejects the image"] = adaptation(study)
    found["Abstention, noise 3 on half"] = abstention(study, "noise_3")
    if truth is not None:
        found["Information"] = {"nats": information(study)}
    show_tables(found, given.json)


if __name__ == "__main__":
    main()

"""The gate: champion and challenger on one frozen holdout that neither was trained on."""

from collections.abc import Iterator, Set
from dataclasses import dataclass

import pyarrow.compute as pc

from draf_dist.continual.comparison import compare
from draf_dist.continual.policy import GatePolicy
from draf_dist.continual.serve import Noise, Progress, predict_split, temperature_of
from draf_dist.continual.verdict import Lineage, Side, Verdict, judge
from draf_dist.data.release import Release, open_release, split_version
from draf_dist.errors import GateError, SpecError, explain, together
from draf_dist.evaluation.follow_up import follow_up_of
from draf_dist.evaluation.predictions import Predictions
from draf_dist.evaluation.scoring import scaled, task_asked
from draf_dist.evaluation.subject import Subject, open_subject
from draf_dist.schema.release import Split
from draf_dist.training.job import PINNED, FinetuneJob
from draf_dist.training.run_folder import RunFolder, open_run


@dataclass(frozen=True)
class _Contender:
    """One side: its run, what it predicts of the holdout, temperature-scaled."""

    subject: Subject
    temperature: float
    predictions: Predictions


def run_gate(
    champion_url: str,
    challenger_url: str,
    holdout_url: str,
    policy: GatePolicy,
    on_progress: Progress = lambda stage, done, total: None,
) -> Verdict:
    """Compares two finished fine-tuning runs on the policy's split of a pinned release, each at its own temperature.

    Both meet the same noise (seed, pass, uid). A temperature is fitted on the validation split of the run's own release. The
    champion's release may have fewer sites than the holdout. The same arguments give the same verdict, byte for byte.

    Raises:
        SpecError: no such run or release, the holdout names no version, or it has no study in the split; the label is a mask; a
            model that was trained to rank alone, whose NLL says nothing.
        GateError: a holdout subject was trained or validated on, or nobody can tell because subjects were hashed with another key.
        DataError: modalities or label of a model and the holdout differ; damaged files.
    """
    if split_version(holdout_url)[1] is None:
        remedy = "Name the version: draf release log lists them."
        raise SpecError(explain(holdout_url, expected="a frozen holdout, URL@version", found="no version", remedy=remedy))
    holdout = open_release(holdout_url)
    sides = {"champion": open_subject(champion_url, holdout_url), "challenger": open_subject(challenger_url, holdout_url)}
    task_asked(holdout.schema.label, where="draf models gate")
    for name, side in sides.items():
        _check_has_probabilities(name, side)
    on_progress("leakage", 0, 3)
    check_never_trained_on({name: side.run for name, side in sides.items()}, holdout, policy.split)
    contenders = {}
    for done, (name, side) in enumerate(sides.items(), start=1):
        on_progress(name, done, 3)
        contenders[name] = _contend(side, policy)
    champion, challenger = contenders["champion"], contenders["challenger"]
    comparison = compare(
        champion.predictions,
        challenger.predictions,
        _subject_numbers(holdout),
        policy,
        champion_sites=_sites_trained_on(champion.subject.trained_on),
        trained_sites=_sites_trained_on(challenger.subject.trained_on) | _sites_trained_on(champion.subject.trained_on),
        follow_up=follow_up_of(champion.subject.trained_on),
    )
    lineage = Lineage(champion=_side(champion), challenger=_side(challenger), holdout=holdout.pinned_url, split=policy.split)
    return judge(comparison, policy).model_copy(update={"lineage": lineage})


def check_never_trained_on(runs: dict[str, RunFolder], holdout: Release, split: Split) -> None:
    """Refuses a holdout of which a run, or a run that it started from, has seen a subject in training or validation.

    Raises:
        GateError: some were seen, or the subjects of a training release were hashed with another key, so that nobody can tell.
    """
    held = _components(holdout, {split})
    problems = []
    for name, run in runs.items():
        for url in sorted({each.job.release for each in _ancestry(run)}):
            if problem := _leak(name, open_release(url), holdout, held):
                problems.append(problem)
    if problems:
        raise GateError(together(problems))


def _check_has_probabilities(name: str, subject: Subject) -> None:
    if subject.only_ranks:
        remedy = "Train with lambda_nll above 0, and compare such models by C-index with draf bench."
        expected, found = (
            "a model whose probabilities can be held against outcomes",
            "one trained by Cox's likelihood alone, which ranks",
        )
        raise SpecError(explain(f"{name}: {subject.run.url}", expected=expected, found=found, remedy=remedy))


def _leak(name: str, trained_on: Release, holdout: Release, held: Set[str]) -> str:
    """What is wrong, "" if nothing is."""
    where, remedy = f"{name}: trained on {trained_on.pinned_url}", "Judge on a holdout that neither model has seen."
    if trained_on.manifest.subject_key_check != holdout.manifest.subject_key_check:
        found = "another key, under which the same subject has another pseudonym"
        return explain(where, expected="subjects hashed with the key of the holdout", found=found, remedy=remedy)
    if seen := len(held & _components(trained_on, {"train", "val"})):
        expected = "no holdout subject in its train or val split"
        return explain(where, expected=expected, found=f"{seen} of {len(held)}", remedy=remedy)
    return ""


def _ancestry(run: RunFolder) -> Iterator[RunFolder]:
    """The run and every run whose weights it started from."""
    yield run
    if isinstance(run.job, FinetuneJob):
        parents = [*run.job.pretrained.values(), *filter(None, [run.job.warm_start])]
        for url in parents:
            yield from _ancestry(open_run(PINNED.sub("", url)))


def _components(release: Release, splits: Set[str]) -> set[str]:
    """The connected components of subjects in some splits."""
    table = release.subjects()
    chosen = table.filter(pc.is_in(table["split"], value_set=pc.cast(sorted(splits), table["split"].type)))
    return set(chosen["component"].to_pylist())


def _contend(subject: Subject, policy: GatePolicy) -> _Contender:
    noise = Noise(policy.passes, seed=policy.seed)
    temperature = temperature_of(subject, noise).value
    found = predict_split(subject.exported, subject.release, policy.split, noise)
    return _Contender(subject, temperature, scaled(found, temperature))


def _subject_numbers(release: Release) -> dict[int, int]:
    """Numbers by uid, equal for studies of one component."""
    table = release.subjects()
    numbers: dict[str, int] = {}
    pairs = zip(table["uid"].to_pylist(), table["component"].to_pylist(), strict=True)
    return {uid: numbers.setdefault(component, len(numbers)) for uid, component in pairs}


def _sites_trained_on(release: Release) -> set[str]:
    return {site for site, by_split in release.manifest.counts.items() if by_split["train"]["studies"]}


def _side(contender: _Contender) -> Side:
    subject = contender.subject
    return Side(
        run=subject.run.url.rstrip("/").rpartition("/")[2],
        weights_sha256=subject.weights_sha256,
        job_sha256=subject.job.sha256,
        release=subject.job.release,
        temperature=contender.temperature,
    )

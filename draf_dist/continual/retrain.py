"""Retraining: the champion goes on with what has come since, and the gate says whether the result may take its place.

Nothing is stored about a retraining but its run folder: what it has pinned is in job.yaml there, what became of it in verdict.json.
So the same command continues, from whatever moment, or says again what came out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import ValidationError
from rich.console import Console

from draf_dist.continual.gate import check_never_trained_on, run_gate
from draf_dist.continual.gate_report import VERDICT, write_verdict
from draf_dist.continual.policy import GatePolicy
from draf_dist.continual.registry import Registry
from draf_dist.continual.retrain_job import RetrainJob
from draf_dist.continual.verdict import Verdict, name_of
from draf_dist.continual.version import ModelVersion
from draf_dist.data.release import Release, lineage, open_release, split_version
from draf_dist.data.replay import num_training, parts_since
from draf_dist.errors import DataError, GateError, SpecError, explain
from draf_dist.evaluation.subject import open_subject
from draf_dist.launch.profile import Profile
from draf_dist.launch.train import train_with
from draf_dist.storage import Store, open_store
from draf_dist.training.job import FinetuneJob
from draf_dist.training.pin import pin
from draf_dist.training.run import RUNS
from draf_dist.training.run_folder import JOB, open_run
from draf_dist.training.summary import summarise


@dataclass(frozen=True)
class Retraining:
    """What is to be done. job: pinned. url: of its run folder. num_new, num_old: training studies of both sources."""

    job: FinetuneJob
    url: str
    champion: ModelVersion
    num_new: int
    num_old: int


@dataclass(frozen=True)
class Retrained:
    """What came out: a registered challenger, and the verdict on it against the champion. run_url: its run folder."""

    run_url: str
    version: ModelVersion
    verdict: Verdict


def plan_retraining(job: RetrainJob, out: str | None = None) -> Retraining | None:
    """The training that a retraining means at this moment; None if no training study has come since the champion's release.

    Of a data set without a version the newest is taken, unless a retraining of this champion has begun on an earlier one and was
    not judged: then that one goes on. out: URL of the run folder, runs/<name>-<8 hex> if None.

    Whatever the gate would refuse afterwards for certain is refused here, before anything is trained.

    Raises:
        SpecError: no such model or release, no champion, or a release that does not descend from the champion's; a site of the
            policy that the release does not have, or a split of it without studies.
        GateError: a subject of the holdout was trained or validated on by the champion, or by a run that it started from.
    """
    champion = Registry(job.registry).champion(job.model)
    if champion is None:
        remedy = f"Register a finished run and promote it: draf models register RUN --model {job.model}; draf models promote ..."
        raise SpecError(explain(f"model {job.model}", expected="a champion to go on from", found="none", remedy=remedy))
    release = _release_of(job, champion, out)
    plan = _retraining(job, champion, release, out)
    if plan is not None:
        _check_can_be_judged(champion, release, job.policy)
    return plan


def retrain(job: RetrainJob, out: str | None, profile: Profile, console: Console) -> Retrained | None:
    """Trains the champion further, registers the result as challenger, and has the gate judge it; promotes nothing.

    The run folder gets verdict.json and gate.html. The same call continues after a kill, and at the end changes nothing. None if
    nothing has come since the champion's release.

    Raises:
        As plan_retraining, train_with and run_gate.
        DataError: training did not consume what the order says.
    """
    plan = plan_retraining(job, out)
    if plan is None:
        return None
    result = train_with(profile, plan.job, plan.url, console=console)
    if summarise(result.url).as_planned is False:
        remedy = "draf run show says how far it got; train anew with another --out."
        raise DataError(explain(result.url, expected="the studies of the order", found="others in the receipts", remedy=remedy))
    registry = Registry(job.registry)
    version = registry.register(job.model, result.url)
    verdict = _judged(plan, version, job.policy, console)
    return Retrained(result.url, registry.record_verdict(job.model, version.version, verdict), verdict)


def check_promotes(version: ModelVersion, verdict: Verdict) -> None:
    """Raises GateError unless the verdict is to promote; says where harm is, or how many subjects would decide."""
    if verdict.decision == "promote":
        return
    if verdict.decision == "refuse":
        harmed = [name_of(finding.site) for finding in verdict.findings if finding.state == "harmed"]
        found = f"refuse: harm at {', '.join(harmed)}"
        remedy = "See gate.html in the run folder, and look at what was delivered from there."
    else:
        still_open = [name_of(finding.site) for finding in verdict.findings if finding.state == "open" and finding.demanded]
        why = f"open at {', '.join(still_open)}" if still_open else "no improvement is shown"
        would = "" if verdict.subjects_needed is None else f"; holdout subjects that would do: {verdict.needed}"
        found = f"cannot tell: {why}{would}"
        remedy = "Ingest more deliveries, or set the policy anew before the next retraining."
    where = f"{version.name} version {version.version}"
    raise GateError(explain(where, expected="a verdict to promote", found=found, remedy=remedy))


def check_never_rolled_back(registry: Registry, version: ModelVersion) -> None:
    """Refuses to promote by itself what a person has taken back; by hand (draf models promote) it can be done.

    Raises:
        GateError: it was champion once and was rolled back.
    """
    taken_back = [move for move in registry.history(version.name) if move.action == "rollback" and move.previous == version.version]
    if taken_back:
        where, found = f"{version.name} version {version.version}", f"one that was rolled back ({taken_back[-1].reason})"
        remedy = f"Promote it by hand: draf models promote {version.name} --version {version.version}"
        raise GateError(explain(where, expected="a version that nobody took back", found=found, remedy=remedy))


def _check_can_be_judged(champion: ModelVersion, release: Release, policy: GatePolicy) -> None:
    """Opens what the gate will open, and holds the policy and the champion against the holdout."""
    if unknown := sorted(set(policy.sites or ()) - set(release.schema.sites)):
        expected, remedy = f"sites of {release.pinned_url}", f"There are: {', '.join(release.schema.sites)}."
        raise SpecError(explain("policy.sites", expected=expected, found=", ".join(unknown), remedy=remedy))
    if sum(shard.num_samples for shard in release.shards(policy.split)) == 0:
        expected, remedy = f"studies in that split of {release.pinned_url}", "Choose another split, or deliver such studies first."
        raise SpecError(explain(f"policy.split: {policy.split}", expected=expected, found="none", remedy=remedy))
    run = open_subject(champion.run_url, release.pinned_url).run
    check_never_trained_on({"champion": run}, release, policy.split)


def _retraining(job: RetrainJob, champion: ModelVersion, release: Release, out: str | None) -> Retraining | None:
    _, since = split_version(champion.release)
    assert since is not None
    if since not in lineage(release.store, release.manifest):
        remedy = "Name the data set that it was trained on, with the deliveries that came since."
        expected = f"a release that goes back to {since}, which the champion was trained on"
        raise SpecError(explain(release.pinned_url, expected=expected, found="another", remedy=remedy))
    new, old = (num_training(part) for part in parts_since(release, since))
    if new == 0:
        return None
    pinned = pin(_finetuning(job, champion, since, release))
    assert isinstance(pinned, FinetuneJob)
    return Retraining(pinned, out or f"{RUNS}/{pinned.run_name}", champion, new, old)


def _finetuning(job: RetrainJob, champion: ModelVersion, since: str, release: Release) -> FinetuneJob:
    """The champion's own job, but for what it starts from, what it sees, and the settings of a retraining."""
    before = open_run(champion.run_url).job
    changed = {
        "name": job.name,
        "release": release.pinned_url,
        "pretrained": {},
        "warm_start": f"{champion.run_url}@{champion.weights_sha256}",
        "replay": {"since": since, **job.replay.model_dump()},
        **{key: getattr(job, key) for key in ("seed", "epochs", "patience", "batch_size", "passes_eval")},
        "optimizer": job.optimizer.model_dump(),
    }
    return FinetuneJob.model_validate({**before.model_dump(), **changed})


def _release_of(job: RetrainJob, champion: ModelVersion, out: str | None) -> Release:
    """The version that the job names; else that of the run that this command has begun; else the newest."""
    url, version = split_version(job.release)
    if version is not None:
        return open_release(job.release)
    if out is None:
        newest = _first_with_its_studies(open_release(url), split_version(champion.release)[1])
        return next(_begun(job, champion, newest), newest)
    there = _release_in(out)
    if there is not None and split_version(there)[0] == open_store(url).url:
        return open_release(there)
    return open_release(url)


def _first_with_its_studies(newest: Release, since: str | None) -> Release:
    """The earliest version with the same shards, not before `since`.

    Deliveries without anything new are no reason to train the same once more.
    """
    found = newest
    for version in lineage(newest.store, newest.manifest)[1:]:
        if found.version == since:
            break
        earlier = open_release(f"{newest.url}@{version}")
        if earlier.manifest.shards != newest.manifest.shards:
            break
        found = earlier
    return found


def _begun(job: RetrainJob, champion: ModelVersion, newest: Release) -> Iterator[Release]:
    """Releases on which a retraining of this champion has begun and was not judged, newest first.

    A run's name follows from what it pins, so nothing needs to be stored to find them.
    """
    _, since = split_version(champion.release)
    for version in lineage(newest.store, newest.manifest):
        if version == since:
            return
        release = open_release(f"{newest.url}@{version}")
        plan = _retraining(job, champion, release, None)
        if plan is not None and _release_in(plan.url) is not None and not open_store(plan.url).exists(VERDICT):
            yield release


def _release_in(url: str) -> str | None:
    """What the run at a URL has pinned; None where there is no run."""
    return open_run(url).job.release if open_store(url).exists(JOB) else None


def _judged(plan: Retraining, version: ModelVersion, policy: GatePolicy, console: Console) -> Verdict:
    """The verdict on a challenger: the one in its run folder if that is on the same models, holdout and policy."""
    store = open_store(version.run_url)
    known = _verdict_in(store)
    if known is not None and _is_on(known, plan, version, policy):
        return known

    def show(stage: str, done: int, total: int) -> None:
        console.print(f"gate: {stage} ({done} of {total})", markup=False, highlight=False)

    verdict = run_gate(plan.champion.run_url, version.run_url, plan.job.release, policy, show)
    write_verdict(store, verdict)
    return verdict


def _verdict_in(store: Store) -> Verdict | None:
    try:
        return Verdict.model_validate_json(store.read(VERDICT)) if store.exists(VERDICT) else None
    except ValidationError:
        # Of another version of this program: it is judged again.
        return None


def _is_on(verdict: Verdict, plan: Retraining, version: ModelVersion, policy: GatePolicy) -> bool:
    about = verdict.lineage
    if about is None or verdict.policy != policy:
        return False
    sides = (about.champion.weights_sha256, about.challenger.weights_sha256, about.holdout)
    return sides == (plan.champion.weights_sha256, version.weights_sha256, plan.job.release)

"""The new hospital of `draf demo --full`: its delivery ingested, the model retrained, judged, promoted, and rolled back."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from draf_dist.cli.demo_job import demo_profile
from draf_dist.cli.demo_stages import REFERENCE, Stages, hold
from draf_dist.cli.subject_key import PUBLIC_KEY
from draf_dist.continual.policy import GatePolicy
from draf_dist.continual.retrain_job import ReplayWeights, RetrainJob
from draf_dist.training.job import OptimizerConfig

if TYPE_CHECKING:
    import pyarrow as pa

    from draf_dist.continual.registry import Registry
    from draf_dist.data.release import Release

RETRAINED, REGISTRY, MODEL = "retrained", "registry.db", "demo"
HOSPITAL = 5


def demo_retraining(out: Path, release: str, site: str, *, seed: int) -> RetrainJob:
    """A retraining of a few epochs, judged with margins for a holdout of two hundred subjects.

    So few can show that nothing became worse by more than that, overall and at the new site; a gain of .02 nats they can't.
    """
    policy = GatePolicy(overall_margin=0.05, site_margin=0.1, require="non_inferior", sites=(site,), passes=20, replicates=2000)
    return RetrainJob(
        name="demo_retrain",
        registry=f"sqlite:///{out / REGISTRY}",
        model=MODEL,
        release=release,
        replay=ReplayWeights(new=1, old=1),
        seed=seed,
        epochs=8,
        patience=8,
        batch_size=32,
        passes_eval=20,
        optimizer=OptimizerConfig(learning_rate=2e-3, clip_norm=1.0),
        policy=policy,
    )


def new_hospital(out: Path, release: str, stages: Stages, *, subjects: int, seed: int) -> dict[str, str]:
    """The whole of it; check -> what was found. release: URL@version of what the champion was trained on.

    Raises:
        DataError: a check does not hold.
    """
    from draf_dist.config.spec import dump_yaml
    from draf_dist.continual.registry import Registry
    from draf_dist.continual.retrain import retrain

    child, site, delivery = _delivered(out, release.rpartition("@")[0], stages, subjects=subjects, seed=seed)
    job = demo_retraining(out, child.url, site, seed=seed)
    dump_yaml(job, out / "retrain.yaml")
    registry = Registry(job.registry)
    with stages("register and promote the first champion"):
        champion = registry.promote(MODEL, registry.register(MODEL, str(out / REFERENCE)).version)
        before = _predictions(registry, child)
    with stages("retrain on the delivery, with replay"), (out / "retrain.log").open("w", encoding="utf-8") as log:
        retrained = retrain(job, str(out / RETRAINED), demo_profile(), Console(file=log))
    hold(retrained is not None, "retraining", "something new to train on", "nothing")
    assert retrained is not None
    verdict = retrained.verdict
    hold(verdict.decision == "promote", "gate", "promote", f"{verdict.decision} ({' '.join(verdict.reasons)})")
    with stages("promote, then roll back"):
        promoted = registry.promote(MODEL, retrained.version.version)
        differs = not _predictions(registry, child).equals(before)
        back = registry.rollback(MODEL, "the demo shows how")
        same = _predictions(registry, child).equals(before)
    hold(differs, "promotion", "predictions of the challenger", "those of the champion before")
    hold(same and back.version == champion.version, "rollback", "the predictions before the promotion, bit for bit", "others")
    overall = verdict.comparison.overall
    return {
        "delivery": delivery,
        "gate": f"promote: NLL {overall.harm:+.4f} nats on {overall.num_subjects} subjects, at most {overall.upper:+.4f} (95 %)",
        "promotion": f"version {promoted.version} promoted, then back to version {back.version}: predictions bit for bit as before",
    }


def _delivered(out: Path, url: str, stages: Stages, *, subjects: int, seed: int) -> tuple["Release", str, str]:
    """The child release, the name of the new site, and what the checks found."""
    from draf_dist.continual.ingest import ingest
    from draf_dist.data.verify import verify
    from draf_dist.sources.card import load_card
    from draf_dist.sources.synth import synthesise_delivery

    folder = out / "new_hospital"
    with stages("synthesise a new hospital's delivery"):
        synthesise_delivery(folder, site_number=HOSPITAL, num_subjects=subjects, seed=seed)
    source = load_card(folder / "card.yaml").build(folder / "delivery")
    with stages("ingest it as a child release"):
        first = ingest(source, folder / "delivery", url, subject_key=PUBLIC_KEY)
        again = ingest(source, folder / "delivery", url, subject_key=PUBLIC_KEY)
        whole = verify(first.release)
    release, (site,) = first.release, source.schema.sites
    hold((first.verdict, again.verdict) == ("ingested", "already there"), "delivery", "it to be taken in once", again.verdict)
    added = sum(counts["studies"] for counts in first.counts[site].values())
    shared = f"release of {whole.num_samples} studies verifies"
    return release, site, f"{added} studies of {site} added, {first.quarantine.num_studies} quarantined; {shared}; again: no change"


def _predictions(registry: "Registry", release: "Release") -> "pa.Table":
    """What the champion of this moment says of the holdout."""
    from draf_dist.continual.serve import predict
    from draf_dist.evaluation.predictions import to_table

    champion = registry.champion(MODEL)
    assert champion is not None
    return to_table(predict(champion, release.pinned_url, "test"))

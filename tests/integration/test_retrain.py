"""From a delivery to a new champion by `draf retrain`: killed on the way, overtaken by the next delivery, promoted, rolled back."""

import io
import json
import subprocess
import sys
import time
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from forged_release import forged
from small_runs import SUBJECT_KEY, silent, small_job, small_model, small_release

from draf_dist.cli.app import main
from draf_dist.continual.ingest import ingest
from draf_dist.continual.registry import Registry
from draf_dist.continual.retrain import _first_with_its_studies, plan_retraining
from draf_dist.continual.retrain_job import RetrainJob, load_retrain
from draf_dist.data.release import Release, open_release
from draf_dist.sources.card import load_card
from draf_dist.sources.synth import synthesise_delivery
from draf_dist.training.job import FinetuneJob
from draf_dist.training.ledger import receipts_by_source
from draf_dist.training.plan import build_plan
from draf_dist.training.run import train
from draf_dist.training.run_folder import open_run
from draf_dist.training.summary import summarise

pytestmark = pytest.mark.timeout(600)

# Sites are judged against harm alone: a few holdout subjects a site can't show that nothing is worse there. Fifty in all show an
# improvement of a tenth of a nat with this confidence, and room to spare for the rounding of another processor.
POLICY = {"overall_margin": 0.1, "site_margin": 0.3, "min_subjects": 10, "confidence": 0.8, "sites": []}
POLICY |= {"replicates": 1000, "passes": 5}
KILLED_AFTER = 4


@dataclass(frozen=True)
class Road:
    """folder: the working folder of all commands. first, second: the versions after each delivery."""

    folder: Path
    release: str
    first: str
    second: str

    @property
    def spec(self) -> Path:
        return self.folder / "retrain.yaml"

    @property
    def run(self) -> Path:
        (found,) = (self.folder / "runs").glob("again-*")
        return found

    @property
    def registry(self) -> Registry:
        return Registry(f"sqlite:///{self.folder}/registry.db")

    def job(self, *overrides: str) -> RetrainJob:
        return load_retrain(self.spec, overrides)

    def draf(self, *words: str, command: str = "retrain", pinned: bool = True) -> int:
        """The exit code of a command on this job; on the first delivery's version unless told otherwise."""
        version = [f"--set=release={self.release}@{self.first}"] if pinned else []
        with chdir(self.folder):
            try:
                main([command, str(self.spec), *version, *words])
            except SystemExit as end:
                return int(end.code or 0)
        return 0


def deliver(folder: Path, release: str, *, first_subject: int, num_subjects: int) -> str:
    """The version after a delivery of the fifth hospital."""
    out = folder / f"delivery-{first_subject}"
    synthesise_delivery(out, site_number=5, num_subjects=num_subjects, seed=1, first_subject=first_subject)
    source = load_card(out / "card.yaml").build(out / "delivery")
    done = ingest(source, out / "delivery", release, subject_key=SUBJECT_KEY)
    assert done.verdict == "ingested"
    return done.release.version


def kill_within_an_epoch(folder: Path, spec: Path) -> None:
    """Starts the command, and sends it SIGKILL after a step that no checkpoint has."""
    command = [sys.executable, "-m", "draf_dist.cli.app", "retrain", str(spec)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not any(len(metrics.read_text().splitlines()) >= KILLED_AFTER for metrics in folder.glob("runs/*/metrics.jsonl")):
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Road:
    """A champion that has seen little; a delivery; a retraining that is killed; another delivery; the same command to its end."""
    folder = tmp_path_factory.mktemp("road")
    release = small_release(folder, num_subjects=240, seed=1)
    job = small_job(release, model=small_model(), epochs=2, batch_size=16, passes_eval=5)
    train(job, str(folder / "champion"), console=silent())
    registry = Registry(f"sqlite:///{folder}/registry.db")
    registry.promote("mortality", registry.register("mortality", str(folder / "champion")).version)
    first = deliver(folder, release, first_subject=0, num_subjects=120)
    tree = {
        "kind": "retrain",
        "name": "again",
        "registry": f"sqlite:///{folder}/registry.db",
        "model": "mortality",
        "release": release,
        "epochs": 8,
        "batch_size": 16,
        "passes_eval": 5,
        "optimizer": {"learning_rate": 3e-3},
        "policy": "policy.yaml",
    }
    (folder / "retrain.yaml").write_text(json.dumps(tree))
    (folder / "policy.yaml").write_text(json.dumps(POLICY))
    kill_within_an_epoch(folder, folder / "retrain.yaml")
    second = deliver(folder, release, first_subject=120, num_subjects=40)
    made = Road(folder, release, first, second)
    assert made.draf(pinned=False) == 0
    return made


def finetuning(run: Path) -> FinetuneJob:
    job = open_run(str(run)).job
    assert isinstance(job, FinetuneJob)
    return job


def champion_of(road: Road) -> int:
    champion = road.registry.champion("mortality")
    assert champion is not None
    return champion.version


def verdict_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "verdict.json").read_text())
    return found


def test_a_killed_retraining_goes_on_with_its_own_version_and_ends_with_the_same_bits(road: Road, tmp_path: Path) -> None:
    job = finetuning(road.run)
    assert open_release(road.release).version == road.second
    assert job.release == f"{road.release}@{road.first}"
    assert summarise(str(road.run)).attempts == 2
    train(job, str(tmp_path / "undisturbed"), console=silent())
    weights = Path("model") / "model.safetensors"
    assert (road.run / weights).read_bytes() == (tmp_path / "undisturbed" / weights).read_bytes()


def test_what_was_consumed_is_what_the_order_says(road: Road) -> None:
    job = finetuning(road.run)
    plan = build_plan(job, open_release(job.release))
    consumed = receipts_by_source(open_run(str(road.run)).ledger())
    assert consumed == plan.receipts(summarise(str(road.run)).steps)
    new = plan.sources[0].receipt()
    assert [consumed["new", epoch] for epoch in range(job.epochs)] == [new] * job.epochs
    assert consumed["old", 0].count == plan.sources[1].num_samples


def test_the_champion_is_where_it_starts_and_the_rest_is_the_champions_own_job(road: Road) -> None:
    job, before = finetuning(road.run), finetuning(road.folder / "champion")
    champion = road.registry.version("mortality", 1)
    assert job.warm_start == f"{champion.run_url}@{champion.weights_sha256}"
    assert job.replay is not None
    assert job.replay.since == champion.release.rpartition("@")[2]
    same = {"model", "objective", "corruption", "label_fraction", "passes_train", "groups"}
    assert all(getattr(job, key) == getattr(before, key) for key in same)


def test_an_honest_improvement_gets_the_verdict_to_promote_and_is_not_promoted_by_itself(road: Road) -> None:
    verdict = verdict_of(road.run)
    assert verdict["decision"] == "promote"
    assert verdict["comparison"]["overall"]["harm"] < 0
    assert verdict["lineage"]["holdout"] == f"{road.release}@{road.first}"
    assert "Promote" in (road.run / "gate.html").read_text()
    challenger = road.registry.challenger("mortality")
    assert challenger is not None
    assert challenger.verdict is not None
    assert (challenger.version, challenger.verdict.decision, champion_of(road)) == (2, "promote", 1)


def test_once_it_is_judged_the_next_one_takes_the_newest_version(road: Road) -> None:
    with chdir(road.folder):
        plan = plan_retraining(road.job())
    assert plan is not None
    assert plan.job.release == f"{road.release}@{road.second}"
    before = build_plan(finetuning(road.run), open_release(finetuning(road.run).release)).sources[0]
    assert plan.num_new > before.num_samples


def test_a_version_that_adds_no_study_is_no_reason_to_train_again(road: Road) -> None:
    newest = open_release(road.release)
    empty = forged(newest, parent=newest.version, quarantined={"unreadable": 1})
    assert _first_with_its_studies(empty, road.first).version == newest.version
    assert _first_with_its_studies(empty, empty.version).version == empty.version


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(road: Road, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(road.folder.rglob("*"))
    assert road.draf("--dry-run", "--json", pinned=False) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["release"] == f"{road.release}@{road.second}"
    assert said["champion"] == 1
    assert sorted(road.folder.rglob("*")) == before


def test_draf_plan_shows_a_retraining_as_what_it_would_train(road: Road, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(road.folder.rglob("*"))
    assert road.draf("--json", command="plan", pinned=False) == 0
    said = json.loads(capsys.readouterr().out)
    with chdir(road.folder):
        meant = plan_retraining(road.job())
    assert meant is not None
    assert (said["job"], said["release"]) == ("again", f"{road.release}@{road.second}")
    sources = {source["name"]: source["num_samples"] for source in said["sources"]}
    assert sources == {"new": meant.num_new, "old": meant.num_old}
    assert sorted(road.folder.rglob("*")) == before


def test_draf_plan_says_so_where_a_retraining_has_nothing_to_train(road: Road, capsys: pytest.CaptureFixture[str]) -> None:
    seen = finetuning(road.folder / "champion").release
    assert road.draf(f"--set=release={seen}", command="plan", pinned=False) == 0
    assert capsys.readouterr().out == "Nothing to train: no training study has come since the champion's release.\n"


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("policy.sites=[site_99]", 2, "policy.sites: expected sites of "),
        ("policy.split=ood", 2, "policy.split: ood: expected studies in that split"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_what_the_gate_would_refuse_is_refused_before_anything_is_trained(
    road: Road, capsys: pytest.CaptureFixture[str], override: str, code: int, words: str, dry_run: bool
) -> None:
    before = sorted(road.folder.rglob("*"))
    assert road.draf(f"--set={override}", *["--dry-run"] * dry_run, pinned=False) == code
    assert words in capsys.readouterr().err
    assert sorted(road.folder.rglob("*")) == before


def with_a_leak(release: Release, trained_on: Release) -> Release:
    """A version after the release in whose test split is a subject that `trained_on` has in train."""
    told, subjects = trained_on.subjects().to_pydict(), release.subjects()
    leaked = told["component"][told["split"].index("train")]
    split = pc.if_else(pc.equal(subjects["component"], leaked), "test", subjects["split"])
    buffer = io.BytesIO()
    pq.write_table(subjects.set_column(subjects.column_names.index("split"), "split", split), buffer)
    return forged(release, {"subjects.parquet": buffer.getvalue()}, parent=release.version)


def test_a_holdout_that_the_champion_has_seen_is_refused_before_anything_is_trained(
    road: Road, capsys: pytest.CaptureFixture[str]
) -> None:
    leaky = with_a_leak(open_release(road.release), open_release(finetuning(road.folder / "champion").release))
    before = sorted(road.folder.rglob("*"))
    for words in (["--dry-run"], []):
        assert road.draf(f"--set=release={leaky.pinned_url}", *words, pinned=False) == 4
        assert "champion: trained on" in (said := capsys.readouterr().err)
        assert "expected no holdout subject in its train or val split, found 1 of" in said
    assert sorted(road.folder.rglob("*")) == before


def test_few_subjects_decide_nothing_and_the_command_says_how_many_would(road: Road, capsys: pytest.CaptureFixture[str]) -> None:
    assert road.draf("--set=policy.min_subjects=500") == 4
    said = capsys.readouterr()
    assert "cannot tell: open at overall; holdout subjects that would do: " in said.err
    assert verdict_of(road.run)["subjects_needed"] >= 500
    assert f"would do: {verdict_of(road.run)['subjects_needed']} in all" in said.err


def test_the_command_again_changes_nothing_until_it_is_told_to_promote(road: Road, capsys: pytest.CaptureFixture[str]) -> None:
    assert road.draf() == 0
    before = {path: path.read_bytes() for path in road.run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert road.draf("--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["decision"], said["version"], said["promoted"]) == ("promote", 2, False)
    assert {path: path.read_bytes() for path in road.run.rglob("*") if path.is_file()} == before
    assert [version.version for version in road.registry.versions("mortality")] == [1, 2]
    assert road.draf("--promote") == 0
    assert champion_of(road) == 2
    # The champion has seen this version.
    assert road.draf("--promote") == 0
    assert "Nothing to train" in capsys.readouterr().out
    assert [version.version for version in road.registry.versions("mortality")] == [1, 2]

    road.registry.rollback("mortality", "more alarms at night")
    assert road.draf("--promote") == 4
    assert "one that was rolled back (more alarms at night)" in capsys.readouterr().err
    assert champion_of(road) == 1


def test_a_model_without_a_champion_and_a_strange_data_set_are_refused(
    road: Road, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert road.draf("--set=model=sepsis") == 2
    assert "expected a registered model" in capsys.readouterr().err
    strange = small_release(tmp_path, num_subjects=60, seed=2)
    assert road.draf(f"--set=release={strange}", pinned=False) == 2
    assert "which the champion was trained on" in capsys.readouterr().err

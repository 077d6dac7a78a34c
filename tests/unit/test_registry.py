"""The model registry: what a version is, who may become champion, and that its history survives two users at once."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from gate_hospitals import job_of, release_of, write_export
from small_runs import silent
from typer.testing import CliRunner

from draf_dist.cli.app import app
from draf_dist.config.spec import fingerprint
from draf_dist.continual.comparison import Comparison, Slice
from draf_dist.continual.policy import GatePolicy
from draf_dist.continual.registry import TAG_LENGTH, Registry
from draf_dist.continual.serve import predict
from draf_dist.continual.verdict import Decision, Lineage, Side, Verdict
from draf_dist.continual.version import ModelVersion
from draf_dist.errors import DataError, GateError, SpecError
from draf_dist.evaluation.subject import read_exported
from draf_dist.models.build import build_model
from draf_dist.models.export import DESCRIPTION, WEIGHTS, model_files
from draf_dist.training.run import train
from draf_dist.training.run_folder import MODEL, open_run

MODEL_NAME = "death"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run0 to run3: one run of one epoch, and copies with other weights; registry.db, in which the first three are versions."""
    folder = tmp_path_factory.mktemp("registry")
    write_export(folder, num_subjects=120)
    train(job_of("run0", release_of(folder, folder / "raw", folder / "release"), epochs=1), str(folder / "run0"), console=silent())
    run = open_run(str(folder / "run0"))
    exported, _ = read_exported(run)
    for number in (1, 2, 3):
        shutil.copytree(folder / "run0", folder / f"run{number}")
        model = build_model(exported.config, exported.schema, seed=number)
        for name, content in model_files(model, exported.config, exported.schema, exported.stats).items():
            (folder / f"run{number}" / MODEL / name).write_bytes(content)
    registry = Registry(f"sqlite:///{folder / 'registry.db'}")
    for number in range(3):
        registry.register(MODEL_NAME, str(folder / f"run{number}"))
    return folder


@pytest.fixture
def url(runs: Path, tmp_path: Path) -> str:
    """A registry of the test's own, with versions 1 to 3 and no champion."""
    shutil.copy(runs / "registry.db", tmp_path / "registry.db")
    return f"sqlite:///{tmp_path / 'registry.db'}"


@pytest.fixture
def registry(url: str) -> Registry:
    return Registry(url)


def verdict(champion: ModelVersion, challenger: ModelVersion, decision: Decision = "promote", num_sites: int = 0) -> Verdict:
    """What a gate would have said."""

    def side(version: ModelVersion) -> Side:
        return Side(
            run="run",
            weights_sha256=version.weights_sha256,
            job_sha256=version.job_sha256,
            release=version.release,
            temperature=version.temperature,
        )

    overall = Slice(site=None, is_new=False, num_studies=9, num_subjects=9, margin=0.02)
    sites = tuple(overall.model_copy(update={"site": f"site {number}"}) for number in range(num_sites))
    return Verdict(
        decision=decision,
        sites=("north",) if decision == "refuse" else (),
        subjects_needed=None,
        reasons=("made by hand",),
        improvement="",
        findings=(),
        comparison=Comparison(num_unlabelled=0, num_tests=1, num_improvements=1, overall=overall, sites=sites),
        policy=GatePolicy(),
        lineage=Lineage(champion=side(champion), challenger=side(challenger), holdout="h@0", split="test"),
    )


def judge(registry: Registry, number: int, decision: Decision = "promote") -> None:
    """Records a verdict on a version against the champion of this moment."""
    champion = registry.champion(MODEL_NAME)
    assert champion is not None
    registry.record_verdict(MODEL_NAME, number, verdict(champion, registry.version(MODEL_NAME, number), decision))


def champion(registry: Registry) -> int | None:
    found = registry.champion(MODEL_NAME)
    return None if found is None else found.version


def test_a_version_is_a_run_with_its_weights(registry: Registry, runs: Path) -> None:
    first, second, third = registry.versions(MODEL_NAME)
    assert [first.version, second.version, third.version] == [1, 2, 3]
    assert first.run_url == str(runs / "run0")
    assert len({first.weights_sha256, second.weights_sha256, third.weights_sha256}) == 3
    assert first.release == open_run(first.run_url).job.release
    assert first.job_sha256 == open_run(first.run_url).job.sha256
    assert 0.05 <= first.temperature <= 20
    assert (first.verdict, first.aliases, third.aliases) == (None, (), ("challenger",))
    assert registry.names() == [MODEL_NAME]


def test_the_same_run_again_is_the_same_version(registry: Registry, runs: Path) -> None:
    again = registry.register(MODEL_NAME, str(runs / "run1"))
    assert (again.version, again.aliases) == (2, ())
    assert registry.challenger(MODEL_NAME).version == 3
    assert len(registry.versions(MODEL_NAME)) == 3
    assert registry.register(MODEL_NAME, str(runs / "run3")).version == 4


def test_the_first_champion_needs_no_verdict_and_is_no_challenger_any_more(registry: Registry) -> None:
    assert champion(registry) is None
    assert registry.promote(MODEL_NAME, 3).aliases == ("champion",)
    assert registry.challenger(MODEL_NAME) is None


def test_nothing_is_promoted_without_a_verdict_against_the_champion_of_this_moment(registry: Registry) -> None:
    registry.promote(MODEL_NAME, 1)
    with pytest.raises(GateError, match="found none"):
        registry.promote(MODEL_NAME, 2)
    for decision in ("refuse", "cannot_tell"):
        judge(registry, 2, decision)
        with pytest.raises(GateError, match=decision):
            registry.promote(MODEL_NAME, 2)
    judge(registry, 3)
    judge(registry, 2)
    registry.promote(MODEL_NAME, 2)
    with pytest.raises(GateError, match="older champion"):
        registry.promote(MODEL_NAME, 3)
    assert champion(registry) == 2


def test_promoting_the_champion_again_changes_nothing(registry: Registry) -> None:
    registry.promote(MODEL_NAME, 1)
    registry.promote(MODEL_NAME, 1)
    assert len(registry.history(MODEL_NAME)) == 1


def test_a_dry_run_refuses_the_same_and_changes_nothing(registry: Registry) -> None:
    assert registry.promotable(MODEL_NAME, 1)[1] is None
    registry.promote(MODEL_NAME, 1)
    with pytest.raises(GateError, match="found none"):
        registry.promotable(MODEL_NAME, 2)
    with pytest.raises(GateError, match="earlier champion"):
        registry.rollback_target(MODEL_NAME)
    assert champion(registry) == 1


def test_rollback_goes_back_one_champion_at_a_time_and_the_history_keeps_all(registry: Registry) -> None:
    registry.promote(MODEL_NAME, 1)
    for number in (2, 3):
        judge(registry, number)
        registry.promote(MODEL_NAME, number, f"reason {number}")
    assert registry.rollback(MODEL_NAME, "alarms at night").version == 2
    assert registry.rollback(MODEL_NAME).version == 1
    with pytest.raises(GateError, match="earlier champion"):
        registry.rollback(MODEL_NAME)
    moves = [(move.action, move.version, move.previous) for move in registry.history(MODEL_NAME)]
    assert moves == [("promote", 1, None), ("promote", 2, 1), ("promote", 3, 2), ("rollback", 2, 3), ("rollback", 1, 2)]
    assert [move.reason for move in registry.history(MODEL_NAME)][2:4] == ["reason 3", "alarms at night"]


def test_what_was_rolled_back_can_return_while_its_verdict_holds(registry: Registry) -> None:
    registry.promote(MODEL_NAME, 1)
    judge(registry, 2)
    registry.promote(MODEL_NAME, 2)
    registry.rollback(MODEL_NAME)
    assert registry.promote(MODEL_NAME, 2).aliases == ("champion",)
    assert registry.rollback(MODEL_NAME).version == 1


def test_rollback_without_any_champion_is_refused(registry: Registry) -> None:
    with pytest.raises(GateError, match="found none"):
        registry.rollback(MODEL_NAME)


def test_a_process_that_dies_before_the_alias_moved_leaves_one_champion(
    registry: Registry, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.promote(MODEL_NAME, 1)
    judge(registry, 2)
    with monkeypatch.context() as patched:

        def die(*_: object) -> None:
            raise KeyboardInterrupt

        patched.setattr(registry._client, "set_registered_model_alias", die)
        with pytest.raises(KeyboardInterrupt):
            registry.promote(MODEL_NAME, 2)
    after = Registry(url)
    assert champion(after) == 2
    assert [version.aliases for version in after.versions(MODEL_NAME)] == [(), ("champion",), ("challenger",)]
    assert after.rollback(MODEL_NAME).version == 1
    assert after._client.get_registered_model(MODEL_NAME).aliases["champion"] == 1


def test_of_two_promotions_at_once_one_wins_and_the_other_is_told(url: str) -> None:
    opened = Registry(url)
    opened.promote(MODEL_NAME, 1)
    for number in (2, 3):
        judge(opened, number)

    def promote(number: int) -> str:
        try:
            Registry(url).promote(MODEL_NAME, number)
        except GateError as error:
            return str(error)
        return "promoted"

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(promote, (2, 3)))
    assert answers.count("promoted") == 1
    assert sum("older champion" in answer for answer in answers) == 1
    assert [move.version for move in opened.history(MODEL_NAME)] == [1, 2 + answers.index("promoted")]


def test_a_verdict_is_kept_whole_however_many_sites_it_has(registry: Registry) -> None:
    first, second, _ = registry.versions(MODEL_NAME)
    long = verdict(first, second, num_sites=600)
    assert len(long.model_dump_json()) > TAG_LENGTH
    assert registry.record_verdict(MODEL_NAME, 2, long).verdict == long
    short = verdict(first, second)
    assert registry.record_verdict(MODEL_NAME, 2, short).verdict == short
    assert registry.record_verdict(MODEL_NAME, 2, short).verdicts == (long, short)


def test_verdicts_pile_up_and_the_newest_decides(registry: Registry) -> None:
    registry.promote(MODEL_NAME, 1)
    for decision in ("promote", "refuse"):
        judge(registry, 2, decision)
    with pytest.raises(GateError, match="refuse"):
        registry.promote(MODEL_NAME, 2)
    judge(registry, 2)
    assert [each.decision for each in registry.version(MODEL_NAME, 2).verdicts] == ["promote", "refuse", "promote"]
    registry.promote(MODEL_NAME, 2)
    first, second = registry.history(MODEL_NAME)
    assert (first.policy, first.holdout) == ("", "")
    assert (second.policy, second.holdout) == (fingerprint(GatePolicy())[:8], "h@0")


def test_a_verdict_of_which_the_first_part_was_not_written_counts_for_nothing(registry: Registry) -> None:
    first, second, _ = registry.versions(MODEL_NAME)
    registry._client.set_model_version_tag(MODEL_NAME, "2", "draf.verdict.0000.001", "half of")
    assert registry.version(MODEL_NAME, 2).verdict is None
    assert registry.record_verdict(MODEL_NAME, 2, verdict(first, second)).verdicts == (verdict(first, second),)


def test_registering_again_after_a_rollback_makes_no_challenger(registry: Registry, runs: Path) -> None:
    registry.promote(MODEL_NAME, 1)
    judge(registry, 2)
    registry.promote(MODEL_NAME, 2)
    registry.rollback(MODEL_NAME)
    assert registry.register(MODEL_NAME, str(runs / "run1")).aliases == ()
    assert registry.challenger(MODEL_NAME).version == 3


def test_a_verdict_on_other_weights_is_not_kept(registry: Registry) -> None:
    first, second, third = registry.versions(MODEL_NAME)
    with pytest.raises(GateError, match="verdict on its weights"):
        registry.record_verdict(MODEL_NAME, 3, verdict(first, second))
    assert registry.version(MODEL_NAME, 3).verdict is None
    assert third.verdict is None


def test_damaged_weights_are_neither_promoted_nor_served(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "run0", tmp_path / "run")
    registry = Registry(f"sqlite:///{shutil.copy(runs / 'registry.db', tmp_path)}")
    version = registry.register("other", str(tmp_path / "run"))
    weights = tmp_path / "run" / MODEL / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="sha256"):
        registry.promote("other", version.version)
    with pytest.raises(DataError, match="sha256"):
        predict(version, version.release, "test")


def test_changed_settings_are_neither_promoted_nor_served(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "run0", tmp_path / "run")
    registry = Registry(f"sqlite:///{shutil.copy(runs / 'registry.db', tmp_path)}")
    version = registry.register("other", str(tmp_path / "run"))
    path = tmp_path / "run" / MODEL / DESCRIPTION
    description = json.loads(path.read_text())
    # As readable as before, with the same weights.
    path.write_text(json.dumps({**description, "draf_dist": "0.0.0"}))
    with pytest.raises(GateError, match="model.json that was registered"):
        registry.promote("other", version.version)
    with pytest.raises(GateError, match="model.json that was registered"):
        predict(version, version.release, "test")
    with pytest.raises(GateError, match="none in the registry"):
        predict(replace(version, model_sha256=""), version.release, "test")
    assert registry.register("other", str(tmp_path / "run")).version == 2


def test_the_champion_is_not_judged_against_itself(registry: Registry, url: str) -> None:
    registry.promote(MODEL_NAME, 1)
    words = ["models", "gate", MODEL_NAME, "--version", "1", "--holdout", "data@0", "--registry", url]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, SpecError)
    assert "other than the champion" in str(done.exception)


def test_show_lists_every_verdict_with_policy_holdout_and_champion(registry: Registry, url: str) -> None:
    registry.promote(MODEL_NAME, 1)
    for decision in ("cannot_tell", "promote"):
        judge(registry, 2, decision)
    for which in (MODEL_NAME, f"{MODEL_NAME}@2"):
        shown = json.loads(CliRunner().invoke(app, ["models", "show", which, "--registry", url, "--json"]).stdout)
        verdicts = shown["verdicts"] if "@" in which else shown["versions"][1]["verdicts"]
        assert [each["decision"] for each in verdicts] == ["cannot_tell", "promote"]
        assert {(each["champion_version"], each["holdout"], each["policy"]) for each in verdicts} == {
            (1, "h@0", fingerprint(GatePolicy())[:8])
        }
        assert CliRunner().invoke(app, ["models", "show", which, "--registry", url]).exit_code == 0


def test_predictions_go_into_a_file_that_has_a_name(registry: Registry, url: str) -> None:
    words = ["models", "predict", f"{MODEL_NAME}@1", "--release", "data", "--registry", url, "--out", "folder/"]
    told = CliRunner().invoke(app, words).exception
    assert isinstance(told, SpecError)
    assert "--out: expected a file" in str(told)


def test_unknown_models_and_versions_are_told_with_what_is_there(registry: Registry) -> None:
    with pytest.raises(SpecError, match=f"no 'deth'. There are: {MODEL_NAME}"):
        registry.versions("deth")
    with pytest.raises(SpecError, match="found 9. There are: 1, 2, 3"):
        registry.version(MODEL_NAME, 9)
    with pytest.raises(SpecError, match="model name"):
        registry.register("Death/1", "anywhere")


def test_a_run_that_is_not_finished_is_no_version(registry: Registry, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "run0", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / MODEL)
    with pytest.raises(SpecError, match="finished run"):
        registry.register(MODEL_NAME, str(tmp_path / "run"))

"""What a retraining is told, and what it says when the gate does not let its result through."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from small_runs import small_job, small_release

from draf_dist.continual.comparison import Comparison, Slice
from draf_dist.continual.policy import GatePolicy
from draf_dist.continual.retrain import check_promotes
from draf_dist.continual.retrain_job import RetrainJob, load_retrain
from draf_dist.continual.verdict import judge
from draf_dist.continual.version import ModelVersion
from draf_dist.data.release import open_release
from draf_dist.errors import GateError, SpecError
from draf_dist.training.pin import pin
from draf_dist.training.run_folder import as_pinned_there, enter_run

ROOT = Path(__file__).resolve().parents[2]
TREE = {"kind": "retrain", "name": "again", "model": "mortality", "release": "data/icu"}


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "retrain.yaml"
    path.write_text(json.dumps({**TREE, **changes}))
    return path


def test_a_policy_in_a_file_of_its_own_is_read_from_beside_the_job(tmp_path: Path) -> None:
    (tmp_path / "gates").mkdir()
    (tmp_path / "gates" / "strict.yaml").write_text("kind: gate\nsite_margin: 0.01\npower: 0.9\n")
    job = load_retrain(written(tmp_path, policy="gates/strict.yaml"), ["policy.power=0.7", "replay.old=3"])
    assert job.policy == GatePolicy(site_margin=0.01, power=0.7)
    assert (job.replay.new, job.replay.old) == (1, 3)
    assert load_retrain(written(tmp_path), ["policy=gates/strict.yaml"]).policy == GatePolicy(site_margin=0.01, power=0.9)


def test_a_mistake_in_either_file_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "strict.yaml").write_text("kind: gate\nsite_margn: 0.01\n")
    with pytest.raises(SpecError, match=r"strict\.yaml: site_margn: expected a known key, .* Did you mean 'site_margin'"):
        load_retrain(written(tmp_path, policy="strict.yaml"))
    with pytest.raises(SpecError, match=r"retrain\.yaml: policy\.site_margn: .* Did you mean 'site_margin'"):
        load_retrain(written(tmp_path, policy={"site_margn": 0.01}))


def test_the_job_that_comes_with_the_project_can_be_read() -> None:
    job = load_retrain(ROOT / "jobs" / "retrain_synth.yaml")
    assert job.policy == GatePolicy()


def test_the_page_the_readme_and_the_job_speak_of_the_same_model_and_release() -> None:
    job = load_retrain(ROOT / "jobs" / "retrain_synth.yaml")
    page, readme = ((ROOT / name).read_text() for name in ("docs/retraining.md", "README.md"))
    assert set(re.findall(r"--model (\S+?)[`\s]", page)) == {job.model}
    assert set(re.findall(r"draf models (?:promote|rollback|show) ([a-z]+)", page)) == {job.model}
    assert set(re.findall(r"--release (\S+?)[`\s]", page)) == {job.release}
    assert set(re.findall(r"--out (data/\S+)", readme)) == {job.release}
    (run,) = set(re.findall(r"draf models register (\S+)", page))
    assert f"--out {run}\n" in readme


def test_a_local_release_is_pinned_so_that_another_working_folder_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = Path(small_release(tmp_path, num_subjects=40, seed=0))
    monkeypatch.chdir(release.parent)
    pinned = pin(small_job(release.name))
    assert pinned == pin(small_job(str(release))) == pin(pinned)
    enter_run(str(tmp_path / "run"), pinned, "continue")
    monkeypatch.chdir("/")
    assert open_release(pinned.release).store.url == str(release)
    # The same command again, from where it was given, finds its run.
    monkeypatch.chdir(release.parent)
    assert pin(as_pinned_there(small_job(release.name), str(tmp_path / "run"))).sha256 == pinned.sha256


def test_editors_take_a_policy_or_the_path_of_one() -> None:
    policy = RetrainJob.model_json_schema()["properties"]["policy"]
    assert policy["anyOf"] == [{"$ref": "#/$defs/GatePolicy"}, {"type": "string"}]


def test_credentials_in_the_url_are_refused_and_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="release: expected a URL without credentials") as caught:
        load_retrain(written(tmp_path, release="s3://key:secret@bucket/icu"))
    assert "secret" not in str(caught.value)


def part(site: str | None, lower: float, upper: float, *, subjects: int = 200) -> Slice:
    bounds = {"harm": (lower + upper) / 2, "lower": lower, "upper": upper, "upper_shared": upper, "sd": 1.0}
    about = {"site": site, "is_new": False, "num_studies": subjects, "num_subjects": subjects, "margin": 0.05}
    return Slice.model_validate({**about, **bounds})


def said(overall: Slice, *sites: Slice) -> str:
    comparison = Comparison(num_unlabelled=0, num_tests=1 + len(sites), num_improvements=1, overall=overall, sites=sites)
    verdict = judge(comparison, GatePolicy())
    about = ModelVersion("mortality", 2, "runs/x", "0" * 64, "0" * 64, "data/icu@0", 1.0, verdict, ())
    with pytest.raises(GateError) as caught:
        check_promotes(about, verdict)
    assert caught.value.exit_code == 4
    return str(caught.value)


def test_a_refusal_names_the_sites_that_are_harmed() -> None:
    text = said(part(None, -0.2, -0.1), part("northgate", -0.2, -0.1), part("riverside", 0.1, 0.4))
    assert text.startswith("mortality version 2: expected a verdict to promote, found refuse: harm at riverside. See gate.html")


def test_a_verdict_that_cannot_tell_says_where_and_how_many_subjects_would_decide() -> None:
    text = said(part(None, -0.2, -0.1), part("riverside", -0.3, 0.4))
    assert "found cannot tell: open at riverside; holdout subjects that would do: " in text
    assert " at site riverside." in text


def test_a_challenger_that_is_only_no_worse_is_told_that_no_improvement_is_shown() -> None:
    assert "found cannot tell: no improvement is shown; " in said(part(None, -0.02, 0.01), part("riverside", -0.02, 0.01))

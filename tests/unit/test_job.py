"""Jobs and run folders: what a run is called, what it stores, and whom it lets in."""

import re
from pathlib import Path

import pytest

from draf_dist.errors import GateError, SpecError
from draf_dist.storage import open_store
from draf_dist.training.job import FinetuneJob
from draf_dist.training.jobs import RESOLVED, load_job, resolved
from draf_dist.training.journal import read_lines
from draf_dist.training.ledger import FILE as LEDGER
from draf_dist.training.ledger import effective_commits, receipts_by_epoch, seconds_by_kind
from draf_dist.training.run_folder import JOB, TOKEN, Fence, Start, as_pinned_there, clear, enter_run, open_run

ROOT = Path(__file__).resolve().parents[2]


def job(**changes: object) -> FinetuneJob:
    return FinetuneJob.model_validate({"name": "small", "release": "data/synth@v1", **changes})


def test_the_job_in_the_repository_is_valid_and_stores_every_default(tmp_path: Path) -> None:
    loaded = load_job(ROOT / "jobs" / "finetune_synth.yaml", ["release=s3://bucket/synth"])
    run = enter_run(str(tmp_path), loaded, "continue")
    text = (tmp_path / JOB).read_text()
    assert "release: s3://bucket/synth" in text
    assert "open_samples: 65536" in text
    assert open_run(str(tmp_path)).job == run.job == loaded


def test_overrides_that_the_readme_shows_fit_the_job_that_comes_with_it() -> None:
    shown = re.findall(r"`draf train JOB --set ('[^']+'|\S+)`", (ROOT / "README.md").read_text())
    assert shown
    for override in shown:
        load_job(ROOT / "jobs" / "finetune_synth.yaml", [override.strip("'")])


def test_a_stored_job_is_a_job(tmp_path: Path) -> None:
    enter_run(str(tmp_path), job(seed=7), "continue")
    assert load_job(tmp_path / JOB) == job(seed=7)


def test_a_run_stores_what_it_was_made_with() -> None:
    about = resolved(job())[RESOLVED]
    assert about["release_version"] == "v1"
    assert about["job_sha256"] == job().sha256
    assert about["libraries"]["torch"].startswith("2.")


def test_the_run_name_tells_jobs_apart_and_nothing_else() -> None:
    assert job().run_name == job().run_name
    assert job().run_name.startswith("small-")
    assert job(seed=1).run_name != job().run_name
    assert job(release="data/synth@v2").run_name != job().run_name


def test_an_unknown_key_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("kind: finetune\nname: x\nrelease: data\noptimizer: {learning_rat: 1.0e-3}\nepochs: 0\n")
    with pytest.raises(SpecError) as caught:
        load_job(path)
    assert "Did you mean 'learning_rate'?" in str(caught.value)
    assert "epochs" in str(caught.value)


def test_a_key_is_named_as_it_stands_in_the_file_whatever_unions_it_lies_in(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: x\nrelease: y\nmodel: {kind: draf, encoders: {image: {kind: image2d, widht: 3}}}\nseeed: 1\n")
    with pytest.raises(SpecError) as caught:
        load_job(path, ["corruption.operations=[{kind: jpeg, gird: [0, 50, 10]}]"])
    message = str(caught.value)
    assert "job.yaml: model.encoders.image.widht: expected a known key, found 'widht'. Did you mean 'widths'?" in message
    assert "corruption.operations.0.gird: expected a known key, found 'gird'. Did you mean 'grid'?" in message
    assert "seeed: expected a known key, found 'seeed'. Did you mean 'seed'?" in message


def test_an_override_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: x\nrelease: y\n")
    with pytest.raises(SpecError, match=r"--set corruption\.operations: expected a YAML value"):
        load_job(path, ["corruption.operations=[1"])


def test_a_url_with_a_secret_is_refused_without_repeating_it(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: x\nrelease: s3://AKIAEXAMPLE:hunter2@bucket/synth\n")
    with pytest.raises(SpecError) as caught:
        load_job(path)
    assert "environment" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_environment_variables_in_a_url_are_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    assert job(release="s3://$SECRET/synth").release == "s3://$SECRET/synth"


@pytest.mark.parametrize("pin", ["@0123456789abcdef", f"@{'0' * 64}"])
def test_what_pins_the_root_of_a_bucket_is_no_secret(pin: str) -> None:
    assert job(release=f"s3://bucket{pin}", pretrained={"cxr": f"s3://bucket{pin}"}).release == f"s3://bucket{pin}"


def test_a_job_that_was_refused_before_anything_began_gives_way_to_the_corrected_one(tmp_path: Path) -> None:
    enter_run(str(tmp_path), job(epochs=2), "continue")
    assert enter_run(str(tmp_path), job(epochs=3), "continue").job.epochs == 3


def test_a_folder_with_another_job_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    Fence.take(enter_run(str(tmp_path), job(), "continue").store)
    with pytest.raises(SpecError, match=r"one with another seed, epochs\. Choose another --out"):
        enter_run(str(tmp_path), job(seed=1, epochs=3), "continue")
    assert enter_run(str(tmp_path), job(seed=1), "fresh").job.seed == 1


def test_resume_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="expected a run to resume"):
        enter_run(str(tmp_path / "none"), job(), "resume")
    assert not (tmp_path / "none").exists()


def test_fresh_removes_a_run_and_nothing_else(tmp_path: Path) -> None:
    enter_run(str(tmp_path), job(), "continue")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SpecError, match=r"found thesis\.tex as well"):
        clear(open_store(str(tmp_path)))
    assert (tmp_path / "thesis.tex").exists()
    assert (tmp_path / JOB).exists()


def test_a_folder_that_holds_something_else_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "HEAD.json").write_text("{}")
    with pytest.raises(SpecError, match=r"found HEAD\.json as well"):
        enter_run(str(tmp_path), job(), "continue")
    assert [path.name for path in tmp_path.iterdir()] == ["HEAD.json"]


def test_fresh_spares_a_folder_that_only_looks_like_a_part_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.tex").write_text("years of work")
    starts: tuple[Start, ...] = ("fresh", "continue")
    for start in starts:
        with pytest.raises(SpecError, match=r"found neither job\.yaml nor attempt"):
            enter_run(str(tmp_path), job(), start)
    assert (tmp_path / "model" / "thesis.tex").exists()
    assert not (tmp_path / JOB).exists()


def test_the_rest_of_a_run_half_removed_is_not_taken_for_the_next_one(tmp_path: Path) -> None:
    """Its ledger says "finished": a new job that inherited it would be reported with the result of the old."""
    (tmp_path / TOKEN).write_text("token")
    (tmp_path / LEDGER).write_text('{"event": "end", "outcome": "finished"}\n')
    with pytest.raises(SpecError, match="--fresh removes it"):
        enter_run(str(tmp_path), job(seed=1), "continue")
    assert enter_run(str(tmp_path), job(seed=1), "fresh").end() is None


def test_fresh_removes_what_makes_a_run_first_and_keeps_its_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter_run(str(tmp_path), job(), "continue")
    store = open_store(str(tmp_path))
    Fence.take(store)
    store.write("checkpoints/step-00000001/manifest.json", b"{}")
    store.write(LEDGER, b"")
    removed: list[str] = []
    monkeypatch.setattr(store, "delete", removed.append)
    clear(store)
    assert removed == ["checkpoints/step-00000001/manifest.json", JOB, LEDGER]


def test_an_attempt_at_the_run_that_fresh_removed_is_stopped_and_its_number_is_not_used_again(tmp_path: Path) -> None:
    stale = Fence.take(enter_run(str(tmp_path), job(), "continue").store)
    folder = enter_run(str(tmp_path), job(seed=1), "fresh")
    with pytest.raises(GateError, match="found a later one"):
        stale.check()
    new = Fence.take(folder.store)
    assert (new.attempt.number, new.attempt.inherits) == (stale.attempt.number + 2, ())
    new.check()
    assert enter_run(str(tmp_path), job(seed=1), "continue").job.seed == 1


def test_a_delivery_that_came_since_does_not_make_the_same_command_another(tmp_path: Path) -> None:
    release, out = str(tmp_path / "release"), str(tmp_path / "run")
    unpinned, pinned = job(release=release), job(release=f"{release}@0123456789abcdef")
    assert as_pinned_there(unpinned, out) == unpinned
    enter_run(out, pinned, "continue")
    assert as_pinned_there(unpinned, out) == pinned
    other = job(release=f"{release}@fedcba9876543210")
    assert as_pinned_there(other, out) == other
    elsewhere = job(release=str(tmp_path / "elsewhere"))
    assert as_pinned_there(elsewhere, out) == elsewhere


def test_the_attempt_that_started_last_is_the_one_that_may_write(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    old = Fence.take(store)
    old.check()
    new = Fence.take(store)
    new.check()
    with pytest.raises(GateError, match="a later one"):
        old.check()


def commit(start: int, stop: int, count: int, seconds: float = 1.0) -> dict[str, object]:
    receipt = {"count": count, "uid_sum": f"{count:016x}"}
    return {"event": "commit", "start": start, "stop": stop, "receipts": {"0": receipt}, "seconds": {"step": seconds}}


def test_what_a_later_attempt_consumed_again_counts_once() -> None:
    """Attempt 1 commits [0, 4) and [4, 8); the checkpoint at 8 is broken, so attempt 2 begins at 4."""
    lines = [
        {"event": "attempt", "start": 0},
        commit(0, 4, 40),
        commit(4, 8, 41),
        {"event": "attempt", "start": 4},
        commit(4, 9, 50),
    ]
    assert [(c["start"], c["stop"]) for c in effective_commits(lines)] == [(0, 4), (4, 9)]
    assert receipts_by_epoch(lines)[0].count == 90
    assert receipts_by_epoch(lines)[0].uid_sum == f"{90:016x}"


def test_a_commit_that_no_checkpoint_backs_does_not_count() -> None:
    lines = [{"event": "attempt", "start": 0}, commit(0, 4, 40), {"event": "attempt", "start": 0}, commit(0, 4, 40)]
    assert receipts_by_epoch(lines)[0].count == 40


def test_seconds_add_up_over_attempts() -> None:
    lines = [
        commit(0, 4, 40, 1.5),
        {"event": "attempt", "start": 4},
        commit(4, 8, 40, 2.0),
        {"event": "end", "seconds": {"other": 1.0}},
    ]
    assert seconds_by_kind(lines) == {"step": 3.5, "other": 1.0}


def test_a_journal_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_lines(open_store(str(tmp_path)), "ledger.jsonl") == []

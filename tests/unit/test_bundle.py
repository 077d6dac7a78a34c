"""What goes to a cluster: a name that every platform takes, URLs that the cluster reaches, a command."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draf_dist.errors import SpecError
from draf_dist.launch.bundle import NAME_LENGTH, Bundle, bundle, is_this_machine
from draf_dist.launch.cluster_profile import ClusterProfile, load_cluster, load_profile
from draf_dist.storage import has_credentials, open_store
from draf_dist.training.job import FinetuneJob
from draf_dist.training.jobs import load_job, parse_job
from draf_dist.training.pretrain_job import PretrainJob

PROFILES = Path(__file__).resolve().parents[2] / "cluster" / "profiles"
REMOTE = load_cluster(PROFILES / "one_gpu_node.yaml").model_copy(update={"dashboard": "https://ray.example.org"})
LAPTOP = load_cluster(PROFILES / "laptop.yaml")


def job(**fields: object) -> FinetuneJob:
    return FinetuneJob.model_validate({"name": "first", "release": "s3://bucket/synth", **fields})


@given(st.from_regex(r"[a-z0-9][a-z0-9_-]{0,80}", fullmatch=True))
def test_every_name_of_a_job_becomes_a_dns_label_that_keeps_the_hash(name: str) -> None:
    spec = job(name=name)
    found = bundle(spec, REMOTE).name
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", found)
    assert len(found) <= NAME_LENGTH
    assert found.endswith(f"-{spec.sha256[:8]}")


def test_a_run_lies_under_the_storage_of_the_cluster() -> None:
    spec = job()
    assert bundle(spec, REMOTE).run_url == f"s3://example-bucket/runs/{spec.run_name}"


def test_the_same_job_in_another_folder_is_another_submission() -> None:
    names = {bundle(job(), REMOTE, out).name for out in (None, "s3://bucket/a", "s3://bucket/b")}
    assert len(names) == 3
    assert bundle(job(), REMOTE, "s3://bucket/a/") == bundle(job(), REMOTE, "s3://bucket/a")


def test_every_setting_that_is_overridden_makes_another_run() -> None:
    path = PROFILES.parents[1] / "jobs" / "finetune_synth.yaml"
    assert bundle(load_job(path), LAPTOP).name != bundle(load_job(path, ["seed=1"]), LAPTOP).name


def test_the_files_hold_the_job_and_the_profile(tmp_path: Path) -> None:
    spec = PretrainJob.model_validate({"name": "x", "release": "s3://b/r", "objective": {"kind": "simclr", "modality": "image"}})
    made = bundle(spec, REMOTE)
    for name, text in made.files.items():
        (tmp_path / name).write_text(text)
    assert parse_job(made.files["job.yaml"], where="job.yaml") == spec
    assert load_cluster(tmp_path / "cluster.yaml") == REMOTE
    assert load_profile(tmp_path / "cluster.yaml") == REMOTE.train


def test_the_command_trains_where_the_files_lie() -> None:
    made = Bundle("first-01234567", "s3://b/run", {})
    assert made.command("/draf")[3:] == ["train", "/draf/job.yaml", "--profile", "/draf/cluster.yaml", "--out", "s3://b/run"]


def test_every_folder_of_this_machine_is_refused_at_once_for_a_cluster_elsewhere() -> None:
    local = job(release="data/synth@0123456789abcdef", pretrained={"image": "runs/encoder"})
    with pytest.raises(SpecError) as caught:
        bundle(local, REMOTE, "runs/first")
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["--out", "release", "pretrained.image"]
    assert "expected a URL that one-gpu-node reaches, found the folder runs/encoder" in lines[2]


def test_folders_of_this_machine_are_made_absolute_for_a_cluster_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = bundle(job(release="data/synth@0123456789abcdef", pretrained={"image": "runs/encoder"}), LAPTOP)
    found = parse_job(made.files["job.yaml"], where="job.yaml")
    assert isinstance(found, FinetuneJob)
    assert found.release == f"{tmp_path}/data/synth@0123456789abcdef"
    assert found.pretrained == {"image": f"{tmp_path}/runs/encoder"}
    assert made.run_url == f"{tmp_path}/runs/{found.run_name}"


def test_credentials_in_a_folder_are_refused_without_being_repeated() -> None:
    with pytest.raises(SpecError, match="--out: expected a URL without credentials") as caught:
        bundle(job(), REMOTE, "s3://key:hunter2@bucket/run")
    assert "hunter2" not in str(caught.value)


def test_a_profile_with_credentials_is_refused() -> None:
    with pytest.raises(SpecError, match="without credentials"):
        ClusterProfile.model_validate({**LAPTOP.model_dump(), "dashboard": "http://user:hunter2@127.0.0.1:8265"})


@pytest.mark.parametrize(
    "url",
    ["s3://user:hunter2@b/x", "s3://hunter2@b", "s3:/user:hunter2@b", "S3://user:hun/ter2@b/x", "https://user:hunter2@h/x"],
)
def test_no_store_is_opened_at_a_url_with_credentials_and_they_are_not_repeated(url: str) -> None:
    with pytest.raises(SpecError, match="expected one without credentials") as caught:
        open_store(url)
    assert "ter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["s3://b/x", "s3://b@0123456789abcdef", f"s3://b/x@{'0' * 64}", "data/x@0123456789abcdef", "file:///a@b", "https://h:80/x"],
)
def test_a_pin_is_no_user(url: str) -> None:
    assert not has_credentials(url)


def test_this_machine_is_what_its_loopback_is() -> None:
    assert all(is_this_machine(f"http://{host}:8265") for host in ("127.0.0.1", "127.0.0.2", "LOCALHOST", "[::1]"))
    assert not any(is_this_machine(f"http://{host}") for host in ("10.0.0.1", "127.0.0.1.example.org", "localhost.example.org"))

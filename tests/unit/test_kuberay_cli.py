"""`draf submit --render`: what stands on standard output can be piped on."""

from pathlib import Path

import pytest
import yaml
from manifests import PROFILES, ROOT
from typer.testing import CliRunner

from draf_dist.cli.app import app
from draf_dist.errors import SpecError
from draf_dist.launch.cluster_profile import load_cluster

JOBS = [ROOT / "jobs" / "finetune_synth.yaml", ROOT / "jobs" / "pretrain_synth.yaml"]


def submit(job: Path, cluster: Path, *words: str) -> str:
    command = ["submit", str(job), "--cluster", str(cluster), "--set", "release=s3://bucket/release", *words]
    shown = CliRunner().invoke(app, command, catch_exceptions=False)
    assert (shown.exit_code, shown.stderr) == (0, "")
    return shown.stdout


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
@pytest.mark.parametrize("path", [path for path in PROFILES if "://" in load_cluster(path).storage], ids=lambda path: path.stem)
def test_a_manifest_is_all_that_is_printed(job: Path, path: Path) -> None:
    documents = list(yaml.safe_load_all(submit(job, path, "--render", "kuberay")))
    assert [document["kind"] for document in documents] == ["ConfigMap", "NetworkPolicy", "RayJob"]
    assert len({document["metadata"]["name"] for document in documents}) == 1


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_a_launcher_file_is_all_that_is_printed(cloud: str) -> None:
    config = yaml.safe_load(submit(JOBS[0], ROOT / "cluster" / "profiles" / "one_gpu_node.yaml", "--render", cloud))
    assert config["provider"]["type"] == cloud


def test_the_laptop_is_no_cluster_to_render() -> None:
    with pytest.raises(SpecError, match="storage: expected a URL that the nodes of laptop reach, found the folder"):
        submit(JOBS[0], ROOT / "cluster" / "profiles" / "laptop.yaml", "--render", "kuberay")


def test_another_run_folder_gives_another_name() -> None:
    cluster = ROOT / "cluster" / "profiles" / "one_gpu_node.yaml"
    here, there = (
        list(yaml.safe_load_all(submit(JOBS[0], cluster, "--render", "kuberay", *out)))[-1]
        for out in ([], ["--out", "s3://other/run"])
    )
    assert here["metadata"]["name"] != there["metadata"]["name"]
    assert there["metadata"]["annotations"]["draf/run"] == "s3://other/run"
    assert there["spec"]["entrypoint"].endswith("--out s3://other/run")

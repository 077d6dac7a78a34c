"""Profiles: where a job runs."""

import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from draf_dist.cli.app import app
from draf_dist.errors import SpecError
from draf_dist.launch import cores
from draf_dist.launch.cluster_profile import NodeShape, load_cluster, load_profile, places_on_node
from draf_dist.launch.profile import OneProcessProfile, RayProfile

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "profile.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_profile_that_is_shipped_is_valid_and_the_readme_names_it(path: Path) -> None:
    assert isinstance(load_profile(path), OneProcessProfile | RayProfile)
    assert f"[{path.name}]({path.name})" in (CLUSTER / "README.md").read_text()


def test_without_a_profile_a_job_runs_as_the_laptop_profile_says() -> None:
    assert load_profile(CLUSTER / "laptop.yaml") == OneProcessProfile()


def test_one_process_computes_as_the_profile_says() -> None:
    backend = OneProcessProfile(device="cpu", threads=2, accumulation=3).backend()
    assert (backend.rank, backend.world, backend.threads, backend.accumulation) == (0, 1, 2, 3)
    assert backend.device == torch.device("cpu")


def test_cores_are_shared_by_the_ranks_of_a_machine_and_no_rank_goes_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    monkeypatch.setattr(cores, "CGROUP_QUOTA", tmp_path / "cpu.max")
    assert [cores.decode_threads_of(ranks) for ranks in (1, 2, 5, 13)] == [12, 6, 2, 1]
    assert OneProcessProfile(device="cpu").backend().decode_threads == 12
    assert OneProcessProfile(device="cpu", decode_threads=3).backend().decode_threads == 3
    (tmp_path / "cpu.max").write_text("350000 100000\n")
    assert [cores.decode_threads_of(ranks) for ranks in (1, 2)] == [3, 1]
    (tmp_path / "cpu.max").write_text("max 100000\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    assert cores.decode_threads_of(1) == 16
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores.decode_threads_of(1) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_cuda_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(SpecError, match="expected a CUDA device, found none"):
        OneProcessProfile(device="cuda").backend()


def test_a_worker_on_cpus_asks_for_no_gpu() -> None:
    assert RayProfile(cpus_per_worker=0.5).bundle == {"CPU": 0.5}
    assert RayProfile(gpus_per_worker=1).bundle == {"CPU": 1.0, "GPU": 1.0}


@pytest.mark.parametrize("text", ["kind: rya\n", "workers: 2\n"])
def test_an_unknown_kind_is_answered_with_the_known_ones(tmp_path: Path, text: str) -> None:
    with pytest.raises(SpecError, match="expected one of one_process, ray"):
        load_profile(written(tmp_path, text))


def test_all_problems_of_a_profile_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        load_profile(written(tmp_path, "kind: ray\nworker: 3\nmax_failures: -1\ndeepspeed: {zero_stage: 4}\n"))
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert any("Did you mean 'workers'?" in line for line in lines)


@pytest.mark.parametrize("address", ["ray://head:10001", "head", ":6379", "head:port"])
def test_an_address_is_that_of_a_head_which_this_node_can_join(tmp_path: Path, address: str) -> None:
    with pytest.raises(SpecError, match="expected auto or host:port"):
        load_profile(written(tmp_path, f"kind: ray\naddress: '{address}'\n"))
    assert RayProfile(address="auto").address == "auto"
    assert RayProfile(address="10.0.0.1:6379").address == "10.0.0.1:6379"


def test_the_schema_of_a_profile_lists_both_kinds() -> None:
    shown = CliRunner().invoke(app, ["schema", "profile"])
    assert set(json.loads(shown.stdout)["discriminator"]["mapping"]) == {"one_process", "ray"}


def test_a_profile_that_does_not_exist_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"kind: finetune\nname: x\nrelease: {tmp_path / 'release'}\n")
    with pytest.raises(SpecError, match="no such file"):
        CliRunner().invoke(app, ["train", str(job), "--profile", str(tmp_path / "no.yaml")], catch_exceptions=False)


@pytest.mark.parametrize("path", sorted((CLUSTER / "profiles").glob("*.yaml")), ids=lambda path: path.name)
def test_a_cluster_profile_says_how_to_train(path: Path) -> None:
    assert load_profile(path) == load_cluster(path).train


def test_a_cluster_that_can_not_hold_its_workers_is_refused(tmp_path: Path) -> None:
    text = (CLUSTER / "profiles" / "one_gpu_node.yaml").read_text().replace("workers: 4", "workers: 5")
    with pytest.raises(SpecError, match=r"train.workers: expected at most 4"):
        load_cluster(written(tmp_path, text))


def test_an_image_without_a_version_is_refused(tmp_path: Path) -> None:
    text = (CLUSTER / "profiles" / "laptop.yaml").read_text().replace("draf_dist:0.1.0-cpu", "draf_dist:latest")
    with pytest.raises(SpecError, match="version or a digest"):
        load_cluster(written(tmp_path, text))


@pytest.mark.parametrize("path", sorted((CLUSTER / "profiles").glob("*.yaml")), ids=lambda path: path.name)
def test_the_readme_names_every_cluster_that_is_shipped(path: Path) -> None:
    assert f"[profiles/{path.name}](profiles/{path.name})" in (CLUSTER / "README.md").read_text()


def test_a_node_holds_as_many_workers_as_the_scarcer_of_cpus_and_gpus_allows() -> None:
    train = RayProfile(address="auto", cpus_per_worker=8, gpus_per_worker=1)
    assert places_on_node(NodeShape(cpus=48, memory_gib=1, gpus=4), train) == 4
    assert places_on_node(NodeShape(cpus=17, memory_gib=1, gpus=4), train) == 2
    assert places_on_node(NodeShape(cpus=48, memory_gib=1), train) == 0


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("count: 2, max_count: 4", "count: 2, max_count: 1", "workers.max_count: expected at least count, 2"),
        ("address: auto", "address: 10.0.0.1:6379", "train.address: expected auto"),
        ("storage: s3://", "storage: s3://key:word@", "expected a URL without credentials"),
        ("storage: s3://", "storage: s3://key:word/with/slash@", "expected a URL without credentials"),
        ("namespace: draf", "namespace: Draf", "kubernetes.namespace"),
        ("namespace: draf", "namespace: draf, auth_secret: a_b", "kubernetes.auth_secret"),
        ("namespace: draf", "namespace: draf, gpu_resource: gpu", "kubernetes.gpu_resource"),
        ("namespace: draf", "namespace: draf, node_selector: {zone: a b}", "kubernetes.node_selector.zone"),
        ("namespace: draf", "namespace: draf, store_ports: []", "kubernetes.store_ports"),
        ("namespace: draf", "namespace: draf, store_ports: [70000]", "kubernetes.store_ports.0"),
        ("image_id: ami-00000000000000000", "image_id: latest", "aws.image_id"),
        ("subnets: [subnet-00000000000000000]", "subnets: []", "aws.subnets"),
        ("zone: europe-west4-a", "zone: europe-west4", "gcp.zone"),
        ("service_account: draf-node@", "service_account: draf node@", "gcp.service_account"),
    ],
)
def test_a_cluster_that_can_not_be_is_refused_by_key(tmp_path: Path, before: str, after: str, problem: str) -> None:
    text = (CLUSTER / "profiles" / "four_gpu_nodes.yaml").read_text()
    assert before in text
    with pytest.raises(SpecError) as caught:
        load_cluster(written(tmp_path, text.replace(before, after)))
    assert problem in str(caught.value)
    assert "key:word" not in str(caught.value)


def test_only_a_run_that_can_not_begin_on_the_nodes_that_are_there_needs_to_wait(tmp_path: Path) -> None:
    """Two nodes with eight GPUs are there from the start, of four."""
    text = (CLUSTER / "profiles" / "four_gpu_nodes.yaml").read_text().replace("nodes_timeout_s: 1800", "nodes_timeout_s: 0")
    train = load_cluster(written(tmp_path, text.replace("min_workers: 8", "min_workers: 16"))).train
    assert (train.least, train.workers) == (16, 32)
    assert load_cluster(written(tmp_path, text.replace("workers: 32\n  min_workers: 8", "workers: 16"))).train.least == 16
    for more in ("workers: 32\n  min_workers: 17", "workers: 32"):
        with pytest.raises(SpecError, match="train.nodes_timeout_s: expected how long to wait"):
            load_cluster(written(tmp_path, text.replace("workers: 32\n  min_workers: 8", more)))


def test_the_schema_of_a_cluster_says_what_its_parts_are() -> None:
    shown = json.loads(CliRunner().invoke(app, ["schema", "cluster"]).stdout)
    assert {"name", "image", "storage", "train", "head", "workers"} <= set(shown["required"])
    assert {"kubernetes", "aws", "gcp"} <= set(shown["properties"])


@pytest.mark.parametrize(
    ("dashboard", "remedy"),
    [
        ("evilmod://127.0.0.1", "For example http://127.0.0.1:8265"),
        ("ray://127.0.0.1:10001", "For example"),
        ("HTTP://127.0.0.1:8265", "For example"),
        ("http://", "For example"),
        ("http:///api", "For example"),
        ("http://127.0.0.1:8265?x=1", "For example"),
        ("127.0.0.1:8265", "Write http://127.0.0.1:8265."),
        ("localhost", "Write http://localhost."),
        ("auto", "Write http://auto."),
    ],
)
def test_a_dashboard_is_reached_over_http_alone(tmp_path: Path, dashboard: str, remedy: str) -> None:
    text = (CLUSTER / "profiles" / "laptop.yaml").read_text().replace("http://127.0.0.1:8265", dashboard)
    assert dashboard in text
    with pytest.raises(SpecError, match="dashboard: expected an http:// or https:// URL with a host") as caught:
        load_cluster(written(tmp_path, text))
    assert remedy in str(caught.value)


@pytest.mark.parametrize("dashboard", ["user:hunter2@127.0.0.1:8265", "http://user:hunter2@[::1", "evil://user:hunter2@h"])
def test_a_password_in_a_dashboard_is_not_repeated(tmp_path: Path, dashboard: str) -> None:
    text = (CLUSTER / "profiles" / "laptop.yaml").read_text().replace("http://127.0.0.1:8265", f"'{dashboard}'")
    assert dashboard in text
    with pytest.raises(SpecError) as caught:
        load_cluster(written(tmp_path, text))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("dashboard", ["https://ray.example.org", "http://[::1]:8265", "https://Gate.example.org:443/ray/a-b"])
def test_a_dashboard_may_lie_behind_a_gate(tmp_path: Path, dashboard: str) -> None:
    text = (CLUSTER / "profiles" / "laptop.yaml").read_text().replace("http://127.0.0.1:8265", f"'{dashboard}'")
    assert load_cluster(written(tmp_path, text)).dashboard == dashboard


def test_what_is_passed_on_to_deepspeed_is_checked_at_once_and_all_of_it(tmp_path: Path) -> None:
    extra = "{train_batch_size: 4, wall_clock_breakdwn: true, zero_optimization: {stage: 1, allgather_bucket_size: many}}"
    with pytest.raises(SpecError) as caught:
        load_profile(written(tmp_path, f"kind: ray\ndeepspeed: {{extra: {extra}}}\n"))
    told = {line.split(": ", 1)[1].split(": ")[0]: line for line in str(caught.value).splitlines()}
    assert len(told) == 4
    assert "can't be passed on: the job's batch_size sets it, found 4" in told["deepspeed.extra.train_batch_size"]
    assert "can't be passed on: deepspeed.zero_stage sets it, found 1" in told["deepspeed.extra.zero_optimization.stage"]
    assert "Did you mean 'wall_clock_breakdown'?" in told["deepspeed.extra.wall_clock_breakdwn"]
    assert "valid integer" in told["deepspeed.extra.zero_optimization.allgather_bucket_size"]
    assert "found 'many'" in told["deepspeed.extra.zero_optimization.allgather_bucket_size"]


@pytest.mark.parametrize(
    ("deepspeed", "told"),
    [
        ("{zero_stage: 0, offload: optimizer}", "offload optimizer needs zero_stage 1 or 2 or 3, not 0"),
        ("{zero_stage: 2, offload: optimizer_and_parameters}", "needs zero_stage 3, not 2"),
        ("{zero_stage: 2, extra: {zero_optimization: {stage3_max_live_parameters: 9}}}", "do nothing at zero_stage 2: stage3_max"),
        ("{zero_stage: 0, extra: {zero_optimization: {overlap_comm: true}}}", "do nothing at zero_stage 0: overlap_comm"),
        (
            "{extra: {zero_optimization: {round_robin_gradients: true}}}",
            "round_robin_gradients: .*checkpoints could not be put together",
        ),
        ("{extra: {zero_optimization: {allgather_bucket_size: 1}}}", "allgather_bucket_size: .*multiple of 2"),
        ("{extra: {zero_optimization: {allgather_bucket_size: 1001}}}", "allgather_bucket_size: .*multiple of 2"),
        ("{extra: {flops_profiler: {enabled: true}}}", "flops_profiler: .*can't be passed on: .*which no step calls"),
        ("{extra: {dump_state: true}}", "dump_state: .*can't be passed on: log_level: info"),
    ],
)
def test_what_deepspeed_or_its_stage_does_not_do_is_refused(tmp_path: Path, deepspeed: str, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        load_profile(written(tmp_path, f"kind: ray\ndeepspeed: {deepspeed}\n"))


def test_activation_checkpointing_reaches_the_one_process() -> None:
    assert OneProcessProfile(device="cpu", activation_checkpointing=True).backend().activation_checkpointing
    assert not OneProcessProfile(device="cpu").backend().activation_checkpointing

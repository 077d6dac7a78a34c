"""Files for Ray's cluster launcher: Ray and the cloud would take them, and nothing of them is open to the world."""

import copy
from typing import Any

import pytest
import yaml
from manifests import PROFILES, a_bundle, a_job, profile, rendered
from ray.autoscaler._private.util import prepare_config, validate_config

from draf_dist.errors import SpecError
from draf_dist.launch import cloud
from draf_dist.launch.bundle import bundle
from draf_dist.launch.cloud import Cloud, launcher
from draf_dist.launch.cloud_rules import problems
from draf_dist.launch.cluster_profile import load_cluster
from draf_dist.launch.render import render

Tree = dict[str, Any]
CLOUDS: list[Cloud] = ["aws", "gcp"]
IN_CLOUDS = [path.stem for path in PROFILES if load_cluster(path).aws is not None]
WORKER, HEAD = "available_node_types/worker", "available_node_types/head"


def changed(config: Tree, path: str, value: Any) -> Tree:
    """A copy with a value set by path."""
    config = copy.deepcopy(config)
    *parents, last = path.split("/")
    node: Any = config
    for parent in parents:
        node = node[int(parent)] if parent.isdecimal() else node.setdefault(parent, {})
    node[last] = value
    return config


@pytest.mark.parametrize("changes", [{}, {"workers__spot": True}, {"workers__gpus": 0, "train__gpus_per_worker": 0}], ids=str)
@pytest.mark.parametrize("name", IN_CLOUDS)
@pytest.mark.parametrize("target", CLOUDS)
def test_ray_takes_what_is_rendered(target: Cloud, name: str, changes: Tree) -> None:
    (config,) = rendered(target, profile(name, **changes))
    validate_config(prepare_config(copy.deepcopy(config)))
    assert problems(target, config) == []


@pytest.mark.parametrize("target", CLOUDS)
def test_nothing_is_open_to_the_world(target: Cloud) -> None:
    (config,) = rendered(target, profile())
    assert config["provider"]["use_internal_ips"] is True
    assert "security_group" not in config["provider"]
    assert "0.0.0.0" not in yaml.safe_dump(config)
    (head,) = (command for command in config["head_start_ray_commands"] if "ray start" in command)
    assert "--dashboard-host=127.0.0.1" in head.split()


@pytest.mark.parametrize("target", CLOUDS)
def test_every_node_has_the_token_as_a_file_and_asks_for_it(target: Cloud) -> None:
    (config,) = rendered(target, profile())
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]


@pytest.mark.parametrize("target", CLOUDS)
def test_nothing_is_installed_on_a_node_that_the_image_does_not_hold(target: Cloud) -> None:
    prepared = prepare_config(launcher(target, profile()))
    assert prepared["head_setup_commands"] == prepared["worker_setup_commands"] == []


def test_roles_stand_for_keys_and_only_the_heads_may_start_nodes() -> None:
    (aws,), (gcp,) = (rendered(target, profile()) for target in CLOUDS)
    roles = [aws["available_node_types"][t]["node_config"]["IamInstanceProfile"]["Name"] for t in ("head", "worker")]
    assert roles == ["example-draf-head", "example-draf-node"]
    accounts = [gcp["available_node_types"][t]["node_config"]["serviceAccounts"][0]["email"] for t in ("head", "worker")]
    assert [account.split("@")[0] for account in accounts] == ["draf-head", "draf-node"]


def test_disks_are_encrypted_and_metadata_needs_a_session() -> None:
    node = launcher("aws", profile())["available_node_types"]["worker"]["node_config"]
    assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])
    assert node["MetadataOptions"]["HttpTokens"] == "required"


def test_machines_on_compute_engine_have_no_public_address() -> None:
    for node_type in launcher("gcp", profile())["available_node_types"].values():
        assert all("accessConfigs" not in interface for interface in node_type["node_config"]["networkInterfaces"])


@pytest.mark.parametrize("target", CLOUDS)
def test_only_workers_may_be_taken_away(target: Cloud) -> None:
    spot, kept = (launcher(target, profile(workers__spot=spot))["available_node_types"] for spot in (True, False))
    assert spot["head"] == kept["head"]
    marked = {"aws": ("InstanceMarketOptions", {"MarketType": "spot"}), "gcp": ("scheduling", "SPOT")}[target]
    assert marked[0] in spot["worker"]["node_config"]
    assert str(marked[1]) in str(spot["worker"]["node_config"][marked[0]])
    assert str(marked[1]) not in str(kept["worker"]["node_config"])


@pytest.mark.parametrize("target", CLOUDS)
def test_a_node_with_gpus_waits_for_its_driver(target: Cloud) -> None:
    types = launcher(target, profile())["available_node_types"]
    assert types["worker"]["resources"] == {"CPU": 44, "GPU": 4}
    assert "nvidia-smi" in types["worker"]["initialization_commands"][0]
    assert types["head"]["resources"] == {"CPU": 0}
    assert "initialization_commands" not in types["head"]
    without = launcher(target, profile(workers__gpus=0, train__gpus_per_worker=0))
    assert "initialization_commands" not in without["available_node_types"]["worker"]
    assert "-e DS_ACCELERATOR=cpu" in without["docker"]["run_options"]


def test_the_driver_is_installed_where_there_are_gpus() -> None:
    types = launcher("gcp", profile())["available_node_types"]
    assert types["worker"]["node_config"]["metadata"] == {"items": [{"key": "install-nvidia-driver", "value": "True"}]}
    assert types["worker"]["node_config"]["guestAccelerators"] == [{"acceleratorType": "nvidia-l4", "acceleratorCount": 4}]
    assert "metadata" not in types["head"]["node_config"]


def test_gpus_of_no_type_are_refused() -> None:
    with pytest.raises(SpecError, match=r"gcp.accelerator: expected a type of GPU"):
        rendered("gcp", profile(gcp__accelerator=None))
    assert rendered("gcp", profile(gcp__accelerator=None, workers__gpus=0, train__gpus_per_worker=0))


@pytest.mark.parametrize("target", CLOUDS)
def test_a_profile_without_the_cloud_is_told_what_to_add(target: Cloud) -> None:
    cluster = profile("laptop")
    with pytest.raises(SpecError, match=rf"cluster laptop: {target}: .* Add `{target}:` as in cluster/profiles/one_gpu_node.yaml"):
        render(target, cluster, a_bundle(cluster))


def test_a_folder_of_this_machine_and_a_missing_cloud_are_told_together() -> None:
    cluster = load_cluster(PROFILES[-1].with_name("laptop.yaml"))
    with pytest.raises(SpecError) as caught:
        render("aws", cluster, bundle(a_job(), cluster))
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["storage", "cluster laptop"]


@pytest.mark.parametrize(
    ("target", "path", "value", "named"),
    [
        ("aws", "provider/regoin", "eu-central-1", "provider.regoin: unknown, did you mean region?"),
        ("gcp", "provider/project", "a", "provider.project: unknown"),
        ("aws", f"{WORKER}/node_config/InstanceTyp", "m5.large", '"InstanceTyp"'),
        ("aws", f"{WORKER}/node_config/IamInstanceProfile/Nam", "a", '"Nam"'),
        ("aws", f"{HEAD}/node_config/BlockDeviceMappings/0/Ebs/VolumeSize", "200", "VolumeSize"),
        ("aws", f"{WORKER}/node_config/SubnetIds", [], "SubnetIds: nothing"),
        ("gcp", f"{WORKER}/node_config/machinType", "n2-standard-4", "machinType: unknown, did you mean machineType?"),
        ("gcp", f"{WORKER}/node_config/scheduling", [{"preemptible": True}], "scheduling: expected a mapping, found list"),
        ("gcp", f"{WORKER}/node_config/disks/0/initializeParams/diskSizeGb", "200", "diskSizeGb: expected int, found str"),
        ("gcp", f"{WORKER}/node_config/guestAccelerators", {}, "guestAccelerators: expected a list, found dict"),
        ("aws", f"{WORKER}/min_worker", 1, "min_worker"),
        ("aws", "cluster_nam", "a", "cluster_nam"),
        ("aws", "max_workers", 0, "sum of `min_workers`"),
        ("gcp", "head_node_type", "haed", "head_node_type"),
        ("aws", "docker/container_name", "", "container"),
        ("aws", "provider/use_internal_ips", False, "use_internal_ips: nodes would have public addresses"),
        ("aws", "provider/security_group", {"IpPermissions": [{"FromPort": 8000, "ToPort": 9000}]}, "opens 8265"),
        ("aws", "docker/run_options", [], "ask for no token"),
        ("gcp", f"{HEAD}/node_config/networkInterfaces/0/accessConfigs", [{}], "head: a public address"),
    ],
)
def test_what_ray_or_the_cloud_would_refuse_is_refused(target: Cloud, path: str, value: Any, named: str) -> None:
    config = launcher(target, profile())
    assert problems(target, config) == []
    assert any(named in problem for problem in problems(target, changed(config, path, value)))


def test_the_ssh_port_may_be_opened() -> None:
    config = changed(launcher("aws", profile()), "provider/security_group", {"IpPermissions": [{"FromPort": 22, "ToPort": 22}]})
    assert problems("aws", config) == []


def test_a_file_that_ray_would_refuse_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    # No profile leads here; what if Ray's keys change?
    monkeypatch.setattr(cloud, "IDLE_MINUTES", "ten")
    with pytest.raises(SpecError, match=r"idle_timeout_minutes: 'ten' is not of type 'number'"):
        rendered("aws", profile())


@pytest.mark.parametrize("target", CLOUDS)
def test_the_comments_lead_from_the_file_to_a_submitted_job(target: Cloud) -> None:
    text = render(target, profile(), a_bundle(profile()))
    comments = [line for line in text.splitlines() if line.startswith("#")]
    for step in ("ray get-auth-token --generate", "ray up ", "ray dashboard ", "draf submit JOB", "ray down "):
        assert any(step in line for line in comments)

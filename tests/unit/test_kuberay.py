"""What is rendered for KubeRay: valid by the schema of its custom resource, safe by default, and the job that was asked for."""

import json
import shlex
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import public_data
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator
from manifests import PROFILES, ROOT, a_bundle, a_job, pods, profile, ray_job, rendered
from ruamel.yaml import YAML

from draf_dist.errors import SpecError
from draf_dist.launch import kuberay_rules
from draf_dist.launch.bundle import bundle
from draf_dist.launch.cluster_profile import ClusterProfile, load_cluster
from draf_dist.launch.profile import RayProfile
from draf_dist.launch.render import render
from draf_dist.training.jobs import parse_job

VARIANTS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "a queue": {"kubernetes__queue": "team-a"},
    "no queue": {"kubernetes__queue": None},
    "an autoscaler": {"kubernetes__queue": None, "workers__max_count": 9, "train__nodes_timeout_s": 60},
    "an autoscaler from nothing": {
        "kubernetes__queue": None,
        "workers__count": 0,
        "workers__max_count": 9,
        "train__nodes_timeout_s": 60,
    },
    "no GPU": {"workers__gpus": 0, "train__gpus_per_worker": 0},
    "another GPU": {"kubernetes__gpu_resource": "amd.com/gpu"},
    "a pull secret": {"kubernetes__image_pull_secret": "registry"},
    "a service account": {"kubernetes__storage_secret": None, "kubernetes__service_account": "draf"},
    "nodes that may go": {"workers__spot": True, "kubernetes__node_selector": {"pool": "gpu", "zone": "1"}},
    "a store inside": {"kubernetes__store_ports": [443, 9000], "kubernetes__operator_namespace": "kuberay"},
    "a head alone": {
        "kubernetes__shm_gib": 2,
        "workers__count": 0,
        "workers__max_count": None,
        "train__workers": 1,
        "train__min_workers": 1,
        "train__cpus_per_worker": 1,
        "train__gpus_per_worker": 0,
    },
}


@cache
def validator() -> Draft7Validator:
    return Draft7Validator(json.loads((public_data.folder("kuberay") / "RayJob.v1.schema.json").read_text()))


def violations(job: dict[str, Any]) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in validator().iter_errors(job)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", [path.stem for path in PROFILES])
def test_every_profile_is_rendered_as_a_valid_rayjob(name: str, variant: str) -> None:
    job = ray_job(profile(name, **VARIANTS[variant]))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert kuberay_rules.problems(job) == []
    assert violations(job) == []


names = st.from_regex(r"[a-z]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)


@st.composite
def clusters(draw: st.DrawFn) -> ClusterProfile:
    """Any profile that its own checks let through."""
    gpus, per_worker = draw(st.integers(0, 8)), draw(st.integers(0, 1))
    count = draw(st.integers(0, 5))
    most = draw(st.none() | st.integers(max(count, 1), 9))
    cpus, cpus_per_worker = draw(st.integers(1, 96)), draw(st.sampled_from([0.25, 0.5, 1, 8]))
    on_node = min(int(cpus / cpus_per_worker), gpus if per_worker else 1000)
    places = on_node * (count if most is None else most) if (most or count) else on_node
    if places == 0:
        per_worker, cpus_per_worker, places = 0, 0.25, 1
    memory = draw(st.integers(4, 1000))
    tree = {
        "name": draw(names),
        "image": draw(st.sampled_from(["draf:1", "a.example.org:5000/b/draf@sha256:" + "0" * 64, "draf:no"])),
        "storage": "s3://bucket/" + draw(names),
        "head": {"cpus": cpus, "memory_gib": memory, "gpus": gpus},
        "workers": {
            "cpus": cpus,
            "memory_gib": memory,
            "gpus": gpus,
            "count": count,
            "max_count": most,
            "spot": draw(st.booleans()),
        },
        "train": {
            "address": "auto",
            "workers": draw(st.integers(1, places)),
            "cpus_per_worker": cpus_per_worker,
            "gpus_per_worker": per_worker,
            "nodes_timeout_s": 1,
        },
        "kubernetes": {
            "namespace": draw(names),
            "queue": draw(st.none() | names | st.sampled_from(["yes", "1e3", "0x1F"])),
            "storage_secret": draw(st.none() | names),
            "service_account": draw(st.none() | names),
            "image_pull_secret": draw(st.none() | names),
            "shm_gib": draw(st.integers(1, memory // 2)),
            "node_selector": draw(st.dictionaries(names.map("example.org/".__add__), st.sampled_from(["on", "12", "No", "a"]))),
        },
    }
    return ClusterProfile.model_validate(tree)


@given(clusters())
@settings(max_examples=12, deadline=None)
def test_whatever_profile_is_valid_gives_a_valid_rayjob_that_says_the_same_to_every_reader(cluster: ClusterProfile) -> None:
    text = render("kuberay", cluster, a_bundle(cluster))
    documents = list(yaml.safe_load_all(text))
    assert violations(documents[-1]) == []
    assert documents == list(YAML(typ="safe", pure=True).load_all(text))


def test_words_that_yaml_1_1_takes_for_something_else_stay_words() -> None:
    words = {"a": "on", "b": "No", "c": "y", "d": "0x1F", "e": "1_000", "f": "010", "g": "null", "h": "1e3"}
    assert pods(ray_job(profile(kubernetes__node_selector=words)))["workers"]["spec"]["nodeSelector"] == words


def test_a_misspelt_key_is_no_valid_rayjob() -> None:
    job = ray_job(profile())
    job["spec"]["ttlSecondAfterFinished"] = job["spec"].pop("ttlSecondsAfterFinished")
    assert violations(job) == ["$.spec: Additional properties are not allowed ('ttlSecondAfterFinished' was unexpected)"]


def test_the_head_runs_the_job_that_was_asked_for() -> None:
    cluster = profile()
    files, *_, job = rendered("kuberay", cluster)
    asked = bundle(a_job(), cluster)
    assert shlex.split(job["spec"]["entrypoint"]) == asked.command("/etc/draf")
    assert parse_job(files["data"]["job.yaml"], where="job") == a_job()
    assert files["data"]["cluster.yaml"] == asked.files["cluster.yaml"]
    head = pods(job)["head"]["spec"]
    mounted = {mount["mountPath"]: mount["name"] for mount in head["containers"][0]["volumeMounts"]}
    assert {"name": mounted["/etc/draf"], "configMap": {"name": files["metadata"]["name"]}} in head["volumes"]


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_the_profile_in_the_manifest_trains_as_the_one_on_this_machine(tmp_path: Path, path: Path) -> None:
    cluster = profile(path.stem)
    (tmp_path / "cluster.yaml").write_text(rendered("kuberay", cluster)[0]["data"]["cluster.yaml"])
    assert load_cluster(tmp_path / "cluster.yaml").train == cluster.train
    assert isinstance(cluster.train, RayProfile)


def test_a_job_is_tried_once_so_that_no_two_attempts_write_one_run() -> None:
    spec = ray_job(profile())["spec"]
    assert (spec["backoffLimit"], spec["submitterConfig"]["backoffLimit"]) == (0, 0)
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] > 0


def test_every_call_needs_the_token_of_the_secret() -> None:
    cluster = ray_job(profile(kubernetes__auth_secret="a-token"))["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "a-token"}
    assert cluster["rayVersion"] == version("ray")


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_pod_is_root_or_writes_outside_its_scratch_space(variant: str) -> None:
    for pod in pods(ray_job(profile(**VARIANTS[variant]))).values():
        spec, (container,) = pod["spec"], pod["spec"]["containers"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] == 1000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        sized = {volume["name"] for volume in spec["volumes"] if volume.get("emptyDir", {}).get("sizeLimit")}
        assert {mount["name"] for mount in container["volumeMounts"] if not mount.get("readOnly")} <= sized
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_only_the_autoscaler_has_an_account_of_kubernetes() -> None:
    fixed = pods(ray_job(profile(**VARIANTS["no queue"])))
    scaled = pods(ray_job(profile(**VARIANTS["an autoscaler"])))
    assert [pod["spec"]["automountServiceAccountToken"] for pod in fixed.values()] == [False, False, False]
    assert {name for name, pod in scaled.items() if pod["spec"]["automountServiceAccountToken"]} == {"head"}


def test_the_autoscaler_is_there_only_where_nodes_come_and_go() -> None:
    fixed = ray_job(profile(**VARIANTS["no queue"]))["spec"]["rayClusterSpec"]
    assert (fixed["enableInTreeAutoscaling"], "autoscalerOptions" in fixed) == (False, False)
    scaled = ray_job(profile(**VARIANTS["an autoscaler"]))["spec"]["rayClusterSpec"]
    (group,) = scaled["workerGroupSpecs"]
    assert (scaled["enableInTreeAutoscaling"], scaled["autoscalerOptions"]["version"]) == (True, "v2")
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (1, 1, 9)


def test_a_queue_admits_all_nodes_at_once_and_lifts_the_suspension() -> None:
    queued = ray_job(profile("four_gpu_nodes"))
    (group,) = queued["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert queued["spec"]["suspend"]
    assert not queued["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"]
    assert group["replicas"] == 4
    free = ray_job(profile("four_gpu_nodes", kubernetes__queue=None))
    assert "suspend" not in free["spec"]
    assert "kueue.x-k8s.io/queue-name" not in free["metadata"]["labels"]


def test_gpus_are_asked_for_counted_and_tolerated_only_where_they_are() -> None:
    with_gpus, without = pods(ray_job(profile())), pods(ray_job(profile(**VARIANTS["no GPU"])))
    container = with_gpus["workers"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert with_gpus["workers"]["spec"]["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert "nvidia.com/gpu" not in with_gpus["head"]["spec"]["containers"][0]["resources"]["limits"]
    assert "tolerations" not in without["workers"]["spec"]
    assert {"name": "DS_ACCELERATOR", "value": "cpu"} in without["workers"]["spec"]["containers"][0]["env"]
    assert "DS_ACCELERATOR" not in {entry["name"] for entry in container["env"]}


def test_the_head_trains_only_where_there_are_no_workers() -> None:
    beside, alone = (ray_job(profile(**VARIANTS[v]))["spec"]["rayClusterSpec"] for v in ("as shipped", "a head alone"))
    assert beside["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "num-cpus" not in alone["headGroupSpec"]["rayStartParams"]
    assert alone["workerGroupSpecs"] == []


def test_the_head_stays_off_nodes_that_may_be_taken_away() -> None:
    found = pods(ray_job(profile(**VARIANTS["nodes that may go"])))
    (term,) = found["head"]["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    assert {entry["operator"] for entry in term["matchExpressions"]} == {"NotIn"}
    assert {entry["key"] for entry in found["workers"]["spec"]["tolerations"]} >= {
        entry["key"] for entry in term["matchExpressions"]
    }
    assert found["workers"]["spec"]["nodeSelector"] == {"pool": "gpu", "zone": "1"}
    assert "nodeSelector" not in found["head"]["spec"]


def test_credentials_of_the_store_come_from_a_secret_and_only_where_training_is() -> None:
    found = pods(ray_job(profile(kubernetes__image_pull_secret="registry")))
    for name in ("head", "workers"):
        assert found[name]["spec"]["containers"][0]["envFrom"] == [{"secretRef": {"name": "object-store"}}]
    assert "envFrom" not in found["submitter"]["spec"]["containers"][0]
    assert all(pod["spec"]["imagePullSecrets"] == [{"name": "registry"}] for pod in found.values())
    by_account = pods(ray_job(profile(**VARIANTS["a service account"])))
    assert not any("envFrom" in pod["spec"]["containers"][0] for pod in by_account.values())
    assert by_account["workers"]["spec"]["serviceAccountName"] == "draf"


def test_shared_memory_beyond_half_of_a_pods_memory_is_refused() -> None:
    assert ray_job(profile(kubernetes__shm_gib=80))
    with pytest.raises(SpecError, match=r"cluster one-gpu-node: .*workers: shared memory of 81 GiB .*lower kubernetes.shm_gib"):
        ray_job(profile(kubernetes__shm_gib=81))


def test_all_folders_of_this_machine_are_refused_together() -> None:
    cluster = load_cluster(ROOT / "cluster" / "profiles" / "laptop.yaml")
    with pytest.raises(SpecError) as caught:
        render("kuberay", cluster, bundle(a_job("data/release"), cluster))
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["storage", "release"]
    assert "the nodes of laptop reach" in str(caught.value)


def test_the_comments_name_every_secret_and_no_value() -> None:
    text = render("kuberay", profile(kubernetes__image_pull_secret="registry"), a_bundle(profile()))
    comments = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    for secret in ("ray-auth-token", "object-store", "registry"):
        assert f"kubectl -n draf create secret generic {secret}" in comments
    assert "--from-literal" not in comments


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kubernetes__node_selector": {"registry-token": "abc"}}, "nodeSelector.registry-token"),
        ({"kubernetes__node_selector": {"pool": "AKIAABCDEFGHIJKLMNOP"}}, "an AWS access key"),
        ({"image": "draf:in-the-environment"}, "the value of $THE_API_TOKEN"),
    ],
)
def test_a_secret_in_a_profile_is_refused_and_not_repeated(
    changes: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_API_TOKEN", "in-the-environment")
    with pytest.raises(SpecError) as caught:
        ray_job(profile(**changes))
    assert named in str(caught.value)
    assert not any(value in str(caught.value) for value in ("abc", "AKIAABCDEFGHIJKLMNOP", "in-the-environment"))

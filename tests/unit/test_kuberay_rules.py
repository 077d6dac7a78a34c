"""Rules of KubeRay's operator that its schema can't see: each one refuses what breaks it, and nothing else is touched."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from manifests import profile, ray_job

from draf_dist.launch import kuberay_rules as rules
from draf_dist.launch.kuberay_rules import RULES, problems

Tree = dict[str, Any]
SCALED = {"kubernetes__queue": None, "workers__max_count": 3}
RULE = {"condition": {"jobStatus": "FAILED", "ttlSeconds": 5}, "policy": "DeleteCluster"}


@cache
def _shipped() -> Tree:
    return ray_job(profile())


@cache
def _scaled() -> Tree:
    return ray_job(profile(**SCALED))


@cache
def _queued() -> Tree:
    return ray_job(profile("four_gpu_nodes"))


def broken(base: Callable[[], Tree], changes: dict[str, Any]) -> Tree:
    """A copy with values set by path; None takes a key out."""
    job = copy.deepcopy(base())
    for path, value in changes.items():
        *parents, last = path.split("/")
        node: Any = job
        for parent in parents:
            node = node[int(parent)] if parent.isdecimal() else node.setdefault(parent, {})
        if value is None:
            del node[last]
        else:
            node[last] = value
    return job


CLUSTER = "spec/rayClusterSpec"
HEAD, WORKERS = f"{CLUSTER}/headGroupSpec", f"{CLUSTER}/workerGroupSpecs/0"
ENVIRONMENT = f"{HEAD}/template/spec/containers/0/env"
V2 = [{"name": "RAY_enable_autoscaler_v2", "value": "1"}]


def strategy(*rule: Tree, **more: Any) -> dict[str, Any]:
    return {
        "spec/shutdownAfterJobFinishes": False,
        "spec/ttlSecondsAfterFinished": 0,
        "spec/deletionStrategy": {"deletionRules": [*rule], **more},
    }


def later(policy: str, ttl: int) -> Tree:
    return {"condition": {"jobStatus": "FAILED", "ttlSeconds": ttl}, "policy": policy}


BROKEN: list[tuple[Any, Callable[[], Tree], dict[str, Any]]] = [
    (rules.name_is_a_label, _shipped, {"metadata/name": "1-job"}),
    (rules.name_is_a_label, _shipped, {"metadata/name": "A"}),
    (rules.name_is_a_label, _shipped, {"metadata/name": "a" * 48}),
    (rules.lifetime_implies_shutdown, _shipped, {"spec/shutdownAfterJobFinishes": False}),
    (rules.lifetime_implies_shutdown, _shipped, {"spec/ttlSecondsAfterFinished": -1}),
    (rules.selected_cluster_is_left_alone, _queued, {"spec/clusterSelector": {"ray.io/cluster": "a"}, "metadata/labels": {}}),
    (rules.selected_cluster_is_left_alone, _shipped, {"spec/clusterSelector": {"ray.io/cluster": "a"}, "spec/backoffLimit": 1}),
    (
        rules.selected_cluster_is_left_alone,
        _shipped,
        {
            "spec/clusterSelector": {"ray.io/cluster": "a"},
            "spec/submissionMode": "SidecarMode",
            "spec/submitterConfig": None,
            "spec/submitterPodTemplate": None,
        },
    ),
    (rules.has_a_cluster, _shipped, {CLUSTER: {}}),
    (rules.has_a_cluster, _shipped, {f"{WORKERS}/template/spec/containers": []}),
    (rules.interactive_is_tried_once, _shipped, {"spec/submissionMode": "InteractiveMode", "spec/backoffLimit": 1}),
    (rules.interactive_is_tried_once, _shipped, {"spec/backoffLimit": -1}),
    (rules.interactive_is_tried_once, _shipped, {"spec/activeDeadlineSeconds": 0}),
    (rules.sidecar_has_no_pod_of_its_own, _shipped, {"spec/submissionMode": "SidecarMode"}),
    (
        rules.sidecar_has_no_pod_of_its_own,
        _shipped,
        {"spec/submissionMode": "SidecarMode", f"{HEAD}/template/spec/restartPolicy": "Always"},
    ),
    (rules.deletion_is_said_once, _shipped, {"spec/deletionStrategy": {"deletionRules": [RULE]}}),
    (rules.deletion_is_said_once, _shipped, {"spec/deletionStrategy": {}}),
    (rules.deletion_is_said_once, _shipped, {"spec/deletionStrategy": {"onSuccess": {"policy": "DeleteSelf"}}}),
    (
        rules.deletion_is_said_once,
        _shipped,
        {"spec/deletionStrategy": {"onSuccess": {"policy": "DeleteNone"}, "onFailure": {"policy": "DeleteNone"}}},
    ),
    (rules.deletion_is_said_once, _shipped, strategy(RULE, onSuccess={"policy": "DeleteSelf"}, onFailure={"policy": "DeleteSelf"})),
    (rules.deletion_is_said_once, _shipped, strategy(RULE, RULE)),
    (rules.deletion_is_said_once, _shipped, strategy(later("DeleteCluster", 9), later("DeleteSelf", 8))),
    (rules.deletion_is_said_once, _shipped, strategy(later("DeleteSelf", -1))),
    (rules.deletion_is_said_once, _shipped, strategy({"condition": {"ttlSeconds": 1}, "policy": "DeleteSelf"})),
    (rules.deletion_is_said_once, _shipped, strategy({"condition": {"jobStatus": "FAILED"}})),
    (rules.deletion_is_said_once, _scaled, strategy(later("DeleteWorkers", 1))),
    (rules.deletion_is_said_once, _shipped, strategy(RULE) | {"spec/clusterSelector": {"ray.io/cluster": "a"}}),
    (rules.token_has_a_version, _shipped, {f"{CLUSTER}/rayVersion": None}),
    (rules.token_has_a_version, _shipped, {f"{CLUSTER}/rayVersion": "2.51.9"}),
    (rules.token_has_a_version, _shipped, {f"{CLUSTER}/authOptions/enableK8sTokenAuth": True}),
    (rules.resources_are_said_once, _shipped, {f"{WORKERS}/resources": {"CPU": "4"}}),
    (rules.resources_are_said_once, _shipped, {f"{HEAD}/rayStartParams/labels": "a=b"}),
    (rules.replicas_fit, _shipped, {f"{WORKERS}/minReplicas": None}),
    (rules.replicas_fit, _shipped, {f"{WORKERS}/minReplicas": 2}),
    (rules.replicas_fit, _scaled, {f"{WORKERS}/minReplicas": -1}),
    (rules.replicas_fit, _scaled, {f"{WORKERS}/replicas": 4}),
    (rules.autoscaler_is_asked_once, _shipped, {ENVIRONMENT: V2}),
    (rules.autoscaler_is_asked_once, _scaled, {ENVIRONMENT: V2}),
    (rules.autoscaler_is_asked_once, _scaled, {f"{WORKERS}/template/spec/restartPolicy": "Always"}),
    (rules.autoscaler_is_asked_once, _scaled, {f"{HEAD}/template/spec/restartPolicy": "OnFailure"}),
    (rules.autoscaler_is_asked_once, _scaled, {f"{WORKERS}/suspend": True}),
    (rules.autoscaler_is_asked_once, _scaled, {f"{CLUSTER}/autoscalerOptions/idleTimeoutSeconds": -1}),
    (rules.autoscaler_is_asked_once, _shipped, {f"{WORKERS}/idleTimeoutSeconds": 60}),
    (rules.runtime_environment_is_yaml, _shipped, {"spec/runtimeEnvYAML": "env_vars: {a: b"}),
    (rules.runtime_environment_is_yaml, _shipped, {"spec/runtimeEnvYAML": "- a\n"}),
    (rules.cluster_is_not_upgraded, _shipped, {f"{CLUSTER}/upgradeStrategy": {"type": "Recreate"}}),
    (rules.gates_are_off, _shipped, {f"{CLUSTER}/networkPolicy": {"mode": "DenyAll"}}),
    (rules.gates_are_off, _shipped, {f"{CLUSTER}/tlsOptions": {"enabled": True}}),
    (rules.gates_are_off, _shipped, {f"{CLUSTER}/historyServerOptions": {}}),
    (rules.gates_are_off, _shipped, {f"{CLUSTER}/gcsFaultToleranceOptions": {"backend": "rocksdb"}}),
    (rules.queue_can_admit, _shipped, {"spec/suspend": True}),
    (rules.queue_can_admit, _queued, {f"{CLUSTER}/enableInTreeAutoscaling": True}),
    (rules.queue_can_admit, _queued, {f"{CLUSTER}/workerGroupSpecs": [{"groupName": "g", "template": {}}] * 18}),
    (rules.queue_can_admit, _queued, {"spec/shutdownAfterJobFinishes": False}),
    (rules.queue_can_admit, _queued, {"spec/clusterSelector": {"ray.io/cluster": "a"}}),
    (rules.shared_memory_fits, _shipped, {f"{WORKERS}/template/spec/volumes/1/emptyDir/sizeLimit": "100Gi"}),
]


@pytest.mark.parametrize(("rule", "base", "changes"), BROKEN, ids=lambda value: getattr(value, "__name__", "-"))
def test_what_the_operator_refuses_is_refused_by_its_rule(rule: Any, base: Callable[[], Tree], changes: dict[str, Any]) -> None:
    assert list(rule(base())) == []
    found = list(rule(broken(base, changes)))
    assert found
    assert {f"RayJob: {problem}" for problem in found} <= set(problems(broken(base, changes)))


def test_every_rule_is_broken_above() -> None:
    assert {rule for rule, _, _ in BROKEN} == set(RULES)


def test_deletion_rules_in_order_are_let_through() -> None:
    ordered = strategy(later("DeleteWorkers", 1), later("DeleteCluster", 1), later("DeleteSelf", 2))
    assert problems(broken(_shipped, ordered)) == []

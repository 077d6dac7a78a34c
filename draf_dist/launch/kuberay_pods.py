"""The pods of a RayJob: a head, workers, and one that submits the command. None is root, none writes but into its scratch space."""

import copy
from collections.abc import Mapping
from typing import Any

from draf_dist.launch.cluster_profile import ClusterProfile, Kubernetes, NodeShape
from draf_dist.launch.ray_cluster import OBJECT_STORE_BYTES, train_settings

Tree = dict[str, Any]
FILES = "/etc/draf"
TEMPORARY = "/tmp"
USER = 1000
GCS_PORT, DASHBOARD_PORT = 6379, 8265
# Ray's object store lies in shared memory; a head that does not train needs no more of it, and writes no more than logs.
HEAD_SHM_GIB, HEAD_SCRATCH_GIB = 1, 10
# Beside its scratch space a container writes what it logs.
LOG_GIB = 2
# What clouds call nodes that may be taken away: GKE, EKS, Karpenter.
SPOT = {"cloud.google.com/gke-spot": "true", "eks.amazonaws.com/capacityType": "SPOT", "karpenter.sh/capacity-type": "spot"}

_POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def labels(name: str) -> dict[str, str]:
    """What every object and pod of a job carries, and its network policy selects by; KubeRay keeps other labels for itself."""
    return {"app.kubernetes.io/part-of": "draf", "app.kubernetes.io/instance": name}


def head(cluster: ClusterProfile, name: str, *, autoscaled: bool) -> Tree:
    """The head: it runs the command, so the job's files are mounted here; it trains only where there are no workers."""
    trains = cluster.workers.most == 0
    parameters = {"object-store-memory": str(OBJECT_STORE_BYTES)} | ({} if trains else {"num-cpus": "0"})
    shm_gib, scratch_gib = room(cluster, trains=trains)
    container = _ray_container(cluster, "ray-head", cluster.head, scratch_gib)
    container["ports"] = [
        {"name": "gcs-server", "containerPort": GCS_PORT},
        {"name": "dashboard", "containerPort": DASHBOARD_PORT},
    ]
    container["volumeMounts"].append({"name": "job", "mountPath": FILES, "readOnly": True})
    volumes = [*_memory_and_scratch(shm_gib, scratch_gib), {"name": "job", "configMap": {"name": name}}]
    placement = _placement(cluster, cluster.head) if trains else _away_from_spot(cluster)
    pod = _pod(cluster.kubernetes, name, container, volumes, placement)
    # The autoscaler beside Ray asks Kubernetes for workers; nothing else here needs an account of it.
    pod["spec"]["automountServiceAccountToken"] = autoscaled
    return {"serviceType": "ClusterIP", "rayStartParams": parameters | _gpu_parameter(cluster.head), "template": pod}


def workers(cluster: ClusterProfile, name: str, *, autoscaled: bool) -> list[Tree]:
    """The group that trains; none where the head does. Without an autoscaler all there can be are asked for at once."""
    shape = cluster.workers
    if shape.most == 0:
        return []
    at_first = shape.count if autoscaled else shape.most
    shm_gib, scratch_gib = room(cluster, trains=True)
    volumes = _memory_and_scratch(shm_gib, scratch_gib)
    container = _ray_container(cluster, "ray-worker", shape, scratch_gib)
    return [
        {
            "groupName": "workers",
            "replicas": at_first,
            "minReplicas": at_first,
            "maxReplicas": shape.most,
            "rayStartParams": {"object-store-memory": str(OBJECT_STORE_BYTES)} | _gpu_parameter(shape),
            "template": _pod(cluster.kubernetes, name, container, volumes, _placement(cluster, shape)),
        }
    ]


def submitter(cluster: ClusterProfile, name: str) -> Tree:
    """The pod that hands the command to the head and follows its log; it has no credentials of the store."""
    amounts = {"cpu": "500m", "memory": "1Gi", "ephemeral-storage": f"{LOG_GIB}Gi"}
    container = _container(cluster, "ray-job-submitter", amounts, [{"name": "scratch", "mountPath": TEMPORARY}])
    volumes = [{"name": "scratch", "emptyDir": {"sizeLimit": "1Gi"}}]
    return _pod(cluster.kubernetes, name, container, volumes, _away_from_spot(cluster))


def autoscaler(cluster: ClusterProfile) -> Tree:
    """Options of the autoscaler that KubeRay puts beside the head."""
    return {
        "version": "v2",
        "idleTimeoutSeconds": 300,
        "upscalingMode": "Default",
        "env": _environment({"HOME": TEMPORARY}),
        "resources": _same({"cpu": "500m", "memory": "1Gi"}),
        "securityContext": _container_security(),
        "volumeMounts": [{"name": "scratch", "mountPath": TEMPORARY}],
    }


def _pod(kubernetes: Kubernetes, name: str, container: Tree, volumes: list[Tree], placement: Tree) -> Tree:
    spec: Tree = {"restartPolicy": "Never", "automountServiceAccountToken": False, "enableServiceLinks": False}
    if kubernetes.service_account is not None:
        spec["serviceAccountName"] = kubernetes.service_account
    if kubernetes.image_pull_secret is not None:
        spec["imagePullSecrets"] = [{"name": kubernetes.image_pull_secret}]
    spec |= {"securityContext": copy.deepcopy(_POD_SECURITY), **placement, "containers": [container], "volumes": volumes}
    return {"metadata": {"labels": labels(name)}, "spec": spec}


def room(cluster: ClusterProfile, *, trains: bool) -> tuple[int, int]:
    """GiB of shared memory and of scratch space on a node."""
    kubernetes = cluster.kubernetes
    return (kubernetes.shm_gib, kubernetes.scratch_gib) if trains else (HEAD_SHM_GIB, HEAD_SCRATCH_GIB)


def _ray_container(cluster: ClusterProfile, name: str, shape: NodeShape, scratch_gib: int) -> Tree:
    kubernetes = cluster.kubernetes
    amounts = {
        "cpu": str(shape.cpus),
        "memory": f"{shape.memory_gib}Gi",
        "ephemeral-storage": f"{scratch_gib + LOG_GIB}Gi",
        **({kubernetes.gpu_resource: str(shape.gpus)} if shape.gpus else {}),
    }
    mounts = [{"name": "scratch", "mountPath": TEMPORARY}, {"name": "shm", "mountPath": "/dev/shm"}]
    container = _container(cluster, name, amounts, mounts)
    if kubernetes.storage_secret is not None:
        container["envFrom"] = [{"secretRef": {"name": kubernetes.storage_secret}}]
    return container


def _container(cluster: ClusterProfile, name: str, amounts: Mapping[str, str], mounts: list[Tree]) -> Tree:
    return {
        "name": name,
        "image": cluster.image,
        "imagePullPolicy": "IfNotPresent",
        "env": _environment(variables(cluster) | {"HOME": TEMPORARY}),
        "resources": _same(amounts),
        "securityContext": _container_security(),
        "volumeMounts": mounts,
    }


def variables(cluster: ClusterProfile) -> dict[str, str]:
    """What Ray and the ranks read from the environment of a node, wherever that is."""
    return {"OMP_NUM_THREADS": str(cluster.train.threads), "RAY_USAGE_STATS_ENABLED": "0", **train_settings(cluster.train)}


def _container_security() -> Tree:
    return {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


def _memory_and_scratch(shm_gib: int, scratch_gib: int) -> list[Tree]:
    return [
        {"name": "scratch", "emptyDir": {"sizeLimit": f"{scratch_gib}Gi"}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shm_gib}Gi"}},
    ]


def _placement(cluster: ClusterProfile, shape: NodeShape) -> Tree:
    """Which nodes may run a pod that trains."""
    placement: Tree = {}
    tolerations = []
    if cluster.kubernetes.node_selector:
        placement["nodeSelector"] = dict(cluster.kubernetes.node_selector)
    if shape.gpus:
        tolerations.append({"key": cluster.kubernetes.gpu_resource, "operator": "Exists", "effect": "NoSchedule"})
    if cluster.workers.spot:
        tolerations += [{"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"} for key, value in SPOT.items()]
        wishes = [
            {"weight": 100, "preference": {"matchExpressions": [_expression(key, "In", value)]}} for key, value in SPOT.items()
        ]
        placement["affinity"] = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": wishes}}
    return placement | ({"tolerations": tolerations} if tolerations else {})


def _away_from_spot(cluster: ClusterProfile) -> Tree:
    """The command runs on the head: a node that is taken away there ends it, where workers would be replaced."""
    if not cluster.workers.spot:
        return {}
    terms = [{"matchExpressions": [_expression(key, "NotIn", value) for key, value in SPOT.items()]}]
    return {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}}


def _expression(key: str, operator: str, value: str) -> Tree:
    return {"key": key, "operator": operator, "values": [value]}


def _gpu_parameter(shape: NodeShape) -> dict[str, str]:
    # KubeRay finds the number itself only where the resource's name ends in `gpu`.
    return {"num-gpus": str(shape.gpus)} if shape.gpus else {}


def _environment(values: Mapping[str, str]) -> list[Tree]:
    return [{"name": name, "value": value} for name, value in values.items()]


def _same(amounts: Mapping[str, str]) -> Tree:
    return {"requests": dict(amounts), "limits": dict(amounts)}

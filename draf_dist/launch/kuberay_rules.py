"""What KubeRay's operator and Kueue refuse in a RayJob although the schema allows it: the rules of KubeRay 1.7 (validation.go).

The operator would refuse after the job was accepted, in an event that nobody reads.
"""

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from draf_dist.config.spec import parse_yaml
from draf_dist.errors import SpecError

Tree = dict[str, Any]
LONGEST_NAME = 47
MOST_GROUPS = 17
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
TOKENS_SINCE = (2, 52, 0)
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?\Z")
_QUANTITY = re.compile(r"(\d+)(Ki|Mi|Gi|Ti)\Z")
_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_ALPHA = ("networkPolicy", "tlsOptions", "historyServerOptions")
_START_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
_V2 = "RAY_enable_autoscaler_v2"


def problems(job: Tree) -> list[str]:
    """One line for everything that would be refused, in the order of the rules; empty if it will run."""
    return [f"RayJob: {problem}" for rule in RULES for problem in rule(job)]


def name_is_a_label(job: Tree) -> Iterator[str]:
    """1. A DNS-1035 label of at most 47 characters: a service is called after it."""
    name = job.get("metadata", {}).get("name", "")
    if not _DNS_1035.match(name) or len(name) > LONGEST_NAME:
        yield f"metadata.name {name!r} is no DNS-1035 label of at most {LONGEST_NAME} characters"


def lifetime_implies_shutdown(job: Tree) -> Iterator[str]:
    """2. A time to live, and suspension, need a cluster that goes when the job ends."""
    spec = job["spec"]
    if spec.get("ttlSecondsAfterFinished", 0) < 0:
        yield "ttlSecondsAfterFinished is negative"
    if not spec.get("shutdownAfterJobFinishes", False):
        if spec.get("ttlSecondsAfterFinished", 0) > 0:
            yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
        if spec.get("suspend", False):
            yield "suspend needs shutdownAfterJobFinishes"


def selected_cluster_is_left_alone(job: Tree) -> Iterator[str]:
    """3. A cluster of somebody else's is neither suspended nor made anew."""
    spec = job["spec"]
    if not spec.get("clusterSelector"):
        return
    if spec.get("suspend", False):
        yield "clusterSelector excludes suspend"
    if spec.get("backoffLimit", 0) > 0:
        yield "clusterSelector excludes backoffLimit"
    if spec.get("submissionMode") == "SidecarMode":
        yield "clusterSelector excludes SidecarMode"


def has_a_cluster(job: Tree) -> Iterator[str]:
    """4. One to make, or one to select; groups have containers."""
    spec = job["spec"]
    if not spec.get("rayClusterSpec") and not spec.get("clusterSelector"):
        yield "neither rayClusterSpec nor clusterSelector"
    for name, group in _groups(spec):
        if not _containers(group):
            yield f"{name} has no container"


def interactive_is_tried_once(job: Tree) -> Iterator[str]:
    """5. Limits are no negative numbers, and in InteractiveMode nothing is tried again."""
    spec = job["spec"]
    if spec.get("submissionMode") == "InteractiveMode" and spec.get("backoffLimit", 0) > 0:
        yield "InteractiveMode excludes backoffLimit"
    if spec.get("backoffLimit", 0) < 0:
        yield "backoffLimit is negative"
    if spec.get("activeDeadlineSeconds", 1) <= 0:
        yield "activeDeadlineSeconds is not positive"


def sidecar_has_no_pod_of_its_own(job: Tree) -> Iterator[str]:
    """6. In SidecarMode the head's pod submits, and does not start again."""
    spec = job["spec"]
    if spec.get("submissionMode") != "SidecarMode":
        return
    for key in ("submitterPodTemplate", "submitterConfig"):
        if key in spec:
            yield f"SidecarMode excludes {key}"
    head = spec.get("rayClusterSpec", {}).get("headGroupSpec", {})
    if _restart_policy(head) not in ("", "Never"):
        yield "SidecarMode needs restartPolicy Never on the head"


def deletion_is_said_once(job: Tree) -> Iterator[str]:
    """7. Rules of deletion, the older onSuccess and onFailure, and shutdownAfterJobFinishes exclude one another."""
    spec = job["spec"]
    if "deletionStrategy" not in spec:
        return
    strategy = spec["deletionStrategy"]
    rules, older = strategy.get("deletionRules", []), [strategy[key] for key in ("onSuccess", "onFailure") if key in strategy]
    if rules and spec.get("shutdownAfterJobFinishes", False):
        yield "deletionRules exclude shutdownAfterJobFinishes"
    if rules and older:
        yield "deletionRules exclude onSuccess and onFailure"
    if (not rules and not older) or len(older) == 1:
        yield "deletionStrategy needs deletionRules, or both onSuccess and onFailure"
    named = [rule.get("policy") for rule in (*rules, *older)]
    if None in named:
        yield "deletionStrategy: a rule without a policy"
    if "DeleteWorkers" in named and spec.get("rayClusterSpec", {}).get("enableInTreeAutoscaling", False):
        yield "deletionStrategy: DeleteWorkers excludes the autoscaler"
    if spec.get("clusterSelector") and {"DeleteWorkers", "DeleteCluster"} & set(named):
        yield "deletionStrategy: a selected cluster is not deleted"
    if spec.get("shutdownAfterJobFinishes", False) and any(rule.get("policy") == "DeleteNone" for rule in older):
        yield "deletionStrategy: DeleteNone excludes shutdownAfterJobFinishes"
    yield from _rules_in_order(rules)


def _rules_in_order(rules: list[Tree]) -> Iterator[str]:
    after: dict[tuple[str, str], dict[str, int]] = {}
    for rule in rules:
        condition, policy = rule.get("condition", {}), rule.get("policy", "")
        statuses = [(key, str(condition[key])) for key in ("jobStatus", "jobDeploymentStatus") if key in condition]
        ttl = condition.get("ttlSeconds", 0)
        if len(statuses) != 1:
            yield "deletionRules: a condition has one of jobStatus and jobDeploymentStatus"
            continue
        if ttl < 0:
            yield f"deletionRules: {policy} has a negative ttlSeconds"
        if policy in after.setdefault(statuses[0], {}):
            yield f"deletionRules: {policy} twice for {statuses[0][1]}"
        after[statuses[0]][policy] = ttl
    for (_, status), ttls in after.items():
        order = [policy for policy in ("DeleteWorkers", "DeleteCluster", "DeleteSelf") if policy in ttls]
        yield from (f"deletionRules: {a} comes after {b} for {status}" for a, b in pairwise(order) if ttls[a] > ttls[b])


def token_has_a_version(job: Tree) -> Iterator[str]:
    """8. Tokens need a Ray that knows them; those of Kubernetes itself don't go with a RayJob."""
    cluster = job["spec"].get("rayClusterSpec", {})
    options = cluster.get("authOptions", {})
    if options.get("enableK8sTokenAuth", False):
        yield "authOptions.enableK8sTokenAuth is not for a RayJob"
    if options.get("mode") != "token":
        return
    found = re.match(r"v?(\d+)\.(\d+)\.(\d+)", cluster.get("rayVersion", ""))
    if found is None or tuple(map(int, found.groups())) < TOKENS_SINCE:
        least = ".".join(map(str, TOKENS_SINCE))
        yield f"authOptions.mode token needs rayVersion {least} or newer, found {cluster.get('rayVersion')!r}"


def resources_are_said_once(job: Tree) -> Iterator[str]:
    """9. Resources as parameters of `ray start` or of the group, and labels of the group only."""
    for name, group in _groups(job["spec"]):
        parameters = group.get("rayStartParams", {})
        if group.get("resources") and any(parameters.get(key) for key in _START_RESOURCES):
            yield f"{name}: resources both in rayStartParams and beside them"
        if "labels" in parameters:
            yield f"{name}: labels belong beside rayStartParams, not into them"


def replicas_fit(job: Tree) -> Iterator[str]:
    """10. Without an autoscaler both bounds are given; they are no negative numbers, and in order."""
    cluster = job["spec"].get("rayClusterSpec", {})
    for group in cluster.get("workerGroupSpecs", []):
        name, least, most = group.get("groupName"), group.get("minReplicas"), group.get("maxReplicas")
        if (least is None or most is None) and not cluster.get("enableInTreeAutoscaling", False):
            yield f"{name}: minReplicas and maxReplicas are needed without an autoscaler"
        if least is not None and most is not None and not 0 <= least <= most:
            yield f"{name}: expected 0 <= minReplicas <= maxReplicas, found {least} and {most}"
        if least is not None and most is not None and not least <= group.get("replicas", least) <= most:
            yield f"{name}: replicas lie outside minReplicas and maxReplicas"


def autoscaler_is_asked_once(job: Tree) -> Iterator[str]:
    """11. Version 2 needs pods that don't start again; it is chosen by the field, not the variable, and only where there is one."""
    cluster = job["spec"].get("rayClusterSpec", {})
    options, enabled = cluster.get("autoscalerOptions", {}), cluster.get("enableInTreeAutoscaling", False)
    variables = {
        entry["name"]: entry.get("value") for c in _containers(cluster.get("headGroupSpec", {})) for entry in c.get("env", [])
    }
    by_variable = variables.get(_V2) in ("1", "true")
    if not enabled and by_variable:
        yield f"{_V2} without enableInTreeAutoscaling"
    if enabled and "version" in options and _V2 in variables:
        yield f"both autoscalerOptions.version and {_V2}"
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield "autoscalerOptions.idleTimeoutSeconds is negative"
    second = enabled and (options.get("version") == "v2" or by_variable)
    for name, group in _groups(job["spec"]):
        if second and _restart_policy(group) not in ("", "Never"):
            yield f"{name}: autoscaler v2 needs restartPolicy Never"
        if enabled and group.get("suspend", False):
            yield f"{name}: suspend excludes the autoscaler"
        if not second and {"idleTimeoutSeconds", "priority"} & set(group):
            yield f"{name}: idleTimeoutSeconds and priority need autoscaler v2"


def runtime_environment_is_yaml(job: Tree) -> Iterator[str]:
    """12. What is parsed later must parse now."""
    text = job["spec"].get("runtimeEnvYAML", "")
    if text:
        try:
            parse_yaml(text, where="runtimeEnvYAML")
        except SpecError:
            yield "runtimeEnvYAML is no mapping in YAML"


def cluster_is_not_upgraded(job: Tree) -> Iterator[str]:
    """13. The cluster of a job lives as long as the job."""
    if job["spec"].get("rayClusterSpec", {}).get("upgradeStrategy"):
        yield "rayClusterSpec.upgradeStrategy is not for a RayJob"


def gates_are_off(job: Tree) -> Iterator[str]:
    """14. Fields behind gates that are off unless an administrator has opened them."""
    cluster = job["spec"].get("rayClusterSpec", {})
    for key in _ALPHA:
        if key in cluster:
            yield f"rayClusterSpec.{key} is behind a gate that is off by default"
    if cluster.get("gcsFaultToleranceOptions", {}).get("backend") == "rocksdb":
        yield "gcsFaultToleranceOptions.backend rocksdb is behind a gate that is off by default"


def queue_can_admit(job: Tree) -> Iterator[str]:
    """Kueue: a cluster of the job's own that goes with it, of a size that stays, in at most 17 groups."""
    spec = job["spec"]
    if QUEUE_LABEL not in job.get("metadata", {}).get("labels", {}):
        if spec.get("suspend", False):
            yield f"suspend without the label {QUEUE_LABEL}: nobody would lift it"
        return
    cluster = spec.get("rayClusterSpec", {})
    if not spec.get("shutdownAfterJobFinishes", False):
        yield "Kueue needs shutdownAfterJobFinishes"
    if spec.get("clusterSelector"):
        yield "Kueue excludes clusterSelector"
    if cluster.get("enableInTreeAutoscaling", False):
        yield "Kueue excludes the autoscaler"
    if len(cluster.get("workerGroupSpecs", [])) > MOST_GROUPS:
        yield f"Kueue takes at most {MOST_GROUPS} worker groups"


def shared_memory_fits(job: Tree) -> Iterator[str]:
    """Kubernetes: what lies in memory counts as memory of the container, which is killed above its limit."""
    for name, group in _groups(job["spec"]):
        volumes = group.get("template", {}).get("spec", {}).get("volumes", [])
        in_memory = [volume["emptyDir"] for volume in volumes if volume.get("emptyDir", {}).get("medium") == "Memory"]
        taken = sum(_size_bytes(volume.get("sizeLimit", "0Ki")) for volume in in_memory)
        limits = [container.get("resources", {}).get("limits", {}).get("memory", "0Ki") for container in _containers(group)]
        if taken and taken * 2 > sum(map(_size_bytes, limits)):
            yield f"{name}: shared memory of {taken / 2**30:g} GiB is more than half of the pod's memory; lower kubernetes.shm_gib"


def _groups(spec: Tree) -> Iterator[tuple[str, Tree]]:
    cluster = spec.get("rayClusterSpec", {})
    if cluster:
        yield "headGroupSpec", cluster.get("headGroupSpec", {})
        for group in cluster.get("workerGroupSpecs", []):
            yield str(group.get("groupName")), group


def _containers(group: Tree) -> list[Tree]:
    found: list[Tree] = group.get("template", {}).get("spec", {}).get("containers", [])
    return found


def _restart_policy(group: Tree) -> str:
    return str(group.get("template", {}).get("spec", {}).get("restartPolicy", ""))


def _size_bytes(quantity: str) -> int:
    found = _QUANTITY.match(quantity)
    return int(found[1]) * _UNITS[found[2]] if found else 0


RULES: tuple[Callable[[Tree], Iterator[str]], ...] = (
    name_is_a_label,
    lifetime_implies_shutdown,
    selected_cluster_is_left_alone,
    has_a_cluster,
    interactive_is_tried_once,
    sidecar_has_no_pod_of_its_own,
    deletion_is_said_once,
    token_has_a_version,
    resources_are_said_once,
    replicas_fit,
    autoscaler_is_asked_once,
    runtime_environment_is_yaml,
    cluster_is_not_upgraded,
    gates_are_off,
    queue_can_admit,
    shared_memory_fits,
)

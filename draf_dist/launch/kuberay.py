"""A job as objects of Kubernetes: a ConfigMap with its files, network policies, and a RayJob (ray.io/v1) that carries it out."""

import shlex
from importlib.metadata import version
from typing import Any

from draf_dist.launch.bundle import Bundle
from draf_dist.launch.cluster_profile import ClusterProfile
from draf_dist.launch.kuberay_network import policies
from draf_dist.launch.kuberay_pods import FILES, autoscaler, head, labels, submitter, workers

Tree = dict[str, Any]
# How long a finished job keeps its nodes: long enough to look at them, too short to pay for much.
KEEP_S = 600
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"


def documents(cluster: ClusterProfile, bundle: Bundle) -> list[Tree]:
    """The objects, in the order in which they are to be made."""
    kubernetes = cluster.kubernetes
    metadata = {"name": bundle.name, "namespace": kubernetes.namespace, "labels": labels(bundle.name)}
    files = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": dict(bundle.files)}
    return [files, *policies(kubernetes, bundle.name, autoscaled=is_autoscaled(cluster)), ray_job(cluster, bundle)]


def is_autoscaled(cluster: ClusterProfile) -> bool:
    """Whether nodes come and go while the job runs. Kueue admits a job with all it may ever need, so there they don't."""
    return cluster.workers.most > cluster.workers.count and cluster.kubernetes.queue is None


def ray_job(cluster: ClusterProfile, bundle: Bundle) -> Tree:
    """The RayJob, tried once: a second attempt by Kubernetes could meet the first one still writing. Resubmitting continues."""
    queue = cluster.kubernetes.queue
    metadata = {
        "name": bundle.name,
        "namespace": cluster.kubernetes.namespace,
        "labels": labels(bundle.name) | ({} if queue is None else {QUEUE_LABEL: queue}),
        "annotations": {"draf/run": bundle.run_url},
    }
    spec: Tree = {
        # Kueue lifts it when there is room.
        **({} if queue is None else {"suspend": True}),
        "entrypoint": shlex.join(bundle.command(FILES)),
        "submissionMode": "K8sJobMode",
        "backoffLimit": 0,
        "submitterConfig": {"backoffLimit": 0},
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": KEEP_S,
        "submitterPodTemplate": submitter(cluster, bundle.name),
        "rayClusterSpec": _ray_cluster(cluster, bundle.name),
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


def _ray_cluster(cluster: ClusterProfile, name: str) -> Tree:
    autoscaled = is_autoscaled(cluster)
    return {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token", "secretName": cluster.kubernetes.auth_secret},
        "enableInTreeAutoscaling": autoscaled,
        **({"autoscalerOptions": autoscaler(cluster)} if autoscaled else {}),
        "headGroupSpec": head(cluster, name, autoscaled=autoscaled),
        "workerGroupSpecs": workers(cluster, name, autoscaled=autoscaled),
    }


def header(cluster: ClusterProfile, bundle: Bundle) -> str:
    """What the manifest is and how to use it; values of secrets come from files or pipes, never from a command line."""
    kubernetes = cluster.kubernetes
    kubectl = f"kubectl -n {kubernetes.namespace}"
    secret = f"{kubectl} create secret generic"
    lines = [
        f"{bundle.name}: a RayJob for KubeRay that writes the run {bundle.run_url}",
        "Rendered by `draf submit JOB --cluster PROFILE --render kuberay`; change the profile, not this.",
        "",
        "Once per namespace, the secrets that it names:",
        f"  openssl rand -hex 32 | tr -d '\\n' | {secret} {kubernetes.auth_secret} --from-file=auth_token=/dev/stdin",
    ]
    if kubernetes.storage_secret is not None:
        lines.append(f"  {secret} {kubernetes.storage_secret} --from-env-file=store.env")
        lines.append(
            "    store.env: AWS_ACCESS_KEY_ID=..., AWS_SECRET_ACCESS_KEY=..., for another store than Amazon's AWS_ENDPOINT_URL=..."
        )
    if kubernetes.image_pull_secret is not None:
        docker = f"{secret} {kubernetes.image_pull_secret} --type=kubernetes.io/dockerconfigjson"
        lines.append(f"  {docker} --from-file=.dockerconfigjson=config.json")
    lines += [
        "",
        "Start:    ... --render kuberay | kubectl apply -f -          (first --dry-run=server)",
        f"Watch:    {kubectl} get rayjob {bundle.name} --watch; {kubectl} logs -f job/{bundle.name}",
        f"Stop:     {kubectl} delete rayjob {bundle.name}",
        "Continue: delete, then start again: the run goes on from its newest checkpoint.",
        f"Clean up: {kubectl} delete rayjob,networkpolicy,configmap -l app.kubernetes.io/instance={bundle.name}",
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)

"""A file for Ray's cluster launcher (`ray up`): nodes without public addresses, a token on every call, nothing open outside."""

from collections.abc import Mapping
from typing import Any, Literal

from draf_dist.errors import SpecError, explain
from draf_dist.launch import cloud_aws, cloud_gcp
from draf_dist.launch.cluster_profile import ClusterProfile, NodeShape
from draf_dist.launch.kuberay_pods import GCS_PORT, room, variables
from draf_dist.launch.ray_cluster import OBJECT_STORE_BYTES

Tree = dict[str, Any]
Cloud = Literal["aws", "gcp"]
TOKEN_FILE = "~/.ray/auth_token"
OBJECT_MANAGER_PORT = 8076
IDLE_MINUTES = 10
# The driver may be installed when the machine starts for the first time.
_WAIT_FOR_DRIVER = "timeout 900 bash -c 'until nvidia-smi; do sleep 10; done'"


def launcher(cloud: Cloud, cluster: ClusterProfile) -> Tree:
    """The configuration for `ray up`.

    Raises:
        SpecError: the profile does not say where in this cloud.
    """
    provider, head, worker = _places(cloud, cluster)
    trains = cluster.workers.most == 0
    types = {"head": _node_type(cluster.head, head, 0, 0, trains=trains)}
    if not trains:
        types["worker"] = _node_type(cluster.workers, worker, cluster.workers.count, cluster.workers.most, trains=True)
    return {
        "cluster_name": cluster.name,
        "max_workers": cluster.workers.most,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": provider,
        "auth": {"ssh_user": "ubuntu"},
        "docker": _docker(cluster),
        "head_node_type": "head",
        "available_node_types": types,
        "file_mounts": {TOKEN_FILE: TOKEN_FILE},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        # The image holds everything; what Ray would install otherwise is a nightly build from the network.
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": ["ray stop", _start_head(cluster, trains=trains)],
        "worker_start_ray_commands": ["ray stop", _start(f"--address=$RAY_HEAD_IP:{GCS_PORT}")],
    }


def _places(cloud: Cloud, cluster: ClusterProfile) -> tuple[Tree, Tree, Tree]:
    """The provider, and what a head and a worker are there."""
    if cloud == "aws" and cluster.aws is not None:
        return cloud_aws.places(cluster.aws, spot=cluster.workers.spot)
    if cloud == "gcp" and cluster.gcp is not None:
        return cloud_gcp.places(cluster.gcp, cluster.head.gpus, cluster.workers.gpus, spot=cluster.workers.spot)
    remedy = f"Add `{cloud}:` as in cluster/profiles/one_gpu_node.yaml; `draf schema cluster` lists its keys."
    raise SpecError(explain(f"cluster {cluster.name}: {cloud}", expected=f"where on {cloud}", found="nothing", remedy=remedy))


def _node_type(shape: NodeShape, node_config: Tree, least: int, most: int, *, trains: bool) -> Tree:
    resources = {"CPU": shape.cpus if trains else 0} | ({"GPU": shape.gpus} if shape.gpus else {})
    node_type: Tree = {"resources": resources, "node_config": node_config, "min_workers": least, "max_workers": most}
    if shape.gpus:
        node_type["initialization_commands"] = [_WAIT_FOR_DRIVER]
    return node_type


def _docker(cluster: ClusterProfile) -> Tree:
    environment: Mapping[str, str] = {"RAY_AUTH_MODE": "token", **variables(cluster)}
    options = [
        "--ulimit nofile=65536:65536",
        "--security-opt no-new-privileges",
        "--cap-drop ALL",
        *(f"-e {name}={value}" for name, value in environment.items()),
    ]
    docker: Tree = {"image": cluster.image, "container_name": "draf", "pull_before_run": True, "run_options": options}
    for role, shape, trains in (("head", cluster.head, cluster.workers.most == 0), ("worker", cluster.workers, True)):
        shm_gib, _ = room(cluster, trains=trains)
        docker[f"{role}_run_options"] = [f"--shm-size {shm_gib}g", *(["--gpus all"] if shape.gpus else [])]
    return docker


def _start_head(cluster: ClusterProfile, *, trains: bool) -> str:
    cpus = [] if trains else ["--num-cpus=0"]
    # The dashboard is reached through a tunnel, so it need not listen to the network.
    dashboard = ["--dashboard-host=127.0.0.1", "--autoscaling-config=~/ray_bootstrap_config.yaml"]
    return _start("--head", f"--port={GCS_PORT}", *cpus, *dashboard)


def _start(*words: str) -> str:
    common = [f"--object-manager-port={OBJECT_MANAGER_PORT}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    return " ".join(["ulimit -n 65536;", "ray start", *words, *common])


def header(cloud: Cloud, cluster: ClusterProfile) -> str:
    """What the file is and how to use it."""
    file = f"{cluster.name}-{cloud}.yaml"
    lines = [
        f"{cluster.name}: a Ray cluster on {cloud.upper()} for Ray's cluster launcher",
        f"Rendered by `draf submit JOB --cluster PROFILE --render {cloud}`; change the profile, not this.",
        "",
        "Nodes have no public address: run these inside the private network (VPN, bastion), with the cloud's own credentials.",
        "Once:     ray get-auth-token --generate        (writes ~/.ray/auth_token, which goes to every node)",
        f"Start:    ray up {file}",
        f"Tunnel:   ray dashboard {file}               (forwards 127.0.0.1:8265; leave it running)",
        "Submit:   RAY_AUTH_MODE=token draf submit JOB --cluster PROFILE",
        f"End:      ray down {file}",
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)

"""Cluster profiles that differ from the shipped ones, and what is rendered of them, read as kubectl and Ray read it (YAML 1.1)."""

from pathlib import Path
from typing import Any

import yaml

from draf_dist.config.spec import read_yaml
from draf_dist.launch.bundle import Bundle, bundle
from draf_dist.launch.cluster_profile import ClusterProfile
from draf_dist.launch.render import Target, render
from draf_dist.training.jobs import AnyJob, parse_job

ROOT = Path(__file__).resolve().parents[1]
PROFILES = sorted((ROOT / "cluster" / "profiles").glob("*.yaml"))
Tree = dict[str, Any]


def profile(name: str = "one_gpu_node", **changes: Any) -> ClusterProfile:
    """A shipped profile on an object store; changes: of sections by keys, joined by __ (workers__count=2)."""
    tree = read_yaml(ROOT / "cluster" / "profiles" / f"{name}.yaml") | {"storage": "s3://bucket/runs"}
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return ClusterProfile.model_validate(tree)


def a_job(release: str = "s3://bucket/release") -> AnyJob:
    return parse_job(f"kind: finetune\nname: a_job\nrelease: {release}\n", where="job")


def a_bundle(cluster: ClusterProfile) -> Bundle:
    return bundle(a_job(), cluster)


def rendered(target: Target, cluster: ClusterProfile) -> list[Tree]:
    return list(yaml.safe_load_all(render(target, cluster, a_bundle(cluster))))


def ray_job(cluster: ClusterProfile) -> Tree:
    return rendered("kuberay", cluster)[-1]


def pods(job: Tree) -> dict[str, Tree]:
    """The pod templates of a RayJob by what they are."""
    spec = job["spec"]
    groups = {group["groupName"]: group["template"] for group in spec["rayClusterSpec"]["workerGroupSpecs"]}
    return {"head": spec["rayClusterSpec"]["headGroupSpec"]["template"], "submitter": spec["submitterPodTemplate"], **groups}

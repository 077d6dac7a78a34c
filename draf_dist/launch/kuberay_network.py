"""Who may speak to the pods of a job, and whom they may speak to. KubeRay's own field for it is behind a gate that is off."""

from typing import Any

from draf_dist.launch.cluster_profile import Kubernetes
from draf_dist.launch.kuberay_pods import DASHBOARD_PORT, labels

Tree = dict[str, Any]
# The metadata services of clouds lie there: whoever reaches them may have the node's own credentials.
LINK_LOCAL = {"0.0.0.0/0": ["169.254.0.0/16"], "::/0": ["fe80::/10", "fd00:ec2::254/128"]}
# Where EKS hands out credentials of a service account.
POD_IDENTITY = "169.254.170.23/32"
# Where nodes answer for names themselves (NodeLocal DNSCache).
NODE_DNS = "169.254.20.10/32"
# Kubernetes itself: its service, and what stands behind it.
API_PORTS = (443, 6443)


def policies(kubernetes: Kubernetes, name: str, *, autoscaled: bool) -> list[Tree]:
    """All pods of the job: one another, the operator's question how it stands, names, stores. The autoscaler: Kubernetes too."""
    ours = {"podSelector": {"matchLabels": labels(name)}}
    operator: Tree = {"podSelector": {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}}}
    where = kubernetes.operator_namespace
    operator["namespaceSelector"] = {} if where is None else {"matchLabels": {"kubernetes.io/metadata.name": where}}
    egress: list[Tree] = [
        {"to": [ours]},
        {"to": [{"namespaceSelector": {}}, {"ipBlock": {"cidr": NODE_DNS}}], "ports": [{"protocol": "UDP", "port": 53}, *_tcp(53)]},
        {"to": [*_outside(), {"namespaceSelector": {}}], "ports": _tcp(*kubernetes.store_ports)},
    ]
    if kubernetes.storage_secret is None:
        egress.append({"to": [{"ipBlock": {"cidr": POD_IDENTITY}}], "ports": _tcp(80)})
    rules = {"ingress": [{"from": [ours]}, {"from": [operator], "ports": _tcp(DASHBOARD_PORT)}], "egress": egress}
    every = _policy(kubernetes, name, name, labels(name), rules)
    if not autoscaled:
        return [every]
    only_head = labels(name) | {"ray.io/node-type": "head"}
    to_api = {"egress": [{"to": [*_outside(), {"namespaceSelector": {}}], "ports": _tcp(*API_PORTS)}]}
    return [every, _policy(kubernetes, f"{name}-autoscaler", name, only_head, to_api)]


def _policy(kubernetes: Kubernetes, policy_name: str, job_name: str, selected: dict[str, str], rules: Tree) -> Tree:
    types = [kind.capitalize() for kind in rules]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": policy_name, "namespace": kubernetes.namespace, "labels": labels(job_name)},
        "spec": {"podSelector": {"matchLabels": selected}, "policyTypes": types, **rules},
    }


def _outside() -> list[Tree]:
    return [{"ipBlock": {"cidr": cidr, "except": list(excepted)}} for cidr, excepted in LINK_LOCAL.items()]


def _tcp(*ports: int) -> list[Tree]:
    return [{"protocol": "TCP", "port": port} for port in ports]

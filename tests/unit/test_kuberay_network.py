"""Network policies of a job, asked as a cluster would ask them: may this pod speak to that one?"""

import ipaddress
from typing import Any

import pytest
from manifests import pods, profile, rendered

Tree = dict[str, Any]
OPERATOR = {"app.kubernetes.io/component": "kuberay-operator"}
SCALED = {"kubernetes__queue": None, "workers__max_count": 9}


def policies_and_pods(**changes: Any) -> tuple[list[Tree], dict[str, dict[str, str]]]:
    """The policies, and the labels of every pod of the job; KubeRay adds what a pod is."""
    _, *policies, job = rendered("kuberay", profile(**changes))
    kinds = {"head": "head", "workers": "worker"}
    added = {name: {"ray.io/node-type": kinds[name]} if name in kinds else {} for name in pods(job)}
    return policies, {name: pod["metadata"]["labels"] | added[name] for name, pod in pods(job).items()}


def matches(selector: Tree, labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items()


def peer_matches(peer: Tree, labels: dict[str, str], namespace: str, policy: Tree) -> bool:
    if "ipBlock" in peer:
        return False
    home = policy["metadata"]["namespace"]
    there = (
        matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})
        if "namespaceSelector" in peer
        else namespace == home
    )
    return there and matches(peer.get("podSelector", {}), labels)


def block_matches(peer: Tree, address: str) -> bool:
    if "ipBlock" not in peer:
        return False
    ip, block = ipaddress.ip_address(address), peer["ipBlock"]
    within = [ipaddress.ip_network(cidr) for cidr in (block["cidr"], *block.get("except", []))]
    return [network.version == ip.version and ip in network for network in within] == [True] + [False] * (len(within) - 1)


def port_matches(rule: Tree, port: int) -> bool:
    return "ports" not in rule or port in {entry["port"] for entry in rule["ports"]}


def may_enter(policies: list[Tree], target: dict[str, str], source: dict[str, str], namespace: str, port: int) -> bool:
    return any(
        port_matches(rule, port) and any(peer_matches(peer, source, namespace, policy) for peer in rule["from"])
        for policy in policies
        if matches(policy["spec"]["podSelector"], target)
        for rule in policy["spec"].get("ingress", [])
    )


def may_leave(policies: list[Tree], source: dict[str, str], address: str, port: int) -> bool:
    return any(
        port_matches(rule, port) and any(block_matches(peer, address) for peer in rule["to"])
        for policy in policies
        if matches(policy["spec"]["podSelector"], source)
        for rule in policy["spec"].get("egress", [])
    )


def test_every_pod_of_the_job_is_closed_in_both_directions() -> None:
    policies, labels = policies_and_pods()
    for pod in labels.values():
        closed = {kind for p in policies if matches(p["spec"]["podSelector"], pod) for kind in p["spec"]["policyTypes"]}
        assert closed == {"Ingress", "Egress"}


@pytest.mark.parametrize("port", [6379, 8265, 10001])
def test_pods_of_the_job_reach_one_another_and_nobody_else_reaches_them(port: int) -> None:
    policies, labels = policies_and_pods()
    for target in labels.values():
        for source in labels.values():
            assert may_enter(policies, target, source, "draf", port)
            assert not may_enter(policies, target, source, "elsewhere", port)
        assert not may_enter(policies, target, {"app": "notebook"}, "draf", port)
        another_job = target | {"app.kubernetes.io/instance": "another-job"}
        assert not may_enter(policies, target, another_job, "draf", port)


def test_the_operator_may_ask_the_dashboard_and_nothing_else() -> None:
    policies, labels = policies_and_pods()
    assert may_enter(policies, labels["head"], OPERATOR, "anywhere", 8265)
    assert not may_enter(policies, labels["head"], OPERATOR, "anywhere", 6379)
    narrow, labels = policies_and_pods(kubernetes__operator_namespace="kuberay")
    assert may_enter(narrow, labels["head"], OPERATOR, "kuberay", 8265)
    assert not may_enter(narrow, labels["head"], OPERATOR, "anywhere", 8265)


def test_stores_are_reached_at_their_ports_and_metadata_services_are_not() -> None:
    policies, labels = policies_and_pods(kubernetes__store_ports=[443, 9000])
    for pod in labels.values():
        assert may_leave(policies, pod, "52.95.110.1", 443)
        assert may_leave(policies, pod, "10.3.2.1", 9000)
        assert not may_leave(policies, pod, "52.95.110.1", 80)
        assert not may_leave(policies, pod, "169.254.169.254", 80)
        assert not may_leave(policies, pod, "169.254.169.254", 443)
        assert not may_leave(policies, pod, "169.254.170.23", 80)
        assert not may_leave(policies, pod, "fd00:ec2::254", 443)
        assert may_leave(policies, pod, "2600:1f18::1", 443)


def test_credentials_of_a_service_account_are_fetched_only_where_there_is_no_secret() -> None:
    policies, labels = policies_and_pods(kubernetes__storage_secret=None, kubernetes__service_account="draf")
    assert may_leave(policies, labels["workers"], "169.254.170.23", 80)
    assert not may_leave(policies, labels["workers"], "169.254.169.254", 80)


def test_names_are_asked_of_the_cluster_and_of_the_node() -> None:
    policies, labels = policies_and_pods()
    assert may_leave(policies, labels["workers"], "169.254.20.10", 53)
    assert not may_leave(policies, labels["workers"], "8.8.8.8", 53)


def test_only_the_head_of_an_autoscaled_cluster_reaches_kubernetes() -> None:
    policies, labels = policies_and_pods(**SCALED)
    assert may_leave(policies, labels["head"], "10.0.0.1", 6443)
    assert not may_leave(policies, labels["workers"], "10.0.0.1", 6443)
    fixed, labels = policies_and_pods()
    assert not may_leave(fixed, labels["head"], "10.0.0.1", 6443)

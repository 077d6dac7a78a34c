"""What `ray up` refuses, and what it lets through and the cloud refuses later: unknown keys of a provider and of its nodes."""

import copy
import difflib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal

import botocore.session
import jsonschema
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

Tree = dict[str, Any]
Cloud = Literal["aws", "gcp"]
# Nothing of Ray's may be opened to the network from outside.
PORTS_OF_RAY = (6379, 8265, 10001)

# What Ray reads under `provider`.
_PROVIDER = {
    "aws": ("type", "region", "availability_zone", "use_internal_ips", "cache_stopped_nodes", "security_group", "key_pair"),
    "gcp": ("type", "region", "availability_zone", "project_id", "use_internal_ips", "cache_stopped_nodes"),
}
# Instances of Compute Engine (v1, instances.insert), as far as they are rendered: a key has a type, or the keys below it.
_MACHINE: Tree = {
    "machineType": str,
    "disks": [{"boot": bool, "autoDelete": bool, "type": str, "initializeParams": {"diskSizeGb": int, "sourceImage": str}}],
    "networkInterfaces": [{"subnetwork": str}],
    "serviceAccounts": [{"email": str, "scopes": [str]}],
    "shieldedInstanceConfig": {"enableSecureBoot": bool, "enableVtpm": bool, "enableIntegrityMonitoring": bool},
    "guestAccelerators": [{"acceleratorType": str, "acceleratorCount": int}],
    "metadata": {"items": [{"key": str, "value": str}]},
    "scheduling": {"onHostMaintenance": str, "provisioningModel": str, "instanceTerminationAction": str, "automaticRestart": bool},
}


def problems(cloud: Cloud, config: Tree) -> list[str]:
    """One line for everything that would be refused or is not safe; empty if `ray up` may have it."""
    found = [*_by_ray(config), *_unknown_keys(config.get("provider", {}), _PROVIDER[cloud], "provider")]
    for name, node_type in config.get("available_node_types", {}).items():
        where = f"available_node_types.{name}.node_config"
        node = node_type.get("node_config", {})
        found += _by_botocore(node, where) if cloud == "aws" else _by_shape(node, _MACHINE, where)
    return [*found, *_unsafe(config)]


def _by_ray(config: Tree) -> Iterator[str]:
    """Ray's own check of the file with its defaults filled in."""
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except jsonschema.ValidationError as error:
        yield f"{'.'.join(map(str, error.absolute_path)) or 'top level'}: {error.message}"
    except (ValueError, KeyError, AssertionError, RuntimeError) as error:
        yield f"Ray: {type(error).__name__}: {error}"


def _by_botocore(node: Tree, where: str) -> Iterator[str]:
    """Amazon's own description of RunInstances. SubnetIds is Ray's: it takes one of them."""
    request = {key: value for key, value in node.items() if key != "SubnetIds"} | {"MinCount": 1, "MaxCount": 1}
    report = ParamValidator().validate(request, _run_instances())
    if report.has_errors():
        yield from (f"{where}: {line}" for line in report.generate_report().splitlines())
    if not node.get("SubnetIds"):
        yield f"{where}.SubnetIds: nothing"


@cache
def _run_instances() -> Any:
    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _by_shape(tree: Any, shape: Any, where: str) -> Iterator[str]:
    if isinstance(shape, type):
        if type(tree) is not shape:
            yield f"{where}: expected {shape.__name__}, found {type(tree).__name__}"
    elif isinstance(shape, list):
        if not isinstance(tree, list):
            yield f"{where}: expected a list, found {type(tree).__name__}"
            return
        for index, item in enumerate(tree):
            yield from _by_shape(item, shape[0], f"{where}[{index}]")
    elif not isinstance(tree, dict):
        yield f"{where}: expected a mapping, found {type(tree).__name__}"
    else:
        yield from _unknown_keys(tree, tuple(shape), where)
        for key in tree.keys() & shape.keys():
            yield from _by_shape(tree[key], shape[key], f"{where}.{key}")


def _unknown_keys(tree: Mapping[str, Any], known: tuple[str, ...], where: str) -> Iterator[str]:
    for key in tree.keys() - set(known):
        near = difflib.get_close_matches(key, known, n=1)
        yield f"{where}.{key}: unknown" + (f", did you mean {near[0]}?" if near else "")


def _unsafe(config: Tree) -> Iterator[str]:
    provider = config.get("provider", {})
    if provider.get("use_internal_ips") is not True:
        yield "provider.use_internal_ips: nodes would have public addresses"
    for rule in provider.get("security_group", {}).get("IpPermissions", []):
        opened = [port for port in PORTS_OF_RAY if rule.get("FromPort", 0) <= port <= rule.get("ToPort", 65535)]
        if opened:
            yield f"provider.security_group: opens {', '.join(map(str, opened))}, where Ray runs whatever it is sent"
    if "-e RAY_AUTH_MODE=token" not in config.get("docker", {}).get("run_options", []):
        yield "docker.run_options: Ray would ask for no token"
    for name, node_type in config.get("available_node_types", {}).items():
        interfaces = node_type.get("node_config", {}).get("networkInterfaces", [])
        if any("accessConfigs" in interface for interface in interfaces if isinstance(interface, dict)):
            yield f"available_node_types.{name}: a public address"

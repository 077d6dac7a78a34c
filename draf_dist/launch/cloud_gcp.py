"""Where on Compute Engine: a subnetwork without public addresses, service accounts instead of keys, shielded machines."""

from typing import Any

from draf_dist.errors import SpecError, explain
from draf_dist.launch.cluster_profile import Gcp

Tree = dict[str, Any]
# What a node may do is what its service account may do.
_SCOPE = "https://www.googleapis.com/auth/cloud-platform"


def places(gcp: Gcp, head_gpus: int, worker_gpus: int, *, spot: bool) -> tuple[Tree, Tree, Tree]:
    """The provider, and what a head and a worker are there.

    Raises:
        SpecError: nodes with GPUs of no type.
    """
    if gcp.accelerator is None and head_gpus + worker_gpus > 0:
        remedy = "Give their type, for instance nvidia-l4."
        raise SpecError(
            explain("cluster: gcp.accelerator", expected="a type of GPU", found="nothing, yet nodes with GPUs", remedy=remedy)
        )
    provider = {
        "type": "gcp",
        "region": gcp.region,
        "availability_zone": gcp.zone,
        "project_id": gcp.project,
        "use_internal_ips": True,
        "cache_stopped_nodes": False,
    }
    head = _machine(gcp, gcp.head_machine, gcp.head_service_account, head_gpus, spot=False)
    return provider, head, _machine(gcp, gcp.worker_machine, gcp.service_account, worker_gpus, spot=spot)


def _machine(gcp: Gcp, machine_type: str, account: str, gpus: int, *, spot: bool) -> Tree:
    disk = {"diskSizeGb": gcp.disk_gib, "sourceImage": gcp.boot_image}
    machine: Tree = {
        "machineType": machine_type,
        "disks": [{"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": disk}],
        # Given without accessConfigs: what Ray would fill in has a public address.
        "networkInterfaces": [{"subnetwork": f"projects/{gcp.project}/regions/{gcp.region}/subnetworks/{gcp.subnetwork}"}],
        "serviceAccounts": [{"email": account, "scopes": [_SCOPE]}],
        "shieldedInstanceConfig": {"enableVtpm": True, "enableIntegrityMonitoring": True},
    }
    if gpus:
        machine["guestAccelerators"] = [{"acceleratorType": gcp.accelerator, "acceleratorCount": gpus}]
        machine["metadata"] = {"items": [{"key": "install-nvidia-driver", "value": "True"}]}
    return machine | _scheduling(gpus, spot=spot)


def _scheduling(gpus: int, *, spot: bool) -> Tree:
    # An object, as the API has it; Ray's examples write a list.
    scheduling: Tree = {"onHostMaintenance": "TERMINATE"} if gpus or spot else {}
    if spot:
        scheduling |= {"provisioningModel": "SPOT", "instanceTerminationAction": "DELETE", "automaticRestart": False}
    return {"scheduling": scheduling} if scheduling else {}

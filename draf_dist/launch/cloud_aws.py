"""Where on EC2: a private network, roles instead of keys, metadata that needs a token, encrypted disks."""

from typing import Any

from draf_dist.launch.cluster_profile import Aws

Tree = dict[str, Any]


def places(aws: Aws, *, spot: bool) -> tuple[Tree, Tree, Tree]:
    """The provider, and what a head and a worker are there."""
    provider = {"type": "aws", "region": aws.region, "use_internal_ips": True, "cache_stopped_nodes": False}
    head = _instance(aws, aws.head_instance, aws.head_instance_profile)
    worker = _instance(aws, aws.worker_instance, aws.instance_profile)
    if spot:
        worker["InstanceMarketOptions"] = {"MarketType": "spot"}
    return provider, head, worker


def _instance(aws: Aws, instance_type: str, profile: str) -> Tree:
    disk = {"VolumeSize": aws.disk_gib, "VolumeType": "gp3", "Encrypted": True, "DeleteOnTermination": True}
    return {
        "InstanceType": instance_type,
        "ImageId": aws.image_id,
        "IamInstanceProfile": {"Name": profile},
        "SubnetIds": list(aws.subnets),
        "SecurityGroupIds": list(aws.security_groups),
        # One hop: what asks through a bridge, as a container of somebody else's would, gets no answer.
        "MetadataOptions": {"HttpEndpoint": "enabled", "HttpTokens": "required", "HttpPutResponseHopLimit": 1},
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
    }

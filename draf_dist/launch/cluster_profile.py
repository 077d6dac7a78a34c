"""A cluster: what its nodes are, what runs on them, where its releases and runs lie. One spec for submitting and for rendering."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from draf_dist.config.spec import Spec, model_of_kind, read_yaml, validate_spec
from draf_dist.errors import SpecError, explain
from draf_dist.launch.profile import PROFILES, OneProcessProfile, Profile, RayProfile
from draf_dist.storage import has_credentials

_IMAGE = re.compile(r"^[^\s@]+(?::(?!latest$)[\w][\w.-]{0,127}|@sha256:[0-9a-f]{64})$")
_HOST_AND_PORT = r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?::[0-9]{1,5})?"
_HOST = re.compile(rf"{_HOST_AND_PORT}/*\Z")
_DASHBOARD = re.compile(rf"https?://{_HOST_AND_PORT}(?:/[\w.~%/-]*)?\Z")
_NAME = r"^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$"
# What Kubernetes lets an object, a label's value and a label's key be called.
_OBJECT = r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$"
_LABEL = r"^[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$"
_LABEL_KEY = r"^([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$"
_GPU_RESOURCE = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?/[a-z0-9]([a-z0-9._-]*[a-z0-9])?$"
_IAM = r"^[A-Za-z0-9_+=,.@-]{1,128}$"
_EMAIL = r"^[a-z0-9-]+@[a-z0-9.-]+\.gserviceaccount\.com$"
ObjectName = Annotated[str, Field(pattern=_OBJECT)]
Label = Annotated[str, Field(pattern=_LABEL)]
LabelKey = Annotated[str, Field(pattern=_LABEL_KEY)]
Port = Annotated[int, Field(ge=1, le=65535)]


class NodeShape(Spec):
    """What one node offers to Ray. memory_gib: of the node (on Kubernetes of the container)."""

    cpus: int = Field(ge=1)
    memory_gib: int = Field(ge=1)
    gpus: int = Field(0, ge=0)


class WorkerNodes(NodeShape):
    """The nodes that train. count: there from the start; max_count: as many as an autoscaler may bring (count if None).

    spot: cheaper nodes that may be taken away at any time; the run continues from its newest checkpoint.
    """

    count: int = Field(ge=0)
    max_count: int | None = Field(None, ge=1)
    spot: bool = False

    @property
    def most(self) -> int:
        """How many there can be."""
        return self.count if self.max_count is None else self.max_count


class Kubernetes(Spec):
    """Names of things in a Kubernetes cluster; secrets are made there, never here.

    auth_secret: holds Ray's token under `auth_token`. storage_secret: its keys become variables of the pods (AWS_ACCESS_KEY_ID and
    so on); None where a service account gives access to the store. queue: of Kueue. gpu_resource: what pods call a GPU. shm_gib:
    shared memory of a pod that trains, part of its memory. scratch_gib: room of a pod for what it writes, which is gone with it.
    node_selector: of the nodes that train. store_ports: where object stores answer; nothing else outside is reached.
    operator_namespace: where KubeRay's operator runs, which asks the head how the job stands; None lets it ask from any.
    """

    namespace: str = Field("default", pattern=_NAME)
    service_account: ObjectName | None = None
    auth_secret: ObjectName = "ray-auth-token"
    storage_secret: ObjectName | None = "object-store"
    image_pull_secret: ObjectName | None = None
    queue: Label | None = None
    gpu_resource: str = Field("nvidia.com/gpu", pattern=_GPU_RESOURCE)
    shm_gib: int = Field(2, ge=1)
    scratch_gib: int = Field(20, ge=1)
    node_selector: dict[LabelKey, Label] = {}
    store_ports: tuple[Port, ...] = Field((443,), min_length=1)
    operator_namespace: ObjectName | None = None


class Aws(Spec):
    """Where on EC2. image_id: a machine image with Docker and, for GPUs, NVIDIA's driver and container toolkit.

    instance_profile: the IAM role by which nodes reach the store, so that no key lies on them; head_instance_profile: the head's,
    which may also start and end nodes. subnets, security_groups: of a private network; Ray's own group would open SSH to the world.
    """

    region: str = Field(pattern=r"^[a-z]{2}(-[a-z]+)+-[0-9]$")
    head_instance: str = Field(pattern=r"^[a-z0-9-]+\.[a-z0-9-]+$")
    worker_instance: str = Field(pattern=r"^[a-z0-9-]+\.[a-z0-9-]+$")
    image_id: str = Field(pattern=r"^ami-([0-9a-f]{8}|[0-9a-f]{17})$")
    instance_profile: str = Field(pattern=_IAM)
    head_instance_profile: str = Field(pattern=_IAM)
    subnets: tuple[Annotated[str, Field(pattern=r"^subnet-[0-9a-f]+$")], ...] = Field(min_length=1)
    security_groups: tuple[Annotated[str, Field(pattern=r"^sg-[0-9a-f]+$")], ...] = Field(min_length=1)
    disk_gib: int = Field(200, ge=50)


class Gcp(Spec):
    """Where on Compute Engine. boot_image: with Docker and, for GPUs, NVIDIA's container toolkit (the driver is installed at boot).

    accelerator: type of the GPU of worker nodes, for instance nvidia-l4; None without. service_account: of the nodes that train;
    head_service_account: of the head, which may also start and end nodes. subnetwork: its nodes get no public address.
    """

    region: str = Field(pattern=r"^[a-z]+-[a-z]+[0-9]+$")
    zone: str = Field(pattern=r"^[a-z]+-[a-z]+[0-9]+-[a-z]$")
    project: str = Field(pattern=r"^[a-z]([a-z0-9-]{4,28}[a-z0-9])$")
    head_machine: str = Field(pattern=r"^[a-z0-9]+-[a-z0-9-]+$")
    worker_machine: str = Field(pattern=r"^[a-z0-9]+-[a-z0-9-]+$")
    boot_image: str = Field(pattern=r"^projects/[^/\s]+/global/images/(family/)?[^/\s]+$")
    service_account: str = Field(pattern=_EMAIL)
    head_service_account: str = Field(pattern=_EMAIL)
    accelerator: str | None = Field(None, pattern=r"^[a-z0-9-]+$")
    subnetwork: str = Field("default", pattern=r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$")
    disk_gib: int = Field(200, ge=50)


class ClusterProfile(Spec):
    """A cluster that jobs are submitted to (`draf submit`) or that is described for others to start (`--render`).

    image: what every node runs, by version or digest. storage: URL under which runs are written. dashboard: where the Jobs API
    answers. train: how a job is spread over the workers; its address is `auto`, since the command runs on a node.
    """

    kind: Literal["cluster"] = "cluster"
    name: str = Field(pattern=_NAME)
    image: str
    storage: str
    dashboard: str = "http://127.0.0.1:8265"
    train: RayProfile
    head: NodeShape
    workers: WorkerNodes
    kubernetes: Kubernetes = Kubernetes()
    aws: Aws | None = None
    gcp: Gcp | None = None

    @field_validator("image")
    @classmethod
    def _pinned(cls, image: str) -> str:
        if not _IMAGE.match(image):
            raise ValueError("expected an image with a version or a digest, not latest: registry/draf_dist:0.1.0-gpu")
        return image

    @field_validator("storage", "dashboard")
    @classmethod
    def _without_credentials(cls, url: str) -> str:
        if has_credentials(url):
            # Not a ValueError: pydantic's own message would repeat the value.
            raise SpecError(
                explain("cluster", expected="a URL without credentials", found="one with", remedy="Use the environment.")
            )
        return url.rstrip("/")

    @field_validator("dashboard")
    @classmethod
    def _over_http(cls, url: str) -> str:
        """Ray's client would import a scheme that it does not know, as a module of Python."""
        if not _DASHBOARD.match(url):
            # Not a ValueError: pydantic's own message would repeat the value, which may hold a password.
            bare = _HOST.match(url)
            remedy = f"Write http://{url}." if bare else "For example http://127.0.0.1:8265, the near end of a tunnel."
            found = "no scheme" if bare else "another, or none"
            raise SpecError(explain("dashboard", expected="an http:// or https:// URL with a host", found=found, remedy=remedy))
        return url

    @model_validator(mode="after")
    def _fits(self) -> "ClusterProfile":
        if self.workers.most < self.workers.count:
            raise ValueError(f"workers.max_count: expected at least count, {self.workers.count}")
        if self.train.address != "auto":
            raise ValueError("train.address: expected auto, since the command runs on a node of this cluster")
        places = self.workers.most * places_on_node(self.workers, self.train)
        if self.workers.most == 0:
            places = places_on_node(self.head, self.train)
        if places < self.train.workers:
            raise ValueError(f"train.workers: expected at most {places}, which is what the nodes hold")
        at_first = self.workers.count * places_on_node(self.workers, self.train)
        if self.workers.most > 0 and at_first < self.train.least and not self.train.nodes_timeout_s:
            raise ValueError("train.nodes_timeout_s: expected how long to wait for the nodes that the autoscaler brings, found 0")
        return self


def places_on_node(shape: NodeShape, train: RayProfile) -> int:
    """How many workers fit on one node."""
    by_gpu = shape.gpus // train.gpus_per_worker if train.gpus_per_worker else 2**31
    return min(by_gpu, int(shape.cpus / train.cpus_per_worker + 1e-9))


def load_cluster(path: Path | str) -> ClusterProfile:
    """The cluster in a YAML file.

    Raises:
        SpecError: one line for every problem; a profile of another kind.
    """
    tree = read_yaml(path)
    model = model_of_kind(tree.get("kind"), {"cluster": ClusterProfile}, where=str(path), see="See cluster/profiles for examples.")
    return validate_spec(tree, model, where=str(path))


def load_profile(path: Path | str) -> Profile:
    """How to train, by the profile in a YAML file: of a cluster, what it says under `train`.

    Raises:
        SpecError: one line for every problem.
    """
    tree = read_yaml(path)
    kinds: dict[str, type[OneProcessProfile | RayProfile | ClusterProfile]] = {**PROFILES, "cluster": ClusterProfile}
    model = model_of_kind(tree.get("kind"), kinds, where=str(path), see="See cluster/ for examples.")
    found = validate_spec(tree, model, where=str(path))
    return found.train if isinstance(found, ClusterProfile) else found

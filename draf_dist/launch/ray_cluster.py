"""A Ray cluster: one of our own on this machine, or one that exists."""

import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc  # type: ignore[import-untyped]
import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError

from draf_dist.errors import SpecError, UnreachableError, explain
from draf_dist.launch.profile import RayProfile

# The address at which the parts of a cluster of our own look for one another; for 127.0.0.1 Ray would take one of the network's.
LOOPBACK = "127.0.0.2"
CONNECT_TIMEOUT_S = 5.0
OBJECT_STORE_BYTES = 200 * 2**20
POLL_S = 1.0
# Ray puts sockets with long names beneath it, and a socket's path holds 107 characters.
TEMPORARY = "/tmp"
# What this process has joined through ray_cluster: one or none.
_entered: list["RayCluster"] = []
# A token is read once per process by Ray's core, so all clusters of a process have the same one.
TOKEN = secrets.token_hex(32)


@dataclass(frozen=True)
class RayCluster:
    """The cluster that this process is connected to.

    settings: variables that Ray Train has to hand to its processes there; none in a cluster of our own: there they inherit them.
    """

    settings: dict[str, str]

    @property
    def num_nodes(self) -> int:
        """Nodes that are alive."""
        return len(_nodes())

    @property
    def is_this_machine(self) -> bool:
        """Whether all of it is the node of this process."""
        return [node["NodeID"] for node in _nodes()] == [ray.get_runtime_context().get_node_id()]

    def places(self, bundle: Mapping[str, float]) -> int:
        """How many workers fit on all nodes together when nothing else runs there."""
        return sum(places_on(node["Resources"], bundle) for node in _nodes())

    def make_room(self, profile: RayProfile) -> None:
        """Waits for nodes that an autoscaler brings, as long as the profile says.

        Raises:
            SpecError: the cluster can't hold the workers.
        """
        deadline = time.monotonic() + profile.nodes_timeout_s
        try:
            while (places := self.places(profile.bundle)) < profile.least:
                if time.monotonic() >= deadline:
                    raise _no_room(profile, places)
                request_resources(bundles=[profile.bundle] * profile.workers)
                time.sleep(POLL_S)
        finally:
            if profile.nodes_timeout_s:
                # Left standing, the request would keep the nodes for ever.
                request_resources(bundles=[])


@contextmanager
def ray_cluster(profile: RayProfile) -> Iterator[RayCluster]:
    """The cluster of a profile, until the end of the block; inside another such block, that one's cluster.

    A cluster of our own takes its environment as it is now, asks a token of every client, and is gone afterwards.

    Raises:
        UnreachableError: no cluster at the address, or it refuses the token.
    """
    if ray.is_initialized():
        yield _entered[-1] if _entered else RayCluster(train_settings(profile))
        return
    with _own_cluster(profile) if profile.address is None else _existing_cluster(profile, profile.address) as cluster:
        _entered.append(cluster)
        try:
            yield cluster
        finally:
            _entered.pop()


def check_reach(num_nodes: int, urls: Mapping[str, str]) -> None:
    """Refuses folders of this machine, where other nodes would look for them in vain. urls: by what they are.

    Raises:
        SpecError: there is one.
    """
    local = ", ".join(f"{what} {url}" for what, url in urls.items() if "://" not in url or url.startswith("file:"))
    if local:
        remedy = "Give s3://bucket/prefix."
        raise SpecError(explain("profile", expected=f"URLs that all {num_nodes} nodes reach", found=local, remedy=remedy))


def places_on(node: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    """How many bundles fit on a node."""
    return min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in bundle.items())


@contextmanager
def environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Sets variables while entered, None takes one out, and puts back what was there."""
    before = {name: os.environ.get(name) for name in variables}
    _set(variables)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def train_settings(profile: RayProfile) -> dict[str, str]:
    """Variables that Ray Train's controller and workers read."""
    return {
        # A lost process is seen after so long; Ray's own default costs a second and a half more at every failure.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        # The driver looks for such notices itself (ray_starts), and has a checkpoint made: one process less.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        **({} if profile.gpus_per_worker else {"DS_ACCELERATOR": "cpu"}),
    }


@contextmanager
def _own_cluster(profile: RayProfile) -> Iterator[RayCluster]:
    # These stay until the end: this process is a client, and shows the token at every call. Ray sets the mode to `token` unless
    # there is one already; set here it would come too late for the part of Ray that has read its environment.
    client = {"RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
    node = {
        **train_settings(profile),
        "OMP_NUM_THREADS": str(profile.threads),
        # A rank that hangs in an operation whose partner is gone will not leave it: it is killed soon.
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "2",
        # Nothing here is compiled, but DeepSpeed imports torch's compiler unless told so: two seconds at every start of a worker.
        "TORCHDYNAMO_DISABLE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    with ExitStack() as stack:
        folder = tempfile.mkdtemp(prefix="draf-ray-", dir=TEMPORARY)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.enter_context(environment(client))
        with environment(node):
            try:
                _init(
                    stack,
                    address="local",
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    # One level down: Ray lets everybody read and write the folder that it is given.
                    _temp_dir=f"{folder}/ray",
                    _node_ip_address=LOOPBACK,
                )
            except Exception as error:
                # Ray raises Exception itself where one of its processes is not up in time.
                if type(error) is Exception or isinstance(error, RuntimeError | OSError | RayError):
                    raise _not_up(error) from error
                raise
        yield RayCluster({})


@contextmanager
def _existing_cluster(profile: RayProfile, address: str) -> Iterator[RayCluster]:
    if address != "auto":
        _knock(address)
    with ExitStack() as stack:
        try:
            _init(stack, address=address)
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            found = f"none that can be joined ({type(error).__name__})"
            raise _unreachable(address, found) from error
        yield RayCluster(train_settings(profile))


def _init(stack: ExitStack, **arguments: Any) -> None:
    """ray.init, undone when the stack is closed."""
    group = os.getpgrp()
    if threading.current_thread() is threading.main_thread():
        # Ray's own lets SIGTERM end the process in good order; it stays as long as the cluster.
        stack.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    # A dead worker is reported by FailureWatch; Ray would print it to standard output, amid what --json promises to be JSON.
    ray._private.worker._worker_logs_enabled = False
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **arguments)
    stack.callback(ray.shutdown)
    if os.getpgrp() != group:
        # Ray has moved this process into a group of its own, where a terminal's Ctrl-C would not find it.
        os.setpgid(0, group)


def _knock(address: str) -> None:
    """Asks whether a gRPC server answers, as Ray's head is one: Ray itself would wait for minutes, or for ever."""
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return
    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=CONNECT_TIMEOUT_S)
        except grpc.FutureTimeoutError:
            raise _unreachable(address, f"none that answers within {CONNECT_TIMEOUT_S:g} s") from None


def _nodes() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in found if node["Alive"]]


def _unreachable(address: str, found: str) -> UnreachableError:
    remedy = "Check the address, and RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH in the environment; run the command on one of its nodes."
    return UnreachableError(explain(f"profile: address {address}", expected="a Ray cluster", found=found, remedy=remedy))


def _not_up(error: Exception) -> UnreachableError:
    remedy = "Is the machine busy, or short of memory? The same command tries again; without --profile it needs no cluster."
    found = f"one whose processes did not come up ({type(error).__name__})"
    return UnreachableError(explain("Ray on this machine", expected="a cluster of the command's own", found=found, remedy=remedy))


def _no_room(profile: RayProfile, places: int) -> SpecError:
    wanted = f"room for {profile.least} workers with {_amounts(profile.bundle)} each"
    there = "; ".join(_amounts({name: node["Resources"].get(name, 0.0) for name in profile.bundle}) for node in _nodes())
    remedy = "Use fewer workers, set cpus_per_worker lower, or add nodes (nodes_timeout_s, where an autoscaler brings them)."
    return SpecError(explain("profile: workers", expected=wanted, found=f"room for {places}: nodes with {there}", remedy=remedy))


def _amounts(resources: Mapping[str, float]) -> str:
    return " + ".join(f"{amount:g} {name}" for name, amount in resources.items())

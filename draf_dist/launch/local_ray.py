"""A real Ray cluster on this machine, in processes of its own: what `ray start` makes, on free ports, with a token."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil  # type: ignore[import-untyped]
import requests

from draf_dist.errors import UnreachableError, explain
from draf_dist.launch.local_s3 import HOST, free_ports
from draf_dist.launch.ray_cluster import LOOPBACK, OBJECT_STORE_BYTES, TEMPORARY

START_TIMEOUT_S = 90.0
# Ray's own way takes longer when a job has just ended.
STOP_TIMEOUT_S = 4.0
POLL_S = 0.2
# `ray start` gives up after 30 s, which no setting changes; a machine with much else to do may need longer.
RAYLET_TRIES = 3
# What tells processes of this cluster from all others, also those whose parent is gone: every child inherits it.
MARK = "DRAF_LOCAL_RAY"
HEAD = 0


class LocalRay:
    """A context manager: a head with its dashboard and further raylets, each as on a node of its own, while the block runs.

    token: what every client must show. cpus: of each raylet; the head is number 0, the others count from 1. Nodes take over the
    environment as it is when they start, as a platform would set it on them: credentials of the object store among it.

    Raises:
        UnreachableError: it does not come up in time.
    """

    def __init__(self, token: str, cpus: int, more_raylets: int = 0) -> None:
        self.dashboard, self.address = "", ""
        self._token, self._cpus, self._more_raylets = token, cpus, more_raylets
        self._folder: Path | None = None
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        self._num_started = 0

    @property
    def raylets(self) -> list[int]:
        """The numbers of those that live, the head not among them."""
        return sorted(self._nodes.keys() - {HEAD})

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use the cluster."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token}

    @property
    def pids(self) -> list[int]:
        """Every process of the cluster, those of submitted jobs among them."""
        return sorted(process.pid for process in self._processes())

    def __enter__(self) -> "LocalRay":
        self._folder = Path(tempfile.mkdtemp(prefix="draf-local-ray-", dir=TEMPORARY))
        try:
            self._start(self._folder)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends every process of the cluster and removes its folder; does nothing when it does not run."""
        # Looked for first: when its parent is gone, a process that has renamed itself can't be told any more.
        known = self._processes()
        for _, node in sorted(self._nodes.items(), reverse=True):
            node.terminate()
        with suppress(subprocess.TimeoutExpired):
            for node in self._nodes.values():
                node.wait(STOP_TIMEOUT_S)
        _kill(lambda: {*known, *self._processes()})
        for node in self._nodes.values():
            node.wait()
        self._nodes = {}
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None

    def add_node(self) -> int:
        """Starts one more raylet, waits until the head knows it, and returns its number.

        Raises:
            UnreachableError: it does not come up in time.
        """
        number = self._num_started = self._num_started + 1
        tries = RAYLET_TRIES
        while True:
            self._start_node(number, [f"--address={self.address}"])
            try:
                self._wait_until(f"raylet {number}", lambda: number in self._alive())
                return number
            except UnreachableError:
                tries -= 1
                if tries == 0 or self._nodes[number].poll() is None:
                    raise
                self.kill_node(number)

    def kill_node(self, number: int) -> None:
        """SIGKILL to a raylet and everything below it, as when a machine loses power; the head finds out by itself.

        Raises:
            KeyError: no such raylet lives; the head is none.
        """
        if number == HEAD:
            raise KeyError(number)
        node = self._nodes.pop(number)
        known = self._processes(number)
        _kill(lambda: {*known, *self._processes(number)})
        node.wait()

    def node_of(self, pid: int) -> int | None:
        """The number of the raylet that a process belongs to, None if it is of no node that lives."""
        try:
            above = {pid, *(parent.pid for parent in psutil.Process(pid).parents())}
        except psutil.NoSuchProcess:
            return None
        return next((number for number, node in self._nodes.items() if node.pid in above), None)

    def _start(self, folder: Path) -> None:
        gcs, dashboard = free_ports(2)
        self.dashboard, self.address = f"http://{HOST}:{dashboard}", f"{LOOPBACK}:{gcs}"
        head = ["--head", f"--port={gcs}", f"--dashboard-host={HOST}", f"--dashboard-port={dashboard}"]
        self._start_node(HEAD, [*head, "--include-dashboard=true", f"--temp-dir={folder}/ray"])
        self._wait_until("the head's dashboard", self._dashboard_answers)
        # One after the other: raylets that start at the same time in one session's folder choose the same names for their sockets.
        for _ in range(self._more_raylets):
            self.add_node()

    def _start_node(self, number: int, arguments: list[str]) -> None:
        assert self._folder is not None
        # 0: any that is free. Ray's client server, which nobody uses, can't be left out.
        ports = dict.fromkeys(("dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export", "runtime-env-agent"), 0)
        ports |= {"min-worker": 0, "max-worker": 0, "ray-client-server": free_ports(1)[0]}
        with (self._folder / f"node-{number}.log").open("wb") as log:
            self._nodes[number] = subprocess.Popen(
                [
                    *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments),
                    *(f"--{what}-port={port}" for what, port in ports.items()),
                    f"--node-name={number}",
                    f"--node-ip-address={LOOPBACK}",
                    f"--num-cpus={self._cpus}",
                    f"--object-store-memory={OBJECT_STORE_BYTES}",
                    "--disable-usage-stats",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._node_environment(number),
                # A Ctrl-C at the terminal is for the program that uses the cluster.
                start_new_session=True,
            )

    def _node_environment(self, number: int) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return inherited | {
            **self.environment,
            MARK: self._mark(number),
            # `python` of a submitted command is this one.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            # As for a cluster within this process: see ray_cluster.
            "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "2",
            "TORCHDYNAMO_DISABLE": "1",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        }

    def _wait_until(self, what: str, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if any(node.poll() is not None for node in self._nodes.values()):
                raise self._failed(what, "a process that ended")
            if holds():
                return
            time.sleep(POLL_S)
        raise self._failed(what, f"none within {START_TIMEOUT_S:.0f} s")

    def _dashboard_answers(self) -> bool:
        return self._get("/api/version") is not None

    def _alive(self) -> set[int]:
        """The nodes that the head takes to be alive, one that was killed a moment ago among them."""
        found = self._get("/api/v0/nodes")
        nodes = [] if found is None else found["data"]["result"]["result"]
        return {int(node["node_name"]) for node in nodes if node["state"] == "ALIVE"}

    def _get(self, path: str) -> Any:
        """What the dashboard answers; None while it does not, or not yet."""
        try:
            answer = requests.get(self.dashboard + path, headers={"Authorization": f"Bearer {self._token}"}, timeout=10)
        except requests.RequestException:
            return None
        return answer.json() if answer.ok else None

    def _mark(self, number: int) -> str:
        return f"{self._folder}/{number}"

    def _processes(self, number: int | None = None) -> set[psutil.Process]:
        """Those that bear the mark, and what descends from them: Ray's workers rename themselves, over their environment.

        number: of one node, else of all.
        """
        if self._folder is None:
            return set()
        marks = {self._mark(each) for each in ([number] if number is not None else range(self._num_started + 1))}
        marked = [process for process in psutil.process_iter() if _mark_of(process) in marks]
        return {*marked, *(child for process in marked for child in _descendants(process))}

    def _logs(self) -> list[Path]:
        return [] if self._folder is None else sorted(self._folder.glob("*.log"))

    def _failed(self, what: str, found: str) -> UnreachableError:
        lines = [line for log in self._logs() for line in log.read_text(errors="replace").splitlines()[-2:]]
        remedy = f"The nodes' logs end with: {' / '.join(lines) or 'nothing'}"
        return UnreachableError(explain("local Ray cluster", expected=what, found=found, remedy=remedy))


def _mark_of(process: psutil.Process) -> str | None:
    try:
        found: str | None = process.environ().get(MARK)
    except (psutil.Error, OSError):
        return None
    return found


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return found


def _kill(processes: Callable[[], set[psutil.Process]]) -> None:
    """SIGKILL to what is found, until nothing of it is left."""
    while left := [process for process in processes() if _is_alive(process)]:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=STOP_TIMEOUT_S)


def _is_alive(process: psutil.Process) -> bool:
    """A zombie is not: it waits for its parent to look, and the parent may be no process of ours."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False

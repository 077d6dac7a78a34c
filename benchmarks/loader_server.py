"""The S3 side of the loader benchmark: a SeaweedFS that counts, the upload of the data, and the line to it."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore
from loader_job import BUCKET
from obstore.store import S3Store

from draf_dist.launch.local_s3 import HOST, LocalS3, free_ports

UPLOADS = 8


class MeteredS3(LocalS3):
    """The local S3 server with its Prometheus page: bytes and requests of every bucket, as the server saw them."""

    metrics_port = 0

    @property
    def metrics(self) -> str:
        return f"http://{HOST}:{self.metrics_port}/metrics"

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    def _arguments(self, ports: list[int], config: Path) -> list[str]:
        (self.metrics_port,) = free_ports(1)
        return [*super()._arguments(ports, config), f"-metricsPort={self.metrics_port}"]


def client_environment(server: LocalS3, endpoint: str) -> dict[str, str]:
    """What a process needs to reach the server through an endpoint, whichever of the clients it uses."""
    return {
        **server.environment,
        "AWS_ENDPOINT_URL": endpoint,
        "S3_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
        # A client that looks for more credentials than these would ask a host that isn't there.
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def upload(server: MeteredS3, data: Path, parts: Sequence[str]) -> None:
    """Puts folders of the data (`wds`, ...) into the bucket under the same names, and reads all objects once."""
    server.create_bucket(BUCKET)
    keys = server.environment
    store = S3Store(
        BUCKET,
        endpoint=server.endpoint,
        access_key_id=keys["AWS_ACCESS_KEY_ID"],
        secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        region=keys["AWS_DEFAULT_REGION"],
        client_options={"allow_http": True},
    )
    files = [path for part in parts for path in sorted((data / part).rglob("*")) if path.is_file()]

    def put_and_get(path: Path) -> None:
        name = path.relative_to(data).as_posix()
        obstore.put(store, name, path.read_bytes(), use_multipart=False)
        # The page cache is warm for whoever comes first as for all after it: loaders are compared, not disks.
        obstore.get(store, name).bytes()

    with ThreadPoolExecutor(UPLOADS) as pool:
        list(pool.map(put_and_get, files))


def read_all(folder: Path) -> None:
    """The same for files on the local disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.read_bytes()

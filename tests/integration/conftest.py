"""One real S3 server for the session; a bucket of its own for every test."""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from draf_dist.launch.local_s3 import LocalS3


@dataclass(frozen=True)
class S3:
    """url: an empty bucket of this test's own. The environment of the test process already has its credentials."""

    server: LocalS3
    url: str

    @property
    def environment(self) -> dict[str, str]:
        """For the environment of child processes."""
        return self.server.environment


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    folder: Path = tmp_path_factory.mktemp("s3")
    with LocalS3(folder) as server:
        yield server


@pytest.fixture
def s3(s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch) -> S3:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return S3(s3_server, s3_server.create_bucket(f"test-{secrets.token_hex(6)}"))

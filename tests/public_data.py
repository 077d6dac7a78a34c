"""Public data sets of real hospitals, and schemas of others: no part of the repository, see docs/data.md."""

import os
from pathlib import Path

import pytest

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"


def folder(name: str) -> Path:
    """The folder of a data set below DRAF_TEST_DATA. Where it is missing the test is skipped; with DRAF_REQUIRE_DATA=1 it fails."""
    data = Path(os.environ.get("DRAF_TEST_DATA", BESIDE))
    if not (data / name).is_dir():
        missing = f"{name} is not below DRAF_TEST_DATA ({data})"
        if os.environ.get("DRAF_REQUIRE_DATA") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    return data / name

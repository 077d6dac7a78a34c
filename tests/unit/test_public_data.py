"""A data set that is missing is a reason to skip where somebody works, and a failure where it must be there."""

from pathlib import Path

import public_data
import pytest


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "wards").mkdir()
    monkeypatch.setenv("DRAF_TEST_DATA", str(tmp_path))
    monkeypatch.delenv("DRAF_REQUIRE_DATA", raising=False)
    return tmp_path


def test_what_is_there_is_used(data: Path) -> None:
    assert public_data.folder("wards") == data / "wards"


def test_what_is_missing_is_skipped_by_name() -> None:
    with pytest.raises(pytest.skip.Exception, match="clinics is not below DRAF_TEST_DATA"):
        public_data.folder("clinics")


def test_what_is_required_fails_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAF_REQUIRE_DATA", "1")
    with pytest.raises(pytest.fail.Exception, match="clinics is not below DRAF_TEST_DATA"):
        public_data.folder("clinics")

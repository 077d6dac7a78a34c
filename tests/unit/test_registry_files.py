"""Where a model registry lies, and what is no registry: refused, and left as it is."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from draf_dist.continual.registry import DEFAULT_URL, Registry
from draf_dist.errors import SpecError, UnreachableError

MODEL_NAME = "death"


def test_asking_of_a_registry_that_is_not_there_makes_nothing(tmp_path: Path) -> None:
    registry = Registry(f"sqlite:///{tmp_path / 'typo' / 'registry.db'}")
    for ask in (registry.rollback, registry.versions, lambda name: registry.promote(name, 1)):
        with pytest.raises(SpecError, match="found nothing"):
            ask(MODEL_NAME)
    assert not list(tmp_path.iterdir())


def broken(path: Path) -> None:
    path.write_text("this is no database, whatever its name says\n" * 100)


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE notes (text)")


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda path: None, SpecError, "expected a registry, found nothing"),
        (foreign, SpecError, "another database"),
        (broken, UnreachableError, "can be read and written"),
        (lambda path: path.mkdir(), UnreachableError, "can be read and written"),
    ],
)
def test_what_is_no_registry_is_refused_and_left_alone(
    tmp_path: Path, make: Callable[[Path], None], error: type[Exception], words: str
) -> None:
    path = tmp_path / "registry.db"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(error, match=words):
        Registry(f"sqlite:///{path}").versions(MODEL_NAME)
    assert (path.read_bytes() if path.is_file() else None) == before


@pytest.mark.parametrize("url", ["postgresql://host/db", "registry.db", "sqlite:///"])
def test_only_sqlite_files_are_registries(url: str) -> None:
    with pytest.raises(SpecError, match="sqlite:///PATH"):
        Registry(url)


def test_the_registry_is_where_the_user_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DRAF_REGISTRY", raising=False)
    assert Registry().path == tmp_path / DEFAULT_URL.removeprefix("sqlite:///")
    monkeypatch.setenv("DRAF_REGISTRY", "sqlite:////somewhere/else.db")
    assert Registry().path == Path("/somewhere/else.db")
    assert Registry("sqlite:///here.db").path == tmp_path / "here.db"

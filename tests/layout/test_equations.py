"""docs/equations.md: every file, name and test in it exists, and every loss, fusion model and metric is in it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest

from draf_dist.models.fusion import FusionConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "equations.md"
COLUMNS = ["name", "equation", "source", "file", "test"]


@dataclass(frozen=True)
class Row:
    """files: below draf_dist/. names: what stands there in backticks. tests: below tests/."""

    name: str
    equation: str
    source: str
    files: tuple[str, ...]
    names: tuple[str, ...]
    tests: tuple[str, ...]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def table_rows(text: str) -> list[list[str]]:
    """Every row of every table but its head."""
    found = [cells(line) for line in text.splitlines() if line.startswith("|")]
    return [row for row in found if row != COLUMNS and set("".join(row)) - set("-")]


def read(text: str) -> list[Row]:
    whole = [row for row in table_rows(text) if len(row) == len(COLUMNS)]
    return [Row(name, equation, source, paths(where), names(where), paths(test)) for name, equation, source, where, test in whole]


def paths(cell: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[\w/]+\.py", cell))


def names(cell: str) -> tuple[str, ...]:
    return tuple(re.findall("`([^`]+)`", cell))


ROWS = read(PAGE.read_text())


def modules() -> list[str]:
    """Where losses, metrics and fusion models are."""
    found = [path for folder in ("losses", "metrics") for path in sorted((ROOT / "draf_dist" / folder).glob("*.py"))]
    plain = [str(path.relative_to(ROOT / "draf_dist")) for path in found if not path.name.startswith("_")]
    fusion = [member.__module__.removeprefix("draf_dist.") for member in get_args(get_args(FusionConfig)[0])]
    return [*plain, *(f"{name.replace('.', '/')}.py" for name in fusion)]


def test_every_row_has_all_columns() -> None:
    assert not [row for row in table_rows(PAGE.read_text()) if len(row) != len(COLUMNS)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_files_names_and_tests_of_a_row_exist(row: Row) -> None:
    assert row.files
    assert row.tests
    assert row.equation
    assert row.source
    text = "\n".join((ROOT / "draf_dist" / file).read_text() for file in row.files)
    assert not [name for name in row.names if not re.search(rf"\b{re.escape(name)}\b", text)]
    assert not [test for test in row.tests if not (ROOT / "tests" / test).is_file()]


@pytest.mark.parametrize("module", modules())
def test_every_loss_fusion_model_and_metric_has_a_row(module: str) -> None:
    assert module in {file for row in ROWS for file in row.files}


def test_a_row_is_read_as_it_is_written() -> None:
    line = "| n | sum \\| x \\| | who | losses/acd.py `acd`, models/link.py | numerics/test_acd.py |"
    assert read("\n".join(["| name | equation | source | file | test |", "|---|---|---|---|---|", line])) == [
        Row("n", "sum \\| x \\|", "who", ("losses/acd.py", "models/link.py"), ("acd",), ("numerics/test_acd.py",))
    ]

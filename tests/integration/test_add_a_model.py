"""docs/add_a_model.md, followed word for word in a copy of the package: one file, its name, the contract, a run."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "add_a_model.md").read_text()
# One process for all commands: each would import torch anew.
RUN_COMMANDS = """
import shlex, sys
from draf_dist.cli.app import main
for line in sys.stdin:
    try:
        main(shlex.split(line)[1:])
    except SystemExit as ended:
        if ended.code:
            raise
"""


def section(number: int) -> str:
    return PAGE.split(f"\n## {number}. ")[1].split("\n## ")[0]


def blocks(text: str, language: str = "") -> list[str]:
    inside = (part.partition("\n") for part in re.split(r"^```", text, flags=re.MULTILINE)[1::2])
    return [body for first, _, body in inside if first == language]


def files_named(text: str) -> list[str]:
    return re.findall(r"`((?:draf_dist|tests|jobs)/[\w/]+\.(?:py|yaml))`", text)


def insert(path: Path, before: str, line: str) -> None:
    """Puts a line before the first one that begins so."""
    text = path.read_text()
    place = text.index(f"\n{before}") + 1
    path.write_text(text[:place] + line + text[place:])


def write_model(home: Path) -> None:
    """Section 1."""
    (file,), (code,) = files_named(section(1)), blocks(section(1), "python")
    assert not (home / file).exists()
    (home / file).write_text(code)


def name_it(home: Path) -> None:
    """Section 2: the import and the union of the first block, the label of the second."""
    union, card = files_named(section(2))
    listed, label = blocks(section(2), "python")
    imported = listed.splitlines()[0]
    first = re.search(r"^FusionConfig = Annotated\[(\w+) \| \.\.\.", listed, re.MULTILINE)
    assert first
    insert(home / union, "from draf_dist", imported + "\n")
    whole = (home / union).read_text()
    (home / union).write_text(whole.replace("FusionConfig = Annotated[", f"FusionConfig = Annotated[{first[1]} | ", 1))
    card_text = (home / card).read_text()
    (home / card).write_text(card_text.replace("_LABELS = {\n", "_LABELS = {\n    " + label, 1))


def add_to_the_contract(home: Path) -> None:
    """Section 3."""
    (members,), (entry,) = files_named(section(3)), blocks(section(3), "text")
    imported = blocks(section(2), "python")[0].splitlines()[0]
    insert(home / members, "from draf_dist", imported + "\n")
    text = (home / members).read_text()
    assert "    for member in (\n" in text
    (home / members).write_text(text.replace("    for member in (\n", "    for member in (\n        " + entry, 1))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and of the contract, with the model added as the page says."""
    home = tmp_path_factory.mktemp("home")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "draf_dist", home / "draf_dist", ignore=ignored)
    shutil.copytree(ROOT / "tests" / "contract", home / "tests" / "contract", ignore=ignored)
    for file in (*ROOT.glob("tests/*.py"), ROOT / "pyproject.toml"):
        shutil.copy(file, home / file.relative_to(ROOT))
    write_model(home)
    name_it(home)
    add_to_the_contract(home)
    return home


def run_in(home: Path, words: list[str], told: str = "") -> str:
    """What a Python of that folder says. Its draf_dist comes before the installed one."""
    environment = os.environ | {"PYTHONPATH": str(home)}
    done = subprocess.run(
        [sys.executable, *words], cwd=home, env=environment, input=told, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(600)
def test_the_model_of_the_page_holds_the_contract(home: Path) -> None:
    (command,) = blocks(section(3))
    python, *words = shlex.split(command)
    assert python == "python"
    passed = re.search(r"(\d+) passed", run_in(home, words))
    assert passed
    assert int(passed[1]) > 20


@pytest.mark.timeout(600)
def test_the_model_of_the_page_trains_and_is_exported(home: Path) -> None:
    jobs = files_named(section(4))
    (job,) = blocks(section(4), "yaml")
    (home / jobs[0]).parent.mkdir()
    (home / jobs[0]).write_text(job)
    (commands,) = blocks(section(4))
    said = run_in(home, ["-c", RUN_COMMANDS], commands)
    assert "Finished after" in said
    run = home / "runs" / "scored_mean"
    described = json.loads((run / "model" / "model.json").read_text())
    assert described["config"]["kind"] == "scored_mean"
    assert "mean weighted by learned scores" in "".join(path.read_text() for path in run.glob("model/*.md"))


def test_the_page_names_every_file_that_it_changes() -> None:
    assert [name for number in (1, 2, 3) for name in files_named(section(number))] == [
        "draf_dist/models/fusion/scored_mean.py",
        "draf_dist/models/fusion/__init__.py",
        "draf_dist/models/card.py",
        "tests/contract/fusion_members.py",
    ]

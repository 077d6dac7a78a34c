"""What README and docs promise: links lead somewhere, every verb shows an example, the road by hand can be walked as written."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from draf_dist.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
VERBS = [
    ["synth"],
    ["prepare"],
    ["ingest"],
    ["train"],
    ["evaluate"],
    ["bench"],
    ["tune"],
    ["demo"],
    ["doctor"],
    ["schema"],
    ["submit"],
    ["retrain"],
    ["models", "register"],
    ["models", "list"],
    ["models", "show"],
    ["models", "gate"],
    ["models", "promote"],
    ["models", "rollback"],
    ["models", "predict"],
    ["delivery", "seal"],
    ["delivery", "verify"],
    ["release", "verify"],
    ["release", "log"],
    ["run", "show"],
    ["run", "report"],
    ["run", "trace"],
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_shows_an_example(verb: list[str]) -> None:
    shown = CliRunner().invoke(app, [*verb, "--help"])
    assert shown.exit_code == 0
    assert f"Example: draf {' '.join(verb)}" in " ".join(shown.stdout.split())


def test_the_list_of_verbs_is_complete() -> None:
    names = {command.name for command in app.registered_commands}
    groups = {group.name: {command.name for command in group.typer_instance.registered_commands} for group in app.registered_groups}
    listed = {tuple(verb) for verb in VERBS}
    assert listed == {(name,) for name in names} | {(group, name) for group, inside in groups.items() for name in inside}


def commands_by_hand() -> list[list[str]]:
    """The `draf` lines of the README's section "The same road by hand"."""
    blocks = (ROOT / "README.md").read_text().split("## The same road by hand")[1].split("\n## ")[0].split("```")[1::2]
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.startswith("draf ")]


def test_the_road_by_hand_can_be_walked_as_written(tmp_path: Path) -> None:
    for folder in ("jobs", "cluster"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for command in commands_by_hand():
        # Fewer epochs and no sweep: this is about the commands, not about the model.
        fewer = {"train": ["--set", "epochs=2"], "evaluate": ["--set", "sweep=null", "--set", "bootstrap=50"]}.get(command[1], [])
        whole = [sys.executable, "-m", "draf_dist.cli.app", *command[1:], *fewer]
        done = subprocess.run(whole, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "runs" / "first" / "report.html").stat().st_size > 10_000
    assert (tmp_path / "runs" / "second" / "model" / "model.json").exists()

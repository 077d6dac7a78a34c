"""What README and docs promise: links lead somewhere, every verb shows an example, the road by hand can be walked as written."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from draf_dist.cli.app import app, main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Few epochs and no sweep: the road by hand is about the commands, not about the model.
FEWER = {
    "train": ["--set", "epochs=1"],
    "evaluate": ["--set", "passes=5", "--set", "sweep=null", "--set", "bootstrap=50"],
}
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
VERBS = [
    ["synth"],
    ["prepare"],
    ["ingest"],
    ["plan"],
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
    ["run", "replay"],
    ["run", "diff"],
    ["run", "export"],
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


@pytest.mark.timeout(900)
def test_the_road_by_hand_can_be_walked_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("jobs", "cluster"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for command in commands_by_hand():
        # In this process, which has waited for its imports already; that one of its own does the same, the demo shows.
        with pytest.raises(SystemExit) as ended:
            main([*command[1:], *FEWER.get(command[1], [])])
        assert not ended.value.code, " ".join(command)
    assert (tmp_path / "runs" / "first" / "report.html").stat().st_size > 10_000
    assert (tmp_path / "runs" / "second" / "model" / "model.json").exists()

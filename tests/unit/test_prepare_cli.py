"""`draf prepare` from tars: what it prints, and the exit codes."""

import json
from pathlib import Path

import pytest
from foreign_tars import CARD, write_tars
from ruamel.yaml import YAML

from draf_dist.cli.app import main
from draf_dist.data.release import open_release
from draf_dist.sources.card import load_card

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DRAF_SUBJECT_KEY", "0123456789abcdef0123456789abcdef")
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "card.yaml").open("w") as file:
        YAML(typ="safe").dump(json.loads(json.dumps(CARD)), file)
    return "card.yaml"


def exit_code(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return int(ended.value.code or 0)


def test_tars_become_a_release_and_a_dry_run_writes_nothing(tmp_path: Path, card: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_tars(tmp_path / "tars", num_tars=2, per_tar=20)
    words = ("prepare", card, "--from-webdataset", "tars", "--out", "set")
    assert exit_code(*words, "--dry-run", "--json") == 0
    looked_at = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "set").exists()
    assert exit_code(*words, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["release"] == open_release("set").pinned_url
    assert {**told, "release": None} == looked_at
    assert told["ignored_members"] == {}
    assert sum(cell["studies"] for splits in told["counts"].values() for cell in splits.values()) == 40


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "expected one of --raw and --from-webdataset, found none"),
        (("--raw", ".", "--from-webdataset", "tars"), 2, "found both"),
        (("--raw", "."), 2, "expected a card of a raw export, found one of kind webdataset"),
        (("--from-webdataset", "nowhere"), 2, "nowhere: expected a tar, or a folder of tars, found none"),
        (("--from-webdataset", "broken.tar"), 3, "expected a tar of whole files, found no tar header at byte 0"),
    ],
)
def test_what_can_not_be_read_is_told_in_one_line(
    tmp_path: Path, card: str, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], code: int, said: str
) -> None:
    (tmp_path / "broken.tar").write_bytes(b"no tar at all" * 100)
    assert exit_code("prepare", card, "--out", "set", *words) == code
    assert said in capsys.readouterr().err


def test_a_card_of_another_kind_has_no_tars(card: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("prepare", str(ROOT / "datasets" / "uci_heart.yaml"), "--from-webdataset", "tars", "--out", "set")
    assert exit_code(*words) == 2
    assert "expected a card of kind webdataset, found hospital_export" in capsys.readouterr().err


def test_the_card_to_start_from_is_one() -> None:
    assert load_card(ROOT / "datasets" / "webdataset_tars.yaml").data_schema().names == ("cxr", "vitals")

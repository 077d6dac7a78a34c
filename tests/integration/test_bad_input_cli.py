"""Bad input as a user meets it: the real command line, its exit code and message, and nothing left to be taken for a release."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import S3
from small_disk import small_disk
from ward_export import image_file, replace_text, write_ward

from draf_dist.cli.app import main
from draf_dist.storage import open_store

KEY = "a key that only these tests use"
SECRETS = ("Zqfamilyname", "MRN7719", "STAY8826", "2031-03", "XRAYFILE", "Traceback")


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


Draf = Callable[..., Answer]


@pytest.fixture
def draf(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Draf:
    """The command line in this process; an answer never names a subject and never shows a traceback."""
    monkeypatch.setenv("DRAF_SUBJECT_KEY", KEY)

    def call(*words: object) -> Answer:
        code: object = 0
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            code = end.code or 0
        assert isinstance(code, int)
        told = capsys.readouterr()
        assert not [secret for secret in SECRETS if secret in told.out + told.err]
        return Answer(code, told.out, told.err)

    return call


@pytest.fixture
def ward(tmp_path: Path) -> Path:
    return write_ward(tmp_path)


def prepare(draf: Draf, ward: Path, *more: object, out: object = None) -> Answer:
    return draf("prepare", ward / "card.yaml", "--raw", ward / "raw", "--out", out or ward / "out", *more)


def published(out: Path) -> list[str]:
    """What a reader could take for a release."""
    return [path.name for path in out.rglob("*") if path.name in ("HEAD.json", "release.json")]


def test_a_good_export_exits_0_and_is_whole(draf: Draf, ward: Path) -> None:
    assert prepare(draf, ward).code == 0
    assert "is whole" in draf("release", "verify", ward / "out").out
    assert "HEAD" in draf("release", "log", ward / "out").out


def test_a_truncated_image_is_quarantined_and_the_rest_goes_on(draf: Draf, ward: Path) -> None:
    content = image_file(ward).read_bytes()
    image_file(ward).write_bytes(content[: len(content) // 2])
    answer = prepare(draf, ward)
    assert answer.code == 0
    assert "Quarantine: 1 studies (2.1% of 48): broken image 1." in answer.out
    assert "north/images.csv row 5: broken image" in answer.out
    refused = prepare(draf, ward, "--limit", 0.01, out=ward / "strict")
    assert refused.code == 3
    assert "expected at most 1.0% of the studies unusable, found 1 of 48: broken image 1" in refused.err
    assert "truncated, damaged, or neither PNG nor JPEG" in refused.err
    assert "Nothing was written" in refused.err
    assert not (ward / "strict").exists()


Break = Callable[[Path], None]


def edit(file: str, old: str, new: str) -> Break:
    return lambda folder: replace_text(folder / file, old, new)


def without_header(folder: Path) -> None:
    stays = folder / "raw/north/stays.csv"
    stays.write_text(stays.read_text().partition("\n")[2])


def same_image(folder: Path) -> None:
    (folder / "raw/south/img/XRAYFILE1003.png").write_bytes(image_file(folder).read_bytes())


BAD_DATA: dict[str, tuple[Break, str]] = {
    "missing column": (
        edit("raw/north/stays.csv", "admitted", "admited"),
        "north/stays.csv: expected a column 'admitted', found the columns stay, patient, surname, admited, age, outcome. "
        "Did you mean 'admited'?",
    ),
    "unknown unit in the data": (
        edit("raw/north/labs.csv", "mg/dL", "mg/dx"),
        "north/labs.csv: code GLU (variable glucose): expected a unit convertible to mmol/L, found 'mg/dx' in 1 rows. "
        "Say in unit_aliases what it means",
    ),
    "unit of something else": (
        edit("raw/north/labs.csv", "mg/dL", "U/L"),
        "found 'U/L' in 1 rows. Does the code of glucose stand for something else?",
    ),
    "one image file, two subjects": (
        edit("raw/north/images.csv", "XRAYFILE0003", "XRAYFILE0004"),
        "north/images.csv row 6: expected an image file of one subject only, found another subject's in north/images.csv row 5.",
    ),
    "one image under two names": (
        same_image,
        "south/stays.csv row 5): expected images that belong to one subject, found the image that is also cxr of study",
    ),
    "missing file": (
        lambda folder: (folder / "raw/south/labs.csv").unlink(),
        "south/labs.csv: expected a CSV file, found no such file. Check the card's path and --raw.",
    ),
    "no line of column names": (
        without_header,
        "north/stays.csv first line: expected the columns 'admitted', 'age', 'outcome', 'patient', 'stay', "
        "found none of them among its 6 columns. If it has no line of names, give `header`",
    ),
    "a quote that is never closed": (
        edit("raw/north/labs.csv", "STAY88260003", '"STAY88260003'),
        "north/labs.csv: expected 5 columns in every row, found 1 rows with another number (the first is row 5 with",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_exits_3_with_its_place_and_remedy(draf: Draf, ward: Path, case: str) -> None:
    break_it, message = BAD_DATA[case]
    break_it(ward)
    for words in ((), ("--dry-run",)):
        answer = prepare(draf, ward, *words)
        assert answer.code == 3
        assert message in answer.err
        assert not (ward / "out").exists()


BAD_CARD: dict[str, tuple[str, str, str]] = {
    "unknown unit": (
        "canonical: mmol/L",
        "canonical: mmol/LL",
        "card.yaml: variable glucose: expected a known canonical unit, found 'mmol/LL'. For example mmol/L",
    ),
    "unknown key": (
        "window_h",
        "windw_h",
        "windw_h: expected a known key, found 'windw_h'. Did you mean 'window_h'?",
    ),
    "window after the anchor": ("window_h: [-24, 0]", "window_h: [-24, 1]", "window_h.1: Input should be less"),
    "label as an input": (
        "name: age, unit: year, range: [0, 120]",
        "name: fate, code: outcome, type: binary, values: {dead: 1, alive: 0}",
        "variable fate: expected another column, found the label's own, 'outcome'. Take it out",
    ),
    "no YAML": ("label: death", "label: [death", "card.yaml line"),
}


@pytest.mark.parametrize("case", BAD_CARD)
def test_a_wrong_card_exits_2_before_anything_is_read(draf: Draf, ward: Path, case: str) -> None:
    old, new, message = BAD_CARD[case]
    replace_text(ward / "card.yaml", old, new)
    (ward / "raw/north/stays.csv").unlink()
    answer = prepare(draf, ward)
    assert answer.code == 2
    assert message in answer.err
    assert not (ward / "out").exists()


def test_all_problems_of_a_card_are_told_together(draf: Draf, ward: Path) -> None:
    replace_text(ward / "card.yaml", "licence: {name: none}", "licence: {nme: none}")
    replace_text(ward / "card.yaml", "offset_h: 24", "ofset_h: 24")
    told = prepare(draf, ward).err
    assert "Did you mean 'name'?" in told
    assert "Did you mean 'offset_h'?" in told


def test_wrong_usage_exits_2(draf: Draf, ward: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stray = ward / "stray"
    stray.write_text("")
    for words, message in (
        (("prepare", ward / "none.yaml", "--raw", ward / "raw", "--out", ward / "out"), "found no such file"),
        (("prepare", ward / "card.yaml", "--raw", ward / "none", "--out", ward / "out"), "Check --raw"),
        (("prepare", ward / "card.yaml", "--raw", ward / "raw", "--out", ""), "found nothing"),
        (("prepare", ward / "card.yaml", "--raw", ward / "raw", "--out", "s3:/bucket/x"), "s3://bucket/prefix"),
        (("prepare", ward / "card.yaml", "--raw", ward / "raw", "--out", "gs://bucket/x"), "s3://bucket/prefix"),
        (("prepare", ward / "card.yaml", "--raw", ward / "raw", "--out", stray / "x"), "which is a file"),
        (("prepare", ward / "card.yaml", "--raw", ward / "raw", "--out", f"{ward / 'out'}@1"), "without a version"),
        (("release", "verify", ward / "none"), "expected a folder, found nothing"),
        (("release", "log", ward / "raw"), "expected a release, found none"),
    ):
        answer = draf(*words)
        assert (answer.code, message in answer.err) == (2, True), answer
    assert prepare(draf, ward, "--set", "split=[").code == 2
    assert prepare(draf, ward, "--set", "modalities.0.height=32").code == 2
    monkeypatch.delenv("DRAF_SUBJECT_KEY")
    assert "openssl rand -hex 32" in prepare(draf, ward).err
    assert not (ward / "out").exists()


def test_a_dry_run_checks_the_url_and_the_earlier_release(draf: Draf, ward: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepare(draf, ward, "--dry-run", out=f"{ward / 'out'}@1").code == 2
    assert prepare(draf, ward).code == 0
    before = sorted(path.name for path in (ward / "out").rglob("*"))
    monkeypatch.setenv("DRAF_SUBJECT_KEY", "another key than that of the release")
    refused = prepare(draf, ward, "--dry-run")
    assert refused.code == 4
    assert "DRAF_SUBJECT_KEY: expected the key of release" in refused.err
    assert sorted(path.name for path in (ward / "out").rglob("*")) == before


def test_a_wrong_s3_key_exits_6_and_a_missing_bucket_2(draf: Draf, ward: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in ((), ("--dry-run",)):
        missing = prepare(draf, ward, *words, out=f"{s3.url}-none/ward")
        assert missing.code == 2
        assert "expected a bucket that exists, found no bucket" in missing.err
        assert f"Did you mean {s3.url}?" in missing.err
    with monkeypatch.context() as wrong:
        wrong.setenv("AWS_SECRET_ACCESS_KEY", "wrong-but-private")
        for answer in (prepare(draf, ward, out=f"{s3.url}/ward"), draf("release", "verify", f"{s3.url}/ward")):
            assert answer.code == 6
            assert "expected credentials that the store accepts, found them refused" in answer.err
            assert "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY" in answer.err
            assert "wrong-but-private" not in answer.err
    assert open_store(s3.url).list() == []
    assert prepare(draf, ward, out=f"{s3.url}/ward").code == 0


def test_a_full_disk_exits_1_and_leaves_no_release(draf: Draf, tmp_path: Path) -> None:
    ward = write_ward(tmp_path / "ward", num_studies=250)
    with small_disk(tmp_path / "disk", 5) as disk:
        filler = disk / "filler"
        filler.write_bytes(bytes(4_900_000))
        answer = prepare(draf, ward, out=disk / "out")
        assert answer.code == 1
        assert "expected room on the disk, found" in answer.err
        assert "Free space, then run the same command again." in answer.err
        assert published(disk) == []
        assert draf("release", "verify", disk / "out").code == 2
        filler.unlink()
        assert prepare(draf, ward, out=disk / "out").code == 0
        assert draf("release", "verify", disk / "out").code == 0


def test_synth_on_a_full_disk_exits_1_and_can_be_run_again(draf: Draf, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2) as disk:
        filler = disk / "filler"
        filler.write_bytes(bytes(2_050_000))
        words = ("synth", disk / "out", "--sites", 1, "--subjects", 30)
        answer = draf(*words)
        assert answer.code == 1
        assert "expected room on the disk" in answer.err
        assert list((disk / "out").iterdir()) == []
        assert draf("synth", filler / "out").code == 2
        filler.unlink()
        assert draf(*words).code == 0


def test_a_damaged_release_exits_3_and_its_member_is_named(draf: Draf, ward: Path) -> None:
    assert prepare(draf, ward).code == 0
    shard = next((ward / "out").rglob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(bytes(data))
    answer = draf("release", "verify", ward / "out")
    assert answer.code == 3
    assert shard.name in answer.err


def run(*words: object, **environment: str) -> "subprocess.Popen[str]":
    """The command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "draf_dist.cli.app", *map(str, words)],
        env={**os.environ, "DRAF_SUBJECT_KEY": KEY, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_error_that_nobody_foresaw_is_one_line_without_the_data(ward: Path) -> None:
    code = (
        "import draf_dist.sources.images as images, draf_dist.cli.app as app, sys\n"
        "def fail(*_): raise KeyError('Zqfamilyname')\n"
        "images._content = fail\n"
        "app.main(sys.argv[1:])"
    )
    words = ["prepare", str(ward / "card.yaml"), "--raw", str(ward / "raw"), "--out", str(ward / "out")]
    environment = {**os.environ, "DRAF_SUBJECT_KEY": KEY}
    ended = subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: KeyError in images.py line ")
    assert ended.stderr.count("\n") == 1
    assert "Zqfamilyname" not in ended.stdout + ended.stderr


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_prepare_exits_5_and_cleans_up(tmp_path: Path, kind: signal.Signals) -> None:
    ward, temporary = write_ward(tmp_path / "ward", num_studies=1500), tmp_path / "tmp"
    temporary.mkdir()
    words = ("prepare", ward / "card.yaml", "--raw", ward / "raw", "--out", ward / "out")
    with run(*words, TMPDIR=str(temporary)) as child:
        deadline = time.monotonic() + 60
        while not list(temporary.glob("draf-prepare-*/spool")) and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(kind)
        _, told = child.communicate(timeout=60)
    assert child.returncode == 5
    assert "Traceback" not in told
    assert "the same command" in told
    assert not list(temporary.iterdir())
    assert published(tmp_path) == []


def test_temporary_files_are_for_their_owner_alone(draf: Draf, ward: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    made = tempfile.mkdtemp

    def note(*words: object, **named: object) -> str:
        folder = made(*words, **named)
        seen.append(Path(folder).stat().st_mode & 0o777)
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", note)
    assert prepare(draf, ward).code == 0
    assert seen == [0o700]

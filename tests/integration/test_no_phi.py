"""No name, date, record number or file name of a patient leaves the export: a canary in each is looked for everywhere else."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ward_export import CANARIES, image_file, replace_text, write_ward

from draf_dist.cli.app import main

ENCODERS = "{image: {kind: image2d, widths: [4, 8], groups: 2}, table: {kind: tabular, hidden: 8}}"
JOB = f"""
kind: finetune
name: canary
release: RELEASE
model: {{kind: draf, width: 8, encoders: {ENCODERS}}}
batch_size: 16
epochs: 1
passes_train: 1
passes_eval: 2
"""
EVALUATION = ("--set", "bootstrap=2", "--set", "passes=2", "--set", "sweep.passes=2", "--set", "sweep.max_studies=4")


Draf = Callable[..., str]


@pytest.fixture
def draf(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Draf:
    """The command line in a folder: all that it told, on both streams, whoever wrote it."""
    monkeypatch.setenv("DRAF_SUBJECT_KEY", "a key that only these tests use")

    def call(folder: Path, *words: object, code: int = 0) -> str:
        monkeypatch.chdir(folder)
        ended: object = 0
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            ended = end.code or 0
        out, err = capfd.readouterr()
        assert ended == code, err
        return out + err

    return call


def texts(path: Path) -> Iterator[tuple[str, bytes]]:
    """A file's own bytes, and what is compressed in it."""
    content = path.read_bytes()
    yield str(path), content
    if path.suffix == ".tar":
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for member in tar:
                inside = tar.extractfile(member)
                assert inside is not None
                yield member.name, inside.read()
    if path.suffix == ".parquet":
        yield f"{path} rows", json.dumps(pq.read_table(io.BytesIO(content)).to_pylist(), default=str).encode()


def found(folder: Path) -> list[str]:
    """Where below a folder a canary is, in a name or in the content of a file."""
    places = []
    for path in sorted(folder.rglob("*")):
        pieces = [(str(path), str(path.relative_to(folder)).encode()), *(texts(path) if path.is_file() else ())]
        places += [f"{canary} in {name}" for name, content in pieces for canary in CANARIES if canary.encode() in content]
    return places


def told(text: str) -> list[str]:
    return [canary for canary in CANARIES if canary in text]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of which two studies will go to quarantine."""
    folder = write_ward(tmp_path_factory.mktemp("canary"), num_studies=40)
    image_file(folder).write_bytes(b"no image")
    replace_text(folder / "raw/north/stays.csv", "2031-03-06 06:00", "2031-13-41")
    return folder


def test_the_canaries_are_in_the_export(site: Path) -> None:
    everything = b"".join(path.read_bytes() + path.name.encode() for path in (site / "raw").rglob("*") if path.is_file())
    assert all(canary.encode() in everything for canary in CANARIES)


def test_a_release_a_run_and_a_report_carry_no_canary(draf: Draf, site: Path) -> None:
    (site / "job.yaml").write_text(JOB.replace("RELEASE", "release"))
    words = [
        draf(site, "prepare", "card.yaml", "--raw", "raw", "--out", "release"),
        draf(site, "prepare", "card.yaml", "--raw", "raw", "--out", "release", "--json"),
        draf(site, "release", "verify", "release"),
        draf(site, "release", "log", "release", "--json"),
        draf(site, "train", "job.yaml", "--out", "run"),
        draf(site, "evaluate", "run", *EVALUATION),
        draf(site, "run", "show", "run"),
    ]
    assert "broken image 1" in words[0]
    assert "bad time 1" in words[0]
    assert told("".join(words)) == []
    assert found(site / "release") == []
    assert len(list((site / "run").rglob("*"))) > 10
    assert found(site / "run") == []


BREAKS = {
    "unit": ("raw/north/labs.csv", ",mg/dL", ",parsec"),
    "column": ("raw/north/stays.csv", "patient", "person"),
    "first line": ("raw/north/stays.csv", "stay,patient,surname,admitted,age,outcome\n", ""),
    "quote": ("raw/north/stays.csv", "MRN77190005", '"MRN77190005'),
    "delimiter": ("raw/north/stays.csv", "STAY88260005,MRN77190005,", "STAY88260005;MRN77190005;"),
    "claim": ("raw/north/images.csv", "XRAYFILE0003", "XRAYFILE0007"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_no_error_carries_a_canary(draf: Draf, tmp_path: Path, case: str) -> None:
    file, old, new = BREAKS[case]
    folder = write_ward(tmp_path, num_studies=12)
    replace_text(folder / file, old, new)
    text = draf(folder, "prepare", "card.yaml", "--raw", "raw", "--out", "release", code=3)
    assert "expected" in text
    assert told(text) == []
    assert not (folder / "release").exists()

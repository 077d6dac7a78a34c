"""Deliveries on a real S3 server and under SIGKILL: nothing is lost, nothing half done is seen, one command says what happened."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import S3
from memory_delivery import EAST, MemoryDelivery, sealed
from memory_source import KEY, MemorySource

from draf_dist.cli.app import main
from draf_dist.continual.ingest import STATES, ingest
from draf_dist.data.prepare import prepare
from draf_dist.data.release import Release, open_release, release_log
from draf_dist.data.verify import verify
from draf_dist.sources.delivery import seal
from draf_dist.sources.synth import synthesise

TESTS = Path(__file__).parents[1]
Draf = Callable[..., str]

# One process that knows everything by now, and a child of it for every state: it ends itself by SIGKILL once it reaches that state.
KILLED = """
import os, signal, sys
from pathlib import Path
from memory_delivery import EAST, MemoryDelivery
from memory_source import KEY
from draf_dist.continual.ingest import ingest

folder, *places = sys.argv[1:]
for place in places:
    state, url = place.split("=", 1)
    child = os.fork()
    if child == 0:
        def stop(reached):
            if reached == state:
                os.kill(os.getpid(), signal.SIGKILL)

        ingest(MemoryDelivery(schema=EAST), Path(folder), url, subject_key=KEY, shard_size_bytes=20_000, on_state=stop)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, place
"""


def kill_at(folder: Path, urls: dict[str, str], environment: dict[str, str] | None = None) -> None:
    """An ingest of the folder for every state -> URL, each killed (SIGKILL) in its state, one after the other."""
    environment = {**os.environ, **(environment or {}), "PYTHONPATH": str(TESTS)}
    places = [f"{state}={url}" for state, url in urls.items()]
    subprocess.run([sys.executable, "-c", KILLED, str(folder), *places], env=environment, check=True, timeout=120)


def take_in(url: str, folder: Path) -> Release:
    return ingest(MemoryDelivery(schema=EAST), folder, url, subject_key=KEY, shard_size_bytes=20_000).release


def stored(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_kill_in_any_state_leaves_a_release_that_verifies_and_the_same_command_makes_the_same_one(tmp_path: Path) -> None:
    parent = prepare(MemorySource(), str(tmp_path / "parent"), subject_key=KEY)
    urls = {state: str(tmp_path / state) for state in STATES}
    for folder in (*urls.values(), tmp_path / "undisturbed"):
        shutil.copytree(tmp_path / "parent", folder)
    delivery = sealed(tmp_path / "in")
    expected = take_in(str(tmp_path / "undisturbed"), delivery)
    kill_at(delivery, urls)
    for state, url in urls.items():
        found = open_release(url)
        assert found.version == (expected.version if state == "published" else parent.version), state
        verify(found)
        assert take_in(url, delivery).version == expected.version
        assert stored(Path(url)) == stored(tmp_path / "undisturbed"), state


def test_a_kill_on_s3_leaves_what_was_there_and_the_same_command_goes_on(s3: S3, tmp_path: Path) -> None:
    parent = prepare(MemorySource(), s3.url, subject_key=KEY)
    delivery = sealed(tmp_path / "in")
    kill_at(delivery, {"sharded": s3.url, "committed": s3.url}, s3.environment)
    assert open_release(s3.url).version == parent.version
    verify(open_release(s3.url))
    local = prepare(MemorySource(), str(tmp_path / "local"), subject_key=KEY)
    assert take_in(s3.url, delivery).version == open_release(s3.url).version == take_in(local.url, delivery).version


def test_ingests_at_once_lose_nothing(s3: S3, tmp_path: Path) -> None:
    parent = prepare(MemorySource(), s3.url, subject_key=KEY)
    names = ("a", "b", "c")
    folders = {name: sealed(tmp_path / name, name) for name in names}
    together, errors = threading.Barrier(len(names)), []
    reached: dict[str, list[str]] = {name: [] for name in names}

    def deliver(number: int, name: str) -> None:
        def wait(state: str) -> None:
            reached[name].append(state)
            # All have compared themselves with the same parent and packed their shards: one can win.
            if state == "sharded" and reached[name].count("sharded") == 1:
                together.wait(60)

        try:
            # Five studies of each are also in the next one's.
            source = MemoryDelivery(first=60 + 15 * number, num_studies=20)
            ingest(source, folders[name], s3.url, subject_key=KEY, on_state=wait)
        except Exception as error:  # noqa: BLE001 - of a thread
            errors.append(error)

    threads = [threading.Thread(target=deliver, args=place) for place in enumerate(names)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    head = open_release(s3.url)
    assert {delivery.delivery_id for delivery in head.manifest.deliveries} == set(names)
    assert sum(delivery.num_studies for delivery in head.manifest.deliveries) == 50
    assert verify(head).num_samples == 110
    assert sum(states.count("compared") > 1 for states in reached.values()) >= 2
    log = release_log(s3.url)
    assert [entry.parent for entry in log[:4]] == [log[1].version, log[2].version, parent.version, None]


@pytest.fixture
def draf(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Draf:
    """The command line, run in this process: what it printed on the stream that its exit code belongs to."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: object, code: int = 0) -> str:
        ended: object = 0
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            ended = end.code or 0
        out, err = capfd.readouterr()
        assert ended == code, out + err
        return out if code == 0 else err

    return call


def test_a_new_hospital_comes_in_by_the_command_line_and_a_corrupt_image_does_not(draf: Draf, tmp_path: Path) -> None:
    url = str(tmp_path / "release")
    synthesise(tmp_path / "old", num_subjects=48, seed=0)
    draf("prepare", tmp_path / "old" / "card.yaml", "--raw", tmp_path / "old" / "raw", "--out", url)
    parent = open_release(url)
    draf("synth", tmp_path / "new", "--hospital", 5, "--subjects", 30, "--seed", 1)
    card, folder = tmp_path / "new" / "card.yaml", tmp_path / "new" / "delivery"
    image = sorted((folder / "site_05" / "images").glob("*_1.png"))[3]
    image.write_bytes(image.read_bytes()[:200])
    assert "(.png file): 200 bytes, not" in draf("delivery", "verify", folder, code=3)  # changed after it was sealed
    (folder / "delivery.json").unlink()
    assert "has arrived" in draf("ingest", card, folder, "--release", url, code=2)
    draf("delivery", "seal", folder, "--id", "may", "--site", "site_05")
    assert json.loads(draf("delivery", "verify", folder, "--json"))["delivery_id"] == "may"

    seen = json.loads(draf("ingest", card, folder, "--release", url, "--dry-run", "--json"))
    assert (seen["dry_run"], seen["verdict"], seen["release"]) == (True, "ingested", parent.pinned_url)
    told = draf("ingest", card, folder, "--release", url)
    assert "Quarantine: 1 studies (3.3% of 30): broken image 1." in told
    assert image.name not in told
    child = open_release(url)
    assert child.manifest.quarantined == parent.manifest.quarantined | {"broken image": 1}
    assert sum(cell["studies"] for cell in child.manifest.counts["site_05"].values()) == seen["delivery"]["num_studies"] == 29

    again = json.loads(draf("ingest", card, folder, "--release", url, "--json"))
    assert (again["verdict"], again["release"]) == ("already there", child.pinned_url)
    assert "nothing to do" in draf("ingest", card, folder, "--release", url)
    shutil.rmtree(folder / "site_05" / "images")
    (folder / "delivery.json").unlink()
    seal(folder, "may")
    assert "other bytes under the same id" in draf("ingest", card, folder, "--release", url, code=4)

    # A site that the release knows delivers again: the card of all four will do, although their folders are not there.
    shutil.copytree(tmp_path / "old" / "raw" / "northgate", tmp_path / "later" / "northgate")
    draf("delivery", "seal", tmp_path / "later", "--id", "june", "--site", "northgate", "--previous", "may")
    later = draf("ingest", tmp_path / "old" / "card.yaml", tmp_path / "later", "--release", url)
    assert f"Nothing new: recorded in {open_release(url).pinned_url}" in later
    assert draf("release", "log", url).count("june") == 1

    assert "is whole" in draf("release", "verify", url)
    log = json.loads(draf("release", "log", url, "--json"))["releases"]
    assert [(entry["parent"], entry["deliveries"]) for entry in log[1:]] == [(parent.version, ["may"]), (None, [])]
    assert "may" in draf("release", "log", url)

"""Tars of other programs, walked once: every dialect read as tarfile reads it, everything unsound refused."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from foreign_tars import by_hand

from draf_dist.data import foreign_walk
from draf_dist.data.foreign_walk import BrokenTarError, Entry, TarStream, walk
from draf_dist.data.shards import sha256_of
from draf_dist.storage import LocalStore

LONG = "ward/" + "a" * 60 + "/" + "é" * 80 + ".jpg"
MEMBERS = [("a.jpg", b"x" * 700), ("a.cls", b""), (LONG, b"y" * 512), ("w" * 120 + "/b.jpg", b"z")]


def walked(path: Path) -> tuple[list[Entry], str]:
    with TarStream(LocalStore(path.parent), path.name, path.stat().st_size) as stream:
        return list(walk(stream)), stream.sha256()


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_every_dialect_are_read_as_tarfile_reads_them(tmp_path: Path, format: int) -> None:
    path = by_hand(tmp_path / "a.tar", MEMBERS, format)
    entries, sha256 = walked(path)
    with tarfile.open(path) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar]
    assert [(entry.name, entry.offset, entry.size) for entry in entries] == expected
    assert [entry.name for entry in entries] == [name for name, _ in MEMBERS]
    assert sha256 == sha256_of(path)


def test_a_prefix_of_ustar_is_part_of_the_name(tmp_path: Path) -> None:
    path = by_hand(tmp_path / "a.tar", [("d" * 90 + "/" + "f" * 60, b"1")], tarfile.USTAR_FORMAT)
    assert [entry.name for entry in walked(path)[0]] == ["d" * 90 + "/" + "f" * 60]


@pytest.mark.parametrize("block_bytes", [512, 700, 4096])
def test_the_size_of_the_blocks_that_are_read_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    path = by_hand(tmp_path / "a.tar", MEMBERS)
    expected = walked(path)
    monkeypatch.setattr(foreign_walk, "READ_BLOCK_BYTES", block_bytes)
    assert walked(path) == expected
    with TarStream(LocalStore(tmp_path), "a.tar", path.stat().st_size) as stream:
        content = {entry.name: stream.read(entry.size) for entry in walk(stream)}
    assert content == dict(MEMBERS)


def test_links_devices_and_sparse_files_are_no_files_and_the_walk_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for letter, kind in zip("lhdp", (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE), strict=True):
            info = tarfile.TarInfo(f"{letter}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        sparse = tarfile.TarInfo("s.jpg")
        sparse.size, sparse.pax_headers = 5, {"GNU.sparse.major": "1", "GNU.sparse.name": "real.jpg"}
        tar.addfile(sparse, io.BytesIO(b"12345"))
        last = tarfile.TarInfo("a.jpg")
        last.size = 3
        tar.addfile(last, io.BytesIO(b"123"))
    entries, _ = walked(path)
    assert [(entry.name, entry.is_file) for entry in entries] == [
        *((f"{letter}.jpg", False) for letter in "lhdp"),
        ("real.jpg", False),
        ("a.jpg", True),
    ]


def gnu_sparse(tar: bytes) -> bytes:
    """The first member in GNU's old sparse form, whose map goes on in two blocks of its own."""
    header = bytearray(tar[:512])
    header[156:157], header[482] = b"S", 1
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * 32)
    return bytes(header) + bytes(504) + b"\1" + bytes(7) + bytes(512) + tar[512:]


def test_a_sparse_map_of_gnu_does_not_shift_what_follows(tmp_path: Path) -> None:
    path = by_hand(tmp_path / "a.tar", MEMBERS[:2])
    path.write_bytes(gnu_sparse(path.read_bytes()))
    entries, _ = walked(path)
    assert [(entry.name, entry.is_file, entry.offset) for entry in entries] == [("a.jpg", False, 1536), ("a.cls", True, 3072)]


def flipped(at: int) -> Callable[[bytes], bytes]:
    return lambda tar: tar[:at] + bytes([tar[at] ^ 1]) + tar[at + 1 :]


def pax(record: bytes, size: int | None = None) -> Callable[[bytes], bytes]:
    """A PAX header with this content, that says to be of this size, before the first member."""

    def changed(tar: bytes) -> bytes:
        info = tarfile.TarInfo("x")
        info.type, info.size = tarfile.XHDTYPE, len(record) if size is None else size
        return info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + tar

    return changed


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (flipped(0), "no tar header at byte 0"),
        (flipped(1536 + 130), "no tar header at byte 1536"),
        (lambda tar: tar[:1000], "its end after 1000 bytes, in the middle of a file"),
        (lambda tar: tar[:1536], "without the mark of an end"),
        (lambda tar: tar + tar, "more behind its end"),
        (lambda tar: b"\x1f\x8b" + tar, "a compressed file"),
        (lambda tar: b"", "its end at byte 0"),
        (lambda tar: b"<html>" * 200, "no tar header at byte 0"),
        (pax(b"99 path=b.jpg\n"), "a PAX header that can't be read"),
        (pax(b"0 path=b.jpg\n"), "a PAX header that can't be read"),
        (pax(b"12 size=-100\n"), "a PAX header that can't be read"),
        (pax(b"", 2**21), "a header of 2097152 bytes"),
    ],
)
def test_what_is_no_sound_tar_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes], found: str) -> None:
    path = by_hand(tmp_path / "a.tar", MEMBERS[:2])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BrokenTarError, match=found):
        walked(path)


def test_no_damage_to_headers_is_more_than_a_refusal(tmp_path: Path) -> None:
    path = by_hand(tmp_path / "a.tar", MEMBERS)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(whole)
        at = int(generator.integers(0, len(whole) // 512)) * 512
        data[at + int(generator.integers(0, 512))] = int(generator.integers(0, 256))
        # The sum made right again, so that what is behind it is tried.
        data[at + 148 : at + 156] = b"%06o\0 " % (sum(data[at : at + 512]) - sum(data[at + 148 : at + 156]) + 8 * 32)
        path.write_bytes(bytes(data))
        try:
            entries, _ = walked(path)
        except BrokenTarError:
            continue
        assert all(entry.offset + entry.size <= len(whole) for entry in entries)

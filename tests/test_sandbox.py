"""Sandboxes: what comes in is unpacked and stays inside, what goes out is packed and is nobody else's."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from loadmaster import StagingFailed
from loadmaster.staging.sandbox import pack, unpack
from loadmaster.workdir import Workdir

Members = dict[str, bytes | tarfile.TarInfo]


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def archive(path: Path, members: Members, mode: str = "w:gz") -> Path:
    with tarfile.open(str(path), mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size, info.mode = len(content), 0o755
                tar.addfile(info, io.BytesIO(content))
    return path


# -- in ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_an_archive_of_any_compression_is_unpacked(workdir: Workdir, mode: str) -> None:
    members: Members = {"run.sh": b"#!/bin/sh", "d": member("d", tarfile.DIRTYPE), "./a/b/c": b"x"}
    archive(workdir.path / "in", members, mode)
    unpack(workdir, "in")
    assert (workdir.path / "run.sh").read_bytes() == b"#!/bin/sh"
    assert (workdir.path / "a" / "b" / "c").read_bytes() == b"x"
    assert (workdir.path / "d").is_dir()
    assert os.access(workdir.path / "run.sh", os.X_OK)


@pytest.mark.parametrize("content", [b"", b"plain text\n" * 1000, gzip.compress(b"no archive")])
def test_what_is_no_archive_is_left_as_it_is(workdir: Workdir, content: bytes) -> None:
    (workdir.path / "in").write_bytes(content)
    unpack(workdir, "in")
    assert (workdir.path / "in").read_bytes() == content
    assert [path.name for path in workdir.path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    "name", ["../out", "/tmp/out", "a/../../out", "a//b", ".", "d/..", "line\nbreak", "n" * 256], ids=repr
)
def test_a_name_that_leads_out_is_refused(workdir: Workdir, name: str) -> None:
    archive(workdir.path / "in", {name: b"x"})
    with pytest.raises(StagingFailed, match="cannot unpack: in: "):
        unpack(workdir, "in")
    assert [path.name for path in workdir.path.iterdir()] == ["in"]
    assert [path.name for path in workdir.path.parent.iterdir()] == ["job"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_what_is_neither_a_file_nor_a_directory_is_refused(workdir: Workdir, kind: bytes) -> None:
    archive(workdir.path / "in", {"x": member("x", kind, "/etc/passwd")})
    with pytest.raises(StagingFailed, match="'x' is neither a file nor a directory"):
        unpack(workdir, "in")
    assert not os.path.lexists(workdir.path / "x")


def test_a_file_is_not_written_through_a_link_that_is_there(workdir: Workdir, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("gold")
    (workdir.path / "link").symlink_to(tmp_path / "precious")
    (workdir.path / "d").symlink_to(tmp_path)
    archive(workdir.path / "in", {"link": b"x"})
    unpack(workdir, "in")
    archive(workdir.path / "in", {"d/precious": b"x"})
    with pytest.raises(StagingFailed):
        unpack(workdir, "in")
    assert (tmp_path / "precious").read_text() == "gold"


def test_an_archive_that_contains_its_own_name_is_unpacked_whole(workdir: Workdir) -> None:
    """The file was truncated while it was read."""
    archive(workdir.path / "in", {"in": b"new", "after": os.urandom(100_000)})
    unpack(workdir, "in")
    assert (workdir.path / "in").read_bytes() == b"new"
    assert (workdir.path / "after").stat().st_size == 100_000


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def spoil(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 0xFF for byte in data[middle : middle + 64]) + data[middle + 64 :]


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("damage", [cut, spoil])
def test_a_damaged_archive_fails_and_is_named(workdir: Workdir, mode: str, damage: Callable[[bytes], bytes]) -> None:
    """The decompressors' errors used to escape as what they are, and a wrong checksum was not noticed at all."""
    path = archive(workdir.path / "in", {"random": os.urandom(2_000_000), "after": b"x"}, mode)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StagingFailed, match="cannot unpack: in: "):
        unpack(workdir, "in")


def test_an_archive_cut_off_at_its_very_beginning_fails_too(workdir: Workdir) -> None:
    path = archive(workdir.path / "in.tar.gz", {"random": os.urandom(1000)})
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(StagingFailed, match=r"cannot unpack: in\.tar\.gz: "):
        unpack(workdir, "in.tar.gz")


@pytest.mark.timeout(10)
def test_a_fifo_in_the_place_of_an_input_does_not_hang(workdir: Workdir) -> None:
    os.mkfifo(workdir.path / "in")
    with pytest.raises(OSError, match="is a FIFO"):
        unpack(workdir, "in")


def test_set_uid_and_the_worlds_writing_are_not_unpacked(workdir: Workdir) -> None:
    info = tarfile.TarInfo("x")
    info.mode = 0o6777
    archive(workdir.path / "in", {"x": info})
    unpack(workdir, "in")
    assert (workdir.path / "x").stat().st_mode & 0o7777 == 0o755


# -- out ---------------------------------------------------------------------------------------------------------


def packed(workdir: Workdir, name: str = "d.tar") -> dict[str, bytes]:
    with tarfile.open(workdir.path / name) as tar:
        return {info.name: getattr(tar.extractfile(info), "read", bytes)() for info in tar}


def test_a_directory_is_packed_below_its_own_name(workdir: Workdir) -> None:
    (workdir.path / "a" / "d" / "e").mkdir(parents=True)
    (workdir.path / "a" / "d" / "e" / "file").write_bytes(b"content")
    (workdir.path / "a" / "d" / "link").symlink_to("e/file")
    assert pack(workdir, "a/d", "d.tar") == []
    assert packed(workdir) == {"d/e/file": b"content", "d/link": b"content"}


@pytest.mark.timeout(10)
def test_what_may_not_leave_is_left_out_and_told_and_the_rest_is_packed(workdir: Workdir, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    directory = workdir.path / "d"
    directory.mkdir()
    (directory / "a").write_bytes(b"1")
    (directory / "link").symlink_to(tmp_path / "secret")
    (directory / "folder").symlink_to(tmp_path)
    (directory / "dangling").symlink_to("nowhere")
    os.mkfifo(directory / "fifo")
    (directory / os.fsdecode(b"\xff")).write_bytes(b"x")
    (directory / "z").write_bytes(b"2")
    left_out = dict(pack(workdir, "d", "d.tar"))
    assert packed(workdir) == {"d/a": b"1", "d/z": b"2"}
    assert set(left_out) == {f"d/{name}" for name in ("link", "folder", "dangling", "fifo", "\udcff")}
    assert left_out["d/link"] == left_out["d/folder"] == "is a symbolic link out of the work directory"
    assert left_out["d/fifo"] == "is a FIFO, not a file"


@pytest.mark.timeout(10)
def test_what_has_the_name_of_the_archive_is_not_written_to(workdir: Workdir, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("gold")
    (workdir.path / "d").mkdir()
    (workdir.path / "d" / "large").write_bytes(b"x" * 200_000)
    for plant in (os.mkfifo, lambda path: path.symlink_to(tmp_path / "precious")):
        plant(workdir.path / "d.tar")
        assert pack(workdir, "d", "d.tar") == []
        assert packed(workdir) == {"d/large": b"x" * 200_000}
        (workdir.path / "d.tar").unlink()
    assert (tmp_path / "precious").read_text() == "gold"


def test_a_full_disk_fails_the_packing_and_leaves_no_archive(small_disk: Path) -> None:
    """It used to be told as files that may not leave, with a broken archive delivered."""
    workdir = Workdir.make(small_disk, "job")
    (workdir.path / "d").mkdir()
    for number in range(3):
        (workdir.path / "d" / str(number)).write_bytes(b"x" * 200_000)
    with pytest.raises(StagingFailed, match="cannot pack: d: No space left on device"):
        pack(workdir, "d", "d.tar")
    assert [path.name for path in workdir.path.iterdir()] == ["d"]
    workdir.close()


def test_what_was_packed_is_unpacked_the_same(workdir: Workdir) -> None:
    (workdir.path / "d").mkdir()
    content = {f"ü {number}": os.urandom(number) for number in (0, 1, 511, 512, 513, 100_000)}
    for name, data in content.items():
        (workdir.path / "d" / name).write_bytes(data)
    pack(workdir, "d", "d.tar")
    for name in content:
        (workdir.path / "d" / name).unlink()
    unpack(workdir, "d.tar")
    assert {path.name: path.read_bytes() for path in (workdir.path / "d").iterdir()} == content

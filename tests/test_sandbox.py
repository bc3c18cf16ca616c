"""Sandboxes: what comes in is unpacked and stays inside, what goes out is packed and is nobody else's."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import os
import re
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import until
from loadmaster import StagingFailed
from loadmaster.staging import archives
from loadmaster.staging.archives import ArchiveLimits, Refused, zstd_library
from loadmaster.staging.sandbox import SandboxFormat, pack, pack_sandbox, unpack
from loadmaster.workdir import Workdir

Members = dict[str, bytes | tarfile.TarInfo]


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


async def in_a_thread(work: Callable[[], object]) -> None:
    await to_thread.run_sync(work)


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


@pytest.mark.parametrize("content", [b"", b"plain text\n" * 1000, gzip.compress(b"no archive", mtime=0)])
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


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.SYMTYPE, "a symbolic link out of the archive, to '/etc/passwd'"),
        (tarfile.FIFOTYPE, "a FIFO"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.GNUTYPE_SPARSE, "a file with holes"),
        (b"M", "a part of a file"),
        (b"?", "of a kind that is not known"),
    ],
)
def test_what_is_no_file_directory_or_link_inside_is_refused(workdir: Workdir, kind: bytes, what: str) -> None:
    archive(workdir.path / "in", {"a": b"first", "x": member("x", kind, "/etc/passwd")})
    with pytest.raises(StagingFailed, match=f"^cannot unpack: in: 'x' is {re.escape(what)}"):
        unpack(workdir, "in")
    assert [path.name for path in workdir.path.iterdir()] == ["in"], "all or nothing"


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


# -- in, hostile -------------------------------------------------------------------------------------------------


def symlink(name: str, target: str) -> tarfile.TarInfo:
    return member(name, tarfile.SYMTYPE, target)


def hardlink(name: str, target: str) -> tarfile.TarInfo:
    return member(name, tarfile.LNKTYPE, target)


def with_pax(name: str, **words: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.pax_headers = {key.replace("__", "."): value for key, value in words.items()}
    return info


def below(path: Path) -> set[str]:
    return {str(found.relative_to(path)) for found in path.rglob("*")}


HOSTILE: dict[str, tuple[list[tuple[tarfile.TarInfo, bytes]], str]] = {
    "traversal": ([(tarfile.TarInfo("../../out"), b"")], "'../../out': a file name may not have '..' as a part"),
    "traversal below": ([(tarfile.TarInfo("a/../../out"), b"")], "may not have '..' as a part"),
    "traversal, by a longer name": ([(with_pax("x", path="../out"), b"")], "'../out': a file name may not have '..'"),
    "absolute": ([(tarfile.TarInfo("/tmp/out"), b"")], "'/tmp/out': a file name may not be absolute"),
    "a directory outside": ([(member("../out", tarfile.DIRTYPE), b"")], "may not have '..' as a part"),
    "a link, then a write through it": (
        [(symlink("d", "."), b""), (tarfile.TarInfo("d/x"), b"")],
        "'d' is in it twice",
    ),
    "a link out, then a write through it": (
        [(symlink("d", "/tmp"), b""), (tarfile.TarInfo("d/x"), b"")],
        "'d' is in it twice|'d' is a symbolic link out",
    ),
    "a link up": ([(symlink("d/x", "../../job2"), b"")], "'d/x' is a symbolic link out of the archive"),
    "a link down and up": ([(symlink("d/e/x", "f/../../../.."), b"")], "is a symbolic link out of the archive"),
    "a chain of links out": (
        [(symlink("a", "d/e"), b""), (symlink("d/e/up", "../.."), b""), (symlink("out", "a/up/../../x"), b"")],
        "'out' is a symbolic link out of the archive",
    ),
    "a link to nothing": ([(symlink("x", ""), b"")], "'x' is a symbolic link out of the archive"),
    "a hard link out": ([(hardlink("x", "../../etc/passwd"), b"")], "'x': .*may not have '..' as a part"),
    "a hard link, absolute": ([(hardlink("x", "/etc/passwd"), b"")], "'x': .*may not be absolute"),
    "a hard link to what is only in the work directory": (
        [(hardlink("x", "in"), b"")],
        "'x' is a hard link to 'in', which is not in it",
    ),
    "a hard link to a symbolic one": (
        [(symlink("a/b/l", "../../x"), b""), (hardlink("l", "a/b/l"), b"")],
        "'l' is a hard link to 'a/b/l', which is not in it",
    ),
    "a hard link to a directory": (
        [(member("d", tarfile.DIRTYPE), b""), (hardlink("x", "d"), b"")],
        "'x' is a hard link to what is not a file",
    ),
    "twice": ([(tarfile.TarInfo("x"), b""), (tarfile.TarInfo("./x"), b"")], "'./x' is in it twice"),
    "a file and a directory": ([(tarfile.TarInfo("x"), b""), (tarfile.TarInfo("x/y"), b"")], "'x/y' is in something"),
    "a directory and a file": ([(tarfile.TarInfo("x/y"), b""), (tarfile.TarInfo("x"), b"")], "'x' is in it twice"),
    "another input": ([(tarfile.TarInfo("data.root"), b"")], "'data.root' is the name of another input, or of a log"),
    "a log": ([(tarfile.TarInfo("./std.out"), b"")], "'std.out' is the name of another input, or of a log"),
    "a log as a link": ([(symlink("std.out", "x"), b"")], "'std.out' is the name of another input, or of a log"),
    "a log as a directory": ([(member("std.out/", tarfile.DIRTYPE), b"")], "'std.out' is the name of another"),
    "a log as a parent": ([(tarfile.TarInfo("std.out/x"), b"")], "'std.out/x' is the name of another"),
    "a file in place of an input's directory": ([(tarfile.TarInfo("deep"), b"")], "'deep' is where another input"),
    "not UTF-8": ([(tarfile.TarInfo("x\udcff"), b"")], "may not have control characters"),
    "control characters": ([(tarfile.TarInfo("x\x1b[2J"), b"")], "may not have control characters"),
    "a long name": ([(tarfile.TarInfo("d/" * 600 + "x"), b"")], "a file name of more than 1024 bytes"),
    "deep": ([(tarfile.TarInfo("d/" * 65 + "x"), b"")], "lies deeper than 64 directories"),
    "holes, in pax": ([(with_pax("x", GNU__sparse__major="1", GNU__sparse__minor="0"), b"1\n")], "'x' is a file with"),
    "holes, in old pax": ([(with_pax("x", GNU__sparse__map="0,1"), b"")], "'x' is a file with holes"),
    "a size below zero": ([(with_pax("x", size="-1024"), b"")], "'x' has -1,024 bytes"),
    "a size of no number": ([(with_pax("x", size="many"), b"")], "has an extended header that is damaged"),
    "a very long header": ([(with_pax("x", comment="x" * 300_000), b"")], "an extended header of more than 262,144"),
    "a time of no number": ([(with_pax("x", mtime="inf"), b"")], "has an extended header that is damaged"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_a_hostile_archive_is_refused_whole_with_its_reason(workdir: Workdir, case: str, tar_format: int) -> None:
    members, reason = HOSTILE[case]
    with tarfile.open(workdir.path / "in", "w:gz", format=tar_format) as tar:
        info = tarfile.TarInfo("first")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"first"))
        for original, content in members:
            info = original.replace(deep=True)
            info.size = len(content)
            if info.pax_headers and tar_format != tarfile.PAX_FORMAT:
                pytest.skip("a header of pax")
            tar.addfile(info, io.BytesIO(content))
    outside = below(workdir.path.parent.parent)
    with pytest.raises(StagingFailed, match=f"^cannot unpack: in: .*(?:{reason})"):
        unpack(workdir, "in", {"std.out", "std.err", "data.root", "deep/data"})
    assert below(workdir.path.parent.parent) == outside, "nothing written, inside or outside"


def bomb(path: Path, name: str, count: int) -> None:
    """A file of zeros, a thousand to one."""
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo(name)
        info.size = count
        with tempfile.TemporaryFile() as zeros:
            zeros.truncate(count)
            tar.addfile(info, zeros)


def test_a_bomb_is_refused_before_it_has_gone_off(workdir: Workdir) -> None:
    bomb(workdir.path / "in", "zeros", 100_000_000)
    size = (workdir.path / "in").stat().st_size
    with pytest.raises(StagingFailed, match=f"in: 'zeros' unpacks to more than 200 times its own {size:,} bytes"):
        unpack(workdir, "in")
    assert below(workdir.path) == {"in"}


def test_what_is_too_much_is_refused_by_the_limits_that_were_given(workdir: Workdir) -> None:
    bomb(workdir.path / "in", "zeros", 3_000_000)
    with pytest.raises(StagingFailed, match="'zeros' has 3,000,000 bytes; 2,000,000 are the most"):
        unpack(workdir, "in", limits=ArchiveLimits(file_bytes=2_000_000))
    with pytest.raises(StagingFailed, match="'zeros' unpacks to more than 2,000,000 bytes"):
        unpack(workdir, "in", limits=ArchiveLimits(total_bytes=2_000_000))
    archive(workdir.path / "in", {f"{number}": b"" for number in range(4)})
    with pytest.raises(StagingFailed, match="has more than 3 entries"):
        unpack(workdir, "in", limits=ArchiveLimits(entries=3))
    archive(workdir.path / "in", {f"{number}/x/y": b"" for number in range(2)})
    with pytest.raises(StagingFailed, match="makes more than 3 directories"):
        unpack(workdir, "in", limits=ArchiveLimits(entries=3))
    unpack(workdir, "in", limits=ArchiveLimits(entries=4))


def test_a_hundred_thousand_entries_are_refused(workdir: Workdir) -> None:
    one = bytearray(tarfile.TarInfo("00000000").tobuf(tarfile.USTAR_FORMAT))
    with gzip.open(workdir.path / "in", "wb", compresslevel=1) as out:
        for number in range(100_000):
            name = f"{number:08}".encode()
            checksum = sum(one[8:148]) + sum(name) + sum(one[156:]) + 8 * 32
            out.write(name + one[8:148] + b"%06o\0 " % checksum + one[156:])
        out.write(bytes(1024))
    with pytest.raises(StagingFailed, match="in: has more than 50,000 entries"):
        unpack(workdir, "in")
    assert below(workdir.path) == {"in"}


@pytest.mark.parametrize(
    "kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_SPARSE], ids=repr
)
def test_headers_do_not_fill_the_memory(workdir: Workdir, kind: bytes) -> None:
    """A header of a gigabyte, or a million of them, which the standard library's reader would have taken into memory."""
    info = member("x", kind)
    info.size = 1024**3
    with gzip.open(workdir.path / "in", "wb", compresslevel=1) as out:
        out.write(tarfile.TarInfo("a").tobuf() + info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(1024):
            out.write(bytes(1024 * 1024))
    script = (
        "import resource, sys; from pathlib import Path; from loadmaster.workdir import Workdir\n"
        "from loadmaster.staging.sandbox import unpack; from loadmaster import StagingFailed\n"
        "w = Workdir.make(Path(sys.argv[1]), 'other')\n"
        "(w.path / 'in').hardlink_to(sys.argv[2])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (400 * 1024**2, 400 * 1024**2))\n"
        "try: unpack(w, 'in')\n"
        "except StagingFailed as exc: print(exc)\n"
        "w.close()"
    )
    words = [sys.executable, "-c", script, str(workdir.path.parent), str(workdir.path / "in")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert re.match("cannot unpack: in: (has an extended header of more than|'x' is a file with holes)", done.stdout), (
        done
    )


def test_many_headers_in_a_row_are_refused(workdir: Workdir) -> None:
    """Each of them was a call within a call."""
    header = tarfile.TarInfo("x" * 200).tobuf(tarfile.GNU_FORMAT)[:1024]
    (workdir.path / "in").write_bytes(header * 1000 + bytes(1024))
    with pytest.raises(StagingFailed, match=r"in: has .* too many in a row"):
        unpack(workdir, "in")


def test_a_header_for_all_entries_may_only_say_what_is_harmless(workdir: Workdir) -> None:
    """`git archive` writes its commit into one."""
    entry = tarfile.TarInfo("y").tobuf() + bytes(1024)
    (workdir.path / "in").write_bytes(tarfile.TarInfo.create_pax_global_header({"comment": "0123abcd"}) + entry)
    unpack(workdir, "in")
    assert below(workdir.path) == {"in", "y"}
    (workdir.path / "in").write_bytes(tarfile.TarInfo.create_pax_global_header({"path": "x"}) + entry)
    with pytest.raises(StagingFailed, match="gives all its entries one name"):
        unpack(workdir, "in")


def test_links_inside_are_unpacked_and_lead_where_they_led(workdir: Workdir) -> None:
    """As software is packed: a library by three names, a program by two."""
    members: Members = {
        "lib/libx.so": symlink("lib/libx.so", "libx.so.1"),
        "lib/libx.so.1": b"library",
        "bin/x": b"program",
        "bin/y": hardlink("bin/y", "./bin/x"),
        "bin/lib": symlink("bin/lib", "../lib/"),
    }
    archive(workdir.path / "in", members)
    unpack(workdir, "in")
    assert (workdir.path / "bin" / "lib" / "libx.so").read_bytes() == b"library"
    assert (workdir.path / "bin" / "y").samefile(workdir.path / "bin" / "x")
    assert os.readlink(workdir.path / "lib" / "libx.so") == "libx.so.1"


def test_times_and_long_names_are_as_they_were(workdir: Workdir) -> None:
    name = "d" * 200 + "/" + "ü" * 100
    info = tarfile.TarInfo(name)
    info.mtime = 1_234_567_890.5
    for tar_format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(workdir.path / "in", "w", format=tar_format) as tar:
            tar.addfile(info)
        unpack(workdir, "in")
        assert (workdir.path / name).stat().st_mtime == 1_234_567_890
        (workdir.path / name).unlink()


def test_two_archives_share_their_directories_and_the_second_replaces_files(workdir: Workdir) -> None:
    archive(workdir.path / "one", {"d/e/a": b"1", "d/b": b"1"})
    archive(workdir.path / "two", {"d/e/c": b"2", "d/b": b"2"})
    unpack(workdir, "one")
    unpack(workdir, "two")
    assert [(workdir.path / "d" / name).read_bytes() for name in ("e/a", "e/c", "b")] == [b"1", b"2", b"2"]
    archive(workdir.path / "three", {"a": b"3", "d/e": b"3"})
    with pytest.raises(StagingFailed, match="'d/e' cannot be put in place of what is a directory"):
        unpack(workdir, "three")
    assert not (workdir.path / "a").exists(), "all or nothing"


def test_a_full_disk_fails_the_unpacking_and_leaves_nothing(small_disk: Path) -> None:
    workdir = Workdir.make(small_disk, "job")
    archive(workdir.path / "in", {"a": b"x", "zeros": bytes(3_000_000)})
    with pytest.raises(StagingFailed, match="in: 'zeros': No space left on device"):
        unpack(workdir, "in")
    assert below(workdir.path) == {"in"}
    workdir.close()


async def test_a_cancelled_unpacking_stops_and_leaves_nothing(workdir: Workdir) -> None:
    """Through a FIFO nobody fills it would wait; here it is a large archive, cancelled while it is being unpacked."""
    archive(workdir.path / "in", {f"{number}": bytes(10_000_000) for number in range(30)}, "w")
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(in_a_thread, lambda: unpack(workdir, "in"))
            await until(lambda: len(below(workdir.path)) > 1)
            group.cancel_scope.cancel()
    assert below(workdir.path) == {"in"}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_is_changed_in_an_archive_it_is_unpacked_whole_or_not_at_all(mode: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as scratch, closing(Workdir.make(Path(scratch) / "root", "job")) as workdir:
        members: Members = {"a": b"content" * 50, "d/b": b"x", "l": symlink("l", "d/b"), "d" * 120: b""}
        path = archive(workdir.path / "in", members, mode)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        before = below(Path(scratch)) - below(workdir.path)
        try:
            unpack(workdir, "in")
        except StagingFailed:
            assert below(workdir.path) == {"in"}
        workdir_names = {f"root/job/{name}" for name in below(workdir.path)}
        assert below(Path(scratch)) - workdir_names == before - workdir_names


PARTS = st.sampled_from(["a", "b", "c", ".", "..", "", "d"])
NAMES = st.lists(PARTS, min_size=1, max_size=5).map("/".join)
KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE])


@given(st.lists(st.tuples(NAMES, KINDS, NAMES), min_size=1, max_size=6))
@settings(max_examples=300, deadline=None)
def test_no_archive_makes_a_name_that_leads_out(members: list[tuple[str, bytes, str]]) -> None:
    with tempfile.TemporaryDirectory() as scratch, closing(Workdir.make(Path(scratch) / "root", "job")) as workdir:
        with tarfile.open(workdir.path / "in", "w") as tar:
            for name, kind, target in members:
                tar.addfile(member(name, kind, target))
        try:
            unpack(workdir, "in")
        except StagingFailed:
            assert below(workdir.path) == {"in"}
        top = os.path.realpath(workdir.path)
        for found in workdir.path.rglob("*"):
            assert f"{os.path.realpath(found)}/".startswith(f"{top}/"), members
        assert os.listdir(Path(scratch) / "root") == ["job"]


# -- in, zip and zstd --------------------------------------------------------------------------------------------


def test_a_zip_archive_is_unpacked_if_it_is_called_one(workdir: Workdir) -> None:
    with zipfile.ZipFile(workdir.path / "in.ZIP", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("a/b", b"content" * 1000)
        made.mkdir("d") if hasattr(made, "mkdir") else made.writestr("d/", b"")
        link = zipfile.ZipInfo("l")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        made.writestr(link, "a/b")
        script = zipfile.ZipInfo("run.sh", (2001, 2, 3, 4, 5, 6))
        script.create_system, script.external_attr = 3, (stat.S_IFREG | 0o6755) << 16
        made.writestr(script, "#!/bin/sh")
    (workdir.path / "arrays.npz").write_bytes((workdir.path / "in.ZIP").read_bytes())
    unpack(workdir, "arrays.npz")
    unpack(workdir, "in.ZIP", limits=ArchiveLimits(zip=False))
    assert below(workdir.path) == {"arrays.npz", "in.ZIP"}
    unpack(workdir, "in.ZIP")
    assert (workdir.path / "l").read_bytes() == b"content" * 1000
    assert (workdir.path / "d").is_dir()
    assert (workdir.path / "run.sh").stat().st_mode & 0o7777 == 0o755
    assert below(workdir.path) == {"arrays.npz", "in.ZIP", "a", "a/b", "d", "l", "run.sh"}


def zip_of(path: Path, *members: tuple[str, bytes, int]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("first", b"first")
        for name, content, mode in members:
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr, info.compress_type = 3, mode << 16, zipfile.ZIP_DEFLATED
            made.writestr(info, content)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("../out", b"", 0)], "may not have '..' as a part"),
        ([("/tmp/out", b"", 0)], "may not be absolute"),
        ([("x", b"/etc/passwd", stat.S_IFLNK)], "'x' is a symbolic link out of the archive"),
        ([("x", b"y" * 2000, stat.S_IFLNK)], "'x' is a symbolic link out of the archive"),
        ([("x", b"", stat.S_IFIFO)], "'x' is a FIFO"),
        ([("x", b"", stat.S_IFCHR)], "'x' is a device"),
        ([("x", b"", 0), ("x", b"", 0)], "'x' is in it twice"),
        ([("std.out", b"", 0)], "'std.out' is the name of another input"),
        ([("zeros", bytes(100_000_000), 0)], "'zeros' unpacks to more than 200 times"),
        ([(f"{number}", b"", 0) for number in range(60_000)], "has 60,001 entries; 50,000 are the most"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_hostile_zip_archive_is_refused(workdir: Workdir, members: Any, reason: str) -> None:
    zip_of(workdir.path / "in.zip", *members)
    with pytest.raises(StagingFailed, match=f"^cannot unpack: in.zip: .*{reason}"):
        unpack(workdir, "in.zip", {"std.out"})
    assert below(workdir.path.parent) == {"job", "job/in.zip"}


@pytest.mark.parametrize("damage", [cut, spoil])
def test_a_damaged_zip_archive_fails(workdir: Workdir, damage: Callable[[bytes], bytes]) -> None:
    zip_of(workdir.path / "in.zip", ("random", os.urandom(2_000_000), 0))
    (workdir.path / "in.zip").write_bytes(damage((workdir.path / "in.zip").read_bytes()))
    with pytest.raises(StagingFailed, match=r"cannot unpack: in\.zip: "):
        unpack(workdir, "in.zip")
    assert below(workdir.path) == {"in.zip"}


@pytest.fixture
def zstd() -> Any:
    try:
        return zstd_library()
    except Refused as exc:
        pytest.skip(str(exc))


def test_an_archive_of_several_zstd_frames_is_unpacked(workdir: Workdir, zstd: Any) -> None:
    archive(workdir.path / "plain", {"a": os.urandom(300_000), "b": b"x"}, "w")
    content = (workdir.path / "plain").read_bytes()
    frames = [zstd.compress(content[start : start + 100_000]) for start in range(0, len(content), 100_000)]
    (workdir.path / "in.tar.zst").write_bytes(b"".join(frames))
    unpack(workdir, "in.tar.zst")
    assert (workdir.path / "b").read_bytes() == b"x"
    (workdir.path / "in.tar.zst").write_bytes(b"".join(frames)[:-200_000])
    with pytest.raises(StagingFailed, match=r"in\.tar\.zst: it ends in the middle"):
        unpack(workdir, "in.tar.zst")


def test_an_archive_that_takes_much_memory_to_decompress_is_refused(workdir: Workdir, zstd: Any) -> None:
    options = {zstd.CompressionParameter.window_log: 28, zstd.CompressionParameter.compression_level: 1}
    packer = zstd.ZstdCompressor(options=options)
    (workdir.path / "in.tar.zst").write_bytes(packer.compress(bytes(1000)) + packer.flush())
    with pytest.raises(StagingFailed, match=r"in\.tar\.zst: "):
        unpack(workdir, "in.tar.zst")


def test_without_its_library_a_zstd_archive_is_named_and_other_files_are_left(
    workdir: Workdir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "_zstd", lambda: None)
    for name in ("in.tar.zst", "events.zst"):
        (workdir.path / name).write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(StagingFailed, match=r"in\.tar\.zst: zstd takes Python 3\.14 or"):
        unpack(workdir, "in.tar.zst")
    unpack(workdir, "events.zst")


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


FORMATS = ("tar.bz2", "tar.zst")


def contents(workdir: Workdir, name: str) -> dict[str, tuple[bytes, int, int]]:
    """What another program finds in an archive."""
    packed = (workdir.path / name).read_bytes()
    plain = zstd_library().decompress(packed) if name.endswith(".zst") else bz2.decompress(packed)
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        return {
            info.name: (getattr(tar.extractfile(info), "read", bytes)(), info.mode, int(info.mtime)) for info in tar
        }


@pytest.mark.parametrize("kind", FORMATS)
def test_a_sandbox_is_packed_flat_and_always_the_same(workdir: Workdir, kind: SandboxFormat, zstd: Any) -> None:
    (workdir.path / "d").mkdir()
    for name in ("d/b", "a", "c"):
        (workdir.path / name).write_bytes(name.encode() * 1000)
        os.utime(workdir.path / name, (1_000_000_000, 1_000_000_000))
    (workdir.path / "c").chmod(0o6755)
    first = pack_sandbox(workdir, ["d/b", "c", "a"], kind)
    content = (workdir.path / first.file).read_bytes()
    second = pack_sandbox(workdir, ["c", "a", "d/b"], kind)
    assert first == second
    assert (workdir.path / second.file).read_bytes() == content
    assert hashlib.md5(content).hexdigest() == first.checksum.digits
    assert (first.name, first.size_bytes) == (f"{first.checksum.digits}.{kind}", len(content))
    assert contents(workdir, first.file) == {
        "a": (b"a" * 1000, 0o644, 1_000_000_000),
        "b": (b"d/b" * 1000, 0o644, 1_000_000_000),
        "c": (b"c" * 1000, 0o755, 1_000_000_000),
    }
    assert list(contents(workdir, first.file)) == ["a", "c", "b"], "by their names"


@pytest.mark.timeout(10)
def test_what_cannot_be_in_a_sandbox_is_left_out_and_told(workdir: Workdir, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (workdir.path / "d").mkdir()
    for name in ("a", "d/a", "b"):
        (workdir.path / name).write_text(name)
    (workdir.path / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(workdir.path / "fifo")
    packed = pack_sandbox(workdir, ["a", "d/a", "b", "link", "fifo", "gone"], algorithm="sha256")
    assert packed.checksum.algorithm == "sha256"
    assert set(contents(workdir, packed.file)) == {"a", "b"}
    assert dict(packed.left_out) == {
        "d/a": "has the same last part as a",
        "link": "is a symbolic link out of the work directory",
        "fifo": "is a FIFO, not a file",
    }
    assert (packed.files, packed.gone) == (2, ("gone",))


def test_a_sandbox_larger_than_its_limit_is_packed_and_told(workdir: Workdir) -> None:
    (workdir.path / "random").write_bytes(os.urandom(100_000))
    assert pack_sandbox(workdir, ["random"], limit_bytes=50_000).oversize
    assert not pack_sandbox(workdir, ["random"], limit_bytes=150_000).oversize
    assert not pack_sandbox(workdir, ["random"]).oversize


def test_a_file_that_is_still_written_to_does_not_spoil_the_archive(workdir: Workdir) -> None:
    """Somebody truncates a log over and over; what is after it in the archive is found all the same."""
    (workdir.path / "log").write_bytes(os.urandom(3_000_000))
    (workdir.path / "z").write_bytes(b"last")
    ended = threading.Event()

    def write() -> None:
        while not ended.is_set():
            with (workdir.path / "log").open("wb") as log:
                log.write(bytes(3_000_000))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        packed = [pack_sandbox(workdir, ["log", "z"]) for _ in range(5)]
    finally:
        ended.set()
        writer.join()
    for each in packed:
        assert contents(workdir, each.file)["z"][0] == b"last"


def test_a_full_disk_fails_the_sandbox_and_leaves_no_archive(small_disk: Path) -> None:
    workdir = Workdir.make(small_disk, "job")
    (workdir.path / "random").write_bytes(os.urandom(600_000))
    with pytest.raises(StagingFailed, match=r"cannot pack: the output sandbox as tar\.bz2: No space left on device"):
        pack_sandbox(workdir, ["random"])
    assert below(workdir.path) == {"random"}
    workdir.close()


async def test_a_cancelled_packing_stops_and_leaves_no_archive(workdir: Workdir) -> None:
    with (workdir.path / "random").open("wb") as out:
        for _ in range(100):
            out.write(os.urandom(1_000_000))  # ten seconds of bzip2
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(in_a_thread, lambda: pack_sandbox(workdir, ["random"]))
            await until(lambda: any(path.stat().st_size for path in workdir.path.glob(".*.part")))
            group.cancel_scope.cancel()
    assert below(workdir.path) == {"random"}


def test_what_was_packed_as_a_sandbox_is_unpacked_the_same(workdir: Workdir) -> None:
    content = {f"ü {number}": os.urandom(number) for number in (0, 1, 511, 512, 513, 100_000)}
    for name, data in content.items():
        (workdir.path / name).write_bytes(data)
    packed = pack_sandbox(workdir, list(content))
    for name in content:
        (workdir.path / name).unlink()
    unpack(workdir, packed.file)
    assert {name: (workdir.path / name).read_bytes() for name in content} == content

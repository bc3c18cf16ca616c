"""The local ends of transfers: nothing half under a name, nothing left behind, links not followed."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from loadmaster.errors import ChecksumMismatch
from loadmaster.staging.files import Incoming, IncomingPath, Outgoing, OutgoingPath
from loadmaster.storage.base import FileInfo
from loadmaster.storage.checksums import Checksum
from loadmaster.workdir import NotDeliverable, Workdir

CONTENT = b"content"
INFO = FileInfo(7, Checksum("adler32", f"{zlib.adler32(CONTENT):08x}"))

Make = Callable[..., Incoming]


@pytest.fixture(params=["workdir", "path"])
def make(request: pytest.FixtureRequest, workdir: Workdir) -> Make:
    """An incoming file called `d/a`, below the work directory, with its options."""

    def make(**options: object) -> Incoming:
        if request.param == "workdir":
            return Incoming(workdir, "d/a", **options)  # type: ignore[arg-type]
        return IncomingPath(workdir.path / "d" / "a", **options)  # type: ignore[arg-type]

    return make


def write(file: Incoming, content: bytes = CONTENT, offset: int = 0) -> int:
    descriptor = file.open()
    os.pwrite(descriptor, content, offset)
    return descriptor


def inside(workdir: Workdir) -> list[str]:
    return sorted(str(path.relative_to(workdir.path)) for path in workdir.path.rglob("*") if not path.is_dir())


@pytest.mark.parametrize("sync", [False, True])
def test_it_gets_its_name_when_it_is_kept_and_not_before(workdir: Workdir, make: Make, sync: bool) -> None:
    file = make(size_bytes=7, checksum=INFO.checksum, sync=sync)
    descriptor = write(file)
    assert not (workdir.path / "d" / "a").exists()
    file.keep(descriptor, INFO)
    os.close(descriptor)
    file.discard()
    assert (workdir.path / "d" / "a").read_bytes() == CONTENT
    assert [name for name in inside(workdir) if not name.startswith(".")] == inside(workdir) == ["d/a"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"size_bytes": 8}, "https://host/a: has 7 bytes, expected 8"),
        ({"checksum": Checksum("adler32", "00000001")}, "https://host/a: adler32 0b.*, expected 00000001"),
    ],
)
def test_what_is_not_as_promised_is_refused_and_removed_though_it_could_be_continued(
    workdir: Workdir, make: Make, options: dict[str, object], complaint: str
) -> None:
    file = make(**options)
    file.url, file.resumable = "https://host/a", True
    descriptor = write(file)
    with pytest.raises(ChecksumMismatch, match=complaint):
        file.keep(descriptor, INFO)
    os.close(descriptor)
    file.discard()
    assert inside(workdir) == []


def test_what_is_continued_is_cut_to_what_is_known_of_it(workdir: Workdir, make: Make) -> None:
    file = make(size_bytes=7)
    file.resumable = True
    os.close(write(file, b"cont, and what nobody counted"))
    file.discard()
    assert len(inside(workdir)) == 1
    file.continues = 4
    descriptor = write(file, b"ent", 4)
    file.keep(descriptor, FileInfo(3))
    os.close(descriptor)
    assert (workdir.path / "d" / "a").read_bytes() == CONTENT
    assert inside(workdir) == ["d/a"]


def test_what_is_begun_anew_leaves_nothing_of_the_first_attempt(workdir: Workdir, make: Make) -> None:
    file = make()
    file.resumable = True
    os.close(write(file, b"first attempt"))
    file.discard()
    descriptor = write(file)
    file.keep(descriptor, INFO)
    os.close(descriptor)
    assert (workdir.path / "d" / "a").read_bytes() == CONTENT
    assert inside(workdir) == ["d/a"]
    file.forget()
    assert inside(workdir) == ["d/a"]


def test_a_part_that_was_swapped_for_a_link_is_not_written_through(
    workdir: Workdir, make: Make, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    file = make()
    file.resumable = True
    os.close(write(file))
    file.discard()
    part = workdir.path / inside(workdir)[0]
    part.unlink()
    part.symlink_to(tmp_path / "secret")
    file.continues = 3
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        file.open()
    file.forget()
    assert (tmp_path / "secret").read_text() == "secret"
    assert inside(workdir) == []


def test_an_outgoing_file_stays_and_tells_its_size_or_why_it_may_not_leave(workdir: Workdir, tmp_path: Path) -> None:
    (workdir.path / "out").write_bytes(CONTENT)
    (tmp_path / "secret").write_text("secret")
    (workdir.path / "link").symlink_to(tmp_path / "secret")
    for file in (Outgoing(workdir, "out"), OutgoingPath(workdir.path / "out")):
        os.close(file.open())
        file.discard()
        file.forget()
        assert (file.size_bytes, file.refused) == (7, None)
    link = Outgoing(workdir, "link")
    with pytest.raises(NotDeliverable):
        link.open()
    assert isinstance(link.refused, NotDeliverable)
    assert inside(workdir) == ["link", "out"]

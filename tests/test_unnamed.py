"""A local file that gets its name when it is whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from loadmaster.storage.unnamed import NewFile


def write(path: Path, content: bytes, *, part: str = ".part", named: bool = False) -> set[str]:
    """Put something there; the names that there were before it had its own."""
    new = NewFile(str(path), part, named=named)
    try:
        os.write(new.descriptor, content)
        seen = set(os.listdir(path.parent))
        new.give_name()
    finally:
        new.close()
    return seen


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("before", [None, b"before"])
def test_it_has_its_name_once_it_is_whole(tmp_path: Path, named: bool, before: bytes | None) -> None:
    path = tmp_path / "made" / "for" / "it"
    if before is not None:
        path.parent.mkdir(parents=True)
        path.write_bytes(before)
    seen = write(path, b"content", named=named)
    assert seen == ({".part"} if named else set()) | ({"it"} if before is not None else set())
    assert (os.listdir(path.parent), path.read_bytes()) == (["it"], b"content")
    assert path.stat().st_mode & 0o777 == 0o644 & ~umask()


def umask() -> int:
    (line,) = [each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("Umask:")]
    return int(line.split()[1], 8)


@pytest.mark.parametrize("named", [False, True])
def test_what_is_given_up_is_gone(tmp_path: Path, named: bool) -> None:
    new = NewFile(str(tmp_path / "it"), ".part", named=named)
    os.write(new.descriptor, b"half")
    new.close()
    assert os.listdir(tmp_path) == []


def test_what_is_held_stays_under_the_name_that_was_wanted(tmp_path: Path) -> None:
    new = NewFile(str(tmp_path / "it"), ".part", named=True)
    assert new.hold() == f"{tmp_path}/.part"
    new.close()
    assert os.listdir(tmp_path) == [".part"]


@pytest.mark.parametrize("before", [None, b"before"])
def test_the_part_of_an_agent_that_was_killed_is_not_in_the_way(tmp_path: Path, before: bytes | None) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    target = tmp_path / "se" / "it"
    target.parent.mkdir()
    if before is not None:
        target.write_bytes(before)
    for named in (False, True):
        (target.parent / ".part").symlink_to(precious)
        write(target, b"content", named=named)
        (target.parent / ".part").unlink(missing_ok=True)
        assert target.read_bytes() == b"content"
        assert precious.read_bytes() == b"precious"


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EISDIR])
def test_where_there_are_no_files_without_a_name_it_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    usual = os.open

    def refuses(path: Any, flags: int, *args: Any, **words: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(number, os.strerror(number))
        return usual(path, flags, *args, **words)

    monkeypatch.setattr(os, "open", refuses)
    assert write(tmp_path / "it", b"content") == {".part"}
    assert (os.listdir(tmp_path), (tmp_path / "it").read_bytes()) == (["it"], b"content")


def test_where_it_cannot_be_linked_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: Any, **words: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuses)
    assert write(tmp_path / "it", b"content" * 100_000) == set()
    assert (os.listdir(tmp_path), (tmp_path / "it").read_bytes()) == (["it"], b"content" * 100_000)

"""The kernel's word on files that change."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import anyio
import pytest

from loadmaster.notices import CLOSED, CREATED, MODIFIED, MOVED_IN, Notices


async def test_what_happens_to_a_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with Notices() as notices, file.open("a") as writer:
        watch = notices.watch(str(file), MODIFIED | CLOSED)
        writer.write("news")
        writer.flush()
        with anyio.fail_after(5):
            assert [(n.watch, n.what) for n in await notices.next()] == [(watch, MODIFIED)]
        writer.close()
        with anyio.fail_after(5):
            assert [n.what for n in await notices.next()] == [CLOSED]


async def test_what_happens_in_a_directory_is_told_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "part").touch()
    (tmp_path / "folder").mkdir()
    with Notices() as notices:
        notices.watch(bytes(tmp_path / "folder"), CREATED | MOVED_IN)
        (tmp_path / "part").rename(tmp_path / "folder" / "whole")
        os.mkfifo(os.fsencode(tmp_path) + b"/folder/\xff")
        with anyio.fail_after(5):
            assert [(n.what, n.name) for n in await notices.next()] == [(MOVED_IN, b"whole"), (CREATED, b"\xff")]


async def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with Notices() as notices, pytest.raises(FileNotFoundError, match="nothing"):
        notices.watch(str(tmp_path / "nothing"), MODIFIED)


def test_no_descriptor_left_is_an_error_and_not_a_descriptor() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            Notices()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

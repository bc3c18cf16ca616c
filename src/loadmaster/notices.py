"""What the kernel tells of files that change (inotify), as something to await."""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass
from typing import Final, Self

import anyio

MODIFIED: Final = 0x2
"""Somebody has written to the file."""
CLOSED: Final = 0x8
"""The last of those who opened it for writing, or one of them, has closed it."""
MOVED_IN: Final = 0x80
"""A file was renamed into the directory."""
CREATED: Final = 0x100
"""A file or directory was made in the directory."""
OVERFLOW: Final = 0x4000
"""There was more than the kernel keeps: look for yourself."""
FORGOTTEN: Final = 0x8000
"""What was watched is gone, and is watched no more."""
IS_DIRECTORY: Final = 0x40000000

_HEADER: Final = struct.Struct("iIII")
_READ_BYTES: Final = 64 * 1024

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Notice:
    """One thing that happened: where (what `watch` returned), what, and to which name in it, if it is a directory."""

    watch: int
    what: int
    name: bytes


class Notices:
    """A queue of the kernel's. A user has only so many of them (128 as a rule), so close it: use it in a `with`."""

    def __init__(self) -> None:
        """Raises OSError, for one when the user has no queue left."""
        self._descriptor = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "inotify_init1")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)

    def watch(self, path: str | bytes, what: int) -> int:
        """Ask to be told of a file, or of what is in a directory. Raises OSError."""
        name = os.fsencode(path)
        return _checked(_libc.inotify_add_watch(self._descriptor, name, ctypes.c_uint32(what)), os.fsdecode(name))

    async def next(self) -> list[Notice]:
        """Wait for the next ones: at least one."""
        await anyio.wait_readable(self._descriptor)
        data, found, at = os.read(self._descriptor, _READ_BYTES), [], 0
        while at < len(data):
            watch, what, _, length = _HEADER.unpack_from(data, at)
            at += _HEADER.size
            found.append(Notice(watch, what, data[at : at + length].rstrip(b"\0")))
            at += length
        return found


def _checked(result: int, name: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return result

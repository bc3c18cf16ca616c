"""What a payload prints: two files, opened by us and written by the payload alone.

Files, not pipes. A pipe needs a reader for as long as any descendant holds the other end, and payloads leave daemons
behind. The descriptors are kept, so that a look at the last lines reads what was written, whatever the payload put
at the name since.

A payload that prints more than is kept of it goes on printing: the disk of the middle of its file is given back as
it grows, and at the end the file is its beginning, a line that says how much is left out, and its end.
"""

from __future__ import annotations

import codecs
import logging
import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import anyio

from loadmaster.workdir import Workdir

if TYPE_CHECKING:
    from loadmaster.notices import Notices

log = logging.getLogger(__name__)

PEEK_LINES: Final = 20
"""DIRAC's MaxJobPeekLines."""

PEEK_BYTES: Final = 64 * 1024
"""At most so much is read from the end, whatever the length of the lines."""

FOLLOW_SECONDS: Final = 0.1
"""Whoever follows is told as often as that at most: a person cannot read faster."""

LOOK_SECONDS: Final = 1.0
"""Where the kernel does not say that there is something."""

BLOCK_BYTES: Final = 64 * 1024
"""The disk is given back in multiples of it: no file system has larger blocks."""

_PUNCH_HOLE: Final = 0x1 | 0x2  # FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE

Printed = Callable[[str, str, int], None]
"""Told what a file of output has got: its name, the text, and how many bytes before it are left out."""


class Output:
    """The standard output and error of one payload. Methods block, for a moment only."""

    def __init__(self, workdir: Workdir, stdout: str, stderr: str) -> None:
        """Make the files, empty. Raises OSError. One name for both is one file, with the lines in order."""
        self._workdir, self._names = workdir, (stdout, stderr)
        self._gaps: dict[int, tuple[int, int]] = {}
        self.directory = workdir.descriptor()
        """The work directory: its name is the payload's to change."""
        try:
            self.stdout = workdir.create(stdout)
        except OSError:
            os.close(self.directory)
            raise
        try:
            self.stderr = os.dup(self.stdout) if stderr == stdout else workdir.create(stderr)
        except OSError:
            os.close(self.directory)
            os.close(self.stdout)
            raise

    @classmethod
    def reopen(cls, workdir: Workdir, stdout: str, stderr: str, *, kept_bytes: int | None) -> Output:
        """The files of a payload that another agent has started; no failure for what the payload has done to them.

        What is no file any more reads as empty: its name was the payload's to change. The gap that was made in one of
        which so much is kept is found again.
        """
        output = cls.__new__(cls)
        output._workdir, output._names, output._gaps = workdir, (stdout, stderr), {}
        output.directory = workdir.descriptor()
        output.stdout = _reopened(workdir, stdout)
        output.stderr = os.dup(output.stdout) if stderr == stdout else _reopened(workdir, stderr)
        for descriptor in output.files.values() if kept_bytes is not None else ():
            begin = _whole_blocks((kept_bytes or 0) // 2 + BLOCK_BYTES - 1)
            if gap := _gap_at(descriptor, begin):
                output._gaps[descriptor] = gap
        return output

    @property
    def files(self) -> dict[str, int]:
        """Names and descriptors; one, when both go to the same file."""
        return dict(zip(self._names[::-1], (self.stderr, self.stdout), strict=True))

    @property
    def has_gaps(self) -> bool:
        """Whether `join` has something to do."""
        return bool(self._gaps)

    def close(self) -> None:
        """Let go of the files."""
        os.close(self.stdout)
        os.close(self.stderr)
        os.close(self.directory)

    def discard(self) -> None:
        """Remove the files: there was no payload to write to them."""
        self.close()
        for name in self._names:
            self._workdir.remove(name)

    def peek(self, lines: int = PEEK_LINES) -> list[str]:
        """The last lines of standard output, at the same cost whatever its size."""
        return last_lines(self.stdout, lines)

    def last_words(self, lines: int = PEEK_LINES) -> list[str]:
        """The last lines of standard error, or of standard output when there are none."""
        return last_lines(self.stderr, lines) or last_lines(self.stdout, lines)

    def trim(self, kept_bytes: int) -> None:
        """Give back the disk of what is in the middle of a file that takes more than so much. It keeps its size."""
        for name, descriptor in self.files.items():
            found = os.fstat(descriptor)
            if found.st_blocks * 512 <= kept_bytes + 2 * BLOCK_BYTES:
                continue
            begin = _whole_blocks(kept_bytes // 2 + BLOCK_BYTES - 1)
            end = _whole_blocks(found.st_size - kept_bytes // 2)
            if end <= begin:
                continue
            try:
                _give_back(descriptor, begin, end - begin)
            except OSError as exc:
                if descriptor not in self._gaps:
                    log.warning("%s: cannot be kept short here: %s", name, exc.strerror)
                    self._gaps[descriptor] = (0, 0)
            else:
                self._gaps[descriptor] = (begin, end)

    def join(self) -> None:
        """Close the gaps: nobody writes any more. A line in each says how many bytes are left out."""
        for descriptor, (begin, end) in self._gaps.items():
            # Opened again: ours appends wherever it is asked to write, and somebody may still have it.
            file = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
            try:
                if begin < end and _is_hole(file, begin, end):  # else the payload has cut its file, and written anew
                    _join(file, begin, end)
            finally:
                os.close(file)

    async def follow(self, told: Printed) -> None:
        """Tell what is printed, as it is printed; ends by cancellation, when the rest has been told.

        Of more than 64 KiB at once only the end is told. Where the user has no inotify queue left, it is told as often as
        somebody looks: every second.
        """
        cursors = [_Cursor(name, descriptor, told) for name, descriptor in self.files.items()]
        with ExitStack() as stack:
            notices = self._notices(stack)
            try:
                while True:
                    for cursor in cursors:
                        cursor.advance()
                    await anyio.sleep(FOLLOW_SECONDS)  # what comes meanwhile is told together
                    await (notices.next() if notices is not None else anyio.sleep(LOOK_SECONDS))
            finally:
                for cursor in cursors:
                    cursor.advance()

    def _notices(self, stack: ExitStack) -> Notices | None:
        """Told when one of them changes; None where the kernel does not tell."""
        from loadmaster.notices import MODIFIED, Notices  # with ctypes, loaded when used

        try:
            notices = stack.enter_context(Notices())
            for descriptor in self.files.values():
                notices.watch(f"/proc/self/fd/{descriptor}", MODIFIED)
        except OSError as exc:
            log.warning("what the payload prints is shown every %.0f s only: %s", LOOK_SECONDS, exc)
            return None
        return notices


class _Cursor:
    """How far a file has been told."""

    def __init__(self, name: str, descriptor: int, told: Printed) -> None:
        self.descriptor = descriptor
        self._name, self._told, self._at = name, told, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def advance(self) -> None:
        """Tell what is new."""
        size = os.fstat(self.descriptor).st_size
        if size < self._at:  # cut by the payload
            self._at = 0
        skipped = max(0, size - self._at - PEEK_BYTES)
        data = os.pread(self.descriptor, PEEK_BYTES, self._at + skipped)
        if data:
            self._at += skipped + len(data)
            self._told(self._name, self._decoder.decode(data), skipped)


def last_lines(descriptor: int, lines: int) -> list[str]:
    """The last lines of an open file, of at most the last 64 KiB; bytes that are not UTF-8 are replaced."""
    size = os.fstat(descriptor).st_size
    tail = os.pread(descriptor, PEEK_BYTES, max(0, size - PEEK_BYTES))
    text = tail.decode(errors="replace").splitlines()
    if size > PEEK_BYTES and len(text) > 1:
        del text[0]  # the first line is most likely only the end of one
    return text[-lines:] if lines > 0 else []


def _reopened(workdir: Workdir, name: str) -> int:
    try:
        file = workdir.reopen_file(name)
        if stat.S_ISREG(os.fstat(file).st_mode):
            return file
        os.close(file)
        log.warning("%s: is no file any more", name)
    except OSError as exc:
        log.warning("%s: what was printed there is not seen any more: %s", name, exc.strerror)
    return os.memfd_create(name.replace("/", "_")[:100], os.MFD_CLOEXEC)


def _gap_at(file: int, begin: int) -> tuple[int, int] | None:
    """The gap that starts there, if one does."""
    try:
        if os.lseek(file, begin, os.SEEK_HOLE) != begin:
            return None
        return begin, os.lseek(file, begin, os.SEEK_DATA)
    except OSError:  # it ends before, or there is nothing more in it
        return None


def _is_hole(file: int, begin: int, end: int) -> bool:
    """Whether a file has nothing from here to there, and something after it."""
    try:
        return os.lseek(file, begin, os.SEEK_DATA) >= end
    except OSError:  # nothing at all after it
        return False


def _join(file: int, begin: int, end: int) -> None:
    """Put the end of a file behind its beginning and a mark. Raises OSError; the file is longer than it could be then."""
    mark = f"\n[... {end - begin} bytes left out ...]\n".encode()
    to = begin + _write_at(file, mark, begin)
    while block := os.pread(file, BLOCK_BYTES, end):
        to, end = to + _write_at(file, block, to), end + len(block)
    os.ftruncate(file, to)


def _write_at(file: int, data: bytes, offset: int) -> int:
    written = 0
    while written < len(data):
        written += os.pwrite(file, data[written:], offset + written)
    return written


def _give_back(descriptor: int, offset: int, size: int) -> None:
    """Make a hole in a file, whose size stays. Raises OSError."""
    import ctypes  # loaded when used, as `notices` is: few payloads print that much

    libc = ctypes.CDLL(None, use_errno=True)
    fallocate = getattr(libc, "fallocate64", libc.fallocate)
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate(descriptor, _PUNCH_HOLE, offset, size) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _whole_blocks(count: int) -> int:
    return count // BLOCK_BYTES * BLOCK_BYTES

"""What a payload prints: two files, opened by us and written by the payload alone.

Files, not pipes. A pipe needs a reader for as long as any descendant holds the other end, and payloads leave daemons
behind. The descriptors are kept, so that a look at the last lines reads what was written, whatever the payload put
at the name since.
"""

from __future__ import annotations

import os
from typing import Final

from loadmaster.workdir import Workdir

PEEK_LINES: Final = 20
"""DIRAC's MaxJobPeekLines."""

PEEK_BYTES: Final = 64 * 1024
"""At most so much is read from the end, whatever the length of the lines."""


class Output:
    """The standard output and error of one payload. Methods block, for a moment only."""

    def __init__(self, workdir: Workdir, stdout: str, stderr: str) -> None:
        """Make the files, empty. Raises OSError. One name for both is one file, with the lines in order."""
        self._workdir, self._names = workdir, (stdout, stderr)
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


def last_lines(descriptor: int, lines: int) -> list[str]:
    """The last lines of an open file, of at most the last 64 KiB; bytes that are not UTF-8 are replaced."""
    size = os.fstat(descriptor).st_size
    tail = os.pread(descriptor, PEEK_BYTES, max(0, size - PEEK_BYTES))
    text = tail.decode(errors="replace").splitlines()
    if size > PEEK_BYTES and len(text) > 1:
        del text[0]  # the first line is most likely only the end of one
    return text[-lines:] if lines > 0 else []

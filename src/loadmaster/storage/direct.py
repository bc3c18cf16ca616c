"""The body of a large answer, read from the connection itself.

libcurl hands over 16 KiB at a time, each by a call for which its thread has to have the interpreter: several threads that
receive large files wait for each other more than for the network. Where nothing lies between the connection and the file
(no TLS, no chunks), what is left of a body when its headers have come is read here, half a megabyte at a time. libcurl
has the transfer paused meanwhile, keeps the connection, and closes it afterwards.
"""

from __future__ import annotations

import os
from typing import Final, Protocol

from loadmaster.storage.replies import curl_error

BLOCK_BYTES: Final = 512 * 1024
"""See `local.BLOCK_BYTES`."""

BLOCKS: Final = 8
"""Taken at a time, then others have their turn."""

WORTH_BYTES: Final = 4 * 1024**2
"""Less is left to libcurl: its connection can be used again then."""

RECEIVING: Final = 56  # CURLE_RECV_ERROR
PARTIAL: Final = 18  # CURLE_PARTIAL_FILE


class Taker(Protocol):
    """Who wants the bytes. May raise OSError, about this machine, or `StorageError`."""

    def take(self, data: memoryview) -> None:
        """The next bytes; the memory is used again afterwards."""
        ...


class Direct:
    """What is left of a body, in a socket."""

    __slots__ = ("_block", "_left", "_taker", "_url", "descriptor", "passed_bytes")

    def __init__(self, socket: int, left: int, taker: Taker, url: str) -> None:
        """`socket`: that of a connection, which does not block; it stays its owner's. `url`: for the words of errors."""
        self.descriptor = os.dup(socket)  # of our own, for epoll is told of the other one by its owner
        self._left, self._taker, self._url = left, taker, url
        self._block = memoryview(bytearray(BLOCK_BYTES))
        self.passed_bytes = 0

    def close(self) -> None:
        """Read no more."""
        os.close(self.descriptor)

    def read(self) -> bool:
        """Hand over what has come; whether that was all. Raises `StorageUnavailable`, and what the taker raises."""
        for _ in range(BLOCKS):
            wanted = min(self._left, BLOCK_BYTES)
            count, over = self._receive(wanted)
            self._left -= count
            self.passed_bytes += count
            if count:
                self._taker.take(self._block[:count])
            if over:
                raise curl_error(self._url, PARTIAL, f"end of the connection with {self._left} bytes missing")
            if not self._left or count < wanted:
                break
        return not self._left

    def _receive(self, wanted: int) -> tuple[int, bool]:
        """How many bytes are in the block now, and whether the other side has sent its last."""
        count = 0
        try:
            while count < wanted:
                more = os.readv(self.descriptor, [self._block[count:wanted]])
                if not more:
                    return count, True
                count += more
        except BlockingIOError:
            pass
        except OSError as exc:
            raise curl_error(self._url, RECEIVING, exc.strerror or str(exc)) from exc
        return count, False

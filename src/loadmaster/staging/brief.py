"""A few small files of this machine, as most jobs have: moved in one turn of a thread, with nothing around them.

No lane is asked for, for a directory of this machine has one thread for its small files, and nobody watches whether they
stall, for what hangs there cannot be given up. What is large, or does not arrive at the first try, is for a party.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from loadmaster.staging.errand import Errand, took_other
from loadmaster.storage.base import Direction, FileInfo, Step, Transfer
from loadmaster.storage.local import SMALL_BYTES, LocalStorage

FEW_FILES: Final = 16
"""No more of them go together: others wait for the thread."""


def are_few(errands: Sequence[Errand]) -> bool:
    """Whether all of them may be small, as far as is known, and are files of this machine."""
    return 0 < len(errands) <= FEW_FILES and all(map(_is_brief, errands))


def _is_brief(errand: Errand) -> bool:
    small = errand.size_bytes is None or errand.size_bytes < SMALL_BYTES
    whole = errand.step is Step.ALL and errand.direction is not Direction.COPY
    return small and whole and errand.replica.url.startswith("file://")


async def move_briefly(errands: Sequence[Errand], storage: LocalStorage) -> list[FileInfo | None]:
    """What passed of each of a few; None for those that are still to be moved, as if nobody had tried.

    Cancellation waits for them: each is there as a whole, or not at all.
    """
    transfers = []
    for errand in errands:
        url, wanted = errand.replica.url, errand.checksum
        transfer = Transfer(
            errand.direction, url, errand.end, wanted.algorithm if wanted is not None else "adler32", errand.size_bytes
        )
        errand.end.url = url
        if errand.parts is not None and errand.direction is Direction.UPLOAD:
            await errand.parts.make_room(url)
            transfer.part = errand.parts.next(url)
        transfers.append(transfer)
    await storage.move_small(transfers)
    return [_arrived(errand, transfer) for errand, transfer in zip(errands, transfers, strict=True)]


def _arrived(errand: Errand, transfer: Transfer) -> FileInfo | None:
    info = transfer.result
    if not isinstance(info, FileInfo) or took_other(errand, info) is not None:
        return None
    errand.transfers += 1
    return info

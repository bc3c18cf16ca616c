"""A pilot that DiracX knows of: from when it runs until it is done."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import anyio

from loadmaster.description import ComputingElement
from loadmaster.diracx.client import DiracX
from loadmaster.diracx.errors import DiracxError

log = logging.getLogger(__name__)

STAMP: Final = "DIRAC_PILOT_STAMP"
"""Where a pilot finds what it is called."""

GOODBYE_SECONDS: Final = 10.0


@asynccontextmanager
async def known_pilot(diracx: DiracX, stamp: str, ce: ComputingElement | None = None) -> AsyncIterator[None]:
    """Have the pilot of this stamp known as Running within the block, registered if it is not, and as Done after it.

    An error in the block makes it Failed. That the server will have none of it is told in the log, and no more: the jobs
    do not depend on it.
    """
    ce = ce or ComputingElement()
    site = {"destination_site": ce.site, "grid_site": ce.site} if ce.site else {}
    status = "Failed"
    try:
        try:
            await diracx.register_pilot(stamp, await diracx.vo(), **site)
            await diracx.set_pilot(stamp, Status="Running")
        except DiracxError as exc:
            log.warning("pilot %s: is not registered: %s", stamp, exc)
        yield
        status = "Done"
    finally:
        with anyio.move_on_after(GOODBYE_SECONDS, shield=True):
            try:
                await diracx.set_pilot(stamp, Status=status)
            except DiracxError as exc:
                log.warning("pilot %s: is not known as %s: %s", stamp, status, exc)

"""Where a job's events go besides its handle: JSON Lines, for programs."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from typing import Any, TextIO

from anyio import to_thread

from loadmaster.events import Event, dump
from loadmaster.handle import JobHandle

log = logging.getLogger(__name__)


async def write_events(handle: JobHandle, file: TextIO) -> None:
    """Write every event of a job to an open file, one JSON object a line, as they come; closed when the job is over.

    Of the payload's environment only the names are written: values may be secrets. A file that can no longer be
    written to (a full disk) is given up with an error in the log; the job goes on.
    """
    try:
        async for event in handle.events():
            await to_thread.run_sync(_write_line, file, written(event))
    except OSError as exc:
        log.error("%s: no more events are written: %s", file.name, exc)  # noqa: TRY400 - a sentence, no traceback
    finally:
        with suppress(OSError):  # what could not be written before is tried again
            file.close()


def written(event: Event) -> str:
    """An event as a line of JSON, without the values of environment variables."""
    return json.dumps(_without_secrets(event)) + "\n"


def _without_secrets(event: Event) -> dict[str, Any]:
    facts = dump(event)
    for holder, name in ((facts, "env"), (facts.get("description"), "environment")):
        if isinstance(holder, dict) and name in holder:
            holder[name] = sorted(holder[name])
    return facts


def _write_line(file: TextIO, line: str) -> None:
    file.write(line)
    file.flush()

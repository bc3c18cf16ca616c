"""Where a job's events go besides its handle: JSON Lines for programs, a log for people."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, TextIO

from anyio import to_thread

from loadmaster.events import Event, dump
from loadmaster.handle import JobHandle

log = logging.getLogger(__name__)


async def write_events(handle: JobHandle, path: Path) -> None:
    """Write every event of a job to a file, one JSON object a line, as they come; returns when the job is over.

    Of the payload's environment only the names are written: values may be secrets. A file that can no longer be
    written to (a full disk) is given up with an error in the log; the job goes on. Raises OSError if it cannot be made.
    """
    file = await to_thread.run_sync(lambda: path.open("w", encoding="utf-8"))
    try:
        async for event in handle.events():
            await to_thread.run_sync(_write_line, file, json.dumps(_without_secrets(event)))
    except OSError as exc:
        log.error("%s: no more events are written: %s", path, exc)  # noqa: TRY400 - a sentence, no traceback
    finally:
        file.close()


async def log_events(handle: JobHandle) -> None:
    """Log every event of a job in one line; returns when the job is over."""
    async for event in handle.events():
        log.info("job %s: %s", event.job_id, event.kind)


def _without_secrets(event: Event) -> dict[str, Any]:
    facts = dump(event)
    for holder, name in ((facts, "env"), (facts.get("description"), "environment")):
        if isinstance(holder, dict) and name in holder:
            holder[name] = sorted(holder[name])
    return facts


def _write_line(file: TextIO, line: str) -> None:
    file.write(line + "\n")
    file.flush()

"""What an earlier agent has left of a job's payload, and what its successor is to make of it.

Where what it had ordered is in the journal (a kill, a limit, a task beside the payload that had failed), the payload is
ended for that, and the job ends so, whether it can be adopted or not. What it had not written has not happened.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from loadmaster.description import JobDescription, Limits
from loadmaster.errors import JobError, PayloadLost, RescheduleJob
from loadmaster.events import PayloadExited
from loadmaster.handle import JobHandle
from loadmaster.lifecycle import Stage
from loadmaster.payload.adopt import adopt, end_held
from loadmaster.payload.found import Lost, NotStarted
from loadmaster.payload.softstop import SoftStop
from loadmaster.payload.state import remove_state
from loadmaster.payload.supervise import Payload
from loadmaster.result import EndedBy, PayloadOutcome
from loadmaster.threads import briefly
from loadmaster.workdir import Workdir
from loadmaster.world import World

log = logging.getLogger(__name__)


async def end_forgotten(handle: JobHandle) -> JobError | None:
    """End a payload of the job of which its journal knows nothing: it has lost its end, or the job comes anew. Before the
    work directory is made, for that may be in there; and why the attempt is over then. None: nothing was started.

    Raises `PayloadHeld` when another agent has it.
    """
    assert handle.state is not None  # noqa: S101 - who has none does not ask
    found = await end_held(handle.state)
    if isinstance(found, NotStarted) or found.certain:
        await briefly(partial(remove_state, handle.state))
    if isinstance(found, NotStarted):
        return None
    log.warning("job %s: the journal does not know that its payload was started: %s", handle.job_id, found.reason)
    if found.certain:
        return PayloadLost(f"it was started, which the journal does not know any more: {found.reason}")
    return RescheduleJob(f"it may have been started, and some of it may still be there: {found.reason}")


async def find_payload(
    job: JobDescription, handle: JobHandle, workdir: Workdir, *, limits: Limits, world: World,
    outputs_bytes: Callable[[], int] | None,
) -> Payload | None:  # fmt: skip
    """The payload that an earlier agent of the job has started, for us. None: none runs any more, and if one was started
    its end is recorded.

    For a job that has been granted a slot; `end_forgotten` is for those that have not. Raises `PayloadLost`, or
    `RescheduleJob` where some of it may still be there, when nobody knows whether one was started; `PayloadHeld` and
    OSError as `adopt` does.
    """
    life, state = handle.life, handle.state
    if state is None:
        return None
    found = await adopt(
        state, workdir, stdout=job.std_output, stderr=job.std_error, boot=life.boot_id, known=life.started,
        limits=limits, world=world, soft_stop=SoftStop.of(job), outputs_bytes=outputs_bytes,
        stopped_softly=life.soft_stop is not None,
    )  # fmt: skip
    if isinstance(found, Payload):
        return found
    log.info("job %s: its payload cannot be gone on with: %s", job.job_id, found.reason)
    certain = not isinstance(found, Lost) or found.certain
    if life.stage is Stage.RUNNING:
        by = life.ending_by or EndedBy.LOST
        lost = PayloadOutcome(None, None, 0.0, 0.0, None, by, verdict=life.verdict, left_behind=not certain)
        await handle.record(PayloadExited, lost)
    elif not isinstance(found, Lost):
        await briefly(partial(remove_state, state))
    elif certain:
        raise PayloadLost(f"it may have been started: {found.reason}")
    else:
        raise RescheduleJob(f"it may have been started, and some of it may still be there: {found.reason}")
    return None

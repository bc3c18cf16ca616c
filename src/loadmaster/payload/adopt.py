"""A payload whose agent has died: taken on by the next one, or ended for certain.

| what is found                                      | what it is                                                     |
| -------------------------------------------------- | -------------------------------------------------------------- |
| a shim that lives, and has started a payload       | a `Payload` like any other                                     |
| the shim's record of the end                       | a `Payload` that is gone: its `end` says how it ended          |
| that nothing was executed                          | `NotStarted`; nothing will be, whatever is still on its way    |
| no shim, no record, or none that is to be believed | `Lost`: what is left of it was ended first                     |

A process is never told by its number alone: a descriptor is opened first, and then the start time compared, in the same
boot of the machine.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio
from anyio import to_thread

from loadmaster.description import Containment, Limits
from loadmaster.errors import PayloadHeld
from loadmaster.events import PayloadStarted
from loadmaster.payload.adopted import AdoptedTree, EndedTree, open_process
from loadmaster.payload.found import Found, Lost, NotStarted, ToEnd, is_other_boot, look, unclear, undamaged
from loadmaster.payload.output import Output
from loadmaster.payload.softstop import SoftStop
from loadmaster.payload.state import NotOurs, Started, StateDirectory
from loadmaster.payload.supervise import NO_LIMITS, Payload
from loadmaster.payload.sweep import kill_left
from loadmaster.payload.tree import KILL_SECONDS
from loadmaster.workdir import Workdir
from loadmaster.world import USUAL, World

if TYPE_CHECKING:
    from loadmaster.notices import Notices
    from loadmaster.payload.cgroup import Group

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 1.0
"""While a shim has not said yet what it has started. The kernel tells of what it writes, but not of a lock that is free."""

HELD_SECONDS: Final = 1.0
HELD_LOOK_SECONDS: Final = 0.05
"""An agent that is killed while it starts a process leaves that with all its locks until it executes something: some
milliseconds (measured: 5 of 72 payloads). Nobody tells when a lock is free; who waits for it in a thread cannot leave."""

STARTING_SECONDS: Final = 600.0
"""For a program on a file server that is slow to answer. After this the shim is ended."""


async def adopt(
    state: Path, workdir: Workdir, *, stdout: str, stderr: str, boot: str = "", known: PayloadStarted | None = None,
    limits: Limits = NO_LIMITS, world: World = USUAL, soft_stop: SoftStop | None = None,
    outputs_bytes: Callable[[], int] | None = None, stopped_softly: bool = False,
) -> Payload | NotStarted | Lost:  # fmt: skip
    """What became of the payload that was, or was to be, started with this state directory; ours from here on.

    `boot` is the `boot_id` under which it was to be started, and `known` what was told of its start, if it was: they are
    believed before what is in the directory. `stopped_softly`: it was asked to wind down, and is not asked again. The
    other words are those of `start`.

    Raises `PayloadHeld` when another agent has it, OSError when we lack descriptors, say; nothing was decided then, and
    it can be tried again. Cancelled, it leaves a payload that runs as it is, to be adopted.
    """
    event = None if known is None else _started_of(known)
    boot = boot or (known.boot_id if known is not None else "")
    try:
        directory = await _take(state)
    except (FileNotFoundError, NotOurs) as exc:
        return await _without_state(state, exc, event, boot)
    found: Found | None = None
    group: Group | None = None
    try:
        found = await _find(directory, event, boot)
        with anyio.CancelScope(shield=True):  # some milliseconds, or what `_lost` is bounded by
            group = (
                await to_thread.run_sync(_group_of, directory, limits) if not isinstance(found, NotStarted) else None
            )
            if isinstance(found, AdoptedTree | EndedTree):
                found.hold(group)
                output = await to_thread.run_sync(
                    lambda: Output.reopen(workdir, stdout, stderr, kept_bytes=world.kept_output_bytes)
                )
                return Payload(
                    found, output, group=group, soft_stop=soft_stop, kept_bytes=world.kept_output_bytes,
                    outputs_bytes=outputs_bytes, state=directory, stopped_softly=stopped_softly,
                )  # fmt: skip
            left = await _lost(found, directory, group) if isinstance(found, ToEnd) else found
    except BaseException:
        if isinstance(found, AdoptedTree):
            found.leave()
        if group is not None:
            group.close()
        directory.close()
        raise
    directory.close()
    return left


async def end_left(known: PayloadStarted) -> bool:
    """End what is left of a payload that was started and cannot be adopted, one in a session say.

    False when something is still there 30 s after it was killed. What has left both its parents and its session is not
    found without its shim; docs/containment.md has who can do that. Shielded, and bounded.
    """
    with anyio.CancelScope(shield=True):
        if not (gone := await to_thread.run_sync(is_other_boot, known.boot_id)):
            gone, _ = await _end_left(_started_of(known), None)
    return gone


async def end_held(state: Path) -> NotStarted | Lost:
    """End the payload that a state directory holds, and nobody knows of any more: its journal has lost it.

    Raises `PayloadHeld` when another agent has it. Shielded, and bounded.
    """
    found: NotStarted | Lost = NotStarted("no state directory was made for it")
    with anyio.CancelScope(shield=True), suppress(FileNotFoundError):
        try:
            directory = await _take(state)
        except NotOurs as exc:
            return Lost(str(exc))
        try:
            found = await _end_found(await _find(directory, None, ""), directory)
        finally:
            directory.close()
    return found


async def _end_found(found: Found, directory: StateDirectory) -> NotStarted | Lost:
    if isinstance(found, AdoptedTree):
        found.hold(group := await to_thread.run_sync(_group_of, directory, NO_LIMITS))
        try:
            ended = await found.end(0)
        finally:
            found.leave()
            if group is not None and not await to_thread.run_sync(group.remove):
                group.close()
        return Lost("it ran, and was ended", left_behind=not ended, sure=ended)
    if isinstance(found, EndedTree):
        return Lost("it had ended", sure=True)
    return await _lost(found, directory) if isinstance(found, ToEnd) else found


async def _take(state: Path) -> StateDirectory:
    """The directory, once nobody else has it. Raises as `StateDirectory.open` does."""
    # For about a second: a child that the dead agent was just starting holds its locks until it executes. No lock tells
    # when it is free but to a thread that blocks in it, which could not be taken back.
    with anyio.move_on_after(HELD_SECONDS):
        while True:
            try:
                return await to_thread.run_sync(StateDirectory.open, state)
            except PayloadHeld:
                await anyio.sleep(HELD_LOOK_SECONDS)
    return await to_thread.run_sync(StateDirectory.open, state)


async def _without_state(path: Path, why: Exception, event: Started | None, boot: str) -> NotStarted | Lost:
    """There is no state directory, or none of ours."""
    reason = str(why) if isinstance(why, NotOurs) else f"{path}: is not there"
    if await to_thread.run_sync(is_other_boot, boot):
        return Lost(reason, rebooted=True, sure=True)
    if event is None and not isinstance(why, NotOurs):
        return NotStarted("no state directory was made for it")
    return await _lost(ToEnd(reason, (event,) if event is not None else ()))


def _started_of(event: PayloadStarted) -> Started:
    return Started.model_construct(  # of our own words: a validator would be made first, in the event loop
        shim_pid=event.shim_pid, shim_start=event.shim_start_ticks, payload_pid=event.pid,
        payload_start=event.start_ticks, containment=Containment(event.containment),
    )  # fmt: skip


# -- what there is ---------------------------------------------------------------------------------------------------


async def _find(directory: StateDirectory, event: Started | None, boot: str) -> Found:
    """Look, and again when a shim has not said yet what it has started."""

    if (found := await to_thread.run_sync(look, directory, event, boot)) is not None:
        return found
    with ExitStack() as stack, anyio.move_on_after(STARTING_SECONDS):
        notices = _notices_of(directory, stack)
        while (found := await to_thread.run_sync(look, directory, event, boot)) is None:
            with anyio.move_on_after(LOOK_SECONDS):
                await (notices.next() if notices is not None else anyio.sleep_forever())
        return found
    return await to_thread.run_sync(unclear, directory, "its shim does not say what it has started", ())


def _notices_of(directory: StateDirectory, stack: ExitStack) -> Notices | None:
    """Told when the shim renames or closes a file; None when the user has no inotify queue left."""
    from loadmaster.notices import CLOSED, MOVED_IN, Notices  # with ctypes, loaded when used

    try:
        notices = stack.enter_context(Notices())
        notices.watch(f"/proc/self/fd/{directory.descriptor}", CLOSED | MOVED_IN)
    except OSError:
        return None
    return notices


def _group_of(directory: StateDirectory, limits: Limits) -> Group | None:
    launch = undamaged(lambda: directory.launch)
    if launch is None or not launch.groups:
        return None
    from loadmaster.payload.cgroup import Group  # loaded when used

    try:
        return Group.reopen(launch.groups, limits)
    except OSError as exc:
        log.warning("%s: its control groups are not there any more: %s", directory.path, exc)
        return None


# -- what is left ----------------------------------------------------------------------------------------------------


async def _lost(found: ToEnd, directory: StateDirectory | None = None, group: Group | None = None) -> Lost:
    """End all that is known of. Bounded by some 30 s each."""
    gone, sure = True, bool(found.known)
    with anyio.CancelScope(shield=True):
        for one in found.known:
            ended, is_all = await _end_left(one, directory)
            gone, sure = gone and ended, sure and is_all
        if group is not None:
            sure = await group.end(KILL_SECONDS)
            gone = gone and sure
            if not await to_thread.run_sync(group.remove):
                group.close()
    return Lost(found.reason, left_behind=not gone, sure=gone and sure)


async def _end_left(found: Started, directory: StateDirectory | None) -> tuple[bool, bool]:
    """Whether those who were found are gone, and whether they were all: as its shim says, or its namespace has it."""
    ended, is_all = True, found.containment is Containment.PID_NAMESPACE
    pidfd = await to_thread.run_sync(open_process, found.shim_pid, found.shim_start, directory)
    if pidfd is not None:
        tree = AdoptedTree(pidfd, found, found.containment)
        try:
            ended = is_all = await tree.end(0)
        finally:
            tree.leave()
    with anyio.move_on_after(KILL_SECONDS) as killing:
        while opened := await to_thread.run_sync(_kill_left, found):
            try:
                for pidfd in opened:
                    await anyio.wait_readable(pidfd)
            finally:
                for pidfd in opened:
                    os.close(pidfd)
    ended = ended and not killing.cancelled_caught
    return ended, is_all and ended


def _kill_left(found: Started) -> list[int]:
    """Kill what a shim that is gone has left; descriptors to wait for."""
    init = open_process(found.init_pid, found.init_start)
    if init is not None:  # all of its namespace is gone when it is
        signal.pidfd_send_signal(init, signal.SIGKILL)
        return [init]
    return kill_left(found.payload_pid, found.payload_start) if found.payload_pid > 1 else []

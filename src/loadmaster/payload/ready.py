"""A payload gets ready, so that it lacks nothing but a slot, and is started: the slot waits for no file."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from loadmaster.description import Containment, Limits, PayloadSpec
from loadmaster.errors import PayloadNotStarted
from loadmaster.payload.command import argv_of
from loadmaster.payload.containment import order, settled, spawn
from loadmaster.payload.launch import Launch, Refused, shim_kind
from loadmaster.payload.output import Output
from loadmaster.payload.softstop import SoftStop
from loadmaster.payload.starter import Starter
from loadmaster.payload.state import LaunchRecord, StateDirectory, boot_id, remove_state
from loadmaster.payload.supervise import NO_LIMITS, Payload
from loadmaster.payload.tree import Tree
from loadmaster.threads import briefly, while_brief
from loadmaster.workdir import Workdir
from loadmaster.world import USUAL, World

if TYPE_CHECKING:
    from loadmaster.payload.cgroup import Group

log = logging.getLogger(__name__)


class Ready:
    """A payload whose files are there. Call `start`, or `discard`."""

    def __init__(
        self, spec: PayloadSpec, workdir: Workdir, *, stdout: str, stderr: str, limits: Limits = NO_LIMITS,
        world: World = USUAL, state: Path | None = None, hidden: Sequence[Path] = (), starter: Starter | None = None,
    ) -> None:  # fmt: skip
        """Its output is two files of the work directory. Blocks for a moment; raises `PayloadNotStarted`.

        With `state`, a directory that is not there yet, the payload outlives an agent that dies, and can be adopted by the
        next one (`adopt`), for `World.orphan_seconds`; not in a session, which can only be ended. Where it has mounts of
        its own it finds that directory and those of `hidden` empty. Who has started it, or adopted it, has it alone until
        `Payload.end` has returned; `remove_state` removes what is left on disk. All of these have to be apart from the
        work directory. `starter` starts it, if it can.
        """
        self.spec = spec
        self._workdir = workdir
        self._limits = limits
        self._world = world
        self._near = world.containment[0] is Containment.SESSION
        self._starter = None if self._near else starter
        self._group: Group | None = None
        self._directory: StateDirectory | None = None
        self._noted: Tree | None = None
        _check_apart(workdir, state, hidden)
        try:
            with ExitStack() as undo:
                self._argv = argv_of(spec, workdir.path, near=self._near)
                self._output = Output(workdir, stdout, stderr)
                undo.callback(self._remove)
                if not self._near and (world.cgroup != "none" or world.containment[0] is Containment.CGROUP):
                    self._group = _group_of(workdir.path.name, world, limits)
                with ExitStack() as opened:
                    self._hidden: tuple[int, ...] = ()
                    if state is not None:
                        self._directory = _state_of(state, world, self._group)
                        self._hidden = tuple(_open(path, opened) for path in hidden)
                    self._lock = workdir.hold()
                    opened.callback(os.close, self._lock)
                    self._opened = opened.pop_all()
                if self._starter is not None:
                    self._starter.prepare()
                undo.pop_all()
        except (OSError, Refused) as exc:
            raise _not_started(spec, exc) from exc

    def __repr__(self) -> str:
        return f"<Ready {_shown(self.spec)}>"

    async def start(
        self, env: Mapping[str, str] | None = None, *, cores: frozenset[int] = frozenset(),
        soft_stop: SoftStop | None = None, outputs_bytes: Callable[[], int] | None = None,
    ) -> Payload:  # fmt: skip
        """Start it in the first containment the node allows. What the kernel can hold of the limits it is told; `watch`
        judges all of them.

        `env` instead of that of its spec; `cores` are the CPUs it is bound to, if any. `outputs_bytes` says what would have
        to be delivered if it ended now; called in a thread. Raises `PayloadNotStarted`. Cancelled, or raising, it leaves no
        payload, and is discarded.
        """
        world, limits = self._world, self._limits
        launch = Launch(
            self._argv, self.spec.env if env is None else env, self._workdir.path, self._output.stdout,
            self._output.stderr, limits.grace_seconds, umask=world.umask, nice=world.nice, cores=cores,
            cpu_seconds=_kernels_cpu(limits), isolation=world.isolation, image=world.image, group=self._group,
            state=self._directory.descriptor if self._directory is not None else -1,
            orphan_seconds=world.orphan_seconds, hidden=self._hidden, lock=self._lock,
        )  # fmt: skip
        try:
            begun = order(launch, world.containment, self._starter)
            if begun is None:
                begun = await while_brief(partial(self._spawn, launch))
            tree = await settled(launch, *begun, self._starter)
        except (OSError, Refused) as exc:
            await self.discard()
            raise _not_started(self.spec, exc) from exc
        except BaseException:
            await self.discard()
            raise
        self._opened.close()
        if self._group is not None:
            self._group.close_descriptors()
        if tree.containment is Containment.SESSION and self._noted is not tree:
            with anyio.CancelScope(shield=True):  # a payload that runs is one, also for somebody who is cancelled now
                await briefly(partial(self._note_session, tree))
        return Payload(
            tree, self._output, group=self._group, soft_stop=soft_stop, kept_bytes=world.kept_output_bytes,
            outputs_bytes=outputs_bytes, state=self._directory,
        )  # fmt: skip

    async def discard(self) -> None:
        """There will be no payload: nothing is left of what was made for it."""
        with anyio.CancelScope(shield=True):  # a few unlinks on a local disk
            await briefly(self._remove)
        self._opened.close()

    def _spawn(self, launch: Launch) -> tuple[Tree, Sequence[Containment]]:
        """Start it by ourselves: that waits for the new process, milliseconds where all cores are busy."""
        tree, others = spawn(launch, self._world.containment)
        if tree.containment is Containment.SESSION:
            self._note_session(tree)
        return tree, others

    def _note_session(self, tree: Tree) -> None:
        """Who the next agent has to end, and who lives in the work directory: there is no shim that would say it."""
        self._noted = tree
        self._workdir.note_session(tree.pid, tree.start_ticks)
        if self._directory is None:
            return
        facts = {"shim_pid": 0, "shim_start": 0, "payload_pid": tree.pid, "payload_start": tree.start_ticks}
        try:
            self._directory.note({**facts, "containment": tree.containment})
        except OSError as exc:  # the disk is full; who has the event of its start knows as much
            log.warning("process %d: is not noted for the next agent: %s", tree.pid, exc)

    def _remove(self) -> None:
        self._output.discard()
        if self._group is not None and not self._group.remove():
            self._group.close()
        if self._directory is not None:
            self._directory.close()
            remove_state(self._directory.path)


async def start(
    spec: PayloadSpec, workdir: Workdir, *, stdout: str, stderr: str, limits: Limits = NO_LIMITS, world: World = USUAL,
    state: Path | None = None, hidden: Sequence[Path] = (), starter: Starter | None = None,
    cores: frozenset[int] = frozenset(), soft_stop: SoftStop | None = None,
    outputs_bytes: Callable[[], int] | None = None,
) -> Payload:  # fmt: skip
    """A payload that is got ready and started; see `Ready`. Raises `PayloadNotStarted`. Cancelled, it leaves no payload."""
    make = partial(
        Ready, spec, workdir, stdout=stdout, stderr=stderr, limits=limits, world=world, state=state, hidden=hidden,
        starter=starter,
    )  # fmt: skip
    return await (await briefly(make)).start(cores=cores, soft_stop=soft_stop, outputs_bytes=outputs_bytes)


def _not_started(spec: PayloadSpec, exc: Exception) -> PayloadNotStarted:
    return PayloadNotStarted(f"cannot start {_shown(spec)}: {exc}")


def _check_apart(workdir: Workdir, state: Path | None, hidden: Sequence[Path]) -> None:
    """Raise ValueError for a place in the work directory, or around it."""
    if state is None and not hidden:
        return
    own = os.path.join(_real(workdir.path.parent), workdir.path.name, "")
    places = [os.path.join(_real(place), "") for place in hidden]
    if state is not None:
        places.append(os.path.join(_real(state.parent), state.name, ""))
    for place in places:
        if own.startswith(place) or place.startswith(own):
            raise ValueError(f"{place}: has to be apart from the work directory {own}")


def _open(path: Path, opened: ExitStack) -> int:
    descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    opened.callback(os.close, descriptor)
    return descriptor


@lru_cache(maxsize=32)
def _real(directory: Path) -> str:
    """Of directories that are the same for many jobs: each resolution takes a dozen system calls."""
    return os.path.realpath(directory)


def _kernels_cpu(limits: Limits) -> float | None:
    """What one process may use before the kernel steps in: the limit, and all that can be used in the grace."""
    if limits.cpu_seconds is None:
        return None
    return limits.cpu_seconds + limits.grace_seconds * (os.cpu_count() or 1)


def _group_of(job_id: str, world: World, limits: Limits) -> Group | None:
    from loadmaster.payload.cgroup import group_of  # loaded when used

    return group_of(job_id, "" if world.cgroup in {"own", "none"} else world.cgroup, limits)


def _state_of(path: Path, world: World, group: Group | None) -> StateDirectory:
    """A state directory, with what the next agent cannot find out. Raises OSError."""
    record = LaunchRecord(
        boot_id=boot_id(), shim=shim_kind(), containment=world.containment, isolation=world.isolation,
        groups=group.items if group is not None else {},
    )  # fmt: skip
    return StateDirectory.make(path, record)


def _shown(spec: PayloadSpec) -> str:
    command = spec.command if isinstance(spec.command, str) else " ".join(spec.command)
    return repr(command[:80])

"""What a shim leaves on disk for the next agent, and what of it can be believed.

    STATE/launch.json     the agent's, before anything is started: under which boot, in which control groups
    STATE/agent.lock      held by the agent that has the payload, one at a time
    STATE/lock            held by the shim for its life; shim.c says what its mode means
    STATE/started, exit   the shim's
    STATE/void            whoever made it has found that nothing was executed, and nothing may be any more

Everything here blocks, for a moment. Nothing is synced: after the machine was started again, a record counts only if the
shim had synced it, and what it is about.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loadmaster.description import Containment, Isolation
from loadmaster.errors import PayloadHeld
from loadmaster.payload.launch import NotKept
from loadmaster.payload.process import ExitRecord
from loadmaster.payload.shimtree import facts_of, record_of
from loadmaster.workdir import remove_directory

OURS: Final = 0o700
MOST_BYTES: Final = 64 * 1024
"""Of a file in there. Ours have some hundred; a payload of the same user may have written others."""

EXECUTED: Final = 0o100
"""In the mode of `lock`: something may have been executed."""

_LACKS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""What a process may lack for a moment, whatever the disk is like."""

_LEFT: Final = ("launch.json", "agent.lock", "lock", "started", "exit")

_FLOCK: Final = struct.Struct("hhqqi4x")
_FILE: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Damaged(Exception):
    """A file of a state directory is not as we or a shim have written it."""


class NotOurs(Exception):
    """What is in place of a state directory; the message says why it cannot be one."""


class LaunchRecord(BaseModel):
    """What the agent knew when it started the payload, and the next one needs."""

    model_config = ConfigDict(defer_build=True, frozen=True)

    version: Literal[1] = 1
    boot_id: str
    shim: str
    containment: tuple[Containment, ...]
    isolation: Isolation = Isolation.NONE
    groups: dict[str, str] = Field(default_factory=dict)
    """Its control groups by what they are of use for."""


class Started(BaseModel):
    """What the shim has started."""

    model_config = ConfigDict(defer_build=True, frozen=True)

    shim_pid: Annotated[int, Field(ge=0)]
    shim_start: Annotated[int, Field(ge=0)]
    payload_pid: Annotated[int, Field(ge=0)]
    payload_start: Annotated[int, Field(ge=0)]
    init_pid: Annotated[int, Field(ge=0)] = 0
    """Process 1 of its namespace, where it has one: when that is gone, all are."""
    init_start: Annotated[int, Field(ge=0)] = 0
    containment: Containment
    fenced: bool = False
    error: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    """How it ended. Synced: what the payload had written was on the disk before this was."""

    record: ExitRecord
    synced: bool


class StateDirectory:
    """The state of one payload, which we have for ourselves. Call `close`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self.descriptor = path, descriptor
        self._agent = -1

    def __repr__(self) -> str:
        return f"<StateDirectory {self.path}>"

    @classmethod
    def make(cls, path: Path, launch: LaunchRecord) -> Self:
        """Make one. Raises `PayloadHeld` when it is there: a payload may have been started with it. And OSError, of which
        `NotKept` says that there is nothing wrong but with the disk; there is none then."""
        try:
            try:
                os.mkdir(path, OURS)
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                os.mkdir(path, OURS)
        except FileExistsError as exc:
            raise PayloadHeld(f"{path}: is there already, and the payload it is about may run") from exc
        except OSError as exc:
            raise _not_kept(path, exc) from exc
        made = cls(path, os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
        try:
            made._take()
            made.write("launch.json", launch.model_dump_json())
        except (NotOurs, OSError) as exc:
            made.close()
            with suppress(OSError):
                remove_state(path)
            cause = exc if isinstance(exc, OSError) else exc.__cause__
            raise _not_kept(path, cause) from exc
        except BaseException:
            made.close()
            raise
        return made

    @classmethod
    def open(cls, path: Path) -> Self:
        """One that is there. Raises FileNotFoundError, `NotOurs`, and `PayloadHeld` when another agent has it."""
        try:
            found = cls(path, os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
        except FileNotFoundError:
            raise
        except OSError as exc:
            raise NotOurs(f"{path}: {exc.strerror}") from exc
        try:
            own = os.fstat(found.descriptor)
            if own.st_uid != os.geteuid():
                raise NotOurs(f"{path}: belongs to user {own.st_uid}")
            if own.st_mode & 0o022:
                raise NotOurs(f"{path}: others may write to it")
            os.fchmod(found.descriptor, OURS)
            found._take()
        except BaseException:
            found.close()
            raise
        return found

    def _take(self) -> None:
        """An open file description's lock and not a flock: the shim can look whether it is held without taking it."""
        try:
            self._agent = self._open("agent.lock", os.O_RDWR | os.O_CREAT)
            fcntl.fcntl(self._agent, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        except OSError as exc:
            if exc.errno in {errno.EAGAIN, errno.EACCES}:
                raise PayloadHeld(f"{self.path}: another agent has this payload") from exc
            raise NotOurs(f"{self.path}: agent.lock: {exc.strerror}") from exc

    def close(self) -> None:
        """Give the payload up to the next agent; may be called again."""
        for descriptor in (self._agent, self.descriptor):
            if descriptor >= 0:
                os.close(descriptor)
        self._agent = self.descriptor = -1

    # -- what there is -----------------------------------------------------------------------------------------------

    @property
    def launch(self) -> LaunchRecord | None:
        """None when it is not there. Raises `Damaged`."""
        text = self._read("launch.json")
        try:
            return None if text is None else LaunchRecord.model_validate_json(text)
        except ValidationError as exc:
            raise Damaged(f"{self.path}: launch.json") from exc

    @property
    def started(self) -> Started | None:
        """None when it is not there. Raises `Damaged`."""
        text = self._read("started")
        try:
            return None if text is None else Started.model_validate(facts_of(text))
        except ValidationError as exc:
            raise Damaged(f"{self.path}: started") from exc

    @property
    def ended(self) -> Ended | None:
        """None when it is not there. Raises `Damaged`."""
        if (text := self._read("exit")) is None:
            return None
        facts = facts_of(text)
        try:
            return Ended(record_of(facts), synced=facts["synced"] == "1")
        except (KeyError, ValueError) as exc:
            raise Damaged(f"{self.path}: exit") from exc

    def has_shim(self) -> bool:
        """Whether a shim lives that has taken it."""
        lock = self._lock()
        if lock is None:
            return True
        os.close(lock)
        return False

    def void(self) -> bool:
        """Whether nothing was executed. Nothing will be then, not by a shim that is still on its way either.

        False while a shim lives, too.
        """
        lock = self._lock()
        if lock is None:
            return False
        try:
            if os.fstat(lock).st_mode & EXECUTED or self._has("started") or self._has("exit"):
                return False
            os.close(self._open("void", os.O_WRONLY | os.O_CREAT))
            return True
        finally:
            os.close(lock)

    def holder(self) -> int:
        """The process that holds the shim's lock, as the kernel tells; 0 when none is seen."""
        with suppress(OSError):
            lock = os.stat("lock", dir_fd=self.descriptor, follow_symlinks=False)
            name = f"{os.major(lock.st_dev):02x}:{os.minor(lock.st_dev):02x}:{lock.st_ino}"
            for line in Path("/proc/locks").read_text().splitlines():
                words = line.split()
                if words[1] == "FLOCK" and name in words:
                    return int(words[4])
        return 0

    def _lock(self) -> int | None:
        """The shim's lock, taken for a moment; None while a shim has it. Raises `Damaged`."""
        try:
            lock = self._open("lock", os.O_RDWR | os.O_CREAT)
        except OSError as exc:
            raise Damaged(f"{self.path}: lock: {exc.strerror}") from exc
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        return lock

    # -- our own part ------------------------------------------------------------------------------------------------

    def write(self, name: str, text: str) -> None:
        """A file that is whole, or not there. Raises OSError."""
        file = self._open("new", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            data = text.encode()
            if os.write(file, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        finally:
            os.close(file)
        os.rename("new", name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def note(self, facts: Mapping[str, object]) -> None:
        """Say what was started, as a shim would. Raises OSError."""
        self.write("started", "".join(f"{name} {value}\n" for name, value in facts.items()))

    def _open(self, name: str, flags: int) -> int:
        return os.open(name, flags | _FILE, 0o600, dir_fd=self.descriptor)

    def _has(self, name: str) -> bool:
        with suppress(FileNotFoundError):
            os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
            return True
        return False

    def _read(self, name: str) -> bytes | None:
        try:
            file = self._open(name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise Damaged(f"{self.path}: {name}: {exc.strerror}") from exc
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise Damaged(f"{self.path}: {name}: is not a file")
            return os.read(file, MOST_BYTES)
        finally:
            os.close(file)


def _not_kept(path: Path, error: BaseException | None) -> OSError:
    number = error.errno if isinstance(error, OSError) and error.errno is not None else errno.EIO
    kind = OSError if number in _LACKS else NotKept
    return kind(number, os.strerror(number), str(path))


def remove_state(path: Path) -> None:
    """Remove a state directory, once what it says is known elsewhere. What is not there is no error; raises OSError."""
    with suppress(OSError):  # as it is left as a rule: a third of the system calls
        directory = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for name in _LEFT:
                os.unlink(name, dir_fd=directory)
        finally:
            os.close(directory)
        os.rmdir(path)
        return
    if path.is_dir() and not path.is_symlink():
        remove_directory(path)
    else:  # a payload of the same user has put something else there; a link's target stays
        path.unlink(missing_ok=True)


def mark_executed(state: int) -> None:
    """Something may be executed from here on, without a shim that would say so. Raises OSError."""
    lock = os.open("lock", os.O_RDWR | os.O_CREAT | _FILE, 0o600, dir_fd=state)
    try:
        os.fchmod(lock, OURS)
    finally:
        os.close(lock)


@cache
def boot_id() -> str:
    """Of the machine as it runs now; another one each time it starts."""
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        return file.read().decode().strip()

"""A thread for the blocking hooks of one coordinator, with a current directory of its own."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import copy_context
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, Generic, ParamSpec, TypeVar

import anyio
from anyio import from_thread, lowlevel, to_thread

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)

CLONE_FS: Final = 0x200
"""Of unshare(2): the current directory, the root and the umask are the thread's alone from here on. Takes no rights,
but some containers forbid all of unshare."""

SNAPSHOT_TRIES: Final = 100
"""The environment cannot be copied while another thread changes it; that it does so this often in a row will not be."""

_libc = ctypes.CDLL(None, use_errno=True)


class HookThread:
    """Where blocking hooks run, one after the other, in one thread: it is started for the first and kept until `close`.

    A hook that changes directory or umask changes the thread's. Where the kernel forbids that, it changes the process's
    directory, which is logged with the hook's name when it returns, and put back when no hook runs. So it is with
    environment variables, which cannot be had for a thread: what has changed meanwhile, whoever has changed it.
    """

    def __init__(self, name: str, directory: Path | None = None) -> None:
        self.directory = directory
        """Where the thread is when it starts."""
        self._name = name
        self._calls: SimpleQueue[_Call[Any] | None] | None = None
        self._thread: threading.Thread | None = None
        self._last: _Call[Any] | None = None

    def __repr__(self) -> str:
        return f"<HookThread [{self._name}, {'idle' if self._calls is None else 'started'}]>"

    async def call(self, hook: str, function: Callable[P, T], *args: P.args, **kw: P.kwargs) -> T:
        """What a function returns, or raises; when we are cancelled it is left to end by itself."""
        if self._calls is None:
            self._calls = SimpleQueue()
            serve = partial(_serve, self._calls, self.directory)
            # Of those that block for ever none may keep the program from ending.
            self._thread = threading.Thread(target=serve, name=f"loadmaster {self._name}", daemon=True)
            self._thread.start()
        self._last = call = _Call(hook, partial(copy_context().run, partial(function, *args, **kw)))
        self._calls.put(call)
        await call.done.wait()
        return call.outcome()

    def close(self) -> None:
        """Have the thread end when what it does has returned. Does not wait."""
        if self._calls is not None:
            self._calls.put(None)
            self._calls = self._last = None

    async def aclose(self) -> None:
        """The same; a thread that does nothing has ended when this returns."""
        thread, idle = self._thread, self._last is not None and self._last.done.is_set()
        self.close()
        if thread is not None and idle:
            await to_thread.run_sync(thread.join)


class _Call(Generic[T]):
    """One call of a hook, and what came of it."""

    def __init__(self, hook: str, function: Callable[[], T]) -> None:
        self._hook = hook
        self.done = anyio.Event()
        self.outcome: Callable[[], T] = _nothing_yet
        self._function = function
        self._loop = lowlevel.current_token()

    def run(self, *, own_directory: bool) -> None:
        try:
            with _ENVIRONMENT.kept(self._hook), nullcontext() if own_directory else _DIRECTORY.kept(self._hook):
                value = self._function()
        except BaseException as exc:  # noqa: BLE001 - passed on to the task that waits, whatever it is
            self.outcome = _raiser(exc)
        else:
            self.outcome = lambda: value
        with suppress(RuntimeError):  # the event loop has been closed meanwhile: nobody waits any more
            from_thread.run_sync(self.done.set, token=self._loop)


def _nothing_yet() -> Any:
    raise RuntimeError("the hook has not returned yet")


def _raiser(error: BaseException) -> Callable[[], Any]:
    def raise_it() -> Any:
        raise error

    return raise_it


def _serve(calls: SimpleQueue[_Call[Any] | None], directory: Path | None) -> None:
    own = _own_directory(directory)
    while (call := calls.get()) is not None:
        call.run(own_directory=own)
        del call  # with what it has returned or raised


def _own_directory(directory: Path | None) -> bool:
    """Give this thread a current directory of its own; whether that was allowed."""
    if _libc.unshare(CLONE_FS) != 0:
        return False
    if directory is not None:
        with suppress(OSError):  # it is gone, or never was: stay where the process is
            os.chdir(directory)
    return True


# -- a hook that changes the process -------------------------------------------------------------------------------


class _Shared(Generic[T]):
    """Something of the process's that hooks share and should leave as it is. What one has changed is told when it returns,
    and put back when no hook runs any more: others may be in the middle of what they changed themselves."""

    def __init__(
        self, look: Callable[[], T | None], tell: Callable[[str, T, T], None], put_back: Callable[[T, T], None]
    ) -> None:
        self._look, self._tell, self._put_back = look, tell, put_back
        self._lock = threading.Lock()  # held for an instant
        self._running: list[str] = []
        self._before: T | None = None
        self._told: T | None = None

    @contextmanager
    def kept(self, hook: str) -> Iterator[None]:
        with self._lock:
            if not self._running:
                self._before = self._told = self._look()
            self._running.append(hook)
        try:
            yield
        finally:
            with self._lock:
                self._running.remove(hook)
                self._left(hook)

    def _left(self, hook: str) -> None:
        now = self._look()
        if self._before is None or now is None:
            return
        if now not in (self._told, self._before):
            beside = sorted(set(self._running))
            self._tell(f"{hook} (or {', '.join(beside)}, beside it)" if beside else hook, self._before, now)
            self._told = now
        if not self._running and now != self._before:
            self._put_back(self._before, now)


def _here() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # somebody has removed it
        return None


def _tell_of_directory(hook: str, before: str, now: str) -> None:
    log.warning("%s changed the directory of the whole process, from %s to %s: it is put back", hook, before, now)


def _go_back(before: str, _: str) -> None:
    try:
        os.chdir(before)
    except OSError as exc:
        log.error("there is no way back into the directory of the process: %s", exc)  # noqa: TRY400 - a sentence, no traceback


def _environment() -> dict[str, str] | None:
    for _ in range(SNAPSHOT_TRIES):
        with suppress(RuntimeError):
            return dict(os.environ)
    return None


def _changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def _tell_of_environment(hook: str, before: dict[str, str], now: dict[str, str]) -> None:
    log.warning(
        "%s changed environment variables of the whole process (%s): they are put back; what a payload needs is returned "
        "in `env`, what another hook needs is kept on self", hook, ", ".join(_changed(before, now)),
    )  # fmt: skip


def _restore(before: dict[str, str], now: dict[str, str]) -> None:
    for name in _changed(before, now):
        if name in before:
            os.environ[name] = before[name]
        else:
            os.environ.pop(name, None)


# There is one environment and one directory in a process, so there is one of each of these.
_DIRECTORY: Final = _Shared(_here, _tell_of_directory, _go_back)
_ENVIRONMENT: Final = _Shared(_environment, _tell_of_environment, _restore)

"""Calling community code: the one place where anything may be raised, and where it becomes a verdict."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Generator
from itertools import dropwhile, takewhile
from pathlib import Path
from traceback import FrameSummary, extract_tb
from types import ModuleType
from typing import Any, Final, Generic, TypeVar

import anyio
from pydantic import ValidationError

from loadmaster.description import complaints
from loadmaster.errors import HookFailed, IllegalEvent, InvalidJob, JobError, RetryHook, RuntimeFault
from loadmaster.signatures import STANDARD, meant_by, unlike, warn_at_first_use
from loadmaster.tasks import leaves

T = TypeVar("T")

log = logging.getLogger(__name__)

_PACKAGE: Final = Path(__file__).parent

ENTRY_POINTS: Final = "loadmaster.coordinators"

FILE_MODULE: Final = "loadmaster_coordinator_"
"""What the module of a coordinator's file is called, before the file's name."""

RETRIES: Final = 100
"""A hook that asks to be called again more often than this will never be content."""

BLOCKED_SECONDS: Final = 0.25
"""A step of a hook that long stops every other job of the loop; whoever wrote it should hear of it."""


async def call_hook(name: str, hook: Callable[..., Awaitable[T]], *args: Any) -> T:
    """What a hook returns. Raises the verdict it raised, or `HookFailed` with its cause; waits and calls again on
    `RetryHook`. Cancellation ends the hook."""
    for _ in range(RETRIES):
        try:
            return await _call(name, hook, *args)
        except RetryHook as verdict:
            log.info("%s asked to be called again in %s: %s", name, verdict.after, verdict)
            await anyio.sleep(verdict.after.total_seconds())  # the hook said how long; nothing else would wake it
    raise HookFailed(f"{name} asked to be called again more than {RETRIES} times")


async def _call(name: str, hook: Callable[..., Awaitable[T]], *args: Any) -> T:
    try:
        return await _Stepwise(_awaitable(name, hook(*args)), name)
    except BaseException as exc:  # community code: whatever it raises becomes a value
        mistaken = unlike(hook, args) if isinstance(exc, TypeError) and _not_entered(exc) else None
        meaning = _meaning(name, exc) if mistaken is None else HookFailed(f"{name} {mistaken}")
        if meaning is exc:
            raise
        raise meaning from exc


def _awaitable(name: str, returned: Awaitable[T]) -> Awaitable[T]:
    if inspect.isawaitable(returned):
        return returned
    raise HookFailed(
        f"{name} is not awaitable (it returned {type(returned).__name__}): "
        "write it with `async def`, or wrap the class with loadmaster.dirac.adapt"
    )


def _meaning(name: str, exc: BaseException) -> BaseException:
    """What to raise for what a hook raised, also when its own task groups wrapped groups around it.

    A fault of the runtime or of the interpreter comes first, then a cancellation somebody ordered, then a verdict.
    """
    cancelled = anyio.get_cancelled_exc_class()
    errors = list(leaves(exc))
    for error in errors:
        ours = isinstance(error, RuntimeFault) and not isinstance(error, IllegalEvent)  # that one is the hook's mistake
        if ours or isinstance(error, (KeyboardInterrupt, GeneratorExit)):
            return error
    if anyio.get_current_task().has_pending_cancellation():
        for error in errors:
            if isinstance(error, cancelled):
                return error
    for error in errors:
        if isinstance(error, JobError):
            return error
    first = errors[0]
    if isinstance(first, cancelled):
        return HookFailed(f"{name} let a cancellation escape that nobody had asked for")
    said = "; ".join(complaints(first)) if isinstance(first, ValidationError) else str(first)
    return HookFailed(f"{name} raised {type(first).__name__}{': ' if said else ''}{said}{_place(first)}")


def _not_entered(error: BaseException) -> bool:
    """Whether it was raised by the call itself, before a line of the hook was run."""
    return error.__traceback__ is not None and error.__traceback__.tb_next is None


def _place(error: BaseException) -> str:
    """Where an error was raised, as its author would look for it: where he called us, if it was in something of ours."""
    frames = list(dropwhile(_ours, extract_tb(error.__traceback__)))
    theirs = list(takewhile(lambda frame: not _ours(frame), frames))
    return f" ({Path(theirs[-1].filename).name}:{theirs[-1].lineno})" if theirs else ""


def _ours(frame: FrameSummary) -> bool:
    return Path(frame.filename).is_relative_to(_PACKAGE)


class _Stepwise(Generic[T]):
    """Awaits something and says so when one of its steps holds the event loop for long."""

    def __init__(self, awaitable: Awaitable[T], name: str) -> None:
        self._awaitable = awaitable
        self._name = name

    def __await__(self) -> Generator[Any, Any, T]:
        steps = self._awaitable.__await__()
        if not isinstance(steps, Generator):  # an iterator of somebody's own: nothing to look into
            return (yield from steps)
        step: Callable[[], Any] = lambda: steps.send(None)  # noqa: E731
        while True:
            begun = time.monotonic()
            try:
                waiting_for = step()
            except StopIteration as stop:
                result: T = stop.value
                return result
            finally:
                if (blocked := time.monotonic() - begun) > BLOCKED_SECONDS:
                    log.warning(
                        "%s held the event loop for %.1f s in one step: nothing else could run; "
                        "put blocking calls in a thread (anyio.to_thread.run_sync)", self._name, blocked,
                    )  # fmt: skip
            try:
                sent = yield waiting_for
            except BaseException as exc:  # noqa: BLE001 - passed on into the hook, whatever it is
                step = _thrower(steps, exc)
            else:
                step = _sender(steps, sent)


def _sender(steps: Generator[Any, Any, Any], value: Any) -> Callable[[], Any]:
    return lambda: steps.send(value)


def _thrower(steps: Generator[Any, Any, Any], exc: BaseException) -> Callable[[], Any]:
    return lambda: steps.throw(exc)


def reference_of(coordinator: type[Any]) -> str:
    """How the class is written in a journal, for `find_coordinator`; nothing for the standard one."""
    name = f"{coordinator.__module__}:{coordinator.__qualname__}"
    return "" if name == STANDARD else name


# -- finding it --------------------------------------------------------------------------------------------------


def find_coordinator(reference: str) -> type[Any]:
    """The coordinator class of `module:Class`, `path/to/file.py:Class`, or an entry point's name.

    Raises `InvalidJob` that says what could not be imported, and why. Blocks.
    """
    place, separator, name = reference.rpartition(":")
    if not separator:
        if reference.endswith(".py"):
            raise InvalidJob(f"coordinator {reference}: which class? {reference}:CLASS")
        return _class(_from_entry_points(reference), reference)
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as exc:  # community code again: its module may raise anything
        raise InvalidJob(f"coordinator {reference}: cannot import it: {type(exc).__name__}: {exc}") from exc
    if not hasattr(module, name):
        raise InvalidJob(f"coordinator {reference}: {place} has no {name!r}")
    return _class(getattr(module, name), reference)


def _from_entry_points(name: str) -> object:
    from importlib.metadata import entry_points  # slow to import, and seldom needed

    found = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name not in found:
        known = f"; installed: {', '.join(sorted(found))}" if found else ""
        raise InvalidJob(f"coordinator {name!r}: neither module:Class nor an entry point of {ENTRY_POINTS}{known}")
    try:
        return found[name].load()
    except Exception as exc:  # as above
        raise InvalidJob(f"coordinator {name}: cannot import it: {type(exc).__name__}: {exc}") from exc


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(f"{FILE_MODULE}{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look classes up by their module
    spec.loader.exec_module(module)
    return module


def _class(found: object, reference: str) -> type[Any]:
    if not isinstance(found, type):
        raise InvalidJob(f"coordinator {reference}: is not a class but {found!r:.60}")
    for hook in ("preProcess", "postProcess"):
        if not callable(getattr(found, hook, None)):
            raise InvalidJob(f"coordinator {reference}: has no {hook}{_like(found, hook)}")
    warn_at_first_use(found)
    return found


def _like(found: type[Any], hook: str) -> str:
    alike = [name for name in dir(found) if not name.startswith("_") and meant_by(name) == hook]
    return f", but {', '.join(alike)}" if alike else ""

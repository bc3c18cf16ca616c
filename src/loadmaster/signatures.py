"""What a coordinator's hooks are called, and called with; and what a class has that only looks like one.

Nothing in Python says that `preproces` should have been a hook: the job would be Done, and nothing of what its author wrote
would have happened.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import FunctionType
from typing import Any, Final

log = logging.getLogger(__name__)

STANDARD: Final = "loadmaster.coordinator:JobExecutionCoordinator"

SIGNATURES: Final[Mapping[str, str]] = {
    "stageIn": "async def stageIn(self) -> None",
    "preProcess": "async def preProcess(self, command: str, exeEnv: dict[str, str]) -> PayloadSpec",
    "postProcess": "async def postProcess(self) -> None",
    "stageOut": "async def stageOut(self) -> None",
}
"""The hooks, in their order, as they are to be written."""

HOOKS: Final = tuple(SIGNATURES)

_ARGUMENTS: Final[Mapping[str, tuple[Any, ...]]] = {"preProcess": ("command", {})}
"""What stands for what they are called with."""

NEARLY: Final = 0.9
"""Two letters wrong of ten are a word of its own: `preparation`; one is a slip of the finger."""


def meant_by(name: str) -> str | None:
    """The hook a name was probably meant to be: other capitals, underscores, a letter too many, too few or another.

    None for a hook's own name, and for words of their own: with another first letter (`reprocess`), or that go on where a
    hook's name ends (`preprocessor`, but not `preprocesss`).
    """
    plain = name.replace("_", "").lower()
    if name in SIGNATURES or plain[:1] not in {"p", "s"}:
        return None
    if (hook := next((hook for hook in HOOKS if plain == hook.lower()), None)) is not None:
        return hook
    from difflib import SequenceMatcher  # seldom needed

    def likeness(hook: str) -> float:
        goes_on = plain.startswith(hook.lower()) and plain[len(hook) :] != hook[-1]
        return 0.0 if goes_on else SequenceMatcher(None, plain, hook.lower()).ratio()

    best = max((hook for hook in HOOKS if hook[0] == plain[0]), key=likeness)
    return best if likeness(best) >= NEARLY else None


def misspellings(coordinator: type[Any]) -> Iterator[str]:
    """A line for each method of a class that nobody calls, for all that it looks like a hook.

    Where a class has both, as one that calls `pre_process` from its `preProcess`, it is meant.
    """
    classes = [vars(each) for each in coordinator.__mro__]
    told = set[str]()
    for own in classes:
        for name, value in own.items():
            if name in told or name.startswith("_") or not callable(value) or (hook := meant_by(name)) is None:
                continue
            if not any(name in each and hook in each for each in classes):
                told.add(name)
                yield f"{coordinator.__qualname__}.{name} is never called: the hook is {hook}"


def warn_of_misspellings(coordinator: type[Any]) -> None:
    """Say them in the log."""
    for line in misspellings(coordinator):
        log.warning("%s", line)


@lru_cache(maxsize=64)
def warn_at_first_use(coordinator: type[Any]) -> None:
    """The same for a class that is no subclass of ours, of which nobody could speak when it was made; once."""
    if STANDARD not in {f"{each.__module__}:{each.__qualname__}" for each in coordinator.__mro__}:
        warn_of_misspellings(coordinator)


def miscalled(coordinator: type[Any]) -> Iterator[str]:
    """A line for each asynchronous hook of a class that cannot be called with what hooks are called with."""
    for hook in HOOKS:
        found = inspect.getattr_static(coordinator, hook, None)
        if inspect.iscoroutinefunction(found) and isinstance(found, FunctionType):
            problem = unlike(found, (None, *_ARGUMENTS.get(hook, ())))
            if problem is not None:
                yield f"{coordinator.__qualname__}.{hook} {problem}"


def unlike(function: Callable[..., Any], arguments: tuple[Any, ...]) -> str | None:
    """Why something cannot be called with these, where it is, and how a hook of its name is written; None if it can."""
    try:
        signature = inspect.signature(function)
        signature.bind(*arguments)
    except TypeError as exc:
        wanted = SIGNATURES.get(getattr(function, "__name__", ""))
        return f"cannot be called: {exc}{_written_at(function)}" + (f"; it is written `{wanted}`" if wanted else "")
    except ValueError:  # it has no signature that could be read
        return None
    return None


def _written_at(function: Callable[..., Any]) -> str:
    code = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)
    return "" if code is None else f" ({Path(code.co_filename).name}:{code.co_firstlineno})"

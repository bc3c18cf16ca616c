"""Community packages, found the way DIRAC's extensions declare them.

An extension has an entry point in the group `dirac` whose value names a function of its package; the function returns a
dictionary with `priority` in it. The extension of the highest priority that has the module
`<package>.WorkloadManagementSystem.JobWrapper.JobExecutionCoordinator` is the one whose class of that name is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loadmaster.coordinator import Coordinator
from loadmaster.dirac.legacy import adapt, is_synchronous
from loadmaster.errors import InvalidJob

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINTS: Final = "dirac"
MODULE: Final = "WorkloadManagementSystem.JobWrapper.JobExecutionCoordinator"
CLASS: Final = "JobExecutionCoordinator"


@dataclass(frozen=True, slots=True)
class Extension:
    """A community's package, or DIRAC itself, which declares itself likewise."""

    package: str
    priority: int
    primary: bool
    """Whether it may be the one an installation is called by."""


def extensions() -> list[Extension]:
    """The installed extensions, those that win first. Raises `InvalidJob` when one cannot say what it is. Blocks."""
    from importlib.metadata import entry_points  # loaded when used

    points = {(point.module.partition(".")[0], point.value): point for point in entry_points(group=ENTRY_POINTS)}
    found = [_extension(package, point) for (package, _), point in points.items()]
    return sorted(found, key=lambda extension: (-extension.priority, extension.package))


def find_coordinator(package: str | None = None) -> type[Coordinator]:
    """The coordinator of the installed extensions, or of one of them, ready to be used: adapted if it is synchronous.

    Raises `InvalidJob` that says where it was looked for, or what could not be imported and why. Blocks.
    """
    packages = [package] if package is not None else [extension.package for extension in extensions()]
    for each in packages:
        found = _coordinator(f"{each}.{MODULE}")
        if found is not None:
            return adapt(found) if is_synchronous(found) else found
    if not packages:
        raise InvalidJob(f"no extension of DIRAC is installed: nothing declares an entry point of {ENTRY_POINTS!r}")
    raise InvalidJob(f"no coordinator in {', '.join(packages)}: none has a module {MODULE}")


def _extension(package: str, point: EntryPoint) -> Extension:
    try:
        said = point.load()()
    except (Exception, SystemExit) as exc:  # community code: it may raise anything
        raise InvalidJob(f"extension {package}: {point.value}: {type(exc).__name__}: {exc}") from exc
    priority = said.get("priority") if isinstance(said, Mapping) else None
    if not isinstance(priority, int):
        raise InvalidJob(f"extension {package}: {point.value} has no priority in what it returns: {said!r:.80}")
    return Extension(package, priority, bool(said.get("primary_extension")))


def _coordinator(module: str) -> type[Any] | None:
    """The class in a module; None when there is no such module, which is not the same as one that cannot be imported."""
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as exc:
        if exc.name is not None and (module == exc.name or module.startswith(f"{exc.name}.")):
            return None
        raise InvalidJob(f"{module}: it needs {exc.name}, which is not installed") from exc
    except (Exception, SystemExit) as exc:  # as above
        raise InvalidJob(f"{module}: cannot import it: {type(exc).__name__}: {exc}") from exc
    found = getattr(imported, CLASS, None)
    if not isinstance(found, type) or not all(
        callable(getattr(found, hook, None)) for hook in ("preProcess", "postProcess")
    ):
        raise InvalidJob(f"{module}: has no class {CLASS} with preProcess and postProcess")
    return found

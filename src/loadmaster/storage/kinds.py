"""Which storage a URL's scheme stands for: ours, those of installed packages, and those an embedding program brings.

A package offers one by an entry point of the group `loadmaster.storages`: the scheme, and a factory, which is an
asynchronous context manager that is given `StorageOptions` and gives a `Storage`. It is opened when the first URL needs it,
in a task of its own, and closed with the transfers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import Any, Final, cast

import anyio
from anyio import to_thread
from anyio.abc import TaskGroup

from loadmaster.errors import InvalidSite, StorageError
from loadmaster.storage.base import Storage, StorageFactory, StorageOptions
from loadmaster.storage.local import LocalStorage

ENTRY_POINTS: Final = "loadmaster.storages"

CLOSE_SECONDS: Final = 10.0
"""How long storages may take to close."""

OURS: Final[Mapping[str, tuple[tuple[str, str], ...]]] = MappingProxyType(
    {
        "file": (("loadmaster.storage.local:open_storage", ""),),
        **dict.fromkeys(("http", "https", "dav", "davs"), (("loadmaster.storage.http:open_http", "http"),)),
        "s3": (("loadmaster.storage.s3:open_s3", "s3"), ("loadmaster.storage.objects:open_amazon", "objects")),
        "gs": (("loadmaster.storage.objects:open_google", "objects"),),
        **dict.fromkeys(("az", "abfs", "abfss"), (("loadmaster.storage.objects:open_azure", "objects"),)),
        **dict.fromkeys(("root", "roots", "xroot"), (("loadmaster.storage.xrootd:open_storage", "xrootd"),)),
    }
)
"""Scheme -> factories, as `module:function`, each with the extra that brings what it needs; the first that is there."""

_ALSO: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "https": ("http",),
        "dav": ("http",),
        "davs": ("dav", "https", "http"),
        "roots": ("root",),
        "xroot": ("root",),
        "abfs": ("az",),
        "abfss": ("abfs", "az"),
    }
)
"""Whose words count for a scheme that has no table of its own in the site's file, the first that has one."""


@dataclass(eq=False, slots=True)
class _Kind:
    ready: anyio.Event = field(default_factory=anyio.Event)
    storage: Storage | None = None
    error: str = ""
    of_site: bool = False
    """Whether it is the site's configuration that is wrong."""


class Storages:
    """The storages of a site, opened as they are needed."""

    def __init__(
        self,
        group: TaskGroup,
        given: Mapping[str, Storage],
        words: Mapping[str, Mapping[str, Any]],
        streams: Callable[[str], int],
        file: str = "",
    ) -> None:
        """`streams`: how many files at once, by the scheme; `file`: where the words are written, if it is in one."""
        self._group = group
        self._given = dict(given)
        if "file" not in words:
            self._given.setdefault("file", LocalStorage(2 * streams("file")))
        self._words = words
        self._streams = streams
        self._file = file
        self._kinds: dict[str, _Kind] = {}
        self._closing = anyio.Event()
        self._open = 0
        self._all_closed = anyio.Event()

    def __repr__(self) -> str:
        return ", ".join(sorted({*self._given, *self._kinds}))

    async def for_url(self, url: str) -> Storage:
        """The storage a URL is for. Raises `StorageError` when there is none, or it cannot be opened.

        `InvalidSite`, which names the file, the table and the word, when it does not understand what the site says.
        """
        scheme = url.partition("://")[0]
        if scheme in self._given:
            return self._given[scheme]
        kind = self._kinds.get(scheme)
        if kind is None:
            kind = self._kinds[scheme] = _Kind()
            self._open += 1
            self._group.start_soon(self._keep_open, scheme, kind)
        await kind.ready.wait()
        if kind.of_site:
            raise InvalidSite(kind.error)
        if kind.storage is None:
            raise StorageError(url, kind.error)
        return kind.storage

    async def close(self) -> None:
        """Close what is open, and wait for it. Cancellation does not keep it from being closed, time does."""
        self._closing.set()
        if self._open:
            with anyio.move_on_after(CLOSE_SECONDS, shield=True):
                await self._all_closed.wait()

    async def _keep_open(self, scheme: str, kind: _Kind) -> None:
        table = next((name for name in (scheme, *_ALSO.get(scheme, ())) if self._words.get(name)), scheme)
        try:
            with anyio.CancelScope(shield=True):  # it is `close` that ends it
                factory = await to_thread.run_sync(_find, scheme)
                words = self._words.get(table, {})
                async with factory(StorageOptions(scheme, self._streams(scheme), words)) as kind.storage:
                    kind.ready.set()
                    await self._closing.wait()
                    kind.storage = None
        except LookupError as exc:
            kind.error = await to_thread.run_sync(_none_for, exc, self._given)
        except ImportError as exc:
            kind.error = _missing(scheme, exc)
        except (ValueError, InvalidSite) as exc:
            # A storage names the table as its scheme; the words may be another's.
            told = str(exc).replace(f"[storage.{scheme}]", f"[storage.{table}]")
            told = told if f"[storage.{table}]" in told else f"[storage.{table}] {told}"
            kind.error, kind.of_site = f"{self._file}: {told}" if self._file else told, True
        except StorageError as exc:
            kind.error = f"[storage.{table}] {exc}"
        finally:
            kind.ready.set()
            self._open -= 1
            if not self._open:
                self._all_closed.set()


def unserved(scheme: str) -> str | None:
    """Why nobody here serves a scheme: there is no such storage, or what it needs is not installed; None if somebody does.

    Blocks, while it is loaded.
    """
    try:
        _find(scheme)
    except LookupError as exc:
        return _none_for(exc)
    except ImportError as exc:
        return _missing(scheme, exc)
    return None


def _find(scheme: str) -> StorageFactory:
    """The factory of a scheme. Raises LookupError when nobody offers one, ImportError when what it needs is missing."""
    from importlib.metadata import entry_points  # slow to import, and seldom needed

    for entry in entry_points(group=ENTRY_POINTS, name=scheme):
        return cast(StorageFactory, entry.load())
    if scheme not in OURS:
        raise LookupError(f"no storage for {scheme}://")
    first: ImportError | None = None
    for place, _ in OURS[scheme]:
        module, _, function = place.partition(":")
        try:
            return cast(StorageFactory, getattr(import_module(module), function))
        except ImportError as exc:
            first = first or exc
    raise first or LookupError(scheme)


def _none_for(error: LookupError, given: Iterable[str] = ()) -> str:
    """That there is no storage, and which there are."""
    from importlib.metadata import entry_points  # as above

    known = {*given, *OURS, *entry_points(group=ENTRY_POINTS).names}
    return f"{error.args[0]}; there is {'://, '.join(sorted(known))}://"


def _missing(scheme: str, error: ImportError) -> str:
    """What is not there, and what to install."""
    missing = next((exc for exc in _causes(error) if isinstance(exc, ModuleNotFoundError)), None)
    told = f"{missing.name} is not installed" if missing is not None else str(error)
    extras = " or ".join(f"pip install 'loadmaster[{extra}]'" for _, extra in OURS.get(scheme, ()) if extra)
    return f"{told}: {extras}" if extras else told


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__

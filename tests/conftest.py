"""Every asynchronous test runs on asyncio, on uvloop and on trio, may not block the loop, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import os
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from blockbuster import blockbuster_ctx

import loadmaster
from loadmaster import JobDescription, JobResult, Site, run_job

BACKENDS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    pytest.param(("trio", {}), id="trio"),
]

POOLED_THREADS = ("AnyIO worker thread", "Trio thread")
"""Idle threads the event loops keep for a while; not ours to end."""


@pytest.fixture(params=BACKENDS)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="session", autouse=True)
def uvloop_has_its_pipe() -> None:
    """libuv opens one pipe for signals in the life of a process; have it before anybody counts descriptors."""
    anyio.run(anyio.sleep, 0, backend="asyncio", backend_options={"use_uvloop": True})


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process, thread, descriptor or temporary file outlives a test."""
    scratch = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    before = _descriptors(), _children(), set(threading.enumerate())
    yield
    gc.collect()
    descriptors, children, threads = before
    assert _children() - children == set(), "a test left processes behind"
    left = [t for t in set(threading.enumerate()) - threads if not t.name.startswith(POOLED_THREADS)]
    assert left == [], "a test left threads behind"
    assert _descriptors() - descriptors == set(), "a test left descriptors open"
    files = [path for path in scratch.rglob("*") if not path.is_dir()]
    assert files == [], "a test left files in the temporary directory"


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Around each asynchronous test on asyncio: a detector of blocking calls in our package, and a look at its tasks."""
    test = pyfuncitem.obj
    if inspect.iscoroutinefunction(test) and pyfuncitem.callspec.params.get("anyio_backend", ("", {}))[0] == "asyncio":
        pyfuncitem.obj = _watched(test)
    return (yield)


def _watched(test: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(test)
    async def watched(*args: Any, **kwargs: Any) -> None:
        before = asyncio.all_tasks()
        with blockbuster_ctx([loadmaster]):
            await test(*args, **kwargs)
        left = asyncio.all_tasks() - before
        assert left == set(), "a test left tasks behind"

    return watched


def _descriptors() -> set[tuple[str, str]]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
        except FileNotFoundError:
            continue
    return found


def _children() -> set[int]:
    me = Path("/proc/self/task")
    return {int(pid) for task in me.iterdir() for pid in (task / "children").read_text().split()}


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """Where work directories are made; empty again at the end of the test."""
    root = tmp_path / "root"
    root.mkdir()
    yield root
    assert [path.name for path in root.iterdir()] == [], "a test left work directories behind"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where outputs go that have no other target."""
    return tmp_path / "out"


Fly = Callable[..., Any]


@pytest.fixture
def fly(root: Path, out: Path) -> Fly:
    """Run a job of a few words: `await fly(executable="/bin/true")`; options of `run_job` go into `options`."""

    async def fly(options: dict[str, Any] | None = None, **words: Any) -> JobResult:
        options = {"site": Site(output_directory=str(out)), "root": root, **(options or {})}
        return await run_job(JobDescription(**{"executable": "/bin/true", **words}), **options)

    return fly


def sh(script: str) -> dict[str, Any]:
    """The words of a job that runs a piece of shell."""
    return {"executable": "/bin/sh", "arguments": ["-c", script]}

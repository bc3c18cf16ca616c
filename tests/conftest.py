"""Every asynchronous test runs on asyncio, on uvloop and on trio, may not block the loop, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from blockbuster import blockbuster_ctx
from hypothesis import settings

import loadmaster
from loadmaster import JobDescription, JobResult, Site, run_job, threads
from loadmaster.workdir import Workdir
from loadmaster.world import World

# What CI says of a change does not depend on chance; everybody else's runs go on looking.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

BACKENDS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    pytest.param(("trio", {}), id="trio"),
]

POOLED_THREADS = ("AnyIO worker thread", "Trio thread", threads.NAME)
"""Idle threads that are kept for a while."""


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
    for _ in range(100):  # a thread lets go of what it has done a moment after the result is known
        if _descriptors() <= descriptors:
            break
        time.sleep(0.01)
        gc.collect()
    assert _descriptors() - descriptors == set(), "a test left descriptors open"
    files = [path for path in scratch.rglob("*") if not path.is_dir()]
    assert files == [], "a test left files in the temporary directory"


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Around each asynchronous test on asyncio: a detector of blocking calls in our package, and a look at its tasks."""
    test = pyfuncitem.obj
    backend: Any = pyfuncitem.callspec.params.get("anyio_backend") if inspect.iscoroutinefunction(test) else None
    if backend is not None and backend[0] == "asyncio":
        pyfuncitem.obj = _watched(test)
    return (yield)


ASIDE = {"_live", "run", "_through_descriptor", "read_at", "write_at"}
"""What runs in a loop of its own, in a thread that is there to block."""


def _watched(test: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(test)
    async def watched(*args: Any, **kwargs: Any) -> None:
        before = asyncio.all_tasks()
        with blockbuster_ctx([loadmaster], excluded_modules=["loadmaster.conformance"]):
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
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # an idle worker thread that has just ended
            found.update(map(int, (task / "children").read_text().split()))
    return found


SERVED = (
    "test_curl.py",
    "test_objects.py",
    "test_xrootd.py",
    "test_storage.py",
    "test_early.py",
    "test_watch.py",
    "test_adopt.py",
    "test_takeover.py",
    "test_diracx.py",
    "test_diracx_client.py",
)
"""Of these files' tests uvloop's are part of the long run only: their storages have threads of their own, whichever loop
waits for them, or each starts an agent, or needs a server's answers,
and the run has to be over in ten minutes on two cores."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave uvloop out where asyncio and trio tell as much."""
    for item in items:
        if item.path.name in SERVED and "uvloop" in item.name:
            item.add_marker(pytest.mark.long)


def pytest_collection_finish() -> None:
    """What is there by now stays, and need not be gone through after each test: that took more than half of the run."""
    gc.collect()
    gc.freeze()


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

    async def fly(
        options: dict[str, Any] | None = None, *, world: dict[str, Any] | None = None, **words: Any
    ) -> JobResult:
        site = Site(output_directory=str(out), payload=World(**(world or {})))
        options = {"site": site, "root": root, **(options or {})}
        return await run_job(JobDescription(**{"executable": "/bin/true", **words}), **options)

    return fly


def sh(script: str) -> dict[str, Any]:
    """The words of a job that runs a piece of shell."""
    return {"executable": "/bin/sh", "arguments": ["-c", script]}


# -- for the mechanisms ------------------------------------------------------------------------------------------

TEMPORARY = tempfile.gettempdir()
"""As it is outside the tests: another user may go there."""

NOBODY = 65534


@pytest.fixture
def workdir(root: Path) -> Iterator[Workdir]:
    """A job's directory."""
    workdir = Workdir.make(root, "job")
    yield workdir
    workdir.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte. Takes a system administrator."""
    disk = tmp_path / "small disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "loadmaster", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a disk can only be mounted by root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


BECOME_ORDINARY = f"""
import ctypes, os, anyio, loadmaster.logbook, loadmaster.payload.ready
from loadmaster import *  # which loads all of it
loadmaster.PayloadSpec(command="true")  # models are made when they are used
anyio.run(anyio.to_thread.run_sync, int)  # everything is imported before we lose sight of it
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid({NOBODY})
    os.setuid({NOBODY})
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # dumpable again, as a process that never was root: /proc/self is its own
"""


@pytest.fixture
def as_ordinary_user() -> Iterator[Callable[[str], str]]:
    """Run a piece of Python as somebody whom permissions stop, in an empty directory of theirs; what it prints.

    The process drops its rights itself: others may have no way to the interpreter.
    """
    with tempfile.TemporaryDirectory(dir=TEMPORARY) as home:
        if os.geteuid() == 0:
            os.chown(home, NOBODY, NOBODY)

        def run(script: str) -> str:
            words = [sys.executable, "-I", "-c", BECOME_ORDINARY + script]
            done = subprocess.run(words, cwd=home, capture_output=True, text=True, timeout=30)
            assert done.returncode == 0, done.stderr
            return done.stdout

        yield run


async def until(fact: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for something that has no edge to wait for."""
    with anyio.fail_after(seconds):
        while not fact():
            await anyio.sleep(0.002)

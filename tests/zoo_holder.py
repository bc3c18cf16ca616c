"""Run one hostile payload where it cannot get away from the test, and see what got away from loadmaster.

    holder ─┬─ driver (an ordinary user): loadmaster ── payload ...
            └─ launcher, for the payload that asks another daemon

The holder is the first process of a pid namespace where that is allowed, and a sub-reaper where it is not: what a
payload leaves comes to it, is counted, and is killed. Nothing outside is ever signalled. An order comes in by stdin,
the sighting goes out by stdout, both as JSON. It is executed by its path and imports the package from a copy that the
driver may read.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

GRACE_SECONDS: Final = 0.3
"""Between TERM and KILL. Short: t26 has us wait for it."""

LATE_SECONDS: Final = 0.3
"""A sign of life so long after the end is an escape (the zoo's rule); before, it may have been on its way."""

LOOK_SECONDS: Final = 0.5
"""When we look: time for ten late signs more."""

MAX_PROCESSES: Final = 400
"""For the fork bomb, which refuses to run without a limit of at most 2000; more of them only take longer to test."""

MAX_FILE_BYTES: Final = 64 << 20
"""For the flood, which would write some gigabytes."""

PR_SET_DUMPABLE: Final = 4
PR_SET_CHILD_SUBREAPER: Final = 36


@dataclass(frozen=True, slots=True)
class Order:
    """What to run. `payload` is started and killed; `job` goes through `run_job`."""

    home: str
    """A directory of the driver's user, for everything."""
    zoo: str
    package: str
    """Where a copy of the package is."""
    path: list[str]
    """Where what it needs is."""
    python: str
    """An interpreter the user may execute."""
    user: int
    payload: str = ""
    containment: str = ""
    isolation: str = "none"
    backend: str = "asyncio"
    to_its_end: bool = False
    """Whether the payload is waited for and not killed."""
    job: dict[str, Any] | None = None


@dataclass(slots=True)
class Sighting:
    """What was seen."""

    refused: str = ""
    """Why the node does not allow the containment."""
    fenced: bool = False
    """Whether the kernel keeps the payload from signalling and tracing anybody outside."""
    ready: bool = False
    """Whether the attack was made."""
    driver_survived: bool = True
    end_seconds: float = 0.0
    """How long ending it took; for a job, all of it."""
    late: list[str] = field(default_factory=list)
    """Who gave a sign of life after the end."""
    left: list[str] = field(default_factory=list)
    """Who was still there after the end."""
    outcome: dict[str, Any] = field(default_factory=dict)
    """The payload's outcome, or the job's result."""
    out: str = ""
    workdirs: list[str] = field(default_factory=list)

    @property
    def escaped(self) -> bool:
        """Whether anything outlived its end."""
        return bool(self.late or self.left)


# -- the holder --------------------------------------------------------------------------------------------------


def hold(order: Order) -> Sighting:
    """Run it, look, and leave nothing."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    home = Path(order.home)
    (home / "zoo").mkdir()
    for folder in (home, home / "zoo"):
        os.chown(folder, order.user, order.user)
    with _Launcher(order) as launcher:
        seen, over = _drive_apart(order)
        if order.payload:  # the one wait for time itself: what got away shows by what it does later
            time.sleep(max(0.0, over + LOOK_SECONDS - time.time()))
        zoo_dir = _zoo_dir(order)
        seen.ready = (zoo_dir / "ready").exists()
        seen.late = sorted(file.name for file in zoo_dir.glob("alive/*") if file.stat().st_mtime > over + LATE_SECONDS)
        seen.left = sorted(name for pid, name in _below(os.getpid()).items() if pid != launcher)
    while below := _below(os.getpid()):  # again and again: they may be forking
        for pid in below:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _reap()
    return seen


def _zoo_dir(order: Order) -> Path:
    """The payload's ZOO_DIR: in its work directory where it sees, or may write to, nothing else."""
    if order.isolation == "none":
        return Path(order.home, "zoo")
    return next(Path(order.home, "root").glob("*/zoo"), Path(order.home, "root", "zoo"))


class _Launcher:
    """The daemon that starts things for others, where the payload asks for it."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> int:
        if not self.order.payload.startswith("t18"):
            return 0
        where = f"{self.order.home}/at.sock"
        self.process = subprocess.Popen(
            [self.order.python, f"{self.order.zoo}/_launcher.py", str(self.order.user)],
            stdin=subprocess.PIPE, env={"ZOO_AT": where},
        )  # fmt: skip
        while not os.path.exists(where):
            time.sleep(0.005)
        return self.process.pid

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.communicate()


def _drive_apart(order: Order) -> tuple[Sighting, float]:
    """Let a process of the user do it; what it saw, and when the payload's end was over."""
    # A socket: what is a pipe, s02 opens through /proc and writes to, where the driver is its own user's.
    results, results_of_driver = socket.socketpair()
    driver = os.fork()
    if driver == 0:
        try:
            results.close()
            for standard in (0, 1):  # pipes of ours, which s02 would write to as well
                os.dup2(os.open(os.devnull, os.O_RDWR), standard)
            os.setsid()
            found = asdict(_drive(order))
            results_of_driver.sendall(json.dumps({"seen": found, "over": time.time()}, default=str).encode())
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    results_of_driver.close()
    os.waitpid(driver, 0)
    over = time.time()
    text = results.recv(1 << 16)
    results.close()
    if not text:
        return Sighting(driver_survived=False), over
    answer = json.loads(text)
    return Sighting(**answer["seen"]), answer["over"]


def _below(top: int) -> dict[int, str]:
    """Everybody below a process who has not ended, by name. By the parents in all of /proc: not as loadmaster does it."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with suppress(FileNotFoundError, ProcessLookupError):
                name, _, rest = Path(f"/proc/{entry}/stat").read_bytes().decode(errors="replace").rpartition(")")
                state, parent = rest.split()[:2]
                threads = len(os.listdir(f"/proc/{entry}/task"))
                parents[int(entry)] = int(parent)
                if state not in "ZX" or threads > 1:  # a dead leader with living threads is alive
                    names[int(entry)] = f"{name.partition('(')[2]} {state}"
    known = {top}
    while more := {pid for pid, parent in parents.items() if parent in known} - known:
        known |= more
    return {pid: name for pid, name in names.items() if pid in known - {top}}


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


# -- the driver --------------------------------------------------------------------------------------------------


def _drive(order: Order) -> Sighting:
    """Become the user and do it by loadmaster. Everything is imported before: they may have no way to it."""
    sys.path[:0] = [order.package, *order.path]
    import anyio

    from loadmaster import JobDescription, run_job

    work: Callable[[Order], Any] = _run_job if order.job is not None else _start_and_kill

    async def warm_up() -> None:
        await run_job(JobDescription(executable="/bin/true"), root=Path(order.home, "warm"))

    anyio.run(warm_up, backend=order.backend)
    resource.setrlimit(resource.RLIMIT_NPROC, (MAX_PROCESSES, MAX_PROCESSES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.getuid() != order.user:
        os.setgroups([])
        os.setgid(order.user)
        os.setuid(order.user)
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # as a process that never was root
    os.chdir(order.home)
    for name in ("root", "out"):
        os.mkdir(name, 0o700)
    leaky = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(leaky, True)  # as careless embedders have them; s03 looks for it
    seen: Sighting = anyio.run(work, order, backend=order.backend)
    seen.workdirs = os.listdir("root")
    return seen


async def _start_and_kill(order: Order) -> Sighting:
    import anyio

    from loadmaster.description import Containment, Isolation
    from loadmaster.payload.containment import start_contained
    from loadmaster.payload.launch import Launch, Refused
    from loadmaster.payload.output import Output
    from loadmaster.payload.supervise import Payload
    from loadmaster.result import EndedBy
    from loadmaster.workdir import Workdir

    workdir = Workdir.make(Path(order.home, "root"), "job")
    zoo, zoo_dir = order.zoo, Path(order.home, "zoo")
    if order.isolation != "none":
        zoo, zoo_dir = f"{workdir.path}/payloads", workdir.path / "zoo"
        shutil.copytree(order.zoo, zoo)
        zoo_dir.mkdir()
    env = {
        "PATH": "/usr/bin:/bin",
        "ZOO_DIR": str(zoo_dir),
        "ZOO_AT": f"{order.home}/at.sock",
        "ZOO_UP": "2",
        "PYTHONUNBUFFERED": "1",
    }
    output = Output(workdir, "out", "err")
    launch = Launch(
        [order.python, f"{zoo}/{order.payload}.py"], env, workdir.path, output.stdout, output.stderr, GRACE_SECONDS,
        isolation=Isolation(order.isolation),
    )  # fmt: skip
    try:
        payload = Payload(await start_contained(launch, [Containment(order.containment)]), output)
    except Refused as exc:
        return Sighting(refused=str(exc))
    with anyio.move_on_after(30):
        while not payload.tree.gone and (order.to_its_end or not (zoo_dir / "ready").exists()):
            await anyio.sleep(0.005)
    begun = time.monotonic()
    outcome = await payload.end(EndedBy.KILL, grace_seconds=GRACE_SECONDS)
    took = time.monotonic() - begun
    out = (workdir.path / "out").read_text() + (workdir.path / "err").read_text()
    fenced = getattr(payload.tree, "fenced", False)
    return Sighting(fenced=fenced, end_seconds=took, outcome=asdict(outcome), out=out[-2000:])


async def _run_job(order: Order) -> Sighting:
    from loadmaster import JobDescription, JobHandle, Site, run_job

    handle = JobHandle()
    begun = time.monotonic()
    result = await run_job(
        JobDescription.model_validate(order.job), site=Site(output_directory=f"{order.home}/out"),
        root=Path(order.home, "root"), handle=handle, heartbeat_seconds=0.1,
    )  # fmt: skip
    took = time.monotonic() - begun
    outputs = Path(order.home, "out")
    out = "".join(file.read_bytes()[:2000].decode() for file in outputs.rglob("std.out"))
    return Sighting(end_seconds=took, outcome=result.to_json(), out=out)


if __name__ == "__main__":
    sighting = hold(Order(**json.loads(sys.stdin.read())))
    sys.stdout.write(json.dumps(asdict(sighting)))

"""One contender of `throughput.py`, in a process of its own: what it took for so many short jobs, as JSON.

    python benchmarks/_contenders.py NAME true|copy JOBS CORES DIRECTORY

Each runs its jobs once in a small number first, which is not counted, then all of them: `/bin/true`, or `/bin/cp` of one
file of 4 KiB to another. CPU is that of this process and of everything below it, what was started before the jobs included.
Runs with the interpreter of the contender's own installation: nothing is imported before it is known who it is.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

WARM_UP = 20
PR_SET_CHILD_SUBREAPER = 36
TICKS = os.sysconf("SC_CLK_TCK")

Batch = Callable[[int], None]
"""Run that many jobs."""


class Work:
    """Where the files of the jobs are, and their commands."""

    def __init__(self, kind: str, cores: int, directory: Path) -> None:
        self.copies = kind == "copy"
        self.cores = cores
        self.directory = directory
        self.input = directory / "input"
        self.input.write_bytes(os.urandom(4096))
        self.outputs, self.logs = directory / "outputs", directory / "logs"
        self.outputs.mkdir()
        self.logs.mkdir()
        self.done = 0

    def numbers(self, count: int) -> range:
        """So many numbers that no job had before."""
        self.done += count
        return range(self.done - count, self.done)

    def argv(self, number: int) -> list[str]:
        """The job, for those who do not move files: it does by itself."""
        return ["/bin/cp", str(self.input), str(self.outputs / str(number))] if self.copies else ["/bin/true"]

    def check(self, count: int) -> None:
        """Whether all is there."""
        assert not self.copies or len(os.listdir(self.outputs)) == count, f"{len(os.listdir(self.outputs))} of {count}"


# -- nothing but spawning ----------------------------------------------------------------------------------------


def spawn_loop(cores: int, jobs: Iterator[Callable[[], tuple[subprocess.Popen[bytes], Callable[[], None]]]]) -> None:
    """So many at a time; each gives its process, and what is to be done when that has ended."""
    running: dict[int, tuple[subprocess.Popen[bytes], Callable[[], None]]] = {}
    poll = select.epoll()
    more = True
    while more or running:
        while more and len(running) < cores:
            if (job := next(jobs, None)) is None:
                more = False
                break
            process, after = job()
            pidfd = os.pidfd_open(process.pid)
            poll.register(pidfd, select.EPOLLIN)
            running[pidfd] = process, after
        for pidfd, _ in poll.poll() if running else ():
            process, after = running.pop(pidfd)
            poll.unregister(pidfd)
            os.close(pidfd)
            assert process.wait() == 0
            after()
    poll.close()


@contextmanager
def bare(work: Work) -> Iterator[Batch]:
    """Popen and a pidfd, output to /dev/null."""

    def one(number: int) -> tuple[subprocess.Popen[bytes], Callable[[], None]]:
        null = subprocess.DEVNULL
        return subprocess.Popen(work.argv(number), stdin=null, stdout=null, stderr=null), lambda: None

    yield lambda count: spawn_loop(work.cores, (lambda n=n: one(n) for n in work.numbers(count)))  # type: ignore[misc]


@contextmanager
def floor(work: Work, *, journal: bool = True) -> Iterator[Batch]:
    """By hand: a work directory, the input copied into it, two logs, a session, a synced line at start and end, the output
    moved out, everything removed."""
    root = work.directory / "floor"
    root.mkdir(exist_ok=True)
    file = os.open(work.directory / "journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(number: int, what: str) -> None:
        if journal:
            os.write(file, json.dumps({"job": number, "event": what, "time": time.time()}).encode() + b"\n")
            os.fdatasync(file)

    def one(number: int) -> tuple[subprocess.Popen[bytes], Callable[[], None]]:
        directory = root / str(number)
        directory.mkdir()
        argv = ["/bin/true"]
        if work.copies:
            shutil.copyfile(work.input, directory / "input")
            argv = ["/bin/cp", "input", "output"]
        with open(directory / "std.out", "wb") as out, open(directory / "std.err", "wb") as err:
            process = subprocess.Popen(
                argv, cwd=directory, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        note(number, "started")

        def after() -> None:
            if work.copies:
                os.replace(
                    shutil.copyfile(directory / "output", work.outputs / f".{number}"), work.outputs / str(number)
                )
            note(number, "ended")
            shutil.rmtree(directory)

        return process, after

    try:
        yield lambda count: spawn_loop(work.cores, (lambda n=n: one(n) for n in work.numbers(count)))  # type: ignore[misc]
    finally:
        os.close(file)


# -- peers -------------------------------------------------------------------------------------------------------


@contextmanager
def gnu_parallel(work: Work) -> Iterator[Batch]:
    """With a log of the jobs and a directory with the output of each. It starts anew for each batch."""

    def batch(count: int) -> None:
        numbers = work.numbers(count)
        command = f"/bin/cp {work.input} {work.outputs}/{{}}" if work.copies else "/bin/true"
        subprocess.run(
            ["parallel", f"-j{work.cores}", "--joblog", str(work.logs / "joblog"), "--results",
             str(work.logs / f"results{numbers[0]}"), command],
            input="\n".join(map(str, numbers)).encode(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True,
            env={**os.environ, "PARALLEL_HOME": str(work.directory), "HOME": str(work.directory)},
        )  # fmt: skip

    yield batch


@contextmanager
def parsl(work: Work, executor: str) -> Iterator[Batch]:
    """Its `bash_app`s, each with the output in two files."""
    import parsl as library  # type: ignore[import-not-found]
    from parsl.executors import HighThroughputExecutor, ThreadPoolExecutor  # type: ignore[import-not-found]
    from parsl.providers import LocalProvider  # type: ignore[import-not-found]

    threads = ThreadPoolExecutor(max_threads=work.cores)
    processes = HighThroughputExecutor(
        max_workers_per_node=work.cores, address="127.0.0.1", provider=LocalProvider(init_blocks=1, max_blocks=1)
    )
    config = library.Config(
        executors=[threads if executor == "threads" else processes], run_dir=str(work.directory / "parsl"),
        usage_tracking=0, strategy="none",
    )  # fmt: skip
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where its worker programs are
    with library.load(config):

        @library.bash_app  # type: ignore[untyped-decorator]
        def job(command: str, stdout: str, stderr: str) -> str:
            return command

        def batch(count: int) -> None:
            futures = [
                job(" ".join(work.argv(n)), stdout=str(work.logs / f"{n}.out"), stderr=str(work.logs / f"{n}.err"))
                for n in work.numbers(count)
            ]
            assert all(future.result() == 0 for future in futures)

        yield batch


@contextmanager
def dask(work: Work) -> Iterator[Batch]:
    """Its scheduler with a pool of processes, each job with the output in two files."""
    from concurrent.futures import ProcessPoolExecutor

    from dask import compute, delayed  # type: ignore[import-not-found]

    with ProcessPoolExecutor(work.cores) as pool:

        def batch(count: int) -> None:
            jobs = [delayed(logged)(work.argv(n), str(work.logs / str(n))) for n in work.numbers(count)]
            assert not any(compute(*jobs, scheduler="processes", pool=pool))

        yield batch


def logged(argv: list[str], path: str) -> int:
    """A process with its output in two files; its exit code."""
    with open(f"{path}.out", "wb") as out, open(f"{path}.err", "wb") as err:
        return subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err).returncode


# -- ours --------------------------------------------------------------------------------------------------------


@contextmanager
def node(work: Work, *, backend: str = "asyncio", session: bool = False, **words: object) -> Iterator[Batch]:
    """A node with as many slots as cores, in its usual containment, or in none but a session."""
    import anyio

    from loadmaster import Containment, JobDescription, Ledger, Node, Site, World

    site = Site(
        output_directory=str(work.outputs), payload=World(containment=[Containment.SESSION]) if session else World()
    )

    def job(number: int) -> JobDescription:
        if not work.copies:
            return JobDescription(job_id=f"job{number}", executable="/bin/true")
        return JobDescription(
            job_id=f"job{number}", executable="/bin/cp", arguments=["input", "output"], input_data=[str(work.input)],
            output_data=[{"pattern": "output", "target": str(work.outputs / str(number))}],
        )  # fmt: skip

    with anyio.from_thread.start_blocking_portal(
        "trio" if backend == "trio" else "asyncio", {"use_uvloop": True} if backend == "uvloop" else None
    ) as portal:
        made = Node(ledger=Ledger(work.cores), site=site, root=work.directory / "work", **words)  # type: ignore[arg-type]
        with portal.wrap_async_context_manager(made) as running:

            async def run(count: int) -> None:
                handles = [running.submit(job(number)) for number in work.numbers(count)]
                for handle in handles:
                    (await handle.wait()).raise_for_status()

            yield lambda count: portal.call(run, count)


# -- measuring ---------------------------------------------------------------------------------------------------


def tree_seconds(pid: int) -> float:
    """CPU of a process and of all below it, those that were waited for included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    seconds = sum(map(int, fields[11:15])) / TICKS
    for task in os.listdir(f"/proc/{pid}/task"):
        for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
            try:
                seconds += tree_seconds(int(child))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return seconds


def open_contender(name: str, work: Work) -> object:
    """The contender, to be entered."""
    match name.split("-"):
        case ["bare"]:
            return bare(work)
        case ["floor", *without]:
            return floor(work, journal=not without)
        case ["parallel"]:
            return gnu_parallel(work)
        case ["parsl", executor]:
            return parsl(work, executor)
        case ["dask"]:
            return dask(work)
        case ["node", *how]:
            backend = next(iter({"uvloop", "trio"} & {*how}), "asyncio")
            words = {"journal": work.directory / "our journal"} if "journal" in how else {}
            return node(work, backend=backend, session="session" in how, **words)
    raise SystemExit(f"nobody is called {name}")


def main() -> None:
    name, kind, count, cores, directory = sys.argv[1:]
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what a contender lets go of is still counted
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    work = Work(kind, int(cores), Path(directory))
    with open_contender(name, work) as batch:  # type: ignore[attr-defined]
        batch(WARM_UP)
        cpu, began = tree_seconds(os.getpid()), time.perf_counter()
        batch(int(count))
        found = {"seconds": time.perf_counter() - began, "cpu_seconds": tree_seconds(os.getpid()) - cpu}
    work.check(int(count) + WARM_UP)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""Where a node's jobs come from: whoever has them, a directory of job files, a JSON Lines file, an iterator."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Generator, Iterator
from hashlib import blake2b
from itertools import count, islice
from pathlib import Path
from typing import Final, Protocol

import anyio
from anyio import to_thread

from loadmaster.description import JobDescription
from loadmaster.errors import InvalidJob

LINE_BYTES: Final = 4_000_000
"""No description of a job is longer."""

LINES_AT_ONCE: Final = 100


class JobSource(Protocol):
    """Whoever has jobs to give: a workload management system, a queue, a file."""

    async def next(self, free: int) -> JobDescription | None:
        """The next job, or None: there are no more. It may wait, and several may ask at once.

        `free`: how many jobs the node would like to have now, this one included. Cancellation takes no job.
        """
        ...

    async def accepted(self, job: JobDescription) -> None:
        """The node has the job."""
        ...

    async def give_back(self, job: JobDescription) -> None:
        """The node will not run it; nothing of it was computed."""
        ...


class Iterated:
    """The jobs of anything that gives them one after the other, asynchronously. What is given back is in `returned`."""

    def __init__(self, jobs: AsyncIterable[JobDescription]) -> None:
        self._jobs: AsyncIterator[JobDescription] = aiter(jobs)
        self._turn = anyio.Lock()
        self._over = False
        self.returned: list[JobDescription] = []

    async def next(self, free: int) -> JobDescription | None:
        """The next one; who asks at the same time waits, for an iterator has one hand."""
        async with self._turn:
            if self._over:
                return None
            try:
                return await anext(self._jobs)
            except StopAsyncIteration:
                self._over = True
                return None

    async def accepted(self, job: JobDescription) -> None:
        """Nothing to tell."""

    async def give_back(self, job: JobDescription) -> None:
        """Keep it in `returned`."""
        self.returned.append(job)


class Nothing:
    """No jobs: for a node that only goes on with those it has."""

    def __init__(self) -> None:
        self.refused: list[str] = []
        self.exhausted = True

    async def next(self, free: int) -> JobDescription | None:
        """None."""
        return None

    async def accepted(self, job: JobDescription) -> None:
        """Never asked."""

    async def give_back(self, job: JobDescription) -> None:
        """Never asked."""


class _Files:
    """Jobs that are read in a thread, many at a time. Relative paths are taken from where the file is."""

    def __init__(self, read: Iterator[tuple[str, bytes]], directory: Path, outputs: Path) -> None:
        self._read = read
        self._directory, self._outputs = directory, outputs
        self._there: deque[tuple[str, bytes]] = deque()
        self._turn = anyio.Lock()
        self.refused: list[str] = []
        """Why what stood there is no job, each with its place."""
        self.exhausted = False
        """Whether there is nothing more."""
        self.returned: list[JobDescription] = []

    async def next(self, free: int) -> JobDescription | None:
        """The next one that is a job; those that are none are in `refused`."""
        async with self._turn:
            while True:
                if not self._there:
                    self._there.extend(await to_thread.run_sync(self._some))
                if not self._there:
                    self.exhausted = True
                    return None
                place, text = self._there.popleft()
                try:
                    job = _described(text)
                    if "job_id" not in job.model_fields_set:  # the same one when it is read again
                        job = job.model_copy(update={"job_id": _name_of(place, text)})
                    return job.relative_to(self._directory, outputs=self._outputs)
                except InvalidJob as exc:
                    self.refused.append(f"{place}: {exc}")

    async def accepted(self, job: JobDescription) -> None:
        """Nothing to tell."""

    async def give_back(self, job: JobDescription) -> None:
        """Keep it in `returned`; the file is as it was."""
        self.returned.append(job)

    def _some(self) -> list[tuple[str, bytes]]:
        return list(islice(self._read, LINES_AT_ONCE))


class JobLines(_Files):
    """The jobs of a JSON Lines file, one description a line; relative target paths are taken from `outputs`."""

    def __init__(self, path: Path, *, outputs: Path) -> None:
        self._lines = _lines(path)
        super().__init__(self._lines, path.absolute().parent, outputs)

    def close(self) -> None:
        """Read no more."""
        self._lines.close()


class JobFiles(_Files):
    """The jobs of a directory: its files that end in `.json`, in the order of their names, as they are now."""

    def __init__(self, path: Path, *, outputs: Path) -> None:
        super().__init__(_texts(path), path.absolute(), outputs)


def _name_of(place: str, text: bytes) -> str:
    """What a job is called that has no id: by what it says, and where."""
    return blake2b(os.fsencode(os.path.basename(place)) + b"\0" + text.strip(), digest_size=6).hexdigest()


def _lines(path: Path) -> Generator[tuple[str, bytes], None, None]:
    with path.open("rb") as file:
        for number in count(1):
            line = file.readline(LINE_BYTES + 1)
            if not line:
                return
            if len(line) > LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(LINE_BYTES)
                yield f"{path}:{number}", b""
            elif line.strip():
                yield f"{path}:{number}", line


def _texts(path: Path) -> Iterator[tuple[str, bytes]]:
    for name in sorted(each.name for each in path.iterdir() if each.name.endswith(".json")):
        file = path / name
        try:
            if not file.is_file():  # a FIFO would hold us up for ever
                continue
            with file.open("rb") as stream:
                yield str(file), stream.read(LINE_BYTES + 1)
        except OSError as exc:
            yield str(file), f"{exc.strerror}".encode()


def _described(text: bytes) -> JobDescription:
    if not text or len(text) > LINE_BYTES:
        raise InvalidJob(f"longer than {LINE_BYTES} bytes")
    try:
        words = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise InvalidJob(f"not JSON: {exc}") from exc
    if not isinstance(words, dict):
        raise InvalidJob(f"an object {{...}} is expected, not {type(words).__name__}")
    return JobDescription.load(words)

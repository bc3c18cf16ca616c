"""Where a node's jobs come from: whoever has them, a directory of job files, a JSON Lines file, an iterator."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Generator, Iterator, Mapping
from hashlib import blake2b
from itertools import count, islice
from pathlib import Path
from typing import Any, Final, Protocol

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
        self.skipped: list[str] = []
        self.exhausted = True

    async def next(self, free: int) -> JobDescription | None:
        """None."""
        return None

    async def accepted(self, job: JobDescription) -> None:
        """Never asked."""

    async def give_back(self, job: JobDescription) -> None:
        """Never asked."""


Describe = Callable[[bytes], JobDescription]


def described(text: bytes) -> JobDescription:
    """The job of a text in JSON. Raises `InvalidJob`."""
    return JobDescription.load(read_object(text))


def read_object(text: bytes) -> Mapping[str, Any]:
    """The object of a text in JSON. Raises `InvalidJob`."""
    try:
        words = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise InvalidJob(f"not JSON: {exc}") from exc
    if not isinstance(words, dict):
        raise InvalidJob(f"an object {{...}} is expected, not {type(words).__name__}")
    return words


class _Files:
    """Jobs that are read in a thread, many at a time. Relative paths are taken from where the file is. `describe` makes a
    job of a text, or raises `InvalidJob`."""

    def __init__(self, read: Iterator[tuple[str, bytes]], directory: Path, outputs: Path, describe: Describe) -> None:
        self._read = read
        self._directory, self._outputs, self._describe = directory, outputs, describe
        self._places: dict[str, str] = {}  # by job id
        self._there: deque[tuple[str, bytes]] = deque()
        self._turn = anyio.Lock()
        self.refused: list[str] = []
        """Why what stood there is no job, each with its place."""
        self.skipped: list[str] = []
        """What was not looked at: it has no job file's name."""
        self.exhausted = False
        """Whether there is nothing more."""
        self.returned: list[JobDescription] = []

    async def next(self, free: int) -> JobDescription | None:
        """The next one that is a job; those that are none, or have the id of one before, are in `refused`."""
        async with self._turn:
            while True:
                if not self._there:
                    self._there.extend(await to_thread.run_sync(self._some))
                if not self._there:
                    self.exhausted = True
                    return None
                place, text = self._there.popleft()
                try:
                    if not text or len(text) > LINE_BYTES:
                        raise InvalidJob(f"longer than {LINE_BYTES} bytes")
                    job = self._describe(text)
                    if "job_id" not in job.model_fields_set:  # the same one when it is read again
                        job = job.model_copy(update={"job_id": _name_of(place, text)})
                    if (first := self._places.setdefault(job.job_id, place)) != place:
                        raise InvalidJob(f"there is a job {job.job_id} already: {first}")
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

    def __init__(self, path: Path, *, outputs: Path, describe: Describe = described) -> None:
        self._lines = _lines(path)
        super().__init__(self._lines, path.absolute().parent, outputs, describe)

    def close(self) -> None:
        """Read no more."""
        self._lines.close()


class JobFile(_Files):
    """The one job of a file, over as many lines as it has."""

    def __init__(self, path: Path, *, outputs: Path, describe: Describe = described) -> None:
        super().__init__(self._text(path), path.absolute().parent, outputs, describe)

    def _text(self, path: Path) -> Iterator[tuple[str, bytes]]:
        with path.open("rb") as stream:
            yield str(path), stream.read(LINE_BYTES + 1)


class JobFiles(_Files):
    """The jobs of a directory: its files that end in one of `endings`, in the order of their names, as they are now. The
    names of the others are in `skipped`, but for hidden ones."""

    def __init__(
        self, path: Path, *, outputs: Path, describe: Describe = described, endings: tuple[str, ...] = (".json",)
    ) -> None:
        super().__init__(self._texts(path, endings), path.absolute(), outputs, describe)

    def _texts(self, path: Path, endings: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
        for name in sorted(each.name for each in path.iterdir()):
            file = path / name
            try:
                if not name.endswith(endings) or not file.is_file():  # a FIFO would hold us up for ever
                    if not name.startswith("."):
                        self.skipped.append(name)
                    continue
                with file.open("rb") as stream:
                    yield str(file), stream.read(LINE_BYTES + 1)
            except OSError as exc:
                yield str(file), f"{exc.strerror}".encode()


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

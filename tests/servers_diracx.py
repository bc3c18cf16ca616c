"""A real DiracX server for tests, in an environment and a process of its own; and a proxy before it that loses things."""

from __future__ import annotations

import asyncio
import fcntl
import json
import sqlite3
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode, urlsplit
from urllib.request import Request, urlopen

import pytest

VERSION = "0.7.0"
PACKAGES = [
    *(f"diracx-{part}=={VERSION}" for part in ("core", "db", "logic", "routers", "tasks", "testing")),
    "moto[server]>=5",
    "uvicorn>=0.30",
]
INSTALL_SECONDS = 600
START_SECONDS = 180


def environment(cache: Path) -> Path:
    """The interpreter of an environment with DiracX in it, made once and kept. Skips where it cannot be made."""
    home = cache / f"diracx-{VERSION}-{sys.version_info[0]}.{sys.version_info[1]}"
    home.mkdir(parents=True, exist_ok=True)
    python, ready = home / "venv" / "bin" / "python", home / "ready"
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers of one run
        if not ready.exists():
            try:
                subprocess.run([sys.executable, "-m", "venv", "--clear", str(home / "venv")], check=True, timeout=120)
                words = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", *PACKAGES]
                subprocess.run([python, *words], check=True, timeout=INSTALL_SECONDS, stderr=subprocess.PIPE, text=True)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired, OSError) as exc:
                said = [line for line in str(getattr(exc, "stderr", "") or exc).splitlines() if line.strip()]
                pytest.skip(f"DiracX {VERSION} cannot be installed: {said[-1] if said else exc}")
            ready.touch()
    return python


@dataclass(frozen=True)
class Said:
    """One line of a job's history, as the server has it."""

    status: str
    minor: str
    application: str
    source: str
    time: datetime


class DiracxServer:
    """A server, and what users and administrators do there."""

    def __init__(self, home: Path, process: subprocess.Popen[str], url: str, key: str) -> None:
        self.home, self.url = home, url
        self._process, self._key = process, key
        self._tokens: dict[tuple[str, str], str] = {}

    def order(self, words: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(words + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, (self.home / "keeper.log").read_text()[-2000:]
        return answer.strip()

    def token(self, user: str, group: str) -> dict[str, Any]:
        words = urlencode({"preferred_username": user, "scope": f"vo:testvo group:{group}"})
        request = Request(
            f"{self.url}/api/auth/legacy-exchange?{words}", headers={"Authorization": f"Bearer {self._key}"}
        )
        with urlopen(request, timeout=30) as answer:
            return dict(json.load(answer))

    def credentials(self, path: Path, user: str = "pilot", group: str = "pilot", **words: Any) -> Path:
        """A file of credentials. `words` take the place of what is in it."""
        tokens = self.token(user, group)
        found = {
            "access_token": tokens["access_token"],
            "refresh_token": tokens["refresh_token"],
            "expires_on": int(time.time()) + tokens["expires_in"] - 15,
        }
        path.write_text(json.dumps(found | words))
        return path

    def ask(self, method: str, path: str, words: Any = None, *, user: str = "alice", group: str = "user") -> Any:
        """Ask as a user does."""
        token = self._tokens.get((user, group))
        if token is None:
            token = self._tokens[user, group] = self.token(user, group)["access_token"]
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        data = None if words is None else json.dumps(words).encode()
        try:
            with urlopen(Request(self.url + path, data, headers, method=method), timeout=60) as answer:
                body = answer.read()
                return json.loads(body) if body else None
        except HTTPError as exc:
            pytest.fail(f"{method} {path}: {exc}: {exc.read()[:2000]!r}")

    def submit(self, count: int = 1) -> list[int]:
        """So many jobs that were matched."""
        jdl = 'Executable = "/bin/true"; JobName = "test";'
        jobs = [
            job["JobID"]
            for some in (min(10, count - at) for at in range(0, count, 10))
            for job in self.ask("POST", "/api/jobs/jdl", [jdl] * some)
        ]
        self.set_status(jobs, "Matched", "Job Received by Agent", force=True)
        return jobs

    def set_status(self, jobs: Sequence[int], status: str, minor: str, *, force: bool = False) -> Any:
        now = datetime.now(UTC).isoformat()
        words = {job: {now: {"Status": status, "MinorStatus": minor, "Source": "Test"}} for job in jobs}
        path = "/api/jobs/status?force=true" if force else "/api/jobs/status"
        return self.ask("PATCH", path, words, group="admin" if force else "user")

    def kill(self, job: int) -> None:
        """As a user's `dirac kill` does."""
        self.set_status([job], "Killed", "Marked for termination")

    def found(self, jobs: Sequence[int], *parameters: str) -> dict[int, dict[str, Any]]:
        words = {
            "parameters": ["JobID", *parameters],
            "search": [{"parameter": "JobID", "operator": "in", "values": list(jobs)}],
        }
        found = self.ask("POST", "/api/jobs/search?per_page=1000", words)
        return {job["JobID"]: job for job in found}

    def statuses(self, jobs: Sequence[int]) -> dict[int, tuple[str, str]]:
        found = self.found(jobs, "Status", "MinorStatus")
        return {number: (job["Status"], job["MinorStatus"]) for number, job in found.items()}

    def beats(self, job: int) -> dict[str, str]:
        """The newest value of each thing that heartbeats told; no route gives them, so they are looked up."""
        with closing(sqlite3.connect(f"file:{self.home}/db/jobdb.db?mode=ro", uri=True)) as database:
            words = "SELECT Name, Value FROM HeartBeatLoggingInfo WHERE JobID = ? ORDER BY HeartBeatTime"
            return dict(database.execute(words, (job,)))

    def printed(self, job: int) -> str:
        """What a heartbeat brought of a job's output."""
        with closing(sqlite3.connect(f"file:{self.home}/db/jobparametersdb.db?mode=ro", uri=True)) as database:
            found = database.execute("SELECT extra FROM dummy WHERE doc_id = ?", (job,)).fetchone()
            return str(json.loads(found[0]).get("StandardOutput", "")) if found else ""

    def content(self, pfn: str) -> dict[str, bytes]:
        """What is in a sandbox."""
        url = self.ask("GET", f"/api/jobs/sandbox?{urlencode({'pfn': pfn})}")["url"]
        with urlopen(url, timeout=30) as answer, tarfile.open(fileobj=BytesIO(answer.read())) as archive:
            found = {member.name: archive.extractfile(member) for member in archive.getmembers()}
            return {name: file.read() for name, file in found.items() if file is not None}

    def histories(self, jobs: Sequence[int]) -> dict[int, list[Said]]:
        """What the server's log has of each, without its own first lines."""
        found = self.found(jobs, "LoggingInfo")
        return {number: _history(job["LoggingInfo"]) for number, job in found.items()}


def _history(lines: Sequence[Mapping[str, Any]]) -> list[Said]:
    said = [
        Said(
            line["Status"], line["MinorStatus"], line["ApplicationStatus"], line["Source"],
            datetime.fromisoformat(line["StatusTime"]),
        )
        for line in lines
    ]  # fmt: skip
    return [each for each in said if each.source.startswith(("JobWrapper", "Heartbeat"))]


@contextmanager
def diracx_server(home: Path, cache: Path) -> Iterator[DiracxServer]:
    python = environment(cache)
    home.mkdir(parents=True, exist_ok=True)
    with (home / "keeper.log").open("w") as log:
        process = subprocess.Popen(
            [python, str(Path(__file__).with_name("diracx_keeper.py")), str(home)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
        )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            pytest.fail(f"DiracX did not start: {(home / 'keeper.log').read_text()[-2000:]}")
        yield DiracxServer(home, process, **json.loads(line))
    finally:
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.wait(30)
        process.stdout.close()


# -- a proxy that loses things -----------------------------------------------------------------------------------------

Fate = str
"""`""` (all goes well), `lost` (the server has it, the answer is lost), `500` (it never came there), `500 after` (it did),
`reset`, `later` (503 with Retry-After)."""


class Proxy:
    """Before a server: what becomes of each request is `fate(method, path, body)`.

    with Proxy(server.url) as proxy:
        proxy.fate = lambda method, path, body: "lost" if path.endswith("heartbeat") else ""
    """

    def __init__(self, url: str) -> None:
        self._port = urlsplit(url).port
        self.fate: Callable[[str, str, bytes], Fate] = lambda method, path, body: ""
        self.asked: list[tuple[str, str, bytes]] = []
        self.fates: Counter[str] = Counter()
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="faulty proxy")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def count(self, method: str, path: str) -> int:
        return sum(each[:2] == (method, path) for each in self.asked)

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._ready.wait(10)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()

    def _serve(self) -> None:
        async def main() -> None:
            server = await asyncio.start_server(self._talk, "127.0.0.1", 0, limit=2**22)
            self.port = server.sockets[0].getsockname()[1]
            self._ready.set()
            await self._stop.wait()
            server.close()
            talks = asyncio.all_tasks() - {asyncio.current_task()}
            for talk in talks:
                talk.cancel()
            await asyncio.gather(*talks, return_exceptions=True)

        self._loop.run_until_complete(main())

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                first, *lines = head.decode("latin-1").split("\r\n")[:-2]
                method, target, _ = first.split(" ")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                self.asked.append((method, target, body))
                fate = self.fate(method, target, body)
                self.fates[fate] += 1
                answer = b"" if fate in {"500", "reset", "later"} else await self._passed_on(head, body)
                if fate in {"lost", "reset"}:
                    writer.transport.abort()
                    return
                if fate.startswith("500"):
                    answer = b"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\nConnection: close\r\n\r\nOops"
                elif fate == "later":
                    answer = b"HTTP/1.1 503 Later\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                if not answer:
                    return
                writer.write(answer)
                await writer.drain()
                return
        except (OSError, asyncio.IncompleteReadError):
            return
        finally:
            writer.close()

    async def _passed_on(self, head: bytes, body: bytes) -> bytes:
        """The server's whole answer; nothing when it is not there."""
        first, _, rest = head.partition(b"\r\n")
        lines = [line for line in rest.split(b"\r\n") if line and not line.lower().startswith(b"connection:")]
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            return b""
        try:
            writer.write(b"\r\n".join([first, *lines, b"Connection: close", b"", b""]) + body)
            return await reader.read()
        except OSError:
            return b""
        finally:
            writer.close()

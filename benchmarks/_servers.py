"""Servers, started on 127.0.0.1 in a directory of whoever needs them: `staging.py` here, and the tests."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import Request, urlopen

START_SECONDS = 30.0


class Absent(Exception):
    """The program is not installed here; the message names it."""


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def program(name: str) -> str:
    """Where a program is: in PATH, beside the interpreter, where npm puts those of this directory, or in /usr/sbin, which
    few people have in their PATH. Raises `Absent`."""
    places = [os.environ.get("PATH", ""), str(Path(sys.executable).parent), "/usr/sbin", "/sbin", "node_modules/.bin"]
    path = shutil.which(name, path=os.pathsep.join(places))
    if path is None:
        raise Absent(f"{name} is not installed")
    return os.path.abspath(path)


NGINX = """
{modules}
{user}
worker_processes 2;
error_log stderr error;
pid {home}/nginx.pid;
daemon off;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    sendfile on;
    tcp_nodelay on;
    keepalive_requests 1000000;
    client_max_body_size 0;
    client_body_temp_path {home}/body;
    proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
    server {{
        listen 127.0.0.1:{port} backlog=1024;
        root {root};
        location / {{
            dav_methods PUT DELETE MKCOL COPY MOVE;
            {methods}
            create_full_put_path {full_path};
            dav_access user:rw;
        }}
    }}
}}
"""


@contextmanager
def nginx(home: Path, root: Path, *, makes_directories: bool = True) -> Iterator[str]:
    """The URL of an nginx that serves a directory, and takes PUT, DELETE, MKCOL, COPY and MOVE. Bodies wait beside the
    directory. `makes_directories`: those a PUT needs."""
    home.mkdir(parents=True, exist_ok=True)
    root.mkdir(parents=True, exist_ok=True)
    port = free_port()
    user = f"user {_user()};" if os.geteuid() == 0 else ""
    extra = Path("/usr/lib/nginx/modules/ngx_http_dav_ext_module.so")  # PROPFIND, which rclone cannot do without
    modules, methods = (f"load_module {extra};", "dav_ext_methods PROPFIND OPTIONS;") if extra.exists() else ("", "")
    full_path = "on" if makes_directories else "off"
    words = {
        "full_path": full_path,
        "user": user,
        "modules": modules,
        "methods": methods,
        "home": home,
        "port": port,
        "root": root,
    }
    (home / "nginx.conf").write_text(NGINX.format(**words))
    with running([program("nginx"), "-p", str(home), "-c", str(home / "nginx.conf"), "-e", "stderr"], port, home):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def s3_server(home: Path) -> Iterator[str]:
    """The URL of a bucket: of s3rver (npm) if it is in PATH, else of moto_server (PyPI). Both keys are `S3RVER`."""
    port = free_port()
    try:
        command = [program("s3rver"), "-d", str(home), "-a", "127.0.0.1", "-p", str(port), "--silent"]
    except Absent:
        with moto(home) as url:
            urlopen(Request(f"{url}/bucket", method="PUT"), timeout=30).close()
            yield f"{url}/bucket"
        return
    with running([*command, "--allow-mismatched-signatures", "--configure-bucket", "bucket"], port, home):
        yield f"http://127.0.0.1:{port}/bucket"


@contextmanager
def moto(home: Path) -> Iterator[str]:
    """The URL of moto's S3. It looks at no signature."""
    port = free_port()
    with running([program("moto_server"), "-H", "127.0.0.1", "-p", str(port)], port, home):
        yield f"http://127.0.0.1:{port}"


SINK = """
import asyncio, re, sys

async def talk(reader, writer):
    try:
        while True:
            head = await reader.readuntil(b"\\r\\n\\r\\n")
            left = int((re.search(rb"(?i)content-length: *([0-9]+)", head) or [b"", b"0"])[1])
            if b"100-continue" in head:
                writer.write(b"HTTP/1.1 100 Continue\\r\\n\\r\\n")
            while left > 0:
                data = await reader.read(1 << 20)
                if not data:
                    return
                left -= len(data)
            writer.write(b"HTTP/1.1 204 Gone\\r\\n\\r\\n")
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()

async def main():
    server = await asyncio.start_server(talk, "127.0.0.1", int(sys.argv[1]), limit=1 << 21)
    await server.serve_forever()

asyncio.run(main())
"""


@contextmanager
def sink(home: Path) -> Iterator[str]:
    """The URL of a server that takes whatever is sent and keeps nothing: for files larger than the disk."""
    home.mkdir(parents=True, exist_ok=True)
    port = free_port()
    with running([sys.executable, "-c", SINK, str(port)], port, home):
        yield f"http://127.0.0.1:{port}"


XROOTD = """
xrd.port {port}
xrd.network nodnr
oss.localroot {root}
all.export /
all.adminpath {home}/admin
all.pidpath {home}/admin
xrootd.async off
"""


@contextmanager
def xrootd(home: Path, root: Path) -> Iterator[str]:
    """The URL of an XRootD server of a directory. It does not run as root: it becomes nobody."""
    with xrootd_process(home, root) as (url, _):
        yield url


@contextmanager
def xrootd_process(home: Path, root: Path, more: str = "") -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The same and its process. `more`: of its configuration."""
    (home / "admin").mkdir(parents=True, exist_ok=True)
    root.mkdir(parents=True, exist_ok=True)
    port = free_port()
    (home / "xrootd.cfg").write_text(XROOTD.format(port=port, root=root, home=home) + more)
    command = [program("xrootd"), "-c", str(home / "xrootd.cfg"), "-l", str(home / "xrootd.log"), "-n", "bench"]
    if os.geteuid() == 0:
        for directory in (home, home / "admin", root):
            shutil.chown(directory, "nobody", "nogroup")
        command += ["-R", "nobody"]
    with running(command, port, home) as process:
        yield f"root://127.0.0.1:{port}/", process


@contextmanager
def running(command: Sequence[str], port: int, home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a group of its own, from when its port answers; then the group is ended. Raises `Absent`."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=home, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        _wait_for(port, process, home / "server.log")
        yield process
    finally:
        with suppress(ProcessLookupError):  # a test has ended it, or stopped it
            for order in (signal.SIGCONT, signal.SIGTERM):
                os.killpg(process.pid, order)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    give_up = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < give_up:
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise Absent(f"{process.args!s:.60}: did not start: {log.read_text(errors='replace')[-400:]}")


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.geteuid()).pw_name

"""Both shims, C and Python, in both containments, as root and as an ordinary user: one suite says what they hold. The
compiled one also as its starter makes it, by a message and without an execution.

The payload's stderr is a pipe whose other end we have: once nobody holds it any more, everybody is gone. The shim
holds it too, so that it reads as closed from the moment the shim has ended, if nothing was left behind; every
`Shim.end` looks.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import re
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import pytest

import loadmaster.payload
from conftest import NOBODY, TEMPORARY
from loadmaster.payload.starter import FIRST_PASSED, HEAD, MOST_PIDS

SOURCE = Path(loadmaster.payload.__file__).parent
SECONDS = 20
"""Nothing here takes as long."""

OFTEN = {("pid-namespace", "ordinary"), ("subreaper", "root")}
"""What a started shim is seen to do each time; the rest is for the long run."""

CASES = [
    pytest.param(
        (kind, mode, user),
        id=f"{kind}-{mode}-{user}",
        marks=[pytest.mark.long] if kind == "started" and (mode, user) not in OFTEN else [],
    )
    for kind in ("c", "python", "started")
    for mode in ("pid-namespace", "subreaper")
    for user in ("root", "ordinary")
]
IN_NAMESPACE = [case for case in CASES if "pid-namespace" in str(case.id)]
IN_ANY = [case for case in CASES if "subreaper" in str(case.id)]
"""For what has nothing to do with it."""


# -- starting one ----------------------------------------------------------------------------------------------------


class Shim:
    """A shim that was started, and its payload."""

    def __init__(self, words: Sequence[Any], home: Path, report: int, life: int, **options: Any) -> None:
        self.out = home / "std.out"
        self._report, self._life = report, life
        self._text = b""
        with self.out.open("wb") as out:
            process = Started if "starter" in words else subprocess.Popen
            self.popen = process(words, cwd=home, stdin=subprocess.DEVNULL, stdout=out, **options)
        self.pid = self.popen.pid
        self._pidfd = os.pidfd_open(self.pid)

    def close(self) -> None:
        """Also after a failed test: USR1 first, as a killed sub-reaper leaves its tree."""
        for number in (signal.SIGUSR1, signal.SIGKILL):
            if self.popen.poll() is None:
                self.order(number)
                wait_readable(self._pidfd)
        self.popen.wait()
        for descriptor in (self._report, self._life, self._pidfd):
            os.close(descriptor)

    def order(self, number: int) -> None:
        self.popen.send_signal(number)

    def started(self) -> dict[str, str]:
        """The first part of the report; or a refusal, or what there is when the shim ends."""
        while b"\n\n" not in self._text and (more := self._read(self._report)):
            self._text += more
        return facts(self._text.partition(b"\n\n")[0])

    def ready(self, word: str = "ready") -> None:
        """Return once the payload has printed it."""
        deadline = time.monotonic() + SECONDS
        while word not in self.output():
            assert time.monotonic() < deadline, f"not printed: {word}"
            time.sleep(0.002)

    def end(self) -> dict[str, str]:
        """The second part of the report, once the shim has ended; nothing of its tree is left then."""
        assert wait_readable(self._pidfd), "the shim does not end"
        self.popen.wait()
        said = b""
        while wait_readable(self._life, 0):
            if not (more := os.read(self._life, 65536)):
                break
            said += more
        else:
            pytest.fail("something was left behind")
        assert b"shim.py" not in said, said.decode()
        while more := self._read(self._report):
            self._text += more
        return facts(self._text.partition(b"\n\n")[2])

    def everything_ends(self) -> None:
        """Like `end`, for a shim that cannot see to it: soon, not at once."""
        assert wait_readable(self._pidfd)
        self.popen.wait()
        while self._read(self._life):
            pass

    def output(self) -> str:
        return self.out.read_text(errors="replace")

    def text(self) -> tuple[bytes, bytes]:
        first, _, second = self._text.partition(b"\n\n")
        return first + b"\n", second

    def _read(self, descriptor: int) -> bytes:
        assert wait_readable(descriptor), "nothing comes"
        return os.read(descriptor, 65536)


class Started:
    """A shim that was started by a starter of its own, as a Popen. Its words follow that one's."""

    returncode: int | None = None

    def __init__(
        self, words: Sequence[str | bytes], *, cwd: Path, stdin: int, stdout: BinaryIO, stderr: int,
        env: dict[str, str], pass_fds: Sequence[int], environment: bytes, **options: Any,
    ) -> None:  # fmt: skip
        end = words.index("starter") + 1
        own, rest = words[:end], [word if isinstance(word, bytes) else word.encode() for word in words[end:]]
        places = {number: FIRST_PASSED + 2 + place for place, number in enumerate(pass_fds)}
        places |= {pass_fds[0]: FIRST_PASSED, -1: -1}  # two that no word names are after the first
        for place in (0, 1, 2):
            rest[place] = b"%d" % places[int(rest[place])]
        rest[5] = re.sub(rb"(join|hide)=(\d+)", lambda at: b"%s=%d" % (at[1], places[int(at[2])]), rest[5])
        memory = os.memfd_create("pids")
        os.ftruncate(memory, 4 * MOST_PIDS)
        control, of_starter = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with control, of_starter, mmap.mmap(memory, 4 * MOST_PIDS) as pids:
            passed = (of_starter.fileno(), memory)
            command = [*own, *map(str, passed)]
            with subprocess.Popen(command, stdin=stdin, pass_fds=passed, env=env, cwd="/", **options):
                os.close(memory)
                of_starter.close()
                inline = [each + b"\0" for each in environment.split(b"\0")[:-1]] if len(environment) < 60_000 else []
                if inline:
                    rest[2] = b"-1"
                text = b"".join([os.fsencode(cwd), b"\0", *(word + b"\0" for word in rest), *inline])
                head = HEAD.pack(7, 0o022, len(rest), len(inline))
                socket.send_fds(control, [head, text], [pass_fds[0], stdout.fileno(), stderr, *pass_fds[1:]])
                deadline = time.monotonic() + SECONDS
                while (pid := struct.unpack_from("=i", pids, 4 * 7)[0]) <= 0:
                    assert time.monotonic() < deadline, "the starter starts nothing"
                    time.sleep(0.001)
                self.pid = pid
                control.close()

    def poll(self) -> int | None:
        if self.returncode is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(found[1])
        return self.returncode

    def wait(self) -> int | None:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def wait_readable(descriptor: int, seconds: float = SECONDS) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def once_it_is(name: str, stat: Path) -> bytes:
    """The text of /proc/PID/stat once the process has become the one of that name."""
    deadline = time.monotonic() + SECONDS
    while f"({name})".encode() not in (text := stat.read_bytes()):
        assert time.monotonic() < deadline, f"is not {name}: {text!r}"
        time.sleep(0.002)
    return text


def facts(text: bytes) -> dict[str, str]:
    return dict(line.split(" ", 1) for line in text.decode().splitlines())


Start = Callable[..., Shim]


@pytest.fixture(scope="session")
def shims() -> Iterator[Path]:
    """A directory with both, where everybody may go."""
    with tempfile.TemporaryDirectory(dir=TEMPORARY) as place:
        os.chmod(place, 0o755)
        shutil.copy(SOURCE / "shim.py", place)
        if compiler := shutil.which(os.environ.get("CC", "cc")):
            command = [compiler, "-Os", "-Wall", "-Wextra", "-Werror", "-o", f"{place}/shim", str(SOURCE / "shim.c")]
            subprocess.run(command, check=True)
        elif os.access(SOURCE / "shim", os.X_OK):
            shutil.copy(SOURCE / "shim", place)
        yield Path(place)


@pytest.fixture(scope="session")
def python() -> str:
    """An interpreter that an ordinary user may execute."""
    for interpreter in (sys.executable, "/usr/bin/python3"):
        with suppress(OSError):
            if subprocess.run([interpreter, "-I", "-c", ""], **rights("ordinary")).returncode == 0:
                return interpreter
    pytest.skip("no interpreter here that an ordinary user may execute")


def rights(user: str) -> dict[str, Any]:
    """Options of Popen that make it so."""
    if user == "ordinary" and os.geteuid() == 0:
        return {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    return {}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, str, str]:
    """Which shim, which containment, which user."""
    found: tuple[str, str, str] = request.param
    return found


@pytest.fixture
def home(case: tuple[str, str, str]) -> Iterator[Path]:
    """The payload's directory."""
    with tempfile.TemporaryDirectory(dir=TEMPORARY) as home:
        if case[2] == "ordinary" and os.geteuid() == 0:
            os.chown(home, NOBODY, NOBODY)
        yield Path(home)


@pytest.fixture
def shim_argv(case: tuple[str, str, str], shims: Path, python: str) -> list[str]:
    kind, mode, user = case
    if user == "root" and os.geteuid() != 0:
        pytest.skip("we are not root")
    if kind != "python" and not (shims / "shim").exists():
        pytest.skip("there is no compiler here")
    argv = [str(shims / "shim")] if kind != "python" else [python, "-I", "-S", str(shims / "shim.py")]
    if mode == "pid-namespace" and not namespaces_allowed(user):
        pytest.skip("the node allows this user no namespaces")
    return argv


@cache
def namespaces_allowed(user: str) -> bool:
    words = ["unshare", "-p", "-f", "--mount-proc", *(["-U"] if rights(user) or os.geteuid() != 0 else []), "true"]
    return subprocess.run(words, capture_output=True, **rights(user)).returncode == 0


@pytest.fixture
def start(case: tuple[str, str, str], shim_argv: list[str], home: Path) -> Iterator[Start]:
    """Start a payload under the shim: `start("/bin/sh", "-c", ...)`."""
    _, mode, user = case
    with ExitStack() as stack:

        def start(
            *argv: str | bytes, env: bytes = b"PATH=/usr/bin:/bin\0", grace_ms: int = 60_000, state: int = -1,
            settings: str = "n", before: Sequence[str] = (), pass_fds: Sequence[int] = (), **options: Any,
        ) -> Shim:  # fmt: skip
            report, report_end = (end.detach() for end in socket.socketpair())
            life, life_end = os.pipe()
            environment = os.memfd_create("environment")
            with os.fdopen(environment, "wb", closefd=False) as file:
                file.write(env)
            own = [str(word) for word in (state, report_end, environment, grace_ms, mode, settings)]
            passed = [report_end, environment, *([state] if state >= 0 else []), *pass_fds]
            if started := ["starter"] if case[0] == "started" else []:
                options["environment"] = env
            try:
                shim = Shim(
                    [*before, *shim_argv, *started, *own, *argv], home, report, life, stderr=life_end, env={},
                    pass_fds=passed, **rights(user), **options,
                )  # fmt: skip
            finally:
                for descriptor in (report_end, life_end, environment):
                    os.close(descriptor)
            stack.callback(shim.close)
            return shim

        yield start


@pytest.fixture
def run_sh(start: Start) -> Start:
    """Start a piece of shell."""
    return lambda script, **options: start("/bin/sh", "-c", script, **options)


PRELUDE = """
import contextlib, os, signal, sys, time
def say(word):
    os.write(1, word.encode() + b"\\n")
def rest(ready, *, ignoring=()):
    for number in ignoring:
        signal.signal(number, signal.SIG_IGN)
    os.write(ready, b"!")
    os.close(ready)
    while True:
        time.sleep(1000)
def leave_daemons(count, *, ignoring=()):
    "As daemons do it: fork, setsid, fork; returns when they are there."
    seen, ready = os.pipe()
    for _ in range(count):
        if (pid := os.fork()) == 0:
            os.setsid()
            if os.fork() == 0:
                rest(ready, ignoring=ignoring)
            os._exit(0)
        os.waitpid(pid, 0)
    for _ in range(count):
        os.read(seen, 1)
"""


@pytest.fixture
def run_python(start: Start, python: str) -> Start:
    """Start a piece of Python."""
    return lambda script, **options: start(python, "-I", "-S", "-c", PRELUDE + script, **options)


# -- how a payload ends ----------------------------------------------------------------------------------------------


def test_every_exit_code_arrives(run_sh: Start) -> None:
    codes = [0, 1, 2, 42, 125, 126, 127, 128, 143, 255]
    started = [run_sh(f"exit {code}") for code in codes]
    assert [int(shim.end()["status"]) for shim in started] == [code << 8 for code in codes]
    assert [shim.popen.returncode for shim in started] == [0] * len(codes)


def test_every_deadly_signal_arrives_as_one(run_sh: Start) -> None:
    harmless = {"SIGCHLD", "SIGCONT", "SIGURG", "SIGWINCH", "SIGSTOP", "SIGTSTP", "SIGTTIN", "SIGTTOU"}
    numbers = sorted(number for number in signal.valid_signals() if getattr(number, "name", "") not in harmless)
    started = [run_sh(f"ulimit -c 0; kill -{int(number)} $$") for number in numbers]
    statuses = [int(shim.end()["status"]) for shim in started]
    assert [status & 0x7F for status in statuses] == numbers
    assert {status & ~0xFF for status in statuses} == {0}


def test_report_says_whom_it_started(start: Start) -> None:
    """Also of payloads that have ended before anybody could look."""
    for shim in [start("/bin/true") for _ in range(10)]:
        started = shim.started()
        assert int(started["shim_pid"]) == shim.pid
        assert int(started["payload_pid"]) > 1
        assert int(started["payload_start"]) >= int(started["shim_start"]) > 0
        assert started["error"] == "0"
        assert shim.end()["asked"] == "-"


def test_reported_pid_is_the_payloads_as_seen_from_outside(case: tuple[str, str, str], run_sh: Start) -> None:
    shim = run_sh("echo ready; exec sleep 1000")
    shim.ready()
    started = shim.started()
    stat = once_it_is("sleep", Path(f"/proc/{started['payload_pid']}/stat"))
    assert stat.rpartition(b")")[2].split()[19].decode() == started["payload_start"]
    assert started["containment"] == case[1]
    shim.order(signal.SIGUSR1)
    shim.end()


@pytest.mark.parametrize(
    ("program", "error"), [("/nowhere/at/all", errno.ENOENT), ("/etc", errno.EACCES), ("/etc/passwd", errno.EACCES)]
)
def test_what_cannot_be_executed_is_reported_with_its_reason(start: Start, program: str, error: int) -> None:
    shim = start(program)
    assert int(shim.started()["error"]) == error
    assert int(shim.end()["status"]) == 127 << 8


def test_too_large_a_variable_is_reported_as_such(start: Start) -> None:
    shim = start("/bin/true", env=b"BIG=" + b"x" * 300_000 + b"\0")
    assert int(shim.started()["error"]) == errno.E2BIG
    shim.end()


def test_script_without_a_first_line_is_the_shells(start: Start, home: Path) -> None:
    script = home / "script"
    script.write_text('echo "$0" "$1"; exit 5\n')
    script.chmod(0o755)
    shim = start(str(script), "two words")
    assert int(shim.end()["status"]) == 5 << 8
    assert shim.output() == f"{script} two words\n"


# -- what a payload is given -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"A=1\0B=\0C=a=b\nc\0", id="usual"),
        pytest.param(b"A=\xff\xfe\0\xe9t\xe9=1\0", id="not UTF-8"),
        pytest.param(b"A=1\0A=2\0no equals sign\0=\0", id="strange"),
        pytest.param(b"".join(b"V%d=%s\0" % (i, b"x" * 100_000) for i in range(10)), id="a megabyte"),
    ],
)
def test_environment_is_passed_exactly(start: Start, env: bytes) -> None:
    shim = start("/bin/cat", "/proc/self/environ", env=env)
    assert int(shim.end()["status"]) == 0
    assert shim.out.read_bytes() == env


def test_arguments_are_passed_exactly(start: Start) -> None:
    words = [b"-I", b"", b"\xff\xfe", "é".encode(), b"two\nlines"]
    shim = start("/bin/sh", "-c", 'printf "%s|" "$@"', "sh", *words)
    shim.end()
    assert shim.out.read_bytes() == b"|".join(words) + b"|"


PROBE = """
import json
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "ignored": int(status["SigIgn"], 16) & ~(1 << 12 | 1 << 24),  # but for SIGPIPE and SIGXFSZ: Python's own
    "blocked": int(status["SigBlk"], 16),
    "no new privileges": int(status["NoNewPrivs"]),
    "capabilities": int(status["CapEff"], 16),
    "session": os.getsid(0) == os.getpid() == os.getpgid(0),
    "user": [os.getuid(), os.geteuid(), os.getgid(), os.getegid()],
    "descriptors": sorted(map(int, os.listdir("/proc/self/fd")))[:-1],  # but for that of the listing
    "seen": sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()),
    "self": os.getpid(),
    "parent": os.getppid(),
}))
"""


def probe(run_python: Start, **options: Any) -> Any:
    shim = run_python(PROBE, **options)
    shim.end()
    return json.loads(shim.output())


def test_payload_has_its_own_session(run_python: Start) -> None:
    assert probe(run_python)["session"] is True


def test_payload_inherits_three_descriptors(run_python: Start) -> None:
    with tempfile.TemporaryFile() as file, tempfile.TemporaryFile() as another:
        high = fcntl.fcntl(another.fileno(), fcntl.F_DUPFD, 200)
        try:
            assert probe(run_python, pass_fds=[file.fileno(), high])["descriptors"] == [0, 1, 2]
        finally:
            os.close(high)


def ignore_and_block() -> None:
    """What an embedding program may have left to its children."""
    for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGTERM, signal.SIGUSR1, signal.SIGXFSZ, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD, signal.SIGINT})


def test_payload_has_no_signals_ignored_or_blocked(run_python: Start) -> None:
    found = probe(run_python, preexec_fn=ignore_and_block, restore_signals=False)
    assert (found["ignored"], found["blocked"]) == (0, 0)


def test_payload_may_write_to_a_closed_pipe_and_die_of_it(start: Start) -> None:
    shim = start("/bin/sh", "-c", "kill -PIPE $$", preexec_fn=ignore_and_block, restore_signals=False)
    assert int(shim.end()["status"]) == signal.SIGPIPE


def test_shim_works_below_a_program_that_ignores_and_blocks_signals(run_sh: Start) -> None:
    """With SIGCHLD ignored the kernel reaps children by itself: the status was lost, the payload called killed."""
    shim = run_sh("exit 3", preexec_fn=ignore_and_block)
    assert int(shim.end()["status"]) == 3 << 8
    shim = run_sh("echo ready; exec sleep 1000", preexec_fn=ignore_and_block)
    shim.ready()
    shim.order(signal.SIGTERM)
    assert int(shim.end()["status"]) == signal.SIGTERM


def test_payload_gets_no_new_privileges_unless_it_may(run_python: Start) -> None:
    assert probe(run_python)["no new privileges"] == 1
    assert probe(run_python, settings="-")["no new privileges"] == 0


def test_payload_sees_itself_as_its_user(case: tuple[str, str, str], run_python: Start) -> None:
    user = NOBODY if rights(case[2]) else os.geteuid()
    found = probe(run_python)
    assert found["user"] == [user] * 4
    assert user == 0 or found["capabilities"] == 0


@pytest.mark.parametrize("case", IN_NAMESPACE, indirect=True)
def test_payload_in_a_namespace_sees_only_its_own_processes(run_python: Start) -> None:
    found = probe(run_python)
    assert (found["parent"], found["seen"]) == (1, [1, found["self"]])


# -- settings --------------------------------------------------------------------------------------------------------

SETTINGS = """
import json, resource
print(json.dumps({
    "nice": os.getpriority(os.PRIO_PROCESS, 0),
    "cpus": sorted(os.sched_getaffinity(0)),
    "cpu": resource.getrlimit(resource.RLIMIT_CPU),
}))
"""


def settings_of(run_python: Start, settings: str, **options: Any) -> Any:
    shim = run_python(SETTINGS, settings=settings, **options)
    assert shim.end()["status"] == "0"
    return json.loads(shim.output())


def test_payload_has_what_the_settings_say(run_python: Start) -> None:
    own = sorted(os.sched_getaffinity(0))
    cpus = f"{own[0]}+{own[-1]}-{own[-1]}"
    found = settings_of(run_python, f"n,nice=3,cpus={cpus},cpu=100:200")
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    assert found == {"nice": min(nice + 3, 19), "cpus": sorted({own[0], own[-1]}), "cpu": [100, 200]}
    assert settings_of(run_python, "-") == {"nice": nice, "cpus": own, "cpu": [-1, -1]}


def test_limits_are_never_raised(run_python: Start) -> None:
    found = settings_of(run_python, "cpu=100:200", before=["/usr/bin/prlimit", "--cpu=50:150"])
    assert found["cpu"] == [50, 150]
    assert settings_of(run_python, "nice=19", before=["/usr/bin/nice", "-n5"])["nice"] == 19


def test_payload_of_too_much_cpu_is_ended_by_the_kernel(run_sh: Start) -> None:
    shim = run_sh("ulimit -c 0; while :; do :; done", settings="n,cpu=1:2")
    assert int(shim.end()["status"]) == signal.SIGXCPU


def test_cpus_that_are_not_there_start_nothing(run_sh: Start) -> None:
    shim = run_sh("echo started", settings="cpus=8191")
    started = shim.started()
    assert (int(started["error"]), started["failed"]) == (errno.EINVAL, "affinity")
    shim.end()
    assert shim.output() == ""


def test_groups_are_joined_by_the_payload_before_it_executes(run_sh: Start, home: Path) -> None:
    """Any file will do to see what is written. A real group is joined in test_containment.py."""
    with (home / "procs").open("wb") as first, (home / "tasks").open("wb") as second:
        descriptors = (first.fileno(), second.fileno())
        words = ",".join(f"join={descriptor}" for descriptor in descriptors)
        shim = run_sh("cat procs tasks; ls /proc/self/fd | wc -l", settings=f"n,{words}", pass_fds=descriptors)
        assert shim.end()["status"] == "0"
    assert shim.output().split() == ["0", "0", "4"]


def test_group_that_cannot_be_joined_starts_nothing(run_sh: Start, home: Path) -> None:
    with (home / "script").open("wb"), (home / "script").open("rb") as only_readable:
        shim = run_sh("echo started", settings=f"join={only_readable.fileno()}", pass_fds=[only_readable.fileno()])
        assert (shim.started()["error"], shim.started()["failed"]) == (str(errno.EBADF), "join")
        shim.end()
        assert shim.output() == ""


@pytest.mark.parametrize("case", IN_ANY, indirect=True)
def test_session_is_the_payload_itself(
    shim_argv: list[str], case: tuple[str, str, str], python: str, home: Path
) -> None:
    """The third mode: signals as usual, settings, and nothing of the shim stays. Its parent waits for the payload."""
    report, report_end = socket.socketpair()
    with report, report_end:
        own = ["-1", str(report_end.fileno()), "-1", "0", "session", "nice=2"]
        words = [*own, python, "-I", "-S", "-c", PRELUDE + PROBE]
        done = subprocess.run(
            [*shim_argv, *words], stdout=subprocess.PIPE, pass_fds=[report_end.fileno()], preexec_fn=ignore_and_block,
            restore_signals=False, start_new_session=True, **rights(case[2]),
        )  # fmt: skip
        report_end.close()
        assert report.recv(100) == b""
    found = json.loads(done.stdout)
    assert (found["ignored"], found["blocked"], found["session"]) == (0, 0, True)
    assert (found["descriptors"], found["no new privileges"]) == ([0, 1, 2], 0)


@pytest.mark.parametrize("case", IN_ANY, indirect=True)
def test_session_tells_only_what_failed(shim_argv: list[str], case: tuple[str, str, str]) -> None:
    report, report_end = socket.socketpair()
    with report, report_end:
        words = ["-1", str(report_end.fileno()), "-1", "0", "session", "-", "/nowhere/at/all"]
        process = subprocess.Popen([*shim_argv, *words], pass_fds=[report_end.fileno()], **rights(case[2]))
        report_end.close()
        assert process.wait() == 127
        said = facts(report.recv(65536).strip())
    assert (int(said["error"]), said["failed"]) == (errno.ENOENT, "execute")


# -- what it may do to others ----------------------------------------------------------------------------------------


def test_fenced_payload_signals_nobody_but_its_own(run_python: Start) -> None:
    """Where Linux has Landlock's scopes. By a kill of the shim a payload below a sub-reaper got away."""
    shim = run_python("""
def dies(pid):
    with contextlib.suppress(PermissionError):
        os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1] == signal.SIGKILL
    return False
up = os.getppid()
for number in (0, signal.SIGSTOP, signal.SIGKILL):
    try:
        os.kill(up, number)
    except PermissionError:
        say(f"refused {number}")
if (own := os.fork()) == 0:
    time.sleep(1000)
say(f"own dies {dies(own)}")
""")
    fenced = shim.started()["fenced"] == "1"
    if not fenced:
        pytest.skip("this kernel has no Landlock scopes")
    assert shim.end()["status"] == "0"
    assert shim.output().split("\n")[:-1] == ["refused 0", "refused 19", "refused 9", "own dies True"]


FORGE = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
FORGED = b"status 0\\nforged 1\\n"
hits = []
up = os.getppid()
for fd in range(64):
    with contextlib.suppress(OSError):
        link = os.readlink(f"/proc/{up}/fd/{fd}")
        if link.startswith(("pipe:", "socket:")):
            os.write(os.open(f"/proc/{up}/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK), FORGED)
            hits.append(link)
with contextlib.suppress(OSError):
    pidfd = os.pidfd_open(up)
    for fd in range(64):
        if (got := libc.syscall(438, pidfd, fd, 0)) >= 0:
            with contextlib.suppress(OSError):
                os.write(got, FORGED)
                hits.append(f"got {fd}")
if libc.ptrace(0x4206, up, None, None) == 0:  # PTRACE_SEIZE
    hits.append("traced")
with contextlib.suppress(OSError):
    os.open(f"/proc/{up}/mem", os.O_RDWR)
    hits.append("memory")
say(f"hits {hits}")
sys.exit(9)
"""


def test_payload_cannot_write_to_what_holds_it(run_python: Start) -> None:
    """Through /proc, by a copy of a descriptor, by tracing. A payload of root forged its exit by the first of them."""
    shim = run_python(FORGE)
    ended = shim.end()
    assert (int(ended["status"]), "forged" in ended) == (9 << 8, False)
    assert shim.output() == "hits []\n"


# -- private mounts --------------------------------------------------------------------------------------------------

LOOK_AROUND = """
import json
def may_write(path):
    try:
        os.close(os.open(f"{path}/written", os.O_WRONLY | os.O_CREAT))
        return True
    except OSError:
        return False
print(json.dumps({
    "seen": os.listdir("/tmp"),
    "places": {path: may_write(path) for path in ("/tmp", "/dev/shm", "/var/tmp", "/usr", "/proc/sys/kernel", ".")},
    "cwd": os.getcwd(),
    "ipc": os.readlink("/proc/self/ns/ipc"),
    "null": os.write(os.open("/dev/null", os.O_WRONLY), b"x"),
    "mounted": os.system("mount -t tmpfs none . 2>/dev/null || mount -o remount,rw / 2>/dev/null") == 0,
}))
"""


@pytest.mark.parametrize("case", IN_NAMESPACE, indirect=True)
def test_private_payload_writes_to_its_directory_and_to_memory_of_its_own(run_python: Start, home: Path) -> None:
    shim = run_python(LOOK_AROUND, settings="n,private")
    started = shim.started()
    if started.get("errno") == str(errno.ENOSYS):
        pytest.skip("takes Linux 5.12")
    ended = shim.end()
    assert ended["status"] == "0", (started, shim.output())
    found = json.loads(shim.output())
    inside = home.relative_to("/tmp").parts[:1] if home.is_relative_to("/tmp") else ()
    assert sorted(found["seen"]) == sorted(inside)
    writable = {"/tmp", "/dev/shm", "/var/tmp", "."}
    assert {path for path, may in found["places"].items() if may} == writable
    assert (home / "written").exists()
    assert not Path("/tmp/written").exists()
    assert found["cwd"] == str(home)
    assert found["ipc"] != os.readlink("/proc/self/ns/ipc")
    assert found["mounted"] is False


# -- ending it -------------------------------------------------------------------------------------------------------


TAKES_TERM = """
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
say("ready")
signal.sigwait({signal.SIGTERM})  # not a shell's trap: a child it has just forked may swallow the signal
say("asked")
"""


def test_term_lets_the_payload_tidy_up(run_python: Start) -> None:
    shim = run_python(TAKES_TERM + "sys.exit(3)")
    shim.ready()
    shim.order(signal.SIGTERM)
    ended = shim.end()
    assert (int(ended["status"]), ended["asked"], ended["grace_expired"]) == (3 << 8, "T", "0")
    assert "asked" in shim.output()


def test_term_reaches_daemons_too(run_python: Start) -> None:
    shim = run_python("leave_daemons(3); say('ready'); time.sleep(1000)")
    shim.ready()
    shim.order(signal.SIGTERM)
    ended = shim.end()
    assert (int(ended["status"]), ended["orphans"], ended["grace_expired"]) == (signal.SIGTERM, "3", "0")


def test_payload_that_ignores_term_is_killed_after_the_grace(run_sh: Start) -> None:
    shim = run_sh("trap '' TERM; echo ready; while :; do sleep 1000; done", grace_ms=150)
    shim.ready()
    shim.order(signal.SIGTERM)
    ended = shim.end()
    assert (int(ended["status"]), ended["asked"], ended["grace_expired"]) == (signal.SIGKILL, "T", "1")
    assert int(ended["wall_ms"]) >= 150


def test_daemon_that_ignores_term_has_the_grace_too(run_python: Start) -> None:
    shim = run_python("leave_daemons(1, ignoring=[signal.SIGTERM]); say('ready'); time.sleep(1000)", grace_ms=150)
    shim.ready()
    shim.order(signal.SIGTERM)
    ended = shim.end()
    assert (int(ended["status"]), ended["grace_expired"]) == (signal.SIGTERM, "1")


def test_no_grace_is_a_kill(run_sh: Start) -> None:
    shim = run_sh("trap '' TERM; echo ready; while :; do sleep 1000; done", grace_ms=0)
    shim.ready()
    shim.order(signal.SIGTERM)
    assert shim.end()["grace_expired"] == "1"


def test_usr1_kills_at_once(run_sh: Start) -> None:
    shim = run_sh("trap '' TERM USR1; echo ready; while :; do sleep 1000; done")
    shim.ready()
    shim.order(signal.SIGUSR1)
    ended = shim.end()
    assert (int(ended["status"]), ended["asked"], ended["grace_expired"]) == (signal.SIGKILL, "K", "0")


def test_usr1_cuts_the_grace_short(run_python: Start) -> None:
    shim = run_python(TAKES_TERM + "time.sleep(1000)")
    shim.ready()
    shim.order(signal.SIGTERM)
    shim.ready("asked")
    shim.order(signal.SIGUSR1)
    ended = shim.end()
    assert (int(ended["status"]), ended["asked"], ended["grace_expired"]) == (signal.SIGKILL, "T", "0")


@pytest.mark.parametrize("order", [signal.SIGTERM, signal.SIGUSR1])
def test_stopped_processes_are_ended(run_sh: Start, order: signal.Signals) -> None:
    shim = run_sh("sleep 1000 & kill -STOP $!; echo ready; kill -STOP $$")
    shim.ready()
    shim.order(order)
    assert int(shim.end()["status"]) == {signal.SIGTERM: signal.SIGTERM}.get(order, signal.SIGKILL)


def test_order_at_any_moment_of_the_start_leaves_nothing(run_sh: Start) -> None:
    for moment in range(20):
        shim = run_sh("sleep 1000 & wait", grace_ms=0)
        wait_readable(shim.popen.pid and shim._pidfd, moment / 2000)
        shim.order(signal.SIGTERM)
        shim.end()


# -- what it leaves --------------------------------------------------------------------------------------------------


def test_daemons_are_gone_when_the_shim_ends(run_python: Start) -> None:
    shim = run_python("leave_daemons(5, ignoring=[signal.SIGTERM, signal.SIGHUP]); sys.exit(4)")
    ended = shim.end()
    assert (int(ended["status"]), ended["orphans"], ended["asked"]) == (4 << 8, "5", "-")


def test_stopped_daemon_is_gone_when_the_shim_ends(run_sh: Start) -> None:
    shim = run_sh("setsid sleep 1000 & kill -STOP $!; exit 0")
    assert shim.end()["status"] == "0"


CHAIN = """
seen, ready = os.pipe()
for _ in range(300):
    if os.fork():
        break
    os.setsid()
else:
    os.write(ready, b"!")
    os.close(ready)
if os.getsid(0) == os.getpid() and os.getppid() == PARENT:
    os.read(seen, 1)
    say("ready")
time.sleep(1000)
"""


def test_chain_of_three_hundred_forks_is_ended(run_python: Start) -> None:
    shim = run_python("PARENT = os.getppid()" + CHAIN)
    shim.ready()
    shim.order(signal.SIGTERM)
    assert shim.end()["grace_expired"] == "0"


def test_hundred_processes_are_ended(run_python: Start) -> None:
    shim = run_python("leave_daemons(100, ignoring=[signal.SIGTERM]); say('ready'); time.sleep(1000)", grace_ms=50)
    shim.ready()
    shim.order(signal.SIGTERM)
    assert shim.end()["orphans"] == "100"


def test_children_of_a_thread_are_ended(run_python: Start) -> None:
    shim = run_python("""
import threading
def fork():
    if os.fork() == 0:
        os.setsid()
        say("ready")
        time.sleep(1000)
    time.sleep(1000)
threading.Thread(target=fork, daemon=True).start()
time.sleep(1000)
""")
    shim.ready()
    shim.order(signal.SIGTERM)
    assert shim.end()["grace_expired"] == "0"


def test_process_that_forks_forever_is_ended(run_python: Start) -> None:
    shim = run_python("""
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
say("ready")
while True:
    if os.fork():
        os._exit(0)
    os.setsid()
""")
    assert shim.end()["status"] == "0"


def test_payload_that_adopts_orphans_keeps_none(run_python: Start) -> None:
    shim = run_python("""
import ctypes
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
leave_daemons(3, ignoring=[signal.SIGTERM])
say("ready")
time.sleep(1000)
""")
    shim.ready()
    shim.order(signal.SIGUSR1)
    shim.end()


@pytest.mark.parametrize("case", IN_NAMESPACE, indirect=True)
def test_killed_shim_takes_everything_with_it(run_python: Start) -> None:
    shim = run_python("leave_daemons(5, ignoring=[signal.SIGTERM]); say('ready'); time.sleep(1000)")
    shim.ready()
    shim.order(signal.SIGKILL)
    shim.everything_ends()


@pytest.mark.parametrize("case", IN_NAMESPACE, indirect=True)
def test_shim_killed_at_any_moment_of_the_start_takes_everything_with_it(run_sh: Start) -> None:
    for moment in range(30):
        shim = run_sh("setsid sleep 1000 & exec sleep 1000")
        wait_readable(shim._pidfd, moment / 1500)
        shim.order(signal.SIGKILL)
        shim.everything_ends()


@pytest.mark.parametrize("case", IN_NAMESPACE, indirect=True)
def test_payload_cannot_end_what_holds_it(run_python: Start) -> None:
    shim = run_python("""
assert os.getppid() == 1  # or we would end everybody's processes
for number in range(1, 65):
    if number != signal.SIGCHLD:
        with contextlib.suppress(PermissionError):  # which is what a fenced one gets
            os.kill(1, number)
leave_daemons(1)
os.kill(-1, signal.SIGSTOP)
os.kill(-1, signal.SIGKILL)
sys.exit(6)
""")
    ended = shim.end()
    assert (int(ended["status"]), ended["orphans"], ended["asked"]) == (6 << 8, "1", "-")


# -- the figures -----------------------------------------------------------------------------------------------------


def test_cpu_of_orphans_counts(run_python: Start) -> None:
    shim = run_python("""
seen, busy = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while time.process_time() < 0.2:
            pass
        os._exit(0)
    os._exit(0)
os.close(busy)
os.read(seen, 1)
""")
    ended = shim.end()
    own = int(ended["payload_user_us"]) + int(ended["payload_system_us"])
    tree = int(ended["tree_user_us"]) + int(ended["tree_system_us"])
    assert tree - own >= 190_000
    assert own < 190_000


def test_cpu_and_peak_of_the_payload_count(run_python: Start) -> None:
    shim = run_python("x = bytearray(80_000_000)\nwhile time.process_time() < 0.1: pass")
    ended = shim.end()
    assert int(ended["payload_user_us"]) + int(ended["payload_system_us"]) >= 90_000
    assert 78_000 <= int(ended["payload_peak_kib"]) <= int(ended["tree_peak_kib"]) < 200_000
    assert int(ended["wall_ms"]) >= 90


def blocks_of(path: Path) -> bool:
    """Whether what is written there reaches a disk that counts it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_oublock
    with (path / "probe").open("wb") as file:
        file.write(bytes(100_000))
        file.flush()
        os.fsync(file.fileno())
    (path / "probe").unlink()
    return resource.getrusage(resource.RUSAGE_SELF).ru_oublock > before


def test_what_orphans_wrote_counts_for_the_tree_and_not_for_the_payload(run_python: Start, home: Path) -> None:
    if not blocks_of(home):
        pytest.skip("writing here is counted nowhere")
    shim = run_python("""
seen, busy = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        file = os.open("file", os.O_WRONLY | os.O_CREAT)
        os.write(file, bytes(3_000_000))
        os.fsync(file)
        os._exit(0)
    os._exit(0)
os.close(busy)
os.read(seen, 1)
""")
    ended = shim.end()
    assert int(ended["tree_oublock"]) * 512 >= 3_000_000 > int(ended["payload_oublock"]) * 512
    assert int(ended["tree_inblock"]) >= int(ended["payload_inblock"]) >= 0


# -- the state directory ---------------------------------------------------------------------------------------------


@pytest.fixture
def state(home: Path, case: tuple[str, str, str]) -> Iterator[tuple[Path, int]]:
    """A state directory, and a descriptor of it."""
    path = home / "state"
    path.mkdir()
    if rights(case[2]):
        os.chown(path, NOBODY, NOBODY)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    yield path, descriptor
    os.close(descriptor)


def locked(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_state_directory_tells_what_the_report_tells(run_sh: Start, state: tuple[Path, int]) -> None:
    path, descriptor = state
    shim = run_sh("echo ready; read x; exec sleep 1000", state=descriptor)
    shim.ready()
    shim.started()
    assert sorted(os.listdir(path)) == ["exit.new", "lock", "started"]
    shim.order(signal.SIGUSR1)
    shim.end()
    assert sorted(os.listdir(path)) == ["exit", "lock", "started"]
    assert ((path / "started").read_bytes(), (path / "exit").read_bytes()) == shim.text()


def test_lock_is_held_as_long_as_the_shim_lives(run_sh: Start, state: tuple[Path, int]) -> None:
    path, descriptor = state
    shim = run_sh("echo ready; exec sleep 1000", state=descriptor)
    shim.ready()
    assert locked(path / "lock")
    shim.order(signal.SIGUSR1)
    shim.end()
    assert not locked(path / "lock")


def test_killed_shim_leaves_a_free_lock_and_no_exit(run_sh: Start, state: tuple[Path, int]) -> None:
    path, descriptor = state
    shim = run_sh("echo ready; exec sleep 1000", state=descriptor)
    shim.ready()
    payload = int(shim.started()["payload_pid"])
    shim.order(signal.SIGKILL)
    shim.popen.wait()
    with suppress(ProcessLookupError):
        os.kill(payload, signal.SIGKILL)  # nobody else does, without a namespace
    shim.everything_ends()
    assert not locked(path / "lock")
    assert sorted(os.listdir(path)) == ["exit.new", "lock", "started"]


def test_payload_does_not_hold_the_lock(run_sh: Start, run_python: Start, state: tuple[Path, int]) -> None:
    assert probe(run_python, state=state[1])["descriptors"] == [0, 1, 2]


def test_directory_in_use_is_refused(run_sh: Start, state: tuple[Path, int]) -> None:
    first = run_sh("echo ready; exec sleep 1000", state=state[1])
    first.ready()
    second = run_sh("echo ready", state=state[1])
    refusal = second.started()
    assert (refusal["what"], second.end(), second.popen.returncode) == ("lock", {}, 125)
    first.order(signal.SIGUSR1)
    first.end()


def test_without_room_for_its_record_nothing_is_started(run_sh: Start, state: tuple[Path, int]) -> None:
    """It was started, and how it ended was not on disk then."""
    path, descriptor = state
    shim = run_sh("echo started", state=descriptor, before=["/bin/sh", "-c", 'ulimit -f 0; exec "$@"', "sh"])
    refusal = shim.started()
    assert (refusal["what"], int(refusal["errno"])) == ("record", errno.EFBIG)
    assert (shim.end(), shim.popen.returncode, shim.output()) == ({}, 125, "")
    assert mode_of(path / "lock") == 0o600


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_lock_says_whether_something_was_executed(run_sh: Start, state: tuple[Path, int]) -> None:
    path, descriptor = state
    shim = run_sh("exit 3", state=descriptor)
    shim.end()
    assert mode_of(path / "lock") == 0o700


@pytest.mark.parametrize("case", IN_NAMESPACE, indirect=True)
def test_a_refusal_leaves_a_lock_that_says_that_nothing_was_executed(run_sh: Start, state: tuple[Path, int]) -> None:
    forbid = 'echo 0 > /proc/sys/user/max_pid_namespaces && exec "$@"'
    before = ["/usr/bin/unshare", "-Ur", "/bin/sh", "-c", forbid, "sh"]
    assert run_sh("echo started", before=before, state=state[1]).started()["refused"] == "pid-namespace"
    assert mode_of(state[0] / "lock") == 0o600


def test_what_was_found_never_to_have_started_does_not_start_later(run_sh: Start, state: tuple[Path, int]) -> None:
    path, descriptor = state
    (path / "void").touch()
    shim = run_sh("echo started", state=descriptor)
    refusal = shim.started()
    assert (refusal["what"], int(refusal["errno"])) == ("lock", errno.ECANCELED)
    assert (shim.end(), shim.output()) == ({}, "")


def test_full_disk_does_not_cost_the_record(run_sh: Start, small_disk: Path, case: tuple[str, str, str]) -> None:
    state = small_disk / "state"
    state.mkdir()
    if rights(case[2]):
        os.chown(state, NOBODY, NOBODY)
    descriptor = os.open(state, os.O_RDONLY | os.O_DIRECTORY)
    try:
        shim = run_sh("echo ready; sleep 1000", state=descriptor)
        shim.ready()
        shim.started()
        with pytest.raises(OSError, match="No space"), (small_disk / "full").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        shim.order(signal.SIGUSR1)
        assert shim.end() == facts((state / "exit").read_bytes())
    finally:
        os.close(descriptor)


FORGERY = """
state = "state"
os.chmod(state, 0o700)
if os.path.exists(f"{state}/exit.new"):
    os.rename(f"{state}/exit.new", f"{state}/elsewhere")
os.mkdir(f"{state}/exit")
for name in ("exit.new", "again"):
    with contextlib.suppress(FileExistsError):
        os.symlink("/dev/null", f"{state}/{name}")
os.chmod(state, 0o500)
os._exit(9)
"""


def test_what_a_payload_puts_in_the_records_place_gives_way_to_it(
    run_python: Start, state: tuple[Path, int], case: tuple[str, str, str]
) -> None:
    """A payload of the same user, where it can see the directory at all."""
    shim = run_python(FORGERY, state=state[1])
    ended = shim.end()
    assert (state[0] / "exit").is_file()
    assert facts((state[0] / "exit").read_bytes()) == ended
    if case[1] == "subreaper":
        assert ended["status"] == str(9 << 8)


# -- when there is no agent any more -----------------------------------------------------------------------------------


def agent_lock(path: Path) -> int:
    """What an agent holds that has adopted a payload; closed, it is free."""
    lock = os.open(path / "agent.lock", os.O_RDWR | os.O_CREAT, 0o666)
    os.chmod(path / "agent.lock", 0o666)
    fcntl.fcntl(lock, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
    return lock


def lose_agent(shim: Shim) -> None:
    """Its end of the report closes, as when it is killed."""
    os.close(shim._report)
    shim._report = os.open("/dev/null", os.O_RDONLY)


def record_of(path: Path) -> dict[str, str]:
    return facts((path / "exit").read_bytes())


def test_payload_without_an_agent_is_ended_politely(run_sh: Start, state: tuple[Path, int]) -> None:
    shim = run_sh(
        'trap "exit 4" TERM; echo ready; while :; do sleep 0.05; done', state=state[1], settings="n,orphan=200"
    )
    shim.ready()
    lose_agent(shim)
    shim.end()
    found = record_of(state[0])
    assert (found["asked"], found["status"], found["synced"]) == ("O", str(4 << 8), "1")


def test_payload_without_an_agent_has_its_grace(run_sh: Start, state: tuple[Path, int]) -> None:
    shim = run_sh('trap "" TERM; echo ready; while :; do sleep 0.05; done', state=state[1], settings="n,orphan=50",
                  grace_ms=200)  # fmt: skip
    shim.ready()
    lose_agent(shim)
    shim.end()
    found = record_of(state[0])
    assert (found["asked"], found["status"], found["grace_expired"]) == ("O", "9", "1")


def test_payload_is_left_alone_while_its_agent_lives(run_sh: Start, state: tuple[Path, int]) -> None:
    shim = run_sh("sleep 0.6; exit 5", state=state[1], settings="n,orphan=100")
    ended = shim.end()
    assert (ended["asked"], ended["status"], ended["synced"]) == ("-", str(5 << 8), "0")


def test_payload_is_left_alone_while_another_agent_has_adopted_it(run_sh: Start, state: tuple[Path, int]) -> None:
    shim = run_sh("echo ready; exec sleep 1000", state=state[1], settings="n,orphan=200")
    shim.ready()
    lock = agent_lock(state[0])
    try:
        lose_agent(shim)
        assert not wait_readable(shim._pidfd, 1)
    finally:
        os.close(lock)
    shim.end()
    assert record_of(state[0])["asked"] == "O"


def test_payload_without_an_agent_runs_for_ever_if_it_may(run_sh: Start, state: tuple[Path, int]) -> None:
    shim = run_sh("sleep 0.6; exit 6", state=state[1])
    lose_agent(shim)
    shim.end()
    assert (record_of(state[0])["asked"], record_of(state[0])["status"]) == ("-", str(6 << 8))


# -- what is hidden ----------------------------------------------------------------------------------------------------


def test_state_directory_is_hidden_where_there_are_mounts(
    run_sh: Start, state: tuple[Path, int], home: Path, case: tuple[str, str, str]
) -> None:
    (home / "others").mkdir()
    (home / "others" / "secret").touch()
    others = os.open(home / "others", os.O_PATH | os.O_DIRECTORY)
    try:
        hides = case[1] == "pid-namespace"
        shim = run_sh(
            "ls -A state others 2>&1; echo forged > state/exit; unshare -Urm umount state; echo; ls -A state; exit 3",
            state=state[1], settings=f"n,hide={others}" if hides else "n", pass_fds=[others],
        )  # fmt: skip
        assert shim.started()["hidden"] == str(int(hides))
        assert shim.end()["status"] == str(3 << 8)
        assert record_of(state[0])["status"] == str(3 << 8)
        seen = "lock" in shim.output() or "secret" in shim.output()
        assert seen is not hides, shim.output()
    finally:
        os.close(others)


# -- where it is hard ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in IN_NAMESPACE if "root" in str(case.id)], indirect=True)
def test_root_without_the_administrators_capability_has_a_user_namespace(run_python: Start) -> None:
    """As in most containers. It was refused."""
    shim = run_python(PROBE, before=["/usr/bin/setpriv", "--bounding-set=-sys_admin"])
    started = shim.started()
    if "refused" in started:
        assert "proc" in started["what"]  # a container may hide parts of /proc, and then no new one can be had
        pytest.skip(str(started))
    assert shim.end()["status"] == "0"
    found = json.loads(shim.output())
    assert (found["parent"], found["user"]) == (1, [0] * 4)


def test_node_without_a_process_left_says_so(run_sh: Start, case: tuple[str, str, str]) -> None:
    """A busy node is no node that allows no namespaces: what is reported tells one from the other."""
    if not rights(case[2]):
        pytest.skip("no limit of processes holds root")
    if case[0] == "started":
        pytest.skip("there is no shim then: see test_starter.py")
    shim = run_sh("echo started", before=["/usr/bin/prlimit", "--nproc=1"])
    refusal = shim.started()
    assert int(refusal["errno"]) == errno.EAGAIN, refusal
    assert (shim.end(), shim.popen.returncode, shim.output()) == ({}, 125, "")


# -- what it does not do ---------------------------------------------------------------------------------------------

GOOD = {"state": "-1", "report": "-1", "environment": "0", "grace": "0", "mode": "subreaper", "settings": "n"}
BAD = [
    *({**GOOD, "state": word} for word in ("", "x", "-2")),
    *({**GOOD, "report": word} for word in ("", "1x", "-2")),
    *({**GOOD, "environment": word} for word in ("", "-2")),
    *({**GOOD, "grace": word} for word in ("1s", "-1", str(2**31))),
    *({**GOOD, "mode": word} for word in ("", "namespace")),
    *({**GOOD, "settings": word} for word in ("", "nx", "n,", ",n", "n,,n", "-,n", "n=1", "private", "wrapped=1")),
    *({**GOOD, "settings": f"nice={word}"} for word in ("", "-1", "20", "x")),
    *({**GOOD, "settings": f"cpus={word}"} for word in ("", "+", "1-", "-1", "3-1", "8192", "0-99999", "1,2")),
    *({**GOOD, "settings": f"cpu={word}"} for word in ("", "1", "1:", "2:1", "-1:1", "1:2:3")),
    *({**GOOD, "settings": f"join={word}"} for word in ("", "-1", "x")),
    {**GOOD, "settings": ",".join(["join=0"] * 17)},
    *({**GOOD, "settings": word} for word in ("orphan=100", "hide=0")),
    *({**GOOD, "mode": "pid-namespace", "settings": f"hide={word}"} for word in ("", "-1", "x")),
    {**GOOD, "mode": "pid-namespace", "settings": ",".join(["hide=0"] * 17)},
]


def test_bad_words_end_with_125_and_start_nothing(shim_argv: list[str], case: tuple[str, str, str]) -> None:
    attempts = [shim_argv, *([*shim_argv, *words.values(), "/bin/echo", "hello"] for words in BAD)]
    started = [
        subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **rights(case[2])) for argv in attempts
    ]
    assert [(process.communicate(), process.returncode) for process in started] == [((b"", b""), 125)] * len(attempts)


def test_no_program_ends_with_125(start: Start) -> None:
    shim = start()
    assert (shim.started(), shim.end(), shim.popen.returncode) == ({}, {}, 125)


@pytest.mark.parametrize("case", IN_NAMESPACE, indirect=True)
def test_node_without_namespaces_is_reported_as_a_refusal(run_sh: Start) -> None:
    forbid = 'echo 0 > /proc/sys/user/max_pid_namespaces && exec "$@"'
    shim = run_sh("echo started", before=["/usr/bin/unshare", "-Ur", "/bin/sh", "-c", forbid, "sh"])
    refusal = shim.started()
    assert refusal["refused"] == "pid-namespace"
    assert refusal["reason"] == os.strerror(errno.ENOSPC)
    assert (shim.end(), shim.popen.returncode, shim.output()) == ({}, 125, "")

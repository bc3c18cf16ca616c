"""Starting a payload in a containment and an isolation, and ending it when what holds it is hindered or killed."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread

from conftest import until
from loadmaster.description import Containment, Isolation
from loadmaster.payload import containment as containment_module
from loadmaster.payload import shimtree
from loadmaster.payload.containment import shim_kind, start_contained
from loadmaster.payload.isolation import apptainer_environment, apptainer_words, isolated
from loadmaster.payload.launch import Launch, Refused
from loadmaster.payload.process import ExitRecord
from loadmaster.payload.shimtree import ShimTree
from loadmaster.payload.starter import Starter, open_starter
from loadmaster.payload.tree import Tree
from loadmaster.payload.usage import read_stat
from loadmaster.world import BEST_FIRST

ENV = {"PATH": "/usr/bin:/bin"}
SHIMS = [Containment.PID_NAMESPACE, Containment.SUBREAPER]
EVERY = [*SHIMS, Containment.SESSION]

Make = Callable[..., Launch]


@pytest.fixture
def printed(tmp_path: Path) -> Path:
    return tmp_path / "printed"


@pytest.fixture(params=["executed", "ordered"])
async def starter(request: pytest.FixtureRequest, anyio_backend: Any) -> AsyncIterator[Starter | None]:
    """What starts the shims: nobody, or a starter; that one on uvloop too would tell nothing new."""
    if request.param == "executed":
        yield None
        return
    if shim_kind() != "c" or anyio_backend[1].get("use_uvloop"):
        pytest.skip("no starter here")
    async with open_starter() as starter:
        yield starter


@pytest.fixture
def sh(tmp_path: Path, printed: Path, starter: Starter | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """A launch of a piece of shell in `work`, whose output goes to `printed`: `sh("exit 3", nice=1)`."""
    if starter is not None:
        monkeypatch.setitem(globals(), "start_contained", partial(start_contained, starter=starter))
    (tmp_path / "work").mkdir()
    with printed.open("wb") as file:

        def sh(script: str, *, grace_seconds: float = 10, env: dict[str, str] = ENV, **words: Any) -> Launch:
            argv = ["/bin/sh", "-c", script]
            return Launch(argv, env, tmp_path / "work", file.fileno(), file.fileno(), grace_seconds, **words)

        yield sh


async def start(launch: Launch, kind: Containment) -> Tree:
    """Start it in just this; the test is skipped where the node does not allow it."""
    try:
        return await start_contained(launch, [kind])
    except Refused as exc:
        pytest.skip(str(exc))


async def ended(tree: Tree) -> ExitRecord:
    with anyio.fail_after(20):
        await tree.wait()
        assert await tree.end(0)
    return tree.reap()


async def run(launch: Launch, kind: Containment) -> ExitRecord:
    return await ended(await start(launch, kind))


def shim_of(tree: Tree) -> int:
    assert isinstance(tree, ShimTree)
    return tree.shim_pid


def gone(pid: int) -> bool:
    found = read_stat(pid)
    return found is None or found.state in "ZX"


# -- what it is started with -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY)
async def test_a_payload_has_the_nice_the_cores_and_the_limit_of_its_launch(
    sh: Make, printed: Path, kind: Containment
) -> None:
    """In a session they come once it runs, so it is made to wait for its input to be looked at."""
    own = sorted(os.sched_getaffinity(0))
    launch = sh("sleep 0.2; nice; grep -h Cpus_allowed_list /proc/self/status; grep cpu /proc/self/limits; umask",
                nice=3, cores=frozenset(own[:1]), cpu_seconds=99.5, umask=0o027)  # fmt: skip
    assert (await run(launch, kind)).exit_code == 0
    nice, cpus, limit, umask = printed.read_text().splitlines()
    assert nice == str(os.getpriority(os.PRIO_PROCESS, 0) + 3)
    assert cpus.split() == ["Cpus_allowed_list:", str(own[0])]
    assert limit.split() == ["Max", "cpu", "time", "105", "110", "seconds"]
    assert umask == "0027"


@pytest.mark.parametrize("kind", EVERY)
async def test_cores_that_are_not_there_are_said_and_start_nothing(sh: Make, tmp_path: Path, kind: Containment) -> None:
    with pytest.raises(OSError, match="Invalid argument") as raised:
        await start(sh("sleep 0.2; touch started", cores=frozenset({8000})), kind)
    assert raised.value.errno == errno.EINVAL
    assert not (tmp_path / "work" / "started").exists()


async def test_a_session_has_usual_signals_whatever_the_embedding_program_ignores_and_blocks(
    sh: Make, printed: Path
) -> None:
    """Popen restores three; a payload of a pilot under nohup, or with SIGCHLD ignored, had to live with it."""
    launch = sh("exec grep -E '^Sig(Ign|Blk)' /proc/self/status")

    def start_there() -> Tree:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
        try:
            return containment_module.SessionTree.start(launch)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert (await ended(await to_thread.run_sync(start_there))).exit_code == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert printed.read_text() == f"SigBlk:\t{0:016x}\nSigIgn:\t{0:016x}\n"


async def test_what_cannot_be_executed_is_said_also_by_way_of_the_shim(sh: Make, tmp_path: Path) -> None:
    with (tmp_path / "procs").open("wb") as group, pytest.raises(OSError, match="No such file"):
        await start(replace(sh("", join=(group.fileno(),)), argv=["/nowhere"]), Containment.SESSION)


@pytest.mark.parametrize("kind", EVERY)
async def test_groups_are_joined_in_every_containment(sh: Make, tmp_path: Path, kind: Containment) -> None:
    """Any file will do to see what is written."""
    with (tmp_path / "procs").open("wb") as group:
        assert (await run(sh("exit 4", join=(group.fileno(),)), kind)).exit_code == 4
    assert (tmp_path / "procs").read_text() == "0\n"


# -- where it is refused -----------------------------------------------------------------------------------------


async def test_a_group_has_to_be_made_before_it_can_hold(sh: Make) -> None:
    with pytest.raises(Refused, match="cgroup: no group was made"):
        await start_contained(sh("exit 0"), [Containment.CGROUP])
    tree = await start_contained(sh("exit 0"), [Containment.CGROUP, Containment.SUBREAPER])
    assert tree.containment is Containment.SUBREAPER
    await ended(tree)


def test_a_busy_node_is_an_error_and_no_reason_for_a_weaker_containment(
    as_ordinary_user: Callable[[str], str],
) -> None:
    """With no process left for the namespace, the payload was started in its process group alone."""
    if shim_kind() == "python":
        pytest.skip("an ordinary user may not execute this interpreter")
    said = as_ordinary_user("""
import resource
from pathlib import Path
from loadmaster.world import BEST_FIRST
from loadmaster.payload.containment import start_contained
from loadmaster.payload.launch import Launch

async def attempt():
    launch = Launch(["/bin/true"], {}, Path.cwd(), 1, 2, 1)
    try:
        tree = await start_contained(launch, BEST_FIRST)
    except OSError as exc:
        return exc
    await tree.wait()
    await tree.end(0)
    tree.reap()
    return tree

async def main():
    await attempt()  # the threads it takes are there
    most, found = resource.getrlimit(resource.RLIMIT_NPROC)[1], set()
    for limit in range(1, 60):
        resource.setrlimit(resource.RLIMIT_NPROC, (limit, most))
        got = await attempt()
        found.add(str(got) if isinstance(got, OSError) else got.containment.value)
        if not isinstance(got, OSError):
            break
    print("\\n".join(sorted(found)))
anyio.run(main)
""")
    assert "session" not in said.splitlines()
    assert "a limit of processes is reached: RLIMIT_NPROC (" in said


# -- when what holds it is hindered ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHIMS)
async def test_a_stopped_shim_goes_on_when_it_is_given_an_order(sh: Make, printed: Path, kind: Containment) -> None:
    tree = await start(sh("trap 'exit 3' TERM; echo ready; while :; do sleep 0.02; done"), kind)
    await until(lambda: printed.read_text() == "ready\n")
    os.kill(shim_of(tree), signal.SIGSTOP)
    with anyio.fail_after(10):
        assert await tree.end(10)
    assert tree.reap().exit_code == 3


@pytest.mark.parametrize("kind", SHIMS)
async def test_a_shim_that_is_stopped_again_and_again_does_not_hold_up_the_end(
    sh: Make, printed: Path, kind: Containment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shimtree, "ANSWER_SECONDS", dict.fromkeys(Containment, 0.2))
    tree = await start(sh("trap '' TERM; sleep 1000 & setsid sleep 1000 & echo $! ; sleep 1000"), kind)
    await until(lambda: printed.read_text().endswith("\n"))
    shim = shim_of(tree)
    seen = below(shim)
    stop = f"import os\nwhile True:\n try: os.kill({shim}, 19)\n except ProcessLookupError: break"
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", stop]) as attacker:
        await until(lambda: getattr(read_stat(shim), "state", "") == "T")
        with anyio.fail_after(20):
            assert await tree.end(0)
        assert all(map(gone, seen))
        tree.reap()
        attacker.kill()


@pytest.mark.parametrize("kind", SHIMS)
async def test_a_shim_that_cannot_open_files_does_not_hold_up_the_end(
    sh: Make, printed: Path, kind: Containment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has its user may take that from it. It then sees nobody to kill; we do."""
    monkeypatch.setattr(shimtree, "ANSWER_SECONDS", dict.fromkeys(Containment, 0.3))
    tree = await start(sh("trap '' TERM; setsid sleep 1000 & echo ready; sleep 1000"), kind)
    await until(lambda: printed.read_text() == "ready\n")
    shim = shim_of(tree)
    seen = below(shim)
    resource.prlimit(shim, resource.RLIMIT_NOFILE, (0, 0))
    with anyio.fail_after(20):
        assert await tree.end(0)
    assert all(map(gone, seen))
    assert tree.reap().signal == signal.SIGKILL


@pytest.mark.parametrize("kind", SHIMS)
async def test_when_the_shim_is_killed_what_stayed_in_the_session_is_ended(
    sh: Make, printed: Path, kind: Containment
) -> None:
    tree = await start(sh("sleep 1000 & echo ready; sleep 1000"), kind)
    await until(lambda: printed.read_text() == "ready\n")
    seen = below(shim_of(tree))
    os.kill(shim_of(tree), signal.SIGKILL)
    await tree.wait()
    assert tree.gone
    assert await tree.end(0)
    await until(lambda: all(map(gone, seen)))
    assert tree.reap() == ExitRecord()


@pytest.mark.parametrize("starter", ["executed"], indirect=True)
async def test_a_shim_that_dies_before_it_has_spoken_is_not_followed_by_a_second_start(
    sh: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have started the payload: nobody may do so again in a weaker containment."""
    monkeypatch.setattr(shimtree, "shim_command", lambda: ["/bin/sh", "-c", "kill -KILL $$"])
    with pytest.raises(OSError, match="before it said what it had started"):
        await start_contained(sh("touch started"), BEST_FIRST)
    assert not (tmp_path / "work" / "started").exists()


@pytest.mark.parametrize("starter", ["executed"], indirect=True)
async def test_a_shim_that_cannot_be_executed_is_a_refusal(sh: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk mounted noexec, or of another machine's kind: what needs none is still to be had."""
    monkeypatch.setattr(shimtree, "shim_command", lambda: ["/etc/passwd"])
    with pytest.raises(Refused, match="the shim cannot be executed"):
        await start_contained(sh("exit 0"), SHIMS)
    tree = await start_contained(sh("exit 6"), BEST_FIRST)
    assert tree.containment is Containment.SESSION
    assert (await ended(tree)).exit_code == 6


def below(pid: int) -> list[int]:
    """All descendants, of processes with one thread each."""
    found = [pid]
    for parent in found:
        found += map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return found[1:]


# -- in a group --------------------------------------------------------------------------------------------------


class OneGroup:
    """A control group of version 2, as little as it takes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.descriptors: tuple[int, ...] = (os.open(path / "cgroup.procs", os.O_WRONLY),)

    def kill(self) -> None:
        (self.path / "cgroup.kill").write_text("1")

    def usage(self) -> str:
        return (self.path / "cpu.stat").read_text()

    def remove(self) -> bool:
        if "populated 0" not in (self.path / "cgroup.events").read_text():
            return False
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.path.rmdir()
        return True


@pytest.fixture
async def group(anyio_backend: Any) -> AsyncIterator[OneGroup]:
    for base in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        if (base / "cgroup.controllers").exists() and os.access(base, os.W_OK):
            group = OneGroup(base / f"loadmaster-test-{os.getpid()}")
            break
    else:
        pytest.skip("no control group can be made here")
    yield group
    group.kill()
    await until(group.remove)


async def test_what_left_the_session_and_lost_the_shim_is_ended_by_its_group(
    sh: Make, printed: Path, group: OneGroup
) -> None:
    launch = sh("setsid sleep 1000 & echo ready; sleep 1000", group=group)
    tree = await start(launch, Containment.CGROUP)
    assert tree.containment is Containment.CGROUP
    await until(lambda: printed.read_text() == "ready\n")
    seen = below(shim_of(tree))
    assert set(map(int, (group.path / "cgroup.procs").read_text().split())) == set(seen)
    os.kill(shim_of(tree), signal.SIGKILL)
    await tree.wait()
    assert await tree.end(0)
    await until(lambda: all(map(gone, seen)))
    tree.reap()


@pytest.mark.parametrize("kind", EVERY)
async def test_a_group_is_joined_whatever_else_holds_the_payload(
    sh: Make, printed: Path, group: OneGroup, kind: Containment
) -> None:
    assert (await run(sh("exec grep ^0: /proc/self/cgroup", group=group), kind)).exit_code == 0
    assert printed.read_text().strip().endswith(f"/{group.path.name}")


# -- how it ended ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHIMS)
async def test_the_record_tells_the_payloads_own_from_the_trees(sh: Make, kind: Containment) -> None:
    burn = "import os, time\\nif os.fork() == 0:\\n os.setsid()\\n while time.process_time() < 0.2: pass"
    script = f"(exec {sys.executable} -I -S -c \"exec('{burn}')\") & wait; sleep 0.4"
    record = await run(sh(script), kind)
    assert record.exit_code == 0
    assert record.tree.cpu_seconds == record.cpu_seconds > 0.15
    assert record.tree.peak_bytes == record.peak_bytes is not None
    assert (record.asked, record.grace_expired) == ("-", False)


@pytest.mark.parametrize("kind", SHIMS)
async def test_the_record_tells_who_asked_and_whether_the_grace_was_needed(
    sh: Make, printed: Path, kind: Containment
) -> None:
    launch = sh("trap '' TERM; setsid sleep 1000 & echo ready; sleep 1000", grace_seconds=0.1)
    tree = await start(launch, kind)
    await until(lambda: printed.read_text() == "ready\n")
    assert await tree.end(0.1)
    record = tree.reap()
    assert (record.signal, record.asked, record.grace_expired) == (9, "T", True)
    assert 1 <= record.orphans <= 2


# -- in isolation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Containment.SUBREAPER, Containment.SESSION])
async def test_own_mounts_take_own_processes(sh: Make, kind: Containment) -> None:
    with pytest.raises(Refused, match=f"isolation namespaces takes containment pid-namespace, and not {kind}"):
        await start_contained(sh("exit 0", isolation=Isolation.NAMESPACES), [kind])


LOOK = (
    "touch here; touch /usr/written 2>/dev/null; ls /tmp | wc -l; pwd; echo $SECRET; ls /proc/self/fd | wc -l; exit 7"
)


@pytest.mark.parametrize(
    ("isolation", "kind"),
    [(Isolation.NAMESPACES, Containment.PID_NAMESPACE), *((Isolation.BUBBLEWRAP, kind) for kind in EVERY)],
)
async def test_in_isolation_a_payload_has_its_directory_and_no_more_to_write_to(
    sh: Make, tmp_path: Path, printed: Path, isolation: Isolation, kind: Containment
) -> None:
    launch = sh(LOOK, env={**ENV, "SECRET": "a word"}, isolation=isolation)
    assert (await run(launch, kind)).exit_code == 7
    seen, cwd, secret, descriptors = printed.read_text().splitlines()
    assert int(seen) <= 2  # what leads to the work directory, and to an installation below /tmp
    assert (cwd, secret, descriptors) == (str(launch.cwd), "a word", "4")
    assert (launch.cwd / "here").exists()
    assert not Path("/usr/written").exists()


@pytest.mark.parametrize("kind", EVERY)
async def test_a_payload_in_bubblewrap_has_its_grace(sh: Make, printed: Path, kind: Containment) -> None:
    """bwrap ended at a TERM at once, and took the payload with it."""
    script = "trap 'sleep 0.2; echo tidy; exit 3' TERM; echo ready; while :; do sleep 0.02; done"
    tree = await start(sh(script, isolation=Isolation.BUBBLEWRAP), kind)
    await until(lambda: printed.read_text() == "ready\n")
    with anyio.fail_after(15):
        assert await tree.end(10)
    record = tree.reap()
    assert record.exit_code == 3
    assert printed.read_text().endswith("tidy\n")


async def test_the_payloads_environment_does_not_reach_into_bubblewrap(sh: Make, tmp_path: Path, printed: Path) -> None:
    """A library it names would be loaded by bwrap, which is outside."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no compiler here")
    launch = sh("echo payload", isolation=Isolation.BUBBLEWRAP)
    source, library = launch.cwd / "evil.c", launch.cwd / "evil.so"
    source.write_text(
        "#include <unistd.h>\n#include <fcntl.h>\n"
        f'__attribute__((constructor)) static void run(void) {{ open("{tmp_path}/outside", O_CREAT | O_WRONLY, 0600); }}'
    )
    await anyio.run_process([compiler, "-shared", "-fPIC", "-o", library, source])
    launch = replace(launch, env={**ENV, "LD_PRELOAD": str(library)})
    assert (await run(launch, Containment.SUBREAPER)).exit_code == 0
    assert printed.read_text() == "payload\n"
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize(
    ("isolation", "image", "missing"),
    [
        (Isolation.BUBBLEWRAP, None, "install the package bubblewrap"),
        (Isolation.APPTAINER, "image.sif", "install the package apptainer"),
        (Isolation.APPTAINER, None, "no image was named"),
        (Isolation.APPTAINER, "--bind=/", "no image was named"),
    ],
)
def test_what_is_missing_for_an_isolation_is_said(
    sh: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isolation: Isolation, image: str | None, missing: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Refused, match=missing):
        isolated(sh("exit 0", isolation=isolation, image=image), Containment.SUBREAPER)


def test_a_bubblewrap_that_is_let_nothing_is_a_refusal(
    sh: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2; exit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Refused, match="No permissions to create new namespace; an ordinary user needs"):
        isolated(sh("exit 0", isolation=Isolation.BUBBLEWRAP), Containment.SUBREAPER)


def test_apptainer_is_called_with_nothing_of_the_payloads_to_steer_it(tmp_path: Path) -> None:
    words = apptainer_words("/usr/bin/apptainer", tmp_path, "/cvmfs/image")
    assert words[:4] == ["/usr/bin/apptainer", "exec", "--contain", "--cleanenv"]
    assert words[4:] == ["--bind", f"{tmp_path}:{tmp_path}", "--pwd", str(tmp_path), "/cvmfs/image"]
    env = apptainer_environment("/usr/bin/apptainer", {"APPTAINER_BIND": "/", "LD_PRELOAD": "evil.so", "PATH": "/x"})
    assert {"APPTAINER_BIND", "LD_PRELOAD"}.isdisjoint(env)
    assert (env["APPTAINERENV_LD_PRELOAD"], env["APPTAINERENV_PATH"], env["PATH"]) == (
        "evil.so", "/x", "/usr/local/bin:/usr/bin:/bin",
    )  # fmt: skip
    assert "SINGULARITYENV_A" in apptainer_environment("/opt/bin/singularity", {"A": "b"})


@pytest.mark.skipif(not (shutil.which("apptainer") or shutil.which("singularity")), reason="apptainer is not installed")
async def test_a_payload_runs_in_an_image(sh: Make, tmp_path: Path, printed: Path) -> None:
    """A directory is an image too."""
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("takes busybox")
    image = tmp_path / "image"
    for name in ("bin", "tmp", "proc", "dev", "etc"):
        (image / name).mkdir(parents=True)
    shutil.copy(busybox, image / "bin" / "sh")
    launch = sh("pwd; exit 7", isolation=Isolation.APPTAINER, image=str(image))
    assert (await run(launch, Containment.SUBREAPER)).exit_code == 7
    assert printed.read_text() == f"{launch.cwd}\n"

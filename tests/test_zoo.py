"""The zoo: what hostile payloads get away with, in each containment, as an ordinary user and as root."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import pytest

import loadmaster
from conftest import TEMPORARY
from loadmaster.description import Containment
from zoo_holder import MAX_FILE_BYTES, Order, Sighting

HERE: Final = Path(__file__).parent
PACKAGE: Final = Path(loadmaster.__file__).parent
USER: Final = 60000 + os.getpid() % 5000
"""An ordinary user whom nobody else is: a limit of processes counts those of a user on the whole machine."""

HELPERS: Final = {"t09_hopper1": "hopper", "t11_forkbomb": "forkbomb", "t16_suid_root": "suidroot"}

NAMESPACE, _, SUBREAPER, SESSION = Containment
NOWHERE: Final[frozenset[Containment]] = frozenset()
ANYWHERE: Final = frozenset(Containment)

ESCAPES: Final = {
    "t01_plain_child": NOWHERE,
    "t02_setsid_child": {SESSION},
    "t04_daemon_scrubbed": {SESSION},
    "t06_ignore_term": NOWHERE,
    "t08_watchdogs": {SESSION},
    "t09_hopper1": {SESSION},
    "t11_forkbomb": NOWHERE,
    "t13_kill_parent": {SESSION},
    "t16_suid_root": {SESSION},
    "t18_outside_launcher": ANYWHERE,
    "t20_zombie_leader": {SESSION},
    "t22_stopped": {SESSION},
    "t23_nested_subreaper": {SESSION},
    "t26_slow_term": NOWHERE,
}
"""Where each payload gets away, found by running it. docs/containment.md says why."""

FENCED: Final = {("t13_kill_parent", SUBREAPER)}
"""Held where the kernel has Landlock's scopes (6.12)."""

Look = Callable[..., Sighting]


# -- the keepers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zoo() -> Iterator[Path]:
    """A copy of the payloads and of the package that anybody may read, the C helpers built."""
    with tempfile.TemporaryDirectory(prefix="zoo-", dir=TEMPORARY) as name:
        place = Path(name)
        place.chmod(0o755)
        shutil.copytree(HERE / "zoo", place / "zoo")
        shutil.copytree(PACKAGE, place / "package" / "loadmaster", ignore=shutil.ignore_patterns("__pycache__"))
        compiler = shutil.which("cc")
        shim = place / "package" / "loadmaster" / "payload" / "shim"
        if compiler:
            sources = [(helper, place / "zoo" / helper) for helper in HELPERS.values()]
            for helper, target in sources:
                subprocess.run([compiler, "-O2", "-w", "-o", target, HERE / "zoo" / f"{helper}.c"], check=True)
            # Always anew: what was built in place may be of an older source.
            subprocess.run([compiler, "-Os", "-o", shim, shim.with_suffix(".c")], check=True)
        if not shim.exists() and not shim.with_suffix(".py").exists():
            pytest.skip("there is no shim here, and no compiler to build it")
        if os.geteuid() == 0 and compiler:
            (place / "zoo" / "suidroot").chmod(0o4755)
        yield place


@pytest.fixture(scope="module")
def python() -> str:
    """An interpreter that an ordinary user may execute."""
    user: dict[str, Any] = {"user": USER, "group": USER, "extra_groups": []} if os.geteuid() == 0 else {}
    for found in (sys.executable, shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin")):
        try:
            if found and subprocess.run([found, "-I", "-c", "import ctypes"], cwd="/", **user).returncode == 0:
                return found
        except PermissionError:
            continue
    pytest.skip("there is no Python that an ordinary user may execute")


@pytest.fixture(scope="module")
def holding() -> list[str]:
    """The words that put the holder first in a pid namespace, none where that is refused."""
    words = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.geteuid() != 0:
        words += ["--user", "--map-current-user"]
    try:
        allowed = subprocess.run([*words, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    return words if allowed else []


@pytest.fixture
def look(zoo: Path, python: str, holding: list[str]) -> Look:
    """Run something of the zoo, and say what was seen: `look("t01_plain_child", Containment.SESSION)`."""

    def look(
        payload: str = "", containment: Containment | None = None, *, job: dict[str, Any] | None = None,
        backend: str = "asyncio", root: bool = False, to_its_end: bool = False, isolation: str = "none",
    ) -> Sighting:  # fmt: skip
        helper = HELPERS.get(payload)
        if helper and not (zoo / "zoo" / helper).exists():
            pytest.skip(f"{payload} needs a compiler")
        if payload == "t16_suid_root" and (os.geteuid() != 0 or os.statvfs(zoo).f_flag & os.ST_NOSUID):
            pytest.skip("only root can make a set-uid program, and not on every disk")
        with tempfile.TemporaryDirectory(prefix="z-", dir=TEMPORARY) as home:
            order = Order(
                home, str(zoo / "zoo"), str(zoo / "package"), sys.path, python,
                user=USER if os.geteuid() == 0 and not root else os.geteuid(),
                payload=payload, containment=containment or "", backend=backend, to_its_end=to_its_end, job=job,
                isolation=isolation,
            )  # fmt: skip
            done = subprocess.run(
                [*holding, sys.executable, "-I", HERE / "zoo_holder.py"],
                input=json.dumps(asdict(order)), capture_output=True, text=True, timeout=50,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            seen = Sighting(**json.loads(done.stdout))
            seen.out = seen.out or done.stderr  # the driver's story, if it failed
            if seen.refused:
                pytest.skip(seen.refused)
            return seen

    return look


@pytest.fixture
def run(look: Look, zoo: Path, python: str) -> Look:
    """Run a payload as a whole job: `run("r15_exit_codes", "-9")`."""

    def run(payload: str, arguments: str = "", **words: Any) -> Sighting:
        words = {"output_sandbox": ["std.out"], **words}
        seen = look(job={"executable": python, "arguments": f"{zoo}/zoo/{payload}.py {arguments}", **words})
        assert seen.driver_survived, "loadmaster crashed, or the payload killed it"
        assert not seen.escaped, f"left behind: {seen.left}"
        assert seen.workdirs == [], "a work directory was left behind"
        return seen

    return run


# -- getting away ------------------------------------------------------------------------------------------------


def check(seen: Sighting, payload: str, containment: Containment) -> None:
    assert seen.ready, f"the attack was not made: {seen.out}"
    found = f"late: {seen.late}, left: {seen.left}"
    unfenced = (payload, containment) in FENCED and not seen.fenced
    assert seen.escaped == (unfenced or containment in ESCAPES[payload]), found
    if not seen.escaped:
        assert seen.end_seconds < 10, "the end of a contained payload was held up"
        assert seen.outcome["signal"] in {15, 9}, "the payload was killed, and this is what has to be said"


def test_every_payload_that_tries_to_get_away_has_its_line() -> None:
    assert set(ESCAPES) == {file.stem for file in HERE.glob("zoo/t*.py")}


@pytest.mark.parametrize("payload", ESCAPES)
def test_nothing_gets_away_from_a_pid_namespace_but_what_another_daemon_starts(look: Look, payload: str) -> None:
    check(look(payload, NAMESPACE), payload, NAMESPACE)


@pytest.mark.parametrize(
    ("payload", "containment", "backend"),
    [
        ("t08_watchdogs", NAMESPACE, "trio"),
        ("t09_hopper1", SUBREAPER, "asyncio"),
        ("t13_kill_parent", SUBREAPER, "asyncio"),
        ("t16_suid_root", SUBREAPER, "asyncio"),
        ("t20_zombie_leader", SUBREAPER, "trio"),
        ("t02_setsid_child", SESSION, "trio"),
        ("t06_ignore_term", SESSION, "asyncio"),
        ("t13_kill_parent", SESSION, "asyncio"),
    ],
)
def test_a_payload_gets_away_exactly_where_it_is_said_to(
    look: Look, payload: str, containment: Containment, backend: str
) -> None:
    check(look(payload, containment, backend=backend), payload, containment)


@pytest.mark.parametrize("isolation", ["namespaces", "bubblewrap"])
def test_a_daemon_outside_is_out_of_reach_in_isolation(look: Look, isolation: str) -> None:
    """t18 has a socket in /tmp start a process for it, which no containment holds: the isolations hide the socket."""
    seen = look("t18_outside_launcher", NAMESPACE, isolation=isolation)
    assert seen.ready, seen.out
    assert (seen.late, seen.left) == ([], []), seen.out
    assert "launcher unreachable" in seen.out


@pytest.mark.parametrize("payload", ["t04_daemon_scrubbed", "t13_kill_parent"])
def test_nothing_gets_away_from_a_pid_namespace_of_root(look: Look, payload: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("takes root")
    check(look(payload, NAMESPACE, root=True), payload, NAMESPACE)


@pytest.mark.long
@pytest.mark.parametrize("root", [False, True], ids=["user", "root"])
@pytest.mark.parametrize("containment", [NAMESPACE, SUBREAPER, SESSION])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("payload", ESCAPES)
def test_the_whole_matrix(look: Look, payload: str, backend: str, containment: Containment, root: bool) -> None:
    if root and os.geteuid() != 0:
        pytest.skip("takes root")
    if root and payload == "t11_forkbomb":
        pytest.skip("a limit of processes does not hold root: the machine would be gone before the payload")
    check(look(payload, containment, backend=backend, root=root), payload, containment)


# -- hostile files -----------------------------------------------------------------------------------------------


def test_a_file_outside_is_not_delivered_through_a_link(run: Look) -> None:
    names = ["out.root", "up", "env"]
    seen = run("f01_symlink_output", output_data=names, output_sandbox=[])
    assert seen.outcome["failure"]["kind"] == "StagingFailed"
    for name in names:
        assert f"{name}: is a symbolic link out of the work directory" in seen.outcome["failure"]["message"]
    assert list(seen.outcome["outputs"]) == []
    assert set(seen.outcome["missing_outputs"]) == set(names)


def test_an_output_that_nobody_writes_to_does_not_hold_up_the_job(run: Look) -> None:
    seen = run("f02_fifo_output", output_data=["out.root"], output_sandbox=[])
    assert seen.end_seconds < 5
    assert "out.root: is a FIFO, not a file" in seen.outcome["failure"]["message"]
    assert list(seen.outcome["outputs"]) == []


def test_a_work_directory_with_closed_directories_is_removed(run: Look) -> None:
    assert run("f05_chmod000").outcome["status"] == "Done"


def test_a_file_is_delivered_whole_however_it_was_written(run: Look) -> None:
    sizes = {
        "plain": 1, "renamed": 1, "appended": 3, "mapped": 8192, "kept": 1, "tmpfile": 1, "hard": 1, "two": 2,
        "s1/s2/s3/deep": 1,
    }  # fmt: skip
    seen = run("f08_write_styles", output_data=list(sizes), output_sandbox=[])
    assert seen.outcome["status"] == "Done"
    assert {file["name"]: file["size_bytes"] for file in seen.outcome["outputs"]} == sizes


# -- hidden use --------------------------------------------------------------------------------------------------


def test_memory_that_children_share_is_counted_once(run: Look) -> None:
    """Fifty megabytes, and ten forked children who only read it: resident sizes add up to 550. Judged by its limit."""
    seen = run("r03_cow_fork", "50 1.5", limits={"memory_bytes": 250_000_000})
    assert seen.outcome["status"] == "Done"
    outcome = seen.outcome["outcome"]
    assert 50e6 < outcome["peak_pss_bytes"] < 250e6 < outcome["peak_memory_bytes"]


def test_cpu_burnt_by_orphans_that_died_between_two_looks_is_counted(run: Look) -> None:
    seen = run("r04_cpu_hidden", "1 orphans")
    assert seen.outcome["outcome"]["cpu_seconds"] > float(seen.out) * 0.9 > 0.1


def test_cpu_burnt_by_children_of_a_parent_that_ignores_sigchld_is_in_nobodys_account(run: Look) -> None:
    """What we do not do. The kernel reaps such children by itself, and tells neither their parent nor the shim what they
    used; only a cgroup has it."""
    seen = run("r04_cpu_hidden", "1")
    assert 0 < seen.outcome["outcome"]["cpu_seconds"] < float(seen.out) * 0.7


def test_a_flood_ends_at_the_limit_of_its_file(run: Look) -> None:
    """Sixty-four megabytes on one line. The limit is the pilot's, as batch systems set them; the payload inherits it."""
    seen = run("r09_flood")
    assert seen.outcome["outcome"]["exit_code"] == 1
    assert [file["size_bytes"] for file in seen.outcome["outputs"]] == [MAX_FILE_BYTES]
    assert seen.end_seconds < 20


def test_a_payload_that_does_nothing_for_ever_ends_at_its_limit(run: Look) -> None:
    seen = run("r10_stall_sleep", limits={"wall_seconds": 0.5, "grace_seconds": 5})
    assert seen.outcome["failure"]["kind"] == "LimitExceeded"
    assert seen.outcome["outcome"]["ended_by"] == "limit"
    assert seen.end_seconds < 5


def test_a_daemon_that_keeps_the_output_open_does_not_hold_up_the_end(run: Look) -> None:
    seen = run("r14_pipe_holder")
    assert (seen.outcome["status"], seen.out) == ("Done", "done\n")
    assert seen.end_seconds < 10, "the daemon has it open for 15 s"


@pytest.mark.parametrize("ending", [143, 255, -15, -11])
def test_an_exit_code_is_not_a_signal_and_either_is_told_as_it_was(run: Look, ending: int) -> None:
    outcome = run("r15_exit_codes", str(ending)).outcome["outcome"]
    assert (outcome["exit_code"], outcome["signal"]) == ((ending, None) if ending >= 0 else (None, -ending))


# -- attacks on the supervisor -----------------------------------------------------------------------------------


def test_a_payload_cannot_forge_how_it_ended(run: Look) -> None:
    seen = run("s02_forge_exit")
    assert seen.out == "forged: []\n"
    assert seen.outcome["outcome"]["exit_code"] == 9


def test_a_payload_below_a_sub_reaper_cannot_forge_how_it_ended(look: Look) -> None:
    seen = look("s02_forge_exit", SUBREAPER, to_its_end=True)
    assert (seen.outcome["exit_code"], seen.out) == (9, "forged: []\n")


@pytest.mark.parametrize("containment", [NAMESPACE, SUBREAPER])
def test_a_payload_of_root_cannot_forge_how_it_ended(look: Look, containment: Containment) -> None:
    """It may look at every process it sees, and wrote to the pipe of the first one of its namespace."""
    if os.geteuid() != 0:
        pytest.skip("takes root")
    seen = look("s02_forge_exit", containment, root=True, to_its_end=True)
    assert (seen.outcome["exit_code"], seen.out) == (9, "forged: []\n")


def test_a_payload_gets_nothing_of_ours_but_its_three_descriptors(run: Look) -> None:
    """The driver has a descriptor open that a child would inherit. A Python ignores two signals by itself."""
    seen = run("s03_fd_leak")
    assert seen.out.startswith("fds {}\n")
    assert f"SigIgn:\\t{1 << 12 | 1 << 24:016x}" in seen.out
    assert f"SigBlk:\\t{0:016x}" in seen.out
    assert "NoNewPrivs:\\t1" in seen.out

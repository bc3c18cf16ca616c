"""The shim in Python, for installs where no compiler was found: shim.c says what it is for and what its words mean.

The same words, signals, report and files; tests/test_shim.py holds both to it. Differences: some 17 ms more a start,
5 MB more a job, and peaks are never below its own 8 MB, which a process counts as its own until it executes.
Run as `python -I -S shim.py ...`. A program of its own: it imports nothing of ours, and little of the standard
library, as `signal`, `contextlib` and `typing` would double its start.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import select
import sys
import time

USAGE_ERROR = 125
# From Linux's headers; alpha, mips, parisc and sparc number their signals otherwise.
SIGKILL, SIGUSR1, SIGTERM, SIGCHLD, SIGCONT, SIG_SETMASK = 9, 10, 15, 17, 18, 2
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x20000, 0x10000000, 0x20000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_SLAVE = 2, 4, 8, 0x4000, 0x80000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
WALL = 0x40000000

libc = ctypes.CDLL(None, use_errno=True)
libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
libc.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p]
libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]


class Options:
    """The words we were started with, and what we are doing: a refusal names it."""

    def __init__(self, words: list[str]) -> None:
        """Raises ValueError; a descriptor mistaken for another one would be somebody's file."""
        self.state, self.report, self.environment, self.grace_ms = map(int, words[:4])
        self.mode, flags = words[4:6]
        self.no_new_privileges = flags == "n"
        self.program = [os.fsencode(word) for word in words[6:]]
        self.env: list[bytes] = []
        self.doing = "environment"
        least = min(self.state + 1, self.report + 1, self.environment, self.grace_ms)
        if least < 0 or self.grace_ms >= 2**31 or not self.program:
            raise ValueError(words)
        if self.mode not in ("pid-namespace", "subreaper") or flags not in ("n", "-"):
            raise ValueError(words)


def checked(result: int) -> int:
    """What a function of the C library gave, or the error it means."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def now_ms() -> int:
    """A clock that also runs while the machine sleeps."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def lines(facts: dict[str, object]) -> str:
    """The text of a report."""
    return "".join(f"{name} {value}\n" for name, value in facts.items())


def tell(pipe: int, text: str) -> None:
    """Write to somebody who may have gone."""
    try:
        os.write(pipe, text.encode())
    except OSError:
        return


def put(state: int, name: str, text: str) -> None:
    """A file of the state directory: whole, synced, or not there."""
    try:
        file = os.open("new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600, dir_fd=state)
        try:
            if os.write(file, text.encode()) == len(text):
                os.fsync(file)
                os.rename("new", name, src_dir_fd=state, dst_dir_fd=state)
                os.fsync(state)
                return
        finally:
            os.close(file)
    except OSError:
        pass
    try:
        os.unlink("new", dir_fd=state)
    except OSError:
        return


def stat_of(pid: int) -> tuple[int, int]:
    """A process's parent, and its start, which names with the pid one process for good. Zeros when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            fields = file.read(1024).rpartition(b")")[2].split()  # the name before it is the process's to choose
    except OSError:
        return 0, 0
    return int(fields[1]), int(fields[19])


def children(pid: int) -> list[int]:
    """The children of every thread of a process: a thread other than the first may fork too."""
    found: list[int] = []
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for task in tasks:
        try:
            with open(f"/proc/{pid}/task/{task}/children", "rb") as file:
                found += map(int, file.read().split())
        except OSError:  # a thread that has just ended; the others go on
            continue
    return found


def signal_all(in_namespace: bool, number: int) -> None:
    """Signal every descendant. A work list, not recursion: chains may be hundreds deep.

    Each is asked for its parent again when its turn comes: it may have ended since, and its number been given to a
    process that is not ours.
    """
    if in_namespace:
        libc.kill(-1, number)  # everybody but us: we are process 1
        return
    own = os.getpid()
    queue = [(child, own) for child in children(own)]
    for pid, parent in queue:  # it grows as we go
        if stat_of(pid)[0] in (parent, own):
            queue += [(child, pid) for child in children(pid)]
            libc.kill(pid, number)


def reset_signals(blocked: int) -> None:
    """Python ignores SIGPIPE and SIGXFSZ, our parent may ignore SIGCHLD: we would be told of no child's end."""
    libc.sigprocmask(SIG_SETMASK, (ctypes.c_uint64 * 16)(blocked), None)
    for number in range(1, 65):
        libc.signal(number, None)


def take_signals(*wanted: int) -> int:
    """Block all signals; a descriptor from which those wanted can be read."""
    reset_signals(blocked=2**64 - 1)
    mask = sum(1 << (number - 1) for number in wanted)
    return checked(libc.signalfd(-1, (ctypes.c_uint64 * 16)(mask), os.O_CLOEXEC | os.O_NONBLOCK))


def read_signal(signals: int) -> int:
    """The number of the next one; waits for it."""
    select.select([signals], [], [])
    return int.from_bytes(os.read(signals, 128)[:4], sys.byteorder)


def execute(o: Options) -> int:
    """Execute the payload; errno if that cannot be. os.execve would not take every list of variables as it is."""

    def words(values: list[bytes]) -> ctypes.Array[ctypes.c_char_p]:
        return (ctypes.c_char_p * (len(values) + 1))(*values, None)

    libc.execve(o.program[0], words(o.program), words(o.env))
    if ctypes.get_errno() == errno.ENOEXEC:  # a script that does not say whose: the shell's, as everywhere
        libc.execve(b"/bin/sh", words([b"/bin/sh", *o.program]), words(o.env))
    return ctypes.get_errno()


def spawn(o: Options) -> tuple[int, int]:
    """Start the payload in a session of its own with nothing but its three descriptors; errno or 0, and its pid."""
    failed, failing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            reset_signals(blocked=0)
            os.setsid()
            if o.no_new_privileges:
                libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            # os.closerange takes minutes where it is not one system call. The listing's own is closed already.
            for descriptor in map(int, os.listdir("/proc/self/fd")):
                if descriptor > 2 and descriptor != failing:
                    libc.close(descriptor)
            os.write(failing, b"%d" % execute(o))
        finally:
            os._exit(127)
    os.close(failing)
    with open(failed, "rb") as file:
        return int(file.read() or 0), pid


def reap(o: Options, payload: int, signals: int, orders: int) -> dict[str, object]:
    """Wait until the payload and all it left are gone. Orders come as signals, or to process 1 as bytes of a pipe.

    The status is raw, as wait4 gives it: an exit code cannot tell `exit 143` from SIGTERM.
    """
    usage = resource.struct_rusage([0] * 16)
    status, asked, orphans, expired = -1, "-", 0, False
    deadline, gone, killing, pause_ms = -1, False, False, 1
    poll = select.poll()
    poll.register(signals, select.POLLIN)
    if in_namespace := orders >= 0:
        poll.register(orders, select.POLLIN)
    while True:
        try:
            while (ended := os.wait4(-1, os.WNOHANG | WALL))[0]:
                pause_ms = 1
                if ended[0] == payload:
                    gone, status, usage = True, ended[1], ended[2]
                else:
                    orphans += 1
        except ChildProcessError:
            return end_facts(status, usage, asked, orphans, expired)
        killing = killing or (gone and deadline < 0)  # nobody asked: what is left has no one to wait for
        if deadline >= 0 and not killing and now_ms() >= deadline:
            killing = expired = True
        if killing:
            signal_all(in_namespace, SIGKILL)  # again and again: it may be forking

        left = max(0, deadline - now_ms()) if deadline >= 0 else None
        ready = [descriptor for descriptor, _ in poll.poll(pause_ms if killing else left)]
        if killing:
            pause_ms = min(pause_ms * 2, 128)  # what hangs in the kernel needs no thousand looks a second
        order = ""
        if signals in ready:
            order = {SIGTERM: "T", SIGUSR1: "K"}.get(read_signal(signals), "")
        if orders in ready and not (order := os.read(orders, 1).decode()):
            order = "K"  # the shim is gone
            poll.unregister(orders)
        if order == "T" and asked == "-":
            asked, deadline = "T", now_ms() + o.grace_ms
            signal_all(in_namespace, SIGTERM)
            signal_all(in_namespace, SIGCONT)
        elif order == "K":
            asked, killing = asked.replace("-", "K"), True


def end_facts(
    status: int, usage: resource.struct_rusage, asked: str, orphans: int = 0, expired: bool = False
) -> dict[str, object]:
    """What is reported of an end, in its order; the shim itself adds the rest."""
    facts: dict[str, object] = {"status": status, "wall_ms": 0}
    for name in ("payload", "tree"):
        facts[f"{name}_user_us"], facts[f"{name}_system_us"] = round(usage.ru_utime * 1e6), round(usage.ru_stime * 1e6)
        facts[f"{name}_peak_kib"] = usage.ru_maxrss
    return facts | {"asked": asked, "orphans": orphans, "grace_expired": int(expired)}


def finish(o: Options, facts: dict[str, object], begun: int) -> None:
    """Say how it ended."""
    tree = end_facts(0, resource.getrusage(resource.RUSAGE_CHILDREN), "-")
    facts |= {name: value for name, value in tree.items() if name.startswith("tree_")}
    facts["wall_ms"] = now_ms() - begun
    if o.state >= 0:
        put(o.state, "exit", lines(facts))
    tell(o.report, lines(facts))


def say_started(o: Options, error: int, payload: int) -> None:
    """Say what has been started."""
    own = os.getpid()
    facts: dict[str, object] = {"shim_pid": own, "shim_start": stat_of(own)[1]}
    facts |= {"payload_pid": payload, "payload_start": stat_of(payload)[1], "containment": o.mode, "error": error}
    if o.state >= 0:
        put(o.state, "started", lines(facts))
    tell(o.report, lines(facts) + "\n")


def enter_user_namespace() -> None:
    """The payload keeps its own user and group inside: an outsider's view and its own agree.

    We go in ourselves, where shim.c sends its child: a process may map itself, and no other one has to wait for it.
    """
    user, group = os.geteuid(), os.getegid()
    checked(libc.unshare(CLONE_NEWUSER))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "wb", buffering=0) as file:
            file.write(text.encode())


def init(o: Options, orders: int, results: int) -> None:
    """Process 1 of the payload's namespace. Cannot be killed from inside; takes everything with it when it ends.

    A shim that died before PDEATHSIG was set is noticed all the same: nobody holds the other end of `orders` then.
    """
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    try:
        checked(libc.unshare(CLONE_NEWNS))
        # A slave, not private: what the site's automounter mounts later (CVMFS) has to appear in here too.
        checked(libc.mount(b"none", b"/", None, MS_REC | MS_SLAVE, None))
        checked(libc.mount(b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None))
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        signals = take_signals(SIGCHLD)
        error, payload = spawn(o)
    except OSError as exc:
        tell(results, f"{exc.errno} -1\n")
        return
    tell(results, f"{error} {payload}\n")
    if os.read(orders, 1):  # once the shim has noted the payload, which nobody has reaped so far
        tell(results, lines(reap(o, payload, signals, orders)))


def run_in_namespaces(o: Options) -> None:
    """The payload below a process 1 of its own."""
    o.doing = "pipe"
    orders_end, orders = os.pipe()
    results, results_end = os.pipe()
    signals = take_signals(SIGCHLD, SIGTERM, SIGUSR1)
    begun = now_ms()
    o.doing = "user namespace"
    if os.geteuid() != 0:  # root needs no other user to have namespaces
        enter_user_namespace()
    o.doing = "pid namespace"
    checked(libc.unshare(CLONE_NEWPID))
    child = os.fork()
    if child == 0:
        try:
            for inherited in {orders, results, o.report, o.state} - {-1}:
                os.close(inherited)
            init(o, orders_end, results_end)
        finally:
            os._exit(0)
    os.close(orders_end)
    os.close(results_end)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    o.doing = "mount or fork"
    answer = open(results, "rb")  # noqa: SIM115 - closed by our end
    if not (words := answer.readline().split()) or words[1] == b"-1":
        number = int(words[0]) if words else errno.EPROTO
        raise OSError(number, os.strerror(number))
    say_started(o, int(words[0]), children(child)[0])  # the first: init reaps nobody before it is told to
    tell(orders, "!")

    asked = "-"
    while (number := read_signal(signals)) != SIGCHLD or os.waitpid(child, os.WNOHANG)[0] == 0:
        if number != SIGCHLD:
            letter = "T" if number == SIGTERM else "K"
            asked = asked.replace("-", letter)
            tell(orders, letter)
    # Without a last word init was killed from outside: the status is lost, and nothing is left.
    facts = end_facts(-1, resource.struct_rusage([0] * 16), asked)
    finish(o, facts | dict(line.split(" ") for line in answer.read().decode().splitlines()), begun)


def run_as_subreaper(o: Options) -> None:
    """The payload below us, and its orphans too."""
    o.doing = "prctl"
    checked(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    signals = take_signals(SIGCHLD, SIGTERM, SIGUSR1)
    begun = now_ms()
    o.doing = "fork"
    error, payload = spawn(o)
    say_started(o, error, payload)
    finish(o, reap(o, payload, signals, -1), begun)


def main(words: list[str]) -> int:
    """The exit code of the shim."""
    try:
        o = Options(words)
    except ValueError:
        return USAGE_ERROR
    try:
        with open(o.environment, "rb") as file:
            file.seek(0)
            text = file.read()
        o.env = text.removesuffix(b"\0").split(b"\0") if text else []
        for descriptor in {o.report, o.state} - {-1}:
            os.set_inheritable(descriptor, False)
        o.doing = "lock"
        if o.state >= 0:
            fcntl.flock(os.open("lock", os.O_RDWR | os.O_CREAT, 0o600, dir_fd=o.state), fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.getsid(0) != os.getpid():
            os.setsid()
        (run_in_namespaces if o.mode == "pid-namespace" else run_as_subreaper)(o)
    except OSError as exc:
        tell(o.report, f"refused {o.mode}\nwhat {o.doing}\nreason {exc.strerror}\n")
        return USAGE_ERROR
    return 0


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))

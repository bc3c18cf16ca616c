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
import struct
import sys
import time

USAGE_ERROR = 125
# From Linux's headers; alpha, mips, parisc and sparc number their signals otherwise.
SIGKILL, SIGUSR1, SIGTERM, SIGCHLD, SIGCONT, SIGSTOP, SIG_IGN, SIG_SETMASK = 9, 10, 15, 17, 18, 19, 1, 2
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID = 0x20000, 0x8000000, 0x10000000, 0x20000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_SLAVE = 2, 4, 8, 0x4000, 0x80000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 36, 38
WALL, AT_FDCWD = 0x40000000, -100
# System calls the C library may not know; the same numbers everywhere but on alpha.
OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_RESTRICT = 428, 429, 442, 444, 446
TREE_CLONE, WHOLE_TREE, FROM_DESCRIPTOR, ATTR_RDONLY = 1, 0x8000, 4, 1
LANDLOCK_VERSION, SCOPE_ABSTRACT_SOCKET, SCOPE_SIGNAL, LANDLOCK_HAS_SCOPES = 1, 1, 2, 6
CAP_SYS_PTRACE, CAP_SYS_ADMIN = 19, 21
MOST_CPUS, MOST_GROUPS, MOST_HIDDEN, RECORD_BYTES, EXCHANGE = 8192, 16, 16, 1024, 2
LOOKS, LEAST_LOOK_MS, MOST_LOOK_MS = 8, 50, 30_000  # for an agent, in the time it may stay away
MS_RDONLY, OFD_GETLK, FLOCK = 1, 36, struct.Struct("hhqqi4x")

libc = ctypes.CDLL(None, use_errno=True)
libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
libc.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p]
libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
libc.syscall.restype = ctypes.c_long


class Options:
    """The words we were started with, and what we are doing: a refusal names it."""

    def __init__(self, words: list[str]) -> None:
        """Raises ValueError; a descriptor mistaken for another one would be somebody's file."""
        self.state, self.report, self.environment, self.grace_ms = map(int, words[:4])
        self.mode, settings = words[4:6]
        self.program = [os.fsencode(word) for word in words[6:]]
        self.env: list[bytes] = []
        self.doing = "environment"
        least = min(self.state + 1, self.report + 1, self.environment + 1, self.grace_ms)
        if least < 0 or self.grace_ms >= 2**31 or not self.program:
            raise ValueError(words)
        if self.mode not in ("pid-namespace", "subreaper", "session"):
            raise ValueError(words)
        self.lock = self.started = self.exit = -1  # files of the state directory
        self.no_new_privileges = self.private = self.wrapped = False
        self.orphan_ms = 0
        self.hidden: list[int] = []
        self.hidden_paths: list[str] = []
        self.nice = 0
        self.cpus: set[int] = set()
        self.cpu_limit: tuple[int, int] | None = None
        self.groups: list[int] = []
        for setting in settings.split(",") if settings != "-" else ():
            self._set(*setting.partition("="))

    def _set(self, name: str, equals: str, value: str) -> None:
        if not equals and name == "n":
            self.no_new_privileges = True
        elif not equals and name == "private" and self.mode == "pid-namespace":
            self.private = True
        elif not equals and name == "wrapped" and self.environment >= 0:
            self.wrapped = True
        elif name == "nice" and 0 <= int(value) <= 19:
            self.nice = int(value)
        elif name == "cpus":
            for part in value.split("+"):
                first, dash, last = part.partition("-")
                cpus = range(int(first), (int(last) if dash else int(first)) + 1)
                if not cpus or cpus[0] < 0 or cpus[-1] >= MOST_CPUS:
                    raise ValueError(value)
                self.cpus.update(cpus)
        elif name == "cpu":
            soft, hard = map(int, value.split(":"))
            if not 0 <= soft <= hard:
                raise ValueError(value)
            self.cpu_limit = soft, hard
        elif name == "join" and int(value) >= 0 and len(self.groups) < MOST_GROUPS:
            self.groups.append(int(value))
        elif name == "orphan" and self.state >= 0 and 1 <= int(value) < 2**31:
            self.orphan_ms = int(value)
        elif name == "hide" and self.mode == "pid-namespace" and int(value) >= 0 and len(self.hidden) < MOST_HIDDEN:
            self.hidden.append(int(value))
        else:  # a payload must not run with less than was asked for
            raise ValueError(name)


class Failed(Exception):
    """The payload could not be executed, and what was being done."""

    def __init__(self, error: int | None, step: str) -> None:
        self.error, self.step = error or errno.EIO, step


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


def reserve(state: int, name: str) -> int:
    """A file with room for a record. Raises OSError when there is none."""
    try:  # noqa: SIM105 - contextlib takes too long to import
        os.unlink(name, dir_fd=state)
    except FileNotFoundError:
        pass
    file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=state)
    try:
        if os.write(file, b" " * RECORD_BYTES) != RECORD_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        os.close(file)
        os.unlink(name, dir_fd=state)
        raise
    return file


def put(state: int, file: int, beside: str, name: str, text: str) -> int:
    """A record: whole, and in place of whatever somebody of our user has put there; or not there. A descriptor, or -1."""
    if state < 0:
        return -1
    try:
        os.fchmod(state, 0o700)
        try:
            there = os.stat(beside, dir_fd=state, follow_symlinks=False)
            same = os.path.samestat(os.fstat(file), there)
        except FileNotFoundError:
            same = False
        if not same:
            beside = "again"
            file = reserve(state, beside)
        data = text.encode()
        if os.pwrite(file, data, 0) != len(data):
            return -1
        os.ftruncate(file, len(data))
        try:
            os.rename(beside, name, src_dir_fd=state, dst_dir_fd=state)
        except OSError:  # a directory has the name
            checked(libc.renameat2(state, beside.encode(), state, name.encode(), EXCHANGE))
    except OSError:
        return -1
    return file


def has_agent(state: int) -> bool:
    """Whether the agent is there. Looked at and not taken: it would be kept from taking it just then."""
    try:
        file = os.open("agent.lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=state)
    except OSError as exc:
        return exc.errno != errno.ENOENT
    try:
        found = fcntl.fcntl(file, OFD_GETLK, FLOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0))
        return bool(FLOCK.unpack(found)[0] != fcntl.F_UNLCK)
    except OSError:
        return True
    finally:
        os.close(file)


class Watch:
    """How we learn that nobody is our agent any more.

    Of the first one the kernel tells: he has the other end of the report. Of those that have adopted the payload since
    we look whether they hold the lock.
    """

    def __init__(self, o: Options) -> None:
        self.state, self.report, self.patience_ms = o.state, o.report, o.orphan_ms
        self.next_ms = self.since_ms = 0

    def poll(self, poll: select.poll, most_ms: int | None) -> list[int]:
        """Poll for at most so long, and no longer than until a look is due; the descriptors that are ready."""
        left = most_ms
        waits = self.patience_ms > 0 and not self.next_ms and self.report >= 0
        if waits:
            poll.register(self.report, 0)
        elif self.patience_ms > 0:
            until_look = max(0, self.next_ms - now_ms())
            left = until_look if left is None else min(left, until_look)
        try:
            return [descriptor for descriptor, _ in poll.poll(left)]
        finally:
            if waits:
                poll.unregister(self.report)

    def is_orphaned(self, ready: list[int]) -> bool:
        """Whether the payload has had no agent for as long as that was allowed; says so once."""
        now = now_ms()
        waits = not self.next_ms and self.report >= 0 and self.report not in ready
        if self.patience_ms <= 0 or waits or now < self.next_ms:
            return False
        self.next_ms = now + min(max(self.patience_ms // LOOKS, LEAST_LOOK_MS), MOST_LOOK_MS)
        self.since_ms = 0 if has_agent(self.state) else self.since_ms or now
        if not self.since_ms or now - self.since_ms < self.patience_ms:
            return False
        self.patience_ms = 0
        return True


def stat_of(pid: int) -> tuple[str, int, int]:
    """A process's state, its parent, and its start, which names with the pid one process for good. Zeros when gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            fields = file.read(1024).rpartition(b")")[2].split()  # the name before it is the process's to choose
    except OSError:
        return "X", 0, 0
    return (fields[0].decode(), int(fields[1]), int(fields[19])) if fields else ("X", 0, 0)


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


def signal_tree(number: int) -> int:
    """Signal every descendant; how many there are that run. A work list, not recursion: chains may be hundreds deep.

    Each is asked for its parent again when its turn comes: it may have ended since, and its number been given to a
    process that is not ours.
    """
    own, running = os.getpid(), 0
    queue = [(child, own) for child in children(own)]
    for pid, parent in queue:  # it grows as we go
        state, parent_now, _ = stat_of(pid)
        if not parent_now and libc.kill(pid, 0) == 0:  # hidden from us (hidepid), but ours to signal
            state, parent_now = "R", parent
        if parent_now not in (parent, own):
            continue
        running += state in "RS"  # D starts nothing before it sees its signals
        found = children(pid)  # before they lose their parent, and we the sight of them
        if number != SIGSTOP or state not in "TtZX":
            libc.kill(pid, number)
        queue += [(child, pid) for child in found]
    return running


def stop_tree() -> None:
    """Whoever forks faster than he is killed is stopped first: the dead leave their places to others, the stopped do not.

    Two looks in a row that find nobody running: one may have been on its way past us.
    """
    still = 0
    for _ in range(100):
        still = 0 if signal_tree(SIGSTOP) else still + 1
        if still == 2:
            return
        if not still:
            time.sleep(0.0002)


def signal_all(in_namespace: bool, number: int) -> None:
    """Signal everybody but us."""
    if in_namespace:
        libc.kill(-1, number)  # we are process 1
    else:
        signal_tree(number)


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
    """The number of the next one, 0 for none."""
    try:
        return int.from_bytes(os.read(signals, 128)[:4], sys.byteorder)
    except BlockingIOError:
        return 0


def execute(o: Options) -> int:
    """Execute the payload; errno if that cannot be. os.execve would not take every list of variables as it is."""

    def words(values: list[bytes]) -> ctypes.Array[ctypes.c_char_p]:
        return (ctypes.c_char_p * (len(values) + 1))(*values, None)

    env = words([] if o.wrapped else o.env)
    libc.execve(o.program[0], words(o.program), env)
    if ctypes.get_errno() == errno.ENOEXEC:  # a script that does not say whose: the shell's, as everywhere
        libc.execve(b"/bin/sh", words([b"/bin/sh", *o.program]), env)
    return ctypes.get_errno()


def has_fence() -> bool:
    """Whether Linux can keep the payload from signalling and tracing others."""
    return bool(libc.syscall(LANDLOCK_CREATE, None, 0, LANDLOCK_VERSION) >= LANDLOCK_HAS_SCOPES)


def fence(o: Options) -> None:
    """Nobody outside can be signalled or traced by us and what we start."""
    scopes = SCOPE_SIGNAL | (SCOPE_ABSTRACT_SOCKET if o.private else 0)
    rules = (ctypes.c_uint64 * 3)(0, 0, scopes)  # files, network, scopes
    ruleset = checked(libc.syscall(LANDLOCK_CREATE, rules, ctypes.c_size_t(ctypes.sizeof(rules)), 0))
    checked(libc.syscall(LANDLOCK_RESTRICT, ruleset, 0))


def drop_capabilities(o: Options) -> None:
    """Not for a payload of root: what it needs to trace us, or to undo its mounts. Executing gives the rest back."""
    dropped = [CAP_SYS_PTRACE, CAP_SYS_ADMIN] if o.private else [CAP_SYS_PTRACE]
    for capability in dropped:
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice
    if libc.capget(head, sets) == 0:
        sets[2] &= ~sum(1 << capability for capability in dropped)
        libc.capset(head, sets)


def become(o: Options, kept: int) -> None:
    """Become the payload, with nothing but its three descriptors. The one kept is above 3. Raises `Failed`."""
    step = "join"
    try:
        for group in o.groups:
            os.write(group, b"0\n")
        if o.nice:
            os.nice(o.nice)
        step = "affinity"
        if o.cpus:
            os.sched_setaffinity(0, o.cpus)
        step = "limit"
        if o.cpu_limit is not None:  # never more than we have; no limit is a negative number here
            had = resource.getrlimit(resource.RLIMIT_CPU)
            soft, hard = (min(new, old) if old >= 0 else new for new, old in zip(o.cpu_limit, had, strict=True))
            resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
        if o.mode != "session":  # there, its parent has done so, and signals all in it
            os.setsid()
        step = "fence"
        if o.no_new_privileges:
            drop_capabilities(o)
            libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            if has_fence():
                fence(o)
        # os.closerange takes minutes where it is not one system call. The listing's own is closed already.
        if o.wrapped:
            os.dup2(o.environment, 3)
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            if descriptor > (3 if o.wrapped else 2) and descriptor != kept:
                libc.close(descriptor)
        reset_signals(blocked=0)
        if o.wrapped:
            libc.signal(SIGTERM, SIG_IGN)
        raise Failed(execute(o), "execute")
    except OSError as exc:
        raise Failed(exc.errno, step) from exc


def spawn(o: Options) -> tuple[int, str, int]:
    """Start the payload in a session of its own; errno or 0, what failed, and its pid. Raises OSError."""
    o.doing = "pipe"
    failed, failing = os.pipe()
    o.doing = "fork"
    pid = os.fork()
    if pid == 0:
        try:
            kept = fcntl.fcntl(failing, fcntl.F_DUPFD_CLOEXEC, 4)
            become(o, kept)
        except Failed as exc:
            os.write(kept, b"%d %s" % (exc.error, exc.step.encode()))
        finally:
            os._exit(127)
    os.close(failing)
    with open(failed, "rb") as file:
        error, _, step = file.read().decode().partition(" ")
    return int(error or 0), step or "-", pid


def reap(o: Options, payload: int, signals: int, orders: int, watch: Watch | None) -> dict[str, object]:
    """Wait until the payload and all it left are gone. Orders come as signals, or to process 1 as bytes.

    The status is raw, as wait4 gives it: an exit code cannot tell `exit 143` from SIGTERM.
    """
    usage = resource.struct_rusage([0] * 16)
    status, asked, orphans, expired = -1, "-", 0, False
    deadline, gone, killing, kills, pause_ms = -1, False, False, 0, 1
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
        if killing:  # again and again: it may be forking
            if kills and not in_namespace:
                stop_tree()
            signal_all(in_namespace, SIGKILL)
            kills += 1

        left = max(0, deadline - now_ms()) if deadline >= 0 else None
        most = pause_ms if killing else left
        try:
            ready = watch.poll(poll, most) if watch else [descriptor for descriptor, _ in poll.poll(most)]
        except OSError:  # RLIMIT_NOFILE is 0, say: whoever has our user may set it
            time.sleep(0.01)
            ready = [signals]
        if killing:
            pause_ms = min(pause_ms * 2, 128)  # what hangs in the kernel needs no thousand looks a second
        order = ""
        if signals in ready:
            order = {SIGTERM: "T", SIGUSR1: "K"}.get(read_signal(signals), "")
        if orders in ready and not (order := os.read(orders, 1).decode()):
            order = "K"  # the shim is gone
            poll.unregister(orders)
        if not order and watch and watch.is_orphaned(ready):
            order = "O"
        if order in ("T", "O") and asked == "-":
            asked, deadline = order, now_ms() + o.grace_ms
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
        facts[f"{name}_inblock"], facts[f"{name}_oublock"] = usage.ru_inblock, usage.ru_oublock
    return facts | {"asked": asked, "orphans": orphans, "grace_expired": int(expired), "synced": 0}


def finish(o: Options, facts: dict[str, object], begun: int) -> None:
    """Say how it ended."""
    tree = end_facts(0, resource.getrusage(resource.RUSAGE_CHILDREN), "-")
    facts |= {name: value for name, value in tree.items() if name.startswith("tree_")}
    facts["wall_ms"] = now_ms() - begun
    text = lines(facts)
    record = put(o.state, o.exit, "exit.new", "exit", text)
    agent = select.poll()
    if o.report >= 0:
        agent.register(o.report, 0)
        tell(o.report, text)
    if record >= 0 and (o.report < 0 or agent.poll(0)):
        sync_all(o, record, len(text) - 2)


def sync_all(o: Options, record: int, mark: int) -> None:
    """Have what the payload wrote on the disk, and then its record: there may be no power when the next agent comes."""
    try:
        checked(libc.syncfs(os.open(".", os.O_RDONLY | os.O_DIRECTORY)))
        os.fsync(record)
        os.fsync(o.state)
        os.pwrite(record, b"1", mark)
        os.fsync(record)
    except OSError:
        return


def say_started(o: Options, error: int, step: str, payload: int, init: int = 0, *, hidden: bool = False) -> None:
    """Say what has been started."""
    own = os.getpid()
    facts: dict[str, object] = {"shim_pid": own, "shim_start": stat_of(own)[2]}
    facts |= {"payload_pid": payload, "payload_start": stat_of(payload)[2]}
    facts |= {"init_pid": init, "init_start": stat_of(init)[2] if init else 0, "containment": o.mode}
    facts |= {"fenced": int(o.no_new_privileges and has_fence()), "hidden": int(hidden), "error": error, "failed": step}
    put(o.state, o.started, "started.new", "started", lines(facts))
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


def make_private(o: Options) -> None:
    """Mounts in which only the work directory, our current one, can be written to, and what is memory of its own.

    A directory whose sockets have others start things for us is covered: systemd's in /run/user. Raises OSError.
    """
    o.doing = "work directory"
    work = os.getcwd()
    o.doing = "open_tree"
    tree = checked(libc.syscall(OPEN_TREE, AT_FDCWD, b".", TREE_CLONE | os.O_CLOEXEC | WHOLE_TREE))
    o.doing = "mount_setattr"
    rdonly, writable = (ctypes.c_uint64 * 4)(ATTR_RDONLY), (ctypes.c_uint64 * 4)(0, ATTR_RDONLY)  # set, clear
    size = ctypes.c_size_t(ctypes.sizeof(rdonly))
    checked(libc.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", WHOLE_TREE, rdonly, size))
    checked(libc.syscall(MOUNT_SETATTR, AT_FDCWD, b"/proc", 0, writable, size))
    for own in ("/tmp", "/var/tmp", "/dev/shm", "/run/user"):  # noqa: S108 - to be covered
        o.doing = own
        if os.path.isdir(own) and not os.path.islink(own):
            checked(libc.mount(b"none", own.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, b"mode=1777,size=25%"))
    o.doing = "work directory"
    os.makedirs(work, mode=0o755, exist_ok=True)
    checked(libc.syscall(MOVE_MOUNT, tree, b"", AT_FDCWD, os.fsencode(work), FROM_DESCRIPTOR))
    os.chdir(work)
    os.close(tree)


def hide(o: Options) -> bool:
    """What was in sight before and is to be no more; whether all of it was.

    The payload of an ordinary user cannot undo it, nor in a namespace that it makes itself: the kernel locks there what
    it inherits.
    """
    hidden = bool(o.hidden_paths)
    flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
    for path in o.hidden_paths:
        if not path:
            hidden = False
        elif libc.mount(b"none", os.fsencode(path), b"tmpfs", flags, b"mode=0,size=4k") < 0:
            hidden = hidden and ctypes.get_errno() == errno.ENOENT
    return hidden


def mount_all(o: Options) -> None:
    """Make the namespace's own /proc, and what else is to be its own. Raises OSError."""
    o.doing = "mount /"
    checked(libc.unshare(CLONE_NEWNS | (CLONE_NEWIPC if o.private else 0)))
    # A slave, not private: what the site's automounter mounts later (CVMFS) has to appear in here too.
    checked(libc.mount(b"none", b"/", None, MS_REC | MS_SLAVE, None))
    o.doing = "mount /proc"
    checked(libc.mount(b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None))
    if o.private:
        make_private(o)


def init(o: Options, channel: int) -> None:
    """Process 1 of the payload's namespace. Cannot be killed from inside; takes everything with it when it ends.

    A shim that died before PDEATHSIG was set is noticed all the same: nobody holds the other end of the channel then.
    """
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    try:
        mount_all(o)
        hidden = hide(o)
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        signals = take_signals(SIGCHLD)
        error, step, payload = spawn(o)
    except OSError as exc:
        tell(channel, f"{exc.errno} -1 {o.doing}\n")
        return
    tell(channel, f"{error} {payload} {step} {int(hidden)}\n")
    if os.read(channel, 1):  # once the shim has noted the payload, which nobody has reaped so far
        tell(channel, lines(reap(o, payload, signals, channel, None)))


def run_in_namespaces(o: Options) -> None:
    """The payload below a process 1 of its own."""
    o.doing = "socketpair"
    ends = (ctypes.c_int * 2)()
    checked(libc.socketpair(1, 1 | os.O_CLOEXEC, 0, ends))  # AF_UNIX, SOCK_STREAM; `socket` would take 10 ms to import
    channel, channel_of_init = ends
    signals = take_signals(SIGCHLD, SIGTERM, SIGUSR1)
    begun = now_ms()
    o.doing = "clone"
    if os.geteuid() != 0:  # root needs no other user to have namespaces
        enter_user_namespace()
        checked(libc.unshare(CLONE_NEWPID))
    elif libc.unshare(CLONE_NEWPID) < 0:  # but a root without CAP_SYS_ADMIN does
        if ctypes.get_errno() != errno.EPERM:
            checked(-1)
        enter_user_namespace()
        checked(libc.unshare(CLONE_NEWPID))
    mark_execution(o)
    child = os.fork()
    if child == 0:
        try:
            for inherited in {channel, o.report, o.state, o.lock, o.started, o.exit} - {-1}:
                os.close(inherited)
            init(o, channel_of_init)
        finally:
            os._exit(0)
    os.close(channel_of_init)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    o.doing = "init"
    answer = os.read(channel, 65536).decode() or f"{errno.EPROTO} -1 init"  # it says no more before it is told to
    error, payload, step = answer.rstrip("\n").split(" ", 2)
    if payload == "-1":
        o.doing = step
        raise OSError(int(error), os.strerror(int(error)))
    step, hidden = step.split(" ")
    first = children(child)[0]  # init reaps nobody before it is told to
    say_started(o, int(error), step, first, child, hidden=hidden == "1")
    tell(channel, "!")

    asked, watch, poll = "-", Watch(o), select.poll()
    poll.register(signals, select.POLLIN)
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if watch.is_orphaned(watch.poll(poll, None)) and asked == "-":
            asked = "O"
            tell(channel, asked)
        if (number := read_signal(signals)) in (SIGTERM, SIGUSR1):
            letter = "T" if number == SIGTERM else "K"
            asked = asked.replace("-", letter)
            tell(channel, letter)
    # Without a last word init was killed from outside: the status is lost, and nothing is left.
    facts = end_facts(-1, resource.struct_rusage([0] * 16), asked)
    try:
        answer = os.read(channel, 65536).decode()
    except ConnectionResetError:  # nothing was said, and an order was left unread
        answer = ""
    finish(o, facts | dict(line.split(" ") for line in answer.splitlines()), begun)


def run_as_subreaper(o: Options) -> None:
    """The payload below us, and its orphans too."""
    o.doing = "prctl"
    checked(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    signals = take_signals(SIGCHLD, SIGTERM, SIGUSR1)
    begun = now_ms()
    mark_execution(o)
    error, step, payload = spawn(o)
    say_started(o, error, step, payload)
    finish(o, reap(o, payload, signals, -1, Watch(o)), begun)


def run_in_place(o: Options) -> None:
    """Nothing of us stays: the report closes by itself once the payload executes."""
    if o.report >= 0:
        o.report = fcntl.fcntl(o.report, fcntl.F_DUPFD_CLOEXEC, 4)
    try:
        become(o, o.report)
    except Failed as exc:
        say_started(o, exc.error, exc.step, os.getpid())
        os._exit(127)


def mark_execution(o: Options) -> None:
    """From here on something may have been executed."""
    if o.lock >= 0:
        doing, o.doing = o.doing, "lock"
        os.fchmod(o.lock, 0o700)
        o.doing = doing


def take_state(o: Options) -> None:
    """Take the state directory for ours. Raises OSError."""
    o.doing = "lock"
    libc.sigprocmask(0, (ctypes.c_uint64 * 16)(2**64 - 1), None)  # XFSZ, where no file may be written
    lock = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600, dir_fd=o.state)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    o.lock = lock
    if os.access("void", os.F_OK, dir_fd=o.state):
        raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
    o.doing = "record"
    o.started, o.exit = reserve(o.state, "started.new"), reserve(o.state, "exit.new")


def path_of(descriptor: int) -> str:
    """The path of a directory, or an empty one if there is none that leads there."""
    path = os.readlink(f"/proc/self/fd/{descriptor}")
    try:
        return path if os.path.samestat(os.lstat(path), os.fstat(descriptor)) else ""
    except OSError:
        return ""


def main(words: list[str]) -> int:
    """The exit code of the shim."""
    try:
        o = Options(words)
    except ValueError:
        return USAGE_ERROR
    try:
        if o.environment < 0:
            o.env = [b"%s=%s" % item for item in os.environb.items()]
        else:
            with open(o.environment, "rb", closefd=not o.wrapped) as file:
                file.seek(0)
                text = file.read()
            o.env = text.removesuffix(b"\0").split(b"\0") if text else []
        for descriptor in {o.report, o.state} - {-1}:
            os.set_inheritable(descriptor, False)
        if o.mode == "session":
            run_in_place(o)
        if o.state >= 0:
            take_state(o)
        if o.mode == "pid-namespace":
            o.hidden_paths = [path_of(found) for found in [o.state, *o.hidden] if found >= 0]
        for descriptor in o.hidden:
            os.close(descriptor)
        if os.getsid(0) != os.getpid():
            os.setsid()
        (run_in_namespaces if o.mode == "pid-namespace" else run_as_subreaper)(o)
    except OSError as exc:
        if o.lock >= 0:
            os.fchmod(o.lock, 0o600)
        tell(o.report,
             f"refused {o.mode}\nwhat {o.doing}\nerrno {exc.errno}\nreason {exc.strerror}\n"
             f"shim_pid {os.getpid()}\n")  # fmt: skip
        return USAGE_ERROR
    return 0


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))

/* The shim: one small process for each payload, between the agent and the payload's processes.
 *
 * It makes the sub-reaper, the pid namespace and the exit record properties of the job and not of the program that
 * embeds us; it outlives an agent that dies, and its record can be read by the next one. shim.py is its twin for
 * machines without a compiler: the same options, files and signals, checked by one suite.
 *
 *   agent ── shim ─┬─ payload ─ ...            (subreaper: orphans come back to the shim)
 *                  └─ init ── payload ─ ...    (pid-namespace: killing init ends everything in one stroke)
 *
 * usage: shim STATE_FD REPORT_FD ENV_FD GRACE_MS MODE SETTINGS PROGRAM [ARGUMENT...]
 *   STATE_FD   a directory of the agent's, or -1, in which we leave what the next agent has to know, see below
 *   REPORT_FD  a socket, which nobody can open again through /proc as he can a pipe; the text of `started` is written to
 *              it, an empty line, and at the end the text of `exit`. -1: none
 *   ENV_FD     a file with the payload's environment, each variable ended by a NUL: our own stays empty, so that no
 *              LD_PRELOAD of the payload's gets hold of us. -1: our own, passed on
 *   GRACE_MS   between TERM and KILL
 *   MODE       "pid-namespace" or "subreaper"; refused ones are reported as "refused MODE", and nothing was started.
 *              "session": we become the payload, with signals as usual; only what fails is reported
 *   SETTINGS   "-" for none, or with commas between them, in any order:
 *     n            no new privileges, so that set-uid programs cannot get out; a payload of root cannot trace us; and
 *                  where Linux has Landlock's scopes (6.12), nobody outside can be signalled or traced
 *     nice=N       0..19, added to our own
 *     cpus=0-3+7   the CPUs it may use
 *     cpu=S:H      RLIMIT_CPU in seconds, for each process: XCPU at S, KILL at H
 *     join=FD      an open cgroup.procs or tasks, which the payload joins before anything is executed; up to 16
 *     private      in pid-namespace: own /tmp, /var/tmp, /dev/shm and IPC, everything else read-only but for the work
 *                  directory, which is the current one; Linux 5.12
 *     orphan=MS    with a STATE_FD: end the payload politely once it has had no agent for so long
 *     hide=FD      in pid-namespace: a directory the payload finds empty, as it does that of STATE_FD; up to 16
 *     wrapped      the program is a wrapper (bwrap), at the end of whose words the payload is started by "session" with
 *                  ENV_FD 3: TERM is ignored up to there, and the payload's environment cannot tamper with the wrapper
 * signals: TERM ends the payload politely (TERM to all, KILL after the grace), USR1 at once.
 * The state directory:
 *   lock         held by flock for our life; its mode is 0700 from the moment something may have been executed, 0600 before
 *   started, exit  the two parts of the report, renamed into place. The room for them is taken before anything is executed,
 *                so that a payload which fills the disk does not cost them. `synced 1` in the second: what the payload wrote
 *                was on the disk before; that is seen to when the agent that started us is gone, and nobody waits
 *   agent.lock   the agent holds an open file description lock on it. Looked at now and then once that agent is gone
 *   void         somebody has found that nothing was executed, and nothing may be any more
 * ends with 0 when it has reported an end, with 125 when it has refused, or did not understand its words.
 *
 * usage: shim starter CONTROL_FD PIDS_FD
 *   A process that starts shims without executing anything, which is most of what a start costs. Each is a copy of it, and
 *   a child of its parent: the agent's, who waits for it as for one that he has executed. starter.py is the agent's side.
 *   CONTROL_FD a SOCK_SEQPACKET socket. A message is one start: `struct launch`, and after it, each ended by a NUL, a
 *              directory, the words as above from STATE_FD on, and the environment; as SCM_RIGHTS the report, stdout,
 *              stderr, and what the words name. In there a descriptor's number is 5 and its place among them.
 *              ENV_FD -1: the environment is the message's. At the end of file, or that of the agent, we end.
 *   PIDS_FD    memory for 4096 numbers: where `struct launch` says so there is the shim's pid once it was made, -1 while
 *              that is not sure. A report that has ended, with 0 there: nobody has heard, and nothing was started.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { USAGE_ERROR = 125, MOST_CPUS = 8192, MOST_GROUPS = 16, MOST_HIDDEN = 16, RECORD_BYTES = 1024 };
enum { LOOKS = 8, LEAST_LOOK_MS = 50, MOST_LOOK_MS = 30000 };     /* for an agent, in the time it may stay away */

/* Of system calls younger than the C libraries we are built with; the same numbers everywhere but on alpha. */
enum {
    NR_OPEN_TREE = 428, NR_MOVE_MOUNT = 429, NR_MOUNT_SETATTR = 442, NR_LANDLOCK_CREATE = 444, NR_LANDLOCK_RESTRICT = 446,
    TREE_CLONE = 1, WHOLE_TREE = 0x8000, FROM_DESCRIPTOR = 4, ATTR_RDONLY = 1,
    LANDLOCK_VERSION = 1, SCOPE_ABSTRACT_SOCKET = 1, SCOPE_SIGNAL = 2, LANDLOCK_HAS_SCOPES = 6,
    CAP_SYS_PTRACE = 19, CAP_SYS_ADMIN = 21, EXCHANGE = 2, NR_PIDFD_OPEN = 434,
};

struct options {
    int state, report, environment;
    int lock, started, exit;            /* files of the state directory */
    long grace_ms, orphan_ms;
    const char *mode;
    int no_new_privileges, private, wrapped, groups[MOST_GROUPS], group_count, has_cpus, hidden[MOST_HIDDEN], hidden_count;
    char *hidden_paths[MOST_HIDDEN + 1];
    long nice, cpu_soft, cpu_hard;      /* -1: as inherited */
    unsigned long cpus[MOST_CPUS / (8 * sizeof(long))];
    char **program, **env;
};

struct outcome {               /* what init, or the shim itself, saw of the payload */
    int status;                /* raw, as wait4 gives it: an exit code cannot tell `exit 143` from SIGTERM */
    struct rusage payload;
    int orphans, grace_expired;
    char asked;                /* '-' nobody, 'T' politely, 'K' at once, 'O' nobody was there any more */
};

/* What is done between fork and exec, and may fail. */
enum step { EXECUTE, JOIN, AFFINITY, LIMIT, FENCE };
static const char *const STEPS[] = {"execute", "join", "affinity", "limit", "fence"};

/* Of the payload; error is errno of what failed, 0 once it executes. Without a pid it was the fork, or what comes before. */
struct start { int error; enum step failed; pid_t pid; const char *doing; int hidden; };

/* -- small things --------------------------------------------------------------------------------------------- */

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_BOOTTIME, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static int write_all(int fd, const void *data, size_t size)
{
    const char *p = data;
    while (size > 0) {
        ssize_t n = write(fd, p, size);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return -1;
        p += n;
        size -= (size_t)n;
    }
    return 0;
}

static ssize_t read_all(int fd, void *data, size_t size)
{
    size_t done = 0;
    while (done < size) {
        ssize_t n = read(fd, (char *)data + done, size - done);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) break;
        done += (size_t)n;
    }
    return (ssize_t)done;
}

/* -- the state directory ----------------------------------------------------------------------------------------- */

/* A file with room for a record; -1 when there is none. */
static int reserve(int state, const char *name)
{
    char blank[RECORD_BYTES];
    memset(blank, ' ', sizeof blank);
    const int anew = O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC;
    int fd = openat(state, name, anew, 0600);
    if (fd < 0 && errno == EEXIST && unlinkat(state, name, 0) == 0) fd = openat(state, name, anew, 0600);
    if (fd < 0 || write_all(fd, blank, sizeof blank) == 0) return fd;
    int error = errno;
    close(fd);
    unlinkat(state, name, 0);
    errno = error;
    return -1;
}

/* A record: whole, and in place of whatever somebody of our user has put there; or not there. A descriptor of it, or -1. */
static int put(int state, int fd, const char *beside, const char *name, const char *text)
{
    struct stat ours, there;
    if (state < 0) return -1;
    fchmod(state, 0700);
    if (fd < 0 || fstat(fd, &ours) < 0 || fstatat(state, beside, &there, AT_SYMLINK_NOFOLLOW) < 0 ||
        ours.st_ino != there.st_ino || ours.st_dev != there.st_dev) fd = reserve(state, beside = "again");
    if (fd < 0 || lseek(fd, 0, SEEK_SET) < 0 || write_all(fd, text, strlen(text)) < 0 ||
        ftruncate(fd, (off_t)strlen(text)) < 0) return -1;
    if (renameat(state, beside, state, name) == 0) return fd;
    return syscall(SYS_renameat2, state, beside, state, name, EXCHANGE) == 0 ? fd : -1;     /* a directory has the name */
}

/* Whether the agent is there. Looked at and not taken: it would be kept from taking it just then. */
static int has_agent(int state)
{
    struct flock found = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    int fd = openat(state, "agent.lock", O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) return errno != ENOENT;
    int known = fcntl(fd, F_OFD_GETLK, &found) == 0;
    close(fd);
    return !known || found.l_type != F_UNLCK;
}

/* How we learn that nobody is our agent any more. Of the first one the kernel tells: he has the other end of the report. Of
 * those that have adopted the payload since we look whether they hold the lock. */
struct watch { int state, report; int64_t patience_ms, next, since; };

static struct watch watch_for(const struct options *o)
{
    return (struct watch){.state = o->state, .report = o->report, .patience_ms = o->orphan_ms};
}

/* What to poll, besides; -1 for nothing. */
static struct pollfd agents_end(const struct watch *w)
{
    return (struct pollfd){.fd = w && w->patience_ms > 0 && !w->next ? w->report : -1};
}

/* How long a wait may be, if `most` is allowed; negative: for ever. */
static int64_t until_look(const struct watch *w, int64_t most)
{
    if (!w || w->patience_ms <= 0 || (!w->next && w->report >= 0)) return most;
    int64_t left = w->next - now_ms();
    if (left < 0) left = 0;
    return most < 0 || left < most ? left : most;
}

/* Whether the payload has had no agent for as long as that was allowed; says so once. */
static int is_orphaned(struct watch *w, struct pollfd end)
{
    if (!w || w->patience_ms <= 0) return 0;
    int64_t now = now_ms(), look = w->patience_ms / LOOKS;
    if (!w->next && w->report >= 0 && !end.revents) return 0;
    if (now < w->next) return 0;
    w->next = now + (look < LEAST_LOOK_MS ? LEAST_LOOK_MS : look > MOST_LOOK_MS ? MOST_LOOK_MS : look);
    if (has_agent(w->state)) w->since = 0;
    else if (!w->since) w->since = now;
    if (!w->since || now - w->since < w->patience_ms) return 0;
    w->patience_ms = 0;
    return 1;
}

struct stat_of { char state; pid_t parent; unsigned long long start; };

/* /proc/PID/stat; zeros when it is gone. The start, field 22, names with the pid one process for good. */
static struct stat_of stat_of(pid_t pid)
{
    char path[64], text[1024], *after;
    struct stat_of found = {0};
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return found;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0) return found;
    text[n] = 0;
    after = strrchr(text, ')');     /* the name before it is the process's to choose */
    if (after)
        sscanf(after + 2, "%c %d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu",
               &found.state, &found.parent, &found.start);
    return found;
}

/* -- the tree ------------------------------------------------------------------------------------------------- */

struct found { pid_t pid, parent; };
struct pids { struct found *list; size_t count, room; };

static void add(struct pids *pids, pid_t pid, pid_t parent)
{
    if (pids->count == pids->room) {
        size_t room = pids->room ? pids->room * 2 : 256;
        struct found *list = realloc(pids->list, room * sizeof *list);
        if (!list) return;
        pids->list = list;
        pids->room = room;
    }
    pids->list[pids->count++] = (struct found){pid, parent};
}

/* The children of every thread of a process: a thread other than the first may fork too. */
static void add_children(struct pids *pids, pid_t parent)
{
    char path[96], text[8192];
    snprintf(path, sizeof path, "/proc/%d/task", parent);
    DIR *tasks = opendir(path);
    if (!tasks) return;
    for (struct dirent *task; (task = readdir(tasks));) {
        if (task->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "/proc/%d/task/%.20s/children", parent, task->d_name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0) continue;
        pid_t pid = 0;
        for (ssize_t n; (n = read(fd, text, sizeof text)) > 0;)
            for (ssize_t i = 0; i < n; i++) {
                if (text[i] >= '0' && text[i] <= '9') pid = pid * 10 + (text[i] - '0');
                else if (pid) { add(pids, pid, parent); pid = 0; }
            }
        close(fd);
    }
    closedir(tasks);
}

/* Every descendant gets the signal; how many there are that run. A work list, not recursion: chains may be hundreds deep.
 * Each is asked for its parent again when its turn comes: it may have ended since, and its number been given to a process
 * that is not ours. */
static size_t signal_tree(int number)
{
    struct pids pids = {0};
    size_t running = 0;
    pid_t self = getpid();
    add_children(&pids, self);
    for (size_t i = 0; i < pids.count; i++) {
        struct found next = pids.list[i];
        struct stat_of found = stat_of(next.pid);
        if (!found.state && kill(next.pid, 0) == 0)     /* hidden from us (hidepid), but ours to signal */
            found = (struct stat_of){.state = 'R', .parent = next.parent};
        if (found.parent != next.parent && found.parent != self) continue;
        if (found.state == 'R' || found.state == 'S') running++;    /* D starts nothing before it sees its signals */
        add_children(&pids, next.pid);      /* before they lose their parent, and we the sight of them */
        if (number != SIGSTOP || !strchr("TtZX", found.state)) kill(next.pid, number);
    }
    free(pids.list);
    return running;
}

/* Whoever forks faster than he is killed is stopped first: those who die leave their places to those who fork, those who
 * stop do not. Two looks in a row that find nobody running: one may have been on its way past us. */
static void stop_tree(void)
{
    for (int look = 0, still = 0; look < 100 && still < 2; look++) {
        still = signal_tree(SIGSTOP) ? 0 : still + 1;
        if (!still) nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
    }
}

static void signal_all(int in_namespace, int number)
{
    if (in_namespace) kill(-1, number);     /* everybody but us: we are pid 1 */
    else signal_tree(number);
}

/* -- the payload ---------------------------------------------------------------------------------------------- */

/* Descriptors from one on, but for another. Old kernels, and old filters of system calls, have no close_range. */
static void close_from(int first, int kept)
{
    long below = kept > first ? syscall(SYS_close_range, first, kept - 1, 0) : 0;
    if (below == 0 && syscall(SYS_close_range, kept < first ? first : kept + 1, ~0U, 0) == 0) return;
    DIR *open = opendir("/proc/self/fd");
    if (!open) return;
    for (struct dirent *entry; (entry = readdir(open));) {
        int fd = atoi(entry->d_name);
        if (fd >= first && fd != kept && fd != dirfd(open)) close(fd);
    }
    closedir(open);
}

static void reset_signals(void)
{
    struct sigaction usual = {.sa_handler = SIG_DFL};
    for (int number = 1; number < NSIG; number++) sigaction(number, &usual, NULL);
}

/* Nobody outside can be signalled or traced by us and what we start; not where Linux has no such thing. */
static int fence(const struct options *o)
{
    if (syscall(NR_LANDLOCK_CREATE, NULL, 0, LANDLOCK_VERSION) < LANDLOCK_HAS_SCOPES) return 0;
    uint64_t rules[3] = {0, 0, SCOPE_SIGNAL | (o->private ? SCOPE_ABSTRACT_SOCKET : 0)};    /* files, network, scopes */
    int ruleset = (int)syscall(NR_LANDLOCK_CREATE, rules, sizeof rules, 0);
    return ruleset < 0 ? -1 : (int)syscall(NR_LANDLOCK_RESTRICT, ruleset, 0);
}

/* Not for a payload of root: what it needs to trace us, or to undo its mounts. Executing something gives the rest back. */
static void drop_capabilities(const struct options *o)
{
    struct { uint32_t version; int pid; } head = {0x20080522, 0};
    struct { uint32_t effective, permitted, inheritable; } sets[2];
    uint32_t dropped = 1U << CAP_SYS_PTRACE | (o->private ? 1U << CAP_SYS_ADMIN : 0);
    prctl(PR_CAPBSET_DROP, CAP_SYS_PTRACE, 0, 0, 0);
    if (o->private) prctl(PR_CAPBSET_DROP, CAP_SYS_ADMIN, 0, 0, 0);
    if (syscall(SYS_capget, &head, sets) < 0) return;
    sets[0].inheritable &= ~dropped;
    syscall(SYS_capset, &head, sets);
}

static int limit_cpu(const struct options *o)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_CPU, &limit) < 0) return -1;
    if ((rlim_t)o->cpu_soft < limit.rlim_cur) limit.rlim_cur = (rlim_t)o->cpu_soft;     /* never more than we have */
    if ((rlim_t)o->cpu_hard < limit.rlim_max) limit.rlim_max = (rlim_t)o->cpu_hard;
    return setrlimit(RLIMIT_CPU, &limit);
}

/* Become the payload, with nothing but its three descriptors; returns what failed, and errno. The descriptor kept, if it
 * is one, is closed by the execution; it is above 3. Changes nothing in memory that somebody else relies on. */
static enum step become(const struct options *o, int kept)
{
    char *nothing[] = {NULL}, **env = o->wrapped ? nothing : o->env;
    sigset_t none;
    for (int i = 0; i < o->group_count; i++)
        if (write(o->groups[i], "0\n", 2) != 2) return JOIN;
    if (o->nice > 0) setpriority(PRIO_PROCESS, 0, getpriority(PRIO_PROCESS, 0) + (int)o->nice);     /* at most 19 */
    if (o->has_cpus && syscall(SYS_sched_setaffinity, 0, sizeof o->cpus, o->cpus) < 0) return AFFINITY;
    if (o->cpu_soft >= 0 && limit_cpu(o) < 0) return LIMIT;
    if (strcmp(o->mode, "session")) setsid();   /* there, its parent has done so, and signals all in it */
    prctl(PR_SET_PDEATHSIG, 0);
    if (o->no_new_privileges) {
        drop_capabilities(o);
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        if (fence(o) < 0) return FENCE;
    }
    if (o->wrapped) {
        signal(SIGTERM, SIG_IGN);
        if (o->environment == 3) fcntl(3, F_SETFD, 0);
        else dup2(o->environment, 3);
    }
    close_from(o->wrapped ? 4 : 3, kept);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    execve(o->program[0], o->program, env);
    if (errno == ENOEXEC) {     /* a script that does not say whose: the shell's, as everywhere */
        size_t count = 0;
        while (o->program[count]) count++;
        char **words = calloc(count + 2, sizeof *words);
        if (words) {
            words[0] = "/bin/sh";
            memcpy(words + 1, o->program, (count + 1) * sizeof *words);
            execve(words[0], words, env);
        }
    }
    return EXECUTE;
}

/* Start the payload in a session of its own. Until it executes it has our memory, and we wait: nothing is copied. */
static struct start spawn(const struct options *o)
{
    volatile enum step failed = EXECUTE;
    volatile int error = 0;
    pid_t pid = vfork();
    if (pid < 0) return (struct start){.error = errno, .pid = -1, .doing = "fork"};
    if (pid == 0) {
        failed = become(o, 0);
        error = errno;
        _exit(127);
    }
    return (struct start){.error = error, .failed = failed, .pid = pid};
}

/* Wait until the payload and all it left are gone. Orders come as signals (orders < 0) or as bytes. */
static struct outcome reap(pid_t payload, int signals, int orders, int in_namespace, long grace_ms, struct watch *watch)
{
    struct outcome out = {.status = -1, .asked = '-'};
    int64_t deadline = -1;
    int gone = 0, killing = 0, kills = 0, pause_ms = 1;
    for (;;) {
        int status;
        struct rusage usage;
        pid_t pid;
        while ((pid = wait4(-1, &status, WNOHANG | __WALL, &usage)) > 0) {
            pause_ms = 1;
            if (pid != payload) { out.orphans++; continue; }
            out.status = status;
            out.payload = usage;
            gone = 1;
        }
        if (pid < 0 && errno == ECHILD) return out;
        if (gone && deadline < 0) killing = 1;              /* nobody asked: what is left has no one to wait for */
        if (deadline >= 0 && !killing && now_ms() >= deadline) { killing = 1; out.grace_expired = 1; }
        if (killing) {      /* again and again: it may be forking */
            if (kills++ && !in_namespace) stop_tree();
            signal_all(in_namespace, SIGKILL);
        }

        struct pollfd wait[3] = {{.fd = signals, .events = POLLIN}, {.fd = orders, .events = POLLIN}, agents_end(watch)};
        int64_t left = deadline - now_ms();
        left = killing ? pause_ms : deadline >= 0 ? (left > 0 ? left : 0) : -1;
        if (poll(wait, 3, (int)until_look(watch, left)) < 0) {
            wait[0].revents = POLLIN;       /* RLIMIT_NOFILE is 0, say: whoever has our user may set it */
            nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
        }
        if (killing && pause_ms < 100) pause_ms *= 2;       /* what hangs in the kernel needs no thousand looks a second */
        char asked = 0;
        struct signalfd_siginfo info;
        if (wait[0].revents && read(signals, &info, sizeof info) == sizeof info && info.ssi_signo != SIGCHLD)
            asked = info.ssi_signo == SIGTERM ? 'T' : 'K';
        if (orders >= 0 && wait[1].revents && read(orders, &asked, 1) != 1) { asked = 'K'; orders = -1; }   /* no shim */
        if (!asked && is_orphaned(watch, wait[2])) asked = 'O';
        if (asked && asked != 'K' && out.asked == '-') {
            out.asked = asked;
            deadline = now_ms() + grace_ms;
            signal_all(in_namespace, SIGTERM);
            signal_all(in_namespace, SIGCONT);
        } else if (asked == 'K') {
            if (out.asked == '-') out.asked = 'K';
            killing = 1;
        }
    }
}

static int take_signals(int polite)
{
    sigset_t set;
    sigfillset(&set);
    sigprocmask(SIG_SETMASK, &set, NULL);
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    if (polite) { sigaddset(&set, SIGTERM); sigaddset(&set, SIGUSR1); }
    return signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}

/* -- the namespace -------------------------------------------------------------------------------------------- */

static int write_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    ssize_t n = write(fd, text, strlen(text));
    int error = errno;
    close(fd);
    errno = error;
    return n < 0 ? -1 : 0;
}

/* The payload keeps its own user and group inside: an outsider's view and its own agree. */
static int map_ids(pid_t init)
{
    char path[64], text[64];
    snprintf(path, sizeof path, "/proc/%d/setgroups", init);
    if (write_file(path, "deny") < 0) return -1;
    snprintf(path, sizeof path, "/proc/%d/uid_map", init);
    snprintf(text, sizeof text, "%u %u 1", geteuid(), geteuid());
    if (write_file(path, text) < 0) return -1;
    snprintf(path, sizeof path, "/proc/%d/gid_map", init);
    snprintf(text, sizeof text, "%u %u 1", getegid(), getegid());
    return write_file(path, text);
}

/* A directory that is not there any more under a new file system. */
static void make_directories(char *path)
{
    for (char *p = path + 1; *p; p++)
        if (*p == '/') { *p = 0; mkdir(path, 0755); *p = '/'; }
    mkdir(path, 0755);
}

/* A mount namespace in which only the work directory, our current one, can be written to, and what is memory of its own.
 * What failed, or NULL. A directory whose sockets have others start things for us is covered: systemd's in /run/user. */
static const char *make_private(void)
{
    static const char *const own[] = {"/tmp", "/var/tmp", "/dev/shm", "/run/user"};
    char work[PATH_MAX];
    if (!getcwd(work, sizeof work)) return "work directory";
    int tree = (int)syscall(NR_OPEN_TREE, AT_FDCWD, ".", TREE_CLONE | O_CLOEXEC | WHOLE_TREE);
    if (tree < 0) return "open_tree";
    uint64_t rdonly[4] = {ATTR_RDONLY, 0, 0, 0}, writable[4] = {0, ATTR_RDONLY, 0, 0};  /* set, clear, propagate, user */
    if (syscall(NR_MOUNT_SETATTR, AT_FDCWD, "/", WHOLE_TREE, rdonly, sizeof rdonly) < 0) return "mount_setattr";
    if (syscall(NR_MOUNT_SETATTR, AT_FDCWD, "/proc", 0, writable, sizeof writable) < 0) return "mount_setattr";
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) {
        struct stat found;
        if (lstat(own[i], &found) < 0 || !S_ISDIR(found.st_mode)) continue;
        if (mount("none", own[i], "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777,size=25%") < 0) return own[i];
    }
    make_directories(work);
    if (syscall(NR_MOVE_MOUNT, tree, "", AT_FDCWD, work, FROM_DESCRIPTOR) < 0 || chdir(work) < 0) return "work directory";
    close(tree);
    return NULL;
}

/* What was in sight before and is to be no more. The payload of an ordinary user cannot undo it, nor in a namespace that it
 * makes itself: the kernel locks there what it inherits. Whether all of it was. One empty file system does for all: the last
 * one covered has it in sight. */
static int hide(const struct options *o)
{
    const unsigned long flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC;
    const char *empty = NULL;
    int hidden = o->state >= 0 || o->hidden_count > 0;
    for (int i = 0; o->hidden_paths[i]; i++) {
        const char *path = o->hidden_paths[i];
        if (!*path) hidden = 0;
        else if ((empty && mount(empty, path, NULL, MS_BIND, NULL) == 0) ||
                 mount("none", path, "tmpfs", flags, "mode=0,size=4k") == 0) empty = path;
        else if (errno != ENOENT) hidden = 0;
    }
    return hidden;
}

static const char *mount_all(const struct options *o)
{
    /* A slave, not private: what the site's automounter mounts later (CVMFS) has to appear in here too. */
    if (mount("none", "/", NULL, MS_REC | MS_SLAVE, NULL) < 0) return "mount /";
    if (mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0) return "mount /proc";
    return o->private ? make_private() : NULL;
}

/* Process 1 of the payload's namespace. Cannot be killed from inside; takes everything with it when it ends.
 * A shim that died before PDEATHSIG was set is noticed all the same: nobody holds the other end of the channel then. */
static void init(const struct options *o, int channel)
{
    struct start started = {.pid = -1};
    char byte;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (read(channel, &byte, 1) != 1) _exit(1);     /* once the shim has mapped us */
    const int of_shim[] = {o->report, o->state, o->lock, o->started, o->exit};
    for (size_t i = 0; i < sizeof of_shim / sizeof *of_shim; i++)
        if (of_shim[i] >= 0) close(of_shim[i]);
    started.doing = mount_all(o);
    started.error = errno;
    int signals = take_signals(0);
    if (!started.doing) {
        int hidden = hide(o);
        prctl(PR_SET_DUMPABLE, 0);
        started = spawn(o);
        started.hidden = hidden;
    }
    write_all(channel, &started, sizeof started);
    if (started.pid < 0) _exit(1);
    if (read(channel, &byte, 1) != 1) _exit(1);     /* once it has noted the payload, which nobody has reaped so far */
    struct outcome out = reap(started.pid, signals, channel, 1, o->grace_ms, NULL);
    write_all(channel, &out, sizeof out);
    _exit(0);
}

/* -- the shim ------------------------------------------------------------------------------------------------- */

static void report_start(const struct options *o, struct start started, pid_t payload, pid_t init)
{
    char text[512];
    int fenced = o->no_new_privileges && syscall(NR_LANDLOCK_CREATE, NULL, 0, LANDLOCK_VERSION) >= LANDLOCK_HAS_SCOPES;
    snprintf(text, sizeof text,
             "shim_pid %d\nshim_start %llu\npayload_pid %d\npayload_start %llu\ninit_pid %d\ninit_start %llu\n"
             "containment %s\nfenced %d\nhidden %d\nerror %d\nfailed %s\n",
             getpid(), stat_of(getpid()).start, payload, stat_of(payload).start,
             init, init ? stat_of(init).start : 0, o->mode, fenced, started.hidden, started.error, started.error ? STEPS[started.failed] : "-");
    put(o->state, o->started, "started.new", "started", text);
    write_all(o->report, strcat(text, "\n"), strlen(text) + 1);     /* at once: whoever reads it is woken once */
}

/* Have what the payload wrote on the disk, and then its record: there may be no power when the next agent comes. */
static void sync_all(const struct options *o, int record, off_t mark)
{
    int work = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (work < 0 || syncfs(work) < 0 || fsync(record) < 0 || fsync(o->state) < 0) return;
    if (pwrite(record, "1", 1, mark) == 1) fsync(record);
}

static long long us(struct timeval t) { return (long long)t.tv_sec * 1000000 + t.tv_usec; }

static void report_end(const struct options *o, struct outcome out, int64_t wall_ms)
{
    char text[1024];
    struct rusage tree;
    getrusage(RUSAGE_CHILDREN, &tree);
    size_t end = (size_t)snprintf(text, sizeof text, "status %d\nwall_ms %lld\n", out.status, (long long)wall_ms);
    const struct { const char *name; struct rusage *usage; } of[] = {{"payload", &out.payload}, {"tree", &tree}};
    for (int i = 0; i < 2; i++)
        end += (size_t)snprintf(text + end, sizeof text - end,
                                "%s_user_us %lld\n%s_system_us %lld\n%s_peak_kib %ld\n%s_inblock %ld\n%s_oublock %ld\n",
                                of[i].name, us(of[i].usage->ru_utime), of[i].name, us(of[i].usage->ru_stime),
                                of[i].name, of[i].usage->ru_maxrss, of[i].name, of[i].usage->ru_inblock,
                                of[i].name, of[i].usage->ru_oublock);
    end += (size_t)snprintf(text + end, sizeof text - end, "asked %c\norphans %d\ngrace_expired %d\nsynced 0\n",
                            out.asked, out.orphans, out.grace_expired);
    int record = put(o->state, o->exit, "exit.new", "exit", text);
    struct pollfd agent = {.fd = o->report};
    write_all(o->report, text, strlen(text));
    if (record >= 0 && (o->report < 0 || (poll(&agent, 1, 0) == 1 && agent.revents)))
        sync_all(o, record, (off_t)end - 2);
}

static void say_refused(int report, const char *mode, const char *what, pid_t shim)
{
    char text[320];
    int error = errno;
    snprintf(text, sizeof text, "refused %.32s\nwhat %s\nerrno %d\nreason %s\nshim_pid %d\n", mode, what, error,
             strerror(error), shim);
    write_all(report, text, strlen(text));
}

static void cannot(const struct options *o, const char *what)
{
    int error = errno;
    if (o->lock >= 0) fchmod(o->lock, 0600);
    errno = error;
    say_refused(o->report, o->mode, what, getpid());
    _exit(USAGE_ERROR);
}

/* The payload's pid as we see it: the first child of its init, which has one thread and reaps nobody before it is told to. */
static pid_t child_of(pid_t init)
{
    char path[96], text[32];
    snprintf(path, sizeof path, "/proc/%d/task/%d/children", init, init);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0) close(fd);
    text[n > 0 ? n : 0] = 0;
    return (pid_t)atoi(text);
}

static void run_in_namespaces(const struct options *o)
{
    int channel[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, channel) < 0) cannot(o, "socketpair");
    int signals = take_signals(1);
    int64_t begun = now_ms();
    long flags = CLONE_NEWPID | CLONE_NEWNS | (o->private ? CLONE_NEWIPC : 0) | SIGCHLD;
    long user = geteuid() == 0 ? 0 : CLONE_NEWUSER;     /* root needs no other user to have namespaces */
    pid_t child = (pid_t)syscall(SYS_clone, user | flags, NULL, NULL, NULL, NULL);
    if (child < 0 && errno == EPERM && !user) {         /* but a root without CAP_SYS_ADMIN does */
        user = CLONE_NEWUSER;
        child = (pid_t)syscall(SYS_clone, user | flags, NULL, NULL, NULL, NULL);
    }
    if (child < 0) cannot(o, "clone");
    if (child == 0) {
        close(channel[1]);
        init(o, channel[0]);
    }
    close(channel[0]);
    if (user && map_ids(child) < 0) { int error = errno; kill(child, SIGKILL); errno = error; cannot(o, "uid_map"); }
    prctl(PR_SET_DUMPABLE, 0);
    if (o->lock >= 0 && fchmod(o->lock, 0700) < 0) cannot(o, "lock");
    write_all(channel[1], "!", 1);
    struct start started;
    if (read_all(channel[1], &started, sizeof started) != sizeof started) { errno = EPROTO; cannot(o, "init"); }
    if (started.pid < 0) { errno = started.error; cannot(o, started.doing); }   /* our own text: init is a copy of us */
    report_start(o, started, child_of(child), child);
    write_all(channel[1], "!", 1);

    struct outcome out = {.status = -1, .asked = '-'};
    struct watch watch = watch_for(o);
    char asked = '-';
    for (int gone = 0; !gone;) {
        struct pollfd wait[2] = {{.fd = signals, .events = POLLIN}, agents_end(&watch)};
        struct signalfd_siginfo info;
        poll(wait, 2, (int)until_look(&watch, -1));
        if (is_orphaned(&watch, wait[1]) && asked == '-') { asked = 'O'; write_all(channel[1], "O", 1); }
        if (read(signals, &info, sizeof info) != sizeof info) continue;
        if (info.ssi_signo == SIGCHLD) gone = waitpid(child, NULL, WNOHANG) == child;
        else if (info.ssi_signo == SIGTERM) { asked = asked == '-' ? 'T' : asked; write_all(channel[1], "T", 1); }
        else { asked = asked == '-' ? 'K' : asked; write_all(channel[1], "K", 1); }
    }
    read_all(channel[1], &out, sizeof out);
    if (out.status == -1) out.asked = asked;    /* init was killed from outside: the status is lost, nothing is left */
    report_end(o, out, now_ms() - begun);
}

static void run_as_subreaper(const struct options *o)
{
    if (prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) < 0) cannot(o, "prctl");
    prctl(PR_SET_DUMPABLE, 0);
    int signals = take_signals(1);
    int64_t begun = now_ms();
    if (o->lock >= 0 && fchmod(o->lock, 0700) < 0) cannot(o, "lock");
    struct start started = spawn(o);
    if (started.pid < 0) { errno = started.error; cannot(o, started.doing); }
    report_start(o, started, started.pid, 0);
    struct watch watch = watch_for(o);
    struct outcome out = reap(started.pid, signals, -1, 0, o->grace_ms, &watch);
    report_end(o, out, now_ms() - begun);
}

/* Nothing of us stays: the report closes by itself once the payload executes. */
static void run_in_place(const struct options *o)
{
    struct start started = {.pid = getpid()};
    int report = fcntl(o->report, F_DUPFD_CLOEXEC, 4);
    started.failed = become(o, report);
    started.error = errno;
    struct options still = *o;
    still.report = report;
    report_start(&still, started, started.pid, 0);
    _exit(127);
}

/* A number and nothing else; a descriptor mistaken for another one would be somebody's file. */
static int number(const char *word, long least, long most, long *value)
{
    char *end;
    errno = 0;
    *value = strtol(word, &end, 10);
    return *word && !*end && !errno && *value >= least && *value <= most;
}

/* The variables of a file, as execve wants them. */
static char **read_environment(int fd)
{
    struct stat found;
    if (fstat(fd, &found) < 0) return NULL;
    size_t size = (size_t)found.st_size, count = 0, n = 0;
    char *text = malloc(size + 1);
    if (!text || lseek(fd, 0, SEEK_SET) < 0 || read_all(fd, text, size) != (ssize_t)size) return NULL;
    text[size] = 0;
    for (size_t i = 0; i < size; i++) count += text[i] == 0;
    char **env = calloc(count + 2, sizeof *env);
    if (!env) return NULL;
    for (char *p = text; p < text + size; p += strlen(p) + 1) env[n++] = p;
    return env;
}

/* The path of a directory, or an empty one if there is none that leads there. */
static char *path_of(int fd)
{
    char link[64], path[PATH_MAX + 1];
    struct stat ours, there;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    path[n > 0 ? n : 0] = 0;
    int same = fstat(fd, &ours) == 0 && lstat(path, &there) == 0 && ours.st_ino == there.st_ino && ours.st_dev == there.st_dev;
    return strdup(same ? path : "");
}

/* Take the state directory for ours. What failed, or NULL. */
static const char *take_state(struct options *o)
{
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);   /* XFSZ, where no file may be written */
    fcntl(o->state, F_SETFD, FD_CLOEXEC);
    o->lock = openat(o->state, "lock", O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0600);
    if (o->lock < 0 || flock(o->lock, LOCK_EX | LOCK_NB) < 0) { o->lock = -1; return "lock"; }
    if (faccessat(o->state, "void", F_OK, 0) == 0) { errno = ECANCELED; return "lock"; }
    o->started = reserve(o->state, "started.new");
    o->exit = reserve(o->state, "exit.new");
    return o->started < 0 || o->exit < 0 ? "record" : NULL;
}

/* CPUs as "0-3+7". */
static int cpu_list(char *text, struct options *o)
{
    const size_t bits = 8 * sizeof *o->cpus;
    for (char *rest, *part = strtok_r(text, "+", &rest); part; part = strtok_r(NULL, "+", &rest)) {
        char *dash = strchr(part, '-');
        long first, last;
        if (dash) *dash = 0;
        if (!number(part, 0, MOST_CPUS - 1, &first)) return 0;
        last = first;
        if (dash && !number(dash + 1, first, MOST_CPUS - 1, &last)) return 0;
        for (long cpu = first; cpu <= last; cpu++) o->cpus[(size_t)cpu / bits] |= 1UL << ((size_t)cpu % bits);
        o->has_cpus = 1;
    }
    return o->has_cpus;
}

/* False for what we do not know: a payload must not run with less than was asked for. */
static int settings(char *text, struct options *o)
{
    if (!*text || text[strlen(text) - 1] == ',') return 0;
    if (strcmp(text, "-") == 0) return 1;
    for (char *word; (word = strsep(&text, ","));) {
        char *value = strchr(word, '=');
        long found;
        if (value) *value++ = 0;
        if (!value && !strcmp(word, "n")) o->no_new_privileges = 1;
        else if (!value && !strcmp(word, "private") && !strcmp(o->mode, "pid-namespace")) o->private = 1;
        else if (!value && !strcmp(word, "wrapped") && o->environment >= 0) o->wrapped = 1;
        else if (value && !strcmp(word, "nice") && number(value, 0, 19, &o->nice)) continue;
        else if (value && !strcmp(word, "cpus") && cpu_list(value, o)) continue;
        else if (value && !strcmp(word, "join") && number(value, 0, INT_MAX, &found) && o->group_count < MOST_GROUPS)
            o->groups[o->group_count++] = (int)found;
        else if (value && !strcmp(word, "orphan") && o->state >= 0 && number(value, 1, INT_MAX, &o->orphan_ms)) continue;
        else if (value && !strcmp(word, "hide") && !strcmp(o->mode, "pid-namespace") && o->hidden_count < MOST_HIDDEN &&
                 number(value, 0, INT_MAX, &found))
            o->hidden[o->hidden_count++] = (int)found;
        else if (value && !strcmp(word, "cpu")) {
            char *hard = strchr(value, ':');
            if (!hard) return 0;
            *hard++ = 0;
            if (!number(value, 0, LONG_MAX, &o->cpu_soft) || !number(hard, o->cpu_soft, LONG_MAX, &o->cpu_hard)) return 0;
        } else return 0;
    }
    return 1;
}

static int shim(int count, char **words)
{
    long state, report, environment, grace_ms;
    static struct options o = {.nice = -1, .cpu_soft = -1, .cpu_hard = -1, .lock = -1, .started = -1, .exit = -1};
    if (count < 8 || !number(words[1], -1, INT_MAX, &state) || !number(words[2], -1, INT_MAX, &report) ||
        !number(words[3], -1, INT_MAX, &environment) || !number(words[4], 0, INT_MAX, &grace_ms)) return USAGE_ERROR;
    int in_place = !strcmp(words[5], "session"), in_namespaces = !strcmp(words[5], "pid-namespace");
    o.mode = words[5];
    o.state = (int)state, o.report = (int)report, o.environment = (int)environment, o.grace_ms = grace_ms;
    if ((!in_place && !in_namespaces && strcmp(words[5], "subreaper")) || !settings(words[6], &o)) return USAGE_ERROR;
    o.program = words + 7;
    fcntl(o.report, F_SETFD, FD_CLOEXEC);
    o.env = o.environment < 0 ? environ : read_environment(o.environment);
    if (!o.env) cannot(&o, "environment");
    if (o.wrapped) fcntl(o.environment, F_SETFD, FD_CLOEXEC);
    else close(o.environment);
    if (in_place) run_in_place(&o);
    const char *failed = o.state >= 0 ? take_state(&o) : NULL;
    if (failed) cannot(&o, failed);
    int hidden = 0;
    if (in_namespaces && o.state >= 0) o.hidden_paths[hidden++] = path_of(o.state);
    for (int i = 0; i < o.hidden_count && hidden < MOST_HIDDEN; i++) {
        o.hidden_paths[hidden++] = path_of(o.hidden[i]);
        close(o.hidden[i]);
    }
    setsid();
    if (in_namespaces) run_in_namespaces(&o);
    else run_as_subreaper(&o);
    return 0;
}

/* -- the starter -------------------------------------------------------------------------------------------------- */

enum { CONTROL = 3, AGENT = 4, FIRST_PASSED = 5, MOST_PASSED = 64, MESSAGE_BYTES = 1 << 16, MOST_PIDS = 4096 };

struct launch { uint32_t place, umask, words, variables; };    /* which of the pids; how many strings there are */

/* The next so many strings of a text, and a NULL; NULL when there are not as many. */
static char **strings(char **text, const char *end, size_t before, size_t count)
{
    char **list = calloc(before + count + 1, sizeof *list), *nul;
    if (!list) return NULL;
    for (size_t i = 0; i < count; i++, *text = nul + 1) {
        if (!(nul = memchr(*text, 0, (size_t)(end - *text)))) { errno = EBADMSG; return NULL; }
        list[before + i] = *text;
    }
    return list;
}

/* Be the shim of a message: what Popen and execve would have made of us, and what it does then. Its exit code. */
static int begin(const struct launch *launch, char *text, const char *end, int dumpable)
{
    const int report = FIRST_PASSED, out = FIRST_PASSED + 1, err = FIRST_PASSED + 2;
    const char *directory = text, *failed = "message";
    char **words = NULL, **env = NULL, *nul = memchr(text, 0, (size_t)(end - text));
    close(CONTROL);
    close(AGENT);
    if (nul) {
        text = nul + 1;
        words = strings(&text, end, 1, launch->words);
        env = words ? strings(&text, end, 0, launch->variables) : NULL;
    } else errno = EBADMSG;
    if (env) failed = chdir(directory) < 0 ? "directory" : dup2(out, 1) < 0 || dup2(err, 2) < 0 ? "descriptors" : NULL;
    if (failed) {
        say_refused(report, launch->words > 4 && words ? words[5] : "-", failed, getpid());
        return USAGE_ERROR;
    }
    close(out);
    close(err);
    umask(launch->umask);
    setsid();
    if (launch->words > 4 && !strcmp(words[5], "pid-namespace"))
        prctl(PR_SET_DUMPABLE, dumpable);       /* an ordinary user's is mapped through /proc */
    words[0] = "shim";
    environ = env;
    return shim((int)launch->words + 1, words);
}

/* The descriptors of a message, if they have the numbers that its words have for them. */
static int passed_by(struct msghdr *message)
{
    struct cmsghdr *rights = CMSG_FIRSTHDR(message);
    if (!rights || rights->cmsg_type != SCM_RIGHTS || message->msg_flags & (MSG_TRUNC | MSG_CTRUNC)) return 0;
    int count = (int)((rights->cmsg_len - CMSG_LEN(0)) / sizeof(int)), each;
    for (int i = 0; i < count; i++) {
        memcpy(&each, CMSG_DATA(rights) + (size_t)i * sizeof each, sizeof each);
        if (each != FIRST_PASSED + i) return 0;
    }
    return count;
}

static int starter(int control, int pids_fd)
{
    static char text[MESSAGE_BYTES];
    _Atomic int32_t *pids = mmap(NULL, MOST_PIDS * sizeof *pids, PROT_READ | PROT_WRITE, MAP_SHARED, pids_fd, 0);
    if (pids == MAP_FAILED || madvise((void *)pids, MOST_PIDS * sizeof *pids, MADV_DONTFORK) < 0) return USAGE_ERROR;
    if (control != CONTROL && dup2(control, CONTROL) < 0) return USAGE_ERROR;
    close_from(CONTROL + 1, CONTROL);
    fcntl(CONTROL, F_SETFD, FD_CLOEXEC);
    int agent = (int)syscall(NR_PIDFD_OPEN, getppid(), 0);      /* whoever else has his end of the socket, he is gone */
    if (agent < 0 && dup2(CONTROL, AGENT) < 0) return USAGE_ERROR;
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    int dumpable = prctl(PR_GET_DUMPABLE);
    prctl(PR_SET_DUMPABLE, 0);
    for (;;) {
        struct pollfd wait[2] = {{.fd = CONTROL, .events = POLLIN}, {.fd = agent, .events = POLLIN}};
        union { struct cmsghdr head; char room[CMSG_SPACE(MOST_PASSED * sizeof(int))]; } rights;
        struct launch launch;
        struct iovec parts[2] = {{&launch, sizeof launch}, {text, sizeof text}};
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2, .msg_control = &rights, .msg_controllen = sizeof rights};
        if (poll(wait, 2, -1) < 0 && errno != EINTR) return USAGE_ERROR;
        if (wait[1].revents || wait[0].revents & (POLLHUP | POLLERR)) return 0;     /* nobody waits for what is left */
        ssize_t size = recvmsg(CONTROL, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (size < 0 && (errno == EAGAIN || errno == EINTR)) continue;
        if (size <= 0) return 0;
        if (passed_by(&message) >= 3 && (size_t)size >= sizeof launch && launch.place < MOST_PIDS) {
            const char *end = text + ((size_t)size - sizeof launch);
            pids[launch.place] = -1;
            pid_t pid = (pid_t)syscall(SYS_clone, CLONE_PARENT | SIGCHLD, NULL, NULL, NULL, NULL);
            if (pid == 0) _exit(begin(&launch, text, end, dumpable));
            if (pid < 0) say_refused(FIRST_PASSED, "starter", "fork", 0);
            pids[launch.place] = pid;
        }
        close_from(FIRST_PASSED, 0);
    }
}

int main(int count, char **words)
{
    long control, pids;
    reset_signals();    /* who ignores SIGCHLD, as our parent may, is told of no child's end */
    if (count != 4 || strcmp(words[1], "starter")) return shim(count, words);
    if (!number(words[2], CONTROL, INT_MAX, &control) || !number(words[3], CONTROL, INT_MAX, &pids)) return USAGE_ERROR;
    return starter((int)control, (int)pids);
}

/* The shim: one small process for each payload, between the agent and the payload's processes.
 *
 * It makes the sub-reaper, the pid namespace and the exit record properties of the job and not of the program that
 * embeds us; it outlives an agent that dies, and its record can be read by the next one. shim.py is its twin for
 * machines without a compiler: the same options, files and signals, checked by one suite.
 *
 *   agent ── shim ─┬─ payload ─ ...            (subreaper: orphans come back to the shim)
 *                  └─ init ── payload ─ ...    (pid-namespace: killing init ends everything in one stroke)
 *
 * usage: shim STATE_FD REPORT_FD ENV_FD GRACE_MS MODE FLAGS PROGRAM [ARGUMENT...]
 *   STATE_FD   a directory, or -1; `lock` is held by flock for the shim's life, `started` and `exit` are renamed into place
 *   REPORT_FD  a pipe; the text of `started` is written to it, an empty line, and at the end the text of `exit`.
 *              The payload cannot forge what comes through it. -1: none
 *   ENV_FD     a file with the payload's environment, each variable ended by a NUL: our own stays empty, so that no
 *              LD_PRELOAD of the payload's gets hold of us
 *   GRACE_MS   between TERM and KILL
 *   MODE       "pid-namespace" or "subreaper"; refused ones are reported as "refused MODE", and nothing was started
 *   FLAGS      "n": no new privileges, so that set-uid programs cannot get out; "-": none
 * signals: TERM ends the payload politely (TERM to all, KILL after the grace), USR1 at once.
 * ends with 0 when it has reported an end, with 125 when it has refused, or did not understand its words.
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
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { USAGE_ERROR = 125 };

struct options {
    int state, report, environment;
    long grace_ms;
    int new_namespaces, no_new_privileges;
    char **program, **env;
};

struct outcome {               /* what init, or the shim itself, saw of the payload */
    int status;                /* raw, as wait4 gives it: an exit code cannot tell `exit 143` from SIGTERM */
    struct rusage payload;
    int orphans, grace_expired;
    char asked;                /* '-' nobody, 'T' politely, 'K' at once */
};

struct start { int error; pid_t pid; };   /* of the payload; error is errno of what failed, 0 once it executes */

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

/* A file of the state directory: whole, synced, or not there. */
static void put(int state, const char *name, const char *text)
{
    if (state < 0) return;
    int fd = openat(state, "new", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0) return;
    int failed = write_all(fd, text, strlen(text)) < 0 || fsync(fd) < 0;
    close(fd);
    if (failed || renameat(state, "new", state, name) < 0) unlinkat(state, "new", 0);
    fsync(state);
}

struct stat_of { pid_t parent; unsigned long long start; };

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
        sscanf(after + 2, "%*c %d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu",
               &found.parent, &found.start);
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

/* Every descendant gets the signal. A work list, not recursion: chains may be hundreds deep. Each is asked for its
 * parent again when its turn comes: it may have ended since, and its number been given to a process that is not ours. */
static void signal_tree(int number)
{
    struct pids pids = {0};
    pid_t self = getpid();
    add_children(&pids, self);
    for (size_t i = 0; i < pids.count; i++) {
        struct found next = pids.list[i];
        pid_t parent = stat_of(next.pid).parent;
        if (parent != next.parent && parent != self) continue;
        add_children(&pids, next.pid);
        kill(next.pid, number);
    }
    free(pids.list);
}

static void signal_all(int in_namespace, int number)
{
    if (in_namespace) kill(-1, number);     /* everybody but us: we are pid 1 */
    else signal_tree(number);
}

/* -- the payload ---------------------------------------------------------------------------------------------- */

/* Descriptors above 2 but for one. Old kernels, and old filters of system calls, have no close_range. */
static void close_all_but(int kept)
{
    long below = kept > 3 ? syscall(SYS_close_range, 3, kept - 1, 0) : 0;
    if (below == 0 && syscall(SYS_close_range, kept + 1, ~0U, 0) == 0) return;
    DIR *open = opendir("/proc/self/fd");
    if (!open) return;
    for (struct dirent *entry; (entry = readdir(open));) {
        int fd = atoi(entry->d_name);
        if (fd > 2 && fd != kept && fd != dirfd(open)) close(fd);
    }
    closedir(open);
}

static void reset_signals(void)
{
    struct sigaction usual = {.sa_handler = SIG_DFL};
    for (int number = 1; number < NSIG; number++) sigaction(number, &usual, NULL);
}

/* Start the payload in a session of its own with nothing but its three descriptors; errno if it cannot be executed. */
static struct start spawn(const struct options *o)
{
    struct start started = {0};
    int failed[2];
    if (pipe2(failed, O_CLOEXEC) < 0) { started.error = errno; return started; }
    started.pid = fork();
    if (started.pid < 0) { started.error = errno; close(failed[0]); close(failed[1]); return started; }
    if (started.pid == 0) {
        sigset_t none;
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        setsid();
        prctl(PR_SET_PDEATHSIG, 0);
        if (o->no_new_privileges) prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        close_all_but(failed[1]);
        execve(o->program[0], o->program, o->env);
        if (errno == ENOEXEC) {     /* a script that does not say whose: the shell's, as everywhere */
            size_t count = 0;
            while (o->program[count]) count++;
            char **words = calloc(count + 2, sizeof *words);
            if (words) {
                words[0] = "/bin/sh";
                memcpy(words + 1, o->program, (count + 1) * sizeof *words);
                execve(words[0], words, o->env);
            }
        }
        int error = errno;
        write_all(failed[1], &error, sizeof error);
        _exit(127);
    }
    close(failed[1]);
    if (read_all(failed[0], &started.error, sizeof started.error) != sizeof started.error) started.error = 0;
    close(failed[0]);
    return started;
}

/* Wait until the payload and all it left are gone. Orders come as signals (orders < 0) or as bytes of a pipe. */
static struct outcome reap(pid_t payload, int signals, int orders, int in_namespace, long grace_ms)
{
    struct outcome out = {.status = -1, .asked = '-'};
    int64_t deadline = -1;
    int gone = 0, killing = 0, pause_ms = 1;
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
        if (killing) signal_all(in_namespace, SIGKILL);     /* again and again: it may be forking */

        struct pollfd wait[2] = {{.fd = signals, .events = POLLIN}, {.fd = orders, .events = POLLIN}};
        int64_t left = deadline - now_ms();
        poll(wait, 2, killing ? pause_ms : deadline >= 0 ? (int)(left > 0 ? left : 0) : -1);
        if (killing && pause_ms < 100) pause_ms *= 2;       /* what hangs in the kernel needs no thousand looks a second */
        char asked = 0;
        struct signalfd_siginfo info;
        if (wait[0].revents && read(signals, &info, sizeof info) == sizeof info && info.ssi_signo != SIGCHLD)
            asked = info.ssi_signo == SIGTERM ? 'T' : 'K';
        if (orders >= 0 && wait[1].revents && read(orders, &asked, 1) != 1) { asked = 'K'; orders = -1; }   /* no shim */
        if (asked == 'T' && out.asked == '-') {
            out.asked = 'T';
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

/* Process 1 of the payload's namespace. Cannot be killed from inside; takes everything with it when it ends.
 * A shim that died before PDEATHSIG was set is noticed all the same: nobody holds the other end of orders then. */
static void init(const struct options *o, int orders, int results)
{
    struct start started = {0};
    char byte;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (read(orders, &byte, 1) != 1) _exit(1);      /* once the shim has mapped us */
    close(o->report);
    if (o->state >= 0) close(o->state);
    /* A slave, not private: what the site's automounter mounts later (CVMFS) has to appear in here too. */
    if (mount("none", "/", NULL, MS_REC | MS_SLAVE, NULL) < 0 ||
        mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0) {
        started.error = errno;
        started.pid = -1;
        write_all(results, &started, sizeof started);
        _exit(1);
    }
    prctl(PR_SET_DUMPABLE, 0);
    int signals = take_signals(0);
    started = spawn(o);
    write_all(results, &started, sizeof started);
    if (started.pid < 0) _exit(1);
    if (read(orders, &byte, 1) != 1) _exit(1);      /* once it has noted the payload, which nobody has reaped so far */
    struct outcome out = reap(started.pid, signals, orders, 1, o->grace_ms);
    write_all(results, &out, sizeof out);
    _exit(0);
}

/* -- the shim ------------------------------------------------------------------------------------------------- */

static void report_start(const struct options *o, const char *mode, struct start started, pid_t payload)
{
    char text[512];
    snprintf(text, sizeof text,
             "shim_pid %d\nshim_start %llu\npayload_pid %d\npayload_start %llu\ncontainment %s\nerror %d\n",
             getpid(), stat_of(getpid()).start, payload, stat_of(payload).start, mode, started.error);
    put(o->state, "started", text);
    write_all(o->report, text, strlen(text));
    write_all(o->report, "\n", 1);
}

static long long us(struct timeval t) { return (long long)t.tv_sec * 1000000 + t.tv_usec; }

static void report_end(const struct options *o, struct outcome out, int64_t wall_ms)
{
    char text[1024];
    struct rusage tree;
    getrusage(RUSAGE_CHILDREN, &tree);
    snprintf(text, sizeof text,
             "status %d\nwall_ms %lld\npayload_user_us %lld\npayload_system_us %lld\npayload_peak_kib %ld\n"
             "tree_user_us %lld\ntree_system_us %lld\ntree_peak_kib %ld\n"
             "asked %c\norphans %d\ngrace_expired %d\n",
             out.status, (long long)wall_ms, us(out.payload.ru_utime), us(out.payload.ru_stime), out.payload.ru_maxrss,
             us(tree.ru_utime), us(tree.ru_stime), tree.ru_maxrss, out.asked, out.orphans, out.grace_expired);
    put(o->state, "exit", text);
    write_all(o->report, text, strlen(text));
}

static void cannot(const struct options *o, const char *mode, const char *what)
{
    char text[256];
    snprintf(text, sizeof text, "refused %s\nwhat %s\nreason %s\n", mode, what, strerror(errno));
    write_all(o->report, text, strlen(text));
    _exit(USAGE_ERROR);
}

/* The payload's pid as we see it: the first child of its init, which reaps nobody before it is told to. */
static pid_t child_of(pid_t init)
{
    struct pids pids = {0};
    add_children(&pids, init);
    pid_t child = pids.count ? pids.list[0].pid : 0;
    free(pids.list);
    return child;
}

static void run_in_namespaces(const struct options *o)
{
    const char *mode = "pid-namespace";
    int orders[2], results[2];
    if (pipe2(orders, O_CLOEXEC) < 0 || pipe2(results, O_CLOEXEC) < 0) cannot(o, mode, "pipe");
    int user = geteuid() == 0 ? 0 : CLONE_NEWUSER;      /* root needs no other user to have namespaces */
    int signals = take_signals(1);
    int64_t begun = now_ms();
    pid_t child = (pid_t)syscall(SYS_clone, user | CLONE_NEWPID | CLONE_NEWNS | SIGCHLD, NULL, NULL, NULL, NULL);
    if (child < 0) cannot(o, mode, "clone");
    if (child == 0) {
        close(orders[1]);
        close(results[0]);
        init(o, orders[0], results[1]);
    }
    close(orders[0]);
    close(results[1]);
    if (user && map_ids(child) < 0) { int error = errno; kill(child, SIGKILL); errno = error; cannot(o, mode, "uid_map"); }
    prctl(PR_SET_DUMPABLE, 0);
    write_all(orders[1], "!", 1);
    struct start started;
    if (read_all(results[0], &started, sizeof started) != sizeof started) { errno = EPROTO; cannot(o, mode, "init"); }
    if (started.pid < 0) { errno = started.error; cannot(o, mode, "mount or fork"); }
    report_start(o, mode, started, child_of(child));
    write_all(orders[1], "!", 1);

    struct outcome out = {.status = -1, .asked = '-'};
    char asked = '-';
    for (int gone = 0; !gone;) {
        struct pollfd wait = {.fd = signals, .events = POLLIN};
        struct signalfd_siginfo info;
        poll(&wait, 1, -1);
        if (read(signals, &info, sizeof info) != sizeof info) continue;
        if (info.ssi_signo == SIGCHLD) gone = waitpid(child, NULL, WNOHANG) == child;
        else if (info.ssi_signo == SIGTERM) { asked = asked == '-' ? 'T' : asked; write_all(orders[1], "T", 1); }
        else { asked = asked == '-' ? 'K' : asked; write_all(orders[1], "K", 1); }
    }
    read_all(results[0], &out, sizeof out);
    if (out.status == -1) out.asked = asked;    /* init was killed from outside: the status is lost, nothing is left */
    report_end(o, out, now_ms() - begun);
}

static void run_as_subreaper(const struct options *o)
{
    const char *mode = "subreaper";
    if (prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) < 0) cannot(o, mode, "prctl");
    prctl(PR_SET_DUMPABLE, 0);
    int signals = take_signals(1);
    int64_t begun = now_ms();
    struct start started = spawn(o);
    if (started.pid < 0) { errno = started.error; cannot(o, mode, "fork"); }
    report_start(o, mode, started, started.pid);
    struct outcome out = reap(started.pid, signals, -1, 0, o->grace_ms);
    report_end(o, out, now_ms() - begun);
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

int main(int count, char **words)
{
    long state, report, environment, grace_ms;
    if (count < 8 || !number(words[1], -1, INT_MAX, &state) || !number(words[2], -1, INT_MAX, &report) ||
        !number(words[3], 0, INT_MAX, &environment) || !number(words[4], 0, INT_MAX, &grace_ms) ||
        (strcmp(words[5], "pid-namespace") && strcmp(words[5], "subreaper")) ||
        (strcmp(words[6], "n") && strcmp(words[6], "-"))) return USAGE_ERROR;
    struct options o = {
        .state = (int)state, .report = (int)report, .environment = (int)environment, .grace_ms = grace_ms,
        .new_namespaces = strcmp(words[5], "pid-namespace") == 0, .no_new_privileges = words[6][0] == 'n',
        .program = words + 7,
    };
    reset_signals();    /* who ignores SIGCHLD, as our parent may, is told of no child's end */
    fcntl(o.report, F_SETFD, FD_CLOEXEC);
    o.env = read_environment(o.environment);
    if (!o.env) cannot(&o, words[5], "environment");
    close(o.environment);
    if (o.state >= 0) {
        fcntl(o.state, F_SETFD, FD_CLOEXEC);
        int lock = openat(o.state, "lock", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        if (lock < 0 || flock(lock, LOCK_EX | LOCK_NB) < 0) cannot(&o, words[5], "lock");
    }
    setsid();
    if (o.new_namespaces) run_in_namespaces(&o);
    else run_as_subreaper(&o);
    return 0;
}

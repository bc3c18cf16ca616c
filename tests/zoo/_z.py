import os, sys, time, random, signal, ctypes
D = os.environ.get("ZOO_DIR") or "."
NAME = os.path.basename(sys.argv[0]).split(".")[0]
HERE = os.path.dirname(os.path.abspath(__file__))
PY = sys.executable
libc = ctypes.CDLL(None, use_errno=True)
def prctl(*a): return libc.prctl(*[ctypes.c_ulong(x) for x in (list(a) + [0]*5)[:5]])
def ready(txt=""):
    with open(f"{D}/.ready", "w") as f: f.write(txt)
    os.rename(f"{D}/.ready", f"{D}/ready")
def beat(tag="", seconds=40, d=None):
    """live for `seconds`, touching a private file; bounded so that nothing in the zoo runs for ever"""
    d = d or D
    os.makedirs(f"{d}/alive", exist_ok=True)
    p = f"{d}/alive/{NAME}{tag}-{random.getrandbits(40):x}"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with open(p, "a"): os.utime(p)
        except OSError: pass
        time.sleep(0.02)
    os._exit(0)
def fork(fn, *a):
    p = os.fork()
    if not p:
        try: fn(*a)
        finally: os._exit(0)
    return p
def daemonize(fn, *a):
    """classic double fork + setsid"""
    def mid():
        os.setsid(); fork(fn, *a); os._exit(0)
    p = fork(mid); os.waitpid(p, 0)
def exec_scrubbed(tag="s", seconds=40):
    """same process, new image: empty environment, cwd /, no inherited fd, innocent argv"""
    os.chdir("/")
    os.closerange(0, 256)
    for _ in range(3): os.open("/dev/null", os.O_RDWR)
    os.execve(PY, ["kworker/0:1", "-I", "-S", "-c",
        "import sys;sys.path.insert(0,%r);sys.argv=[%r];import os;os.environ['ZOO_DIR']=%r;import _z;_z.D=%r;_z.beat(%r,%d)" % (HERE, NAME, D, D, tag, seconds)], {})
def forever(s=40):
    end = time.monotonic() + s
    while time.monotonic() < end: time.sleep(0.1)

"""burns CPU in short-lived children: of a parent that ignores SIGCHLD, or (argv[2] `orphans`) in grandchildren it never waits for; argv: SECONDS; says how much"""
from _z import *
seconds, orphans = float(sys.argv[1] if len(sys.argv) > 1 else 4), "orphans" in sys.argv
if not orphans: signal.signal(signal.SIGCHLD, signal.SIG_IGN)
def burn():
    t = time.process_time()
    while time.process_time() - t < 0.05: pass
def once():
    r, w = os.pipe()
    p = fork(fork, burn) if orphans else fork(burn)
    os.close(w)
    try: os.waitpid(p, 0)
    except ChildProcessError: pass
    os.read(r, 1); os.close(r)     # until the last who has it open is gone
ready(); n = 0; end = time.monotonic() + seconds
while time.monotonic() < end: once(); n += 1
print(n * 0.05, flush=True)

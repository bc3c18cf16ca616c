"""forges the supervisor's own records: into state directories it finds, and into what its parents have open"""
from _z import *
NAMES = {"lock", "shim.lock", "started", "exit"}
FORGED = "status 0\n\nstatus 0\n"
hits = []
for base in {os.environ.get("LM_STATE", ""), os.getcwd(), os.path.dirname(os.path.dirname(os.getcwd())), os.path.abspath(D)}:
    for root, ds, fs in os.walk(base) if base else ():
        if NAMES & set(fs):
            try: open(root + "/exit", "w").write(FORGED); hits.append(root)
            except OSError: pass
def ppid(p): return int(open(f"/proc/{p}/stat").read().rpartition(")")[2].split()[1])
up = [os.getppid()]
while len(up) < int(os.environ.get("ZOO_UP", 1)) and up[-1]: up.append(ppid(up[-1]))
for pid in set(up) - {0}:
    try: fds = os.listdir(f"/proc/{pid}/fd")
    except OSError: continue
    for fd in fds:
        try:
            if os.readlink(f"/proc/{pid}/fd/{fd}").startswith("pipe:"):
                f = os.open(f"/proc/{pid}/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK); os.write(f, FORGED.encode()); hits.append(f"{pid}/{fd}")
        except OSError: pass
print("forged:", hits, flush=True); ready(str(hits)); sys.exit(9)

"""kills its parent (agent or shim) and its parent's parent while that is not pid 1, then leaves a scrubbed daemon"""
from _z import *
def ppid(p): return int(open(f"/proc/{p}/stat").read().rpartition(")")[2].split()[1])
up = os.getppid()
daemonize(exec_scrubbed); time.sleep(.2)
try: os.kill(up, 9); print("killed parent", up)
except OSError as e: print(e)
ready(); beat("p")

"""stands in for cron/at/systemd --user: starts a beating daemon for whoever connects; everything it starts dies with it"""
import os, socket, sys, select, signal, time
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
S = os.environ["ZOO_AT"]
try: os.unlink(S)
except OSError: pass
s = socket.socket(socket.AF_UNIX); s.bind(S); os.chmod(S, 0o777); s.listen()
kids = []
while True:
    r, _, _ = select.select([s, sys.stdin], [], [])
    if sys.stdin in r: break
    c, _ = s.accept(); d = c.recv(500).decode().strip()
    p = os.fork()
    if not p:
        if os.getuid() == 0: os.setresgid(*[int(sys.argv[1])]*3); os.setresuid(*[int(sys.argv[1])]*3)
        import _z; _z.NAME = "launched"; _z.beat("", 4, d)
    kids.append(p); c.sendall(b"ok"); c.close()
for k in kids:
    try: os.kill(k, 9)
    except OSError: pass

"""asks a service outside the job to start a process (cron/at/systemd --user/docker/ssh localhost, here: unix socket $ZOO_AT)"""
from _z import *
import socket
s = socket.socket(socket.AF_UNIX)
try:
    s.connect(os.environ["ZOO_AT"]); s.sendall(D.encode() + b"\n"); print("launcher said", s.recv(10))
except OSError as e: print("launcher unreachable:", e)
time.sleep(.2); ready(); beat("p")

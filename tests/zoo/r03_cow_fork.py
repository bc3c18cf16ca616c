"""200 MB touched once, then 10 forked children: sum of RSS ~2.2 GB, PSS ~200 MB (RSS limits kill an innocent job); argv: MB SECONDS"""
from _z import *
mb, seconds = (int(sys.argv[1]), float(sys.argv[2])) if len(sys.argv) > 2 else (200, 20)
b = bytearray(mb << 20)
for i in range(0, len(b), 4096): b[i] = 1
for _ in range(10): fork(forever, seconds)
ready(); forever(seconds)

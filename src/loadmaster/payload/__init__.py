"""The payload: what it is told to run, its processes, its output, and who watches it."""

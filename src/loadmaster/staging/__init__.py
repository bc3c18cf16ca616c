"""Bringing a job's files in and taking them out: what to move (plan), and moving it (engine)."""

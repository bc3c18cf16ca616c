"""Agents that are stopped for a while, come in twos, or find the disk of their journal full: every job has one end still."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from test_killed_agent import Campaign

SEEDS = [1, *[pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 9)]]


@pytest.mark.parametrize("seed", SEEDS)
def test_two_agents_that_begin_at_once_and_are_stopped_now_and_then_are_one(tmp_path: Path, seed: int) -> None:
    """One has the journal, the other is told so, or finds nothing left to do; who was stopped goes on."""
    campaign, generator = Campaign(tmp_path, 8), random.Random(seed)
    for _ in range(2):
        agents = [campaign.agent(), campaign.agent()]
        until = time.monotonic() + generator.uniform(1, 2.5)
        while time.monotonic() < until:
            stopped = generator.choice(agents)
            if stopped.poll() is None:
                stopped.send_signal(signal.SIGSTOP)
                time.sleep(generator.uniform(0, 0.4))
                stopped.send_signal(signal.SIGCONT)
            time.sleep(generator.uniform(0, 0.2))
        for agent in agents:
            agent.kill()
        codes = {agent.wait(60) for agent in agents}
        assert codes <= {0, 1, -9}, campaign.log()
    campaign.lives_on()
    campaign.check()


@pytest.fixture
def journal_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte, where the campaign's journal is."""
    disk = tmp_path / "journal"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "loadmaster", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a disk can only be mounted by root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_disk_that_is_full_now_and_then_fails_agents_and_no_job(
    tmp_path: Path, journal_disk: Path, seed: int
) -> None:
    """Not only an event finds it so, but whatever else is kept there: the states of payloads, the journal when it is
    opened."""
    campaign, generator = Campaign(tmp_path, 8), random.Random(seed)
    block = journal_disk / "block"
    for _ in range(3):
        with campaign.agent() as agent:
            until = time.monotonic() + generator.uniform(1, 3)
            while time.monotonic() < until and agent.poll() is None:
                with suppress(OSError), block.open("wb", buffering=0) as file:
                    while True:
                        file.write(b"x" * 4096)
                time.sleep(generator.uniform(0, 0.3))
                block.unlink()
                time.sleep(generator.uniform(0.1, 0.6))
            code = agent.wait(60)
        assert code in {0, 1}, campaign.log()
    campaign.lives_on()
    campaign.check()

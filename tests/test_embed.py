"""The example of a pilot agent with a node inside, as a user runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

EMBED = Path(__file__).parents[1] / "examples" / "embed.py"


def test_the_agent_answers_and_beats_while_its_node_works_and_every_job_is_done() -> None:
    with subprocess.Popen([sys.executable, "-W", "error", str(EMBED)], stdout=subprocess.PIPE, text=True) as agent:
        try:
            assert agent.stdout is not None
            address = agent.stdout.readline().strip()
            seen = []
            for _ in range(5):
                with urlopen(address, timeout=20) as reply:
                    seen.append(json.load(reply))
            rest = agent.stdout.read()
            assert agent.wait(50) == 0
        finally:
            agent.kill()
    assert all(set(each) == {"jobs", "occupancy"} and 0 <= each["occupancy"] <= 1 for each in seen)
    found = re.search(r"20 of 20 jobs done; (\d+) heartbeats, 99 of 100 less than ([\d.]+) s late", rest)
    assert found is not None, rest
    assert int(found[1]) > 0
    assert float(found[2]) < 2, "its own loop has not waited for the node's jobs"


def test_it_stays_as_short_as_it_says() -> None:
    assert len(EMBED.read_text().splitlines()) < 80

"""Asking a payload to wind down: whom, once, and by somebody else's pattern."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from loadmaster import JobDescription
from loadmaster.payload import softstop
from loadmaster.payload.softstop import SoftStop

SLEEPER = "import signal, sys; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(9)); print(flush=True); signal.pause()"


@pytest.fixture
def sleepers() -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Two processes that can be told apart by their command lines."""
    started = {
        name: subprocess.Popen([sys.executable, "-S", "-c", SLEEPER, name], stdout=subprocess.PIPE)
        for name in ("reconstruction", "monitor")
    }
    for process in started.values():
        assert process.stdout is not None
        process.stdout.readline()
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


def test_those_whose_command_line_matches_are_asked(sleepers: dict[str, subprocess.Popen[bytes]]) -> None:
    pids = [process.pid for process in sleepers.values()]
    assert SoftStop(r"\brecon\w+$", signal.SIGUSR1, 0).ask(pids) == 1
    assert sleepers["reconstruction"].wait(10) == 9
    assert sleepers["monitor"].poll() is None


def test_who_is_gone_is_not_asked(sleepers: dict[str, subprocess.Popen[bytes]]) -> None:
    process = sleepers["monitor"]
    process.kill()
    process.wait()
    assert SoftStop("monitor", signal.SIGUSR1, 0).ask([process.pid]) == 0


def test_a_pattern_that_never_ends_is_given_up(
    sleepers: dict[str, subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matched in this process it would hold the interpreter, and with it the whole pilot."""
    monkeypatch.setattr(softstop, "MATCHING_SECONDS", 0.3)
    begun = time.perf_counter()
    with pytest.raises(TimeoutError, match="stop_pattern"):
        SoftStop(r"(.*)*(.*)*(.*)*x\Zy", signal.SIGUSR1, 0).ask([sleepers["monitor"].pid])
    assert time.perf_counter() - begun < 5


def test_a_description_says_it_in_diracs_words() -> None:
    job = JobDescription.load(
        {"Executable": "x", "StopSigRegex": "gauss", "StopSigNumber": "10", "StopSigFinishSeconds": 600}
    )
    assert SoftStop.of(job) == SoftStop("gauss", 10, 600.0)
    assert (
        job.to_dirac().items() >= {"StopSigRegex": "gauss", "StopSigNumber": 10, "StopSigFinishSeconds": 600.0}.items()
    )
    assert SoftStop.of(JobDescription(executable="x")) is None
    assert SoftStop.of(JobDescription.load({"Executable": "x", "StopSigRegex": ""})) is None

"""Signals that become orders."""

from __future__ import annotations

import os
import signal

import pytest

from loadmaster.console.orders import told_to_stop


@pytest.fixture(autouse=True)
def without_nohup() -> None:
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        pytest.skip("these tests are run under nohup")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_one_that_is_told_twice_at_once_is_told_once(number: int) -> None:
    """A terminal that was closed told twice, by the kernel and by the shell: nothing was delivered."""
    with told_to_stop() as orders:
        for _ in range(2):
            os.kill(os.getpid(), number)
        assert orders.seen == [number]


async def test_two_of_different_kinds_are_two() -> None:
    with told_to_stop() as orders:
        os.kill(os.getpid(), signal.SIGTERM)
        assert await orders.next() == "SIGTERM"
        os.kill(os.getpid(), signal.SIGHUP)
        assert await orders.next() == "SIGHUP"


async def test_a_person_who_presses_twice_means_it() -> None:
    with told_to_stop() as orders:
        os.kill(os.getpid(), signal.SIGINT)
        assert await orders.next() == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
        assert await orders.next() == "SIGINT"
        assert not orders.interrupted


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with told_to_stop():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before

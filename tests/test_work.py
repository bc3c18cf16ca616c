"""What `loadmaster node` does, without a process of its own: results, events, and orders to stop."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import anyio
import pytest

from conftest import sh, until
from following import Signpost, processes_of
from loadmaster import JobResult, Ledger, Node, NodeStatistics, Site, Status
from loadmaster.console.orders import Orders
from loadmaster.console.work import Shift, work
from loadmaster.sources import JobLines


class Heard:
    """A board that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.ended: list[JobResult] = []
        self.figures: list[NodeStatistics] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def end(self, result: JobResult) -> None:
        self.ended.append(result)

    def move(self, figures: NodeStatistics) -> None:
        self.figures.append(figures)

    def close(self) -> None:
        pass


class Boss:
    """Somebody who gives orders, as a signal handler does."""

    def __init__(self) -> None:
        reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._reader = reader
        self.orders = Orders(reader)

    def order(self) -> None:
        self.orders.seen.append(signal.SIGINT)
        os.write(self._writer, b"!")

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)


@pytest.fixture
def boss() -> Iterator[Boss]:
    boss = Boss()
    yield boss
    boss.close()


@pytest.fixture
def board() -> Heard:
    return Heard()


Do = Callable[..., Any]


@pytest.fixture
def do(root: Path, out: Path, tmp_path: Path, board: Heard, boss: Boss) -> Do:
    """Work on some jobs with one core."""

    async def do(*jobs: dict[str, Any], events: TextIO | None = None) -> Shift:
        (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
        source = JobLines(tmp_path / "jobs.jsonl", outputs=out)
        node = Node(ledger=Ledger(1), root=root, site=Site(output_directory=str(out)))
        try:
            return await work(node, source, board, boss.orders, results=tmp_path, events=events)
        finally:
            source.close()

    return do


def job(name: str, script: str = "true", **words: Any) -> dict[str, Any]:
    return {"job_id": name, **sh(script), **words}


async def test_each_result_is_whole_and_told(do: Do, board: Heard, tmp_path: Path) -> None:
    shift = await do(job("good"), job("bad", "exit 3"), {"no": "job"})
    written = {name: json.loads((tmp_path / f"{name}.json").read_text())["status"] for name in ("good", "bad")}
    assert written == {"good": "Done", "bad": "Failed"}
    assert list(tmp_path.glob(".*.part")) == []
    assert {result.job_id: result.status.value for result in board.ended} == written
    assert (shift.failed, shift.left, len(shift.refused)) == (1, False, 1)
    assert shift.figures is not None
    assert shift.figures.ended["Done"] == 1


async def test_the_board_is_told_where_the_jobs_stand_while_they_do(do: Do, board: Heard, tmp_path: Path) -> None:
    post = Signpost(tmp_path / "post")
    async with anyio.create_task_group() as group:
        group.start_soon(do, job("one", f"echo go > {post}"), *(job(f"j{n}") for n in range(9)))
        await until(lambda: any(f.jobs["computing"] and f.jobs["ready"] for f in board.figures))
        await post.reached()


async def test_every_event_is_written_until_the_disk_is_full(do: Do, board: Heard, tmp_path: Path) -> None:
    with (tmp_path / "events").open("w", encoding="utf-8") as events:
        await do(job("one"), job("two"), events=events)
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "events").read_text().splitlines()]
    assert (kinds.count("JobAccepted"), kinds.count("JobFinished")) == (2, 2)
    full = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115  # closed by who writes
    shift = await do(job("one"), job("two"), events=full)
    assert full.closed
    assert shift.failed == 0
    assert board.lines == ["/dev/full: no more events are written: No space left on device"]


async def test_the_first_order_drains_the_second_kills_the_third_leaves(
    do: Do, board: Heard, boss: Boss, tmp_path: Path
) -> None:
    post = Signpost(tmp_path / "post")
    shifts: list[Shift] = []

    async def shift() -> None:
        stubborn = job(
            "stubborn", f"trap '' TERM; echo go > {post}; sleep 600 & wait; wait", limits={"grace_seconds": 600}
        )
        shifts.append(await do(stubborn, *(job(f"j{number}") for number in range(9))))

    async with anyio.create_task_group() as group:
        group.start_soon(shift)
        await post.reached()
        boss.order()
        await until(
            lambda: "SIGINT: nothing new is begun; what computes may finish (once more: kill it)" in board.lines
        )
        boss.order()
        await until(lambda: len(board.lines) == 2)
        assert processes_of("stubborn") != [], "it has its grace"
        boss.order()
    assert [line.partition(";")[0] for line in board.lines[1:]] == [
        "SIGINT: payloads are killed", "SIGINT: leaving"
    ]  # fmt: skip
    assert [(shift.left, shift.figures, shift.failed) for shift in shifts] == [(True, None, 0)]
    assert "stubborn" not in [result.job_id for result in board.ended]
    assert processes_of("stubborn") == []


async def test_what_is_given_back_is_not_killed_by_a_second_order(
    do: Do, board: Heard, boss: Boss, tmp_path: Path
) -> None:
    """It was: the next ones, which were ready and had been given back to the source, ended as Killed all the same."""
    post = Signpost(tmp_path / "post")
    shifts: list[Shift] = []

    async def shift() -> None:
        shifts.append(
            await do(job("long", f"echo go > {post}; sleep 600"), *(job(f"j{number}") for number in range(9)))
        )

    async with anyio.create_task_group() as group:
        group.start_soon(shift)
        await post.reached()
        await until(lambda: any(figures.jobs["ready"] == 2 for figures in board.figures))
        boss.order()
        boss.order()
    (found,) = shifts
    assert found.figures is not None
    assert found.figures.ended["Killed"] == 1
    assert found.figures.given_back == found.figures.ended["Rescheduled"] >= 2
    assert [result.job_id for result in board.ended if result.status is not Status.DONE] == ["long"]

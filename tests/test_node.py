"""Many jobs on one node, by what their owners and the pilot see."""

from __future__ import annotations

import os
import random
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest

from conftest import sh, until
from following import Signpost, happens, kinds, processes_of
from loadmaster import (
    JobDescription,
    JobExecutionCoordinator,
    JobHandle,
    Ledger,
    Node,
    NodeClosed,
    NodeFull,
    Site,
    Status,
    WorkdirFault,
    open_transfers,
)
from loadmaster.ahead import Ahead, Preparing, has_room, next_slow, places
from loadmaster.events import FileStagedIn, JobFinished, PayloadStarted, SlotGranted, StageInStarted
from loadmaster.journal import open_journal
from loadmaster.lifecycle import Stage
from loadmaster.testing import Faults, MemoryStorage

MakeNode = Callable[..., Node]


@pytest.fixture
def make_node(root: Path, out: Path) -> MakeNode:
    """A node with so many cores."""

    def make_node(cores: int = 1, *, ledger: Ledger | None = None, **words: Any) -> Node:
        if "transfers" not in words:
            words["site"] = Site(output_directory=str(out))
        return Node(ledger=ledger or Ledger(cores), root=root, **words)

    return make_node


def job(job_id: str, **words: Any) -> JobDescription:
    return JobDescription(job_id=job_id, **{"executable": "/bin/true", **words})


async def started(handle: JobHandle) -> None:
    await happens(PayloadStarted)(handle)


@asynccontextmanager
async def hanging(at: int = 1, files: int = 20) -> AsyncIterator[Any]:
    """Transfers of inputs `memory://se/<n>`, one of which never comes."""
    storage = Faults(MemoryStorage({f"memory://se/{number}": b"cargo" for number in range(files)}))
    hangs = storage.hang("download", at=at)
    async with open_transfers(Site(), storages={"memory": storage}) as transfers:
        yield transfers, hangs


# -- the straight way --------------------------------------------------------------------------------------------


async def test_a_job_that_is_submitted_runs_and_its_handle_has_the_result(make_node: MakeNode, out: Path) -> None:
    async with make_node() as node:
        handle = node.submit(job("hello", **sh("echo hello"), output_sandbox=["std.out"]))
        result = await handle.wait()
        assert result.status is Status.DONE
        assert (out / "std.out").read_text() == "hello\n"
        assert repr(node) == "<Node [idle]>"


async def test_leaving_the_block_waits_for_all_jobs(make_node: MakeNode) -> None:
    async with make_node(2) as node:
        handles = [node.submit(job(f"j{number}")) for number in range(7)]
    assert [handle.result.status for handle in handles if handle.result] == [Status.DONE] * 7
    assert repr(node.ledger) == "<Ledger [2 of 2 cores free, 0 waiting]>"


async def test_a_node_that_was_left_takes_no_more(make_node: MakeNode) -> None:
    async with make_node() as node:
        pass
    with pytest.raises(NodeClosed):
        node.submit(job("late"))


async def test_the_inputs_of_the_next_job_arrive_while_a_payload_has_the_only_core(
    make_node: MakeNode, tmp_path: Path
) -> None:
    (tmp_path / "input").write_text("cargo")
    post = Signpost(tmp_path / "post")
    async with make_node(1) as node:
        first = node.submit(job("first", **sh(f"echo go > {post}")))
        await started(first)  # it stays until somebody reads
        second = node.submit(job("second", input_data=[str(tmp_path / "input")]))
        await happens(FileStagedIn)(second)
        await until(lambda: second.stage is Stage.PREPARED)
        assert first.stage is Stage.RUNNING
        assert node.statistics().jobs["ready"] == 1
        assert await post.reached() == "go\n"


class Lingers(JobExecutionCoordinator):
    """Never done with its deliveries."""

    async def stageOut(self) -> None:
        await anyio.Event().wait()


async def test_a_job_that_delivers_is_in_nobodys_way(make_node: MakeNode) -> None:
    with anyio.CancelScope() as host:
        async with make_node(1, ahead=1) as node:
            slow = [node.submit(job(f"slow{number}"), coordinator=Lingers) for number in range(5)]
            assert (await node.submit(job("quick")).wait()).status is Status.DONE
            await until(lambda: node.statistics().jobs["delivering"] == 5)
            assert {handle.stage for handle in slow} == {Stage.STAGING_OUT}
            host.cancel()


async def test_jobs_run_by_priority_and_then_as_they_came(make_node: MakeNode, tmp_path: Path) -> None:
    post = Signpost(tmp_path / "post")
    async with make_node(1, ahead=1) as node:
        events = node.events()
        first = node.submit(job("first", **sh(f"echo go > {post}")))
        await started(first)
        nodes_choice = node.submit(job("begun"))
        await happens(StageInStarted)(nodes_choice)
        for name, priority in (("a", 0), ("b", 5), ("c", 0), ("d", 5), ("e", 9)):
            node.submit(job(name, priority=priority))
        await post.reached()
        await node.wait_idle()
    granted = [event.job_id async for event in events if isinstance(event, SlotGranted)]
    assert granted == ["first", "begun", "e", "b", "d", "a", "c"]


async def test_everything_that_happens_is_in_one_stream(make_node: MakeNode) -> None:
    async with make_node(2) as node:
        stream, unread = node.events(), node.events(transient=True)
        handles = [node.submit(job(f"j{number}")) for number in range(4)]
        await node.wait_idle()
    heard = [event async for event in stream]
    for handle in handles:
        own = [event async for event in handle.events()]
        assert [event for event in heard if event.job_id == handle.job_id] == own
    assert len(heard) == 4 * 10
    assert re.fullmatch("<EventStream [45]. to be read, 0 missed>", repr(unread))  # with a heartbeat, if one was slow


# -- jobs that do not run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"number_of_processors": 3}, "the job needs 3 cores, the node has 2"),
        ({"resources": {"licences": 1}}, "the job needs 'licences', which the node does not have"),
        ({"disk_bytes": 1001}, "the job needs 1001 bytes of disk, the node has 1000"),
        ({"input_data": [{"source": "/x", "size_bytes": 5000}]}, "the job needs 5000 bytes of disk, the node has 1000"),
    ],
)
async def test_a_job_that_can_never_run_fails_at_once(
    make_node: MakeNode, tmp_path: Path, words: dict[str, Any], reason: str
) -> None:
    post = Signpost(tmp_path / "post")
    async with make_node(ledger=Ledger(2, disk_bytes=1000)) as node:
        await started(node.submit(job("large", number_of_processors=2, **sh(f"echo go > {post}"))))
        result = await node.submit(job("never", **words)).wait()
        assert result.status is Status.FAILED
        assert result.failure is not None
        assert result.failure.message == reason
        await post.reached()


async def test_a_second_job_of_the_same_id_is_refused_while_the_first_is_there(make_node: MakeNode) -> None:
    async with make_node() as node:
        first, second = node.submit(job("same")), node.submit(job("same"))
        failure = (await second.wait()).failure
        assert str(failure) == "InvalidJob: there is a job same on this node already"
        assert (await first.wait()).status is Status.DONE
        assert (await node.submit(job("same")).wait()).status is Status.DONE


async def test_more_jobs_than_may_wait_are_refused(make_node: MakeNode) -> None:
    async with make_node(backlog=3) as node:
        for number in range(3):
            node.submit(job(f"j{number}"))
        with pytest.raises(NodeFull, match="3 jobs wait already"):
            node.submit(job("another"))
        await node.wait_idle()
        node.submit(job("later"))


async def test_a_job_is_killed_in_the_queue_and_never_begins(make_node: MakeNode, tmp_path: Path) -> None:
    post = Signpost(tmp_path / "post")
    async with make_node(1, ahead=1) as node:
        await started(node.submit(job("first", **sh(f"echo go > {post}"))))
        node.submit(job("second"))
        third = node.submit(job("third"))
        assert third.kill("changed my mind")
        result = await third.wait()
        assert result.status is Status.KILLED
        assert str(result.failure) == "JobWasKilled: changed my mind"
        told = kinds([event async for event in third.events()])
        assert told == ["JobAccepted", "KillOrdered", "ComputingEnded", "JobFinished"]
        assert not third.kill("again")
        await post.reached()
    assert node.statistics().ended == {"Done": 2, "Completed": 0, "Failed": 0, "Killed": 1, "Rescheduled": 0}


async def test_a_job_is_killed_while_it_waits_for_disk(make_node: MakeNode, tmp_path: Path) -> None:
    post = Signpost(tmp_path / "post")
    async with make_node(ledger=Ledger(4, disk_bytes=100)) as node:
        await started(node.submit(job("first", disk_bytes=80, **sh(f"echo go > {post}"))))
        second = node.submit(job("second", disk_bytes=80))
        await until(lambda: node.statistics().jobs["waiting for disk"] == 1)
        assert node.statistics().idle == {"disk": 1, "no job": 2}
        second.kill("no disk")
        assert (await second.wait()).status is Status.KILLED
        await post.reached()
    assert node.ledger.free_disk_bytes == 100


async def test_a_running_job_is_killed(make_node: MakeNode) -> None:
    async with make_node() as node:
        handle = node.submit(job("sleeper", executable="/bin/sleep", arguments="60"))
        await started(handle)
        handle.kill("enough")
        assert (await handle.wait()).status is Status.KILLED


async def test_one_whose_work_directory_cannot_be_made_is_rescheduled_and_the_others_go_on(
    make_node: MakeNode, root: Path
) -> None:
    (root / "taken").mkdir()
    (root / "taken" / "precious").touch()
    async with make_node() as node:
        taken, other = node.submit(job("taken")), node.submit(job("other"))
        result = await taken.wait()
        assert result.status is Status.RESCHEDULED
        assert "this node has no work directory for it" in str(result.failure)
        assert (await other.wait()).status is Status.DONE
    assert (root / "taken" / "precious").exists()
    (root / "taken" / "precious").unlink()
    (root / "taken").rmdir()


async def test_a_node_without_a_place_for_work_directories_does_not_open(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WorkdirFault, match="Not a directory"):
        async with Node(ledger=Ledger(1), root=tmp_path / "file" / "root"):
            pass


# -- running ahead -----------------------------------------------------------------------------------------------


async def test_no_more_jobs_are_begun_than_may_run_ahead(make_node: MakeNode, tmp_path: Path, root: Path) -> None:
    post = Signpost(tmp_path / "post")
    async with make_node(1, ahead=3) as node:
        await started(node.submit(job("first", **sh(f"echo go > {post}"))))
        for number in range(10):
            node.submit(job(f"j{number}"))
        await until(lambda: node.statistics().jobs["ready"] == 3)
        assert node.statistics().jobs == {
            "waiting": 7, "waiting for disk": 0, "staging in": 0, "ready": 3, "computing": 1, "delivering": 0,
        }  # fmt: skip
        assert sorted(path.name for path in root.iterdir() if path.is_dir()) == ["first", "j0", "j1", "j2"]
        await post.reached()


async def test_no_more_bytes_are_brought_in_ahead_than_may_be(make_node: MakeNode, tmp_path: Path) -> None:
    post = Signpost(tmp_path / "post")
    (tmp_path / "input").write_bytes(bytes(60))
    data = [{"source": str(tmp_path / "input"), "size_bytes": 60}]
    async with make_node(1, ahead=3, ahead_bytes=100) as node:
        await started(node.submit(job("first", **sh(f"echo go > {post}"))))
        node.submit(job("second", input_data=data))
        node.submit(job("third", input_data=data))
        await until(lambda: node.statistics().jobs["ready"] == 1)
        assert node.statistics().jobs["waiting"] == 1
        await post.reached()


async def test_a_job_whose_input_hangs_delays_nobody(make_node: MakeNode) -> None:
    async with hanging() as (transfers, hangs), make_node(1, ahead=2, transfers=transfers) as node:
        stuck = node.submit(job("stuck", input_data=["memory://se/0"]))
        await hangs.wait()
        others = [node.submit(job(f"j{number}", input_data=[f"memory://se/{number}"])) for number in range(1, 6)]
        assert [(await handle.wait()).status for handle in others] == [Status.DONE] * 5
        assert stuck.stage is Stage.STAGING_IN
        assert node.statistics().idle == {"waiting for inputs": 1}
        stuck.kill("waited long enough")
        assert (await stuck.wait()).status is Status.KILLED


async def test_jobs_that_hang_give_their_places_to_others_after_a_while(make_node: MakeNode) -> None:
    async with hanging() as (transfers, hangs), make_node(1, ahead=1, transfers=transfers, slow_seconds=0.2) as node:
        stuck = node.submit(job("stuck", input_data=["memory://se/0"]))
        await hangs.wait()
        others = [node.submit(job(f"j{number}", input_data=[f"memory://se/{number}"])) for number in range(1, 4)]
        assert [(await handle.wait()).status for handle in others] == [Status.DONE] * 3
        stuck.kill("waited long enough")


def test_places_end_also_for_jobs_that_are_slow() -> None:
    terms = Ahead(jobs=2, slow_seconds=10)
    slow = [Preparing(0.0, 0) for _ in range(10)]
    assert places(terms, slow[:2], 5.0) == 0
    assert places(terms, slow[:2], 10.0) == 2
    assert places(terms, slow[:9], 10.0) == 1
    assert places(terms, slow, 10.0) == 0
    assert places(terms, [Preparing(0.0, 0, ready=True)], 10.0) == 1
    assert next_slow(terms, slow, 5.0) == 10.0
    assert next_slow(terms, slow, 10.0) == float("inf")


def test_one_job_is_let_in_whatever_its_size() -> None:
    terms = Ahead(jobs=2, bytes=10)
    assert has_room(terms, [], 1000)
    assert has_room(terms, [Preparing(0.0, 4)], 6)
    assert not has_room(terms, [Preparing(0.0, 4)], 7)


def test_a_node_that_begins_no_job_is_refused() -> None:
    with pytest.raises(ValueError, match="without one nothing would ever begin"):
        Ahead(jobs=0)


# -- the end -----------------------------------------------------------------------------------------------------


async def test_a_drained_node_gives_back_what_does_not_compute_and_lets_the_rest_finish(
    make_node: MakeNode, tmp_path: Path
) -> None:
    post = Signpost(tmp_path / "post")
    async with make_node(1, ahead=2) as node:
        running = node.submit(job("running", **sh(f"echo go > {post}")))
        await started(running)
        others = [node.submit(job(f"j{number}")) for number in range(4)]
        await until(lambda: node.statistics().jobs["ready"] == 2)
        async with anyio.create_task_group() as group:
            group.start_soon(node.drain)
            results = [await handle.wait() for handle in others]
            assert running.stage is Stage.RUNNING
            with pytest.raises(NodeClosed):
                node.submit(job("late"))
            await post.reached()
        assert running.result is not None
        assert running.result.status is Status.DONE
    assert {str(result.failure) for result in results} == {
        "RescheduleJob: given back: the node was drained before it computed"
    }
    assert {result.status for result in results} == {Status.RESCHEDULED}
    assert node.statistics().given_back == 4


async def test_payloads_that_run_at_the_deadline_of_a_drain_are_killed(make_node: MakeNode, out: Path) -> None:
    async with make_node() as node:
        handle = node.submit(job("long", **sh("echo so far; sleep 60"), output_sandbox=["std.out"]))
        await started(handle)
        await node.drain(deadline_seconds=0.1)
        assert handle.result is not None
        assert handle.result.status is Status.KILLED
        assert str(handle.result.failure) == "JobWasKilled: drained"
    assert (out / "std.out").exists()


async def test_a_node_whose_host_leaves_stops_its_payloads_and_claims_nothing(make_node: MakeNode) -> None:
    with anyio.CancelScope() as host:
        async with make_node(1) as node:
            running = node.submit(job("running", executable="/bin/sleep", arguments="60"))
            await started(running)
            waiting = node.submit(job("waiting"))
            host.cancel()
    for handle in (running, waiting):
        assert handle.result is None
        with pytest.raises(NodeClosed, match=f"job {handle.job_id} was interrupted"):
            await handle.wait()
    assert JobFinished.__name__ not in kinds([event async for event in running.events()])
    assert node.statistics().interrupted == 2
    assert processes_of("running") == []


async def test_an_error_of_the_host_is_raised_bare_and_the_payloads_are_stopped(make_node: MakeNode) -> None:
    with pytest.raises(KeyError):
        async with make_node(1) as node:
            await started(node.submit(job("running", executable="/bin/sleep", arguments="60")))
            raise KeyError
    assert processes_of("running") == []


# -- what a pilot needs to know ----------------------------------------------------------------------------------


async def test_core_seconds_add_up(make_node: MakeNode) -> None:
    async with make_node(2) as node:
        before = node.statistics()
        for number in range(6):
            node.submit(
                job(f"j{number}", executable="/bin/sleep", arguments="0.1", number_of_processors=1 + number % 2)
            )
        await node.wait_idle()
        after = node.statistics()
    window = after.since(before)
    assert window.busy_core_seconds + sum(window.idle_core_seconds.values()) == pytest.approx(window.core_seconds)
    assert window.busy_core_seconds >= 0.1 * (3 * 1 + 3 * 2)
    assert 0 < window.occupancy <= 1
    assert window.ended == {"Done": 6}
    assert after.busy_cores == 0
    assert after.idle == {"no job": 2}


async def test_whoever_wants_to_know_is_told_when_a_core_falls_idle_and_why(
    make_node: MakeNode, tmp_path: Path
) -> None:
    post = Signpost(tmp_path / "post")
    seen: list[tuple[int, dict[str, int]]] = []

    async def follow(node: Node) -> None:
        async for found in node.occupations():
            assert found.busy_cores + sum(found.idle.values()) == found.cores == 2
            seen.append((found.busy_cores, dict(found.idle)))

    async with anyio.create_task_group() as group, make_node(ledger=Ledger(2, memory_mb=100)) as node:
        group.start_soon(follow, node)
        await until(lambda: seen == [(0, {"no job": 2})])
        running = node.submit(job("running", memory_mb=60, **sh(f"echo go > {post}")))
        await started(running)
        waits = node.submit(job("waits", memory_mb=60))
        await until(lambda: node.statistics().jobs["ready"] == 1)
        await until(lambda: seen[-1] == (1, {"memory": 1}))
        await post.reached()
        await waits.wait()
    assert seen[-1] == (0, {"no job": 2})
    assert all(one != other for one, other in pairwise(seen)), "only changes are told"


# -- hostile times -----------------------------------------------------------------------------------------------


MIXED = f"mixed-{os.urandom(4).hex()}-"
"""Nobody else's on this machine: it is searched for what was left behind."""


def mixed(number: int, chance: random.Random, directory: Path) -> JobDescription:
    """Jobs of all kinds: short, long, failing, stubborn, with inputs, without, too large."""
    words: dict[str, Any] = chance.choice(
        [
            {},
            {"executable": "/bin/false"},
            {"executable": "/nowhere"},
            {"executable": "/bin/sleep", "arguments": "0.05"},
            {"executable": "/bin/sleep", "arguments": "0.2", "number_of_processors": 2},
            {"executable": "/bin/sleep", "arguments": "60", "number_of_processors": 3},
            sh("trap '' TERM; sleep 60 & wait"),
            sh("exit 222"),
            {"input_data": [str(directory / "input")], **sh("cat input > output"), "output_data": ["output"]},
            {"input_data": [str(directory / "missing")]},
            {"number_of_processors": 99},
            {"disk_bytes": 400},
            {"disk_bytes": 5000},
        ]
    )
    return job(
        f"{MIXED}{number}", priority=chance.randrange(3), limits={"grace_seconds": 0.1, "wall_seconds": 2},
        output_se=[str(directory / f"out{number}")], output_sandbox=["std.out"], **words,
    )  # fmt: skip


@pytest.mark.parametrize("ending", ["kill", "drain", "cancel", "cancel the drain"])
@pytest.mark.parametrize("journalled", [False, True])
@pytest.mark.parametrize("count", [60, pytest.param(500, marks=(pytest.mark.long, pytest.mark.timeout(300)))])
async def test_nothing_is_left_behind_and_every_job_has_one_result(
    make_node: MakeNode, tmp_path: Path, root: Path, ending: str, count: int, journalled: bool
) -> None:
    chance = random.Random(f"{ending}{count}")
    (tmp_path / "input").write_text("cargo")
    handles: list[JobHandle] = []
    book = tmp_path / "journal" if journalled else None
    with anyio.CancelScope() as host:
        async with make_node(ledger=Ledger(4, disk_bytes=1000), journal=book) as node:
            stream = node.events()

            handles += [node.submit(mixed(number, chance, tmp_path)) for number in range(count)]
            for handle in chance.sample(handles, count if ending == "kill" else count // 3):
                await anyio.sleep(chance.random() * 0.04)
                handle.kill("at random")
            if ending == "drain":
                await node.drain(deadline_seconds=0.2)
            elif ending == "cancel the drain":
                async with anyio.create_task_group() as group:
                    group.start_soon(node.drain)
                    await anyio.sleep(chance.random() * 0.2)
                    host.cancel()
            elif ending == "cancel":
                host.cancel()
    finished = [event.job_id async for event in stream if isinstance(event, JobFinished)]
    assert len(finished) == len(set(finished))
    with_result = {handle.job_id for handle in handles if handle.result}
    assert set(finished) == with_result
    assert len(with_result) == count or ending.startswith("cancel")
    figures = node.statistics()
    assert sum(figures.ended.values()) + figures.interrupted == count
    assert repr(node.ledger) == "<Ledger [4 of 4 cores free, 0 waiting]>"
    assert node.ledger.free_disk_bytes == 1000
    assert sum(figures.jobs.values()) == 0
    assert processes_of(*(f"{MIXED}{number}" for number in range(count))) == []
    if book is not None:
        await successor_ends_all(make_node, book, with_result, count)
    assert list(root.iterdir()) == []
    assert [path for out in tmp_path.glob("out*") for path in out.rglob(".*")] == []


async def successor_ends_all(make_node: MakeNode, book: Path, ended: set[str | None], count: int) -> None:
    """Those that were interrupted; none of the others, and none twice."""
    async with make_node(ledger=Ledger(4, disk_bytes=1000), journal=book) as node:
        stream = node.events()
        resumed = {str(handle.job_id) for handle in node.resumed}
        assert resumed.isdisjoint(ended)
        node.kill_all("enough")
    finished = [event.job_id async for event in stream if isinstance(event, JobFinished)]
    assert sorted(finished) == sorted(resumed)
    assert processes_of(*(f"{MIXED}{number}" for number in range(count))) == []
    async with open_journal(book) as journal:
        assert await journal.open_jobs() == []
        assert sum((await journal.ended()).values()) == len(resumed | ended)
    assert list((book / "payloads").iterdir()) == []

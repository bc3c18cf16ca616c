"""A node, and a single job, that go on where an agent left them. What SIGKILL does is in faults/test_killed_agent.py."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from conftest import sh, until
from following import Signpost, happens, kinds
from loadmaster import (
    JobDescription,
    JobExecutionCoordinator,
    JobHandle,
    JobResult,
    Ledger,
    Node,
    Site,
    Status,
    run_job,
)
from loadmaster.errors import JournalFault, PayloadLost, RescheduleJob
from loadmaster.events import (
    ComputingEnded,
    Event,
    JobAccepted,
    JobFinished,
    KillOrdered,
    PayloadExited,
    PayloadStarted,
    StageOutStarted,
)
from loadmaster.handle import Write
from loadmaster.journal import NodeJournal, open_journal
from loadmaster.lifecycle import Lifecycle, Stage
from loadmaster.logbook import Logbook, Record
from loadmaster.recovery import MOST_RERUNS
from loadmaster.result import EndedBy, Failure, Phase
from loadmaster.sources import Iterated


def job(job_id: str = "7", **words: Any) -> JobDescription:
    return JobDescription(job_id=job_id, **{"executable": "/bin/true", **words})


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """Where the journal is."""
    return tmp_path / "journal"


@pytest.fixture
def make_node(root: Path, out: Path, book: Path) -> Callable[..., Node]:
    def make_node(cores: int = 1, **words: Any) -> Node:
        words = {"ledger": Ledger(cores), "site": Site(output_directory=str(out)), "journal": book, **words}
        return Node(root=root, **words)

    return make_node


MakeNode = Callable[..., Node]


async def left(node: Node, use: Callable[[Node], Any]) -> None:
    """Use a node, and have its host leave it."""
    with anyio.CancelScope() as host:
        async with node:
            await use(node)
            host.cancel()
            await anyio.sleep_forever()


async def lives(book: Path, job_id: str) -> list[Sequence[Event]]:
    """The histories of all attempts at a job."""
    found: list[Sequence[Event]] = []
    async with open_journal(book) as journal:
        while (history := await journal.history(job_id, len(found) + 1)) is not None:
            found.append(history.events)
    return found


class Recalls(JobExecutionCoordinator):
    """Notes which hooks were called, for all of its kind."""

    calls: list[str] = []  # noqa: RUF012 - of the class, as a restart would not be

    async def stageIn(self) -> None:
        self.calls.append("stageIn")
        await super().stageIn()
        await self.job.remember("cargo", {"tons": 3})

    async def preProcess(self, command: str, exeEnv: dict[str, str]) -> Any:
        self.calls.append("preProcess")
        return await super().preProcess(command, exeEnv)

    async def postProcess(self) -> None:
        self.calls.append("postProcess")
        await self.job.report("cargo", self.job.memory["cargo"]["tons"])

    async def stageOut(self) -> None:
        self.calls.append("stageOut")
        await super().stageOut()


@pytest.fixture
def calls() -> list[str]:
    Recalls.calls.clear()
    return Recalls.calls


# -- one job -----------------------------------------------------------------------------------------------------


async def test_a_job_that_has_ended_is_not_run_again(root: Path, out: Path, book: Path) -> None:
    words: dict[str, Any] = {"site": Site(output_directory=str(out)), "root": root}
    described = job(**sh("echo x >> count; cat count"), output_sandbox=["std.out"])
    async with open_journal(book) as journal:
        first = await run_job(described, journal=journal, **words)
    async with open_journal(book) as journal:
        assert await run_job(described, journal=journal, **words) == first
        again = await run_job(described, journal=journal, attempt=2, **words)
    assert (first.status, again.status, again.attempt) == (Status.DONE, Status.DONE, 2)
    assert len(await lives(book, "7")) == 2


async def test_a_handle_and_a_journal_are_one_too_many(book: Path) -> None:
    async with open_journal(book) as journal:
        with pytest.raises(TypeError, match="not both"):
            await run_job(job(), journal=journal, handle=JobHandle())


class Breaks(NodeJournal):
    """A journal that takes so many events and then no more: whatever comes after has not happened, for the next agent."""

    def __init__(self, journal: NodeJournal, after: int) -> None:
        super().__init__(journal._book)
        self.journal, self.left, self._scribe = journal, after, journal._scribe

    def write_soon(self, events: Sequence[Event], told: Callable[[Exception | None], None]) -> Write:
        self.left -= len(events)
        if self.left < 0:
            return self.journal.write_soon((), lambda _: told(JournalFault(f"did not take {events[0].kind}")))
        return self.journal.write_soon(events, told)


def straight(tmp_path: Path) -> JobDescription:
    """A job with everything: 14 events."""
    (tmp_path / "input").write_text("cargo")
    return job(
        **sh("cat input > copy; echo hello"),
        input_data=[str(tmp_path / "input")],
        output_data=["copy"],
        output_sandbox=["std.out"],
    )


@pytest.mark.parametrize("after", range(1, 14))
async def test_wherever_the_journal_ends_the_job_goes_on_to_the_same_end(
    root: Path, out: Path, book: Path, tmp_path: Path, calls: list[str], after: int
) -> None:
    """No hook that had returned is called again, and nothing is brought or sent twice."""
    words: dict[str, Any] = {"site": Site(output_directory=str(out)), "root": root, "coordinator": Recalls}
    described = straight(tmp_path)
    async with open_journal(book) as journal:
        with pytest.raises(JournalFault, match="did not take"):
            await run_job(described, journal=Breaks(journal, after), **words)
    had = Lifecycle.of((await lives(book, "7"))[0])
    before, attempt = list(calls), 1
    calls.clear()
    async with open_journal(book) as journal:
        result = await run_job(described, journal=journal, **words)
        if result.status is Status.RESCHEDULED:  # the payload was ended with its agent: that attempt is over
            assert had.stage in {Stage.GRANTED, Stage.RUNNING}
            attempt, result = 2, await run_job(described, journal=journal, attempt=2, **words)
    assert result.status is Status.DONE, result.failure
    assert result.parameters == {"cargo": "3"}
    assert (out / "copy").read_text() == "cargo"
    assert (out / "std.out").read_text() == "hello\n"
    life = (await lives(book, "7"))[attempt - 1]
    names = kinds(life)
    for kind in ("FileStagedIn", "StageInEnded", "PayloadPrepared", "PayloadStarted", "ComputingEnded", "JobFinished"):
        assert names.count(kind) == 1
    assert names.count("FileStagedOut") == 2
    if attempt == 1:
        done = {"stageIn": Stage.STAGED_IN, "preProcess": Stage.PREPARED, "postProcess": Stage.COMPUTED}
        for hook, stage in done.items():
            assert (hook in calls) is not had.has_reached(stage), (had.stage, before, calls)


class Looks(Recalls):
    """Notes what of the job is on disk whenever a hook is called."""

    seen: dict[str, str] = {}  # noqa: RUF012 - as above
    book = Path()

    def __getattribute__(self, name: str) -> Any:
        if name in {"stageIn", "preProcess", "postProcess", "stageOut"}:
            return partial(self.look, name)
        return super().__getattribute__(name)

    async def look(self, name: str, *args: Any) -> Any:
        def last() -> str:
            with Logbook.look(self.book) as book:
                history = book.history(self.jobArgs.job_id)
                return history.events[-1].kind if history is not None else ""

        self.seen[name] = await anyio.to_thread.run_sync(last)
        return await getattr(Recalls, name)(self, *args)


async def test_what_came_before_a_hook_of_a_community_is_on_disk_when_it_is_called(
    root: Path, out: Path, book: Path, tmp_path: Path
) -> None:
    Looks.book = book
    async with open_journal(book) as journal:
        await run_job(
            straight(tmp_path), journal=journal, site=Site(output_directory=str(out)), root=root, coordinator=Looks
        )
    assert Looks.seen == {
        "stageIn": "StageInStarted",
        "preProcess": "StageInEnded",
        "postProcess": "PayloadExited",
        "stageOut": "StageOutStarted",
    }


class Counts(Logbook):
    """How many events it was given at once, and what runs then."""

    def add(self, groups: Sequence[Sequence[Record]]) -> list[Exception | None]:
        self.writes.append([record.kind for group in groups for record in group])
        return super().add(groups)

    writes: list[list[str]]


async def test_a_job_waits_for_the_disk_before_it_begins_before_its_payload_does_and_at_its_end(
    root: Path, out: Path, book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadmaster.journal.LATE_SECONDS", 60)
    opened = await anyio.to_thread.run_sync(Counts.open, book)
    assert isinstance(opened, Counts)
    opened.writes = []
    journal = NodeJournal(opened)
    async with journal.kept():
        await run_job(job(), journal=journal, site=Site(output_directory=str(out)), root=root)
    assert opened.writes == [
        ["JobAccepted"],
        ["StageInStarted", "StageInEnded", "PayloadPrepared", "SlotGranted"],
        ["PayloadStarted", "PayloadExited", "ComputingEnded", "StageOutStarted", "JobFinished"],
    ]


async def test_a_directory_that_is_packed_is_packed_again_by_the_next_agent(root: Path, out: Path, book: Path) -> None:
    words: dict[str, Any] = {"site": Site(output_directory=str(out)), "root": root}
    described = job(**sh("mkdir logs; echo a > logs/a"), output_sandbox=["logs", "std.out"])
    async with open_journal(book) as journal:
        with pytest.raises(JournalFault, match="did not take FileStagedOut"):
            await run_job(described, journal=Breaks(journal, 9), **words)
    async with open_journal(book) as journal:
        result = await run_job(described, journal=journal, **words)
    assert result.status is Status.DONE, result.failure
    assert {file.name for file in result.outputs} == {"logs.tar", "std.out"}


async def test_what_is_gone_from_the_work_directory_is_brought_again(
    root: Path, out: Path, book: Path, tmp_path: Path
) -> None:
    words: dict[str, Any] = {"site": Site(output_directory=str(out)), "root": root}
    described = straight(tmp_path)
    async with open_journal(book) as journal:
        with pytest.raises(JournalFault, match="did not take StageInEnded"):
            await run_job(described, journal=Breaks(journal, 3), **words)
    (root / "7" / "input").unlink()
    async with open_journal(book) as journal:
        assert (await run_job(described, journal=journal, **words)).status is Status.DONE
    assert kinds((await lives(book, "7"))[0]).count("FileStagedIn") == 2


@pytest.mark.parametrize("after", [4, 5, 9, 10, 11])
async def test_a_work_directory_that_is_gone_is_the_end_of_the_attempt(
    root: Path, out: Path, book: Path, tmp_path: Path, after: int
) -> None:
    words: dict[str, Any] = {"site": Site(output_directory=str(out)), "root": root}
    described = straight(tmp_path)
    async with open_journal(book) as journal:
        with pytest.raises(JournalFault, match="did not take"):
            await run_job(described, journal=Breaks(journal, after), **words)
    shutil.rmtree(root / "7")
    async with open_journal(book) as journal:
        result = await run_job(described, journal=journal, **words)
    assert result.status is Status.RESCHEDULED
    assert result.failure is not None
    assert (result.failure.kind, result.missing_outputs) == ("PayloadLost", result.missing_outputs)
    with pytest.raises(PayloadLost, match=r"work directory .*/7 is gone"):
        result.raise_for_status()


async def test_a_work_directory_that_is_gone_before_anything_was_made_of_it_is_made_again(
    root: Path, out: Path, book: Path, tmp_path: Path
) -> None:
    words: dict[str, Any] = {"site": Site(output_directory=str(out)), "root": root}
    described = straight(tmp_path)
    async with open_journal(book) as journal:
        with pytest.raises(JournalFault, match="did not take"):
            await run_job(described, journal=Breaks(journal, 3), **words)
    shutil.rmtree(root / "7")
    async with open_journal(book) as journal:
        assert (await run_job(described, journal=journal, **words)).status is Status.DONE
    assert kinds((await lives(book, "7"))[0]).count("StageInStarted") == 2


class Leaves(Recalls):
    """Its host leaves in the instant in which one of its hooks returns."""

    host: anyio.CancelScope
    hook = ""
    swallows = False

    def __getattribute__(self, name: str) -> Any:
        if name == type(self).hook:
            return partial(self.leave, name)
        return super().__getattribute__(name)

    async def leave(self, name: str, *args: Any) -> Any:
        if not self.swallows:
            returned = await getattr(Recalls, name)(self, *args)
            self.host.cancel()
            return returned
        self.calls.append(name)
        self.host.cancel()
        with suppress(BaseException):
            await anyio.sleep_forever()
        return None


HOOKS = ["stageIn", "preProcess", "postProcess", "stageOut"]


@pytest.mark.parametrize("swallows", [False, True], ids=["had returned", "had not"])
@pytest.mark.parametrize("hook", HOOKS)
async def test_a_hook_that_had_returned_when_its_host_left_is_not_called_again_and_one_that_only_seems_to_have_is(
    root: Path, out: Path, book: Path, tmp_path: Path, calls: list[str], hook: str, swallows: bool
) -> None:
    """Of a hook that swallows its cancellation nobody knows what it has done; it counted as returned, and the others as
    not."""
    words: dict[str, Any] = {"site": Site(output_directory=str(out)), "root": root}
    described = straight(tmp_path)
    with anyio.CancelScope() as host:
        Leaves.host, Leaves.hook, Leaves.swallows = host, hook, swallows
        async with open_journal(book) as journal:
            await run_job(described, journal=journal, coordinator=Leaves, **words)
            await anyio.sleep_forever()
    assert host.cancelled_caught
    assert calls == HOOKS[: HOOKS.index(hook) + 1]
    calls.clear()
    async with open_journal(book) as journal:
        result = await run_job(described, journal=journal, coordinator=Recalls, **words)
    assert result.status is Status.DONE, result.failure
    assert calls == HOOKS[HOOKS.index(hook) + (not swallows) :]


async def test_a_verdict_that_a_hook_had_given_when_its_host_left_is_kept(root: Path, out: Path, book: Path) -> None:
    class Gives(JobExecutionCoordinator):
        async def postProcess(self) -> None:
            host.cancel()
            raise RescheduleJob("conditions database unreachable")

    words: dict[str, Any] = {"site": Site(output_directory=str(out)), "root": root}
    with anyio.CancelScope() as host:
        async with open_journal(book) as journal:
            await run_job(job(), journal=journal, coordinator=Gives, **words)
    assert kinds((await lives(book, "7"))[0])[-1] == "ComputingEnded"
    async with open_journal(book) as journal:
        result = await run_job(job(), journal=journal, **words)
    assert str(result.failure) == "RescheduleJob: conditions database unreachable"


async def test_a_cancelled_job_is_gone_on_with_from_where_it_stood(root: Path, out: Path, book: Path) -> None:
    words: dict[str, Any] = {"site": Site(output_directory=str(out)), "root": root}
    described = job(**sh("sleep 60"), output_sandbox=["std.out"])
    with anyio.CancelScope() as host:
        async with open_journal(book) as journal:
            handle = JobHandle(journal)

            async def leave() -> None:
                await happens(PayloadStarted)(handle)
                host.cancel()

            async with anyio.create_task_group() as group:
                group.start_soon(leave)
                await run_job(described, handle=handle, **words)
    (life,) = await lives(book, "7")
    assert isinstance(life[-1], PayloadExited)
    assert life[-1].outcome.ended_by is EndedBy.CANCELLATION
    async with open_journal(book) as journal:
        result = await run_job(described, journal=journal, **words)
    assert str(result.failure) == "PayloadLost: the agent left while the payload ran, and ended it"
    assert result.status is Status.RESCHEDULED


# -- a node ------------------------------------------------------------------------------------------------------


async def test_a_job_is_in_the_journal_before_it_waits(make_node: MakeNode, book: Path, tmp_path: Path) -> None:
    post = Signpost(tmp_path / "post")

    async def use(node: Node) -> None:
        await happens(PayloadStarted)(node.submit(job("first", **sh(f"echo go > {post}"))))
        for number in range(20):
            node.submit(job(f"j{number}"))
        await until(lambda: node.statistics().jobs["waiting"] == 20 - 2)

    await left(make_node(1), use)
    async with open_journal(book) as journal:
        assert len(await journal.open_jobs()) == 21
    async with make_node(3, lost="reschedule") as node:
        assert len(node.resumed) == 21


async def test_a_node_goes_on_with_what_was_left_before_anything_else(
    make_node: MakeNode, book: Path, tmp_path: Path
) -> None:
    async def use(node: Node) -> None:
        for number in range(5):
            handle = node.submit(job(f"j{number}", **sh("sleep 60" if number == 0 else "true")))
            await happens(PayloadStarted if number == 0 else JobAccepted)(handle)

    await left(make_node(1, lost="reschedule"), use)
    async with make_node(1, lost="reschedule") as node:
        assert [handle.job_id for handle in node.resumed] == [f"j{number}" for number in range(5)]
        results = [await handle.wait() for handle in node.resumed]
    assert [result.status for result in results] == [Status.RESCHEDULED, *[Status.DONE] * 4]
    async with make_node(1) as node:
        assert node.resumed == ()


async def test_a_job_that_is_submitted_again_is_answered_from_the_journal(
    make_node: MakeNode, tmp_path: Path, out: Path
) -> None:
    described = job(**sh(f"echo x >> {tmp_path}/count"))
    async with make_node() as node:
        handle = node.submit(described)
        assert node.submit(described) is handle
        first = await handle.wait()
    async with make_node() as node:
        handle = node.submit(described)
        assert await handle.wait() == first
        assert kinds([event async for event in handle.events()])[-1] == "JobFinished"
        assert (await node.submit(job("8")).wait()).status is Status.DONE
        assert (await node.submit(described, attempt=2).wait()).attempt == 2
        assert node.statistics().ended["Done"] == 2
    assert (tmp_path / "count").read_text() == "x\nx\n"


async def test_what_is_lost_is_run_again_as_the_next_attempt(make_node: MakeNode, book: Path, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    described = job(**sh(f"test -e {flag} || sleep 60; echo done"))

    async def use(node: Node) -> None:
        await happens(PayloadStarted)(node.submit(described))

    await left(make_node(), use)
    flag.touch()
    async with make_node() as node:
        (first,) = node.resumed
        assert (await first.wait()).status is Status.RESCHEDULED
        second = node.handle("7")
        assert second is not None
        result = await second.wait()
        assert (result.status, result.attempt) == (Status.DONE, 2)
        assert node.handle("7") is None
    one, two = await lives(book, "7")
    assert isinstance(one[-1], JobFinished)
    assert isinstance(two[0], JobAccepted)
    assert two[0].lost == 1


async def test_a_job_that_is_lost_again_and_again_is_left_to_others(make_node: MakeNode, book: Path) -> None:
    async def use(node: Node) -> None:
        handle = node.handle("7") or node.submit(job(**sh("sleep 60")))
        while True:
            await happens(PayloadStarted)(handle)
            if handle.stage is Stage.RUNNING:
                return
            await handle.wait()
            if (following := node.handle("7")) is None:
                return
            handle = following

    for _ in range(MOST_RERUNS + 2):
        await left(make_node(), use)
    histories = await lives(book, "7")
    assert len(histories) >= MOST_RERUNS + 1
    assert Lifecycle.of(histories[MOST_RERUNS]).result().status is Status.RESCHEDULED


async def test_an_order_to_end_is_obeyed_after_a_restart_by_whom_it_was_for(
    make_node: MakeNode, book: Path, out: Path
) -> None:
    """Only the order is in the journal: the agent died over it."""
    now = datetime.now(UTC)
    async with open_journal(book) as journal:
        for event in (
            JobAccepted("7", 1, now, {"executable": "/bin/true", "output_sandbox": ["std.out"]}),
            KillOrdered("7", 1, now, "unwanted"),
        ):
            await journal.append(event)
    async with make_node() as node:
        (handle,) = node.resumed
        result = await handle.wait()
    assert str(result.failure) == "JobWasKilled: unwanted"
    assert kinds((await lives(book, "7"))[0])[:3] == ["JobAccepted", "KillOrdered", "ComputingEnded"]


async def test_a_payload_that_may_run_is_not_given_back(make_node: MakeNode, book: Path) -> None:
    """Its agent is told to drain while it comes back: the job has a slot, so it is seen to its end."""

    async def use(node: Node) -> None:
        await happens(PayloadStarted)(node.submit(job(**sh("sleep 60"))))

    await left(make_node(lost="reschedule"), use)
    async with make_node(lost="reschedule") as node:
        (handle,) = node.resumed
        await node.drain()
        result = await handle.wait()
    assert result.failure is not None
    assert result.failure.kind == "PayloadLost"


async def test_a_drained_node_gives_back_what_it_has_only_recorded(make_node: MakeNode) -> None:
    async with make_node() as node:
        handles = [node.submit(job(f"j{number}")) for number in range(30)]
        await node.drain()
        results = [await handle.wait() for handle in handles]
    assert {result.status for result in results} <= {Status.RESCHEDULED, Status.DONE}
    assert Status.RESCHEDULED in {result.status for result in results}


async def test_a_source_is_told_once_the_journal_has_the_job_and_its_jobs_are_not_run_again(
    make_node: MakeNode, book: Path, tmp_path: Path
) -> None:
    async def jobs() -> AsyncIterator[JobDescription]:
        for number in range(6):
            yield job(f"j{number}", **sh(f"echo {number} >> {tmp_path}/count"))

    class Told(Iterated):
        async def accepted(self, job: JobDescription) -> None:
            history = await anyio.to_thread.run_sync(known, book, job.job_id)
            assert history

    ended: list[str] = []

    async def note(job: JobDescription, result: JobResult) -> None:
        ended.append(f"{job.job_id} {result.status} {result.attempt}")

    for _ in range(2):
        async with make_node(2) as node:
            await node.serve(Told(jobs()), ended=note)
    assert sorted(ended) == sorted(2 * [f"j{number} Done 1" for number in range(6)])
    assert sorted((tmp_path / "count").read_text().split()) == list("012345")


def known(book: Path, job_id: str) -> bool:
    from loadmaster.logbook import Logbook

    with Logbook.look(book) as found:
        return found.history(job_id) is not None


async def test_a_job_of_a_source_that_was_given_back_begins_its_next_attempt(make_node: MakeNode, book: Path) -> None:
    now = datetime.now(UTC)
    failure = Failure.of(RescheduleJob("given back"), Phase.STAGE_IN)
    async with open_journal(book) as journal:
        await journal.append_all(
            [
                JobAccepted("7", 1, now, {"executable": "/bin/true"}),
                ComputingEnded("7", 1, now, failure),
                JobFinished("7", 1, now, Status.RESCHEDULED, failure),
            ]
        )

    async def jobs() -> AsyncIterator[JobDescription]:
        yield job()

    ended: list[int] = []

    async def note(job: JobDescription, result: JobResult) -> None:
        ended.append(result.attempt)

    async with make_node() as node:
        await node.serve(Iterated(jobs()), ended=note)
    assert ended == [2]


async def test_what_a_finished_job_left_on_disk_is_removed(make_node: MakeNode, book: Path, root: Path) -> None:
    """The agent died between the last record and the last `rmdir`; what is not this journal's stays."""
    async with make_node() as node:
        await node.submit(job()).wait()
    for name in ("7", "stranger"):
        (root / name).mkdir(mode=0o1700)
        (root / name / "file").touch()
    (book / "payloads" / "1.7").mkdir()
    (book / "payloads" / "1.7" / "exit").touch()
    async with make_node():
        assert not (root / "7").exists()
        assert (root / "stranger" / "file").exists()
        assert list((book / "payloads").iterdir()) == []
    shutil.rmtree(root / "stranger")


async def test_two_nodes_do_not_share_a_journal(make_node: MakeNode, book: Path) -> None:
    async with make_node():
        with pytest.raises(JournalFault, match="in use by process"):
            async with make_node():
                pass


async def test_a_history_that_makes_no_sense_stops_nobody_else(
    make_node: MakeNode, book: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = datetime.now(UTC)
    async with open_journal(book) as journal:
        await journal.append_all([JobAccepted("bad", 1, now, {}), StageOutStarted("bad", 1, now)])
        await journal.append(JobAccepted("good", 1, now, {"executable": "/bin/true"}))
    async with make_node() as node:
        assert [handle.job_id for handle in node.resumed] == ["good"]
        assert (await node.resumed[0].wait()).status is Status.DONE
    assert "job bad, attempt 1: cannot be gone on with" in caplog.text


class Other(Recalls):
    """Of one job only."""


async def test_a_job_has_its_own_coordinator_again(make_node: MakeNode, calls: list[str]) -> None:
    async def use(node: Node) -> None:
        handle = node.submit(job(**sh("sleep 60")), coordinator=Other)
        await happens(PayloadStarted)(handle)

    await left(make_node(), use)
    assert calls == ["stageIn", "preProcess"]
    calls.clear()
    async with make_node() as node:
        await node.resumed[0].wait()
        second = node.handle("7")
        assert second is not None
        await happens(PayloadStarted)(second)
        second.kill("enough")
    assert calls == ["stageOut", "stageIn", "preProcess", "stageOut"]


async def test_a_job_whose_coordinator_is_gone_is_rescheduled(make_node: MakeNode, book: Path) -> None:
    async with open_journal(book) as journal:
        await journal.append(
            JobAccepted("7", 1, datetime.now(UTC), {"executable": "/bin/true"}, coordinator="nowhere.at_all:Gone")
        )
    async with make_node() as node:
        result = await node.resumed[0].wait()
    assert result.status is Status.RESCHEDULED
    assert result.failure is not None
    assert "its coordinator is not here any more: coordinator nowhere.at_all:Gone" in result.failure.message


async def test_a_payload_that_another_agent_has_is_left_to_it(
    make_node: MakeNode, book: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two agents cannot have one journal, but somebody may have copied it. The job stays open, and the node goes on."""
    async with make_node() as node:
        handle = node.submit(job(**sh("read line < ../../post")))
        (root.parent / "post").unlink(missing_ok=True)
        post = Signpost(root.parent / "post")
        await happens(PayloadStarted)(handle)
        other = root.parent / "copy"
        await anyio.to_thread.run_sync(copied, book, other)
        async with make_node(journal=other) as second:
            (copy,) = second.resumed
            await until(lambda: second.handle("7") is None)
            assert copy.stage is Stage.RUNNING
            assert (await second.submit(job("8")).wait()).status is Status.DONE
        assert "job 7: is left open in the journal" in caplog.text
        await anyio.to_thread.run_sync(post.path.write_text, "go\n")
        assert (await handle.wait()).status is Status.DONE


def copied(book: Path, other: Path) -> None:
    """A copy of the journal, as a careless administrator makes it."""
    other.mkdir()
    for path in book.glob("journal.*"):
        shutil.copy(path, other)
    (other / "payloads").symlink_to(book / "payloads")

"""Cancelling `run_job` at every await: nothing is left, nothing is claimed that is not so.

A job with all there is to a job runs again and again; the first time it is cancelled when a task of its is about to
wait for the first time, then the second time, and so on until it ends before anybody cancels it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import select
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import trio
from anyio import lowlevel, to_thread

from conftest import BACKENDS, Fly, sh
from following import Signpost, history, kinds, processes_of
from loadmaster import JobDescription, JobExecutionCoordinator, JobHandle, Ledger, PayloadSpec, Site, Status, run_job
from loadmaster.events import FileStagedOut, PayloadExited
from loadmaster.lifecycle import Lifecycle, Stage
from loadmaster.result import EndedBy
from loadmaster.testing import MemoryJournal

LARGE_BYTES = 1_100_000
"""More than one block of a copy, so that there are awaits in the middle of one."""

FEWEST_AWAITS = 60
"""Fewer than this would mean that the sweep does not see the tasks of the job."""


# -- doing something when a task is about to wait for the n-th time -----------------------------------------------


class Countdown:
    """Calls an action once, when so many steps have been taken."""

    def __init__(self, steps: int, action: Callable[[], object]) -> None:
        self.left = steps
        self.action = action

    def step(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.action()

    @property
    def reached(self) -> bool:
        return self.left <= 0


class Stepwise:
    """Awaits something and counts how often it waits."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], countdown: Countdown) -> None:
        self.steps = coroutine.__await__()
        self.countdown = countdown

    def __await__(self) -> Generator[Any, Any, Any]:
        step: Callable[[Any], Any] = self.steps.send
        sent: Any = None
        while True:
            try:
                waiting_for = step(sent)
            except StopIteration as stop:
                return stop.value
            self.countdown.step()
            try:
                step, sent = self.steps.send, (yield waiting_for)
            except BaseException as exc:
                step, sent = self.steps.throw, exc


class Watcher(trio.abc.Instrument):
    """Counts the steps of every task below one."""

    def __init__(self, top: trio.lowlevel.Task, countdown: Countdown) -> None:
        self.top = top
        self.countdown = countdown

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        above: trio.lowlevel.Task | None = task
        while above is not None and above is not self.top:
            above = above.parent_nursery.parent_task if above.parent_nursery is not None else None
        if above is not None:
            self.countdown.step()


@contextmanager
def counting(countdown: Countdown) -> Iterator[None]:
    """Count the steps of every task that is started in the block (asyncio), or below the current one (trio)."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        watcher = Watcher(trio.lowlevel.current_task(), countdown)
        trio.lowlevel.add_instrument(watcher)
        try:
            yield
        finally:
            trio.lowlevel.remove_instrument(watcher)
        return

    async def counted(coroutine: Coroutine[Any, Any, Any]) -> Any:
        return await Stepwise(coroutine, countdown)

    def factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        return asyncio.Task(counted(coroutine), loop=loop, **options)

    loop.set_task_factory(factory)
    try:
        yield
    finally:
        loop.set_task_factory(None)


# -- a job with all there is to a job ------------------------------------------------------------------------------


class Busy(JobExecutionCoordinator):
    """Waits a little everywhere, and has a task beside the payload without which that does not end."""

    async def preProcess(self, command: str, exeEnv: dict[str, str]) -> PayloadSpec:
        await to_thread.run_sync(os.mkfifo, self.job.workdir / "go")
        self.job.start_soon(self.let_it_go)
        return PayloadSpec(command=command, env=exeEnv)

    async def let_it_go(self) -> None:
        go = await to_thread.run_sync(os.open, self.job.workdir / "go", os.O_RDWR | os.O_CLOEXEC)
        try:
            await self.job.report("companion", "here")
            await lowlevel.checkpoint()
            os.set_blocking(go, False)
            await to_thread.run_sync(os.write, go, b"go\n")
            await anyio.sleep_forever()
        finally:
            os.close(go)

    async def postProcess(self) -> None:
        await lowlevel.checkpoint()
        await self.job.report("postProcess", "called")


SCRIPT = "sleep 600 & (setsid sleep 0 &); echo begun; read line < go; cat one two > small; cat two > large; echo done"


class Attempt:
    """One run of the job, and what has to hold after it, whenever it was cancelled."""

    def __init__(self, number: int, place: Path) -> None:
        self.job_id = f"sweep-{os.getpid()}-{number}"
        self.root = place / "root"
        self.out = place / f"out-{number}"
        self.journal = MemoryJournal()
        self.handle = JobHandle(self.journal)
        self.ledger = Ledger(cores=1)
        inputs = place / "inputs"
        inputs.mkdir(parents=True, exist_ok=True)
        self.inputs = {"one": b"1", "two": b"2" * LARGE_BYTES}
        for name, content in self.inputs.items():
            (inputs / name).write_bytes(content)
        self.job = JobDescription(
            job_id=self.job_id, **sh(SCRIPT),
            input_data=[str(inputs / "two")], input_sandbox=[str(inputs / "one")],
            output_data=["small", "large"], output_sandbox=["std.out"],
        )  # fmt: skip

    async def run(self) -> None:
        await run_job(
            self.job, site=Site(output_directory=str(self.out)), root=self.root, coordinator=Busy,
            handle=self.handle, slots=self.ledger,
        )  # fmt: skip

    def check(self) -> None:
        """What holds when `run` is over, whatever ended it."""
        assert gone(processes_of(self.job_id)), "a process is left"
        assert list(self.root.glob("*")) == [], "a work directory is left"
        assert repr(self.ledger) == "<Ledger [1 of 1 cores free, 0 waiting]>"
        whole = {"std.out": b"begun\ndone\n", "small": b"1" + self.inputs["two"], "large": self.inputs["two"]}
        found = {path.name: path.read_bytes() for path in self.out.glob("*")}
        life = Lifecycle.of(self.journal.events)
        if life.outcome is not None and not life.outcome.succeeded:
            del whole["small"], whole["large"]
            said = found.get("std.out", b"")  # it may have said all it had to say when it was ended
            whole["std.out"] = said if said in {b"", b"begun\n", b"begun\ndone\n"} else b""
        assert found.items() <= whole.items(), "half an output is left"
        told = kinds(self.journal.events)
        assert told.count("PayloadStarted") == told.count("PayloadExited")
        staged = {event.file.name for event in self.journal.events if isinstance(event, FileStagedOut)}
        assert staged <= found.keys(), "an output was claimed that is not there"
        if life.stage is Stage.FINISHED and life.result().status is Status.DONE:
            assert found == whole


def gone(pids: list[int]) -> bool:
    """Whether processes that have been killed are gone within seconds; the kernel takes a moment."""
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not select.select([descriptor], [], [], 5)[0]:
                return False
        finally:
            os.close(descriptor)
    return True


ToCancel = Callable[[Callable[[], object]], Countdown]
"""Makes the countdown that calls a function at the await whose turn it is."""


async def sweep(place: Path, run: Callable[[Attempt, ToCancel], Awaitable[None]]) -> None:
    """At every await there is. What runs side by side awaits in no certain order, so that a stage with a single await may be
    passed over by one in a hundred sweeps: then once more."""
    stages: set[Stage] = set()
    for number in range(3):
        await sweep_once(place / str(number), run, stages)
        if stages == set(Stage):
            break
    # Between the end of computing and the beginning of the delivery there may be no await at all.
    assert stages >= set(Stage) - {Stage.COMPUTED}, f"never cancelled while {set(Stage) - stages}"


async def sweep_once(place: Path, run: Callable[[Attempt, ToCancel], Awaitable[None]], stages: set[Stage]) -> None:
    """Run attempts, one for each await there is, until one ends before its turn has come."""
    for step in itertools.count(1):
        attempt = Attempt(step, place)
        countdowns: list[Countdown] = []

        def to_cancel(cancel: Callable[[], object], attempt: Attempt = attempt, step: int = step) -> Countdown:
            def action() -> None:
                stages.add(attempt.handle.stage)
                cancel()

            countdowns.append(Countdown(step, action))  # noqa: B023 - called before the next turn
            return countdowns[0]  # noqa: B023

        await run(attempt, to_cancel)
        await to_thread.run_sync(attempt.check)
        if not countdowns[0].reached:
            break
    result = attempt.handle.result
    assert result is not None
    assert result.status is Status.DONE, result.failure
    assert step > FEWEST_AWAITS
    print(f"{step - 1} awaits")


@pytest.mark.timeout(180)
async def test_cancelling_the_host_scope_at_every_await_of_run_job_leaves_nothing(tmp_path: Path) -> None:
    """No process, no half-made file at a final name, no work directory, no claim of an end that was not reached."""

    async def run(attempt: Attempt, to_cancel: ToCancel) -> None:
        with anyio.CancelScope() as scope, counting(to_cancel(scope.cancel)):
            await attempt.run()
        result = attempt.handle.result
        assert result is None or result.status is Status.DONE

    await sweep(tmp_path, run)


@pytest.mark.parametrize("anyio_backend", BACKENDS[:2])
@pytest.mark.timeout(180)
async def test_cancelling_the_task_natively_at_every_await_of_run_job_leaves_nothing(
    tmp_path: Path, anyio_backend: Any
) -> None:
    """As embedding programs on asyncio do it: `task.cancel()`, which knows nothing of shields."""

    async def run(attempt: Attempt, to_cancel: ToCancel) -> None:
        with counting(to_cancel(lambda: task.cancel())):
            task = asyncio.create_task(attempt.run())
            await asyncio.wait([task])
        result = attempt.handle.result
        assert result is None or result.status is Status.DONE
        assert task.cancelled() or task.exception() is None

    await sweep(tmp_path, run)


@pytest.mark.timeout(180)
async def test_a_kill_at_every_await_of_run_job_ends_it_as_killed_with_its_logs(tmp_path: Path) -> None:
    """Or has come too late, and said so, and changes nothing."""

    async def run(attempt: Attempt, to_cancel: ToCancel) -> None:
        accepted: list[bool] = []
        with counting(to_cancel(lambda: accepted.append(attempt.handle.kill("enough")))):
            await attempt.run()
        result = attempt.handle.result
        assert result is not None
        assert result.status is (Status.KILLED if accepted == [True] else Status.DONE)
        delivered = {file.name for file in result.outputs}
        if result.status is Status.KILLED:
            assert result.failure is not None
            assert result.failure.message == "enough"
            assert delivered == ({"std.out"} if result.outcome is not None else set())

    await sweep(tmp_path, run)


@pytest.mark.timeout(180)
async def test_a_kill_and_a_cancellation_together_leave_nothing(tmp_path: Path) -> None:
    """We are leaving: that the job was also killed does not make it stage out."""

    async def run(attempt: Attempt, to_cancel: ToCancel) -> None:
        with anyio.CancelScope() as scope:

            def both() -> None:
                attempt.handle.kill("enough")
                scope.cancel()

            with counting(to_cancel(both)):
                await attempt.run()
        result = attempt.handle.result
        assert result is None or result.status is Status.DONE

    await sweep(tmp_path, run)


async def test_cancelling_a_job_whose_payload_ignores_term_takes_its_grace_and_no_longer(
    fly: Fly, tmp_path: Path
) -> None:
    post = Signpost(tmp_path / "post")
    handle = JobHandle()

    async def leave() -> None:
        await post.reached()
        tg.cancel_scope.cancel()

    async with anyio.create_task_group() as tg:
        tg.start_soon(leave)
        await fly(
            {"handle": handle},
            **sh(f"trap '' TERM; echo > {post}; while :; do sleep 600; done"),
            limits={"grace_seconds": 0.3}, job_id=(job_id := f"deaf-{os.getpid()}"),
        )  # fmt: skip
    assert await to_thread.run_sync(lambda: gone(processes_of(job_id)))
    (exited,) = [event for event in await history(handle) if isinstance(event, PayloadExited)]
    assert (exited.outcome.signal, exited.outcome.ended_by) == (9, EndedBy.CANCELLATION)
    assert 0.3 <= exited.outcome.wall_seconds < 10
    assert handle.result is None


async def test_a_payload_that_winds_down_on_term_is_given_the_time(fly: Fly, tmp_path: Path) -> None:
    post = Signpost(tmp_path / "post")
    handle = JobHandle()

    async def leave() -> None:
        await post.reached()
        tg.cancel_scope.cancel()

    async with anyio.create_task_group() as tg:
        tg.start_soon(leave)
        script = f"trap 'touch {tmp_path}/checkpoint; exit 9' TERM; echo > {post}; while :; do sleep 0.02; done"
        await fly({"handle": handle}, **sh(script))
    assert (tmp_path / "checkpoint").exists()
    (exited,) = [event for event in await history(handle) if isinstance(event, PayloadExited)]
    assert (exited.outcome.exit_code, exited.outcome.ended_by) == (9, EndedBy.CANCELLATION)


async def test_a_second_cancellation_does_not_cut_the_first_one_short(fly: Fly, tmp_path: Path) -> None:
    """Ctrl-C twice: the payload still gets its grace, and is gone when `run_job` is."""
    post, winding = Signpost(tmp_path / "post"), Signpost(tmp_path / "winding")

    async def leave() -> None:
        await post.reached()
        inner.cancel()
        await winding.reached()
        tg.cancel_scope.cancel()

    script = f"trap 'echo > {winding}; sleep 0.1; touch {tmp_path}/checkpoint; exit' TERM; echo > {post}; "
    async with anyio.create_task_group() as tg:
        with anyio.CancelScope() as inner:
            tg.start_soon(leave)
            await fly(**sh(script + "while :; do sleep 0.02; done"))
    assert (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("hook", ["stageIn", "postProcess", "stageOut"])
async def test_what_a_hook_makes_of_a_cancellation_is_not_the_jobs_failure(fly: Fly, hook: str) -> None:
    """On trio, where the next await may be far, such a job used to end as Failed while the pilot was leaving."""

    async def stubborn(_: object) -> None:
        scope.cancel()
        try:
            await anyio.sleep_forever()
        finally:
            raise ValueError("no time for this")

    handle = JobHandle()
    with anyio.CancelScope() as scope:
        await fly({"handle": handle, "coordinator": type("Stubborn", (JobExecutionCoordinator,), {hook: stubborn})})
    assert scope.cancelled_caught
    assert "JobFinished" not in kinds(await history(handle))
    assert ("ComputingEnded" in kinds(await history(handle))) == (hook == "stageOut")


async def test_a_cancelled_job_still_holds_its_work_directory_until_its_payload_is_gone(
    fly: Fly, root: Path, tmp_path: Path
) -> None:
    post, winding = Signpost(tmp_path / "post"), Signpost(tmp_path / "winding")
    seen: list[list[str]] = []

    async def leave() -> None:
        await post.reached()
        scope.cancel()
        await winding.reached()
        seen.append([path.name for path in root.iterdir()])
        winding.path.unlink()

    script = f"trap 'echo > {winding}; while [ -e {winding} ]; do sleep 0.02; done; exit' TERM; echo > {post}; "
    async with anyio.create_task_group() as tg:
        with anyio.CancelScope() as scope:
            tg.start_soon(leave)
            await fly(**sh(script + "while :; do sleep 0.02; done"), job_id="held")
    assert seen == [["held"]]

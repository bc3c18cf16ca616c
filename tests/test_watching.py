"""What whoever follows a job sees of it in every phase, and what a job does about its time: by way of `run_job`."""

from __future__ import annotations

import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread

from conftest import Fly, sh
from following import Signpost, history, killed_when
from loadmaster import JobDescription, JobExecutionCoordinator, JobHandle, JobResult, Ledger, Status
from loadmaster.description import PayloadSpec
from loadmaster.events import Event, Heartbeat, OutputPrinted, PayloadExited, PayloadStarted
from loadmaster.payload.containment import shim_kind
from loadmaster.result import EndedBy, Phase
from loadmaster.world import BEST_FIRST

BEAT = 0.05

OTHER = JobDescription(executable="/bin/true")
"""A job that holds a slot."""


class Slow(JobExecutionCoordinator):
    """Takes a while for everything."""

    async def stageIn(self) -> None:
        await anyio.sleep(4 * BEAT)

    async def preProcess(self, command: str, exeEnv: dict[str, str]) -> PayloadSpec:
        await anyio.sleep(4 * BEAT)
        return PayloadSpec(command=command, env=exeEnv)

    async def postProcess(self) -> None:
        await anyio.sleep(4 * BEAT)

    async def stageOut(self) -> None:
        await anyio.sleep(4 * BEAT)


async def followed(fly: Fly, *, output: bool = False, options: dict[str, Any] | None = None, **words: Any) -> Any:
    """The result of a job, and everything a follower was told."""
    handle, events = JobHandle(), list[Event]()
    results: list[JobResult] = []

    async def follow() -> None:
        events.extend([event async for event in handle.follow(output=output)])

    async with anyio.create_task_group() as group:
        group.start_soon(follow)
        await anyio.wait_all_tasks_blocked()
        results.append(await fly({"handle": handle, "heartbeat_seconds": BEAT, **(options or {})}, **words))
    return results[0], events


# -- heartbeats --------------------------------------------------------------------------------------------------


async def test_heartbeats_come_in_every_phase_with_usage_and_the_last_lines(fly: Fly) -> None:
    """DIRAC's came only while the payload ran: a stage-out of hours looked like a dead job (DIRAC #274)."""
    _, events = await followed(fly, options={"coordinator": Slow}, **sh("echo so far; sleep 1"))
    beats = [event for event in events if isinstance(event, Heartbeat)]
    assert {beat.phase for beat in beats} == set(Phase)
    assert all(beat.seconds < 30 for beat in beats)
    before = [beat for beat in beats if beat.phase in {Phase.STAGE_IN, Phase.PRE_PROCESS}]
    assert all((beat.usage, beat.last_lines) == (None, ()) for beat in before)
    later = [beat for beat in beats if beat.phase in {Phase.POST_PROCESS, Phase.STAGE_OUT}]
    assert all(beat.usage is not None for beat in later)
    assert all(beat.last_lines == ("so far",) for beat in later)


async def test_heartbeats_come_while_a_job_waits_for_its_slot(fly: Fly) -> None:
    slots, handle, beats = Ledger(cores=1), JobHandle(), list[Heartbeat]()

    async def wait_until_it_has_shown_life() -> None:
        async for event in handle.follow():
            if isinstance(event, Heartbeat):
                beats.append(event)
            if len(beats) == 3:
                handle.kill("seen enough")

    async with slots.lease(OTHER), anyio.create_task_group() as group:
        group.start_soon(wait_until_it_has_shown_life)
        result = await fly({"handle": handle, "slots": slots, "heartbeat_seconds": BEAT})
        group.cancel_scope.cancel()
    assert result.status is Status.KILLED
    assert [beat.phase for beat in beats] == [Phase.PAYLOAD] * 3


async def test_it_is_said_what_holds_the_payload(fly: Fly) -> None:
    handle = JobHandle()
    await fly({"handle": handle})
    [started] = [event for event in await history(handle) if isinstance(event, PayloadStarted)]
    assert started.containment in BEST_FIRST
    assert started.shim == ("" if started.containment == "session" else await to_thread.run_sync(shim_kind))


# -- what the payload prints -------------------------------------------------------------------------------------


async def test_who_follows_the_output_sees_all_of_it_as_it_comes(fly: Fly) -> None:
    result, events = await followed(fly, output=True, **sh("echo one; sleep 1; echo no >&2; sleep 1; echo two"))
    printed = [event for event in events if isinstance(event, OutputPrinted)]
    assert "".join(event.text for event in printed if event.name == "std.out") == "one\ntwo\n"
    assert "".join(event.text for event in printed if event.name == "std.err") == "no\n"
    assert (printed[-1].time - printed[0].time).total_seconds() > 0.5
    assert result.status is Status.DONE


async def test_who_follows_only_the_events_is_spared_the_output(fly: Fly) -> None:
    _, events = await followed(fly, **sh("echo one"))
    assert not [event for event in events if isinstance(event, OutputPrinted)]


# -- time --------------------------------------------------------------------------------------------------------


def soon(seconds: float) -> dict[str, Any]:
    return {"deadline": datetime.now(UTC) + timedelta(seconds=seconds), "grace_seconds": 1}


class Hangs(JobExecutionCoordinator):
    """Hangs in one of its hooks."""

    hook = ""

    async def stageIn(self) -> None:
        await self._may_hang("stageIn")

    async def preProcess(self, command: str, exeEnv: dict[str, str]) -> PayloadSpec:
        await self._may_hang("preProcess")
        return PayloadSpec(command=command, env=exeEnv)

    async def postProcess(self) -> None:
        await self._may_hang("postProcess")

    async def stageOut(self) -> None:
        await self._may_hang("stageOut")

    async def _may_hang(self, hook: str) -> None:
        if hook == self.hook:
            await anyio.sleep_forever()


@pytest.mark.parametrize(
    ("hook", "phase"),
    [
        ("stageIn", Phase.STAGE_IN),
        ("preProcess", Phase.PRE_PROCESS),
        ("postProcess", Phase.POST_PROCESS),
        ("stageOut", Phase.STAGE_OUT),
    ],
)
async def test_the_deadline_is_the_whole_jobs(fly: Fly, hook: str, phase: Phase) -> None:
    coordinator = type("HangsThere", (Hangs,), {"hook": hook})
    with anyio.fail_after(10):
        result = await fly({"coordinator": coordinator}, limits=soon(0.5))
    assert result.status is Status.FAILED
    assert (result.failure.kind, result.failure.phase) == ("LimitExceeded", phase)
    assert result.failure.message.startswith("deadline of ")


async def test_a_job_that_waits_for_its_slot_past_the_deadline_gives_its_place_back(fly: Fly) -> None:
    slots = Ledger(cores=1)
    async with slots.lease(OTHER):
        result = await fly({"slots": slots}, limits=soon(0.3))
        assert repr(slots) == "<Ledger [0 of 1 cores free, 0 waiting]>"
    assert (result.failure.kind, result.outcome) == ("LimitExceeded", None)


async def test_a_payload_is_stopped_early_enough_that_its_outputs_still_leave(fly: Fly, out: Path) -> None:
    """80 MB at 1 MB/s take 80 s; with the grace and what else delivering takes it is 111 s: stopped at once."""
    limits = soon(100) | {"upload_bytes_per_second": 1e6}
    script = "head -c 80000000 /dev/zero > part; mv part big; echo made; exec sleep 1000"
    with anyio.fail_after(30):
        result = await fly(**sh(script), limits=limits, output_sandbox=["big", "std.out"])
    verdict = result.outcome.verdict
    assert verdict.limit == "deadline"
    assert "less 111 s to end it and deliver 80 MB" in result.failure.message
    assert (out / "big").stat().st_size == 80_000_000


async def test_a_payload_with_little_to_deliver_may_run_on(fly: Fly) -> None:
    limits = soon(100) | {"upload_bytes_per_second": 1e6}
    result = await fly(**sh("echo little; sleep 0.5"), limits=limits, output_sandbox=["std.out"])
    assert result.status is Status.DONE


# -- a soft stop -------------------------------------------------------------------------------------------------

WINDS_DOWN = "trap 'echo winding down; exit 130' INT; echo {ready}; while :; do sleep 0.02; done"


def soft(script: str, **words: Any) -> dict[str, Any]:
    """A payload whose shell can be asked softly; the pattern is found in its command line."""
    return sh(f": the-event-loop; {script}") | {"stop_pattern": "the-event-loop", **words}


async def test_a_payload_is_asked_before_its_time_is_over_and_succeeds(fly: Fly, out: Path) -> None:
    handle = JobHandle()
    with anyio.fail_after(10):
        result = await fly(
            {"handle": handle}, **soft(WINDS_DOWN.format(ready="ready"), stop_seconds=2),
            limits={"wall_seconds": 3}, output_sandbox=["std.out"],
        )  # fmt: skip
    assert result.status is Status.DONE
    assert (result.outcome.exit_code, result.outcome.stop_signal) == (130, signal.SIGINT)
    assert (result.outcome.ended_by, result.outcome.succeeded) == (EndedBy.ITSELF, True)
    assert (out / "std.out").read_text() == "ready\nwinding down\n"


async def test_the_same_exit_code_without_having_been_asked_is_a_failure(fly: Fly) -> None:
    result = await fly(**soft("exit 130"), limits={"wall_seconds": 5000})
    assert result.status is Status.FAILED
    assert result.outcome.stop_signal is None


async def test_a_payload_that_does_not_listen_is_stopped_when_its_time_is_over(fly: Fly) -> None:
    with anyio.fail_after(10):
        result = await fly(
            **soft("trap '' INT; sleep 1000; true", stop_seconds=2), limits={"wall_seconds": 4, "grace_seconds": 1}
        )
    assert result.failure.kind == "LimitExceeded"
    assert (result.outcome.ended_by, result.outcome.stop_signal) == (EndedBy.LIMIT, signal.SIGINT)


async def test_a_killed_payload_is_first_asked_softly(fly: Fly, out: Path, tmp_path: Path) -> None:
    ready = Signpost(tmp_path / "ready")
    script = soft(WINDS_DOWN.format(ready=f"> {ready}"))
    result, events = await killed_when(
        ready.reached, lambda handle: fly({"handle": handle}, **script, output_sandbox=["std.out"])
    )
    assert result.status is Status.KILLED
    [exited] = [event for event in events if isinstance(event, PayloadExited)]
    assert (exited.outcome.exit_code, exited.outcome.ended_by) == (130, EndedBy.KILL)
    assert exited.outcome.ending_seconds < 5
    assert (out / "std.out").read_text() == "winding down\n"


async def test_a_soft_stop_that_nobody_hears_does_not_delay_the_kill(fly: Fly, tmp_path: Path) -> None:
    ready = Signpost(tmp_path / "ready")
    words = sh(f"echo > {ready}; exec sleep 1000") | {
        "stop_pattern": "no such program",
        "limits": {"grace_seconds": 60},
    }
    with anyio.fail_after(10):
        result, _ = await killed_when(ready.reached, lambda handle: fly({"handle": handle}, **words))
    assert result.status is Status.KILLED
    assert result.outcome is not None
    assert result.outcome.signal == signal.SIGTERM

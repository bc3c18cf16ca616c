"""One job's life, top to bottom:

    workdir -> stageIn -> preProcess -> [slot leased: payload supervised] -> postProcess -> stageOut -> result

Values go down, events go sideways into the handle, one result comes up. A handle that was made from a job's history goes
down the same path, and leaves out what has been done: a restart has no path of its own.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from functools import partial
from math import inf
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, Any

import anyio
from anyio import lowlevel
from anyio.abc import TaskGroup
from pydantic import ValidationError

from loadmaster.answers import answer_of
from loadmaster.coordinator import Coordinator, JobExecutionCoordinator, JobInFlight
from loadmaster.description import (
    RESCHEDULE_EXIT_CODE,
    ComputingElement,
    JobDescription,
    Limits,
    PayloadSpec,
    complaints,
)
from loadmaster.errors import (
    HookFailed,
    JobError,
    JobWasKilled,
    LimitExceeded,
    PayloadFailed,
    PayloadLost,
    PayloadNotStarted,
    RescheduleJob,
    RuntimeFault,
    SkipPayload,
)
from loadmaster.events import (
    CompanionFailed,
    ComputingEnded,
    Heartbeat,
    JobAccepted,
    JobFinished,
    LimitReached,
    OutputPrinted,
    PayloadAdopted,
    PayloadExited,
    PayloadPrepared,
    PayloadStarted,
    SlotGranted,
    SoftStopOrdered,
    StageInEnded,
    StageInStarted,
    StageOutStarted,
)
from loadmaster.handle import JobHandle
from loadmaster.hooks import call_hook, reference_of
from loadmaster.ledger import AsAsked, Slot, Slots
from loadmaster.lifecycle import Lifecycle, Stage
from loadmaster.limits import deadline_verdict, limits_of, seconds_left
from loadmaster.payload.command import default_command, default_environment, with_slot
from loadmaster.payload.ready import Ready
from loadmaster.payload.softstop import SoftStop
from loadmaster.payload.starter import Starter
from loadmaster.payload.state import remove_state
from loadmaster.payload.supervise import HEARTBEAT_SECONDS, Payload, watch
from loadmaster.result import EndedBy, Failure, JobResult, PayloadOutcome, Phase, Usage, Verdict
from loadmaster.signatures import warn_at_first_use
from loadmaster.site import Site
from loadmaster.staging.engine import Transfers, open_transfers
from loadmaster.staging.plan import check_outputs
from loadmaster.tasks import single_error
from loadmaster.threads import briefly
from loadmaster.workdir import Workdir, open_workdir
from loadmaster.world import World

if TYPE_CHECKING:
    from loadmaster.journal import NodeJournal  # with sqlite3, loaded when used

log = logging.getLogger(__name__)


async def run_job(
    job: JobDescription,
    *,
    ce: ComputingElement | None = None,
    coordinator: type[Coordinator] = JobExecutionCoordinator,
    site: Site | None = None,
    transfers: Transfers | None = None,
    slots: Slots | None = None,
    handle: JobHandle | None = None,
    journal: NodeJournal | None = None,
    attempt: int = 1,
    root: Path | None = None,
    keep_workdir: bool = False,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
    starter: Starter | None = None,
) -> JobResult:
    """What came of one attempt at a job. Its failure is a value in there, not an exception.

    The files move through `transfers` (shared by many jobs) or those of `site`; the payload waits for a slot of `slots`;
    the work directory is `<root>/<job id>`. `handle` follows and kills the job. `starter`, of `open_starter`, starts the
    payloads of many jobs. What holds the payload's processes, what
    they see and what they may use is the site's to say: `Site.payload`.

    With a `journal` the job is gone on with where an agent left it, if it is in there; one that has ended is not run again,
    and its result is what is returned. A payload that still runs is adopted; one that is lost, or whose work directory is,
    ends the attempt as Rescheduled with the failure `PayloadLost`.

    Raises `RuntimeFault` when the runtime cannot keep its promises. Cancellation stops the payload (TERM, grace, KILL),
    removes the work directory unless a journal will want it, delivers nothing and claims no end: the last event is not
    `JobFinished`. Await it to its end also then: an event loop that is torn down under it (asyncio's, when `main` returns
    early) heeds no shield.
    """
    if not isinstance(job, JobDescription):
        raise TypeError(
            f"run_job takes a JobDescription, not a {type(job).__name__}; JobDescription.load reads a dictionary"
        )
    if site is not None and transfers is not None:
        raise TypeError("run_job takes a site or transfers, which have one, not both")
    if journal is not None:
        if handle is not None:
            raise TypeError("run_job takes a handle, which may have a journal, or a journal, not both")
        handle = await journal.handle(job.job_id, attempt)
    handle = handle or JobHandle()
    if (result := handle.recalls(job.job_id, attempt)) is not None:
        return result
    handle.open(job.job_id, attempt)
    result = await run_part(
        job, Stage.FINISHED, handle=handle, ce=ce, coordinator=coordinator, site=site, transfers=transfers, slots=slots,
        root=root, keep_workdir=keep_workdir, heartbeat_seconds=heartbeat_seconds, starter=starter,
    )  # fmt: skip
    if result is None:
        raise RuntimeFault(f"job {job.job_id} ended without a result")
    return result


async def run_part(
    job: JobDescription,
    until: Stage,
    *,
    handle: JobHandle,
    ce: ComputingElement | None = None,
    coordinator: type[Coordinator] = JobExecutionCoordinator,
    site: Site | None = None,
    transfers: Transfers | None = None,
    slots: Slots | None = None,
    root: Path | None = None,
    keep_workdir: bool = False,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
    starter: Starter | None = None,
) -> JobResult | None:
    """As `run_job`, of an opened handle with a journal, but only until the job is PREPARED, or its payload has EXITED; then
    there is no result, and the next part goes on from there. What fails before it is prepared ends the job; what fails
    later is delivered by the last part. Nothing moves beside the payload: where that runs there may be no network.
    """
    place, identity = where_it_was(handle.life) or (root, None)

    def kept() -> bool:
        return keep_workdir or (handle.is_journalled and handle.result is None)

    def forget_payload() -> None:
        """What was kept of it for another agent."""
        if handle.state is not None and handle.result is not None and handle.life.slot is not None:
            try:
                remove_state(handle.state)
            except OSError as exc:
                log.warning("%s: is left there: %s", handle.state, exc.strerror)

    async def fly(tasks: TaskGroup) -> None:
        beating = anyio.CancelScope()
        at = transfers.site if transfers is not None else site or Site()
        moved = nullcontext(transfers) if transfers is not None else open_transfers(at)
        kit = _Kit(job, ce or ComputingElement(), at.payload, handle, starter)
        made = open_workdir(
            place, job.job_id, keep=kept, identity=identity, afterwards=forget_payload,
            at_once=kit.get_ready_early if until is Stage.FINISHED and _comes_as_it_is(job, coordinator) else None,
        )  # fmt: skip
        try:
            forgotten = await _forgotten_payload(handle)
            async with moved as moving, made as workdir:
                flight = JobInFlight(job, kit.ce, workdir, moving, handle, beside=until is Stage.FINISHED)
                straight = _Flight(
                    flight, workdir, at, coordinator, slots or AsAsked(), handle, tasks, heartbeat_seconds, kit
                )
                straight.until, straight.forgotten = until, forgotten
                handle.begin(tasks, straight.beat)
                if not handle.has_audience:  # which has one task for the heartbeats of many jobs
                    tasks.start_soon(straight.go_on_beating, beating)
                try:
                    await straight.fly()
                finally:
                    await kit.discard()
        finally:
            beating.cancel()
            try:
                await handle.settle()
            finally:
                handle.close()

    if handle.tasks is not None:
        await fly(handle.tasks)
        return handle.result
    # In a task of its own, so that a native asyncio cancellation arrives as a scope's: one that respects our shields.
    with single_error():
        async with anyio.create_task_group() as own:
            own.start_soon(fly, own)
    return handle.result


async def _forgotten_payload(handle: JobHandle) -> JobError | None:
    """Why the attempt is over because of a payload that the journal does not know of; None: there is none."""
    if handle.life.has_reached(Stage.GRANTED) or not (handle.has_past or handle.stage is Stage.NEW):
        return None
    if (state := handle.state) is None or not await briefly(partial(os.path.lexists, state)):
        return None
    from loadmaster.takeover import end_forgotten  # loaded when used

    return await end_forgotten(handle)


class _Kit:
    """What a job's payload is made ready with; known before there is a work directory."""

    def __init__(
        self, job: JobDescription, ce: ComputingElement, world: World, handle: JobHandle, starter: Starter | None
    ) -> None:
        self.job = job
        self.ce = ce
        self.limits = limits_of(job, ce, os.environ)
        self.ready: Ready | None = None
        """Made, and neither started nor discarded."""
        self._world = world
        self._handle = handle
        self._starter = starter

    def environment(self, workdir: Workdir) -> dict[str, str]:
        """Of the payload, if nobody changes it."""
        return default_environment(self.job, self.ce, workdir, self._world)

    def make_ready(self, spec: PayloadSpec, workdir: Workdir) -> None:
        """Have it ready to be started. Blocks for a moment; raises `PayloadNotStarted`."""
        hidden = [at for at in self._handle.hidden if not workdir.path.is_relative_to(at)]
        self.ready = Ready(
            spec, workdir, stdout=self.job.std_output, stderr=self.job.std_error, limits=self.limits, world=self._world,
            state=self._handle.state, hidden=hidden, starter=self._starter,
        )  # fmt: skip

    def get_ready(self, workdir: Workdir) -> PayloadSpec:
        """What the description says, and have that ready, unless it cannot be: then `make_ready`, in its own phase, says
        why. Blocks for a moment; raises `PayloadNotStarted` when there is no such program."""
        env = self.environment(workdir)
        command = default_command(self.job, env, workdir)
        spec = PayloadSpec.model_construct(command=command, env=env)  # of words that were checked with the description
        with suppress(PayloadNotStarted):
            self.make_ready(spec, workdir)
        return spec

    def get_ready_early(self, workdir: Workdir) -> None:
        """As `get_ready`, of a job that brings nothing with it: in one go with its work directory. What fails fails again,
        in its own phase."""
        if not workdir.continued and not self._handle.is_journalled:  # which has to hear of it before
            with suppress(PayloadNotStarted):
                self.get_ready(workdir)

    async def discard(self) -> None:
        """It will not be started."""
        if self.ready is not None:
            await self.take().discard()

    def take(self) -> Ready:
        """The payload that is ready, for whoever starts it."""
        ready, self.ready = self.ready, None
        if ready is None:
            raise RuntimeFault(f"job {self.job.job_id}: its payload is not ready")
        return ready


def _comes_as_it_is(job: JobDescription, coordinator: type[Coordinator]) -> bool:
    """Whether nothing is brought in and nobody says what is executed: it is known before there is a work directory."""
    standard = JobExecutionCoordinator
    hooks = ("stageIn", "preProcess", "__init__")
    return not (job.input_sandbox or job.input_data) and all(
        getattr(coordinator, name, None) is getattr(standard, name) for name in hooks
    )


class _Flight:
    """The straight path of one job."""

    def __init__(
        self, job: JobInFlight, workdir: Workdir, site: Site, coordinator: type[Coordinator],
        slots: Slots, handle: JobHandle, tasks: TaskGroup, heartbeat_seconds: float, kit: _Kit,
    ) -> None:  # fmt: skip
        self.job = job
        self.workdir = workdir
        self.site = site
        self.coordinator_class = coordinator
        self.slots = slots
        self.handle = handle
        self.record, self.note = handle.record, handle.note
        self.tasks = tasks
        self.heartbeat_seconds = heartbeat_seconds
        self.kit = kit
        self.limits = kit.limits
        self.standard = JobExecutionCoordinator(job.description, job.ce)
        self.standard.job = job
        self.coordinator: Coordinator = self.standard
        self.has_coordinator = False
        self.life = handle.life
        self.workdir_lost = self.life.has_reached(Stage.STAGED_IN) and not workdir.continued
        self.phase = Phase.STAGE_IN
        self.phase_began = time.monotonic()
        self.usage: Usage | None = None
        self.last_lines: tuple[str, ...] = ()
        self.until = Stage.FINISHED
        self.forgotten: JobError | None = None
        self.answered = False
        """Whether the last hook had ended before anybody told it to: that counts, also while we are leaving."""

    async def fly(self) -> None:
        if not self.life.has_reached(Stage.ACCEPTED):
            reference, site = reference_of(self.coordinator_class), self.site
            await self.record(
                JobAccepted,
                self.job.description.words(),
                reference,
                outputs=site.output_directory or "",
                site=site.file,
            )
        await self.handle.keep_order()
        async with self.job.early_outputs():  # they may leave while the payload runs, and are nowhere if the job fails
            self.job.outcome = self.life.outcome
            self.job.failure = self.life.failure
            if not self.life.has_reached(Stage.COMPUTED):
                self.job.failure = await self._compute()
                self.job.companions.close()
                await self._unless_leaving()  # what fails while we are leaving is not the job's failure
                if self.until is not Stage.FINISHED and self.job.failure is None:
                    return
                await self.note(ComputingEnded, self.job.failure)
                await lowlevel.checkpoint_if_cancelled()
            if self.until is Stage.EXITED:
                return
            failure = await self._deliver()
        await self._unless_leaving()  # likewise; and a hook may have lost a cancelled task unawares
        await self.handle.keep_order()  # of an attempt that was lost
        await self.record(JobFinished, self.handle.ends_as(failure), failure)

    async def _compute(self) -> Failure | None:
        """Everything that a kill ends."""
        failure: Failure | None = None
        try:
            if self.forgotten is not None:
                raise self.forgotten
            found = await self._find_payload()
            with self.handle.computing():
                outcome: PayloadOutcome | None
                if self.life.outcome is not None:
                    outcome = self.life.outcome
                elif found is not None:
                    outcome = await self._supervise_again(found)
                else:
                    with self._in_time():
                        await self._stage_in()
                        spec = await self._prepare()
                    outcome = None if self.until is Stage.PREPARED else await self._run_payload(spec)
                if outcome is not None and self.until is Stage.FINISHED and self.life.companion_failure is None:
                    await self._post_process(outcome)
        except JobError as error:
            failure = None if isinstance(error, SkipPayload) else Failure.of(error, self.phase)
        finally:
            await self.kit.discard()
        if (said := self.life.companion_failure) is not None:  # maybe to an earlier agent
            failure = None if said.kind == SkipPayload.__name__ else said
        await self.handle.keep_order()
        if self.handle.kill_reason is not None:
            return Failure.of(JobWasKilled(self.handle.kill_reason), self.phase)
        return failure

    async def _stage_in(self) -> None:
        if self.until is not Stage.EXITED:
            check_outputs(self.job.description, self.site)
        await self._make_coordinator()
        if self.life.has_reached(Stage.STAGED_IN):
            self._check_workdir()
            return
        if not (self.life.has_reached(Stage.STAGING_IN) and self.workdir.continued):
            await self.note(StageInStarted, str(self.workdir.path), self.workdir.identity)
        await self._hook("stageIn")
        await self._unless_leaving()
        await self.note(StageInEnded)

    async def _prepare(self) -> PayloadSpec:
        self._enter(Phase.PRE_PROCESS)
        if self.life.prepared is not None:
            return PayloadSpec(command=self.life.prepared.command, env=dict(self.life.prepared.env))
        kit, workdir = self.kit, self.workdir
        if kit.ready is not None:
            await lowlevel.checkpoint_if_cancelled()  # all the way from the job's begin nothing else waits
            spec = kit.ready.spec
        elif self._is_standard("preProcess") and self.until is not Stage.PREPARED:
            spec = await briefly(lambda: kit.get_ready(workdir))  # nobody has anything to say about it: all in one go
        else:
            env = kit.environment(workdir)
            command = await briefly(lambda: default_command(kit.job, env, workdir))
            spec = _as_spec(await self._hook("preProcess", command, dict(env)))
            await self._unless_leaving()
        await self.note(PayloadPrepared, spec.command, spec.env)
        return spec

    async def _run_payload(self, spec: PayloadSpec) -> PayloadOutcome:
        self._enter(Phase.PAYLOAD)
        if self.kit.ready is None:
            await briefly(lambda: self.kit.make_ready(spec, self.workdir))
        with self._in_time() as waiting:
            async with self.slots.lease(self.job.description) as slot:
                if waiting is not None:
                    waiting.deadline = inf  # from here on the payload's own supervision keeps it
                await self.record(SlotGranted, slot.cores, slot.memory_mb, slot.cpus, slot.gpus)
                payload = await self.kit.take().start(
                    with_slot(spec.env, slot), cores=frozenset(slot.cpus), soft_stop=SoftStop.of(self.job.description),
                    outputs_bytes=self._outputs_bytes,
                )  # fmt: skip
                return await self._to_its_end(payload)

    async def _find_payload(self) -> Payload | None:
        """The payload that an earlier agent has started."""
        if self.life.stage not in {Stage.GRANTED, Stage.RUNNING}:
            return None
        from loadmaster.takeover import find_payload  # loaded when used

        return await find_payload(
            self.job.description, self.handle, self.workdir, limits=self.limits, world=self.site.payload,
            outputs_bytes=self._outputs_bytes,
        )  # fmt: skip

    async def _supervise_again(self, payload: Payload) -> PayloadOutcome:
        """As `_run_payload`, for one that runs already, in the slot that it has."""
        self._enter(Phase.PAYLOAD)
        had = self.life.slot
        assert had is not None  # noqa: S101 - no payload is started without
        slot = Slot(had.cores, had.memory_mb, had.cpus, had.gpus, extras=self.job.description.resources)
        with self.slots.hold(self.job.description, slot):
            return await self._to_its_end(payload, adopted=True)

    async def _to_its_end(self, payload: Payload, *, adopted: bool = False) -> PayloadOutcome:
        """Watch it, and end it if need be; its end is recorded. Nothing may come between its start and this."""
        verdict: Verdict | None = None
        try:
            tree = payload.tree
            if not self.life.has_reached(Stage.RUNNING):
                await self.note(
                    PayloadStarted, tree.pid, tree.start_ticks, tree.containment, tree.shim,
                    tree.shim_pid, tree.shim_start_ticks, self.life.boot_id,
                )  # fmt: skip
            if adopted:
                await self.record(PayloadAdopted, os.getpid(), gethostname())
            if self.life.verdict is None and self.life.companion_failure is None:  # an earlier agent may be ending it
                verdict = await self._watch(payload)
        finally:
            with anyio.CancelScope(shield=True), self.handle.hurried_by(payload.hurry):  # bounded: the grace and 30 s
                self.job.payload = None
                try:
                    await self._say_why_it_ends(verdict)
                finally:
                    outcome = await payload.end(
                        self.life.ending_by or EndedBy.CANCELLATION, grace_seconds=self.limits.grace_seconds,
                        verdict=self.life.verdict,
                    )  # fmt: skip
                self.job.outcome = outcome
                self.last_lines = payload.last_lines or self.last_lines
                if self.life.stage is Stage.RUNNING:  # a journal that refused its start is not asked to take its end
                    await self.note(PayloadExited, outcome, payload.last_lines)
        return outcome

    async def _watch(self, payload: Payload) -> Verdict | None:
        """Until it has ended, or is to be ended: with the limit it has reached, if it is for that."""
        self._check_workdir()
        await self._make_coordinator()
        self.job.payload = payload
        self.job.stage_beside()
        followed = self._followed(payload) if self.handle.output_followed else nullcontext()
        async with self.job.companions.alongside(self.tasks), followed:
            return await watch(
                payload, self.limits, heartbeat_seconds=self.heartbeat_seconds, on_sample=self._take_sample,
                before_soft_stop=partial(self.record, SoftStopOrdered, self.job.description.stop_signal),
            )  # fmt: skip

    async def _say_why_it_ends(self, verdict: Verdict | None) -> None:
        """Have it in the journal before it is done: the next agent is to know it, should we die in the grace."""
        if self.life.stage is not Stage.RUNNING:
            return
        if verdict is not None:
            await self.record(LimitReached, verdict)
        elif (error := self.job.companions.error) is not None and self.life.ending_by is None:
            await self.record(CompanionFailed, Failure.of(error, self.phase))

    async def _post_process(self, outcome: PayloadOutcome) -> None:
        error = _error_of(outcome)
        if isinstance(error, RescheduleJob | PayloadLost):
            raise error
        self._check_workdir()
        self._enter(Phase.POST_PROCESS)
        try:
            with self._in_time():
                await self._hook("postProcess")
        except (HookFailed, SkipPayload) as said:
            if error is None:
                raise
            log.warning("job %s: postProcess: %s", self.job.description.job_id, said)
        if error is not None:
            self.phase = Phase.PAYLOAD  # where it went wrong, although postProcess has been asked meanwhile
            raise error

    async def _deliver(self) -> Failure | None:
        """Take out what the job has, and say why that failed if it did."""
        self._enter(Phase.STAGE_OUT)
        if not self.life.has_reached(Stage.STAGING_OUT):
            await self.note(StageOutStarted)
        if self._has_outputs:
            await self.handle.settle()
        if self.job.failure is not None:
            await self.job.abandon_early_outputs()
        await self.job.clear_leftovers()
        try:
            if self.job.failure is None and self._has_outputs:
                self._check_workdir()
            with self._in_time():
                await self._hook("stageOut")
        except SkipPayload:
            return None
        except JobError as error:
            return Failure.of(error, self.phase)
        return None

    # -- details -------------------------------------------------------------------------------------------------

    async def _make_coordinator(self) -> None:
        """Have it made, once; one that cannot be is replaced by the standard one from then on."""

        async def make() -> Coordinator:
            made = self.coordinator_class(jobArgs=self.job.description, ceArgs=self.job.ce)  # type: ignore[call-arg]
            with suppress(AttributeError):  # it has slots and no place for it: it does not want it
                made.job = self.job  # type: ignore[attr-defined]
            return made

        if not self.has_coordinator:
            self.has_coordinator = True
            warn_at_first_use(self.coordinator_class)
            self.coordinator = await call_hook(f"{self.coordinator_class.__name__}(jobArgs=..., ceArgs=...)", make)

    def _check_workdir(self) -> None:
        """Raise `PayloadLost` if what was in the work directory is gone."""
        if self.workdir_lost:
            raise PayloadLost(f"what was in its work directory {self.workdir.path} is gone")

    async def _hook(self, name: str, *args: Any) -> Any:
        """Call a hook of the coordinator, or the standard one where it has none."""
        self.answered = False
        await self._make_coordinator()
        hook = getattr(self.coordinator, name, None) or getattr(self.standard, name)
        call = partial(call_hook, f"{self.coordinator_class.__name__}.{name}", hook, *args)
        self.job.writes_behind = self._is_standard(name)
        if self.job.writes_behind:
            return await call()
        await self.handle.settle()  # it may do anything outside
        if not self.handle.is_journalled:  # nobody comes after us, to call it or not
            return await call()
        answer = await answer_of(call)
        self.answered = answer.first
        return answer.get()

    async def _unless_leaving(self) -> None:
        """Before the end of something is noted: it is none if it was cancelled, whatever it made of that."""
        if not self.answered:
            await lowlevel.checkpoint_if_cancelled()

    def _is_standard(self, name: str) -> bool:
        """Whether a hook of the coordinator is ours."""
        hook = getattr(self.coordinator, name, None)
        return hook is None or getattr(hook, "__func__", None) is getattr(JobExecutionCoordinator, name)

    def _enter(self, phase: Phase) -> None:
        self.phase, self.phase_began, self.answered = phase, time.monotonic(), False

    def _in_time(self) -> AbstractContextManager[anyio.CancelScope | None]:
        """While no payload runs: raise `LimitExceeded` when the job's deadline comes, if it has one."""
        return nullcontext() if self.limits.deadline is None else self._until(self.limits.deadline)

    @contextmanager
    def _until(self, deadline: datetime) -> Iterator[anyio.CancelScope]:
        delivering = self.phase is Phase.STAGE_OUT
        usage = Usage(wall_seconds=0.0, outputs_bytes=0 if self._has_outputs and not delivering else None)
        only = {"deadline", "grace_seconds", "upload_bytes_per_second"}
        limits = Limits(**self.limits.model_dump(include=only))
        left = seconds_left(usage, limits, now=datetime.now(UTC))
        with anyio.CancelScope(deadline=anyio.current_time() + left) as scope:
            yield scope
        if scope.cancelled_caught:
            raise LimitExceeded(str(deadline_verdict(deadline, usage, self.limits, now=datetime.now(UTC))))

    @property
    def _outputs_bytes(self) -> Callable[[], int] | None:
        return self.job.outputs_bytes if self._has_outputs else None

    @property
    def _has_outputs(self) -> bool:
        return bool(self.job.description.output_data or self.job.description.output_sandbox)

    # -- telling whoever follows -----------------------------------------------------------------------------------

    def beat(self) -> None:
        """A heartbeat, in every phase; while a payload runs, the looks at it give them."""
        if self.job.payload is None:
            self._tell()

    async def go_on_beating(self, scope: anyio.CancelScope) -> None:
        """A heartbeat now and then."""
        with scope:
            while True:
                await anyio.sleep(self.heartbeat_seconds)
                self.beat()

    async def _take_sample(self, usage: Usage) -> None:
        self.usage = usage
        if self.handle.followed and self.job.payload is not None:
            self.last_lines = tuple(await self.job.payload.peek())
            self._tell()

    def _tell(self) -> None:
        self.handle.offer(Heartbeat, self.phase, time.monotonic() - self.phase_began, self.usage, self.last_lines)

    @asynccontextmanager
    async def _followed(self, payload: Payload) -> AsyncIterator[None]:
        """Tell what the payload prints."""
        with single_error():
            async with anyio.create_task_group() as beside:
                beside.start_soon(
                    payload.follow, lambda name, text, skipped: self.handle.offer(OutputPrinted, name, text, skipped)
                )
                try:
                    yield
                finally:
                    beside.cancel_scope.cancel()


def _as_spec(returned: object) -> PayloadSpec:
    """What preProcess returned, as a spec. Raises `HookFailed` that says what it should have been."""
    if isinstance(returned, PayloadSpec):
        return returned
    if not isinstance(returned, Mapping):
        raise HookFailed(f"preProcess returned {_short(returned)}: return PayloadSpec(command=..., env=...)")
    try:
        return PayloadSpec.model_validate(dict(returned))
    except ValidationError as exc:
        raise HookFailed("preProcess returned a payload that cannot be: " + "; ".join(complaints(exc))) from exc


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _error_of(outcome: PayloadOutcome) -> JobError | None:
    """What an outcome means for the job."""
    if outcome.ended_by is EndedBy.LOST:
        return PayloadLost("what held the payload is gone, and how it ended is not known")
    if outcome.ended_by is EndedBy.CANCELLATION:
        return PayloadLost("the agent left while the payload ran, and ended it")
    if outcome.ended_by is EndedBy.ORPHANED:
        return PayloadLost("the payload had been without an agent for too long, and was ended")
    if outcome.verdict is not None:
        return LimitExceeded(str(outcome.verdict))
    if outcome.exit_code == RESCHEDULE_EXIT_CODE:
        return RescheduleJob(f"the payload asked to be rescheduled (exit code {RESCHEDULE_EXIT_CODE})")
    return None if outcome.succeeded else PayloadFailed(f"the payload failed: {outcome}")


def where_it_was(life: Lifecycle) -> tuple[Path, str] | None:
    """The directory of the work directory that an earlier agent has made for a job, and the identity of that."""
    begun = life.stage_in
    return (Path(begun.workdir).parent, begun.identity) if begun is not None and begun.workdir else None

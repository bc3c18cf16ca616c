"""What a community may change about a job, and what it is offered to do so.

Subclass `JobExecutionCoordinator` and override what you need. Four hooks, called once each and in this order:
`stageIn`, `preProcess`, (the payload), `postProcess`, `stageOut`. A hook goes on by returning; what else it may say it
raises: `SkipPayload`, `RescheduleJob`, `HoldJob`, `RetryHook(after)`, or any `JobError` to fail the job. Anything else it
raises fails the job as `HookFailed`, with its cause.

After a restart of the agent there is a new coordinator, with nothing but what its constructor gives it. Hooks that had
returned are not called again, so what a later one wants to know of them is to be remembered: `await self.job.remember(name,
value)`, `self.job.memory[name]`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from anyio import to_thread

from loadmaster.companions import Companions
from loadmaster.description import ComputingElement, InputFile, JobDescription, OutputFile, PayloadSpec
from loadmaster.errors import InvalidJob, StagingFailed
from loadmaster.events import (
    FailoverRequested,
    FileStagedIn,
    FileStagedOut,
    OutputMissing,
    ParameterReported,
    RegistrationRequested,
    Remembered,
    StagingProgress,
    TransferProgress,
)
from loadmaster.handle import JobHandle
from loadmaster.leftovers import Leftovers
from loadmaster.names import base_name, check_local_name, join_url
from loadmaster.payload.output import PEEK_LINES
from loadmaster.payload.supervise import Payload
from loadmaster.result import Failure, PayloadOutcome, StoredFile
from loadmaster.signatures import warn_of_misspellings
from loadmaster.staging.engine import NOT_MADE, Transfers
from loadmaster.staging.plan import (
    MAGIC,
    Delivery,
    lfns_of,
    plan_delivery,
    plan_fetches,
    sandbox_directory,
    without_collisions,
)
from loadmaster.staging.progress import Overall
from loadmaster.storage.base import Direction, Replica
from loadmaster.tasks import all_to_their_end
from loadmaster.threads import briefly
from loadmaster.workdir import NotDeliverable, Workdir

if TYPE_CHECKING:
    from loadmaster.staging.early import EarlyOutputs
    from loadmaster.staging.sandbox import Packed, SandboxFormat


OURS: Final = "loadmaster."
LATE: Final = f"{OURS}late"


class Coordinator(Protocol):
    """The least a coordinator has. `stageIn`, `stageOut` and a `job` attribute are used when they are there."""

    async def preProcess(self, command: str, exeEnv: dict[str, str]) -> PayloadSpec | Mapping[str, Any]:
        """Decide what is executed, from the description's command and the environment it starts from."""
        ...

    async def postProcess(self) -> None:
        """Look at what the payload left, before outputs are taken out."""
        ...


class JobExecutionCoordinator:
    """The coordinator of a job nobody has special wishes for, and the base of all others."""

    job: JobInFlight
    """The standard steps and what is known of the job; there from `stageIn` on."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        warn_of_misspellings(cls)

    def __init__(self, jobArgs: JobDescription, ceArgs: ComputingElement) -> None:
        self.jobArgs = jobArgs
        self.ceArgs = ceArgs

    async def stageIn(self) -> None:
        """Bring in the input sandbox and the input data, side by side."""
        job, steps = self.job, []
        if job.description.input_sandbox:
            steps.append(job.download_input_sandbox)
        if job.description.input_data:
            steps.append(job.resolve_input_data)
        await all_to_their_end(*steps)

    async def preProcess(self, command: str, exeEnv: dict[str, str]) -> PayloadSpec | Mapping[str, Any]:
        """Decide what is executed. `command` is a piece of shell; a mapping with `command` and `env` will do as well."""
        return PayloadSpec(command=command, env=exeEnv)

    async def postProcess(self) -> None:
        """Called when a payload has ended, also when it failed or was stopped by a limit; `self.job.outcome` says how.

        Not called when none was started, when it asked to be rescheduled (exit code 222), or when the job was killed.
        """

    async def stageOut(self) -> None:
        """Take out the output sandbox and, if the job has not failed, the output data."""
        job, steps = self.job, []
        if job.description.output_sandbox:
            steps.append(job.upload_output_sandbox)
        if job.description.output_data:
            steps.append(job.upload_output_data)
        await all_to_their_end(*steps)


class JobInFlight:
    """A running job, as its coordinator sees it: `self.job`."""

    def __init__(
        self,
        description: JobDescription,
        ce: ComputingElement,
        workdir: Workdir,
        transfers: Transfers,
        handle: JobHandle,
        *,
        beside: bool = True,
    ) -> None:
        """`beside`: whether files may move while the payload runs."""
        self.description = description
        self.ce = ce
        self.workdir = workdir.path
        self.companions = Companions()
        self.payload: Payload | None = None
        """The payload while it runs."""
        self.outcome: PayloadOutcome | None = None
        """How the payload ended; None before that."""
        self.failure: Failure | None = None
        """Why the computing failed; None if it did not, or is not over."""
        self.writes_behind = False
        """Whether a standard hook is called, and not somebody's own code: that a file has moved is then written soon, and
        nobody waits for each."""
        self._delivered: dict[str, str] = {}
        self._archives: dict[str, str] = {}
        """Those of directories: what each is called in the work directory."""
        self._late: set[str] = set(handle.life.memory.get(LATE, ()))
        self._early: EarlyOutputs | None = None
        self._beside = beside
        self._files = workdir
        self._workdir_continued = workdir.continued
        self._sent_before = frozenset(handle.life.safe)
        """By an earlier agent."""
        self._transfers = transfers
        self._handle = handle
        self._leftovers = Leftovers(transfers, handle, self._plan_early, self._places) if handle.is_journalled else None

    def __repr__(self) -> str:
        return f"<JobInFlight {self.description.job_id}>"

    @property
    def attempt(self) -> int:
        """Which try at the job this is."""
        return self._handle.attempt

    def start_soon(self, function: Callable[..., Awaitable[Any]], *args: Any) -> None:
        """Have a task run beside the payload: started with it, cancelled when it ends.

        What the task raises ends the payload and fails the job, a verdict as that verdict. Raises RuntimeError once the
        payload has ended.
        """
        self.companions.start_soon(function, *args)

    @property
    def memory(self) -> Mapping[str, Any]:
        """What was remembered, by this agent or an earlier one."""
        return {name: value for name, value in self._handle.life.memory.items() if not name.startswith(OURS)}

    async def remember(self, name: str, value: Any) -> None:
        """Keep something for a later hook, also after a restart of the agent, under a name that is not ours (`loadmaster.`).

        Where there is a journal it is on disk when this returns. Raises TypeError for what is not JSON.
        """
        if name.startswith(OURS):
            raise ValueError(f"{name}: names that begin with {OURS} are ours")
        await self._handle.record(Remembered, name, json.loads(json.dumps(value, allow_nan=False)))

    async def report(self, name: str, value: object) -> None:
        """Keep a fact about the job for its owner: it is in the result and goes to the workload system."""
        await self._handle.record(ParameterReported, name, str(value))

    def outputs_bytes(self) -> int:
        """What would have to be delivered if the payload ended now: the sizes of the outputs there are. Blocks."""
        wanted = (*self.description.output_sandbox, *self.description.output_data)
        return self._files.sizes_of({name for file in wanted for name in self._files.matches(file.pattern)})

    async def peek(self, lines: int = PEEK_LINES) -> list[str]:
        """The last lines the running payload printed; none when it is not running."""
        return await self.payload.peek(lines) if self.payload is not None else []

    # -- the standard steps --------------------------------------------------------------------------------------

    async def download_input_sandbox(self) -> None:
        """Bring in the files of the input sandbox and unpack the archives among them. Raises `StagingFailed`.

        Those that arrive during the payload are left to it, here as in `resolve_input_data`.
        """
        await self._fetch_sandbox(await self._for_now(self.description.input_sandbox))

    async def _fetch_sandbox(self, files: Sequence[InputFile]) -> None:
        if not files:
            return
        from loadmaster.staging.archives import ArchiveLimits  # with tarfile and its compressors, loaded when used
        from loadmaster.staging.sandbox import unpack

        await self._fetch(files)
        job = self.description
        taken = {file.name for file in (*job.input_sandbox, *job.input_data)} | {job.std_output, job.std_error}
        limits = ArchiveLimits(zip=False)  # DIRAC leaves them packed, and payloads unpack them
        for file in files:
            await to_thread.run_sync(unpack, self._files, file.name, taken - {file.name}, limits)

    async def resolve_input_data(self) -> None:
        """Find the input data in the catalog and bring it in. Raises `StagingFailed`."""
        await self._fetch(await self._for_now(self.description.input_data))

    async def upload_output_sandbox(self) -> None:
        """Take out the output sandbox: files flat, a directory as `<directory>.tar`. Raises `StagingFailed`.

        All of it is in one archive where the site has a `sandbox_format`. If its place does not take that, it goes where
        output data go, also for a job that has failed: the parameters OutputSandbox and OutputSandboxLFN say so.
        """
        if self.description.output_sandbox and self._transfers.site.sandbox_format != "files":
            await self._take_out_packed(self._transfers.site.sandbox_format)
        elif self.description.output_sandbox:
            place = sandbox_directory(self.description, self._transfers.site)

            def delivery(file: OutputFile, name: str) -> Delivery:
                return Delivery(name, (Replica(join_url(place, base_name(name))),))

            await self._take_out(self.description.output_sandbox, self._pack, delivery)

    async def upload_output_data(self) -> None:
        """Take out the output data, and register what has a logical name. Does nothing for a job that has failed.

        A directory means all files in it. Raises `StagingFailed`.
        """
        if self.description.output_data and self.failure is None:

            def delivery(file: OutputFile, name: str) -> Delivery:
                return plan_delivery(file, name, self.description, self._transfers.site)

            await self._take_out(self.description.output_data, self._files.files_below, delivery, self._early)

    # -- beside the payload --------------------------------------------------------------------------------------

    @asynccontextmanager
    async def early_outputs(self) -> AsyncIterator[None]:
        """Let outputs leave before the payload ends. What `upload_output_data` has not published is abandoned at the end."""
        early = [file for file in self.description.output_data if file.leaves == "on_close"]
        if not early or not self._beside:
            yield
            return
        from loadmaster.staging.early import open_early  # loaded when used

        patterns = [each.pattern for file in early for each in _spellings(file)]
        listener = _Recorder(self._handle, FileStagedOut, behind=False)
        async with open_early(
            self._transfers, self._files, patterns, self._plan_early, listener, self._leftovers
        ) as self._early:
            yield

    def stage_beside(self) -> None:
        """Have companions bring the inputs that are late, and send the outputs that are early. Before `companions` run."""
        if self._late:
            self.companions.start_soon(self._fetch_late)
        if self._early is not None:
            self._early.start()
            self.companions.start_soon(self._early.watch)

    async def clear_leftovers(self) -> None:
        """Have removed what an agent that was killed has left of the job's uploads."""
        if self._leftovers is not None:
            await self._leftovers.begin()

    async def abandon_early_outputs(self) -> None:
        """The job has failed: have removed what is at the storages already."""
        if self._early is not None:
            await self._early.abandon()

    async def _for_now(self, files: Sequence[InputFile]) -> list[InputFile]:
        """Those that are needed now; the others are remembered until the payload runs."""
        late = (
            set()
            if self.payload is not None or not self._beside
            else {file.name for file in files if file.arrives == "during"}
        )
        if late - self._late:
            self._late |= late
            await self._handle.record(Remembered, LATE, sorted(self._late))
        return [file for file in files if file.name not in late]

    async def _fetch_late(self) -> None:
        sandbox = [file for file in self.description.input_sandbox if file.name in self._late]
        data = [file for file in self.description.input_data if file.name in self._late]
        await all_to_their_end(partial(self._fetch_sandbox, sandbox), partial(self._fetch, data))

    def _plan_early(self, name: str) -> Delivery | None:
        """Where an output goes that is finished; None for one that leaves after the payload."""
        from loadmaster.staging.watch import Patterns  # as above

        for file in self.description.output_data:
            for each in _spellings(file):
                if Patterns([each.pattern]).find(name) is not None:
                    if file.leaves == "after":
                        return None
                    with suppress(InvalidJob):  # said when it is to leave
                        return plan_delivery(each, name, self.description, self._transfers.site)
        return None

    def _places(self, found: bool) -> Iterator[str]:
        """Where outputs go, as far as the description says; `found`: also those that are in the work directory."""
        job, site = self.description, self._transfers.site
        for file in (each for declared in job.output_data for each in _spellings(declared)):
            for name in self._names(file, found):
                with suppress(InvalidJob):
                    delivery = plan_delivery(file, name, job, site)
                    yield from (place.url for place in (*delivery.targets, *delivery.failover))
        with suppress(InvalidJob):
            place = sandbox_directory(job, site) if job.output_sandbox else ""
            for file in job.output_sandbox:
                for name in self._names(file, found):
                    yield join_url(place, base_name(name))
                    yield join_url(place, f"{base_name(name)}.tar")

    def _names(self, file: OutputFile, found: bool) -> set[str]:
        names = set() if MAGIC & set(file.pattern) else {file.pattern}
        if found:
            with suppress(OSError, ValueError):
                self._files.reopen()
                for name in self._files.matches(file.pattern):
                    names |= set(self._files.files_below(name)) if self._files.is_directory(name) else {name}
        return names

    async def _deliver(self, deliveries: Sequence[Delivery], early: EarlyOutputs | None = None) -> None:
        parts = None
        if self._leftovers is not None:
            await self._leftovers.begin()
            await self._leftovers.delivering(deliveries)
            parts = self._leftovers.parts
        await self._transfers.deliver(
            deliveries, self._files, _Recorder(self._handle, FileStagedOut, self.writes_behind), early, parts=parts
        )

    # -- the same for both ---------------------------------------------------------------------------------------

    async def _fetch(self, files: Sequence[InputFile]) -> None:
        if self._workdir_continued:
            files = await to_thread.run_sync(self._without_those_here, files)
        if files:
            known = await self._transfers.lookup(lfns_of(files))
            fetches = plan_fetches(files, known, self._transfers.site)
            recorder = _Recorder(self._handle, FileStagedIn, self.writes_behind)
            await self._transfers.fetch(fetches, self._files, recorder)

    def _without_those_here(self, files: Sequence[InputFile]) -> list[InputFile]:
        """Those that an earlier agent has not brought already."""
        arrived = {file.name: self._handle.life.staged_in(file.name) for file in files}
        return [
            file
            for file in files
            if (there := arrived[file.name]) is None or self._files.seen_size(file.name) != there.size_bytes
        ]

    async def _take_out(
        self,
        files: Sequence[OutputFile],
        of_directory: Callable[[str], Iterable[str]],
        delivery: Callable[[OutputFile, str], Delivery],
        early: EarlyOutputs | None = None,
    ) -> None:
        """Deliver what the patterns stand for, each name once. What cannot go keeps nothing else from going."""

        def look() -> tuple[dict[str, OutputFile], dict[str, str], dict[str, str], list[int | None]]:
            found, missing, refused = self._expand(files, of_directory)
            return found, missing, refused, [self._files.seen_size(self._archives.get(name, name)) for name in found]

        found, missing, refused, sizes = await briefly(look)
        planned = [
            replace(delivery(file, name), file=self._archives.get(name), size_bytes=size)
            for (name, file), size in zip(found.items(), sizes, strict=True)
        ]
        planned = [each for each in planned if self._sent_before.isdisjoint((each.name, at.url) for at in each.targets)]
        deliveries, colliding = without_collisions(planned, self._delivered)
        refused |= colliding
        for name, reason in (*missing.items(), *refused.items()):
            await self._handle.record(OutputMissing, name, reason)
        problems = [f"{name}: {reason}" for name, reason in refused.items()]
        try:
            await self._deliver(deliveries, early)
        except StagingFailed as exc:
            problems += exc.problems
        if problems:
            raise StagingFailed("cannot deliver", problems)

    async def _take_out_packed(self, sandbox_format: SandboxFormat) -> None:
        """Deliver the output sandbox as one archive. What cannot be in it keeps nothing else from going."""
        from loadmaster.staging.sandbox import pack_sandbox  # as above

        site, files = self._transfers.site, self.description.output_sandbox
        limit = site.sandbox_limit_bytes if site.sandbox_store is not None else None
        found, missing, refused = await to_thread.run_sync(self._expand, files, self._pack)
        problems: list[str] = []
        try:
            if found:
                packed = await to_thread.run_sync(
                    pack_sandbox, self._files, list(found), sandbox_format, limit, self._archives
                )
                missing |= dict.fromkeys(packed.gone, NOT_MADE)
                refused |= dict(packed.left_out)
                if packed.files:
                    await self._deliver_archive(packed)
        except StagingFailed as exc:
            problems = list(exc.problems)
        for name, reason in (*missing.items(), *refused.items()):
            await self._handle.record(OutputMissing, name, reason)
        problems += [f"{name}: {reason}" for name, reason in refused.items()]
        if problems:
            raise StagingFailed("cannot deliver", problems)

    async def _deliver_archive(self, packed: Packed) -> None:
        """Take the archive to the place of sandboxes; if that is not for it, to where output data go, as DIRAC does."""
        job, site = self.description, self._transfers.site
        wanted = Replica(join_url(sandbox_directory(job, site), packed.name))
        if packed.oversize:
            limit = site.sandbox_limit_bytes
            problems = [f"{packed.name}: has {packed.size_bytes:,} bytes, and the sandbox store takes {limit:,}"]
        else:
            try:
                await self._deliver([Delivery(packed.name, (wanted,), file=packed.file)])
            except StagingFailed as exc:
                problems = list(exc.problems)
            else:
                return
        try:
            delivery = plan_delivery(OutputFile(pattern=packed.name), packed.name, job, site)
            if wanted in delivery.targets:
                raise StagingFailed("cannot deliver", problems)
            await self._deliver([replace(delivery, file=packed.file)])
        except InvalidJob as exc:
            raise StagingFailed("cannot deliver", [f"{'; '.join(problems)}; as output data: {exc}"]) from exc
        except StagingFailed as exc:
            raise StagingFailed("cannot deliver", list(dict.fromkeys((*problems, *exc.problems)))) from exc
        await self.report("OutputSandbox", "Sandbox uploaded to grid storage")
        await self.report("OutputSandboxLFN", delivery.lfn or delivery.targets[0].url)

    def _expand(
        self, files: Sequence[OutputFile], of_directory: Callable[[str], Iterable[str]]
    ) -> tuple[dict[str, OutputFile], dict[str, str], dict[str, str]]:
        """The names that patterns stand for; the patterns without any; what may not leave. The last two with reasons."""
        self._files.reopen()
        found: dict[str, OutputFile] = {}
        missing: dict[str, str] = {}
        refused: dict[str, str] = {}
        for file, name in self._matches(files, missing):
            try:
                inside = of_directory(name) if self._files.is_directory(check_local_name(name)) else (name,)
                for each in inside:
                    found.setdefault(check_local_name(each), file)
            except OSError as exc:
                refused[ascii(name)[1:-1]] = exc.strerror or str(exc)
            except StagingFailed as exc:
                refused[name] = str(exc)
            except ValueError as exc:  # the payload chose this name
                refused[ascii(name)[1:-1]] = str(exc)
        return found, missing, refused

    def _matches(self, files: Sequence[OutputFile], missing: dict[str, str]) -> Iterator[tuple[OutputFile, str]]:
        for file in files:
            for each in _spellings(file):
                names = self._files.matches(each.pattern)
                if names:
                    break
            else:
                missing[each.pattern] = NOT_MADE if self.outcome is not None else "no payload has run"
            for name in names:
                yield each, name

    def _pack(self, directory: str) -> Iterable[str]:
        from loadmaster.staging.parts import part_name  # as above
        from loadmaster.staging.sandbox import pack

        archive = f"{directory}.tar"
        if self._files.matches(archive):
            raise NotDeliverable(f"the payload has made a file {archive} too")
        folder, slash, last = archive.rpartition("/")
        # Not under its name, which patterns would find, and which would be in the way when the step is tried again.
        left_out = pack(self._files, directory, hidden := f"{folder}{slash}{part_name(last)}")
        self._archives[archive] = hidden
        yield archive
        if left_out:
            raise NotDeliverable("; ".join(f"{name}: {reason}" for name, reason in left_out))


def _spellings(file: OutputFile) -> Iterator[OutputFile]:
    """The output as it is declared; and by its last part, if it is declared by an LFN alone: payloads make it so, too."""
    yield file
    if file.target == f"LFN:/{file.pattern}" and "/" in file.pattern:
        yield file.model_copy(update={"pattern": file.pattern.rpartition("/")[2]})


class _Recorder:
    """Turns what a staging says into the job's events."""

    def __init__(self, handle: JobHandle, arrived: type[FileStagedIn | FileStagedOut], behind: bool) -> None:
        self._handle = handle
        self._say = handle.note if behind else handle.record
        self._arrived = arrived

    @property
    def wants_progress(self) -> bool:
        return self._handle.followed

    async def staged(self, file: StoredFile) -> None:
        await self._say(self._arrived, file)

    async def failed_over(self, file: StoredFile, wanted: str) -> None:
        await self._handle.record(FailoverRequested, file, wanted)

    async def unregistered(self, file: StoredFile, reason: str) -> None:
        await self._handle.record(RegistrationRequested, file, reason)

    async def missing(self, name: str, reason: str) -> None:
        await self._handle.record(OutputMissing, name, reason)

    def progress(self, name: str, url: str, done_bytes: int, size_bytes: int | None) -> None:
        self._handle.offer(TransferProgress, name, url, done_bytes, size_bytes)

    def overall(self, direction: Direction, overall: Overall) -> None:
        self._handle.offer(
            StagingProgress, direction.value, overall.done_files, overall.files, overall.done_bytes,
            overall.size_bytes, overall.bytes_per_second, overall.seconds_left,
        )  # fmt: skip

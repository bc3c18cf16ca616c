"""What can go wrong, and who is meant to catch it.

LoadmasterError
├── JobError            the job ends; never leaves `run_job`, it becomes `JobResult.failure`
│   ├── InvalidJob, StagingFailed, HookFailed, PayloadNotStarted, PayloadFailed, LimitExceeded, JobWasKilled,
│   │   PayloadLost
│   └── HookVerdict     what a hook may say: SkipPayload, RescheduleJob, HoldJob, RetryHook
├── StorageError        one transfer failed; `retryable` says whether the same may succeed later
│   └── NotFound, AccessDenied, NoSpace, AlreadyExists, CannotCopy, ChecksumMismatch, StorageUnavailable
├── InvalidSite         the site's configuration cannot be used
└── RuntimeFault        we can no longer keep our promises; `run_job` raises it
    └── WorkdirFault, JournalFault, IllegalEvent, PayloadHeld, NodeClosed, NodeFull
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta


class LoadmasterError(Exception):
    """Everything this package raises on purpose."""


class JobError(LoadmasterError):
    """Fails the job. A hook raises it (or a subclass) to say why; the message reaches the user."""


class InvalidJob(JobError):
    """The description cannot describe a job; the message names every field at fault."""


class StagingFailed(JobError):
    """Files could not be brought in or taken out; `problems` has one line per file."""

    def __init__(self, what: str, problems: Sequence[str] = ()) -> None:
        super().__init__(f"{what}: " + "; ".join(problems) if problems else what)
        self.what = what
        self.problems = tuple(problems)


class HookFailed(JobError):
    """A coordinator's hook raised something that is not a verdict, or returned nonsense."""


class PayloadNotStarted(JobError):
    """The payload could not be started: no such executable, no slot it fits, no place for its output."""


class PayloadFailed(JobError):
    """The payload ended with a status other than 0."""


class LimitExceeded(JobError):
    """The payload was stopped because it used more than it may; the message is the verdict's."""


class JobWasKilled(JobError):
    """Somebody ordered the job to end; the message is their reason."""


class PayloadLost(JobError):
    """What this attempt has computed is gone, with an agent that died or what held its payload, and runs no more.

    Ends as Rescheduled with the failure kind `PayloadLost`: the next attempt is begun by the node, or by whoever gave it
    the job.
    """


class HookVerdict(JobError):
    """What a hook may say besides returning. Raise one of the subclasses."""


class SkipPayload(HookVerdict):
    """Nothing needs to be computed: no payload is started, the outputs that exist are staged out, the job is Done."""


class RescheduleJob(HookVerdict):
    """This attempt is over and the job should run again, elsewhere or later."""


class HoldJob(HookVerdict):
    """This attempt is over and nobody should run the job again before a person has looked.

    Ends as Rescheduled with the failure kind `HoldJob`, for the workload system to act on.
    """


class RetryHook(HookVerdict):
    """Call the same hook again after a while; the wait holds no slot."""

    def __init__(
        self, after: timedelta | float = timedelta(seconds=10), reason: str = "the hook asked to be called again"
    ) -> None:
        """`after`: a timedelta, or seconds."""
        super().__init__(reason)
        self.after = after if isinstance(after, timedelta) else timedelta(seconds=after)


class StorageError(LoadmasterError):
    """One transfer or look-up failed at `url`.

    `retryable`: the same request may succeed later. `retry_after`: not before so many seconds, when the storage said so.
    """

    retryable = False

    def __init__(self, url: str, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(f"{url}: {message}")
        self.url = url
        self.retry_after = retry_after


class NotFound(StorageError):
    """There is no such file."""


class AccessDenied(StorageError):
    """The file is there, or could be, but not for us."""


class NoSpace(StorageError):
    """The disk, or the quota, is full."""


class AlreadyExists(StorageError):
    """There is such a file with other content, and files with a logical name never change."""


class CannotCopy(StorageError):
    """The server does not copy this file by itself, or says too little of the copy: its bytes have to pass through us."""


class ChecksumMismatch(StorageError):
    """The bytes that passed are not the ones that were promised."""

    retryable = True


class StorageUnavailable(StorageError):
    """The storage did not do what it should; it may later."""

    retryable = True


class InvalidBundle(LoadmasterError):
    """A bundle cannot be used, or not for this part of its job; the message says what to do instead."""


class InvalidSite(LoadmasterError):
    """The site's configuration cannot be used; the message names the file and the field."""


class RuntimeFault(LoadmasterError):
    """The runtime can no longer keep its promises; the embedding program has to act."""


class WorkdirFault(RuntimeFault):
    """A work directory could not be made, locked or removed."""


class JournalFault(RuntimeFault):
    """The journal cannot be opened, belongs to another agent, or did not take an event."""


class IllegalEvent(RuntimeFault):
    """An event that cannot follow the ones before it: a bug in the runtime or a damaged history."""


class PayloadHeld(RuntimeFault):
    """A payload that was to be adopted has an agent, or is somewhere we cannot see it; nothing was done to it."""


class NodeClosed(RuntimeFault):
    """The node takes no more jobs; or it was left before a job had ended, which then has no result."""


class NodeFull(RuntimeFault):
    """As many jobs wait as the node lets wait."""

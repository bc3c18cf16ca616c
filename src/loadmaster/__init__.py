"""loadmaster: run a batch job's life inside your event loop. See README.md; start with `run_job`."""

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from loadmaster.coordinator import Coordinator, JobExecutionCoordinator, JobInFlight
    from loadmaster.description import (
        ComputingElement,
        Containment,
        InputFile,
        Isolation,
        JobDescription,
        Limits,
        OutputFile,
        PayloadSpec,
    )
    from loadmaster.errors import (
        HoldJob,
        HookFailed,
        InvalidJob,
        InvalidSite,
        JobError,
        JobWasKilled,
        JournalFault,
        LimitExceeded,
        LoadmasterError,
        NodeClosed,
        NodeFull,
        PayloadFailed,
        PayloadLost,
        PayloadNotStarted,
        RescheduleJob,
        RetryHook,
        RuntimeFault,
        SkipPayload,
        StagingFailed,
        StorageError,
        WorkdirFault,
    )
    from loadmaster.handle import JobHandle, Journal
    from loadmaster.ledger import Ledger, Slot, Slots
    from loadmaster.node import Node
    from loadmaster.occupancy import NodeStatistics
    from loadmaster.result import Failure, JobResult, PayloadOutcome, Status, StoredFile, Verdict
    from loadmaster.runner import run_job
    from loadmaster.site import Site
    from loadmaster.sources import JobSource
    from loadmaster.staging.engine import Transfers, open_transfers
    from loadmaster.world import World

__all__ = [
    "ComputingElement",
    "Containment",
    "Coordinator",
    "Failure",
    "HoldJob",
    "HookFailed",
    "InputFile",
    "InvalidJob",
    "InvalidSite",
    "Isolation",
    "JobDescription",
    "JobError",
    "JobExecutionCoordinator",
    "JobHandle",
    "JobInFlight",
    "JobResult",
    "JobSource",
    "JobWasKilled",
    "Journal",
    "JournalFault",
    "Ledger",
    "LimitExceeded",
    "Limits",
    "LoadmasterError",
    "Node",
    "NodeClosed",
    "NodeFull",
    "NodeStatistics",
    "OutputFile",
    "PayloadFailed",
    "PayloadLost",
    "PayloadNotStarted",
    "PayloadOutcome",
    "PayloadSpec",
    "RescheduleJob",
    "RetryHook",
    "RuntimeFault",
    "Site",
    "SkipPayload",
    "Slot",
    "Slots",
    "StagingFailed",
    "Status",
    "StorageError",
    "StoredFile",
    "Transfers",
    "Verdict",
    "WorkdirFault",
    "World",
    "open_transfers",
    "run_job",
]

_HOMES: Final[dict[str, tuple[str, ...]]] = {
    "coordinator": (
        "Coordinator",
        "JobExecutionCoordinator",
        "JobInFlight",
    ),
    "description": (
        "ComputingElement",
        "Containment",
        "InputFile",
        "Isolation",
        "JobDescription",
        "Limits",
        "OutputFile",
        "PayloadSpec",
    ),
    "errors": (
        "HoldJob",
        "HookFailed",
        "InvalidJob",
        "InvalidSite",
        "JobError",
        "JobWasKilled",
        "JournalFault",
        "LimitExceeded",
        "LoadmasterError",
        "NodeClosed",
        "NodeFull",
        "PayloadFailed",
        "PayloadLost",
        "PayloadNotStarted",
        "RescheduleJob",
        "RetryHook",
        "RuntimeFault",
        "SkipPayload",
        "StagingFailed",
        "StorageError",
        "WorkdirFault",
    ),
    "handle": (
        "JobHandle",
        "Journal",
    ),
    "ledger": (
        "Ledger",
        "Slot",
        "Slots",
    ),
    "node": ("Node",),
    "occupancy": ("NodeStatistics",),
    "result": (
        "Failure",
        "JobResult",
        "PayloadOutcome",
        "Status",
        "StoredFile",
        "Verdict",
    ),
    "runner": ("run_job",),
    "site": ("Site",),
    "sources": ("JobSource",),
    "staging.engine": (
        "Transfers",
        "open_transfers",
    ),
    "world": ("World",),
}
"""Where the names are. A module is loaded when somebody asks for one of its names: a command, or a pilot of one job, starts
with what it uses and no more."""

_HOME_OF: Final = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = found  # asked once
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

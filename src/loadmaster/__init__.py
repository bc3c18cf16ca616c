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

_PLACES: Final = {
    "coordinator": "Coordinator JobExecutionCoordinator JobInFlight",
    "description": "ComputingElement Containment InputFile Isolation JobDescription Limits OutputFile PayloadSpec",
    "errors": (
        "HoldJob HookFailed InvalidJob InvalidSite JobError JobWasKilled JournalFault LimitExceeded "
        "LoadmasterError NodeClosed NodeFull PayloadFailed PayloadLost PayloadNotStarted RescheduleJob "
        "RetryHook RuntimeFault SkipPayload StagingFailed StorageError WorkdirFault"
    ),
    "handle": "JobHandle Journal",
    "ledger": "Ledger Slot Slots",
    "result": "Failure JobResult PayloadOutcome Status StoredFile Verdict",
    "runner": "run_job",
    "site": "Site",
    "staging.engine": "Transfers open_transfers",
    "world": "World",
    "node": "Node",
    "occupancy": "NodeStatistics",
    "sources": "JobSource",
}
"""Where they are. They are loaded when somebody asks for them, a third of a second for all: the command hears an interrupt
meanwhile, and a pilot of one job starts without what it does not use."""


def __getattr__(name: str) -> object:
    for place, names in _PLACES.items():
        if name in names.split():
            found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{place}"), name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

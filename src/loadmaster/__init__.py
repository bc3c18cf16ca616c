"""loadmaster: run a batch job's life inside your event loop. See README.md; start with `run_job`."""

import importlib
from typing import TYPE_CHECKING, Final

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
from loadmaster.result import Failure, JobResult, PayloadOutcome, Status, StoredFile, Verdict
from loadmaster.runner import run_job
from loadmaster.site import Site
from loadmaster.staging.engine import Transfers, open_transfers
from loadmaster.world import World

if TYPE_CHECKING:
    from loadmaster.node import Node
    from loadmaster.occupancy import NodeStatistics
    from loadmaster.sources import JobSource

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

_WHEN_USED: Final = {"Node": "node", "NodeStatistics": "occupancy", "JobSource": "sources"}
"""Names that are loaded when somebody asks for them: a pilot of one job starts without them."""


def __getattr__(name: str) -> object:
    if name not in _WHEN_USED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHEN_USED[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

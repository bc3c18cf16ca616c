"""What DIRAC keeps of a job besides its status: its parameters, under the names its pages show. Sizes are in MB of 2**20."""

from __future__ import annotations

import os
import pwd
import socket
from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from math import isfinite
from pathlib import Path
from typing import Any, Final

from loadmaster.description import ComputingElement
from loadmaster.dirac.words import Minor, limit_word
from loadmaster.events import (
    ComputingEnded,
    Event,
    FailoverRequested,
    FileStagedIn,
    FileStagedOut,
    JobAccepted,
    JobFinished,
    OutputMissing,
    ParameterReported,
    PayloadExited,
    PayloadStarted,
    RegistrationRequested,
    SlotGranted,
)
from loadmaster.names import base_name, is_lfn
from loadmaster.result import Failure, PayloadOutcome, Phase, StoredFile

Value = str | int | float

MEGABYTE: Final = 2**20

BATCH_JOB_IDS: Final = ("LSB_JOBID", "PBS_JOBID", "QSUB_REQNAME", "JOB_ID", "SLURM_JOB_ID")
"""Where batch systems say what they call us; the last one that is there counts, as with DIRAC (which does not ask Slurm)."""


class Parameters:
    """The parameters of one attempt, one event after the other."""

    def __init__(
        self, ce: ComputingElement | None = None, *, agent: str = "loadmaster", pid: int | None = None
    ) -> None:
        """`agent`: what runs the job, with its version; `pid`: of the process that does."""
        self._ce = ce or ComputingElement()
        self._agent = agent
        self._pid = pid
        self._job: Mapping[str, Any] = {}
        self._cores = 1
        self._inputs: set[str] = set()
        self._uploaded: dict[str, None] = {}
        self._sent: set[str] = set()
        self._lacking: dict[str, None] = {}

    def advance(self, event: Event) -> dict[str, Value]:
        """What an event adds, or changes; often nothing."""
        return {name: value for name, value in self._said(event).items() if _is_finite(value)}

    def _said(self, event: Event) -> Mapping[str, Value]:
        match event:
            case JobAccepted(description=description):
                self._job = description
                return self._of_the_pilot()
            case FileStagedIn(file=file):
                self._inputs.add(file.name)
            case SlotGranted(cores=cores):
                self._cores = cores
            case PayloadStarted(pid=pid):
                return {"PayloadPID": pid}
            case PayloadExited(outcome=outcome):
                return self._of_the_payload(outcome)
            case ParameterReported(name=name, value=value):
                return {name: value}
            case ComputingEnded(failure=failure):
                return self._of_a_failure(failure)
            case FileStagedOut(file=file) | FailoverRequested(file=file) | RegistrationRequested(file=file):
                self._keep(file)
            case OutputMissing(name=name):
                if "*" not in name and self._declared("output_sandbox", name):
                    self._lacking[base_name(name)] = None
            case JobFinished(failure=failure):
                return self._of_the_outputs(failure)
        return {}

    def _of_the_pilot(self) -> dict[str, Value]:
        ce, local = self._ce, self._ce.extra.get("LocalSE")
        return {
            **({"Pilot_Reference": str(ce.extra["PilotReference"])} if "PilotReference" in ce.extra else {}),
            **({"AgentLocalSE": ",".join(map(str, local)) if isinstance(local, list) else str(local)} if local else {}),
            **({"CPUNormalizationFactor": ce.cpu_normalization_factor} if _is_given(ce) else {}),
            "PilotAgent": self._agent,
            **({"JobWrapperPID": self._pid} if self._pid is not None else {}),
        }

    def _of_the_payload(self, outcome: PayloadOutcome) -> dict[str, Value]:
        """As DIRAC has it: CPU as measured, wall time by the cores of the slot, both also by the core's factor."""
        factor, wall = self._ce.cpu_normalization_factor, outcome.wall_seconds * self._cores
        said: dict[str, Value] = {
            "LastUpdateCPU(s)": outcome.cpu_seconds,
            "TotalCPUTime(s)": outcome.cpu_seconds,
            "NormCPUTime(s)": outcome.cpu_seconds * factor,
            "WallClockTime(s)": wall,
            "ScaledCPUTime(s)": wall * factor,
        }
        if outcome.peak_memory_bytes is not None:
            said["MemoryUsed(MB)"] = outcome.peak_memory_bytes / MEGABYTE
        if outcome.verdict is not None:
            said["ApplicationError"] = limit_word(outcome.verdict)
        elif outcome.exit_code is None and outcome.signal is None:
            said["ApplicationError"] = Minor.APP_THREAD_NOT_COMPLETE.value
        return said

    def _of_a_failure(self, failure: Failure | None) -> dict[str, Value]:
        if failure is None or failure.kind in {"PayloadFailed", "LimitExceeded", "RescheduleJob", "HoldJob"}:
            return {}
        if failure.kind == "StagingFailed" and failure.phase is Phase.STAGE_IN:
            wanted = [file for file in self._job.get("input_data", ()) if file["name"] not in self._inputs]
            lfns = [file["source"] for file in wanted if is_lfn(file["source"])]
            missing = (
                {"MissingLFNs": "\n".join(f"{lfn} Problem: it was not brought in" for lfn in lfns)} if lfns else {}
            )
            return {**missing, "Error Message": failure.message}
        return {"Error Message": failure.message}

    def _of_the_outputs(self, failure: Failure | None) -> dict[str, Value]:
        said: dict[str, Value] = {}
        if self._lacking:
            said["OutputSandboxMissingFiles"] = ", ".join(self._lacking)
        if self._uploaded:
            said["UploadedOutputData"] = ", ".join(self._uploaded)
        if failure is not None:
            said["Error Message"] = failure.message
            patterns = [file["pattern"] for file in self._job.get("output_data", ())]
            missing = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in self._sent)]
            if missing:
                said["OutputData"] = f"MissingFiles: {', '.join(missing)}"
        return said

    def _keep(self, file: StoredFile) -> None:
        if self._declared("output_data", file.name):
            self._sent.add(file.name)
        if file.lfn is not None:
            self._uploaded[file.lfn] = None

    def _declared(self, field: str, name: str) -> bool:
        return any(name == file["pattern"] or fnmatchcase(name, file["pattern"]) for file in self._job.get(field, ()))


def node_parameters(environ: Mapping[str, str]) -> dict[str, Value]:
    """What DIRAC's watchdog says of the node at the start: from /proc and the pilot's environment. Blocks."""
    said: dict[str, Value] = {"HostName": socket.gethostname(), "LocalAccount": _account()}
    with suppress(OSError, StopIteration, ValueError):
        said["Memory(MB)"] = int(_field(Path("/proc/meminfo"), "MemAvailable").split()[0]) // 1024
    with suppress(OSError, StopIteration):
        said["ModelName"] = _field(Path("/proc/cpuinfo"), "model name")
    for variable in BATCH_JOB_IDS:
        if environ.get(variable):
            said["LocalJobID"] = environ[variable]
    return said


def _field(file: Path, name: str) -> str:
    with file.open(encoding="utf-8") as lines:
        return next(line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name)


def _account() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # in containers there may be nobody of that number
        return str(os.getuid())


def _is_given(ce: ComputingElement) -> bool:
    return "cpu_normalization_factor" in ce.model_fields_set


def _is_finite(value: Value) -> bool:
    """Others have no JSON; the server would refuse all that came with it."""
    return not isinstance(value, float) or isfinite(value)

"""What is left to be done elsewhere, as a request of DIRAC's request system (the JSON that its ReqManager takes)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final
from uuid import NAMESPACE_URL, uuid5

from loadmaster.description import JobDescription
from loadmaster.dirac.words import JobStatus
from loadmaster.events import Event, FailoverRequested, RegistrationRequested
from loadmaster.result import StoredFile
from loadmaster.site import Site

DELAY: Final = timedelta(minutes=45)
"""A request is not to be worked on earlier than so long after the job (DIRAC's FailoverRequestDelay): what is down now
needs some time."""

FILES_PER_OPERATION: Final = 10_000
"""DIRAC takes no more in one operation."""

TIME_FORMAT: Final = "%Y-%m-%d %H:%M:%S"

CATALOG: Final = "FileCatalog"
"""DIRAC's own."""

STATUS_SERVICE: Final = "WorkloadManagement/JobStateUpdate"

_UNFIT = re.compile(r'[ .(){}:"]')
"""What DIRAC takes out of a job's name before it is part of a request's."""


class Kind(StrEnum):
    """What an operation does."""

    REPLICATE_AND_REGISTER = "ReplicateAndRegister"
    REGISTER_FILE = "RegisterFile"
    REMOVE_REPLICA = "RemoveReplica"
    REMOVE_FILE = "RemoveFile"
    FORWARD_DISET = "ForwardDISET"


@dataclass(frozen=True, slots=True)
class RequestFile:
    """A file an operation is about."""

    lfn: str
    """Without `LFN:`."""
    pfn: str = ""
    size_bytes: int | None = None
    checksum: str = ""
    """`<algorithm>:<digits>`."""
    guid: str = ""
    """One is made up of the name and the checksum, always the same, when there is none: a registration needs it."""

    @classmethod
    def of(cls, file: StoredFile) -> RequestFile:
        """The file that has been stored. Raises ValueError when it has no logical name: then nothing can be asked."""
        if file.lfn is None:
            raise ValueError(f"{file.url}: has no logical name")
        return cls(file.lfn, file.url, file.size_bytes, file.checksum)


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing to be done."""

    kind: Kind
    files: tuple[RequestFile, ...] = ()
    target_se: str = ""
    source_se: str = ""
    catalog: str = ""
    arguments: str = ""


def move(file: RequestFile, *, source_se: str, target_se: str) -> tuple[Operation, ...]:
    """A file that is at a failover storage to where it was wanted, and away from there."""
    return (
        Operation(Kind.REPLICATE_AND_REGISTER, (file,), target_se=target_se, source_se=source_se),
        Operation(Kind.REMOVE_REPLICA, (file,), target_se=source_se),
    )


def register(file: RequestFile, *, se: str, catalog: str = CATALOG) -> Operation:
    """A file that is stored, into the catalog that could not be told."""
    return Operation(Kind.REGISTER_FILE, (file,), target_se=se, catalog=catalog)


def forward_status(job_id: str, said: Iterable[tuple[datetime, JobStatus]], *, source: str = "JobWrapper") -> Operation:
    """What was to be said of a job and could not be: the call is made later, by the request system."""
    entries: dict[str, Any] = {}
    for time, status in said:
        moment = time
        while (key := moment.strftime("%Y-%m-%d %H:%M:%S.%f")) in entries:  # the times are keys, and order
            moment += timedelta(microseconds=1)
        entries[key] = status.to_dirac(source)
    call = ((STATUS_SERVICE, {"timeout": 120}), "setJobStatusBulk", [int(job_id), entries, False])
    return Operation(Kind.FORWARD_DISET, arguments=encode(call))


def failover_operations(events: Iterable[Event], site: Site) -> list[Operation]:
    """The operations of everything that is safe, but elsewhere than asked for, or not in the catalog. What has no logical
    name is left out: DIRAC cannot move it."""
    operations: list[Operation] = []
    for event in events:
        if isinstance(event, FailoverRequested | RegistrationRequested) and event.file.lfn is not None:
            at, file = event.file.storage_element or element_of(event.file.url, site), RequestFile.of(event.file)
            if isinstance(event, FailoverRequested):
                operations += move(file, source_se=at, target_se=element_of(event.wanted, site))
            else:
                operations.append(register(file, se=at))
    return operations


def element_of(url: str, site: Site) -> str:
    """The storage element a URL is at: the one whose place is the longest that it begins with; else its URL itself."""
    at = [
        (len(base), name)
        for name, base in site.storage_elements.items()
        if f"{url}/".startswith(f"{base.rstrip('/')}/")
    ]
    return max(at)[1] if at else url


def request_json(
    operations: Sequence[Operation],
    job: JobDescription,
    *,
    now: datetime,
    stored: Iterable[Mapping[str, Any]] = (),
    delay: timedelta = DELAY,
) -> dict[str, Any]:
    """The request of a job: its own operations, and after them those of requests the payload has left (`stored`, which
    are the contents of its `*_request.json`). `now` is in UTC. Raises ValueError when a stored one has no operations."""
    created = now.strftime(TIME_FORMAT)
    every = [_operation(operation, created) for each in operations for operation in _in_bites(each)]
    for request in stored:
        theirs = request.get("Operations")
        if not isinstance(theirs, list) or not all(isinstance(each, dict) for each in theirs):
            raise ValueError(f"{request.get('RequestName', 'a stored request')}: has no list of operations")
        every += [{**each, "Order": 0} for each in theirs]
    for order, operation in enumerate(every):
        operation |= {"Order": order, "Status": "Queued" if order else "Waiting"}
    return {
        "RequestName": request_name(job),
        "JobID": int(job.job_id) if job.job_id.isdecimal() else 0,
        "SourceComponent": f"Job_{job.job_id}",
        "Owner": job.owner or "",
        "OwnerGroup": job.owner_group or "",
        "Status": "Waiting",
        "Error": None,
        "CreationTime": created,
        "SubmitTime": created,
        "LastUpdate": created,
        "NotBefore": (now + delay).strftime(TIME_FORMAT),
        "Operations": every,
    }


def request_name(job: JobDescription) -> str:
    """`<job name>_job_<id>`, the name without what DIRAC takes out of it."""
    name = _UNFIT.sub("", job.job_name)
    return f"{name}_job_{job.job_id}" if name else f"job_{job.job_id}"


def digest(request: Mapping[str, Any]) -> str:
    """The text of the parameter PendingRequest: the request's name, and a line for each operation."""
    lines = [f"Name:{request['RequestName']}"]
    for operation in request["Operations"]:
        files = operation.get("Files") or []
        more = f"...+<{len(files) - 1} files>" if len(files) > 1 else ""
        parts = [operation["Type"], operation["Type"], operation["Status"], str(operation["Order"])]
        parts += [operation[key] for key in ("TargetSE", "Catalog") if operation.get(key)]
        lines.append(":".join(parts + ([f"{files[0]['LFN']}{more}"] if files else [])))
    return "\n".join(lines)


def _in_bites(operation: Operation) -> list[Operation]:
    files, most = operation.files, FILES_PER_OPERATION
    if len(files) <= most:
        return [operation]
    bites = (files[at : at + most] for at in range(0, len(files), most))
    op = operation
    return [Operation(op.kind, each, op.target_se, op.source_se, op.catalog, op.arguments) for each in bites]


def _operation(operation: Operation, created: str) -> dict[str, Any]:
    return {
        "Type": operation.kind.value,
        "Status": "Queued",
        "Order": 0,
        "TargetSE": operation.target_se or None,
        "SourceSE": operation.source_se or None,
        "Catalog": operation.catalog or None,
        "Arguments": operation.arguments or None,
        "Error": None,
        "CreationTime": created,
        "SubmitTime": created,
        "LastUpdate": created,
        "Files": [_file(file) for file in operation.files],
    }


def _file(file: RequestFile) -> dict[str, Any]:
    algorithm, _, digits = file.checksum.rpartition(":")
    return {
        "LFN": file.lfn,
        "PFN": file.pfn or None,
        "Size": file.size_bytes or 0,
        "Checksum": digits or None,
        "ChecksumType": (algorithm or "adler32").upper() if digits else None,
        "GUID": file.guid or str(uuid5(NAMESPACE_URL, f"{file.lfn} {file.checksum}")).upper(),
        "Status": "Waiting",
        "Attempt": 0,
        "Error": None,
    }


def encode(value: object) -> str:
    """A value as DIRAC writes the arguments of a call that is forwarded: the kind, then the content.

    Takes None, bool, int, float, str, list, tuple and dict of these; raises TypeError for others.
    """
    match value:
        case None:
            return "n"
        case bool():
            return f"b{int(value)}"
        case int():
            return f"i{value}e"
        case float():
            return f"f{value!r}e"
        case str():
            return f"s{len(str(value).encode())}:{value}"
        case list() | tuple():
            return f"{'l' if isinstance(value, list) else 't'}{''.join(map(encode, value))}e"
        case dict():
            return f"d{''.join(encode(key) + encode(each) for key, each in value.items())}e"
        case _:
            raise TypeError(f"{type(value).__name__}: DIRAC has no code for it")

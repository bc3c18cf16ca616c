"""What both wrappers find when a case begins, and what is to be seen when it is over. Standard library only: it is run by
DIRAC's interpreter, and by ours."""

from __future__ import annotations

import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

VO = "vo"
LOCAL_SE = ("SE-USER-A",)
ELEMENTS = ("SE-USER-A", "SE-USER-B", "FAILOVER", "SandboxSE")


def elements(case: dict[str, Any]) -> tuple[str, ...]:
    """The names of the storage elements there are."""
    return ELEMENTS


def build(case: dict[str, Any], root: Path) -> None:
    """Storage elements with the case's files in them, and a place to work in."""
    (root / "work").mkdir(parents=True)
    for name in elements(case):
        element = root / "se" / name
        element.parent.mkdir(exist_ok=True)
        if name in case.get("down", ()):
            element.write_text("a file, where a directory has to be")
        else:
            element.mkdir()
    for lfn, replicas in case.get("replicas", {}).items():
        for name, content in replicas.items():
            if content is not None:
                file = root / "se" / name / lfn[1:]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(content)
    for path, members in case.get("sandboxes", {}).items():
        file = root / "se" / "SandboxSE" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(file, "w:bz2") as archive:
            for name, content in members.items():
                put(archive, name, content)


def put(archive: tarfile.TarFile, name: str, content: Any) -> None:
    """One member of an archive: a text, or the members of an archive in it."""
    if isinstance(content, dict):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as inner:
            for each, text in content.items():
                put(inner, each, text)
        data = buffer.getvalue()
    else:
        data = content.encode()
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    archive.addfile(member, io.BytesIO(data))


def files_below(directory: Path, root: Path) -> dict[str, str]:
    """The files of a directory, by their names, with their contents."""
    if not directory.is_dir():
        return {}
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            found[str(path.relative_to(directory))] = content_of(path, root)
    return found


def content_of(path: Path, root: Path) -> str:
    """A file's text with the names of temporary directories taken out; of what is long, or is not text, a digest."""
    if path.is_symlink() or not path.is_file():
        return "not a file"
    data = path.read_bytes()
    try:
        if len(data) > 4000:
            raise ValueError
        return data.decode().replace(str(root), "<root>")
    except ValueError:
        if tarfile.is_tarfile(path):
            with tarfile.open(path) as archive:
                return f"archive of {sorted(member.name for member in archive if member.isfile())}"
        return f"{len(data)} bytes, adler32 {zlib.adler32(data):08x}"


def stored(case: dict[str, Any], root: Path) -> dict[str, str]:
    """What has come to the storage elements: `SE: /lfn`, and its content."""
    there = {f"{name}:{lfn}" for lfn, replicas in case.get("replicas", {}).items() for name in replicas}
    there |= {f"SandboxSE:/{path}" for path in case.get("sandboxes", {})}
    found = {}
    for name in elements(case):
        for path, content in files_below(root / "se" / name, root).items():
            if f"{name}:/{path}" not in there:
                found[f"{name}:/{path}"] = content
    return found


NUMBERS = {
    "JobWrapperPID", "PayloadPID", "Memory(MB)", "MemoryUsed(MB)", "DiskSpace(MB)", "LoadAverage", "LastUpdateCPU(s)",
    "WallClockTime(s)", "ScaledCPUTime(s)", "TotalCPUTime(s)", "NormCPUTime(s)", "CPUTime", "NormCPUTime", "ExecTime",
    "DiskSpace",
}  # fmt: skip
"""Parameters, and fields of accounting, that differ from run to run."""

SOMETIMES = {"DiskSpace(MB)", "MemoryUsed(MB)", "LastUpdateCPU(s)", "LoadAverage"}
"""Parameters that are not reported when they come out as 0, which is a matter of chance."""

NAMES = {"HostName", "LocalAccount", "ModelName", "PilotAgent"}

UNSTEADY = (
    (r"LDSB\.\w+", "LDSB.<random>"),
    (r"\b[0-9a-f]{32}\b", "<md5>"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?", "<time>"),
    (r"\d\d:\d\d:\d\d \(h:m:s\)", "<cpu>"),
    (r"\d+\.\d s @ HEP'06", "<work>"),
    (r"time left \d+s", "time left <seconds>"),
    (r"={20,}", "===="),
)


def steady(value: Any, root: Path, *, measured: bool = False) -> Any:
    """The same without what differs from run to run: numbers that are measured, names of the machine, random ones."""
    if isinstance(value, str):
        value = value.replace(str(root), "<root>").replace(str(root)[1:], "<root>")
        for pattern, word in UNSTEADY:
            value = re.sub(pattern, word, value)
        return value
    if isinstance(value, dict):
        found = {}
        if any(re.search(r"LDSB|tar\.bz2", str(name)) for name in value.get("stored", ())):  # there are times in it
            for each in (*value["registered"].values(), *value["accounting"]):
                each |= dict.fromkeys(each.keys() & {"Size", "Checksum", "OutputDataSize"}, "<number>")
        if "<root>" in json.dumps(value.get("sandboxes", ())):  # and so is the length of that
            for each in value["accounting"]:
                each["OutputSandBoxSize"] = "<number>"
        for name, item in value.items():
            if measured and name in SOMETIMES:
                continue
            known = "<number>" if name in NUMBERS else "<name>" if name in NAMES else None
            inside = measured or name in {"parameters", "accounting"}
            found[steady(name, root)] = known if known and measured else steady(item, root, measured=inside)
        return found
    if isinstance(value, list | tuple):
        return [steady(item, root, measured=measured) for item in value]
    return value


def folded(updates: Iterable[dict[str, str]]) -> list[list[str]]:
    """Where a job stood after each report, as its owner sees it: (Status, MinorStatus, ApplicationStatus), each once."""
    now = {"Status": "", "MinorStatus": "", "ApplicationStatus": ""}
    found: list[list[str]] = []
    for update in updates:
        now |= {name: update[name] for name in now if name in update}
        if not found or found[-1] != list(now.values()):
            found.append(list(now.values()))
    return found


def request_of(request: dict[str, Any]) -> dict[str, Any]:
    """What is asked for in a request; when it was made is left out."""
    operations = [
        {name: value for name, value in operation.items() if value and name in {"Type", "SourceSE", "TargetSE", "Catalog"}}
        | {"Files": [{name: value for name, value in file.items() if value and name not in {"Status", "GUID"}}
                     for file in operation["Files"]]}
        for operation in request["Operations"]
    ]  # fmt: skip
    return {
        **{name: request[name] for name in ("RequestName", "JobID", "SourceComponent", "Owner", "OwnerGroup")},
        "delayed": request["NotBefore"] > request["CreationTime"],
        "Operations": operations,
    }


def speakers(texts: Iterable[str]) -> list[str]:
    """Who has sent last lines of a payload in a heartbeat: the wrapper, its watchdog. What comes before any is left out."""
    return sorted({who for text in texts for who in re.findall(r"application output from (\w+) on", text)})


def hooks(file: Path) -> list[dict[str, Any]]:
    """What the coordinators have said of being called."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def environment(files: dict[str, str]) -> dict[str, str]:
    """What `env -0` has written to a file `environment`, which is taken out of the files; names of the suite left out."""
    found = re.findall(r"([^=\0]+)=([^\0]*)\0", files.pop("environment", ""))
    return {name: value for name, value in sorted(found) if not name.startswith(("PARITY_", "PYTEST_"))}

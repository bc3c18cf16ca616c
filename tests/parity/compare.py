"""Two answers to one case as flat facts, and where they differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

NOTHING: Final = "-"
"""What stands for a fact that is not there."""


def facts(answer: Mapping[str, Any]) -> dict[str, str]:
    """What is compared, each fact under a name of its own: `stored.SE-USER-A:/vo/...`, `environment.PATH`."""
    if "refused" in answer:
        return {"refused": answer["refused"]}
    return dict(_facts(answer))


def _facts(answer: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "end", "/".join(answer["statuses"][-1]).rstrip("/") if answer["statuses"] else NOTHING
    yield "statuses", " > ".join("/".join(each).rstrip("/") for each in answer["statuses"]) or NOTHING
    yield "exit code", str(answer["exit_code"])
    yield "rescheduled", str(bool(answer["rescheduled"]))
    yield "workdir left", str(answer["workdir_left"])
    yield "hooks", " ".join(each["hook"] for each in answer["hooks"]) or NOTHING
    for each in answer["hooks"]:
        for name, value in each.items():
            if name in {"job", "ce"} and isinstance(value, Mapping):
                yield from ((f"given.{name}.{key}", repr(given)) for key, given in value.items() if key != "Diary")
            elif name == "names":
                names = [variable for variable in value if not variable.startswith(("PARITY_", "PYTEST_"))]
                yield from ((f"given.environment.{variable}", "yes") for variable in names)
            elif name != "hook":
                yield f"{each['hook']}.{name}", str(value)
    for name, value in answer["parameters"].items():
        yield (
            f"parameter.{name}",
            _text(value) if name != "UploadedOutputData" else ", ".join(sorted(value.split(", "))),
        )
    for sandbox in answer["sandboxes"]:
        if twice := sorted({name for name in sandbox["members"] if sandbox["members"].count(name) > 1}):
            yield "sandbox twice", " ".join(twice)
        for name, content in sandbox["files"].items():
            yield f"sandbox.{name}", content
    for place, content in answer["stored"].items():
        yield f"stored.{place}", content
    for lfn, entry in answer["registered"].items():
        yield f"registered.{lfn}", f"{entry['Size']} bytes, {entry['Checksum']}, at {entry['SE']}"
    for name, content in answer["files"].items():
        yield from _job_info(content) if name == "job.info" else [(f"file.{name}", content)]
    for name, value in answer["environment"].items():
        yield f"environment.{name}", value
    yield from _reports(answer)


def _job_info(text: str) -> Iterator[tuple[str, str]]:
    """Its words, and its form."""
    yield "job.info", "each line with /Job/" if text.count("\n/Job/") else "the first line with /Job"
    for line in text.splitlines():
        word, _, value = line.removeprefix("/Job/").removeprefix("/").partition(" = ")
        yield f"job.info.{word}", value


def _reports(answer: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What services are told besides statuses."""
    for name, value in answer["heartbeats"].items():
        yield f"heartbeat.{name}", " | ".join(value) if isinstance(value, list) else value
    yield "accounting", str(len(answer["accounting"]))
    for record in answer["accounting"]:
        yield from ((f"accounting.{name}", _text(value)) for name, value in record.items())
    for request in answer["requests"]:
        for name in ("RequestName", "JobID", "SourceComponent", "Owner", "OwnerGroup", "delayed"):
            yield f"request.{name}", str(request[name])
        for number, operation in enumerate(request["Operations"]):
            yield f"request.{number}", json.dumps(operation, sort_keys=True)


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Of every fact on which two answers differ: DIRAC's, and ours."""
    one, other = facts(theirs), facts(ours)
    if "refused" in other:
        return {"refused": (one["end"], other["refused"])}
    names = [*one, *(name for name in other if name not in one)]
    return {
        name: (one.get(name, NOTHING), other.get(name, NOTHING))
        for name in names
        if one.get(name, NOTHING) != other.get(name, NOTHING)
    }

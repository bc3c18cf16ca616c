"""DIRAC's dictionaries of jobs and computing elements to our words, and back without loss."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any, Final

from anyio import to_thread

from loadmaster.description import DIRAC_KEYS, ComputingElement, InputFile, JobDescription, OutputFile
from loadmaster.errors import InvalidJob

OWN_KEY: Final = "Loadmaster"
"""The key of a job's dictionary that has what DIRAC has no words for, in ours."""

JOB_INFO: Final = "job.info"


def split_wrapper_file(data: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The job's and the computing element's dictionaries of a DIRAC wrapper file `{"Job": {...}, "CE": {...}}`.

    A bare job description comes back with an empty computing element. Raises `InvalidJob`.
    """
    if "Job" not in data:
        return data, {}
    job, ce = data["Job"], data.get("CE") or {}
    for name, part in (("Job", job), ("CE", ce)):
        if not isinstance(part, Mapping):
            raise InvalidJob(f"{name}: {type(part).__name__} where an object {{...}} is expected")
    return job, ce


def from_dirac(data: Mapping[str, Any]) -> tuple[JobDescription, ComputingElement]:
    """The job and the computing element of a wrapper file, or of a job's dictionary alone. Raises `InvalidJob`.

    Files in the words of `to_dirac` count while they agree with DIRAC's: a tool that has changed those is believed. The
    newer spelling of the soft stop (`StopSigFinishWork`) is in CPU work, which is seconds on a core of this element.
    """
    words, ce_words = split_wrapper_file(data)
    ce = ComputingElement.load(ce_words)
    own = words.get(OWN_KEY) or {}
    if not isinstance(own, Mapping):
        raise InvalidJob(f"{OWN_KEY}: is not an object {{...}}")
    theirs = {key: value for key, value in words.items() if key != OWN_KEY} | _soft_stop(words, ce)
    job = _with(theirs, own)
    spelled = job.to_dirac()
    changed = {field for field in own if field in DIRAC_KEYS and _differs(spelled, theirs, DIRAC_KEYS[field])}
    return (_with(theirs, {field: own[field] for field in own if field not in changed}) if changed else job), ce


def to_dirac(job: JobDescription, ce: ComputingElement | None = None) -> dict[str, Any]:
    """The wrapper file of a job: `{"Job": {...}, "CE": {...}}`. `from_dirac` makes the same job of it."""
    words = job.to_dirac()
    own = job.model_dump(mode="json", include=_not_diracs(job), exclude_unset=True)
    return {"Job": words | ({OWN_KEY: own} if own else {}), "CE": (ce or ComputingElement()).to_dirac()}


def _with(words: Mapping[str, Any], own: Mapping[str, Any]) -> JobDescription:
    replaced = {DIRAC_KEYS[field] for field in own if field in DIRAC_KEYS}
    return JobDescription.load({key: value for key, value in words.items() if key not in replaced} | dict(own))


def _differs(ours: Mapping[str, Any], theirs: Mapping[str, Any], key: str) -> bool:
    return key in theirs and ours.get(key) != theirs[key]


def _not_diracs(job: JobDescription) -> set[str]:
    """The fields of a job that DIRAC has no words for, or that say more than its words do."""
    fields = {field for field in JobDescription.model_fields if field not in DIRAC_KEYS and field != "extra"}
    for field in ("input_sandbox", "input_data"):
        if any(file != InputFile.model_validate(file.source) for file in getattr(job, field)):
            fields.add(field)
    for field in ("output_sandbox", "output_data"):
        if any(file != OutputFile.model_validate(file.target or file.pattern) for file in getattr(job, field)):
            fields.add(field)
    return fields & job.model_fields_set


def _soft_stop(words: Mapping[str, Any], ce: ComputingElement) -> dict[str, Any]:
    """The seconds of a soft stop that is given in the newer words of DIRAC's."""
    if DIRAC_KEYS["stop_seconds"] in words or "stop_seconds" in words:
        return {}
    try:
        work = float(words.get("StopSigFinishWork") or 0)
    except (TypeError, ValueError) as exc:
        raise InvalidJob(f"StopSigFinishWork: {exc}") from exc
    return {"stop_seconds": work / ce.cpu_normalization_factor} if work else {}


# -- what a payload finds ------------------------------------------------------------------------------------------


def environment(job: JobDescription, ce: ComputingElement) -> dict[str, str]:
    """The variables a DIRAC payload finds in its environment, besides JOBID."""
    return {
        "DIRACJOBID": job.job_id,
        "DIRACSITE": ce.site,
        "DIRAC_PROCESSORS": str(ce.extra.get("Processors") or ce.number_of_processors or job.number_of_processors),
        "DIRAC_WHOLENODE": str(bool(ce.extra.get("WholeNode", job.whole_node))),
        "DIRAC_JOB_PROCESSORS": str(job.number_of_processors),
    }


def payload_environment(job: JobDescription, ce: ComputingElement, env: Mapping[str, str]) -> dict[str, str]:
    """An environment with DIRAC's variables, where it has none of the name; what DIRAC's installation has put aside of
    LD_LIBRARY_PATH, if the site lets that through, is appended."""
    complete = {**environment(job, ce), **env}
    if saved := complete.get("LD_LIBRARY_PATH_SAVE"):
        own = complete.get("LD_LIBRARY_PATH")
        complete["LD_LIBRARY_PATH"] = f"{own}:{saved}" if own else saved
    return complete


def payload_command(job: JobDescription, ce: ComputingElement, command: str) -> str:
    """The command, with the options that DIRAC's `dirac-jobexec` is given; of other executables as it is."""
    if "dirac-jobexec" not in job.executable:
        return command
    options = {
        "CPUNormalizationFactor": str(ce.cpu_normalization_factor),
        "Site": ce.site,
        "GridCE": ce.name,
        "CEQueue": str(ce.extra.get("Queue") or ce.queue),
        **({"RemoteExecution": "True"} if ce.extra.get("SubmissionPolicy") == "Application" else {}),
    }
    given = (f"-o {quote(f'/LocalSite/{name}={value}')}" for name, value in options.items())
    return f"{command} {' '.join(given)} "


def job_info(job: JobDescription) -> str:
    """The text of the file `job.info`: a line `/Job/<key> = <value>` for each word of the description."""
    return "".join(_lines(job.to_dirac(), "/Job"))


async def write_job_info(job: JobDescription, workdir: Path) -> None:
    """Write `job.info` into a work directory, if nothing of that name is there. Raises OSError."""
    await to_thread.run_sync(_write_new, workdir / JOB_INFO, job_info(job))


def _write_new(path: Path, text: str) -> None:
    with suppress(FileExistsError), os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "w") as file:
        file.write(text)


def _lines(words: Mapping[str, Any], above: str) -> list[str]:
    lines: list[str] = []
    for key, value in words.items():
        if isinstance(value, Mapping):
            lines += _lines(value, f"{above}/{key}")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            lines.append(f"{above}/{key} = {text}\n")
    return lines

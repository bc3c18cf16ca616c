"""What is asked: jobs, where they run, payloads, limits. Frozen values, checked where they enter.

A description is written in snake_case or in DIRAC's keys; `DIRAC_KEYS` is the one table of both spellings. DIRAC's
tolerances apply to either: a string where a list is meant, `;` between items, numbers as strings.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Self
from urllib.parse import quote

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from loadmaster.declared import InputFile, InputFiles, OutputFile, OutputFiles, refuse_collisions
from loadmaster.fields import (
    Amounts,
    Bytes,
    Environment,
    JobId,
    LocalName,
    MaybeComponent,
    Mebibytes,
    Names,
    Seconds,
    Text,
    comma_items,
    command_line,
    no_nul,
    none_for_zero,
)
from loadmaster.names import SANDBOX_PREFIX, check_local_name, is_lfn, is_url, parse_lfn
from loadmaster.payloadspec import Containment, Isolation, PayloadSpec
from loadmaster.thresholds import Limits
from loadmaster.wording import CE_KEYS, DIRAC_KEYS, DIRAC_STAND_INS, complaints, field_names
from loadmaster.words import Words

__all__ = [
    "CE_KEYS",
    "DIRAC_KEYS",
    "DIRAC_STAND_INS",
    "RESCHEDULE_EXIT_CODE",
    "Bytes",
    "ComputingElement",
    "Containment",
    "InputFile",
    "Isolation",
    "JobDescription",
    "Limits",
    "LocalName",
    "MaybeComponent",
    "Names",
    "OutputFile",
    "PayloadSpec",
    "Seconds",
    "Words",
    "complaints",
    "field_names",
]

RESCHEDULE_EXIT_CODE: Final = 222
"""A payload that ends with it asks to be rescheduled (DIRAC's EWMSRESC, 1502, seen through 8 bits)."""


def _new_job_id() -> str:
    return f"local-{os.urandom(4).hex()}"


class JobDescription(Words):
    """What a user asked for. Build it from keywords, or from a dictionary with `load`. Either raises `InvalidJob` that names
    every field at fault."""

    what = "job description"

    model_config = ConfigDict(defer_build=False)  # while we are imported, not in somebody's event loop

    job_id: JobId = Field(default_factory=_new_job_id)
    job_name: Text = ""
    job_type: Text = "User"
    owner: MaybeComponent = None
    owner_group: Text | None = None
    vo: MaybeComponent = None

    executable: Annotated[Text, Field(min_length=1)]
    """A path, the name of an input, or a name looked up in PATH."""
    arguments: Annotated[str, BeforeValidator(command_line), AfterValidator(no_nul)] = ""
    """A piece of shell that follows the executable; a list is quoted into one."""
    environment: Environment = Field(default_factory=dict)

    input_sandbox: InputFiles = ()
    input_data: InputFiles = ()
    output_sandbox: OutputFiles = ()
    output_data: OutputFiles = ()
    output_se: Names = ()
    """Storage elements by name, or directories by URL or path, in order of preference."""
    output_path: Text | None = None
    std_output: LocalName = Field(default="std.out", validate_default=True)
    std_error: LocalName = Field(default="std.err", validate_default=True)
    """May be the same file as the standard output."""

    cpu_work: Seconds | None = Field(default=None, ge=0)
    """CPU time the user foresees, in seconds of a core whose normalization factor is 1 (DIRAC's CPUTime); 0: unknown."""
    priority: int = 0
    """A higher one is granted a slot before a lower one."""
    number_of_processors: int = Field(default=1, ge=1)
    """The least it runs with."""
    max_number_of_processors: Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(none_for_zero)] = None
    """It may be given more than the least, up to so many, where they are free when its turn comes."""
    whole_node: Annotated[bool, BeforeValidator(lambda value: False if value == "" else value)] = False
    """All cores, memory and GPUs of the node, and nobody beside it."""
    number_of_gpus: int = Field(default=0, ge=0)
    memory_mb: Mebibytes | None = Field(default=None, ge=1)
    disk_bytes: Bytes | None = Field(default=None, ge=0)
    """What its files take on the node's disk at most, for its whole stay."""
    resources: Amounts = Field(default_factory=dict)
    """Other things the node has so many of, under names of the site's: `{"licences": 1}`."""
    tags: Annotated[tuple[Text, ...], BeforeValidator(comma_items)] = ()
    """DIRAC's: `WholeNode` is `whole_node`, `GPU` is one GPU where no number is given; the others have served their
    purpose when the job was matched, `MultiProcessor` and `8Processors` too: the numbers say it."""
    limits: Limits = Limits.model_construct()  # as `Limits()`, which would build a schema of its own
    stop_pattern: Annotated[str, Field(max_length=1000)] | None = None
    """Soft stop: the payload's processes whose command line this regular expression is found in get `stop_signal`, once,
    `stop_seconds` before a limit of wall time, CPU time or the deadline is reached, and first of all when the job is
    killed. A payload that then ends with 128 + the signal's number, or by the signal, has succeeded (as in DIRAC)."""
    stop_signal: int = Field(default=2, ge=1, le=64)
    stop_seconds: Seconds = Field(default=1800.0, ge=0)

    @classmethod
    def _keys(cls) -> Mapping[str, str]:
        return DIRAC_KEYS

    @model_validator(mode="before")
    @classmethod
    def _stand_ins(cls, data: object) -> object:
        if not isinstance(data, Mapping):
            return data
        found = dict(data)
        for field, others in DIRAC_STAND_INS.items():
            if field not in data and DIRAC_KEYS[field] not in data:
                said = [data[key] for key in others if data.get(key) not in (None, 0, "0", "")]
                found |= {field: said[0]} if said else {}
        return found

    @field_validator("max_number_of_processors")
    @classmethod
    def _not_less(cls, most: int | None, info: ValidationInfo) -> int | None:
        least = info.data.get("number_of_processors", 1)
        if most is not None and most < least:
            raise ValueError(f"{most} is less than the {least} it needs")
        return most

    @field_validator("stop_pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        """An empty one is none: DIRAC writes that when there is no soft stop."""
        if not pattern:
            return None
        try:
            re.compile(pattern)
        except re.error as exc:
            raise ValueError(f"{pattern!r} is not a regular expression: {exc}") from exc
        return pattern

    @field_validator("output_path")
    @classmethod
    def _output_path(cls, path: str | None) -> str | None:
        if path is None or not path:
            return None
        if is_lfn(path):
            return f"LFN:{parse_lfn(path.rstrip('/'))}"
        if is_url(path):
            return path
        check_local_name(path.strip("/"))
        return path

    @field_validator("output_sandbox")
    @classmethod
    def _after_the_payload(cls, files: tuple[OutputFile, ...]) -> tuple[OutputFile, ...]:
        """A sandbox is delivered whatever comes of the job: there is nothing to hold back."""
        if early := next((file for file in files if file.leaves != "after"), None):
            raise ValueError(f"{early.pattern}: only output_data can leave on_close")
        return files

    @field_validator("input_sandbox", "input_data", "std_output", "std_error")
    @classmethod
    def _no_collisions(cls, value: tuple[InputFile, ...] | str, info: ValidationInfo) -> tuple[InputFile, ...] | str:
        """No two files have one name in the work directory, no file is also a directory, no input is one of the logs."""
        taken = [file.name for key in ("input_sandbox", "input_data") for file in info.data.get(key, ())]
        if isinstance(value, str):
            logs = {value, info.data.get("std_output", value)}
            refuse_collisions([*taken, *logs])
        else:
            refuse_collisions([*taken, *(file.name for file in value)])
        return value

    def words(self) -> dict[str, Any]:
        """The description as JSON's types, for `load`: what was set, also to what is the default, and what is not the
        default. Coordinators of DIRAC's kind read what was set."""
        # The id apart: to know its default, pydantic would make one.
        words = {"job_id": self.job_id} | self.model_dump(mode="json", exclude_defaults=True, exclude={"job_id"})
        usual = self.model_fields_set - words.keys()
        return self.model_dump(mode="json", include=usual) | words if usual else words

    def relative_to(self, directory: Path, *, outputs: Path) -> Self:
        """The same job with the relative paths of its inputs taken from one directory, and of its targets from another.

        A name among the storage elements is taken for a path when it begins with a dot: `./results`.
        """

        def anchored(file: InputFile) -> InputFile:
            plain = not (is_lfn(file.source) or is_url(file.source) or file.source.startswith(("/", SANDBOX_PREFIX)))
            return file.model_copy(update={"source": str(directory / file.source)}) if plain else file

        def placed(target: str) -> str:
            """Of a path that ends in a slash, which stands for a directory, the slash is kept."""
            slash = "/" if target.endswith("/") else ""
            return (
                os.path.normpath(outputs / target) + slash
                if target.startswith(("./", "../")) or target == "."
                else target
            )

        return self.model_copy(
            update={
                "input_sandbox": tuple(map(anchored, self.input_sandbox)),
                "input_data": tuple(map(anchored, self.input_data)),
                "output_se": tuple(map(placed, self.output_se)),
                "output_data": tuple(
                    file.model_copy(update={"target": placed(file.target)}) if file.target else file
                    for file in self.output_data
                ),
            }
        )

    def to_dirac(self) -> dict[str, Any]:
        """The same in DIRAC's keys and shapes: files as strings, a number for a numeric JobID."""
        words = super().to_dirac()
        numeric = self.job_id.isdecimal() and str(int(self.job_id)) == self.job_id  # 007 would come back as 7
        words["JobID"] = int(self.job_id) if numeric else self.job_id
        if "environment" in self.model_fields_set:
            words["ExecutionEnvironment"] = [
                f"{name}={quote(value, safe='', errors='surrogateescape')}" for name, value in self.environment.items()
            ]
        for key in ("input_sandbox", "input_data"):
            if files := getattr(self, key):
                words[DIRAC_KEYS[key]] = [file.source for file in files]
        for key in ("output_sandbox", "output_data"):
            if files := getattr(self, key):
                words[DIRAC_KEYS[key]] = [file.target or file.pattern for file in files]
        return words


class ComputingElement(Words):
    """Where the job runs: what the pilot knows of its node, queue and site. Raises `InvalidJob` as `JobDescription` does."""

    what = "computing element"

    model_config = ConfigDict(defer_build=False)

    site: Text = ""
    name: Text = ""
    queue: Text = ""
    number_of_processors: int | None = Field(default=None, ge=1)
    number_of_gpus: int | None = Field(default=None, ge=0)
    memory_mb: Mebibytes | None = Field(default=None, ge=1)
    cpu_normalization_factor: float = Field(default=1.0, gt=0)
    cpu_work_left: Seconds | None = Field(default=None, ge=0)

    @classmethod
    def _keys(cls) -> Mapping[str, str]:
        return CE_KEYS

"""What is asked: jobs, where they run, payloads, limits. Frozen values, checked where they enter.

A description is written in snake_case or in DIRAC's keys; `DIRAC_KEYS` is the one table of both spellings. DIRAC's
tolerances apply to either: a string where a list is meant, `;` between items, numbers as strings.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path, PurePath, PurePosixPath
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Final, Literal, Self
from urllib.parse import quote, unquote

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from loadmaster.errors import InvalidJob
from loadmaster.names import SANDBOX_PREFIX, base_name, check_local_name, is_lfn, is_url, parse_lfn
from loadmaster.units import bytes_of, mib_of, seconds_of

RESCHEDULE_EXIT_CODE: Final = 222
"""A payload that ends with it asks to be rescheduled (DIRAC's EWMSRESC, 1502, seen through 8 bits)."""

DIRAC_KEYS: Final[Mapping[str, str]] = {
    "job_id": "JobID",
    "job_name": "JobName",
    "job_type": "JobType",
    "owner": "Owner",
    "owner_group": "OwnerGroup",
    "vo": "VirtualOrganization",
    "executable": "Executable",
    "arguments": "Arguments",
    "environment": "ExecutionEnvironment",
    "input_sandbox": "InputSandbox",
    "input_data": "InputData",
    "output_sandbox": "OutputSandbox",
    "output_data": "OutputData",
    "output_se": "OutputSE",
    "output_path": "OutputPath",
    "std_output": "StdOutput",
    "std_error": "StdError",
    "cpu_work": "CPUTime",
    "priority": "Priority",
    "number_of_processors": "NumberOfProcessors",
    "max_number_of_processors": "MaxNumberOfProcessors",
    "whole_node": "WholeNode",
    "number_of_gpus": "NumberOfGPUs",
    "memory_mb": "Memory",
    "tags": "Tags",
    "stop_pattern": "StopSigRegex",
    "stop_signal": "StopSigNumber",
    "stop_seconds": "StopSigFinishSeconds",
}
"""Our field, DIRAC's key. Any other key that begins with a capital is kept as it is and offered to the coordinator."""

DIRAC_STAND_INS: Final[Mapping[str, tuple[str, ...]]] = {
    "number_of_processors": ("MinNumberOfProcessors",),
    "memory_mb": ("MaxRAM", "MinRAM"),
    "tags": ("Tag",),
}
"""Keys of DIRAC's that count, the first that is there and not 0, where the field itself is not given; they stay in
`extra` as they came."""

CE_KEYS: Final[Mapping[str, str]] = {
    "site": "Site",
    "name": "GridCE",
    "queue": "CEQueue",
    "number_of_processors": "NumberOfProcessors",
    "number_of_gpus": "NumberOfGPUs",
    "memory_mb": "MaxRAM",
    "cpu_normalization_factor": "CPUNormalizationFactor",
    "cpu_work_left": "CPUTimeLeft",
}


def _items(value: object) -> object:
    """DIRAC's lists: a `;`-separated string, one thing, or a list; blanks, which its tools leave there, do not count."""
    if isinstance(value, str):
        return [item.strip() for item in value.split(";") if item.strip()]
    if isinstance(value, Mapping):
        return [value]
    if isinstance(value, list | tuple):
        return [item for item in value if not (isinstance(item, str) and not item.strip())]
    return value


def _none_for_zero(value: object) -> object:
    """DIRAC's 0 is no maximum."""
    return None if value in (0, "0", "") else value


def _tags(value: object) -> object:
    """DIRAC's tags: its optimizers join them with commas."""
    return _items(value.replace(",", ";") if isinstance(value, str) else value)


def _environment(value: object) -> object:
    """DIRAC's ExecutionEnvironment: `NAME=urlencoded` items; a value ends at a second `=`, as there."""
    if isinstance(value, Mapping):
        return value
    items = _items(value)
    if not isinstance(items, Iterable):
        return value
    variables = {}
    for item in items:
        name, separator, text = str(item).partition("=")
        if not separator:
            raise ValueError(f"{item!r} is not NAME=value")
        variables[name.strip()] = unquote(text.partition("=")[0].strip(), errors="surrogateescape")
    return variables


def _command_line(value: object) -> object:
    """Arguments are a piece of shell, as DIRAC's; a list is quoted into one."""
    return shlex.join(map(str, value)) if isinstance(value, list | tuple) else value


def _variable_name(name: str) -> str:
    if not name or "=" in name or not name.isprintable() or name != name.strip():  # NUL cannot be printed, nor halves
        raise ValueError(f"{name!r} cannot be the name of an environment variable")
    return name


def _variable_value(value: object) -> str:
    if not isinstance(value, str | int | float | PurePath):
        raise ValueError("is not a string")  # noqa: TRY004 - what pydantic collects
    return _no_nul(str(value))


def _no_nul(text: str) -> str:
    """What the operating system can be given: no NUL, and nothing UTF-8 has no bytes for (JSON can spell both)."""
    if "\0" in text:
        raise ValueError("may not have a NUL character in it")
    try:
        text.encode(errors="surrogateescape")
    except UnicodeEncodeError as exc:
        raise ValueError(f"has {text[exc.start]!r} in it, half of a character") from exc
    return text


def _one_part(name: str) -> str:
    if "/" in name:
        raise ValueError(f"{name!r}: may not have a '/' in it")
    return name


# Validators of the value as it is, not as it came, have to be `After`: a check before the blanks are taken off sees
# " .." and lets it pass.
Text = Annotated[
    str, BeforeValidator(lambda value: value.strip() if isinstance(value, str) else value), AfterValidator(_no_nul)
]
LocalName = Annotated[Text, AfterValidator(check_local_name)]
Component = Annotated[LocalName, AfterValidator(_one_part)]
"""One part of a logical name."""

MaybeComponent = Annotated[
    Component | None, BeforeValidator(lambda value: None if isinstance(value, str) and not value.strip() else value)
]
Environment = Annotated[
    dict[
        Annotated[str, BeforeValidator(lambda name: _variable_name(str(name)))],
        Annotated[str, BeforeValidator(_variable_value)],
    ],
    BeforeValidator(_environment),
]


class Containment(StrEnum):
    """What holds a payload's processes together; docs/containment.md says what gets away from each."""

    PID_NAMESPACE = "pid-namespace"
    CGROUP = "cgroup"
    SUBREAPER = "subreaper"
    SESSION = "session"


class Isolation(StrEnum):
    """What a payload sees of the node, beyond what its containment takes away; docs/containment.md says what is left."""

    NONE = "none"
    NAMESPACES = "namespaces"
    BUBBLEWRAP = "bubblewrap"
    APPTAINER = "apptainer"


class Words(BaseModel):
    """What all descriptions share: frozen, two spellings, unknown capitalised keys kept in `extra`."""

    # Not built here, nor the parts of a description below: it is built with all of them, once.
    model_config = ConfigDict(
        defer_build=True, frozen=True, extra="forbid", coerce_numbers_to_str=True, str_strip_whitespace=False,
        allow_inf_nan=False,
    )  # fmt: skip

    extra: dict[str, JsonValue] = Field(default_factory=dict)
    """DIRAC's keys that have no field here, as they came."""

    what: ClassVar[str] = "description"
    """What it is called where it cannot be understood."""

    @classmethod
    def _keys(cls) -> Mapping[str, str]:
        return {}

    @model_validator(mode="wrap")
    @classmethod
    def _in_our_words(cls, data: Any, build: ModelWrapValidatorHandler[Self]) -> Self:
        """Made from keywords or from a dictionary, it is refused with the same error."""
        try:
            return build(data)
        except ValidationError as exc:
            raise InvalidJob(f"{cls.what}: {'; '.join(complaints(exc, data, cls._keys(), field_names(cls)))}") from exc

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> Self:
        """The description in a dictionary, ours or DIRAC's. Raises `InvalidJob` that names every field at fault."""
        return cls.model_validate(data)

    @model_validator(mode="before")
    @classmethod
    def _spellings(cls, data: object) -> object:
        if not isinstance(data, Mapping):
            return data
        ours = {dirac: field for field, dirac in cls._keys().items()}
        fields: dict[str, Any] = {}
        extra = data.get("extra") or {}
        if not isinstance(extra, Mapping):
            raise ValueError("extra: is not a dictionary")  # noqa: TRY004 - what pydantic collects
        extra = dict(extra)
        for key, value in data.items():
            if key == "extra":
                continue
            field = ours.get(str(key), str(key))
            if field in fields:
                raise ValueError(f"{field} and {cls._keys().get(field)} are the same field, given twice")
            if field in cls.model_fields:
                fields[field] = value
            elif str(key)[:1].isupper():
                extra[str(key)] = value
            else:
                fields[field] = value  # refused below, by name
        if hidden := next((key for key in extra if key in ours), None):
            raise ValueError(f"extra.{hidden}: has a field of its own, {ours[hidden]}")
        return {**fields, "extra": extra}

    def to_dirac(self) -> dict[str, Any]:
        """The same in DIRAC's keys, unknown ones included: what was given, also where it is what it would be otherwise."""
        values = self.model_dump(exclude={"extra"}, exclude_unset=True, exclude_none=True, mode="json")
        return {**self.extra, **{dirac: values[field] for field, dirac in self._keys().items() if field in values}}


CHECKSUM: Final = (
    r"^(?i:(adler32:)?[0-9a-f]{1,8}|crc32c:[0-9a-f]{8}|md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}|1220[0-9a-f]{64}|"
    r"d50110[0-9a-f]{32})$"
)
"""The spellings of a checksum, as `storage.checksums` reads them."""

ADLER32: Final = "^[0-9a-fA-F]{1,8}$"


class InputFile(BaseModel):
    """One file the payload needs: where it is, and what it is called in the work directory."""

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid")

    source: Text
    """`LFN:/vo/...`, a URL, a plain path, or `SB:<storage element>|<path>`."""
    name: LocalName = ""
    """Its name in the work directory; the last part of the source when not given."""
    size_bytes: Bytes | None = Field(default=None, ge=0)
    adler32: str | None = Field(default=None, pattern=ADLER32)
    checksum: str | None = Field(default=None, pattern=CHECKSUM)
    """`<algorithm>:<digits>` (adler32, crc32c, md5, sha256), the digits of an adler32, or a multihash."""
    arrives: Literal["before", "during"] = "before"
    """Whether the payload is started when it is there, or finds it in the work directory some time later, whole."""

    @model_validator(mode="after")
    def _one_checksum(self) -> Self:
        if self.adler32 is not None and self.checksum is not None:
            raise ValueError("adler32 and checksum: give one of them")
        return self

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: object) -> object:
        data = {"source": data} if isinstance(data, str) else data
        if isinstance(data, Mapping) and isinstance(data.get("source"), str) and not data.get("name"):
            source = data["source"].strip()
            data = {**data, "source": source, "name": base_name(source)}
        return data

    @field_validator("source")
    @classmethod
    def _readable(cls, source: str) -> str:
        if is_lfn(source):
            return f"LFN:{parse_lfn(source)}"
        if source.startswith(SANDBOX_PREFIX):
            check_local_name(source.partition("|")[2].lstrip("/"))
        if not source:
            raise ValueError("is empty")
        return source


class OutputFile(BaseModel):
    """One output, or a pattern of them: what it is called in the work directory, and where it goes."""

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid")

    pattern: Text
    """A name in the work directory; `*`, `?` and `[]` match as in a shell, a directory means all files in it."""
    target: Text | None = None
    """`LFN:/...`, a URL or an absolute path of the file itself; by the job's rules when not given.

    For several files: the directory they go to, or one that ends in a pattern, which their names take the place of.
    """
    leaves: Literal["after", "on_close"] = "after"
    """Whether it is sent when the payload has ended, or already when it closes it; in its place only if the job succeeds."""

    @model_validator(mode="before")
    @classmethod
    def _split(cls, data: object) -> object:
        """`LFN:/vo/x` is the file `vo/x` of the work directory; a plain path or URL is the file of its last part."""
        if not isinstance(data, str):
            return data
        text = data.strip()
        if is_lfn(text):
            return {"pattern": parse_lfn(text)[1:], "target": f"LFN:{parse_lfn(text)}"}
        if is_url(text) or text.startswith("/"):
            return {"pattern": base_name(text), "target": text}
        return {"pattern": text}

    @field_validator("pattern")
    @classmethod
    def _confined(cls, pattern: str) -> str:
        return check_local_name(pattern.removeprefix("./").rstrip("/"))

    @field_validator("target")
    @classmethod
    def _writable(cls, target: str | None) -> str | None:
        if target is None:
            return None
        if is_lfn(target):
            return f"LFN:{parse_lfn(target)}"
        if not is_url(target) and not target.startswith(("/", "./", "../")):
            raise ValueError(f"{target!r} is neither an LFN, nor a URL, nor a path ({'./' + target!r} would be)")
        return target


# Numbers, or texts with a unit: `"2 GB"`, `"5m"`; what is stored is the number.
Bytes = Annotated[int, BeforeValidator(bytes_of)]
Mebibytes = Annotated[int, BeforeValidator(mib_of)]
Seconds = Annotated[float, BeforeValidator(seconds_of)]

InputFiles = Annotated[tuple[InputFile, ...], BeforeValidator(_items)]
OutputFiles = Annotated[tuple[OutputFile, ...], BeforeValidator(_items)]
Names = Annotated[tuple[Text, ...], BeforeValidator(_items)]
Amounts = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[int, Field(ge=0)]], Field(max_length=16)
]
"""Of named things, how many."""
JOB_ID: Final = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"
JobId = Annotated[str, Field(min_length=1, max_length=128, pattern=JOB_ID)]


class Limits(BaseModel):
    """How much a payload may use before it is stopped, all of its processes together; None means no limit."""

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid", allow_inf_nan=False)

    wall_seconds: Seconds | None = Field(default=None, gt=0)
    cpu_seconds: Seconds | None = Field(default=None, gt=0)
    """Of all cores, user and system time."""
    deadline: AwareDatetime | None = None
    """When the whole job has to be over; a time with its zone. The payload is stopped before it, early enough that what
    it has made of its outputs so far can still be delivered: the grace, 30 s, and the time their bytes take."""
    upload_bytes_per_second: Annotated[float, BeforeValidator(bytes_of)] = Field(default=10_000_000.0, gt=0)
    """What that time is reckoned with."""
    memory_bytes: Bytes | None = Field(default=None, gt=0)
    """By proportional size (PSS): pages that processes share count once. Memory nobody has mapped is not seen."""
    processes: int | None = Field(default=None, gt=0)
    workdir_bytes: Bytes | None = Field(default=None, gt=0)
    """Blocks on the disk, inputs included."""
    free_disk_bytes: Bytes | None = Field(default=None, gt=0)
    """The least that must stay free on the disk of the work directory (DIRAC's MinDiskSpace), whoever fills it."""
    output_bytes: Bytes | None = Field(default=None, gt=0)
    """Standard output and error together."""
    cpu_ratio: float | None = Field(default=None, gt=0)
    """The least CPU time per wall time, as a fraction of one core (DIRAC's MinCPUWallClockRatio is 0.05)."""
    cpu_ratio_window_seconds: Seconds = Field(default=1800.0, gt=0)
    """Over how long that is measured (DIRAC's CPUSampleTime)."""
    grace_seconds: Seconds = Field(default=10.0, ge=0, le=600)
    """Between the polite signal (TERM) and the one that cannot be refused (KILL); bounded, for a pilot keeps it too."""


def _refuse_collisions(names: Iterable[str]) -> None:
    """Raise ValueError when these cannot all be files of one directory."""
    files: set[str] = set()
    folders: set[str] = set()
    for name in names:
        above = {str(folder) for folder in PurePosixPath(name).parents[:-1]} if "/" in name else set()
        if name in files:
            raise ValueError(f"two files would be called {name!r} in the work directory; give one another name")
        if clash := ({name} & folders) | (above & files):
            raise ValueError(f"{clash.pop()!r} would be a file and a directory in the work directory")
        files.add(name)
        folders |= above


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
    arguments: Annotated[str, BeforeValidator(_command_line), AfterValidator(_no_nul)] = ""
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
    max_number_of_processors: Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_none_for_zero)] = None
    """It may be given more than the least, up to so many, where they are free when its turn comes."""
    whole_node: Annotated[bool, BeforeValidator(lambda value: False if value == "" else value)] = False
    """All cores, memory and GPUs of the node, and nobody beside it."""
    number_of_gpus: int = Field(default=0, ge=0)
    memory_mb: Mebibytes | None = Field(default=None, ge=1)
    disk_bytes: Bytes | None = Field(default=None, ge=0)
    """What its files take on the node's disk at most, for its whole stay."""
    resources: Amounts = Field(default_factory=dict)
    """Other things the node has so many of, under names of the site's: `{"licences": 1}`."""
    tags: Annotated[tuple[Text, ...], BeforeValidator(_tags)] = ()
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
            _refuse_collisions([*taken, *logs])
        else:
            _refuse_collisions([*taken, *(file.name for file in value)])
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


class PayloadSpec(BaseModel):
    """What `preProcess` decided: the command and its whole environment.

    A `str` goes to `/bin/sh -c`, as DIRAC's does; a sequence is executed as it stands.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    command: str | tuple[str, ...]
    env: Environment = Field(default_factory=dict)

    @field_validator("command")
    @classmethod
    def _executable(cls, command: str | tuple[str, ...]) -> str | tuple[str, ...]:
        words = (command,) if isinstance(command, str) else command
        if not words or not words[0].strip():
            raise ValueError("the command is empty")
        for word in words:
            _no_nul(word)
        return command


RULES: Final[Mapping[str, str]] = {
    JOB_ID: "only letters, digits and . _ + - may be in it, and a letter or a digit comes first",
    CHECKSUM: "a checksum is expected, as adler32:0a1b2c3d, crc32c:..., md5:... or sha256:..., all of its digits",
    ADLER32: "up to 8 hexadecimal digits are expected",
}
"""What patterns mean."""

_A_MOMENT: Final = "a date and a time with its zone are expected, as 2031-12-24T18:00:00Z"
_A_NUMBER: Final = "a number is expected"
_A_WHOLE_NUMBER: Final = "a whole number is expected"
_PLAINER: Final[Mapping[str, str]] = {
    **dict.fromkeys(("datetime_type", "datetime_parsing", "datetime_from_date_parsing", "timezone_aware"), _A_MOMENT),
    **dict.fromkeys(("float_type", "float_parsing"), _A_NUMBER),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), _A_WHOLE_NUMBER),
    "missing": "is missing",
    **dict.fromkeys(("string_too_short", "too_short"), "is empty"),
    "extra_forbidden": "there is no such field",
    "tuple_type": "a list is expected",
    "dict_type": "an object {...} is expected",
    "model_type": "an object {...} is expected",
}
"""What is said in place of pydantic's words, by the kind of error."""


def field_names(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """The fields of a model as they are written, those of its parts too: `limits.wall_seconds`."""
    for name, field in model.model_fields.items():
        yield f"{above}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from field_names(field.annotation, f"{above}{name}.")


def complaints(
    error: ValidationError,
    data: object = None,
    keys: Mapping[str, str] = MappingProxyType({}),
    names: Iterable[str] = (),
) -> list[str]:
    """One line per field at fault, with the spelling that was used: `NumberOfProcessors: Input should be ...`.

    `keys` are the other spellings; a field that is not there is spelled as the others are. `names`: the fields there are,
    of which those like one that is none are told.
    """
    used = set(data) if isinstance(data, Mapping) else set()
    dirac = not used.isdisjoint(keys.values())
    lines = []
    for item in error.errors(include_url=False):
        field, *rest = item["loc"] or ("",)
        stand_in = next((key for key in DIRAC_STAND_INS.get(str(field), ()) if key in used), None)
        spelled = keys.get(str(field), field) if dirac and field not in used else field
        spelled = stand_in if stand_in is not None and spelled not in used else spelled
        where = ".".join(str(part) for part in (spelled, *rest) if part not in {"", "[key]"})
        message = _PLAINER.get(item["type"]) or item["msg"].removeprefix("Value error, ")
        if item["type"] == "string_pattern_mismatch":
            message = RULES.get(item["ctx"]["pattern"], message)
        if item["type"] == "extra_forbidden" and (alike := _alike(where, names)):
            message += f"; there is {', '.join(alike)}"
        lines.append(f"{where}: {message}" if where else message)
    return lines


def _alike(name: str, names: Iterable[str]) -> list[str]:
    """The fields that may have been meant, also those of another part, the likeliest first."""
    from difflib import get_close_matches  # for mistakes only

    last = {each: each.rpartition(".")[2] for each in names}
    close = get_close_matches(name.rpartition(".")[2][:100].lower(), set(last.values()), n=3, cutoff=0.7)
    return [each for word in close for each in last if last[each] == word]

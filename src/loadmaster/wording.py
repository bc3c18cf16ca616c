"""How descriptions are spelled, in our words and in DIRAC's, and what is said of one that cannot be understood."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Final

from pydantic import BaseModel, ValidationError

from loadmaster.fields import ADLER32, CHECKSUM, JOB_ID

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

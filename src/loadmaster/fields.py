"""Kinds of values that descriptions have, and what is tolerated in them: DIRAC's lists, units, texts without traps."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Annotated, Final
from urllib.parse import unquote

from pydantic import AfterValidator, BeforeValidator, Field

from loadmaster.names import check_local_name
from loadmaster.units import bytes_of, mib_of, seconds_of

CHECKSUM: Final = (
    r"^(?i:(adler32:)?[0-9a-f]{1,8}|crc32c:[0-9a-f]{8}|md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}|1220[0-9a-f]{64}|"
    r"d50110[0-9a-f]{32})$"
)
"""The spellings of a checksum, as `storage.checksums` reads them."""

ADLER32: Final = "^[0-9a-fA-F]{1,8}$"

# Numbers, or texts with a unit: `"2 GB"`, `"5m"`; what is stored is the number.
Bytes = Annotated[int, BeforeValidator(bytes_of)]
Mebibytes = Annotated[int, BeforeValidator(mib_of)]
Seconds = Annotated[float, BeforeValidator(seconds_of)]


def items(value: object) -> object:
    """DIRAC's lists: a `;`-separated string, one thing, or a list; blanks, which its tools leave there, do not count."""
    if isinstance(value, str):
        return [item.strip() for item in value.split(";") if item.strip()]
    if isinstance(value, Mapping):
        return [value]
    if isinstance(value, list | tuple):
        return [item for item in value if not (isinstance(item, str) and not item.strip())]
    return value


def none_for_zero(value: object) -> object:
    """DIRAC's 0 is no maximum."""
    return None if value in (0, "0", "") else value


def comma_items(value: object) -> object:
    """DIRAC's tags: its optimizers join them with commas."""
    return items(value.replace(",", ";") if isinstance(value, str) else value)


def _environment(value: object) -> object:
    """DIRAC's ExecutionEnvironment: `NAME=urlencoded` items; a value ends at a second `=`, as there."""
    if isinstance(value, Mapping):
        return value
    found = items(value)
    if not isinstance(found, Iterable):
        return value
    variables = {}
    for item in found:
        name, separator, text = str(item).partition("=")
        if not separator:
            raise ValueError(f"{item!r} is not NAME=value")
        variables[name.strip()] = unquote(text.partition("=")[0].strip(), errors="surrogateescape")
    return variables


def command_line(value: object) -> object:
    """Arguments are a piece of shell, as DIRAC's; a list is quoted into one."""
    return shlex.join(map(str, value)) if isinstance(value, list | tuple) else value


def _variable_name(name: str) -> str:
    if not name or "=" in name or not name.isprintable() or name != name.strip():  # NUL cannot be printed, nor halves
        raise ValueError(f"{name!r} cannot be the name of an environment variable")
    return name


def _variable_value(value: object) -> str:
    if not isinstance(value, str | int | float | PurePath):
        raise ValueError("is not a string")  # noqa: TRY004 - what pydantic collects
    return no_nul(str(value))


def no_nul(text: str) -> str:
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
    str, BeforeValidator(lambda value: value.strip() if isinstance(value, str) else value), AfterValidator(no_nul)
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

Names = Annotated[tuple[Text, ...], BeforeValidator(items)]
Amounts = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[int, Field(ge=0)]], Field(max_length=16)
]
"""Of named things, how many."""
JOB_ID: Final = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"
JobId = Annotated[str, Field(min_length=1, max_length=128, pattern=JOB_ID)]

"""The files a job declares: its inputs, and its outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from loadmaster.fields import ADLER32, CHECKSUM, Bytes, LocalName, Text, items
from loadmaster.names import SANDBOX_PREFIX, base_name, check_local_name, is_lfn, is_url, parse_lfn


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


InputFiles = Annotated[tuple[InputFile, ...], BeforeValidator(items)]
OutputFiles = Annotated[tuple[OutputFile, ...], BeforeValidator(items)]


def refuse_collisions(names: Iterable[str]) -> None:
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

"""What a site offers its jobs: storage elements, a catalog, a place for sandboxes. Read from a TOML file, or made up
of nothing but a directory for outputs.

    name = "LCG.Example.org"
    catalog = "catalog.sqlite"            # LFNs; relative paths are taken from this file's directory
    default_se = ["DISK"]                 # for output data whose job names none, in order of preference
    failover_se = ["BUFFER"]              # when none of the wanted ones takes a file
    sandbox_store = "sandboxes"           # output sandboxes go to <here>/<job id>/
    vo = "example"                        # for LFNs of jobs that name none

    [storage_elements]
    DISK = "se/disk"                      # a URL, or a directory
    BUFFER = "se/buffer"

    [element_streams]
    BUFFER = 2                            # no more files at once to or from there, in each direction

    [storage.https]                       # words for a kind of storage, as it understands them
    token_file = "/run/token"
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from loadmaster.description import Bytes, LocalName, MaybeComponent, Names, Seconds, complaints, field_names
from loadmaster.errors import InvalidSite
from loadmaster.names import as_url, is_url
from loadmaster.world import USUAL, World

LOCAL_STREAMS: Final = 8
SERVER_STREAMS: Final = 32


def _place(value: object, info: ValidationInfo) -> object:
    """A URL, or a path; a relative one is taken from the directory of the file it is written in, if it is in a file."""
    if isinstance(value, str) and not is_url(value):
        base = (info.context or {}).get("base")
        return as_url(str(base / value) if base is not None and value else value)
    return value


Place = Annotated[str, BeforeValidator(_place)]


class Site(BaseModel):
    """Where a site's files are. Without any configuration, jobs use plain paths and URLs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = ""
    vo: MaybeComponent = None
    user_prefix: LocalName = "user"
    catalog: Place | None = None
    """The SQLite file of logical file names."""
    storage_elements: dict[str, Place] = Field(default_factory=dict)
    default_se: Names = ()
    failover_se: Names = ()
    sandbox_store: Place | None = None
    sandbox_format: Literal["files", "tar.bz2", "tar.zst"] = "files"
    """What an output sandbox goes out as: its files one by one, or all of them in one archive, flat, as DIRAC's does."""
    sandbox_limit_bytes: Bytes = Field(default=10 * 1024**2, ge=1)
    """The largest archive the sandbox_store takes (the default is DIRAC's); a larger one goes to grid storage."""
    output_directory: Place | None = None
    """Where outputs go that have no other target, and sandboxes if there is no store for them. Jobs that share it
    overwrite each other's, unless it has `{job_id}` in it."""
    payload: World = USUAL
    """What a payload is held by, sees, and may use."""
    streams: int | None = Field(default=None, ge=1, le=256)
    """Files under way at once, of all jobs that share the transfers, in each direction. None for 8 between directories of
    this machine, and 32 with servers, whose distance costs more than their work (8 are half as fast with small files)."""
    element_streams: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """The same for single storage elements, by their names; or for servers, as in `https://host:443`."""
    storage: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What each kind of storage is told, by URL scheme; it is the storage that checks it, when it is first used."""
    retries: int = Field(default=3, ge=0, le=100)
    """How often a file is tried again at each place, if what went wrong may be better later."""
    retry_seconds: Seconds = Field(default=1.0, gt=0, le=3600)
    """The first wait before that, at most; each next one may be twice as long, up to a minute."""
    stall_seconds: Seconds = Field(default=60.0, gt=0)
    """A transfer that moves next to nothing for so long is given up, and tried again."""
    staging_seconds: Seconds | None = Field(default=None, gt=0)
    """How long the files of one step of a job may take altogether; None for no limit but those above."""

    cache: Place | None = None
    """A directory on a local disk that all jobs of a node share, so that a file is brought in once. Only loadmaster may
    write to it."""
    cache_bytes: Bytes = Field(default=50 * 10**9, ge=0)
    """How much it may hold; what was used longest ago goes first."""
    cache_link: Literal["copy", "hard"] = "copy"
    """How a job is given a file: "copy" (one of its own, sharing its blocks where the file system can) or "hard" (the same
    for all jobs, read-only: no space, but it is read through each time, for a job may have written to it)."""

    _file: str = PrivateAttr(default="")

    @property
    def most_streams(self) -> int:
        """Files at once in each direction, whatever the kind of storage."""
        return self.streams or SERVER_STREAMS

    def streams_of(self, scheme: str) -> int:
        """The same for one kind of storage."""
        return self.streams or (LOCAL_STREAMS if scheme == "file" else SERVER_STREAMS)

    @property
    def file(self) -> str:
        """Where it was read from, for the words of errors; empty for a site that was made up."""
        return self._file

    @model_validator(mode="after")
    def _known_elements(self) -> Self:
        unknown = [
            f"{field}: {name!r} is not one of the storage_elements"
            for field in ("default_se", "failover_se")
            for name in getattr(self, field)
            if name not in self.storage_elements
        ]
        if unknown:
            raise ValueError("; ".join(unknown))
        return self

    @classmethod
    def load(cls, path: Path) -> Self:
        """The site in a TOML file. Raises `InvalidSite` that names the file and every field at fault. Blocks."""
        site, problems = cls.understand(path)
        if problems:
            raise InvalidSite(f"{path}: {'; '.join(problems)}")
        return site

    @classmethod
    def understand(cls, path: Path) -> tuple[Self, list[str]]:
        """What can be understood of a site in a TOML file, and a line for each thing that cannot. Blocks.

        Raises `InvalidSite` when it cannot be read, or is not TOML.
        """
        import tomllib  # loaded when used: most pilots hand their sites over ready made

        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as exc:
            raise InvalidSite(f"{path}: {exc.strerror}") from exc
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
            raise InvalidSite(f"{path}: not TOML: {exc}") from exc
        problems: list[str] = []
        while True:
            try:
                site = cls.model_validate(data, context={"base": path.absolute().parent})
            except ValidationError as exc:
                told = complaints(exc, names=field_names(cls))
                if set(told) <= set(problems):  # what was left out did not help
                    raise InvalidSite(f"{path}: {'; '.join(problems)}") from exc
                problems += told
                for error in exc.errors():
                    _leave_out(data, error["loc"])
            else:
                break
        site._file = str(path)
        return site, problems


def _leave_out(data: dict[str, Any], place: Sequence[int | str]) -> None:
    """Take what is at fault out of a table, so that the others of it are looked at too; of no place: what names elements."""
    names = [str(part) for part in place if part != "[key]"] or ["default_se"]
    if not place:
        data.pop("failover_se", None)
    *above, last = names
    table: Any = data
    for name in above:
        below = table.get(name)
        if not isinstance(below, dict):
            last = name
            break
        table = below
    if above[:1] == ["storage_elements"]:
        table[last] = "."  # so that it still has its name
    else:
        table.pop(last, None)

"""The world a payload runs in, as its site has it: the table `[payload]` of the site's file.

[payload]
containment = ["pid-namespace", "subreaper"]    # the first that the node allows; none of them: no payload
isolation = "bubblewrap"
inherit = ["X509_*", "CVMFS_REPOSITORIES"]      # variables of the pilot's, besides PATH, HOME, LANG and their like
nice = 10
kept_output_bytes = 1_000_000_000
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Final, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from loadmaster.description import Bytes, Containment, Isolation, Names, Seconds

BEST_FIRST: Final = tuple(Containment)

INHERITED: Final = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "LC_CTYPE", "TZ")
"""What a payload sees of the pilot's environment. Not the rest: it has credentials, and paths of the pilot's own Python."""


def _one_or_many(value: object) -> object:
    if value in ((), []):
        raise ValueError(f"name at least one of {', '.join(Containment)}")
    return [value] if isinstance(value, str) else value


def _octal(value: object) -> object:
    """A mask as everybody writes it: `"022"`. A number is taken as it is, as TOML's 0o022 is."""
    if isinstance(value, str):
        try:
            return int(value, 8)
        except ValueError as exc:
            raise ValueError(f"{value!r} is not an octal number such as 022") from exc
    return value


class World(BaseModel):
    """What a payload is held by, sees, and may use without asking."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    containment: Annotated[tuple[Containment, ...], BeforeValidator(_one_or_many)] = BEST_FIRST
    """What may hold its processes, in order of preference. See docs/containment.md."""
    isolation: Isolation = Isolation.NONE
    """How much of the node it sees. See docs/containment.md."""
    image: str | None = None
    """The container image that `apptainer` runs it in."""
    cgroup: str = "none"
    """Where a payload gets a control group of its own, which counts and holds it better than we can: in those the pilot
    is in if they may be written to (`own`), in a directory that was delegated to the pilot, or nowhere (`none`). Not
    without being asked: with 200 payloads a look at a group cost twice what /proc does (3.3 ms of CPU against 1.7), for
    the kernel adds up its groups anew, and exits were noticed 100 ms later."""
    inherit: Names = ()
    """Variables of the pilot's that it gets besides `INHERITED`, with `*` and `?`. `["*"]` is DIRAC's way, with all
    credentials."""
    nice: int = Field(default=0, ge=0, le=19)
    umask: Annotated[int, BeforeValidator(_octal), Field(ge=0, le=0o777)] = 0o022
    """Outputs can be read by the site's other accounts, as DIRAC's wrapper has it."""
    kept_output_bytes: Bytes | None = Field(default=1_000_000_000, ge=1_000_000)
    """So much of each of its two logs is kept, beginning and end; it may print more, and is not stopped for it."""
    orphan_seconds: Seconds = Field(default=600.0, ge=0, le=2_000_000)
    """How long a payload that can be adopted runs on without an agent before it is ended; 0: for ever."""

    @model_validator(mode="after")
    def _has_image(self) -> Self:
        if (self.isolation is Isolation.APPTAINER) != (self.image is not None):
            raise ValueError(
                'isolation = "apptainer" needs an image, a path or docker://..., and nothing else takes one'
            )
        return self

    def environment(self, pilots: Mapping[str, str] = os.environ) -> dict[str, str]:
        """What of the pilot's environment a payload gets."""
        usual = {name: value for name in INHERITED if (value := pilots.get(name)) is not None}
        if not self.inherit:
            return usual
        wanted = {n: v for n, v in pilots.items() if any(fnmatchcase(n, pattern) for pattern in self.inherit)}
        return usual | wanted


USUAL: Final = World()
"""Where the site has nothing to say."""

"""What is executed, and what holds it."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field, field_validator

from loadmaster.fields import Environment, no_nul


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
            no_nul(word)
        return command

"""How much a payload may use: what a description says of it. What is made of that is in `limits`."""

from __future__ import annotations

from typing import Annotated

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

from loadmaster.fields import Bytes, Seconds
from loadmaster.units import bytes_of


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

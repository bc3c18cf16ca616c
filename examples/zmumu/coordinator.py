"""What a community adds to its jobs: the right Python in front, progress while it runs, a look at the physics after."""

from __future__ import annotations

import re
import shlex
import sys

import anyio
from pydantic import BaseModel, Field, ValidationError

from loadmaster import JobError, JobExecutionCoordinator, PayloadSpec

LOOK_SECONDS = 0.2
"""Between two looks at the payload's output; it reads a file in less, and a person needs no more."""

Z_MASS_GEV = 91.19
TOLERANCE_GEV = 2.0
"""A peak further away than this is not a Z measured with too little data: it is a wrong file or a wrong formula."""


class FileFigures(BaseModel):
    read: int
    selected: int


class Figures(BaseModel):
    """What analysis.py writes into zmumu.json, as far as we look at it."""

    pairs_read: int = Field(ge=0)
    pairs_selected: int = Field(ge=0)
    peak_gev: float
    peak_error_gev: float
    width_gev: float
    files: dict[str, FileFigures]


class ZmumuCoordinator(JobExecutionCoordinator):
    async def preProcess(self, command: str, exeEnv: dict[str, str]) -> PayloadSpec:
        """Run the analysis with the Python that runs us: it is the one that has uproot and matplotlib."""
        self.job.start_soon(self.follow_progress)
        env = {
            **exeEnv,
            "MPLBACKEND": "Agg",
            "MPLCONFIGDIR": str(self.job.workdir / "matplotlib"),  # a worker node's home is no place for caches
        }
        return PayloadSpec(command=f"{shlex.quote(sys.executable)} {command}", env=env)

    async def follow_progress(self) -> None:
        """Lives beside the payload and tells how many files it has read. There is no edge to wait for: we look."""
        wanted = len(self.jobArgs.input_data)
        told = 0
        while True:
            read = sum(1 for line in await self.job.peek() if re.match(r"zmumu_\S+: \d+ pairs read", line))
            if read > told:
                await self.job.report("Progress", f"{read} of {wanted} files read")
                told = read
            await anyio.sleep(LOOK_SECONDS)

    async def postProcess(self) -> None:
        """Fail a job whose numbers cannot be right, before its outputs get logical names that never change."""
        if self.job.outcome is None or not self.job.outcome.succeeded:
            return  # the job fails for that reason already
        figures = await self.read_figures()
        missing = sorted({file.name for file in self.jobArgs.input_data} - set(figures.files))
        if missing:
            raise JobError(f"the analysis left out {', '.join(missing)}")
        if figures.pairs_selected == 0:
            raise JobError(f"the analysis selected none of {figures.pairs_read} muon pairs")
        if abs(figures.peak_gev - Z_MASS_GEV) > TOLERANCE_GEV:
            raise JobError(f"the peak is at {figures.peak_gev:.2f} GeV: this is not the Z ({Z_MASS_GEV} GeV)")
        await self.job.report("PairsRead", figures.pairs_read)
        await self.job.report("PairsSelected", figures.pairs_selected)
        await self.job.report("ZPeak", f"{figures.peak_gev:.2f} +- {figures.peak_error_gev:.2f} GeV")
        await self.job.report("ZWidth", f"{figures.width_gev:.2f} GeV")

    async def read_figures(self) -> Figures:
        path = anyio.Path(self.job.workdir / "zmumu.json")
        try:
            return Figures.model_validate_json(await path.read_bytes())
        except FileNotFoundError as exc:
            raise JobError("the analysis ended well, but wrote no zmumu.json") from exc
        except ValidationError as exc:
            raise JobError(f"zmumu.json does not have the figures: {exc}") from exc

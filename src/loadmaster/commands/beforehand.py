"""What can be known of a job on this machine before it runs: nothing is moved, made or asked of a server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from anyio import to_thread

from loadmaster.coordinator import Coordinator
from loadmaster.description import (
    CE_KEYS,
    DIRAC_KEYS,
    DIRAC_STAND_INS,
    ComputingElement,
    Containment,
    JobDescription,
    Words,
)
from loadmaster.errors import PayloadNotStarted
from loadmaster.machine import detect
from loadmaster.names import is_url
from loadmaster.payload.command import executable_problem
from loadmaster.payload.isolation import isolated
from loadmaster.payload.launch import Launch, Refused
from loadmaster.site import Site
from loadmaster.staging.engine import open_transfers
from loadmaster.staging.inquiry import ask_for_inputs, ask_for_places, ask_for_site
from loadmaster.world import World

LONG_AGO: Final = timedelta(days=5 * 365)
"""Nobody means a deadline that is older: it is a number, which are seconds since 1970."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What came of it, a line for each."""

    problems: tuple[str, ...]
    """For these, `run` would fail here."""
    notes: tuple[str, ...]
    """What a person should know, and what nobody can know yet."""


async def look_ahead(
    job: JobDescription,
    ce: ComputingElement,
    site: Site,
    coordinator: type[Coordinator] | None,
    *,
    online: bool = False,
) -> Findings:
    """`coordinator`: None when it could not be had. `online`: servers are asked whether they have the inputs."""
    problems = list(_deadline(job, datetime.now(UTC)))
    notes = [*_misspelled(job, DIRAC_KEYS, DIRAC_STAND_INS), *_misspelled(ce, CE_KEYS)]
    notes += await to_thread.run_sync(lambda: list(_room(job, ce)))
    if (reason := await to_thread.run_sync(executable_problem, job, site.payload)) is not None:
        if coordinator is None or _is_ours(coordinator):
            problems.append(reason)
        else:
            notes.append(f"{reason}; unless the coordinator's stageIn brings it")
    problems += await to_thread.run_sync(lambda: list(_world(site.payload)))
    async with open_transfers(site.model_copy(update={"cache": None})) as transfers:  # which would be made
        problems += await ask_for_site(transfers)
        found = await ask_for_inputs(job, transfers, online=online)
        problems += found.problems
        problems += await ask_for_places(job, transfers)
    if found.not_asked:
        notes.append(f"{found.not_asked} of the inputs are at servers, which were not asked: --online does")
    return Findings(tuple(dict.fromkeys(problems)), tuple(notes))


def _misspelled(
    words: Words, keys: Mapping[str, str], stand_ins: Mapping[str, tuple[str, ...]] = MappingProxyType({})
) -> Iterator[str]:
    """Keys of DIRAC's in other letters: they are nobody's, and are kept like any that begin with a capital."""
    known = {key.lower(): key for key in (*keys.values(), *(each for some in stand_ins.values() for each in some))}
    for key in words.extra:
        if (meant := known.get(key.lower())) is not None and meant != key:
            yield f"{key} means nothing here: the key is {meant}"


def _deadline(job: JobDescription, now: datetime) -> Iterator[str]:
    deadline = job.limits.deadline
    if deadline is not None and deadline <= now:
        hint = "; a number is taken for seconds since 1970" if deadline < now - LONG_AGO else ""
        yield f"limits.deadline: {deadline.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC lies in the past{hint}"


def _room(job: JobDescription, ce: ComputingElement) -> Iterator[str]:
    """Whether a slot for it can be had: `node` refuses what there is no room for, `run` grants what is asked."""
    try:
        detect(Path.cwd()).ledger().check(job)
    except PayloadNotStarted as exc:
        yield f"on this machine only `run` would take it: {exc}"
    for field in ("number_of_processors", "number_of_gpus", "memory_mb"):
        wanted, there = getattr(job, field), getattr(ce, field)
        if wanted is not None and there is not None and wanted > there:
            yield f"{field}: {wanted}, and the computing element has {there}"


def _world(world: World) -> Iterator[str]:
    """Whether this node has what isolates the payload."""
    launch = Launch(
        argv=["/bin/true"], env={}, cwd=Path.cwd(), stdout=-1, stderr=-1, grace_seconds=0,
        isolation=world.isolation, image=world.image,
    )  # fmt: skip
    held = world.containment
    try:
        isolated(launch, Containment.PID_NAMESPACE if Containment.PID_NAMESPACE in held else held[0])
    except Refused as exc:
        yield f"[payload] isolation = {world.isolation}: {str(exc).removeprefix(f'{world.isolation}: ')}"
    if world.image is not None and not is_url(world.image) and not Path(world.image).exists():
        yield f"[payload] image = {world.image}: No such file or directory"


def _is_ours(coordinator: type[Any]) -> bool:
    """Whether its stageIn brings only what the description names."""
    hook = getattr(coordinator, "stageIn", None)
    return hook is None or str(hook.__module__).startswith("loadmaster.")

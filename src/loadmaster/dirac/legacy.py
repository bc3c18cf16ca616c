"""DIRAC's synchronous coordinators, as they are: their hooks in a thread, their way of returning errors."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final

from loadmaster.coordinator import Coordinator, JobExecutionCoordinator
from loadmaster.description import ComputingElement, JobDescription, PayloadSpec
from loadmaster.dirac.dictionaries import payload_command, payload_environment, write_job_info
from loadmaster.dirac.thread import HookThread
from loadmaster.errors import HookFailed, RescheduleJob

log = logging.getLogger(__name__)

EWMSRESC: Final = 1502
"""DErrno of "job to be rescheduled"."""


class DiracCoordinator(JobExecutionCoordinator):
    """The standard coordinator, with what DIRAC's payloads find besides: its variables, and the file `job.info`."""

    async def stageIn(self) -> None:
        """Bring in the inputs."""
        await write_job_info(self.jobArgs, self.job.workdir)
        await super().stageIn()

    async def preProcess(self, command: str, exeEnv: dict[str, str]) -> PayloadSpec | Mapping[str, Any]:
        """The command, in an environment with DIRAC's variables; the job's own win."""
        command = payload_command(self.jobArgs, self.ceArgs, command)
        return PayloadSpec(command=command, env=payload_environment(self.jobArgs, self.ceArgs, exeEnv))


def is_synchronous(coordinator: type[Any]) -> bool:
    """Whether a class has hooks of the synchronous kind, and so needs `adapt`."""
    return not any(inspect.iscoroutinefunction(getattr(coordinator, hook)) for hook in ("preProcess", "postProcess"))


def adapt(legacy: type[Any]) -> type[Coordinator]:
    """An asynchronous coordinator around a synchronous one, which stays as it is; hooks of any of the three spellings:
    `(self, command, exeEnv)`, `(self, job)`, `(self)`.

    It is made with `jobArgs` and `ceArgs` as DIRAC's dictionaries, and made and called in one thread of its own, one
    instance for the whole job: it may keep state between its hooks, and may block. The thread has a directory of its
    own, too, the one in which the job's directory is, as with DIRAC; see `HookThread` for a hook that changes the
    process. `S_ERROR` becomes `HookFailed` with its message (`RescheduleJob` when its Errno is EWMSRESC). When the job is
    killed or cancelled a hook that blocks is left to end by itself: a thread cannot be interrupted. What it keeps on
    itself does not survive a restart of the agent.
    """

    class Adapted(DiracCoordinator):
        _inner: Any = None

        def __init__(self, jobArgs: JobDescription, ceArgs: ComputingElement) -> None:
            super().__init__(jobArgs, ceArgs)
            self._thread = HookThread(f"{legacy.__name__} of job {jobArgs.job_id}")
            weakref.finalize(self, self._thread.close)  # of a job that is cancelled nobody says that it is over

        async def stageIn(self) -> None:
            await self._call("(jobArgs=..., ceArgs=...)", self._made)
            await super().stageIn()

        async def preProcess(self, command: str, exeEnv: dict[str, str]) -> PayloadSpec | Mapping[str, Any]:
            command = payload_command(self.jobArgs, self.ceArgs, command)
            env = payload_environment(self.jobArgs, self.ceArgs, exeEnv)
            value = await self._call(".preProcess", self._pre_process, command, dict(env))
            if value is None:
                return PayloadSpec(command=command, env=env)
            return {"command": value.get("command", command), "env": value.get("env", env)}

        async def postProcess(self) -> None:
            await self._call(".postProcess", self._post_process)

        async def stageOut(self) -> None:
            await self._thread.aclose()
            await super().stageOut()

        async def _call(self, hook: str, function: Callable[..., Any], *args: Any) -> Any:
            self._thread.directory = self.job.workdir.parent
            return await self._thread.call(f"{legacy.__name__}{hook}", function, *args)

        def _made(self) -> Any:
            """The instance; a job that goes on after a restart of the agent begins with a later hook, and a new one."""
            if self._inner is None:
                self._inner = legacy(jobArgs=self.jobArgs.to_dirac(), ceArgs=self.ceArgs.to_dirac())
            return self._inner

        def _pre_process(self, command: str, env: dict[str, str]) -> Mapping[str, Any] | None:
            hook = self._made().preProcess
            names = _positional(hook)
            if names is None or len(names) > 1:
                returned = hook(command, env)
            elif names == ["command"]:
                returned = hook(command)
            else:
                returned = hook(*[self.jobArgs.to_dirac() for _ in names])
            value = _value(returned, f"{legacy.__name__}.preProcess")
            if value is not None and not isinstance(value, Mapping):
                raise HookFailed(f"{legacy.__name__}.preProcess returned S_OK({value!r:.80}): a dictionary is expected")
            if others := sorted(map(str, (value or {}).keys() - {"command", "env"})):
                log.warning(
                    "job %s: %s.preProcess returned %s, which nobody reads: only command and env are",
                    self.jobArgs.job_id, legacy.__name__, ", ".join(others),
                )  # fmt: skip
            return value

        def _post_process(self) -> None:
            hook = self._made().postProcess
            arguments = [self.jobArgs.to_dirac() for _ in (_positional(hook) or [])[:1]]
            _value(hook(*arguments), f"{legacy.__name__}.postProcess")

    Adapted.__name__ = legacy.__name__
    Adapted.__qualname__ = f"adapt({legacy.__qualname__})"
    Adapted.__doc__ = legacy.__doc__
    return Adapted


def _positional(hook: Callable[..., Any]) -> list[str] | None:
    """The names of the arguments a bound hook takes by position; None when it takes any number."""
    parameters = inspect.signature(hook).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return None
    return [p.name for p in parameters if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}]


def _value(returned: object, hook: str) -> Any:
    """What S_OK carries. None stands for S_OK(): hooks of the oldest spelling return nothing."""
    if returned is None:
        return None
    if not isinstance(returned, Mapping) or not ({"OK", "command"} & returned.keys()):
        said = 'S_OK({"command": ..., "env": ...}), S_OK() or S_ERROR(...) is expected'
        raise HookFailed(f"{hook} returned a {type(returned).__name__}: {said}")
    if "OK" not in returned:
        return returned
    if returned["OK"]:
        return returned.get("Value")
    message = str(returned.get("Message") or "S_ERROR without a message")
    if returned.get("Errno") == EWMSRESC:
        raise RescheduleJob(message)
    raise HookFailed(f"{hook}: {message}")

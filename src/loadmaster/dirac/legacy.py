"""DIRAC's door: its dictionaries, its way of returning errors, its synchronous coordinators.

Nothing of DIRAC is imported. Its words stay in this module; the rest of the house knows only our own types.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final

from anyio import CapacityLimiter, to_thread

from loadmaster.coordinator import Coordinator, JobExecutionCoordinator
from loadmaster.description import ComputingElement, JobDescription, PayloadSpec
from loadmaster.errors import HookFailed, InvalidJob, RescheduleJob

EWMSRESC: Final = 1502
"""DErrno of "job to be rescheduled"."""


def split_wrapper_file(data: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The job's and the computing element's dictionaries of a DIRAC wrapper file `{"Job": {...}, "CE": {...}}`.

    A bare job description comes back with an empty computing element. Raises `InvalidJob`.
    """
    if "Job" not in data:
        return data, {}
    job, ce = data["Job"], data.get("CE") or {}
    for name, part in (("Job", job), ("CE", ce)):
        if not isinstance(part, Mapping):
            raise InvalidJob(f"{name}: {type(part).__name__} where an object {{...}} is expected")
    return job, ce


def environment(job: JobDescription, ce: ComputingElement) -> dict[str, str]:
    """The variables a DIRAC payload finds in its environment."""
    return {
        "DIRACJOBID": job.job_id,
        "DIRACSITE": ce.site,
        "DIRAC_PROCESSORS": str(ce.number_of_processors or job.number_of_processors),
        "DIRAC_JOB_PROCESSORS": str(job.number_of_processors),
    }


def is_synchronous(coordinator: type[Any]) -> bool:
    """Whether a class has hooks of the synchronous kind, and so needs `adapt`."""
    return not any(inspect.iscoroutinefunction(getattr(coordinator, hook)) for hook in ("preProcess", "postProcess"))


def adapt(legacy: type[Any]) -> type[Coordinator]:
    """An asynchronous coordinator around a synchronous one, which stays as it is; hooks of any of the three spellings:
    `(self, command, exeEnv)`, `(self, job)`, `(self)`.

    It is made with `jobArgs` and `ceArgs` as DIRAC's dictionaries, and made and called in worker threads, one instance
    for the whole job, so it may keep state between its hooks and may block. `S_ERROR` becomes `HookFailed` with its
    message (`RescheduleJob` when its Errno is EWMSRESC). When the job is killed or cancelled a hook that blocks is left
    to end by itself: a thread cannot be interrupted.
    """

    class Adapted(JobExecutionCoordinator):
        _inner: Any = None

        def __init__(self, jobArgs: JobDescription, ceArgs: ComputingElement) -> None:
            super().__init__(jobArgs, ceArgs)
            self._threads = CapacityLimiter(1)  # one that blocks for ever must not take one of the host's threads

        async def preProcess(self, command: str, exeEnv: dict[str, str]) -> PayloadSpec | Mapping[str, Any]:
            env = {**environment(self.jobArgs, self.ceArgs), **exeEnv}
            value = await to_thread.run_sync(
                self._pre_process, command, dict(env), abandon_on_cancel=True, limiter=self._threads
            )
            if value is None:
                return PayloadSpec(command=command, env=env)
            return {"command": value.get("command", command), "env": value.get("env", env)}

        async def postProcess(self) -> None:
            await to_thread.run_sync(self._post_process, abandon_on_cancel=True, limiter=self._threads)

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
            return value

        def _post_process(self) -> None:
            hook = self._made().postProcess
            arguments = [self.jobArgs.to_dirac() for _ in (_positional(hook) or [])[:1]]
            _value(hook(*arguments), f"{legacy.__name__}.postProcess")

        def _made(self) -> Any:
            if self._inner is None:
                self._inner = legacy(jobArgs=self.jobArgs.to_dirac(), ceArgs=self.ceArgs.to_dirac())
            return self._inner

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

"""Coordinators of DIRAC's kind, as a community writes them: synchronous, S_OK and S_ERROR. The same file is loaded by DIRAC,
through an extension, and by us, through `adapt`. Standard library only."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

EWMSRESC = 1502


def S_OK(value: Any = None) -> dict[str, Any]:
    return {"OK": True, "Value": value}


def S_ERROR(message: str, errno: int = 0) -> dict[str, Any]:
    return {"OK": False, "Errno": errno, "Message": message, "CallStack": []}


class Standard:
    """Does what DIRAC's own does, and keeps a diary."""

    def __init__(self, jobArgs: dict[str, Any], ceArgs: dict[str, Any]) -> None:
        self.jobArgs = jobArgs
        self.ceArgs = ceArgs
        self.note("__init__")

    def note(self, hook: str, **facts: Any) -> None:
        diary = self.ceArgs.get("Diary") or os.environ["PARITY_HOOKS"]
        with Path(diary).open("a") as file:
            file.write(json.dumps({"hook": hook, **facts}) + "\n")

    def preProcess(self, command: str, exeEnv: dict[str, str]) -> Any:
        self.note("preProcess", command=command)
        return S_OK({"command": command, "env": exeEnv})

    def postProcess(self) -> Any:
        self.note("postProcess")
        return S_OK()


class ConstructorRaises(Standard):
    def __init__(self, jobArgs: dict[str, Any], ceArgs: dict[str, Any]) -> None:
        super().__init__(jobArgs, ceArgs)
        raise KeyError("VOSpecific")


class PreError(Standard):
    def preProcess(self, command: str, exeEnv: dict[str, str]) -> Any:
        super().preProcess(command, exeEnv)
        return S_ERROR("no conditions for this run")


class PreRaises(Standard):
    def preProcess(self, command: str, exeEnv: dict[str, str]) -> Any:
        super().preProcess(command, exeEnv)
        raise ValueError("no conditions for this run")


class PreReschedules(Standard):
    def preProcess(self, command: str, exeEnv: dict[str, str]) -> Any:
        super().preProcess(command, exeEnv)
        return S_ERROR("software is not here yet", EWMSRESC)


class PreNothing(Standard):
    def preProcess(self, command: str, exeEnv: dict[str, str]) -> Any:
        super().preProcess(command, exeEnv)


class PreCommand(Standard):
    def preProcess(self, command: str, exeEnv: dict[str, str]) -> Any:
        super().preProcess(command, exeEnv)
        return S_OK({"command": f"{command} && echo and more", "env": {**exeEnv, "ADDED": "by the hook"}})


class PreOwnEnvironment(Standard):
    def preProcess(self, command: str, exeEnv: dict[str, str]) -> Any:
        super().preProcess(command, exeEnv)
        return S_OK({"command": command, "env": {"PATH": exeEnv["PATH"], "ONLY": "this"}})


class PreOfJob(Standard):
    """In the spelling of the docstring of DIRAC's class, which its wrapper does not call it by."""

    def preProcess(self, job: dict[str, Any]) -> Any:  # type: ignore[override]
        self.note("preProcess", job=job["JobID"])
        return S_OK()

    def postProcess(self, job: dict[str, Any]) -> Any:  # type: ignore[override]
        self.note("postProcess", job=job["JobID"])
        return S_OK()


class PostError(Standard):
    def postProcess(self) -> Any:
        super().postProcess()
        return S_ERROR("the histogram is empty")


class PostRaises(Standard):
    def postProcess(self) -> Any:
        super().postProcess()
        raise ValueError("the histogram is empty")


class PostReschedules(Standard):
    def postProcess(self) -> Any:
        super().postProcess()
        return S_ERROR("again, please", EWMSRESC)


class PostNothing(Standard):
    def postProcess(self) -> Any:
        super().postProcess()


class Curious(Standard):
    """Looks at everything it is given."""

    def __init__(self, jobArgs: dict[str, Any], ceArgs: dict[str, Any]) -> None:
        super().__init__(jobArgs, ceArgs)
        self.note("given", job=dict(jobArgs), ce=dict(ceArgs))

    def preProcess(self, command: str, exeEnv: dict[str, str]) -> Any:
        self.note("environment", names=sorted(exeEnv))
        return super().preProcess(command, exeEnv)


class Stateful(Standard):
    def preProcess(self, command: str, exeEnv: dict[str, str]) -> Any:
        self.begun = command
        return super().preProcess(command, exeEnv)

    def postProcess(self) -> Any:
        self.note("state", kept=bool(self.begun))
        return super().postProcess()

"""DIRAC's own job wrapper, run for one case: `python driver.py <case.json> <answer.json>`, by the interpreter of a
virtual environment that has DIRAC in it.

DIRAC's `JobWrapperTemplate` is executed as a pilot would execute it. What it talks to over the network is replaced where
it leaves the process, and nowhere else: `Client._getRPC` (all services), and the transfer client of the sandbox store; its
storage elements are its own plug-in for local files, and `getProxyInfo` says who owns requests. Nothing of DIRAC's is in
this file, and this file is never imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import runpy
import shutil
import sys
import tarfile
import time
import types
import zlib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import scene  # noqa: E402

PLACEHOLDERS = ("M2Crypto", "diracx")
"""TLS and DiracX's tokens: DIRAC imports them for connections, of which there are none here."""


class Placeholder(types.ModuleType):
    """A module with every name in it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Exception,), {"init": staticmethod(lambda *_: None)})


class Placeholders(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds them."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        wanted = name.partition(".")[0] in PLACEHOLDERS
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec: Any) -> types.ModuleType:
        return Placeholder(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def S_OK(value: Any = None) -> dict[str, Any]:
    return {"OK": True, "Value": value}


def S_ERROR(message: str, service: str, *call: Any) -> dict[str, Any]:
    return {"OK": False, "Errno": 0, "Message": message, "CallStack": [], "rpcStub": ((service, {}), *call)}


class Services:
    """What the remote services of a case answer, and what they were asked."""

    def __init__(self, case: dict[str, Any], root: Path) -> None:
        self.case = case
        self.root = root
        self.registered: dict[str, dict[str, Any]] = {}
        self.statuses: list[tuple[str, dict[str, str]]] = []
        self.parameters: dict[str, Any] = {}
        self.heartbeats: list[dict[str, Any]] = []
        self.rescheduled = 0
        self.accounting: list[dict[str, Any]] = []
        self.requests: list[dict[str, Any]] = []
        self.sandboxes: list[dict[str, Any]] = []
        self.unanswered: list[str] = []

    def call(self, service: str, method: str, arguments: tuple[Any, ...]) -> Any:
        """One call of a remote method."""
        if service.rpartition("/")[2] in self.case.get("unreachable", ()):
            return S_ERROR(f"{service} is not reachable", service, method, arguments)
        answer = getattr(self, f"{service.replace('/', '_')}_{method}", None)
        if answer is None:
            self.unanswered.append(f"{service}.{method}")
            return S_ERROR(f"{service} does not know {method}", service, method, arguments)
        return answer(*arguments)

    # -- the state of jobs ------------------------------------------------------------------------------------------

    def WorkloadManagement_JobStateUpdate_setJobStatusBulk(self, job: int, updates: Any, force: bool) -> Any:
        self.statuses += sorted(updates.items())  # by their times, as the service takes them
        return S_OK()

    def WorkloadManagement_JobStateUpdate_setJobParameters(self, job: int, parameters: Any) -> Any:
        self.parameters.update((str(name), value) for name, value in parameters)
        return S_OK()

    def WorkloadManagement_JobStateUpdate_setJobParameter(self, job: int, name: str, value: Any) -> Any:
        self.parameters[name] = value
        return S_OK()

    def WorkloadManagement_JobStateUpdate_sendHeartBeat(self, job: int, dynamic: Any, static: Any) -> Any:
        self.heartbeats.append({"dynamic": dynamic, "static": static})
        return S_OK({"Kill": ""} if len(self.heartbeats) == self.case.get("kill_at_heartbeat") else {})

    def WorkloadManagement_JobMonitoring_getJobParameter(self, job: int, name: str) -> Any:
        return S_OK({})

    def WorkloadManagement_JobManager_rescheduleJob(self, job: int) -> Any:
        refused = self.case.get("reschedule_refused")
        self.rescheduled += 1
        return S_ERROR(refused, "WorkloadManagement/JobManager", "rescheduleJob", (job,)) if refused else S_OK(job)

    def Accounting_DataStore_commitRegisters(self, records: Any) -> Any:
        for name, _start, _end, values in records:
            if name == "Job":
                self.accounting.append(values)
        return S_OK(len(records))

    def RequestManagement_ReqManager_putRequest(self, request: str) -> Any:
        self.requests.append(json.loads(request))
        return S_OK(len(self.requests))

    def ResourceStatus_ResourceStatus_select(self, table: str, wanted: Any) -> Any:
        kinds = ("ReadAccess", "WriteAccess", "CheckAccess", "RemoveAccess")
        return S_OK(
            [(name, "StorageElement", kind, "Active", "all") for name in scene.elements(self.case) for kind in kinds]
        )

    # -- files ------------------------------------------------------------------------------------------------------

    def DataManagement_FileCatalog_hasAccess(self, paths: Any, operation: str) -> Any:
        return self._each(paths, lambda lfn: True)

    def DataManagement_FileCatalog_exists(self, lfns: Any) -> Any:
        return self._each(lfns, lambda lfn: lfn if lfn in self.registered or lfn in self._replicas else False)

    def DataManagement_FileCatalog_addFile(self, files: Any) -> Any:
        if self.case.get("registration_refused"):
            return S_OK({"Successful": {}, "Failed": dict.fromkeys(files, "no more files in here")})
        for lfn, facts in files.items():
            self.registered[lfn] = {name: facts[name] for name in ("Size", "Checksum", "SE")}
        return self._each(files, lambda lfn: True)

    def DataManagement_FileCatalog_getReplicas(self, lfns: Any, *_: Any) -> Any:
        return self._each(lfns, lambda lfn: dict.fromkeys(self._replicas[lfn], lfn))

    def DataManagement_FileCatalog_getFileMetadata(self, lfns: Any) -> Any:
        def facts(lfn: str) -> dict[str, Any]:
            content = next(iter(self._replicas[lfn].values())).encode()
            said = zlib.adler32(content) if lfn not in self.case.get("wrong_checksums", ()) else 1
            guid = {} if lfn in self.case.get("without_guid", ()) else {"GUID": f"GUID-{lfn}"}
            return {"Size": len(content), "Checksum": f"{said:08x}", "ChecksumType": "Adler32", **guid}

        return self._each(lfns, facts)

    def DataManagement_FileCatalog_isDirectory(self, lfns: Any) -> Any:
        return self._each(lfns, lambda lfn: False)

    @property
    def _replicas(self) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = self.case.get("replicas", {})
        return found

    def _each(self, lfns: Any, answer: Any) -> Any:
        found: dict[str, Any] = {"Successful": {}, "Failed": {}}
        for lfn in [lfns] if isinstance(lfns, str) else lfns:
            try:
                found["Successful"][lfn] = answer(lfn)
            except KeyError:
                found["Failed"][lfn] = "No such file or directory"
        return S_OK(found)

    # -- the sandbox store ------------------------------------------------------------------------------------------

    def send_sandbox(self, path: str, name: str, assigned: dict[str, str]) -> Any:
        if "SandboxStore" in self.case.get("unreachable", ()):
            return S_ERROR("the sandbox store is not reachable", "WorkloadManagement/SandboxStore", "sendFile", ())
        unpacked = self.root / f"sandbox-{len(self.sandboxes)}"
        with tarfile.open(path) as archive:
            archive.extractall(unpacked, filter="data")
            names = [member.name for member in archive]
        self.sandboxes.append(
            {"name": name, "assigned": assigned, "members": names, "files": scene.files_below(unpacked, self.root)}
        )
        return S_OK("sandbox")


class Remote:
    """A service, as its client sees it."""

    def __init__(self, services: Services, service: str) -> None:
        self._services, self._service = services, service

    def __getattr__(self, method: str) -> Any:
        return lambda *arguments: self._services.call(self._service, method, arguments)


class Transfer:
    """The client that sends sandboxes."""

    services: Services

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def sendFile(self, path: str, about: Any) -> Any:
        return self.services.send_sandbox(path, *about)


def configuration(case: dict[str, Any], root: Path) -> str:
    """A pilot.cfg of DIRAC's: the site, its storage elements, what the case wants of the wrapper."""
    elements = {
        name: {"BackendType": "local", "ReadAccess": "Active", "WriteAccess": "Active", "AccessProtocol": "file",
               "WriteProtocols": "file", "ReadProtocols": "file",
               "File": {"Host": "", "Protocol": "file", "Path": str(root / "se" / name),
                        "Access": "local" if name in scene.LOCAL_SE else "remote"}}
        for name in scene.elements(case)
    }  # fmt: skip
    tree = {
        "LocalSite": {"Site": "LCG.Example.org", "LocalSE": ", ".join(scene.LOCAL_SE), **case.get("local_site", {})},
        "DIRAC": {
            "VirtualOrganization": scene.VO,
            "Configuration": {"Servers": ""},
            "Security": {"UseServerCertificate": "no"},
        },
        "Registry": {"Groups": {"vo_user": {"VO": scene.VO, "Users": "someone"}}},
        "Systems": {"WorkloadManagement": {"JobWrapper": {"CleanUpFlag": "False", **case.get("wrapper", {})}}},
        "Resources": {
            "StorageElements": elements,
            "StorageElementGroups": {"SE-USER": "SE-USER-A", "Tier1-Failover": ", ".join(case.get("failover", []))},
            "FileCatalogs": {"FileCatalog": {"AccessType": "Read-Write", "Status": "Active", "Master": "True"}},
            "Sites": {"LCG": {"LCG.Example.org": {"SE": ", ".join(scene.LOCAL_SE)}}},
        },
        "Operations": {
            "Defaults": {
                "DataManagement": {
                    "RegistrationProtocols": "file",
                    "AccessProtocols": "file",
                    "WriteProtocols": "file",
                },
                "Services": {
                    "Catalogs": {"FileCatalog": {"AccessType": "Read-Write", "Status": "Active", "Master": "True"}}
                },
                "InputDataPolicy": {"Default": "DIRAC.WorkloadManagementSystem.Client.DownloadInputData"},
            }
        },
    }

    def lines(branch: dict[str, Any], depth: int) -> list[str]:
        found = []
        for name, value in branch.items():
            pad = "  " * depth
            if isinstance(value, dict):
                found += [f"{pad}{name}", f"{pad}{{", *lines(value, depth + 1), f"{pad}}}"]
            else:
                found.append(f"{pad}{name} = {value}")
        return found

    return "\n".join(lines(tree, 0)) + "\n"


def install_extension(directory: Path, coordinator: str) -> None:
    """A community's extension of DIRAC, as DIRAC finds them: an entry point, and a module in the place of its own."""
    package = directory / "ParityDIRAC"
    module = package / "WorkloadManagementSystem" / "JobWrapper"
    module.mkdir(parents=True)
    for folder in (package, module.parent, module):
        (folder / "__init__.py").write_text("")
    (package / "__init__.py").write_text(
        "def extension_metadata():\n    return {'primary_extension': True, 'priority': 100, 'setups': {}}\n"
    )
    (module / "JobExecutionCoordinator.py").write_text(
        f"from coordinators import {coordinator} as JobExecutionCoordinator\n"
    )
    info = directory / "ParityDIRAC-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ParityDIRAC\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[dirac]\nmetadata = ParityDIRAC:extension_metadata\n")
    sys.path.insert(0, str(directory))


def run(case: dict[str, Any], root: Path) -> dict[str, Any]:
    """What came of the case: the answer, without what differs from run to run."""
    scene.build(case, root)
    hooks = root / "hooks.jsonl"
    os.environ |= {"PARITY_HOOKS": str(hooks), "PARITY_ROOT": str(root)}
    os.environ |= case.get("pilot_environment", {})
    if case.get("coordinator"):
        install_extension(root / "extension", case["coordinator"])

    wrapper = root / "work" / "Wrapper"
    (root / "pilot.cfg").write_text(configuration(case, root))
    wrapper.with_name("Wrapper.json").write_text(json.dumps({"Job": case["job"], "CE": case["ce"], "Optimizer": {}}))

    sys.meta_path.insert(0, Placeholders())
    sys.argv = [
        str(wrapper),
        str(root / "pilot.cfg"),
        "-o",
        "LogLevel=ERROR" if not case.get("loud") else "LogLevel=DEBUG",
    ]
    os.chdir(root / "work")

    import DIRAC
    from DIRAC.Core.Base.Client import Client
    from DIRAC.Core.Base.Script import Script
    from DIRAC.Core.Utilities.ObjectLoader import ObjectLoader
    from DIRAC.RequestManagementSystem.Client import Request
    from DIRAC.WorkloadManagementSystem.Client import SandboxStoreClient

    services = Services(case, root)
    Transfer.services = services
    Client._getRPC = lambda self, rpc=None, url="", timeout=None: rpc or Remote(services, url or self.serverURL)
    SandboxStoreClient.TransferClient = Transfer
    if case.get("impatient"):  # it waits for up to ten minutes between attempts
        wait = time.sleep
        time.sleep = lambda seconds: wait(min(float(seconds), 0.2))

    Request.getProxyInfo = lambda: S_OK({"username": "someone", "group": "vo_user", "validGroup": True})

    # What the template does first. Where no configuration server answers, DIRAC 9.1 then looks for classes in its own
    # modules before those of extensions, and finds no community's coordinator; asked to look again it is the other way.
    Script.parseCommandLine()
    ObjectLoader().reloadRootModules()

    template = Path(DIRAC.__file__).parent / "WorkloadManagementSystem" / "JobWrapper" / "JobWrapperTemplate.py"
    wrapper.write_text(template.read_text().replace("@SITEPYTHON@", str(root)))
    code: Any = None
    try:
        runpy.run_path(str(wrapper), run_name="__main__")
    except SystemExit as end:
        code = end.code
    from importlib.metadata import version

    from DIRAC.AccountingSystem.Client.Types.Job import Job

    fields = [name for name, _ in (*Job().definitionKeyFields, *Job().definitionAccountingFields)]
    workdir = root / "work" / str(case["job"].get("JobID", ""))
    files = scene.files_below(workdir, root)
    answer = {
        "dirac": version("DIRAC"),
        "exit_code": code,
        "statuses": scene.folded(update for _, update in services.statuses),
        "parameters": services.parameters,
        "heartbeats": {
            "dynamic": sorted({name for beat in services.heartbeats for name in beat["dynamic"]}),
            "from": scene.speakers(beat["static"]["StandardOutput"] for beat in services.heartbeats),
            "last": services.heartbeats[-1]["static"]["StandardOutput"] if services.heartbeats else "",
        },
        "rescheduled": services.rescheduled,
        "accounting": [dict(zip(fields, values, strict=True)) for values in services.accounting],
        "requests": [scene.request_of(each) for each in services.requests],
        "sandboxes": services.sandboxes,
        "registered": services.registered,
        "stored": scene.stored(case, root),
        "environment": scene.environment(files),
        "files": files,
        "workdir_left": workdir.exists(),
        "hooks": scene.hooks(hooks),
        "unanswered": services.unanswered,
    }
    found: dict[str, Any] = scene.steady(answer, root)
    return found


if __name__ == "__main__":
    asked, answer = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    case = json.loads(asked.read_text())
    root = Path(os.environ["PARITY_SCRATCH"])
    try:
        found = run(case, root)
    finally:
        os.chdir("/")
    answer.write_text(json.dumps(found, default=str, indent=1))
    sys.stdout.flush()
    if not os.environ.get("PARITY_KEEP"):
        shutil.rmtree(root)
    os._exit(0)  # DIRAC leaves threads that wait

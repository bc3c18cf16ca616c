"""The jobs both wrappers are given. A case is a job's and a computing element's dictionary of DIRAC's, what the services
have and answer, and options of DIRAC's wrapper."""

from __future__ import annotations

from typing import Any, Final

JOB: Final = {
    "JobID": 123,
    "JobName": "a job",
    "JobGroup": "0001",
    "JobType": "User",
    "Owner": "someone",
    "OwnerGroup": "vo_user",
    "VirtualOrganization": "vo",
    "Executable": "/bin/sh",
    "StdOutput": "std.out",
    "StdError": "std.err",
}
CE: Final = {"Site": "LCG.Example.org", "GridCE": "ce.example.org", "CPUNormalizationFactor": 10, "Processors": 1}
LOGS: Final = ["std.out", "std.err"]
LFN: Final = "/vo/data/input.txt"
EAGER: Final = {"PollingTime": 1, "CheckingTime": 1, "MinCheckingTime": 1}
"""A watchdog that looks every second. As it comes it looks at its limits every half hour."""

CASES: dict[str, dict[str, Any]] = {}


def case(name: str, script: str | None = None, *, ce: dict[str, Any] | None = None, **words: Any) -> None:
    """Add a case: a piece of shell, words of the job (capitalised), and of the scene."""
    job = {**JOB, **{key: value for key, value in words.items() if key[0].isupper()}}
    if script is not None:
        job["Arguments"] = f"-c '{script}'"
    scene = {key: value for key, value in words.items() if not key[0].isupper()}
    job = {key: value for key, value in job.items() if value is not None}
    scene.setdefault("coordinator", "Standard")
    CASES[name] = {"name": name, "job": job, "ce": {**CE, **(ce or {})}, **scene}


# -- how payloads end -------------------------------------------------------------------------------------------------

case(
    "success", "echo hello; echo oops >&2; echo data > out.root",
    OutputSandbox=LOGS, OutputData=["out.root"], OutputSE=["SE-USER-A"],
)  # fmt: skip
case("success without outputs", "echo hello")
case("success without a coordinator of its own", "echo hello", OutputSandbox=LOGS, coordinator=None)
case("last line without an end", "echo one; printf two; printf three >&2", OutputSandbox=LOGS)
case("output that is not text", 'printf "\\377\\376 one\\n"; echo two', OutputSandbox=LOGS)
case("silence", ":", OutputSandbox=LOGS)
case("logs of other names", "echo one; echo two >&2", StdOutput="a.log", StdError="b.log", OutputSandbox=["*.log"])
case("failure", "echo hello; exit 3", OutputSandbox=LOGS, OutputData=["out.root"])
case("failure without outputs", "exit 3")
case("exit code 255", "exit 255")
case("exit code 222", "exit 222", OutputSandbox=LOGS)
case(
    "exit code 222 once too often", "exit 222", OutputSandbox=LOGS,
    reschedule_refused="Maximum number of reschedulings is reached",
)  # fmt: skip
case("killed by signal 9", "kill -9 $$", OutputSandbox=LOGS)
case("killed by signal 15", "kill -15 $$", OutputSandbox=LOGS)
case("a shell's word for a signal", 'sh -c "kill -11 \\$\\$"; exit $?', OutputSandbox=LOGS)
case("leaves a process behind", "sleep 2 & echo main is over", OutputSandbox=LOGS)
case(
    "leaves a daemon behind", 'setsid sh -c "sleep 1; echo late > late.txt" >/dev/null 2>&1 & echo main is over',
    ours={"linger_seconds": 2},
)  # fmt: skip

# -- what is executed -------------------------------------------------------------------------------------------------

case("no such path", Executable="/nowhere/program", OutputSandbox=LOGS)
case("no such program", Executable="no-such-program-anywhere", OutputSandbox=LOGS)
case("no executable at all", Executable=None, OutputSandbox=LOGS)
case("a directory", Executable="/usr", OutputSandbox=LOGS)
case("found in PATH", Executable="echo", Arguments="found", OutputSandbox=LOGS)
case("blanks around it", Executable=" /bin/echo ", Arguments="found", OutputSandbox=LOGS)
case("a variable in it", Executable="$PARITY_BIN/echo", Arguments="found", OutputSandbox=LOGS,
     pilot_environment={"PARITY_BIN": "/bin"}, world={"inherit": ["PARITY_BIN"]})  # fmt: skip
case("arguments are shell", Executable="/bin/echo", Arguments="a  'b  c' $HOME_OF_NOBODY; echo d | tr d e > file; cat file",
     OutputSandbox=LOGS)  # fmt: skip
case("no arguments", Executable="/bin/pwd", OutputSandbox=LOGS)
case(
    "a script of the sandbox", Executable="run.sh", Arguments="with words", OutputSandbox=LOGS,
    InputSandbox=["SB:SandboxSE|/S/in.tar.bz2"], sandboxes={"S/in.tar.bz2": {"run.sh": "#!/bin/sh\necho $0 $*\n"}},
)  # fmt: skip
case(
    "a script without a first line", Executable="run.sh", OutputSandbox=LOGS,
    InputSandbox=["SB:SandboxSE|/S/in.tar.bz2"], sandboxes={"S/in.tar.bz2": {"run.sh": "echo by the shell\n"}},
)  # fmt: skip
case(
    "dirac-jobexec", Executable="dirac-jobexec", Arguments="jobDescription.xml", OutputSandbox=LOGS,
    InputSandbox=["SB:SandboxSE|/S/in.tar.bz2"], sandboxes={"S/in.tar.bz2": {"dirac-jobexec": "#!/bin/sh\necho $*\n"}},
)  # fmt: skip

# -- the environment --------------------------------------------------------------------------------------------------

PILOT: Final = {"PILOT_VARIABLE": "of the pilot", "LD_LIBRARY_PATH": "/opt/a", "LD_LIBRARY_PATH_SAVE": "/opt/b"}
case("environment", "env -0 > environment; umask > umask; pwd > directory",
     pilot_environment=PILOT)  # fmt: skip
case("environment, inherited as DIRAC does", "env -0 > environment", world={"inherit": ["*"]},
     pilot_environment=PILOT)  # fmt: skip
case("environment of eight processors", "env -0 > environment", ce={"Processors": 8, "WholeNode": True},
     NumberOfProcessors=4)  # fmt: skip
case("ExecutionEnvironment", "env -0 > environment",
     ExecutionEnvironment=["PLAIN=value", "CODED=a%20b%3Dc%3B", "TWICE=one=two", "EMPTY="])  # fmt: skip
case("ExecutionEnvironment of one", "env -0 > environment", ExecutionEnvironment="PLAIN=value")
case("job.info", "cat job.info", OutputSandbox=LOGS)
case("the directory is removed", "echo hello", OutputSandbox=LOGS, wrapper={"CleanUpFlag": "True"})

# -- inputs -----------------------------------------------------------------------------------------------------------

case("input sandbox", "cat one.txt sub/two.txt; ls", OutputSandbox=LOGS, InputSandbox=["SB:SandboxSE|/S/in.tar.bz2"],
     sandboxes={"S/in.tar.bz2": {"one.txt": "1\n", "sub/two.txt": "2\n", "inner.tar.gz": {"three.txt": "3\n"}}})  # fmt: skip
case("input sandboxes, two", "cat one.txt two.txt", OutputSandbox=LOGS,
     InputSandbox=["SB:SandboxSE|/S/1.tar.bz2", "SB:SandboxSE|/S/2.tar.bz2"],
     sandboxes={"S/1.tar.bz2": {"one.txt": "1\n"}, "S/2.tar.bz2": {"two.txt": "2\n"}})  # fmt: skip
case("input sandbox missing", "echo never", OutputSandbox=LOGS, InputSandbox=["SB:SandboxSE|/S/none.tar.bz2"])
case("input sandbox missing once too often", "echo never", InputSandbox=["SB:SandboxSE|/S/none.tar.bz2"],
     reschedule_refused="Maximum number of reschedulings is reached")  # fmt: skip
case("input sandbox by LFN", "cat input.txt", OutputSandbox=LOGS, InputSandbox=[f"LFN:{LFN}"],
     replicas={LFN: {"SE-USER-A": "of the grid\n"}})  # fmt: skip
case("input sandbox by LFN in lower case", "cat input.txt", OutputSandbox=LOGS, InputSandbox=[f"lfn:{LFN}"],
     replicas={LFN: {"SE-USER-A": "of the grid\n"}})  # fmt: skip
case("input sandbox by LFN missing", "echo never", InputSandbox=[f"LFN:{LFN}"])
case("input sandbox by LFN unreadable", "echo never", InputSandbox=[f"LFN:{LFN}"], replicas={LFN: {"SE-USER-A": None}},
     )  # fmt: skip
case("input data", "cat input.txt", OutputSandbox=LOGS, InputData=[f"LFN:{LFN}"],
     replicas={LFN: {"SE-USER-A": "of the grid\n"}})  # fmt: skip
case("input data as a string", "cat input.txt", OutputSandbox=LOGS, InputData=f"LFN:{LFN}",
     replicas={LFN: {"SE-USER-A": "of the grid\n"}})  # fmt: skip
case("input data elsewhere", "cat input.txt", OutputSandbox=LOGS, InputData=[f"LFN:{LFN}"],
     replicas={LFN: {"SE-USER-B": "of the grid\n"}})  # fmt: skip
case("input data of two files", "cat input.txt second.txt", OutputSandbox=LOGS, InputData=[LFN, "LFN:/vo/data/second.txt"],
     replicas={LFN: {"SE-USER-A": "1\n"}, "/vo/data/second.txt": {"SE-USER-A": "2\n"}})  # fmt: skip
case("input data, the nearest copy is lost", "cat input.txt", OutputSandbox=LOGS, InputData=[f"LFN:{LFN}"],
     replicas={LFN: {"SE-USER-B": "of the grid\n", "SE-USER-A": None}})  # fmt: skip
case("input data unknown", "echo never", OutputSandbox=LOGS, InputData=[f"LFN:{LFN}"])
case("input data lost", "echo never", InputData=[f"LFN:{LFN}"], replicas={LFN: {"SE-USER-A": None}})
case("input data of a wrong checksum", "cat input.txt", OutputSandbox=LOGS, InputData=[f"LFN:{LFN}"],
     replicas={LFN: {"SE-USER-A": "of the grid\n"}}, wrong_checksums=[LFN])  # fmt: skip
case("input data without a GUID", "cat input.txt", OutputSandbox=LOGS, InputData=[f"LFN:{LFN}"],
     replicas={LFN: {"SE-USER-A": "of the grid\n"}}, without_guid=[LFN])  # fmt: skip
case("input data empty", "echo hello", InputData="", OutputSandbox=LOGS)

# -- output sandbox ---------------------------------------------------------------------------------------------------

LARGE: Final = "seq 1 9000 > large"
case("sandbox of a pattern", "echo 1 > a.log; echo 2 > b.log; echo 3 > c.txt", OutputSandbox=["*.log"])
case("sandbox of a directory", "mkdir d; echo 1 > d/one; mkdir d/e; echo 2 > d/e/two", OutputSandbox=["d"])
case("sandbox of a file in a directory", "mkdir d; echo 1 > d/one", OutputSandbox=["d/one"])
case("sandbox, parts missing", "echo 1 > a.log", OutputSandbox=["a.log", "b.log", "*.root", "std.out"])
case("sandbox, all missing", ":", OutputSandbox=["a.log"])
case("sandbox as a string", "echo hello", OutputSandbox="std.out")
case("sandbox of two files of one name", "mkdir d; echo 1 > d/one; echo 2 > one", OutputSandbox=["one", "d/one"])
case("sandbox of a symbolic link", "echo 1 > a; ln -s a b; ln -s /etc/hostname c", OutputSandbox=["a", "b"])
case("sandbox too large", LARGE, OutputSandbox=["large"], wrapper={"OutputSandboxLimit": 3000})
case("sandbox too large of a failed job", f"{LARGE}; exit 3", OutputSandbox=["large"],
     OutputData=["large"], wrapper={"OutputSandboxLimit": 3000})  # fmt: skip
case("sandbox store unreachable", "echo hello", OutputSandbox=LOGS, unreachable=["SandboxStore"])
case("no owner", "echo hello; echo data > out.root", Owner=None, OutputSandbox=LOGS, OutputData=["out.root"])

# -- output data ------------------------------------------------------------------------------------------------------

MADE: Final = "mkdir -p d; echo 1 > a.root; echo 2 > b.root; echo 3 > d/c.root"
case("data of a list", MADE, OutputData=["a.root", "b.root"])
case("data as a string", MADE, OutputData="a.root;b.root")
case("data of a pattern", MADE, OutputData=["*.root"])
case("data in a directory", MADE, OutputData=["d/c.root"])
case("data of a whole directory", MADE, OutputData=["d"])
case("data by LFN", MADE, OutputData=["LFN:/vo/prod/a.root"])
case("data by LFN with a directory", "mkdir -p vo/prod; echo 1 > vo/prod/a.root", OutputData=["LFN:/vo/prod/a.root"])
case("data by LFN pattern", MADE, OutputData=["LFN:/vo/prod/*.root"])
case("data by LFN in lower case", MADE, OutputData=["lfn:/vo/prod/a.root"])
case("data to a path", MADE, OutputData=["a.root"], OutputPath="run7")
case("data to an absolute path", MADE, OutputData=["a.root"], OutputPath="LFN:/vo/prod/run7")
case("data of a job of a high number", MADE, OutputData=["a.root"], JobID=1234567)
case("data missing", MADE, OutputData=["a.root", "none.root"])
case("data all missing", ":", OutputData=["none.root"])
case("data empty", ": > empty.root", OutputData=["empty.root"])
case("data to a place by name", MADE, OutputData=["a.root"], OutputSE="SE-USER-B")
case(
    "data, the first place is down",
    MADE,
    OutputData=["a.root"],
    OutputSE=["SE-USER-A", "SE-USER-B"],
    down=["SE-USER-A"],
)
case("data to failover", MADE, OutputData=["a.root"], OutputSE=["SE-USER-A"], down=["SE-USER-A"], failover=["FAILOVER"])
case("data, everything is down", MADE, OutputData=["a.root"], OutputSE=["SE-USER-A"], down=["SE-USER-A", "FAILOVER"],
     failover=["FAILOVER"])  # fmt: skip
case("data, one of two cannot leave", MADE, OutputData=["a.root", "LFN:/vo/prod/b.root"], OutputSE=["SE-USER-A"],
     down=["SE-USER-A"], OutputSandbox=LOGS)  # fmt: skip
case("data not registered", MADE, OutputData=["a.root"], registration_refused=True)
case("data of a name that is taken", MADE, OutputData=["LFN:/vo/prod/a.root"],
     replicas={"/vo/prod/a.root": {"SE-USER-B": "older\n"}})  # fmt: skip
REQUEST: Final = (
    '{"RequestName": "by the payload", "Operations": [{"Type": "RemoveFile", "Files": [{"LFN": "/vo/prod/old.root"}]}]}'
)
case("a request of the payload", f"cat > later_request.json <<END\n{REQUEST}\nEND\n")
case("no requests can be sent", MADE, OutputData=["a.root"], OutputSE=["SE-USER-A"], down=["SE-USER-A"],
     failover=["FAILOVER"], unreachable=["ReqManager"], impatient=True)  # fmt: skip
case("nobody hears the statuses", "echo hello", OutputSandbox=LOGS, unreachable=["JobStateUpdate"])

# -- the coordinator --------------------------------------------------------------------------------------------------

for coordinator in (
    "ConstructorRaises", "PreError", "PreRaises", "PreReschedules", "PreNothing", "PreCommand", "PreOfJob",
    "PostError", "PostRaises", "PostReschedules", "PostNothing", "Stateful",
):  # fmt: skip
    case(f"coordinator {coordinator}", "echo hello; echo 1 > a.root", coordinator=coordinator, OutputSandbox=LOGS,
         OutputData=["a.root"])  # fmt: skip
case("coordinator Curious", "echo hello", coordinator="Curious", OutputSandbox=LOGS, OutputData=["a.root"],
     InputSandbox=["SB:SandboxSE|/S/in.tar.bz2"], sandboxes={"S/in.tar.bz2": {"one.txt": "1\n"}},
     InputData=[f"LFN:{LFN}"], replicas={LFN: {"SE-USER-A": "of the grid\n"}}, Priority=3, CPUTime="600", Tags=["a", "b"],
     NumberOfProcessors=2, LHCbKey="kept", ExecutionEnvironment=["PLAIN=value"], ce={"Queue": "long"})  # fmt: skip
case("coordinator PreOwnEnvironment", "env -0 > environment", coordinator="PreOwnEnvironment")
case("coordinator PostError of a failed payload", "exit 3", coordinator="PostError", OutputSandbox=LOGS)
case("coordinator PostRaises of a failed payload", "exit 3", coordinator="PostRaises", OutputSandbox=LOGS)

# -- the watchdog -----------------------------------------------------------------------------------------------------

# DIRAC's watchdog and the thread that waits for the payload both wait for the same process: who comes first keeps its exit
# status, and if that is the watchdog there is no postProcess and no sandbox. What is killed is a race, in the record.
RACE: Final = {
    **dict.fromkeys(("wall time", "CPU time", "stalled", "disk full", "slot over", "kill"), "lost"),
    "soft stop that nobody heeds": "lost",
    **dict.fromkeys(("wall time, and it ends well", "kill, and it ends well"), "kept"),
}  # fmt: skip
"""Which end of the race is compared with ours."""

BRIEF: Final = {"words": {"environment": {"SECONDS_OF_SLEEP": "2.5"}}}
"""Our watchdog needs less time to be seen idle."""
SPIN: Final = "echo begun; while :; do :; done"
SLEEP: Final = "echo begun; exec sleep 60"
case("wall time", SLEEP, OutputSandbox=LOGS, OutputData=["*.root"], wrapper={**EAGER, "MaxWallClockTime": 3},
     ours={"limits": {"wall_seconds": 2.0}})  # fmt: skip
case("wall time, and it ends well", "trap \"echo bye; exit 0\" TERM; echo begun; sleep 60 & wait", OutputSandbox=LOGS,
     wrapper={**EAGER, "MaxWallClockTime": 3}, ours={"limits": {"wall_seconds": 2.0}})  # fmt: skip
case("CPU time", SPIN, OutputSandbox=LOGS, CPUTime=2, wrapper={**EAGER, "CheckCPULimitFlag": 1},
     ce={"CPUNormalizationFactor": 1}, ours={"limits": {"cpu_seconds": 0.3}})  # fmt: skip
IDLE: Final = {"limits": {"cpu_ratio": 0.05, "cpu_ratio_window_seconds": 1.5}}
case("stalled", SLEEP, OutputSandbox=LOGS, wrapper={**EAGER, "CPUSampleTime": 3}, ours=IDLE)
case("stalled, but a test", "echo begun; sleep ${SECONDS_OF_SLEEP:-10}", JobType="Test", OutputSandbox=LOGS,
     wrapper={**EAGER, "CPUSampleTime": 3}, ours=IDLE | BRIEF)  # fmt: skip
case("stalled, but may be", "touch DISABLE_WATCHDOG_CPU_WALLCLOCK_CHECK; sleep ${SECONDS_OF_SLEEP:-10}",
     OutputSandbox=LOGS, wrapper={**EAGER, "CPUSampleTime": 3}, ours=IDLE | BRIEF)  # fmt: skip
case("disk full", "exec sleep 60", OutputSandbox=LOGS, wrapper={**EAGER, "MinDiskSpace": 10**12},
     ours={"limits": {"free_disk_bytes": 10**18}})  # fmt: skip
case("slot over", SLEEP, OutputSandbox=LOGS, wrapper=EAGER, local_site={"CPUTimeLeft": 40, "CPUNormalizationFactor": 10},
     ours={"deadline_seconds": 35})  # fmt: skip


def soft_script(text: str) -> dict[str, Any]:
    return {"S/in.tar.bz2": {"soft-stop.sh": f"#!/bin/sh\n{text}\n"}}


SOFT: Final[dict[str, Any]] = {
    "wrapper": EAGER, "StopSigRegex": "sh [^ ]*/soft-stop", "StopSigStartWork": 20, "StopSigFinishWork": 60,
    "local_site": {"CPUTimeLeft": 100, "CPUNormalizationFactor": 10}, "OutputSandbox": LOGS,
    "InputSandbox": ["SB:SandboxSE|/S/in.tar.bz2"],
    "ours": {"limits": {"wall_seconds": 3.0}, "words": {"stop_seconds": 1.5}},
}  # fmt: skip
case("soft stop", Executable="soft-stop.sh",
     sandboxes=soft_script("trap 'echo wound down; exit 130' INT\nsleep 60 & wait"), **SOFT)  # fmt: skip
case("soft stop that ends with 0", Executable="soft-stop.sh",
     sandboxes=soft_script("trap 'echo wound down; exit 0' INT\nsleep 60 & wait"), **SOFT)  # fmt: skip
case("soft stop that nobody heeds", Executable="soft-stop.sh",
     sandboxes=soft_script("trap '' INT\nexec sleep 60"), **SOFT)  # fmt: skip
case("soft stop that meets the shell too", Executable="soft-stop.sh",
     sandboxes=soft_script("trap 'echo wound down; exit 0' INT\nsleep 60 & wait"),
     **{**SOFT, "StopSigRegex": "soft-stop"})  # fmt: skip
case("kill", SLEEP, OutputSandbox=LOGS, OutputData=["*.root"], wrapper=EAGER, kill_at_heartbeat=2)
case("kill, and it ends well", "trap \"echo bye; exit 0\" TERM; echo begun; sleep 60 & wait", OutputSandbox=LOGS,
     OutputData=["*.root"], wrapper=EAGER, kill_at_heartbeat=2)  # fmt: skip
case("heartbeats", "for i in 1 2 3 4 5 6 7 8; do echo line $i; sleep ${SECONDS_OF_SLEEP:-1}; done", OutputSandbox=LOGS,
     wrapper={**EAGER, "MaxJobPeekLines": 3}, ours={"words": {"environment": {"SECONDS_OF_SLEEP": "0.05"}}})  # fmt: skip
for racing, end in RACE.items():
    CASES[racing]["race"] = end

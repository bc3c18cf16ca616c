"""Where we answer otherwise than DIRAC, and why. A difference that is not here fails, and so does one that is here and has
vanished. The table in docs/parity.md is made of this: `python tests/parity/differences.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "parity.md"


@dataclass(frozen=True, slots=True)
class Difference:
    """One reason, and the facts it changes in the answers to some cases."""

    what: str
    dirac: str
    ours: str
    why: str
    cases: tuple[str, ...]
    facts: tuple[str, ...]
    """Names, or patterns of them. Each of these facts differs in each of the cases; a pattern, in one of them at least."""
    theirs: str = ".*"
    """What the value is with DIRAC: a regular expression of all of it. `-` stands for nothing."""
    mine: str = ".*"
    """The same for ours."""
    besides: tuple[str, ...] = ()
    """Facts that follow from these, and may differ, too."""

    def explains(self, case: str, fact: str, theirs: str, ours: str) -> bool:
        """Whether it is this that makes a fact differ."""
        if not any(fnmatchcase(case, pattern) for pattern in self.cases):
            return False
        return any(fnmatchcase(fact, pattern) for pattern in self.besides) or (
            any(fnmatchcase(fact, pattern) for pattern in self.facts)
            and re.fullmatch(self.theirs, theirs, re.DOTALL) is not None
            and re.fullmatch(self.mine, ours, re.DOTALL) is not None
        )

    def places(self) -> Iterator[tuple[str, str]]:
        """Where it has to be seen: a case or a pattern of them, and a fact or a pattern of them."""
        return ((case, fact) for case in self.cases for fact in self.facts)


NOTHING: Final = "-"
ABSENT: Final = r"-"
EMPTY: Final = r""
END: Final = ("end", "statuses")
FOLLOWS: Final = ("exit code", "accounting.*", "parameter.*", "heartbeat.*", "request.*")
"""What a reporter says of an end that is another."""
KEPT: Final = ("sandbox.std.out", "sandbox.std.err")
COMPUTED: Final = ("preProcess.command", "hooks")
STOPPED: Final = ("wall time", "CPU time", "stalled", "disk full", "slot over", "soft stop that nobody heeds", "kill")
SOFT: Final = ("soft stop", "soft stop that meets the shell too")

DELIBERATE: Final = (
    # -- the payload and what it prints -----------------------------------------------------------------------------
    Difference(
        "A log that nothing was printed to",
        "there is none, and the sandbox is said to lack it",
        "is an empty file",
        "Whoever asks for std.err learns that there was nothing, not that it is lost.",
        ("*",),
        ("file.std.out", "file.std.err", "sandbox.std.out", "sandbox.std.err"),
        ABSENT,
        EMPTY,
    ),
    Difference(
        "... and then is the whole sandbox",
        "nothing to upload, and not said to be uploaded",
        "Output Sandbox Uploaded",
        "As above.",
        ("silence", "stalled, but may be"),
        ("statuses",),
        r".*Uploading Output Sandbox > Done.*",
        r".*Uploading Output Sandbox > Completing/Output Sandbox Uploaded > Done.*",
    ),
    Difference(
        "A last line without a line's end",
        "is lost",
        "is in the log",
        "The output goes to files, byte by byte; nobody reads it line by line.",
        ("last line without an end",),
        ("file.std.out", "file.std.err", "sandbox.std.out", "sandbox.std.err"),
    ),
    Difference(
        "Output that is not UTF-8",
        "is replaced by question marks",
        "stays as it is",
        "As above.",
        ("output that is not text",),
        ("file.std.out", "sandbox.std.out"),
        r"\ufffd+ one\ntwo\n",
        r"11 bytes.*",
    ),
    Difference(
        "A shell's word on the death of what it ran",
        "std.err ends with it: Killed, Terminated",
        "there is no such word",
        "A single program is executed without a shell in between, so the signal itself is known. It is in the outcome.",
        ("killed by signal 9", "killed by signal 15"),
        ("file.std.err", "sandbox.std.err"),
        r"(Killed|Terminated)\n",
        EMPTY,
    ),
    Difference(
        "Processes the payload leaves behind in a session of their own",
        "live on after the job",
        "are ended with the payload",
        "Their cores are the next job's.",
        ("leaves a daemon behind",),
        ("file.late.txt",),
        r"late\n",
        ABSENT,
    ),
    Difference(
        "A directory as the executable",
        "is given to the shell: exit code 126",
        "Application not found",
        "It is known before anything is started.",
        ("a directory",),
        (*END, *COMPUTED, "sandbox.std.err", "file.std.err"),
        besides=FOLLOWS,
    ),
    Difference(
        "No executable in the description",
        "Failed: Application not found",
        "the description is refused where it enters",
        "The agent learns at once what is wrong with it, every field at fault.",
        ("no executable at all",),
        ("refused",),
        r"Failed/Application not found",
        r".*Executable: is missing",
    ),
    # -- its environment --------------------------------------------------------------------------------------------
    Difference(
        "Variables of the pilot's",
        "all of them, credentials too",
        "PATH, HOME, LANG and their like",
        "DIRAC #4480. `inherit = [\"*\"]` in the site's `[payload]` gives DIRAC's way back.",
        ("environment",),
        ("environment.PILOT_VARIABLE", "environment.LD_LIBRARY_PATH", "environment.LD_LIBRARY_PATH_SAVE"),
        r".+",
        ABSENT,
    ),
    Difference(
        "OPENSSL_ALLOW_PROXY_CERTS",
        "is set by DIRAC for itself, and inherited",
        "is not there",
        "As above.",
        ("*",),
        ("environment.OPENSSL_ALLOW_PROXY_CERTS", "given.environment.OPENSSL_ALLOW_PROXY_CERTS"),
        r"1|yes",
        ABSENT,
    ),
    Difference(
        "Variables that are ours",
        "none",
        "TMPDIR, LOADMASTER_SITE, LOADMASTER_CORES, and the numbers of threads of OpenMP, OpenBLAS, MKL, NumExpr",
        "Temporary files are the job's own, and libraries do not take all cores of the node.",
        ("*",),
        (
            "environment.TMPDIR",
            "environment.LOADMASTER_*",
            "environment.*_NUM_THREADS",
            "given.environment.TMPDIR",
            "given.environment.LOADMASTER_SITE",
            "given.environment.PWD",
        ),
        ABSENT,
    ),
    Difference(
        "DIRACJOBID, DIRAC_JOB_PROCESSORS",
        "not set by the wrapper of 9.1",
        "set besides JOBID",
        "Payloads written for other versions of DIRAC look for them.",
        ("*",),
        (
            "environment.DIRACJOBID",
            "environment.DIRAC_JOB_PROCESSORS",
            "given.environment.DIRACJOBID",
            "given.environment.DIRAC_JOB_PROCESSORS",
        ),
        ABSENT,
    ),
    Difference(
        "job.info",
        "`/Job` is before the first word only, and the words are in the order they came in",
        "`/Job/` is before each, in one order",
        "Two jobs can be compared; nothing but people is known to read it.",
        ("*",),
        ("job.info",),
        r"the first.*",
        r"each.*",
    ),
    Difference(
        "... its values",
        "as above",
        "as above",
        "As above.",
        (
            "blanks around it",
            "ExecutionEnvironment",
            "CPU time",
            "coordinator Curious",
            "*lower case",
            "data as a string",
        ),
        ("job.info.*",),
    ),
    Difference(
        "... with what the suite tells only us",
        "as above",
        "as above",
        "As above.",
        ("stalled, but *", "heartbeats", "soft stop*"),
        ("job.info.*",),
        r"-",
        r"SECONDS_OF_SLEEP=.*|1\.5",
    ),
    Difference(
        "... of a job whose coordinator cannot be made",
        "as above",
        "as above",
        "As above.",
        ("coordinator ConstructorRaises",),
        ("job.info*",),
        r".+",
        r"-",
    ),
    Difference(
        "... printed by a payload",
        "as above",
        "as above",
        "As above.",
        ("job.info",),
        ("file.std.out", "sandbox.std.out"),
        r"/Job/.*",
        r"/Job/.*",
    ),
    Difference(
        "Numbers in jobArgs and ceArgs of a synchronous coordinator",
        "as they came: '600', 10",
        "numbers: 600.0, 10.0",
        "They have been checked where they entered.",
        ("coordinator Curious",),
        ("given.job.CPUTime", "given.ce.CPUNormalizationFactor"),
    ),
    # -- inputs -----------------------------------------------------------------------------------------------------
    Difference(
        "The archive of an input sandbox",
        "is unpacked from the temporary directory",
        "is in the work directory, and stays there",
        "It comes in as every input does, on the disk that is accounted for.",
        ("a script*", "dirac-jobexec", "input sandbox*", "soft stop*", "coordinator Curious"),
        ("file.*.tar.bz2",),
        ABSENT,
        r"archive of .*",
    ),
    Difference(
        "... and is seen by `ls`, as are the logs",
        "as above",
        "as above",
        "As above.",
        ("input sandbox",),
        ("file.std.out", "sandbox.std.out"),
        r"1\n2\ninner.*",
        r"1\n2\nin\.tar\.bz2\ninner.*",
    ),
    Difference(
        "An input sandbox that is an LFN and cannot be had",
        "Downloading InputSandbox LFN(s) stays",
        "Failed Downloading InputSandbox LFN(s), before it is rescheduled",
        "DIRAC says it when the call as a whole fails, and not when its files do.",
        ("input sandbox by LFN missing", "input sandbox by LFN unreadable"),
        ("statuses",),
    ),
    Difference(
        "Input data that are not what the catalog says",
        "are given to the payload",
        "fail the step: Input Data Resolution, rescheduled",
        "A wrong checksum is a broken file. DIRAC compares those of sandboxes by LFN, not those of input data.",
        ("input data of a wrong checksum",),
        (*END, *COMPUTED, "rescheduled", "file.input.txt", "file.std.out", "sandbox.std.out"),
        besides=FOLLOWS,
    ),
    Difference(
        "Input data without a GUID in the catalog",
        "cannot be resolved: rescheduled",
        "are read as any others",
        "Nothing here needs a GUID.",
        ("input data without a GUID",),
        (*END, *COMPUTED, "rescheduled", "file.input.txt", "file.std.out", "sandbox.std.out"),
        besides=FOLLOWS,
    ),
    # -- outputs ----------------------------------------------------------------------------------------------------
    Difference(
        "A directory in the output sandbox",
        "its tar has the whole path of the worker node in it",
        "its tar begins with the directory",
        "It is unpacked somewhere else.",
        ("sandbox of a directory",),
        ("sandbox.d.tar",),
        r".*<root>/work/123/d/one.*",
        r".*'d/one'.*",
    ),
    Difference(
        "... and where that tar is made",
        "as above",
        "as above",
        "As above.",
        ("sandbox of a directory",),
        ("file.d.tar", "file..d.tar.part"),
    ),
    Difference(
        "Two files of one name in the output sandbox",
        "both are in the archive under it, and one is lost where it is unpacked",
        "the second is refused, and said to be",
        "A file that is lost is said to be.",
        ("sandbox of two files of one name",),
        (*END, "rescheduled", "sandbox twice"),
        besides=FOLLOWS,
    ),
    Difference(
        "The archive of a sandbox while it is made",
        "in the temporary directory; an archive that goes to grid storage is called LDSB and something random",
        "in the work directory; it keeps its name, of its MD5",
        "Its disk is accounted for, and it is the same file wherever it ends up.",
        ("*",),
        (
            "file..<md5>.tar.bz2",
            "stored.*LDSB*",
            "registered.*LDSB*",
            "stored.*<md5>*",
            "registered.*<md5>*",
            "parameter.OutputSandboxLFN",
            "parameter.UploadedOutputData",
        ),
        r"-|.*LDSB.*|archive.*|<number>.*",
        r"-|.*<md5>.*|archive.*|<number>.*",
    ),
    Difference(
        "A job without an owner",
        "runs, and its outputs are left behind: Done",
        "Illegal Job JDL, before anything runs, if outputs need one for their names",
        "An output that is asked for and not delivered is a failure.",
        ("no owner",),
        (*END, *COMPUTED, "file.out.root", "job.info*", "file.std.out"),
        besides=FOLLOWS,
    ),
    Difference(
        "A pattern in an output's LFN; one in a directory; `lfn:` in lower case",
        "is looked for in the pilot's directory, by its last part, or not read as an LFN: nothing is found, and the job "
        "is Done",
        "is looked for in the job's directory, by its whole path and then by its last part",
        "Without it the outputs would be lost with nothing said.",
        ("data by LFN with a directory", "data by LFN pattern", "data by LFN in lower case"),
        ("stored.SE-USER-A:/vo/prod/a.root", "registered./vo/prod/a.root", "parameter.UploadedOutputData"),
        ABSENT,
        besides=("accounting.OutputDataSize",),
    ),
    Difference(
        "... of two files",
        "as above",
        "as above",
        "As above.",
        ("data by LFN pattern",),
        ("stored.SE-USER-A:/vo/prod/b.root", "registered./vo/prod/b.root"),
        ABSENT,
    ),
    Difference(
        "An output of no bytes",
        "cannot be stored: the job is rescheduled",
        "is stored",
        "It may be what the payload meant, and running it again would not change it.",
        ("data empty",),
        (*END, "rescheduled", "stored.*/empty.root", "registered.*/empty.root"),
        besides=FOLLOWS,
    ),
    Difference(
        "The sandbox of a job that is rescheduled, or whose hook failed it",
        "is not uploaded",
        "is uploaded",
        "It says why (DIRAC #5575).",
        ("exit code 222", "exit code 222 once too often", "coordinator Post*", "coordinator Pre*"),
        KEPT,
        ABSENT,
    ),
    # -- coordinators -----------------------------------------------------------------------------------------------
    Difference(
        "Hooks that return nothing",
        "TypeError: Exception During Execution",
        "count as S_OK()",
        "The oldest spelling, which the docstring of DIRAC's class still shows.",
        ("coordinator PreNothing", "coordinator PostNothing"),
        (*END, "sandbox.std.out", "stored.*/a.root", "registered.*/a.root"),
        besides=FOLLOWS,
    ),
    Difference(
        "... and what follows",
        "as above",
        "as above",
        "As above.",
        ("coordinator PreNothing",),
        ("hooks", "file.a.root", "file.std.out"),
    ),
    Difference(
        "Hooks that take the job: `preProcess(self, job)`",
        "TypeError: Exception During Execution",
        "are given it",
        "As above.",
        ("coordinator PreOfJob",),
        (
            *END,
            "hooks",
            "preProcess.job",
            "postProcess.job",
            "sandbox.std.out",
            "stored.*/a.root",
            "registered.*/a.root",
            "file.a.root",
            "file.std.out",
        ),
        besides=FOLLOWS,
    ),
    Difference(
        "postProcess that fails after a payload that failed",
        "Exception During Execution",
        "the payload's failure stays; the hook's is in the pilot's log",
        "What went wrong first is what its owner has to know.",
        ("coordinator PostError of a failed payload", "coordinator PostRaises of a failed payload"),
        END,
        besides=FOLLOWS,
    ),
    # -- limits, stops, kills ---------------------------------------------------------------------------------------
    Difference(
        "What is left of a payload that the watchdog ended",
        "a race: its watchdog and its reader both wait for the payload, and whoever comes second has no exit status; then "
        "there is neither postProcess nor a sandbox",
        "its sandbox is uploaded, with its logs; postProcess is called, except after a kill",
        "DIRAC #5575: the logs say what happened.",
        STOPPED,
        KEPT,
        ABSENT,
    ),
    Difference(
        "... its hooks",
        "as above",
        "as above",
        "As above.",
        tuple(name for name in STOPPED if name != "kill"),
        ("hooks",),
        r"__init__ preProcess",
        r"__init__ preProcess postProcess",
    ),
    Difference(
        "... its log",
        "the shell's word: Terminated",
        "nothing",
        "As above.",
        tuple(name for name in STOPPED),
        ("file.std.err",),
        r"Terminated\n",
        EMPTY,
    ),
    Difference(
        "A killed job's postProcess",
        "is called, if the race ends so",
        "is not called",
        "Who kills a job wants it to end.",
        ("kill, and it ends well",),
        ("hooks",),
        r".* postProcess",
        r"__init__ preProcess",
    ),
    Difference(
        "A payload that ends with 128 + N when it is softly stopped by signal N, or by that signal",
        "Application Finished With Errors: its wrapper knows the rule, and does not tell itself the signal",
        "has succeeded",
        "That is the rule.",
        SOFT,
        END,
        besides=FOLLOWS,
    ),
    Difference(
        "The reason when a slot's time is over",
        "Job has reached the CPU limit of the queue",
        "that of the limit: here, of wall time",
        "The case gives us a limit of wall time, where DIRAC counts down the slot.",
        ("soft stop that nobody heeds",),
        (*END, "parameter.ApplicationError", "accounting.FinalMinorStatus"),
        r".*limit of the queue",
        r".*maximum wall clock time",
    ),
    # -- statuses and requests --------------------------------------------------------------------------------------
    Difference(
        "Statuses nobody hears",
        "are put into a request",
        "are the reporter's to deliver, in their order",
        "The job does not wait for who is told of it.",
        ("nobody hears the statuses",),
        (*END, "request.0"),
        besides=FOLLOWS,
    ),
    Difference(
        "A request that cannot be sent",
        "is tried ten times with up to twelve minutes between, and fails the job",
        "is the reporter's to deliver; the job is Completed",
        "Its outputs are safe.",
        ("no requests can be sent",),
        (*END, "request.0"),
        besides=FOLLOWS,
    ),
    Difference(
        "A reschedule that is refused, for there have been too many",
        "accounted for as Failed",
        "accounted for as Rescheduled",
        "It is the agent that asks for it, after the job's end.",
        ("exit code 222 once too often", "input sandbox missing once too often"),
        ("accounting.FinalMajorStatus",),
        "Failed",
        "Rescheduled",
    ),
    Difference(
        "Times of a payload that was over in five seconds",
        "not said: the watchdog has not seen it",
        "WallClockTime(s), ScaledCPUTime(s)",
        "They are known.",
        ("*",),
        ("parameter.WallClockTime(s)", "parameter.ScaledCPUTime(s)"),
        ABSENT,
        "<number>",
    ),
    Difference(
        "Pilot_Reference",
        "Unknown where nobody said",
        "not said then",
        "It would hide what the agent has said of it.",
        ("*",),
        ("parameter.Pilot_Reference",),
        "Unknown",
        ABSENT,
    ),
    Difference(
        "DownloadInputData",
        "a sentence on where the files came from",
        "not said",
        "Each file has an event of its own.",
        ("*",),
        ("parameter.DownloadInputData",),
        r"Successfully.*",
        ABSENT,
    ),
    Difference(
        "ApplicationError of a killed job",
        "Received Kill signal",
        "not said",
        "It is the minor status, and the application made none.",
        ("kill",),
        ("parameter.ApplicationError",),
        "Received Kill signal",
        ABSENT,
    ),
    Difference(
        "The error's message",
        "Python's words for an exception; nothing for inputs",
        "a sentence that names the thing; for inputs, too",
        "It is read by the job's owner.",
        ("*",),
        ("parameter.Error Message",),
        r"-|\w+Error\(.*",
        r".+",
    ),
    Difference(
        "OutputSandboxMissingFiles and logs that nothing was printed to",
        "has them",
        "has not: they are there",
        "See above.",
        ("*",),
        ("parameter.OutputSandboxMissingFiles",),
        r".*std\.(out|err).*",
        r"(?!.*std\.).*",
    ),
    Difference(
        "OutputSandboxMissingFiles of a job that ran nothing",
        "not said",
        "has all of them",
        "They were asked for.",
        ("no such *", "input *", "coordinator *"),
        ("parameter.OutputSandboxMissingFiles",),
        ABSENT,
        r"std\.out, std\.err",
    ),
    Difference(
        "MissingLFNs",
        "what the catalog does not know",
        "what was not brought in, for whatever reason",
        "A lost replica is a missing file.",
        ("input data unknown", "input data lost"),
        ("parameter.MissingLFNs",),
        r"-|.*No such file.*",
        r".*not brought in",
    ),
    Difference(
        "OutputData: MissingFiles",
        "with the worker node's path",
        "by their names in the work directory",
        "The path is gone with the job.",
        ("data, everything is down", "data, one of two cannot leave", "data of a name that is taken"),
        ("parameter.OutputData",),
        r"MissingFiles: .*",
        r"MissingFiles: .*",
    ),
    Difference(
        "Accounting: sizes of sandboxes",
        "of their files",
        "of their archives",
        "It is what was moved, and what the store has.",
        ("*",),
        ("accounting.InputSandBoxSize", "accounting.OutputSandBoxSize"),
        r"\d+",
        r"\d+",
    ),
    Difference(
        "Accounting: output data",
        "files as declared (a pattern is one), bytes that were to be uploaded",
        "files and bytes that were uploaded",
        "What is accounted for is there.",
        ("*",),
        ("accounting.OutputDataFiles", "accounting.OutputDataSize"),
        r"\d+",
        r"\d+",
    ),
    Difference(
        "Heartbeats: Vsize",
        "is told",
        "is not",
        "The size of an address space says nothing of memory. DiracX does without.",
        ("*",),
        ("heartbeat.dynamic",),
        r".*Vsize.*",
        r"(?!.*Vsize).+",
    ),
    Difference(
        "Heartbeats of a payload that its watchdog ends at the first look, or has not seen yet",
        "none, or without its lines",
        "sent, with its last lines",
        "Heartbeats do not wait for a watchdog.",
        ("disk full",),
        ("heartbeat.dynamic", "heartbeat.from"),
        "|JobWrapper",
        r".+",
    ),
    Difference(
        "... of one that uses its CPU",
        "as above, by chance",
        "as above",
        "As above.",
        ("CPU time",),
        (),
        besides=("heartbeat.dynamic", "heartbeat.from"),
    ),
    Difference(
        "... of one that prints nothing",
        "as above",
        "as above",
        "As above.",
        ("stalled, but may be", "soft stop*"),
        ("heartbeat.from",),
        "JobWrapper",
        r"JobWrapper \| Watchdog",
    ),
    Difference(
        "A kill, or a limit, of a payload that ends well then",
        "ApplicationError and Error Message are lost in the race",
        "are said",
        "See above.",
        ("wall time, and it ends well",),
        ("parameter.ApplicationError",),
        ABSENT,
        r".+",
    ),
    Difference(
        "The last line in the last heartbeat of what was stopped",
        "the shell's word: Terminated",
        "the payload's",
        "See above.",
        STOPPED,
        ("heartbeat.last",),
        r".*Terminated",
        r"(?!.*Terminated).*",
    ),
    Difference(
        "Requests to move a file",
        "name the file, its size and checksum",
        "name its place, too",
        "It costs nothing.",
        ("data to failover",),
        ("request.0", "request.1"),
        r"(?!.*PFN).*",
        r".*PFN.*",
    ),
    Difference(
        "The place of a file to be registered",
        "as its storage has it: here, a path",
        "a URL",
        "It says which kind of storage it is at.",
        ("data not registered",),
        ("request.0",),
        r'.*"PFN": "<root>.*',
        r'.*"PFN": "file://<root>.*',
    ),
    Difference(
        "One of several outputs cannot leave",
        "an empty std.err keeps its sandbox from being said uploaded",
        "the sandbox is said to be uploaded",
        "As for logs that nothing was printed to.",
        ("data, one of two cannot leave",),
        ("statuses",),
    ),
)

GAPS: Final = (
    Difference(
        "The last lines of a payload that succeeded",
        "are in the last heartbeat",
        "are not kept: only those of failures",
        "To be kept with the end of every payload that is followed.",
        ("*",),
        ("heartbeat.last",),
        r".*Last [1-9].*",
        r".*Last 0 lines.*====\n",
    ),
    Difference(
        "Requests a payload leaves: *_request.json",
        "are sent with the job's own: Completed",
        "are not read",
        "To be done with pending operations.",
        ("a request of the payload",),
        (*END, "request.0"),
        besides=FOLLOWS,
    ),
)


def unexplained(case: str, found: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """The differences of a case that the tables do not know."""
    rules = (*DELIBERATE, *GAPS)
    return {fact: both for fact, both in found.items() if not any(rule.explains(case, fact, *both) for rule in rules)}


def vanished(found: dict[str, dict[str, tuple[str, str]]]) -> list[str]:
    """What the tables declare and is not to be seen (any more) in the differences of all cases."""
    missing = []
    for rule in (*DELIBERATE, *GAPS):
        for case, fact in rule.places():
            seen = (
                rule.explains(name, each, *both) and fnmatchcase(each, fact)
                for name, differing in found.items() if fnmatchcase(name, case)
                for each, both in differing.items()
            )  # fmt: skip
            if not any(seen):
                missing.append(f"{rule.what}: {fact} of {case!r}")
    return missing


BEGIN, END_OF_TABLE = "<!-- made by tests/parity/differences.py", "<!-- end -->"


def document(text: str) -> str:
    """The page with its tables made anew."""
    for name, rules in (("deliberate", DELIBERATE), ("gaps", GAPS)):
        begin = f"{BEGIN}: {name} -->\n"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}{_table(rules)}{END_OF_TABLE}{rest.partition(END_OF_TABLE)[2]}"
    return text


def _table(rules: Sequence[Difference]) -> str:
    lines = ["| what | DIRAC | loadmaster | why |", "| --- | --- | --- | --- |"]
    for rule in rules:
        if not rule.what.startswith("..."):
            lines.append(f"| {rule.what} | {rule.dirac} | {rule.ours} | {rule.why} |".replace("*_", "\\*_"))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text()))

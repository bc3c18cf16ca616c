"""The command line, run as a user runs it: a process, its exit code, what it prints."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from loadmaster.cli import COMMANDS

SUBCLASS = "from loadmaster import *\nclass C(JobExecutionCoordinator):"

LOADMASTER = [sys.executable, "-W", "error", "-m", "loadmaster"]


class Shell:
    """A directory and the command in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def start(self, job: dict[str, Any] | str, *options: str, command: str = "run") -> subprocess.Popen[str]:
        (self.directory / "job.json").write_text(job if isinstance(job, str) else json.dumps(job))
        return subprocess.Popen(
            [*LOADMASTER, command, "job.json", *(["--scratch", "scratch"] if command == "run" else []), *options],
            cwd=self.directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, job: dict[str, Any] | str, *options: str, command: str = "run") -> subprocess.CompletedProcess[str]:
        with self.start(job, *options, command=command) as process:
            out, err = process.communicate(timeout=30)
        assert "Traceback" not in err
        assert [*(self.directory / "scratch").glob("*")] == [] or "--keep-workdir" in options
        return subprocess.CompletedProcess([], process.returncode, out, err)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def sh(script: str, **words: Any) -> dict[str, Any]:
    return {"JobID": 7, "Executable": "/bin/sh", "Arguments": f"-c '{script}'", "OutputSandbox": ["std.out"], **words}


def test_a_job_that_succeeds_is_0_and_says_where_its_outputs_are(shell: Shell) -> None:
    done = shell.run(sh("echo hi; echo data > o.txt", OutputData="o.txt", OutputSE="./results"))
    assert done.returncode == 0
    assert "Done" in done.stdout
    assert str(shell.directory / "results" / "o.txt") in done.stdout
    assert (shell.directory / "outputs" / "7" / "std.out").read_text() == "hi\n"
    assert "payload ended: exit code 0" in done.stderr
    assert f"out  o.txt  5 B  to {shell.directory}/results/o.txt\n" in done.stderr


def test_result_and_events_are_json(shell: Shell) -> None:
    shell.run(sh("exit 4"), "--result", "r.json", "--events", "e.jsonl")
    result = json.loads((shell.directory / "r.json").read_text())
    assert (result["job_id"], result["attempt"], result["status"]) == ("7", 1, "Failed")
    assert (result["failure"]["kind"], result["outcome"]["exit_code"]) == ("PayloadFailed", 4)
    assert {"signal", "wall_seconds", "cpu_seconds", "peak_memory_bytes", "verdict"} <= result["outcome"].keys()
    events = [json.loads(line) for line in (shell.directory / "e.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events][:1] == ["JobAccepted"]
    assert [event["kind"] for event in events][-1:] == ["JobFinished"]
    assert all({"kind", "job_id", "attempt", "time"} <= event.keys() for event in events)


def test_an_event_file_has_no_values_of_the_payloads_environment(shell: Shell) -> None:
    shell.run(sh("true", ExecutionEnvironment="TOKEN=s3cret"), "--events", "e.jsonl")
    written = (shell.directory / "e.jsonl").read_text()
    assert "TOKEN" in written
    assert "s3cret" not in written


def test_diracs_wrapper_file_is_a_job_too(shell: Shell) -> None:
    done = shell.run({"Job": sh("echo $LOADMASTER_SITE"), "CE": {"Site": "LCG.CERN.cern", "GridCE": "ce"}})
    assert done.returncode == 0
    assert (shell.directory / "outputs" / "7" / "std.out").read_text() == "LCG.CERN.cern\n"


@pytest.mark.parametrize(
    ("job", "code", "message"),
    [
        ("{not json", 1, "job.json: not JSON"),
        ("[1, 2]", 1, "an object {...} is expected, not list"),
        ({"JobID": 7}, 1, "Executable: is missing"),
        ({"Executable": "x", "NumberOfProcessors": "many"}, 1, "NumberOfProcessors: "),
        ({"executable": "x", "std_out": "y"}, 1, "std_out: there is no such field"),
        ({"Executable": "x", "InputData": "../../etc/pass\nwd"}, 1, "control characters"),
        ({"Executable": "no-such-program"}, 1, "no-such-program"),
        ({"Executable": "/bin/true", "InputData": "/nowhere/in.dat"}, 1, "/nowhere/in.dat: No such file or directory"),
        ({"Executable": "/bin/true", "InputData": "LFN:/vo/in.dat"}, 1, "LFN:/vo/in.dat: needs a catalog"),
        ({"Executable": "/bin/true", "OutputData": "o", "OutputSE": "DISK"}, 1, "DISK"),
        (sh("exit 3"), 2, "exit code 3"),
        (sh("kill -9 $$"), 2, "signal 9"),
        (sh("sleep 9", limits={"wall_seconds": 0.2}), 2, "wall time"),
        (sh("ln -s /etc/passwd o", OutputData="o", OutputSE="./r"), 3, "symbolic link out of the work directory"),
        (sh("mkfifo o", OutputData="o", OutputSE="./r"), 3, "is a FIFO"),
        (sh("echo x > o", OutputData="o", OutputSE="/dev/null/x"), 3, "/dev/null/x/o: Not a directory"),
        (sh("exit 222"), 4, "222"),
    ],
)  # fmt: skip
def test_what_went_wrong_is_told_by_the_exit_code_and_by_name(
    shell: Shell, job: dict[str, Any] | str, code: int, message: str
) -> None:
    done = shell.run(job)
    assert (done.returncode, message in done.stderr) == (code, True), done.stderr


def test_an_output_that_was_not_made_is_said_and_does_not_fail(shell: Shell) -> None:
    done = shell.run(sh("true", OutputData="o", OutputSE="./r"))
    assert done.returncode == 0
    assert "o  not delivered" in done.stdout
    assert "the payload did not make it" in done.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "no such file"),
        ("def f(:", "SyntaxError"),
        ("import nothing_of_the_kind", "ModuleNotFoundError"),
        ("x = 1", "has no 'C'"),
        ("C = 1", "is not a class but 1"),
        ("class C: pass", "has no preProcess"),
        (f"{SUBCLASS}\n def __init__(self, **_): raise KeyError('x')", "KeyError"),
        (f"{SUBCLASS}\n async def preProcess(self, c, e): return 5", "preProcess returned 5"),
        (f"{SUBCLASS}\n async def postProcess(self): 1 / 0", "ZeroDivisionError"),
    ],
)  # fmt: skip
def test_a_coordinator_that_cannot_be_used_is_named(shell: Shell, source: str | None, message: str) -> None:
    if source is not None:
        (shell.directory / "mine.py").write_text(source)
    done = shell.run(sh("true"), "--coordinator", "mine.py:C")
    assert done.returncode in {1, 2}
    assert message in done.stderr


def test_a_synchronous_coordinator_is_adapted_and_found_in_the_current_directory(shell: Shell) -> None:
    (shell.directory / "legacy.py").write_text(
        "class C:\n"
        " def __init__(self, jobArgs, ceArgs): self.id = jobArgs['JobID']\n"
        " def preProcess(self, command, exeEnv):\n"
        "  return {'OK': True, 'Value': {'command': f'echo legacy {self.id}', 'env': exeEnv}}\n"
        " def postProcess(self): return {'OK': True, 'Value': None}\n"
    )
    assert shell.run(sh("true"), "--coordinator", "legacy:C").returncode == 0
    assert (shell.directory / "outputs" / "7" / "std.out").read_text() == "legacy 7\n"


def test_a_coordinator_that_blocks_the_loop_is_warned_about(shell: Shell) -> None:
    (shell.directory / "mine.py").write_text(
        "import time\nfrom loadmaster import *\n"
        "class C(JobExecutionCoordinator):\n async def postProcess(self): time.sleep(0.5)"
    )
    done = shell.run(sh("true"), "--coordinator", "mine.py:C")
    assert done.returncode == 0
    assert "C.postProcess held the event loop for 0.5 s" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_told_to_stop_it_stops_the_payload_delivers_the_sandbox_and_says_so(
    shell: Shell, number: int, code: int
) -> None:
    process = shell.start(sh("echo begun; exec sleep 60"), "--result", "r.json")
    with process:
        _read_until(process, "payload runs")
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert "stopping the payload" in err
    assert json.loads((shell.directory / "r.json").read_text())["status"] == "Killed"
    assert (shell.directory / "outputs" / "7" / "std.out").exists()


def test_told_twice_it_leaves_at_once_and_leaves_nothing(shell: Shell) -> None:
    process = shell.start(sh('trap "" TERM; echo begun; while :; do sleep 1; done', limits={"grace_seconds": 1}))
    with process:
        _read_until(process, "payload runs")
        process.send_signal(signal.SIGINT)
        _read_until(process, "stopping the payload")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "leaving" in err
    assert list((shell.directory / "scratch").iterdir()) == []


def test_a_second_signal_ends_a_coordinator_that_blocks_the_loop(shell: Shell) -> None:
    (shell.directory / "mine.py").write_text(
        "import time\nfrom loadmaster import *\nclass C(JobExecutionCoordinator):\n"
        " async def preProcess(self, c, e):\n  print('blocked', flush=True)\n  time.sleep(60)"
    )
    with shell.start(sh("true"), "--coordinator", "mine.py:C") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "blocked\n"
        for _ in range(50):  # as a person does; two at once would be one
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=0.1)
                break
    assert process.returncode == 130
    assert list((shell.directory / "scratch").iterdir()) == []


def test_the_work_directory_is_kept_on_request(shell: Shell) -> None:
    done = shell.run(sh("echo x > left"), "--keep-workdir")
    assert (shell.directory / "scratch" / "7" / "left").read_text() == "x\n"
    assert str(shell.directory / "scratch" / "7") in done.stdout


def test_quiet_prints_nothing_but_errors(shell: Shell) -> None:
    assert (lambda done: (done.stdout, done.stderr))(shell.run(sh("true"), "--quiet")) == ("", "")
    assert "exit code 3" in shell.run(sh("exit 3"), "--quiet").stderr


def test_check_says_what_a_description_means_without_running_it(shell: Shell) -> None:
    done = shell.run(sh("touch ran", CommunityKey=1), command="check")
    assert done.returncode == 0
    assert json.loads(done.stdout)["job_id"] == "7"
    assert "CommunityKey" in done.stderr
    assert not (shell.directory / "outputs").exists()


def test_check_refuses_what_run_would_refuse(shell: Shell) -> None:
    assert shell.run({"Executable": ""}, command="check").returncode == 1


def test_check_names_every_input_that_cannot_be_found(shell: Shell) -> None:
    (shell.directory / "there").write_text("cargo")
    inputs = ["there", "gone", "LFN:/vo/a", "https://host.invalid/b"]
    done = shell.run(sh("true", InputData=inputs, InputSandbox=["also gone"]), command="check")
    assert done.returncode == 1
    assert set(done.stderr.splitlines()) == {
        "1 of the inputs are at servers, which were not asked: --online does",
        "job.json: input_data: LFN:/vo/a: needs a catalog: give a site configuration",
        f"job.json: input_data: {shell.directory}/gone: No such file or directory",
        f"job.json: input_sandbox: {shell.directory}/also gone: No such file or directory",
    }
    done = shell.run(sh("true", InputData=["there", "https://host.invalid/b"]), command="check")
    assert done.returncode == 0
    done = shell.run(sh("true", InputData=["there", "https://127.0.0.1:1/b"]), "--online", command="check")
    assert done.returncode == 1
    assert "https://127.0.0.1:1/b: " in done.stderr


def test_check_names_all_that_is_wrong_at_once_and_misspelled_hooks(shell: Shell) -> None:
    """It called valid what no node could have run: a program that is nowhere, a scheme nobody serves, a deadline in 1970."""
    (shell.directory / "mine.py").write_text(f"{SUBCLASS}\n async def preprocess(self, c, e): ...")
    job = sh(
        "true", limits={"deadline": 3600}, OutputData={"pattern": "o", "target": "odd://h/o"}, Executable="nothing"
    )
    done = shell.run(job, "--coordinator", "mine.py:C", command="check")
    assert done.returncode == 1
    assert json.loads(done.stdout)["job_id"] == "7"
    assert [line[:60] for line in done.stderr.splitlines()] == [
        "job.json: C.preprocess is never called: the hook is preProcess"[:60],
        "job.json: limits.deadline: 1970-01-01 01:00:00 UTC lies in the past"[:60],
        "job.json: executable 'nothing': neither a file of the job nor in PATH"[:60],
        "job.json: output_data: odd://h/o: no storage for odd://; there is"[:60],
    ]
    (shell.directory / "site.toml").write_text('streems = 1\n[storage.https]\ntokn = "x"\n[payload]\nisolation = 5\n')
    job = sh("true", Executable="nothing", OutputSE=["A", "B"], OutputData="o")
    done = shell.run(job, "--config", "site.toml", command="check")
    assert done.returncode == 1
    for told in (
        "site.toml: payload.isolation: ", "site.toml: streems: there is no such field; there is streams",
        "[storage.https] tokn: ", "executable 'nothing'", "output_se: no storage elements 'A', 'B' (none is configured)",
    ):  # fmt: skip
        assert told in done.stderr
    (shell.directory / "mine.py").write_text(
        f"{SUBCLASS}\n async def stage_inn(self): ...\n async def preProcess(self): ..."
    )
    done = shell.run(sh("true"), "--coordinator", "mine.py:C", command="check")
    assert done.returncode == 1
    assert [line[:46] for line in done.stderr.splitlines()] == [
        "job.json: C.stage_inn is never called: the hook is stageIn"[:46],
        "job.json: C.preProcess cannot be called: too many"[:46],
    ]
    done = shell.run(sh("true"), "--coordinator", "nobody.py:C", command="check")
    assert done.returncode == 1
    assert (
        "job.json: coordinator nobody.py:C: cannot import it: FileNotFoundError: nobody.py: no such file" in done.stderr
    )


def test_a_live_display_works_on_a_terminal(shell: Shell) -> None:
    pytest.importorskip("rich")
    (shell.directory / "job.json").write_text(json.dumps(sh("sleep 1.5", InputData=[__file__])))
    command = " ".join([*LOADMASTER, "run", "job.json"])
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"], cwd=shell.directory, capture_output=True, text=True, timeout=30,
        env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "payload  CPU" in done.stdout
    assert "Done" in done.stdout


@pytest.mark.parametrize("stderr", ["2>/dev/full", "2>&-", "2>&1 | head -n 1 >/dev/null; exit ${PIPESTATUS[0]}"])
def test_a_display_that_is_gone_stops_no_job(shell: Shell, stderr: str) -> None:
    (shell.directory / "job.json").write_text(json.dumps(sh("echo hi; sleep 0.2")))
    command = " ".join([*LOADMASTER, "run", "job.json", "--scratch", "scratch", stderr])
    done = subprocess.run(["bash", "-c", command], cwd=shell.directory, capture_output=True, timeout=30)
    assert done.returncode == 0
    assert (shell.directory / "outputs" / "7" / "std.out").read_text() == "hi\n"


def test_events_that_cannot_be_written_stop_no_job(shell: Shell) -> None:
    done = shell.run(sh("true"), "--events", "/dev/full")
    assert done.returncode == 0
    assert "/dev/full: no more events are written" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--events", "job.json/e"], "--events job.json/e: "),
        (["--output", "job.json"], "--output job.json: Not a directory"),
        (["--output", "job.json/below"], "--output job.json/below: Not a directory"),
        (["--result", "."], "--result .: Is a directory"),
        (["--result", "/proc/r.json"], "--result /proc/r.json: No such file or directory"),
        (["--result", "job.json/r"], "--result job.json/r: File exists"),
        (["--scratch", "/proc/nowhere"], "/proc/nowhere/7: cannot make the work directory"),
        (["--coordinator", "mine.py"], "which class? mine.py:CLASS"),
    ],
)
def test_a_place_that_cannot_be_used_is_told_in_one_line_before_anything_runs(
    shell: Shell, options: list[str], message: str
) -> None:
    done = shell.run(sh("touch ran"), *options)
    assert done.returncode == 1
    assert message in done.stderr


def test_a_result_that_cannot_be_written_in_the_end_is_said_and_the_job_is_told_all_the_same(
    shell: Shell, small_disk: Path
) -> None:
    """Of a job that was Done nothing was to be seen but `No space left on device`."""
    done = shell.run(sh(f'head -c 2M /dev/zero > "{small_disk}/full"; true'), "--result", f"{small_disk}/r.json")
    assert done.returncode == 3
    assert done.stdout.startswith("Done\n")
    assert f"--result {small_disk}/r.json: No space left on device: it was not written" in done.stderr
    assert [path.name for path in small_disk.iterdir()] == ["full"]


def test_where_outputs_go_is_said_by_the_option_rather_than_by_the_site(shell: Shell) -> None:
    """`--output` meant nothing, silently, where the site had an output_directory."""
    (shell.directory / "site.toml").write_text('output_directory = "of the site"')
    for options, place in (([], "of the site"), (["--output", "mine"], "mine")):
        assert shell.run(sh("true"), "--config", "site.toml", *options).returncode == 0
        assert (shell.directory / place / "std.out").exists()


def test_a_job_may_be_given_less_than_all_of_the_machine(shell: Shell) -> None:
    words = {"OutputSandbox": "std.out", "NumberOfProcessors": 2}
    done = shell.run(sh("true", **words), "--cores", "1")
    assert (done.returncode, "needs 2 cores" in done.stderr) == (1, True), done.stderr
    assert shell.run(sh("echo $LOADMASTER_CORES", NumberOfProcessors=1), "--cores", "1").returncode == 0
    assert (shell.directory / "outputs" / "7" / "std.out").read_text() == "1\n"
    assert shell.run(sh("true", Memory=2000), "--memory", "1G").returncode == 1


def test_where_work_directories_are_made_is_said_as_for_a_node_or_as_it_used_to_be(shell: Shell) -> None:
    for option in ("--scratch", "--root"):
        assert shell.run(sh("pwd"), option, "elsewhere").returncode == 0
        assert (shell.directory / "outputs" / "7" / "std.out").read_text() == f"{shell.directory}/elsewhere/7\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_names_its_exit_codes(command: str) -> None:
    done = subprocess.run([*LOADMASTER, command, "--help"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0
    _, _, codes = " ".join(done.stdout.split()).partition("Exit codes: ")
    named = {code for code in ("0", "1", "2", "3", "4", "64", "129", "130", "143") if re.search(rf"\b{code}\b", codes)}
    looks = {"0", "1", "64"}
    runs = {**dict.fromkeys(("check", "jobs", "show", "pending"), looks), "stage": looks | {"3", "129", "130", "143"}}
    runs |= dict.fromkeys(("node", "resume"), looks | {"2", "129", "130", "143"})
    assert named == runs.get(command, looks | {"2", "3", "4", "129", "130", "143"})


def test_words_that_make_no_sense_are_no_payload_that_failed() -> None:
    for words in ([], ["run"], ["fly", "job.json"], ["run", "job.json", "--cores", "many"]):
        done = subprocess.run([*LOADMASTER, *words], capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stdout) == (64, "")
        assert "usage: loadmaster" in done.stderr


def test_a_result_goes_through_a_link_and_not_in_place_of_it(shell: Shell) -> None:
    (shell.directory / "link").symlink_to("real")
    shell.run(sh("true"), "--result", "link")
    assert (shell.directory / "link").is_symlink()
    assert json.loads((shell.directory / "real").read_text())["status"] == "Done"


def test_a_second_signal_does_not_wait_for_the_grace(shell: Shell) -> None:
    with shell.start(sh('trap "" TERM; while :; do sleep 1; done')) as process:
        _read_until(process, "payload runs")
        process.send_signal(signal.SIGINT)
        _read_until(process, "stopping the payload")
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - begun < 5  # the grace is ten


def _read_until(process: subprocess.Popen[str], words: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if words in line:
            return
    raise AssertionError(f"it never said {words!r}")


INTERRUPTED = """
import os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs us in the background may ignore it

def interrupt(event, arguments):
    if event == "import" and arguments[0].startswith({begins!r}):
        os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(interrupt)
sys.argv = ["loadmaster", "node", "jobs.jsonl"]
from loadmaster.cli import command
command()
"""


@pytest.mark.parametrize(
    "begins", ["loadmaster.commands.arguments", "loadmaster.errors", "anyio", "argparse", "pydantic"]
)
def test_an_interrupt_while_a_command_is_loaded_is_one_line_and_no_traceback(begins: str) -> None:
    """`import loadmaster` loaded nearly all of it, before anybody could hear an interrupt."""
    script = INTERRUPTED.format(begins=begins)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "loadmaster: interrupted; nothing was begun\n"

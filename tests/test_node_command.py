"""`loadmaster node`, run as a user runs it: a process, signals or a terminal's Ctrl-C, its exit code, what it leaves."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

LOADMASTER = [sys.executable, "-W", "error", "-m", "loadmaster"]
SECONDS = 50
"""Longer than anything here takes on a busy machine."""

CTRL_C = b"\x03"


class Shell:
    """A directory, and the command in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.options = ["jobs.jsonl", "--cores", "1", "--scratch", "scratch", "--results", "results"]

    def write(self, *jobs: dict[str, Any] | str, name: str = "jobs.jsonl") -> None:
        lines = [job if isinstance(job, str) else json.dumps(job) for job in jobs]
        (self.directory / name).write_text("".join(f"{line}\n" for line in lines))

    def start(self, *options: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*LOADMASTER, "node", *(options or self.options)], cwd=self.directory, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        with self.start(*options) as process:
            try:
                out, err = process.communicate(timeout=SECONDS)
            except BaseException:
                process.kill()
                raise
        assert "Traceback" not in err
        return subprocess.CompletedProcess([], process.returncode, out, err)

    def results(self) -> dict[str, str]:
        """The job and how it ended, by the name of the file."""
        found = {path.name: json.loads(path.read_text()) for path in (self.directory / "results").iterdir()}
        return {name: result["status"] for name, result in sorted(found.items())}

    def wait_for(self, name: str) -> None:
        """Until a payload has made a file."""
        give_up = time.monotonic() + SECONDS
        while not (self.directory / name).exists():
            assert time.monotonic() < give_up, f"{name} never came"
            time.sleep(0.01)

    @property
    def left(self) -> list[str]:
        return os.listdir(self.directory / "scratch")


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def job(name: str, script: str = "true", **words: Any) -> dict[str, Any]:
    return {"job_id": name, "executable": "/bin/sh", "arguments": ["-c", script], **words}


# -- to the end --------------------------------------------------------------------------------------------------


def test_all_jobs_are_run_and_each_has_a_result_and_its_outputs(shell: Shell) -> None:
    shell.write(*(job(f"j{n}", f"echo {n}", output_sandbox=["std.out"]) for n in range(5)))
    done = shell.run(*shell.options, "--events", "events.jsonl")
    assert (done.returncode, done.stderr.count("Done")) == (0, 5), done.stderr
    assert done.stdout.startswith("5 Done in ")
    assert shell.results() == {f"j{n}.json": "Done" for n in range(5)}
    assert (shell.directory / "outputs" / "j3" / "std.out").read_text() == "3\n"
    events = [json.loads(line) for line in (shell.directory / "events.jsonl").read_text().splitlines()]
    for name in shell.results():
        kinds = [event["kind"] for event in events if f"{event.get('job_id')}.json" == name]
        assert (kinds[0], kinds[-1]) == ("JobAccepted", "JobFinished")
    assert shell.left == []


def test_a_directory_of_job_files_is_a_source_too(shell: Shell) -> None:
    (shell.directory / "jobs").mkdir()
    for name in ("b", "a"):
        shell.write(job(name, f"echo {name} >> {shell.directory}/order"), name=f"jobs/{name}.json")
    shell.write("not a job", name="jobs/notes.txt")
    done = shell.run("jobs", *shell.options[1:])
    assert done.returncode == 0, done.stderr
    assert (shell.directory / "order").read_text() == "a\nb\n"
    assert "loadmaster: jobs: skipped, for job files end in .json or .jdl: notes.txt" in done.stderr


def test_a_directory_of_diracs_wrapper_files_and_jdl_is_a_source_too(shell: Shell) -> None:
    (shell.directory / "jobs").mkdir()
    shell.write({"Job": {"Executable": "/bin/true", "JobID": "12"}, "CE": {"Site": "LCG.X.y"}}, name="jobs/a.json")
    shell.write('[ Executable = "/bin/false"; JobID = 5; ]', name="jobs/b.jdl")
    shell.write('[ Executable = "/bin/true', name="jobs/c.jdl")
    done = shell.run("jobs", *shell.options[1:])
    assert shell.results() == {"12.json": "Done", "5.json": "Failed"}, done.stderr
    assert re.search(r"loadmaster: jobs/c\.jdl: .*line 1", done.stderr), done.stderr


def test_a_jdl_file_is_one_job_over_its_lines(shell: Shell) -> None:
    """One of its lines was run as a job, and the others were said to be none."""
    (shell.directory / "one.jdl").write_text('[\n Executable = "/bin/true";\n JobName = "alone";\n]\n')
    done = shell.run("one.jdl", "--scratch", "scratch")
    assert (done.returncode, done.stdout.partition(" in ")[0]) == (0, "1 Done")


def test_events_have_why_cores_are_idle(shell: Shell) -> None:
    shell.write(job("narrow", "sleep 0.3"), job("wide", number_of_processors=2, priority=-1))
    assert shell.run("jobs.jsonl", "--cores", "2", "--scratch", "scratch", "--events", "e.jsonl").returncode == 0
    lines = [json.loads(line) for line in (shell.directory / "e.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["kind"] == "Occupation"]
    assert all(line["cores"] == line["busy_cores"] + sum(line["idle"].values()) == 2 for line in found)
    reasons = [(line["busy_cores"], line["idle"]) for line in found]
    assert (1, {"fewer than the next job needs": 1}) in reasons or (1, {"held for a large job": 1}) in reasons
    assert (2, {}) in reasons


def test_jobs_that_had_ended_before_are_told_as_such(shell: Shell) -> None:
    shell.write(job("first"), job("second"))
    assert shell.run(*shell.options, "--journal", "journal").returncode == 0
    done = shell.run(*shell.options, "--journal", "journal")
    assert (done.returncode, done.stdout.partition(" in ")[0]) == (
        0, "no new jobs (2 had ended before, and were not run again)"
    )  # fmt: skip


def test_a_failed_job_is_told_by_the_exit_code_and_by_name(shell: Shell) -> None:
    shell.write(job("good"), job("bad", "exit 3"), job("large", number_of_processors=99))
    done = shell.run()
    assert done.returncode == 2
    assert re.search(r"bad  Failed .*exit code 3", done.stderr)
    assert "large  Failed  PayloadNotStarted: the job needs 99 cores, the node has 1" in done.stderr
    assert shell.results() == {"bad.json": "Failed", "good.json": "Done", "large.json": "Failed"}


def test_lines_that_are_no_jobs_are_named_and_keep_nothing_from_running(shell: Shell) -> None:
    shell.write("{", job("first"), "[1]", "", '{"job_id": "x"}', job("second", job_type=[1]), job("last"))
    done = shell.run()
    assert done.returncode == 1
    assert shell.results() == {"first.json": "Done", "last.json": "Done"}
    for place, complaint in ((1, "not JSON"), (3, "an object {...} is expected"), (5, "is missing"), (6, "job_type")):
        assert re.search(rf"loadmaster: jobs\.jsonl:{place}: .*{re.escape(complaint)}", done.stderr), done.stderr


def test_of_many_lines_that_are_no_jobs_the_first_are_named(shell: Shell) -> None:
    (shell.directory / "jobs.jsonl").write_text("nonsense\n" * 150)
    done = shell.run()
    told = done.stderr.splitlines()
    assert (done.returncode, len(told), told[-1]) == (1, 101, "loadmaster: and 50 more")


def test_a_file_of_one_job_is_told_to_be_one(shell: Shell) -> None:
    """Each of its lines was named as no JSON, and that was all."""
    (shell.directory / "jobs.jsonl").write_text(json.dumps(job("one", "true"), indent=2))
    done = shell.run()
    assert done.returncode == 1
    assert done.stderr.endswith("jobs.jsonl: is one job over many lines: `loadmaster run` takes it\n")


def test_a_second_job_of_the_same_name_does_not_overwrite_the_result_of_the_first(shell: Shell) -> None:
    shell.write(job("twin", "sleep 1"), job("twin"))
    done = shell.run()
    assert done.returncode == 1
    assert shell.results() == {"twin.json": "Done"}
    assert "loadmaster: jobs.jsonl:2: there is a job twin already: jobs.jsonl:1" in done.stderr


def test_quiet_prints_nothing(shell: Shell) -> None:
    shell.write(job("good"))
    done = shell.run(*shell.options, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_source_without_jobs_is_done_at_once_and_said_to_have_none(shell: Shell) -> None:
    shell.write()
    done = shell.run()
    assert (done.returncode, done.stdout.partition(" in ")[0]) == (0, "no jobs")
    assert done.stderr == "loadmaster: warning: jobs.jsonl: there are no jobs in it (a line for each is expected)\n"
    (shell.directory / "folder").mkdir()
    (shell.directory / "folder" / "notes.txt").write_text("nothing")
    done = shell.run("folder", "--scratch", "scratch")
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "loadmaster: folder: skipped, for job files end in .json or .jdl: notes.txt",
        "loadmaster: warning: folder: there are no jobs in it (a file that ends in .json or .jdl for each is expected)",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere.jsonl"], "nowhere.jsonl: No such file or directory: SOURCE is a file with a job a line"),
        (["jobs.jsonl", "--cores", "0"], "--cores"),
        (["jobs.jsonl", "--memory", "1000"], "'1000': is less than 1M; without a unit it is bytes"),
        (["jobs.jsonl", "--results", "jobs.jsonl"], "--results jobs.jsonl: Not a directory"),
        (["jobs.jsonl", "--output", "jobs.jsonl"], "--output jobs.jsonl: Not a directory"),
        (["jobs.jsonl", "--events", "jobs.jsonl/e"], "--events jobs.jsonl/e"),
        (["jobs.jsonl", "--coordinator", "mine.py"], "which class? mine.py:CLASS"),
        (["jobs.jsonl", "--config", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_what_cannot_be_used_is_told_in_a_line_before_anything_runs(
    shell: Shell, options: list[str], message: str
) -> None:
    shell.write(job("one", f"touch {shell.directory}/ran"))
    done = shell.run(*options, "--scratch", "scratch")
    assert done.returncode in {1, 64}
    assert message in done.stderr
    assert not (shell.directory / "ran").exists()


def test_events_that_cannot_be_written_stop_no_job(shell: Shell) -> None:
    shell.write(job("a"), job("b"))
    done = shell.run(*shell.options, "--events", "/dev/full")
    assert done.returncode == 0
    assert "/dev/full: no more events are written" in done.stderr
    assert shell.results() == {"a.json": "Done", "b.json": "Done"}


# -- told to stop ------------------------------------------------------------------------------------------------


@contextmanager
def at_work(shell: Shell, script: str, **words: Any) -> Iterator[subprocess.Popen[str]]:
    """A node whose only core has a payload that runs, with others behind it. (One or two of them may have been faster.)"""
    shell.write(
        job("running", f"touch {shell.directory}/begun; {script}", output_sandbox=["std.out"], **words),
        *(job(f"j{number}") for number in range(20)),
    )  # fmt: skip
    with shell.start() as process:
        try:
            shell.wait_for("begun")
            yield process
            process.communicate(timeout=SECONDS)
        finally:
            if process.poll() is None:
                process.kill()


def read_until(process: subprocess.Popen[str], words: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if words in line:
            return
    raise AssertionError(f"it never said {words!r}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_told_once_it_lets_the_payload_finish_and_gives_back_the_rest(shell: Shell, number: int, code: int) -> None:
    with at_work(shell, f"while [ ! -e {shell.directory}/go ]; do sleep 0.05; done") as process:
        process.send_signal(number)
        read_until(process, "nothing new is begun")
        (shell.directory / "go").touch()
    assert process.returncode == code
    assert shell.results().pop("running.json") == "Done"
    assert len(shell.results()) < 10, "the rest was given back"
    assert shell.left == []


def test_told_twice_it_kills_the_payload_and_still_delivers_its_sandbox(shell: Shell) -> None:
    with at_work(shell, "echo so far; exec sleep 600") as process:
        process.send_signal(signal.SIGINT)
        read_until(process, "nothing new is begun")
        process.send_signal(signal.SIGINT)
        read_until(process, "payloads are killed")
    assert process.returncode == 130
    assert [name for name, status in shell.results().items() if status != "Done"] == ["running.json"]
    assert (shell.directory / "outputs" / "running" / "std.out").read_text() == "so far\n"
    assert shell.left == []


def test_told_three_times_it_leaves_with_nothing_left_behind(shell: Shell) -> None:
    stubborn = 'trap "" TERM; while :; do sleep 1; done'
    with at_work(shell, stubborn, limits={"grace_seconds": 600}) as process:
        for answer in ("nothing new is begun", "payloads are killed", "leaving"):
            process.send_signal(signal.SIGINT)
            read_until(process, answer)
    assert process.returncode == 130
    assert "running.json" not in shell.results()
    assert shell.left == []


def test_a_node_that_was_told_when_all_was_done_has_not_been_stopped(shell: Shell) -> None:
    """Nothing was given back and nothing killed: whoever looks at the exit code has no job to run again."""
    shell.write(job("only", f"touch {shell.directory}/begun; while [ ! -e {shell.directory}/go ]; do sleep 0.05; done"))
    with shell.start() as process:
        shell.wait_for("begun")
        process.send_signal(signal.SIGINT)
        read_until(process, "nothing new is begun")
        (shell.directory / "go").touch()
        process.communicate(timeout=SECONDS)
    assert (process.returncode, shell.results()) == (0, {"only.json": "Done"})


# -- on a terminal -----------------------------------------------------------------------------------------------


class Terminal:
    """A terminal of our own, that a command has for its controlling one: Ctrl-C is a byte that is typed."""

    def __init__(self, shell: Shell) -> None:
        self.keyboard, screen = os.openpty()
        try:
            self.process = subprocess.Popen(
                ["setsid", "--ctty", "--wait", *LOADMASTER, "node", *shell.options], cwd=shell.directory,
                stdin=screen, stdout=screen, stderr=screen, env={**os.environ, "TERM": "xterm", "COLUMNS": "200"},
            )  # fmt: skip
        finally:
            os.close(screen)
        self.shown = ""

    def type(self, what: bytes) -> None:
        os.write(self.keyboard, what)

    def read_until(self, words: str) -> None:
        """Until that is on the screen, or has been."""
        self.read_until_match(re.escape(words))

    def read_until_match(self, pattern: str) -> None:
        """The same, for a pattern."""
        give_up = time.monotonic() + SECONDS
        while not re.search(pattern, self.shown):
            assert self._read(give_up), f"{pattern} never was on the screen: {self.shown[-2000:]!r}"

    def _read(self, give_up: float) -> bool:
        ready, _, _ = select.select([self.keyboard], [], [], max(0.0, give_up - time.monotonic()))
        with suppress(OSError):  # the last one has closed it
            if ready and (more := os.read(self.keyboard, 65536)):
                self.shown += more.decode(errors="replace")
                return True
        return False

    def ends(self) -> int:
        """The exit code; what is on the screen is read, or the command would wait for that."""
        give_up = time.monotonic() + SECONDS
        while self._read(give_up):
            pass
        return self.process.wait(SECONDS)


@pytest.fixture
def terminal(shell: Shell) -> Iterator[Terminal]:
    pytest.importorskip("rich")
    go = f"touch {shell.directory}/begun; while [ ! -e {shell.directory}/go ]; do sleep 0.05; done"
    shell.write(job("bad", "exit 3"), job("running", go), *(job(f"j{n}") for n in range(30)))
    made = Terminal(shell)
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.process.kill()
            made.process.wait()
        os.close(made.keyboard)


def test_a_terminal_has_a_table_of_where_the_jobs_stand(shell: Shell, terminal: Terminal) -> None:
    shell.wait_for("begun")
    terminal.read_until("1 of 1 busy")
    terminal.read_until_match(r"computing +1\b")
    terminal.read_until_match(r"ready +2\b")  # the next ones are ready for the slot
    terminal.read_until("bad  Failed")
    (shell.directory / "go").touch()
    assert terminal.ends() == 2
    assert "31 Done, 1 Failed in " in terminal.shown
    assert "\x1b[?25h" in terminal.shown, "the cursor is given back"
    assert "j3  Done" not in terminal.shown, "a line for each of ten thousand jobs is no table"


def test_ctrl_c_on_a_terminal_drains_and_a_second_one_kills(shell: Shell, terminal: Terminal) -> None:
    shell.wait_for("begun")
    terminal.type(CTRL_C)
    terminal.read_until("SIGINT: nothing new is begun; what computes may finish")
    terminal.type(CTRL_C)
    terminal.read_until("SIGINT: payloads are killed; their sandboxes are still delivered")
    assert terminal.ends() == 130
    results = shell.results()
    assert (results.pop("bad.json"), results.pop("running.json")) == ("Failed", "Killed")
    assert set(results.values()) <= {"Done"}
    assert len(results) < 10
    assert shell.left == []

"""`loadmaster jobs`, `show`, `resume`, and `--journal` of `run` and `node`: as a user runs them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

LOADMASTER = [sys.executable, "-W", "error", "-m", "loadmaster"]


class Shell:
    """A directory and the command in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*LOADMASTER, *words], cwd=self.directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        with self.start(*words) as process:
            out, err = process.communicate(timeout=50)
        assert "Traceback" not in err
        return subprocess.CompletedProcess([], process.returncode, out, err)

    def jobs(self, *jobs: dict[str, Any]) -> None:
        (self.directory / "jobs.jsonl").write_text("".join(f"{json.dumps(job)}\n" for job in jobs))

    def until(self, text: str, *words: str) -> str:
        """Ask again until the answer has it; a person would."""
        deadline = time.monotonic() + 30
        while text not in (told := self.run(*words).stdout):
            assert time.monotonic() < deadline, told
        return told


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def sh(job_id: str, script: str, **words: Any) -> dict[str, Any]:
    return {"job_id": job_id, "executable": "/bin/sh", "arguments": ["-c", script], **words}


NODE = ("node", "jobs.jsonl", "--cores", "2", "--scratch", "scratch", "--journal", "journal", "--quiet")


def test_jobs_of_a_journal_are_listed_and_told(shell: Shell) -> None:
    shell.jobs(sh("good", "echo hi", output_sandbox=["std.out"]), sh("bad", "exit 3", environment={"TOKEN": "secret"}))
    assert shell.run(*NODE).returncode == 2
    table = shell.run("jobs", "journal").stdout
    assert table.splitlines()[0].split() == ["job", "attempt", "status", "accepted", "latest", "event"]
    assert "1 Done, 1 Failed" in table.replace("0 open, ", "")
    lines = [json.loads(line) for line in shell.run("jobs", "journal", "--json").stdout.splitlines()]
    assert {(line["job"], line["status"]) for line in lines} == {("good", "Done"), ("bad", "Failed")}
    for line in lines:
        assert line["attempt"] == 1
        assert datetime.fromisoformat(line["accepted"]).utcoffset() == timedelta(0)
        assert datetime.fromisoformat(line["accepted"]) <= datetime.fromisoformat(line["latest"])
    life = shell.run("show", "journal", "bad").stdout
    assert "job bad, attempt 1: Failed" in life
    assert "PayloadExited      exit code 3" in life
    assert "JobFinished        Failed" in life
    for told in (life, shell.run("show", "journal", "bad", "--json").stdout):
        assert "secret" not in told
    missing = shell.run("show", "journal", "7")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "there is no such job: 7" in missing.stderr


def test_where_there_is_no_journal_none_is_made(shell: Shell) -> None:
    for words in (("jobs", "nowhere"), ("show", "nowhere", "7"), ("resume", "nowhere")):
        done = shell.run(*words)
        assert done.returncode == 1
        assert "nowhere: there is no journal in it" in done.stderr
    assert list(shell.directory.iterdir()) == []


def test_a_node_that_was_killed_is_gone_on_with_and_its_jobs_are_not_run_again(shell: Shell) -> None:
    """The payload that ran meanwhile is adopted; the one that waits is begun."""
    shell.jobs(
        sh("done", "echo done >> ../../starts"),
        sh("long", "echo long >> ../../starts; while test ! -e ../../go; do sleep 0.05; done; echo end"),
        sh("next", "echo next >> ../../starts", number_of_processors=2),
    )
    with shell.start(*NODE) as agent:
        told = shell.until("1 Done", "jobs", "journal")
        shell.until("PayloadStarted", "show", "journal", "long")
        agent.send_signal(signal.SIGKILL)
    assert "long" in told
    (shell.directory / "go").touch()
    resumed = shell.run("resume", "journal", "--cores", "2", "--scratch", "scratch", "--results", "results", "--quiet")
    assert resumed.returncode == 0, resumed.stderr
    life = shell.run("show", "journal", "long").stdout
    assert re.search(rf"\(a new agent\) +process \d+ on \S+; process {agent.pid} on \S+ had died\n", life), life
    assert re.search(r"PayloadAdopted +by process \d+ on \S+\n", life), life
    assert life.index("PayloadStarted") < life.index("(a new agent)") < life.index("PayloadAdopted")
    assert "a new agent" not in shell.run("show", "journal", "done").stdout
    assert json.loads((shell.directory / "results" / "long.json").read_text())["attempt"] == 1
    assert {path.name for path in (shell.directory / "results").iterdir()} == {"long.json", "next.json"}
    again = shell.run(*NODE)
    assert again.returncode == 0
    assert sorted((shell.directory / "starts").read_text().split()) == ["done", "long", "next"]
    assert list((shell.directory / "scratch").iterdir()) == []


def test_one_job_is_gone_on_with_where_it_was(shell: Shell) -> None:
    (shell.directory / "job.json").write_text(json.dumps(sh("7", "echo x >> ../../count")))
    words = ("run", "job.json", "--scratch", "scratch", "--journal", "journal")
    assert "Done" in shell.run(*words).stdout
    assert "Done" in shell.run(*words).stdout
    assert (shell.directory / "count").read_text() == "x\n"
    assert "job 7, attempt 1: Done" in shell.run("show", "journal", "7", "--attempt", "1").stdout


def test_a_journal_in_use_is_said_with_its_owner(shell: Shell) -> None:
    shell.jobs(sh("long", "sleep 60"))
    with shell.start(*NODE) as agent:
        try:
            shell.until("long", "jobs", "journal")
            refused = shell.run(*NODE)
            assert refused.returncode == 1
            assert f"in use by process {agent.pid}" in refused.stderr
        finally:
            agent.send_signal(signal.SIGTERM)
            shell.until("PayloadStarted", "show", "journal", "long")
            agent.send_signal(signal.SIGTERM)
            agent.communicate(timeout=30)


def test_a_job_counts_once_however_many_attempts_it_took(shell: Shell) -> None:
    """The line below the table said 2 Rescheduled, 1 Done of one job."""
    shell.jobs(sh("7", "[ -e ../../go ] || exit 222"), sh("8", "true"))
    for _ in range(2):
        shell.run(*NODE)
    (shell.directory / "go").touch()
    shell.run(*NODE)
    table = shell.run("jobs", "journal").stdout.splitlines()
    assert [line.split()[:3] for line in table[1:-1] if line.startswith("7 ")] == [
        ["7", "3", "Done"], ["7", "2", "Rescheduled"], ["7", "1", "Rescheduled"],
    ]  # fmt: skip
    assert table[-1] == "0 open, 2 Done"


WAITS = "echo out > o; while test ! -e ../../go; do sleep 0.05; done"


def killed(shell: Shell, *words: str) -> None:
    """Begin a job that waits, and kill its agent."""
    with shell.start(*words) as agent:
        shell.until("PayloadStarted", "show", "journal", "long")
        agent.send_signal(signal.SIGKILL)
    (shell.directory / "go").touch()


def test_outputs_of_open_jobs_go_where_they_would_have_gone_also_when_nobody_says_so_again(shell: Shell) -> None:
    """They were delivered to `outputs` of whatever directory it was resumed in."""
    shell.jobs(sh("long", WAITS, output_data=["o"]))
    killed(shell, *NODE, "--output", "mine")
    elsewhere = Shell(shell.directory / "elsewhere")
    elsewhere.directory.mkdir()
    resumed = elsewhere.run("resume", "../journal", "--scratch", "../scratch")
    assert resumed.returncode == 0, resumed.stderr
    assert f"outputs go to {shell.directory}/mine/{{job_id}}, as when the open jobs were begun\n" in resumed.stderr
    assert (shell.directory / "mine" / "long" / "o").read_text() == "out\n"
    assert list(elsewhere.directory.iterdir()) == []


def test_outputs_that_go_elsewhere_now_are_said_to_do_so(shell: Shell) -> None:
    shell.jobs(sh("long", WAITS, output_data=["o"]))
    killed(shell, *NODE, "--output", "mine")
    resumed = shell.run("resume", "journal", "--scratch", "scratch", "--output", "yours", "--quiet")
    said = "loadmaster: the outputs of open jobs go to {0}/yours/{{job_id}} now, no longer to {0}/mine/{{job_id}}\n"
    assert resumed.stderr == said.format(shell.directory)
    assert (shell.directory / "yours" / "long" / "o").exists()


def test_a_site_that_is_forgotten_is_asked_for_before_anything_is_done(shell: Shell) -> None:
    """The payload's work was over when it showed that nobody knew the storage element."""
    (shell.directory / "site.toml").write_text('[storage_elements]\nDISK = "se"\n')
    shell.jobs(sh("long", WAITS, output_data=["LFN:/vo/o"], output_se=["DISK"]))
    killed(shell, *NODE, "--config", "site.toml")
    forgotten = shell.run("resume", "journal", "--scratch", "scratch")
    assert forgotten.returncode == 1
    assert "loadmaster: journal: open jobs were begun with --config site.toml: give it again, or" in forgotten.stderr
    resumed = shell.run("resume", "journal", "--scratch", "scratch", "--config", "site.toml", "--quiet")
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert [path.name for path in (shell.directory / "se").rglob("o")] == ["o"]


def test_one_job_is_gone_on_with_by_the_coordinator_and_to_the_place_it_was_begun_with(shell: Shell) -> None:
    (shell.directory / "mine.py").write_text(
        "from loadmaster import JobExecutionCoordinator\nclass C(JobExecutionCoordinator): ..."
    )
    (shell.directory / "job.json").write_text(json.dumps(sh("long", WAITS, output_data=["o"])))
    words = ("run", "job.json", "--scratch", "scratch", "--journal", "journal")
    killed(shell, *words, "--output", "mine", "--coordinator", "mine.py:C")
    forgotten = shell.run(*words)
    assert forgotten.returncode == 1
    assert "loadmaster: journal: job long was begun with --coordinator mine.py:C\n" in forgotten.stderr
    again = shell.run(*words, "--coordinator", "mine.py:C")
    assert again.returncode == 0, again.stderr
    assert (shell.directory / "mine" / "o").read_text() == "out\n"
    (shell.directory / "other.json").write_text(json.dumps(sh("other", "echo > o", output_data=["o"])))
    assert shell.run("run", "other.json", *words[2:]).returncode == 0
    assert (shell.directory / "outputs" / "other" / "o").exists()

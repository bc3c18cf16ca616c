"""A job in three parts, as people run them: on several hosts, interrupted, in the wrong order, twice at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import sh
from loadmaster import ComputingElement, JobDescription, Site, Status
from loadmaster.bundle import Contents, Ended, Part, _renamed, open_bundle
from loadmaster.errors import InvalidBundle, JournalFault
from loadmaster.lifecycle import Stage
from loadmaster.logbook import Logbook

LOADMASTER = [sys.executable, "-W", "error", "-m", "loadmaster"]

HOOKS = """
import anyio
from pathlib import Path
from loadmaster import *

HERE = Path(__file__).parent


class Careful(JobExecutionCoordinator):
    async def note(self, hook):
        with (HERE / "hooks").open("a") as file:
            file.write(hook + "\\n")
        if (HERE / f"hang {hook}").exists():
            await anyio.sleep_forever()

    async def stageIn(self):
        await super().stageIn()
        await self.note("stageIn")
        await self.job.remember("tons", 3)

    async def preProcess(self, command, exeEnv):
        await self.note("preProcess")
        return PayloadSpec(command=command, env={**exeEnv, "TONS": str(self.job.memory["tons"])})

    async def postProcess(self):
        await self.note("postProcess")
        await self.job.report("tons", self.job.memory["tons"])
"""


class Desk:
    """A directory with a job of many words, and the commands."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "in.txt").write_text("cargo\n")
        (directory / "late.txt").write_text("late\n")
        (directory / "hooks.py").write_text(HOOKS)
        (directory / "site.toml").write_text(
            'sandbox_store = "sandboxes"\nvo = "vo"\n[storage_elements]\nDISK = "disk"\n'
            '[storage.https]\ntoken = "s3cret-token"\n[payload]\ncontainment = ["subreaper"]\n'
        )
        self.describe("cat in.txt late.txt > o.txt; echo $TONS; pwd; echo run >> count")

    def describe(self, script: str, **words: Any) -> None:
        job: dict[str, Any] = {
            "job_id": "7", "owner": "ann", **sh(script), "output_sandbox": ["std.out", "count"],
            "input_data": ["in.txt", {"source": "late.txt", "arrives": "during"}],
            "output_data": [{"pattern": "o.txt", "target": "./results/", "leaves": "on_close"}], **words,
        }  # fmt: skip
        (self.directory / "job.json").write_text(json.dumps(job))

    def line(self, command: str, bundle: str, *words: str, before: tuple[str, ...] = ()) -> list[str]:
        middle = ["job.json", "--coordinator", "hooks.py:Careful", "-o", bundle] if command == "prepare" else [bundle]
        return [*before, *LOADMASTER, command, *middle, "--config", "site.toml", *words]

    def run(self, command: str, bundle: str = "bundle", *words: str, before: tuple[str, ...] = ()) -> tuple[int, str]:
        line = self.line(command, bundle, *words, before=before)
        done = subprocess.run(line, cwd=self.directory, capture_output=True, text=True, timeout=60)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout + done.stderr

    def all(self, bundle: str = "bundle") -> list[int]:
        return [self.run(command, bundle)[0] for command in ("prepare", "payload", "finish")]

    def kill_when(self, command: str, fact: Callable[[], bool], number: int = signal.SIGKILL) -> int:
        with subprocess.Popen(
            self.line(command, "bundle"), cwd=self.directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            deadline = time.monotonic() + 60
            while not fact():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(number)
            return process.wait(60)

    def hooks(self) -> list[str]:
        path = self.directory / "hooks"
        return path.read_text().split() if path.exists() else []

    def stage(self, bundle: str = "bundle") -> Stage:
        from loadmaster.lifecycle import Lifecycle

        with Logbook.look(self.directory / bundle / "journal") as book:
            history = book.history("7")
            assert history is not None
            return Lifecycle.of(history.events).stage

    def has_everything(self) -> bool:
        sandbox = self.directory / "sandboxes" / "7"
        assert (self.directory / "results" / "o.txt").read_text() == "cargo\nlate\n"
        assert (sandbox / "count").read_text() == "run\n", "the payload ran more than once"
        assert (sandbox / "std.out").read_text().startswith("3\n")
        return True


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


COPIES = {
    "cp": "cp -a {0} {1}",
    "tar": "tar cf - {0} | (umask 077; mkdir {1}; tar xf - -C {1} --strip-components=1 --no-same-permissions)",
    "mv": "mv {0} {1}",
}


@pytest.mark.parametrize("way", sorted(COPIES))
def test_between_parts_a_bundle_can_be_taken_elsewhere(desk: Desk, way: str) -> None:
    for command, here, there in (("prepare", "a", "b"), ("payload", "b", "c"), ("finish", "c", "")):
        assert desk.run(command, here)[0] == 0
        if there:
            subprocess.run(COPIES[way].format(here, there), shell=True, cwd=desk.directory, check=True)
            shutil.rmtree(desk.directory / here, ignore_errors=True)
    assert desk.hooks() == ["stageIn", "preProcess", "postProcess"]
    assert desk.has_everything()
    told = (desk.directory / "sandboxes" / "7" / "std.out").read_text()
    assert f"{desk.directory}/b/work/7\n" in told


def test_the_payload_needs_no_network(desk: Desk) -> None:
    if subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode != 0:
        pytest.skip("only root can take the network away")
    desk.describe("cat in.txt late.txt > o.txt; echo $TONS; echo run >> count; cat /proc/net/dev | wc -l")
    (desk.directory / "site.toml").write_text(
        (desk.directory / "site.toml").read_text() + "[storage.http]\nnothing_we_know = 1\n"
    )
    assert desk.run("prepare")[0] == 0
    assert desk.run("payload", before=("unshare", "-n"))[0] == 0
    assert desk.run("finish")[0] == 0
    assert desk.has_everything()


def test_a_part_shows_what_is_new_and_not_what_another_has_shown(desk: Desk) -> None:
    """`payload` told again, with times of the day before, that files had been staged in."""
    shown = [desk.run(command)[1] for command in ("prepare", "payload", "finish")]
    for told, (text, of_others) in zip(
        shown,
        [("staging in", "payload runs"), ("payload runs", "staging in"), ("staging out", "payload runs")],
        strict=True,
    ):
        assert text in told
        assert of_others not in told


def test_nothing_of_the_sites_configuration_is_in_a_bundle(desk: Desk) -> None:
    assert desk.run("prepare")[0] == 0
    for path in (desk.directory / "bundle").rglob("*"):
        assert not path.is_file() or b"s3cret-token" not in path.read_bytes()
    assert (desk.directory / "bundle").stat().st_mode & 0o077 == 0


def test_a_part_out_of_turn_says_which_one_comes_next(desk: Desk) -> None:
    assert "No such file" in desk.run("payload")[1]
    assert "No such file" in desk.run("finish")[1]
    assert desk.run("prepare")[0] == 0
    code, told = desk.run("finish")
    assert (code, "run `loadmaster payload` first" in told) == (1, True)
    assert desk.run("prepare")[0] == 0  # once more is no fault, and does nothing
    assert desk.run("payload")[0] == 0
    code, told = desk.run("prepare")
    assert (code, "go on with `loadmaster finish`" in told) == (1, True)
    assert desk.run("payload")[0] == 0
    assert desk.run("finish")[0] == 0
    assert (desk.run("finish")[0], desk.run("payload")[0]) == (0, 1)
    assert desk.hooks() == ["stageIn", "preProcess", "postProcess"]
    assert desk.has_everything()


def test_a_directory_with_something_else_or_another_job_is_left_alone(desk: Desk) -> None:
    (desk.directory / "full").mkdir()
    (desk.directory / "full" / "thesis.tex").touch()
    assert "not empty" in desk.run("prepare", "full")[1]
    assert [path.name for path in (desk.directory / "full").iterdir()] == ["thesis.tex"]
    assert desk.run("prepare")[0] == 0
    desk.describe("true", job_id="8")
    assert "another job (7)" in desk.run("prepare")[1]


def test_a_prepare_that_was_killed_is_gone_on_with(desk: Desk) -> None:
    (desk.directory / "hang preProcess").touch()
    desk.kill_when("prepare", lambda: "preProcess" in desk.hooks())
    assert desk.stage() is Stage.STAGED_IN
    (desk.directory / "hang preProcess").unlink()
    assert desk.all() == [0, 0, 0]
    assert desk.hooks() == ["stageIn", "preProcess", "preProcess", "postProcess"]
    assert desk.has_everything()


def test_a_payload_whose_agent_was_killed_is_kept_and_its_end_is_known(desk: Desk) -> None:
    go = desk.directory / "go"
    desk.describe(
        f"echo run >> count; cat in.txt late.txt > o.txt; echo $TONS; while ! test -e {go}; do sleep 0.1; done"
    )
    assert desk.run("prepare")[0] == 0
    count = desk.directory / "bundle" / "work" / "7" / "count"
    desk.kill_when("payload", count.exists)
    assert desk.stage() in {Stage.GRANTED, Stage.RUNNING}  # it may have been killed before it had told of the start
    go.touch()
    assert desk.run("payload")[0] == 0
    assert desk.run("finish")[0] == 0
    assert desk.has_everything()


def test_a_finish_that_was_killed_is_gone_on_with(desk: Desk) -> None:
    assert [desk.run(part)[0] for part in ("prepare", "payload")] == [0, 0]
    (desk.directory / "hang postProcess").touch()
    desk.kill_when("finish", lambda: "postProcess" in desk.hooks())
    (desk.directory / "hang postProcess").unlink()
    assert desk.run("finish")[0] == 0
    assert desk.hooks()[2:] == ["postProcess", "postProcess"]
    assert desk.has_everything()


def test_only_one_at_a_time(desk: Desk) -> None:
    desk.describe("echo run >> count; sleep 60")
    assert desk.run("prepare")[0] == 0
    count = desk.directory / "bundle" / "work" / "7" / "count"
    told: list[tuple[int, str]] = []

    def another() -> bool:
        if not count.exists():
            return False
        told.append(desk.run("payload"))
        return True

    assert desk.kill_when("payload", another, signal.SIGINT) == 130
    assert (told[0][0], "in use by process" in told[0][1]) == (1, True)
    code, said = desk.run("finish")
    assert (code, "Killed" in said) == (2, True)
    assert (desk.directory / "sandboxes" / "7" / "count").exists()


def test_a_bundle_that_was_copied_in_the_middle_of_a_part_is_not_believed(desk: Desk) -> None:
    """Nobody knows what had been written of it: the attempt is over, and the payload is not run a second time."""
    desk.describe("echo run >> count; sleep 60")
    assert desk.run("prepare")[0] == 0
    count = desk.directory / "bundle" / "work" / "7" / "count"
    desk.kill_when("payload", count.exists)
    shutil.copytree(desk.directory / "bundle", desk.directory / "copy", symlinks=True)
    code, told = desk.run("payload", "copy")
    assert code == 4, told
    code, told = desk.run("finish", "copy")
    assert (code, "PayloadLost" in told) == (4, True)
    # On the same host what was left of the payload could be found, and was ended: also the original's attempt is over.
    assert (desk.run("payload")[0], desk.run("finish")[0]) == (4, 4)
    assert not (desk.directory / "results" / "o.txt").exists()


@pytest.mark.parametrize(("script", "code", "status"), [("exit 3", 2, "Failed"), ("exit 222", 4, "Rescheduled")])
def test_exit_codes_are_those_of_run(desk: Desk, script: str, code: int, status: str) -> None:
    desk.describe(f"echo run >> count; {script}")
    assert desk.all() == [0, code, code]
    assert status in desk.run("finish")[1]
    assert (desk.directory / "sandboxes" / "7" / "count").exists()


def test_a_job_that_cannot_be_prepared_has_ended(desk: Desk) -> None:
    (desk.directory / "in.txt").unlink()
    code, told = desk.run("prepare")
    assert (code, "in.txt" in told) == (1, True)
    assert desk.run("prepare")[0] == 1
    code, told = desk.run("payload")
    assert (code, "has ended as Failed" in told) == (1, True)


# -- for programs ------------------------------------------------------------------------------------------------


async def test_a_program_can_do_the_same(tmp_path: Path) -> None:
    job = JobDescription(job_id="7", **sh("echo cargo > o.txt; pwd > where"), output_data=["o.txt", "where"])
    site = Site(output_directory=str(tmp_path / "out"))
    ends: list[Ended] = []
    for part, here in ((Part.PREPARE, "a"), (Part.PAYLOAD, "b"), (Part.FINISH, "c")):
        new = Contents(job, ComputingElement()) if part is Part.PREPARE else None
        async with open_bundle(tmp_path / here, new) as bundle:
            assert bundle.check(part) is None
            with pytest.raises(JournalFault, match="in use"):
                async with open_bundle(tmp_path / here):
                    pass
            ends.append(await bundle.run(part, handle=await bundle.handle(), site=site))
        if part is not Part.FINISH:
            os.rename(tmp_path / here, tmp_path / chr(ord(here) + 1))
    assert [end.result is None for end in ends] == [True, True, False]
    assert ends[2].result is not None
    assert ends[2].result.status is Status.DONE
    assert (tmp_path / "out" / "where").read_text() == f"{tmp_path}/b/work/7\n"
    async with open_bundle(tmp_path / "c") as bundle:
        assert bundle.check(Part.FINISH) == Ended(ends[2].result, ends[2].outcome, None)
        with pytest.raises(InvalidBundle, match="has ended as Done"):
            bundle.check(Part.PAYLOAD)


def test_a_path_is_renamed_where_it_is_one() -> None:
    assert _renamed("cd /a/7 && /a/7/run --in=/a/7/x:/a/7", "/a/7", "/b") == "cd /b && /b/run --in=/b/x:/b"
    assert _renamed("/a/70 /a/7.old /a/7-x", "/a/7", "/b") == "/a/70 /a/7.old /a/7-x"


def test_a_bundle_is_looked_into_as_a_journal_is(desk: Desk) -> None:
    assert desk.run("prepare")[0] == 0
    told = {}
    for words in (["jobs", "bundle"], ["show", "bundle", "7"], ["pending", "bundle"]):
        done = subprocess.run([*LOADMASTER, *words], cwd=desk.directory, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        told[words[0]] = done.stdout
    assert "\n1 open\n" in told["jobs"]
    assert "job 7, attempt 1: open" in told["show"]
    assert told["pending"] == "nothing is pending\n"


def test_a_site_that_is_forgotten_for_the_last_part_is_asked_for(desk: Desk) -> None:
    """The sandbox went to the current directory's `outputs`, and a storage element of the site's was unknown."""
    assert [desk.run(command)[0] for command in ("prepare", "payload")] == [0, 0]
    words = [*LOADMASTER, "finish", "bundle"]
    done = subprocess.run(words, cwd=desk.directory, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr.startswith("loadmaster: bundle: open jobs were begun with --config site.toml: give it again, or")
    assert desk.run("finish")[0] == 0
    assert desk.has_everything()
    again = subprocess.run(words, cwd=desk.directory, capture_output=True, text=True, timeout=30)
    assert (again.returncode, again.stdout.splitlines()[0]) == (0, "Done")  # there is nothing left to be done with it

"""Files that move beside the payload: outputs that leave as they are closed, inputs that arrive late."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import anyio
import pytest
from anyio import to_thread

from conftest import Fly, sh
from following import Signpost, happens, history, killed_when, kinds
from loadmaster import (
    InvalidJob,
    JobDescription,
    JobExecutionCoordinator,
    JobHandle,
    Site,
    Status,
    open_transfers,
    run_job,
)
from loadmaster.errors import NotFound
from loadmaster.events import FileStagedIn, FileStagedOut, PayloadStarted
from loadmaster.notices import Notices
from loadmaster.result import EndedBy, Phase
from loadmaster.storage.base import Transfer
from loadmaster.testing import Faults, MemoryStorage
from servers import Server, moto, nginx
from test_cancellation import Countdown, counting


def early(*patterns: str, **words: Any) -> dict[str, Any]:
    """The words of a job whose outputs leave as they are closed."""
    return {"output_data": [{"pattern": pattern, "leaves": "on_close", **words} for pattern in patterns]}


def parts(out: Path) -> list[Path]:
    """What is there and has no name yet."""
    return sorted(path for path in out.rglob(".*.part")) if out.exists() else []


def whole(out: Path) -> dict[str, str]:
    """What has a name."""
    return {path.name: path.read_text() for path in out.rglob("*") if path.is_file() and path.suffix != ".part"}


def looking(look: Callable[[], object], seen: list[Any]) -> type[JobExecutionCoordinator]:
    """A coordinator that looks when the payload has ended and nothing else has been done yet."""

    class Looking(JobExecutionCoordinator):
        async def postProcess(self) -> None:
            seen.append(await to_thread.run_sync(look))

    return Looking


async def appears(look: Callable[[], object]) -> None:
    """Return when there is something to see."""
    with anyio.fail_after(20):
        while not await to_thread.run_sync(look):
            await anyio.sleep(0.01)  # a directory of somebody else's disk has no edge to wait for


TEN = "for i in 0 1 2 3 4 5 6 7 8 9; do echo content $i > out$i.dat; sleep {pause}; done; echo last > out9.dat"


@pytest.mark.parametrize("pause", [0.2, pytest.param(1.0, marks=pytest.mark.long)])
async def test_nine_of_ten_outputs_are_at_the_storage_before_the_payload_ends(
    fly: Fly, out: Path, pause: float
) -> None:
    """All ten have their names after success. The tenth was written once more at the last moment: that one counts."""
    seen: list[Any] = []
    handle = JobHandle()
    look = looking(lambda: [path.read_text() for path in parts(out)], seen)
    result = await fly({"coordinator": look, "handle": handle}, **sh(TEN.format(pause=pause)), **early("out*.dat"))
    assert result.status is Status.DONE
    assert {f"content {number}\n" for number in range(9)} <= set(seen[0])
    assert whole(out) == {**{f"out{n}.dat": f"content {n}\n" for n in range(9)}, "out9.dat": "last\n"}
    assert parts(out) == []
    assert sorted(file.name for file in result.outputs) == [f"out{number}.dat" for number in range(10)]
    told = kinds(await history(handle))
    assert told.count("FileStagedOut") == 10
    assert told.index("FileStagedOut") > told.index("StageOutStarted")


@pytest.mark.parametrize("end", ["exit 1", "kill -9 $$", "exit 222"])
async def test_nothing_is_left_at_the_storage_of_a_payload_that_failed(fly: Fly, out: Path, end: str) -> None:
    seen: list[Any] = []
    post = sh(f"for i in 0 1 2 3; do echo $i > out$i.dat; sleep 0.1; done; sleep 0.3; {end}")
    result = await fly({"coordinator": looking(lambda: len(parts(out)), seen)}, **post, **early("out*.dat"))
    assert result.status in {Status.FAILED, Status.RESCHEDULED}
    assert seen == ([] if end == "exit 222" else [4])
    assert result.outputs == ()
    assert [path for path in out.rglob("*") if path.is_file()] == []


async def test_nothing_is_left_at_the_storage_of_a_job_that_was_killed(fly: Fly, out: Path) -> None:
    async def sent(handle: JobHandle) -> None:
        await appears(lambda: len(parts(out)) == 1)

    result, events = await killed_when(
        sent, lambda handle: fly({"handle": handle}, **sh("echo x > a.dat; sleep 60"), **early("a.dat"))
    )
    assert result.status is Status.KILLED
    assert "FileStagedOut" not in kinds(events)
    assert [path for path in out.rglob("*") if path.is_file()] == []


async def test_nothing_is_left_at_the_storage_when_the_host_leaves(fly: Fly, out: Path) -> None:
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: fly(**sh("echo x > a.dat; sleep 60"), **early("a.dat")))
            await appears(lambda: len(parts(out)) == 1)
            group.cancel_scope.cancel()
    assert [path for path in out.rglob("*") if path.is_file()] == []


@pytest.mark.timeout(240)
async def test_cancelling_at_any_await_leaves_nothing_or_a_whole_file(root: Path, out: Path) -> None:
    """An output on its way, a late input on its way, and the host leaves. The payload ends when both are there."""
    script = f"""
        echo x > a.dat
        for i in $(seq 500); do [ -e late.dat ] && ls {out}/.*.part 2>/dev/null && exit 0; sleep 0.01; done; exit 1
    """
    for step in count(1):
        storage = MemoryStorage({"memory://se/late": b"late\n"})
        handle = JobHandle()
        job = JobDescription(**sh(script), input_data=[late("memory://se/late")], **early("a.dat"))
        countdown = Countdown(step, lambda: scope.cancel())
        with anyio.CancelScope() as scope, counting(countdown):
            async with open_transfers(Site(output_directory=str(out)), storages={"memory": storage}) as transfers:
                await run_job(job, transfers=transfers, root=root, handle=handle)
        assert await to_thread.run_sync(parts, out) == []
        found = await to_thread.run_sync(whole, out)
        told = [event.file.name for event in await history(handle) if isinstance(event, FileStagedOut)]
        assert found in ({}, {"a.dat": "x\n"})
        assert set(told) <= found.keys()
        assert await to_thread.run_sync(os.listdir, root) == []
        await to_thread.run_sync(shutil.rmtree, out, True)
        if not countdown.reached:
            break
    assert handle.result is not None
    assert (handle.result.status, found) == (Status.DONE, {"a.dat": "x\n"})
    assert step > 30


async def test_nothing_is_left_of_an_upload_that_is_under_way_when_the_job_is_killed(fly: Fly, out: Path) -> None:
    """A sparse file that takes longer than anybody waits."""

    async def under_way(handle: JobHandle) -> None:
        await appears(lambda: any(path.stat().st_size for path in parts(out)))

    result, _ = await killed_when(
        under_way, lambda handle: fly({"handle": handle}, **sh("truncate -s 60G a.dat; sleep 60"), **early("a.dat"))
    )
    assert result.status is Status.KILLED
    assert [path for path in out.rglob("*") if path.is_file()] == []


class Gate(MemoryStorage):
    """Moves nothing before it is opened."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        super().__init__(files)
        self.opened = anyio.Event()

    async def move(self, transfers: Sequence[Transfer], ended: Callable[[Sequence[Transfer]], None]) -> None:
        await self.opened.wait()
        await super().move(transfers, ended)


async def test_what_is_still_on_its_way_at_the_end_is_not_begun_again(root: Path) -> None:
    """The payload ends while its output is under way: that upload is published."""

    class Opening(JobExecutionCoordinator):
        async def postProcess(self) -> None:
            memory.opened.set()

    memory = Gate()
    storage = Faults(memory)
    job = JobDescription(**sh("echo x > a.dat; sleep 0.4"), **early("a.dat", target="memory://se/a"))
    async with open_transfers(Site(), storages={"memory": storage}) as transfers:
        result = await run_job(job, transfers=transfers, root=root, coordinator=Opening)
    assert (result.status, memory.files) == (Status.DONE, {"memory://se/a": b"x\n"})
    assert storage.calls == [("upload", "memory://se/a"), ("publish", "memory://se/a")]


@pytest.mark.parametrize("scheme", ["dav", "s3"])
@pytest.mark.parametrize(("code", "status"), [(0, Status.DONE), (1, Status.FAILED)])
async def test_servers_hold_outputs_until_the_verdict(
    scheme: str, code: int, status: Status, root: Path, server: Server, bucket: str
) -> None:
    """WebDAV has them under another name, S3 as parts of no object yet; a large, a small and an empty one."""
    place = os.urandom(4).hex()
    base = f"{server.url.replace('http', 'dav')}/{place}/" if scheme == "dav" else f"s3://bucket/{place}/"
    words = {"s3": {"endpoint": bucket, "access_key": "AK", "secret_key": "SK", "part_bytes": 5 * 1024**2}}
    sizes = {"a.dat": 12_000_000, "b.dat": 6, "c.dat": 0}
    script = f"head -c 12000000 /dev/zero > a.dat; echo small > b.dat; : > c.dat; sleep 3; exit {code}"
    async with open_transfers(Site(storage=words)) as transfers:
        storage = await transfers.storage(base)
        seen: list[Any] = []

        async def there() -> dict[str, int]:
            found = {}
            for name in sizes:
                with suppress(NotFound):
                    found[name] = (await storage.stat(base + name)).size_bytes
            return found

        class Looking(JobExecutionCoordinator):
            async def postProcess(self) -> None:
                seen.append((repr(self.job._early), await there()))

        job = JobDescription(**sh(script), **early("*.dat", target=base))
        result = await run_job(job, transfers=transfers, root=root, coordinator=Looking)
        assert result.status is status
        assert seen == [("<EarlyOutputs 3 held, 0 on their way>", {})]
        assert await there() == ({} if code else sizes)
    assert not await to_thread.run_sync(lambda: list(server.root.rglob(".*.part")))
    assert b"<Upload>" not in await to_thread.run_sync(lambda: urlopen(f"{bucket}/bucket?uploads", timeout=30).read())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with nginx(tmp_path_factory.mktemp("nginx") / "home") as server:
        yield server


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with moto(tmp_path_factory.mktemp("moto")) as url:
        yield url


async def test_a_file_that_is_written_again_is_sent_again(fly: Fly, out: Path) -> None:
    """What was sent first is removed; what counts is what the file is at the end."""
    seen: list[Any] = []
    look = looking(lambda: [path.read_text() for path in parts(out)], seen)
    script = "echo first > a.dat; sleep 0.4; echo second >> a.dat; sleep 2.6"
    result = await fly({"coordinator": look}, **sh(script), **early("a.dat"))
    assert seen == [["first\nsecond\n"]]
    assert (result.status, whole(out), parts(out)) == (Status.DONE, {"a.dat": "first\nsecond\n"}, [])


@pytest.mark.parametrize(
    ("change", "content"),
    [
        ("echo OTHER > a.dat", "OTHER\n"),
        ("echo OTHER > b; touch -r a.dat b; mv b a.dat", "OTHER\n"),
        ("touch -r a.dat mark; printf OTHER | dd of=a.dat conv=notrunc 2>/dev/null; touch -r mark a.dat", "OTHER\n"),
        ("ln a.dat b; echo OTHER > b; touch -d 1970-01-02 a.dat", "OTHER\n"),
        (": > a.dat", ""),
        ("chmod 400 a.dat", "first\n"),
        ("ln a.dat b; rm a.dat; mv b a.dat", "first\n"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else value,
)
async def test_what_is_published_is_what_the_file_is_at_the_end(fly: Fly, out: Path, change: str, content: str) -> None:
    """Changed at the last moment, too late for being sent again, and by every trick that hides a change."""
    seen: list[Any] = []
    script = f"echo first > a.dat; sleep 0.4; {change}"
    result = await fly({"coordinator": looking(lambda: len(parts(out)), seen)}, **sh(script), **early("a.dat"))
    assert seen == [1]
    assert (result.status, whole(out), parts(out)) == (Status.DONE, {"a.dat": content}, [])


async def test_a_file_swapped_for_a_link_out_of_the_directory_does_not_leave(fly: Fly, out: Path) -> None:
    script = "echo first > a.dat; sleep 0.4; ln -sf /etc/passwd a.dat"
    result = await fly(**sh(script), **early("a.dat"))
    assert result.status is Status.FAILED
    assert "link out of the work directory" in str(result.failure.message)
    assert [path for path in out.rglob("*") if path.is_file()] == []


async def test_a_file_that_is_removed_again_is_missing(fly: Fly, out: Path) -> None:
    result = await fly(**sh("echo first > a.dat; sleep 0.4; rm a.dat"), **early("a.dat"))
    assert (result.status, result.missing_outputs, result.outputs) == (Status.DONE, ("a.dat",), ())
    assert [path for path in out.rglob("*") if path.is_file()] == []


async def test_a_file_with_a_writer_is_not_sent(fly: Fly, out: Path) -> None:
    """One has closed it, another has not: the descriptor of the shell is open until the payload ends."""
    seen: list[Any] = []
    script = "exec 3>a.dat; echo one >&3; echo two >> a.dat; sleep 0.5; echo three >&3"
    result = await fly({"coordinator": looking(lambda: len(parts(out)), seen)}, **sh(script), **early("a.dat"))
    assert seen == [0]
    assert whole(out) == {"a.dat": "one\nthree\n"}
    assert result.status is Status.DONE


async def test_outputs_in_directories_made_later_are_sent_too(fly: Fly, out: Path) -> None:
    seen: list[Any] = []
    script = (
        "mkdir -p res/deep/er; echo 1 > res/deep/er/a; mkdir tmp; echo 2 > tmp/b; mv tmp res/moved; echo no > other; "
        "echo 3 > x.tmp; mv x.tmp c.root; sleep 0.5"
    )
    result = await fly({"coordinator": looking(lambda: len(parts(out)), seen)}, **sh(script), **early("res", "*.root"))
    assert seen == [3]
    assert (result.status, whole(out)) == (Status.DONE, {"a": "1\n", "b": "2\n", "c.root": "3\n"})


async def test_hostile_outputs_harm_nobody(fly: Fly, out: Path) -> None:
    """FIFOs, links, names that are no text, a file written without end, directories that come and go."""
    script = rf"""
        mkfifo f.dat; ln -s /etc/passwd l.dat; ln -s . loop; mkdir d.dat; printf x > "$(printf 'bad\377.dat')"
        (while :; do echo x >> e.dat; done) & for i in $(seq 50); do mkdir s$i.dat; echo $i > s$i.dat/x; rm -r s$i.dat; done
        echo good > g.dat; for i in $(seq 400); do grep -rqs good {out} && break; sleep 0.05; done; sleep 0.2
        kill $!; wait; exit 3
    """
    seen: list[Any] = []
    look = looking(lambda: {path.read_text().partition("x\n")[0] for path in parts(out)}, seen)
    result = await fly({"coordinator": look}, **sh(script), **early("*.dat"))
    assert result.status is Status.FAILED
    assert seen in ([{"good\n"}], [{"good\n", ""}])  # what was written without end may be there once its writer is dead
    assert [path for path in out.rglob("*") if path.is_file()] == []


async def test_ten_thousand_files_closed_at_once_are_all_published(fly: Fly, out: Path) -> None:
    """More than the kernel's queue keeps: the directory is looked through."""
    seen: list[Any] = []
    seek = f"for i in $(seq 400); do find {out} -name '.*.part' | grep -q . && break; sleep 0.05; done"
    script = f"for i in $(seq 10000); do echo $i > f$i.dat; done; {seek} 2>/dev/null"
    result = await fly({"coordinator": looking(lambda: len(parts(out)), seen)}, **sh(script), **early("*.dat"))
    assert result.status is Status.DONE
    assert whole(out) == {f"f{number}.dat": f"{number}\n" for number in range(1, 10_001)}
    assert parts(out) == []
    assert seen[0] > 0


async def test_a_storage_that_can_hold_nothing_back_gets_the_file_after_the_payload(root: Path) -> None:
    memory = MemoryStorage()
    memory.abilities &= ~memory.abilities.HOLD
    storage = Faults(memory)
    job = JobDescription(**sh("echo x > a.dat; sleep 0.3"), **early("a.dat", target="memory://se/a"))
    async with open_transfers(Site(), storages={"memory": storage}) as transfers:
        result = await run_job(job, transfers=transfers, root=root)
    assert (result.status, memory.files) == (Status.DONE, {"memory://se/a": b"x\n"})
    assert storage.calls == [("upload", "memory://se/a")]


@pytest.mark.parametrize("operation", ["upload", "publish"])
async def test_what_goes_wrong_before_the_end_fails_nothing(root: Path, operation: Any) -> None:
    """It is sent again after the payload, whole."""
    memory = MemoryStorage()
    storage = Faults(memory)
    for number in range(1, 5):
        storage.fail(operation, at=number)
    job = JobDescription(**sh("echo x > a.dat; sleep 0.5"), **early("a.dat", target="memory://se/a"))
    async with open_transfers(Site(retry_seconds=0.001), storages={"memory": storage}) as transfers:
        result = await run_job(job, transfers=transfers, root=root)
    assert (result.status, memory.files) == (Status.DONE, {"memory://se/a": b"x\n"})
    assert [name for name, _ in storage.calls if name != "abandon"][-1] == "upload"


async def test_what_cannot_be_removed_is_told_and_fails_nothing(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    memory = MemoryStorage()
    storage = Faults(memory)
    storage.fail("abandon")
    job = JobDescription(**sh("echo x > a.dat; sleep 0.4; exit 1"), **early("a.dat", target="memory://se/a"))
    async with open_transfers(Site(retry_seconds=0.001), storages={"memory": storage}) as transfers:
        result = await run_job(job, transfers=transfers, root=root)
    assert result.status is Status.FAILED
    assert [name.endswith(".part") for name in memory.files] == [True]
    assert "is left there" in caplog.text


async def test_where_nothing_can_be_watched_outputs_leave_after_the_payload(
    fly: Fly, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The user's queues are all taken by others."""
    seen: list[Any] = []
    look = looking(lambda: len(parts(out)), seen)
    with ExitStack() as others:
        with suppress(OSError):
            for _ in range(10_000):
                others.enter_context(Notices())
            pytest.skip("there is no end of queues here")
        result = await fly({"coordinator": look}, **sh("echo x > a.dat; sleep 0.3"), **early("a.dat"))
    assert (result.status, seen, whole(out)) == (Status.DONE, [0], {"a.dat": "x\n"})
    assert "cannot be watched" in caplog.text


async def test_a_coordinator_that_delivers_its_own_way_leaves_nothing_behind(fly: Fly, out: Path) -> None:
    class Own(JobExecutionCoordinator):
        async def stageOut(self) -> None:
            seen.append(await to_thread.run_sync(lambda: len(parts(out))))

    seen: list[Any] = []
    result = await fly({"coordinator": Own}, **sh("echo x > a.dat; sleep 0.3"), **early("a.dat"))
    assert (result.status, result.outputs, seen) == (Status.DONE, (), [1])
    assert [path for path in out.rglob("*") if path.is_file()] == []


async def test_what_the_coordinator_changes_afterwards_is_what_is_published(fly: Fly, out: Path) -> None:
    class Editor(JobExecutionCoordinator):
        async def postProcess(self) -> None:
            await to_thread.run_sync((self.job.workdir / "a.dat").write_text, "edited\n")

    result = await fly({"coordinator": Editor}, **sh("echo x > a.dat; sleep 0.3"), **early("a.dat"))
    assert (result.status, whole(out), parts(out)) == (Status.DONE, {"a.dat": "edited\n"}, [])


async def test_a_logical_name_is_registered_when_it_is_published(root: Path, tmp_path: Path) -> None:
    catalog, se = tmp_path / "catalog.sqlite", tmp_path / "se"
    site = Site(catalog=str(catalog), storage_elements={"DISK": str(se)}, default_se=["DISK"])
    words = early("a.dat", target="LFN:/vo/a.dat")
    for end, status, known in (("exit 1", Status.FAILED, []), ("exit 0", Status.DONE, ["/vo/a.dat"])):
        job = JobDescription(**sh(f"echo x > a.dat; sleep 0.3; {end}"), **words)
        async with open_transfers(site) as transfers:
            assert (await run_job(job, transfers=transfers, root=root)).status is status
            assert list(await transfers.lookup(["/vo/a.dat"])) == known
    assert whole(se) == {"a.dat": "x\n"}


async def test_two_outputs_for_one_place_are_one_and_a_refusal(fly: Fly, out: Path) -> None:
    script = "mkdir a b; echo 1 > a/x; echo 2 > b/x; sleep 0.4"
    result = await fly(**sh(script), **early("a/x", "b/x"))
    assert result.status is Status.FAILED
    assert "would take the place of" in result.failure.message
    assert (whole(out), parts(out)) == ({"x": "1\n"}, [])


def test_a_sandbox_does_not_leave_early() -> None:
    with pytest.raises(InvalidJob, match="only output_data can leave on_close"):
        JobDescription.load({"executable": "x", "output_sandbox": [{"pattern": "log", "leaves": "on_close"}]})


# -- late inputs -----------------------------------------------------------------------------------------------------


def late(source: object, name: str = "late.dat", **words: Any) -> dict[str, Any]:
    return {"source": str(source), "name": name, "arrives": "during", **words}


WAIT = "while [ ! -e {name} ]; do sleep 0.02; done; "


async def test_a_late_input_comes_while_the_payload_runs(root: Path, tmp_path: Path, out: Path) -> None:
    """It only comes when the payload has said that it runs without it."""
    post, handle = Signpost(tmp_path / "post"), JobHandle()
    (tmp_path / "early.dat").write_text("early\n")
    storage = Gate({"memory://se/late": b"late\n"})
    job = JobDescription(
        **sh(f"test ! -e late.dat && echo > {post}; {WAIT.format(name='late.dat')} cat early.dat late.dat > sum"),
        input_data=[str(tmp_path / "early.dat"), late("memory://se/late")],
        output_data=["sum"],
    )

    async def open_the_gate() -> None:
        await post.reached()
        storage.opened.set()

    async with (
        open_transfers(Site(output_directory=str(out)), storages={"memory": storage}) as transfers,
        anyio.create_task_group() as group,
    ):
        group.start_soon(open_the_gate)
        result = await run_job(job, transfers=transfers, root=root, handle=handle)
    assert result.status is Status.DONE
    assert whole(out) == {"sum": "early\nlate\n"}
    events = await history(handle)
    order = [event.file.name if isinstance(event, FileStagedIn) else event.kind for event in events]
    assert [each for each in order if each.startswith("Payload") or each.endswith(".dat")] == [
        "early.dat", "PayloadPrepared", "PayloadStarted", "late.dat", "PayloadExited",
    ]  # fmt: skip


async def test_a_late_input_that_cannot_be_had_ends_the_payload_and_fails_the_job(fly: Fly) -> None:
    handle = JobHandle()
    result = await fly({"handle": handle}, **sh("sleep 60"), input_data=[late("/nowhere/at/all")])
    assert (result.status, result.failure.kind, result.failure.phase) == (
        Status.FAILED, "StagingFailed", Phase.PAYLOAD,
    )  # fmt: skip
    assert "late.dat" in result.failure.message
    assert result.outcome.ended_by is EndedBy.COORDINATOR


async def test_a_payload_that_ends_before_its_late_input_has_not_failed(root: Path) -> None:
    storage = Faults(MemoryStorage({"memory://se/late": b"late\n"}))
    storage.hang("download")
    job = JobDescription(**sh("sleep 0.2"), input_data=[late("memory://se/late")])
    async with open_transfers(Site(), storages={"memory": storage}) as transfers:
        with anyio.fail_after(20):
            result = await run_job(job, transfers=transfers, root=root)
    assert (result.status, result.inputs) == (Status.DONE, ())


async def test_a_killed_job_ends_its_late_fetch(root: Path) -> None:
    storage = Faults(MemoryStorage({"memory://se/late": b"late\n"}))
    storage.hang("download")
    job = JobDescription(**sh("sleep 60"), input_data=[late("memory://se/late")])
    async with open_transfers(Site(), storages={"memory": storage}) as transfers:
        with anyio.fail_after(20):
            result, _ = await killed_when(
                happens(PayloadStarted), lambda handle: run_job(job, transfers=transfers, root=root, handle=handle)
            )
    assert result.status is Status.KILLED


async def test_a_late_archive_of_the_sandbox_is_unpacked(fly: Fly, tmp_path: Path) -> None:
    import tarfile

    (tmp_path / "inside").write_text("content\n")
    with tarfile.open(tmp_path / "box.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "inside", "inside")
    script = WAIT.format(name="inside") + "grep content inside"
    result = await fly(**sh(script), input_sandbox=[late(tmp_path / "box.tar.gz", "box.tar.gz")])
    assert result.status is Status.DONE


async def test_a_late_input_is_whole_when_it_has_its_name(fly: Fly, tmp_path: Path) -> None:
    with (tmp_path / "big").open("wb") as file:
        os.truncate(file.fileno(), 200_000_000)
    script = WAIT.format(name="late.dat") + "test $(stat -c %s late.dat) = 200000000"
    assert (await fly(**sh(script), input_data=[late(tmp_path / "big")])).status is Status.DONE


def test_when_files_move_is_written_in_the_description_and_read_again() -> None:
    words = {
        "executable": "x",
        "input_data": [late("/a", "b")],
        "output_data": [{"pattern": "c", "leaves": "on_close"}],
    }
    job = JobDescription.load(words)
    again = JobDescription.load(json.loads(json.dumps(job.model_dump(mode="json", exclude_defaults=True))))
    assert again == job
    assert (again.input_data[0].arrives, again.output_data[0].leaves) == ("during", "on_close")

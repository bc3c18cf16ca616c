"""Where a node's jobs come from."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import anyio
import pytest

from conftest import until
from following import Signpost
from loadmaster import JobDescription, JobResult, Ledger, Node, Status
from loadmaster.sources import Iterated, JobFiles, JobLines


def job(job_id: str, **words: str) -> JobDescription:
    return JobDescription(job_id=job_id, **{"executable": "/bin/true", **words})


async def jobs(count: int) -> AsyncIterator[JobDescription]:
    for number in range(count):
        yield job(f"j{number}")


class Slow:
    """A workload system that takes its time to answer, and keeps account."""

    def __init__(self, count: int, seconds: float = 0.0, words: Callable[[int], dict[str, str]] = lambda _: {}) -> None:
        self.left, self.seconds, self.words = count, seconds, words
        self.given: list[str] = []
        self.accepted_ids: list[str] = []
        self.returned: list[str] = []
        self.free: list[int] = []

    async def next(self, free: int) -> JobDescription | None:
        self.free.append(free)
        await anyio.sleep(self.seconds)
        if not self.left:
            return None
        self.left -= 1
        self.given.append(f"j{len(self.given)}")
        return job(self.given[-1], **self.words(len(self.given)))

    async def accepted(self, job: JobDescription) -> None:
        self.accepted_ids.append(job.job_id)

    async def give_back(self, job: JobDescription) -> None:
        self.returned.append(job.job_id)


async def test_all_jobs_of_a_source_run_and_each_has_one_result(root: Path) -> None:
    source = Slow(25)
    results: list[JobResult] = []

    async def ended(job: JobDescription, result: JobResult) -> None:
        results.append(result)

    async with Node(ledger=Ledger(2), root=root) as node:
        await node.serve(source, ended=ended)
        assert sorted(result.job_id for result in results) == sorted(source.given)
    assert {result.status for result in results} == {Status.DONE}
    assert sorted(source.accepted_ids) == sorted(source.given)
    assert (len(source.given), source.returned) == (25, [])
    assert max(source.free) <= 2


async def test_a_drained_node_gives_the_jobs_it_has_not_begun_back_to_their_source(root: Path, tmp_path: Path) -> None:
    post = Signpost(tmp_path / "post")
    first = {"executable": "/bin/sh", "arguments": f"-c 'echo go > {post}'"}
    first_runs = anyio.Event()
    results: list[str] = []

    class Gated(Slow):
        async def next(self, free: int) -> JobDescription | None:
            if self.free:  # somebody has asked already
                await first_runs.wait()
            return await super().next(free)

    source = Gated(100, words=lambda number: first if number == 1 else {})

    async def ended(job: JobDescription, result: JobResult) -> None:
        results.append(job.job_id)

    async with Node(ledger=Ledger(1), root=root, ahead=3) as node, anyio.create_task_group() as group:
        group.start_soon(partial(node.serve, source, ended=ended))
        await until(lambda: node.statistics().jobs["computing"] == 1)
        first_runs.set()
        await until(lambda: node.statistics().jobs["ready"] == 3 and node.statistics().jobs["computing"] == 1)
        group.start_soon(node.drain)
        await until(lambda: len(source.returned) >= 3)
        await post.reached()
    assert results == ["j0"]
    assert sorted(results + source.returned) == sorted(source.given)


async def test_a_slow_source_is_asked_several_times_at_once(root: Path) -> None:
    """64 slots: one answer after the other would take 3.2 s for them alone."""
    source = Slow(64, 0.05, words=lambda _: {"executable": "/bin/sleep", "arguments": "30"})
    async with Node(ledger=Ledger(64), root=root) as node:
        began = time.monotonic()
        async with anyio.create_task_group() as group:
            group.start_soon(node.serve, source)
            await until(lambda: node.statistics().jobs["computing"] == 64, seconds=30)
            took = time.monotonic() - began
            node.kill_all("seen enough", hurry=True)
    assert took < 8  # 1 s on an idle machine; this one may be busy


async def test_what_a_source_raises_ends_serve_and_no_job(root: Path) -> None:
    class Breaks(Slow):
        async def next(self, free: int) -> JobDescription | None:
            if len(self.given) == 2:
                raise ConnectionError("the workload system has gone")
            return await super().next(free)

    source = Breaks(9)
    async with Node(ledger=Ledger(1), root=root) as node:
        with pytest.raises(ConnectionError):
            await node.serve(source)
        await node.wait_idle()
        assert node.statistics().ended["Done"] <= 2
        assert (await node.submit(job("other")).wait()).status is Status.DONE


async def test_an_iterator_is_a_source(root: Path) -> None:
    async with Node(ledger=Ledger(4), root=root) as node:
        await node.serve(Iterated(jobs(10)))
        assert node.statistics().ended["Done"] == 10


async def test_the_lines_of_a_file_are_jobs_and_those_that_are_none_are_named(tmp_path: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    lines = [json.dumps({"job_id": f"j{n}", "executable": "/bin/true", "input_data": ["in"]}) for n in range(250)]
    path.write_text("\n".join([*lines, "", "nonsense", "[1]", '{"job_id": "x"}']))
    source = JobLines(path, outputs=tmp_path)
    found = []
    while (each := await source.next(1)) is not None:
        found.append(each)
    assert [each.job_id for each in found] == [f"j{n}" for n in range(250)]
    assert found[0].input_data[0].source == str(tmp_path / "in")
    assert [problem.removeprefix(f"{path}:").partition(" ")[0] for problem in source.refused] == [
        "252:",
        "253:",
        "254:",
    ]
    assert source.refused[2].endswith("job description: executable: is missing")
    assert await source.next(1) is None
    source.close()


async def test_a_line_without_end_is_refused_and_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    path.write_text("x" * 9_000_000 + '\n{"executable": "/bin/true", "job_id": "good"}\n')
    source = JobLines(path, outputs=tmp_path)
    found = await source.next(1)
    assert found is not None
    assert found.job_id == "good"
    assert source.refused == [f"{path}:1: longer than 4000000 bytes"]
    source.close()


async def test_the_files_of_a_directory_are_jobs_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"job_id": name, "executable": "/bin/true"}))
    (tmp_path / "notes.txt").write_text("no job")
    (tmp_path / "d.json").write_text("{")
    os.mkfifo(tmp_path / "e.json")
    source = JobFiles(tmp_path, outputs=tmp_path)
    found = []
    while (each := await source.next(5)) is not None:
        found.append(each.job_id)
    assert found == ["a", "b", "c"]
    assert [problem.partition(":")[0] for problem in source.refused] == [str(tmp_path / "d.json")]
    assert source.skipped == ["e.json", "notes.txt"]


async def test_a_second_job_of_the_same_id_is_a_bad_line_that_names_the_first(tmp_path: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    words = ({"job_id": "twin", "executable": "/bin/true"}, {"executable": "/bin/true"})
    path.write_text("".join(json.dumps(each) + "\n" for each in (*words, *words)))
    source = JobLines(path, outputs=tmp_path)
    found = [each.job_id async for each in _all(source)]
    assert (len(found), len({*found}), found.count("twin")) == (3, 3, 1)
    assert source.refused == [f"{path}:3: there is a job twin already: {path}:1"]


async def _all(source: JobLines) -> AsyncIterator[JobDescription]:
    while (each := await source.next(5)) is not None:
        yield each

"""Whether a job's inputs can be had, asked before it runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from loadmaster import JobDescription, Site, open_transfers
from loadmaster.names import file_url
from loadmaster.staging.inquiry import Inquiry, ask_for_inputs, ask_for_places, ask_for_site
from loadmaster.storage.base import CatalogEntry, FileInfo, Replica, Storage
from loadmaster.storage.catalog import SqliteCatalog
from loadmaster.testing import MemoryStorage

MEMORY: Mapping[str, Storage] = {"memory": MemoryStorage({"memory://se/a": b"cargo"})}


async def ask(site: Site | None = None, *, online: bool = False, **words: Any) -> Inquiry:
    job = JobDescription(executable="/bin/true", **words)
    async with open_transfers(site or Site(), storages=MEMORY) as transfers:
        return await ask_for_inputs(job, transfers, online=online)


async def test_a_job_without_inputs_and_one_with_all_of_them_lack_nothing(tmp_path: Path) -> None:
    (tmp_path / "a b%20").write_bytes(b"cargo")
    wanted = {"source": str(tmp_path / "a b%20"), "size_bytes": 5}
    assert await ask() == Inquiry((), 0)
    again = {"source": file_url(tmp_path / "a b%20"), "name": "again"}
    assert await ask(input_sandbox=[wanted], input_data=[again]) == Inquiry((), 0)


@pytest.mark.timeout(10)
async def test_each_file_of_this_machine_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "long").write_bytes(b"cargo")
    os.mkfifo(tmp_path / "fifo")
    wanted = [{"source": str(tmp_path / "long"), "size_bytes": 4}, str(tmp_path / "d"), str(tmp_path / "fifo")]
    found = await ask(input_sandbox=[str(tmp_path / "gone")], input_data=wanted)
    assert set(found.problems) == {
        f"input_sandbox: {tmp_path}/gone: No such file or directory",
        f"input_data: {tmp_path}/long: has 5 bytes, expected 4",
        f"input_data: {tmp_path}/d: is a directory",
        f"input_data: {tmp_path}/fifo: is not a regular file",
    }


def test_a_file_of_somebody_elses_is_named(as_ordinary_user: Any) -> None:
    script = """
from loadmaster import JobDescription, Site, open_transfers
from loadmaster.staging.inquiry import ask_for_inputs
open("secret", "w").close()
os.chmod("secret", 0)

async def main():
    async with open_transfers(Site()) as transfers:
        job = JobDescription(executable="/bin/true", input_data=[os.path.abspath("secret")])
        print(*(await ask_for_inputs(job, transfers)).problems)

anyio.run(main)
"""
    assert as_ordinary_user(script).endswith("/secret: Permission denied\n")


async def test_a_logical_name_must_be_in_the_catalog_and_have_a_replica_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"cargo")
    catalog = SqliteCatalog(tmp_path / "catalog")
    gone = Replica(file_url(tmp_path / "gone"), "B")
    for lfn, replicas in {
        "/vo/good": (gone, Replica(file_url(tmp_path / "there"), "A")),
        "/vo/afar": (gone, Replica("memory://se/nothing", "C")),
        "/vo/none": (),
        "/vo/lost": (gone,),
    }.items():
        await catalog.register(CatalogEntry(lfn, FileInfo(5), replicas))
    names = [f"LFN:/vo/{name}" for name in ("good", "afar", "none", "lost", "unknown")]
    site = Site(catalog=str(tmp_path / "catalog"))
    assert await ask(site, input_data=names) == Inquiry(
        (
            "input_data: LFN:/vo/none: the catalog knows no replica",
            "input_data: LFN:/vo/unknown: is not in the catalog",
            f"input_data: LFN:/vo/lost: {tmp_path}/gone: No such file or directory",
        ),
        1,
    )
    found = await ask(site, input_data=["LFN:/vo/afar"], online=True)
    assert found.problems == (
        f"input_data: LFN:/vo/afar: {tmp_path}/gone: No such file or directory; "
        "memory://se/nothing: there is no such file",
    )


async def test_a_catalog_that_is_not_there_is_not_made_and_a_broken_one_is_told_once(tmp_path: Path) -> None:
    site = Site(catalog=str(tmp_path / "d" / "catalog"))
    found = await ask(site, input_data=["LFN:/vo/a"])
    assert found.problems == ("input_data: LFN:/vo/a: is not in the catalog",)
    assert not (tmp_path / "d").exists()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "catalog").write_text("no catalog" * 1000)
    (problem,) = (await ask(site, input_data=["LFN:/vo/a", "LFN:/vo/b"])).problems
    assert "the catalog cannot be used" in problem


async def test_servers_are_asked_only_when_that_is_wanted() -> None:
    wanted = ["memory://se/a", "memory://se/b", "gopher://se/c"]
    found = await ask(input_data=wanted)
    assert (len(found.problems), found.not_asked) == (1, 2)
    assert found.problems[0].startswith("input_data: gopher://se/c: no storage for gopher://; there is ")
    found = await ask(input_data=wanted, online=True)
    assert found.not_asked == 0
    assert [problem.partition("; there is")[0] for problem in found.problems] == [
        "input_data: memory://se/b: there is no such file",
        "input_data: gopher://se/c: no storage for gopher://",
    ]


# -- outputs, and the site ---------------------------------------------------------------------------------------


async def places(site: Site, **words: Any) -> list[str]:
    job = JobDescription(executable="/bin/true", **words)
    async with open_transfers(site, storages=MEMORY) as transfers:
        return [problem.partition("; there is")[0] for problem in await ask_for_places(job, transfers)]


async def test_outputs_that_have_somewhere_to_go_are_not_spoken_of(tmp_path: Path) -> None:
    site = Site(
        output_directory=str(tmp_path / "deep" / "down"), storage_elements={"BAD": "gopher://se", "GOOD": "memory://se"}
    )
    assert await places(site, output_data=["a", "b*"], output_sandbox=["std.out"]) == []
    assert (
        await places(site, output_data=["a"], output_se=["BAD", "GOOD"], owner="o", vo="v") == []
    )  # the second will do
    assert list(tmp_path.iterdir()) == []


async def test_each_output_that_has_nowhere_to_go_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "d").mkdir()
    site = Site(sandbox_store=str(tmp_path / "file"), storage_elements={"BAD": "gopher://se"})
    found = await places(
        site,
        job_id="7",
        output_sandbox=["std.out"],
        output_data=[
            {"pattern": "a", "target": f"{tmp_path}/file/below/a"},
            {"pattern": "b", "target": f"{tmp_path}/d"},
            {"pattern": "c", "target": "gopher://se/c"},
            {"pattern": "d", "target": "LFN:/vo/d"},
            {"pattern": "e", "target": str(tmp_path / "new" / "e")},
        ],
    )
    assert found == [
        f"output_data: {tmp_path}/file/below/a: Not a directory",
        f"output_data: {tmp_path}/d: Is a directory",
        "output_data: gopher://se/c: no storage for gopher://",
        "output_data: LFN:/vo/d: no storage element: name one in output_se",
        f"output_sandbox: {tmp_path}/file/7/file: Not a directory",
    ]
    (problem,) = await places(site, output_data=["a"], output_se=["BAD"], owner="o", vo="v", output_path="p")
    assert problem == "output_data: gopher://se/v/user/o/o/p/a: no storage for gopher://"


def test_a_directory_of_somebody_elses_takes_no_outputs(as_ordinary_user: Any) -> None:
    script = """
import anyio, os
from loadmaster import JobDescription, Site, open_transfers
from loadmaster.staging.inquiry import ask_for_places
async def main():
    async with open_transfers(Site()) as transfers:
        job = JobDescription(executable="x", output_data=["a"], output_se=["/etc/below", os.getcwd()])
        print(*await ask_for_places(job, transfers))
        job = JobDescription(executable="x", output_data=["a"], output_se=["/etc/below"])
        print(*await ask_for_places(job, transfers))
anyio.run(main)
"""
    assert as_ordinary_user(script).splitlines() == ["", "output_data: /etc/below/a: Permission denied"]


async def test_words_of_a_site_that_are_not_understood_are_named(tmp_path: Path) -> None:
    (tmp_path / "catalog").write_text("no catalog" * 1000)
    storage = {"memory": {}, "file": {"synk": 1}, "gopher": {"a": 1}, "root": {}}
    site = Site(catalog=str(tmp_path / "catalog"), storage=storage)
    async with open_transfers(site, storages=MEMORY) as transfers:
        problems = await ask_for_site(transfers)
    assert len(problems) == 3
    assert "the catalog cannot be used" in problems[0]
    assert problems[1].startswith("[storage.file] synk: there is `sync`")
    assert problems[2].startswith("[storage.gopher] no storage for gopher://; there is ")

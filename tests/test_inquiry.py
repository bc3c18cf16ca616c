"""Whether a job's inputs can be had, asked before it runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from loadmaster import JobDescription, Site, open_transfers
from loadmaster.names import file_url
from loadmaster.staging.inquiry import Inquiry, ask_for_inputs
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
    assert await ask(input_data=wanted) == Inquiry((), 3)
    found = await ask(input_data=wanted, online=True)
    assert found.not_asked == 0
    assert [problem.partition("; there is")[0] for problem in found.problems] == [
        "input_data: memory://se/b: there is no such file",
        "input_data: gopher://se/c: no storage for gopher://",
    ]

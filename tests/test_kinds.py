"""Storages by the scheme of a URL: opened when needed, closed with the transfers, missing ones named."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from conftest import Fly
from loadmaster import InvalidSite, Site, Status, open_transfers
from loadmaster.errors import StorageError
from loadmaster.staging.engine import Moved, Wanted
from loadmaster.storage.base import FileInfo, StorageOptions
from loadmaster.storage.kinds import unserved
from loadmaster.storage.local import LocalStorage
from loadmaster.testing import MemoryStorage

LOG: list[str] = []


@asynccontextmanager
async def open_ours(options: StorageOptions) -> AsyncIterator[MemoryStorage]:
    if "bad" in options.words:
        raise ValueError("bad: is nothing we know")
    LOG.append(f"open {options.scheme} {options.streams} {dict(options.words)}")
    try:
        yield MemoryStorage({f"{options.scheme}://se/a": b"cargo"})
    finally:
        await anyio.lowlevel.checkpoint()  # closing takes a moment, also when we are cancelled
        LOG.append(f"close {options.scheme}")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that offers a storage."""
    offered = tmp_path / "offering-1.0.dist-info"
    offered.mkdir()
    (offered / "METADATA").write_text("Metadata-Version: 2.1\nName: offering\nVersion: 1.0\n")
    (offered / "entry_points.txt").write_text(
        "[loadmaster.storages]\nours = test_kinds:open_ours\nroots = test_kinds:open_ours\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    LOG.clear()


async def test_a_packages_storage_is_opened_once_when_it_is_needed_and_closed(package: None) -> None:
    site = Site(streams=5, storage={"ours": {"word": 1}})
    async with open_transfers(site) as transfers:
        assert LOG == []
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(transfers.storage, "ours://se/a")
        storage = await transfers.storage("ours://se/a")
        assert await storage.stat("ours://se/a") == await storage.stat("ours://se/a")
        assert LOG == ["open ours 5 {'word': 1}"]
    assert LOG == ["open ours 5 {'word': 1}", "close ours"]


async def test_it_is_closed_in_order_when_we_are_cancelled_or_fail(package: None) -> None:
    with anyio.CancelScope() as scope:
        async with open_transfers(Site()) as transfers:
            await transfers.storage("ours://se/a")
            scope.cancel()
            await anyio.lowlevel.checkpoint()
    assert LOG == ["open ours 32 {}", "close ours"]
    with pytest.raises(LookupError, match="as it is"):
        async with open_transfers(Site()) as transfers:
            await transfers.storage("ours://se/a")
            raise LookupError("as it is")
    assert LOG[2:] == ["open ours 32 {}", "close ours"]


async def test_a_package_comes_before_ours_and_a_plain_schemes_words_count_for_the_other(package: None) -> None:
    async with open_transfers(Site(storage={"root": {"word": 2}})) as transfers:
        assert isinstance(await transfers.storage("roots://host//a"), MemoryStorage)
    assert LOG[0] == "open roots 32 {'word': 2}"


async def test_words_nobody_understands_are_told_with_the_table_they_are_in(package: None) -> None:
    async with open_transfers(Site(storage={"ours": {"bad": 1}, "file": {"synk": 1}})) as transfers:
        for _ in range(2):
            with pytest.raises(InvalidSite, match=r"^\[storage.ours\] bad: is nothing we know$"):
                await transfers.storage("ours://se/a")
        with pytest.raises(InvalidSite, match=r"^\[storage.file\] synk: there is `sync`"):
            await transfers.storage("file:///a")


BAD = """
[storage.http]
tokn_file = "x"
connect_seconds = -1
[storage.s3]
endpoint = "s3.example.org"
[storage.gs]
anonymus = true
"""


@pytest.fixture
def bad_site(tmp_path: Path) -> Site:
    (tmp_path / "site.toml").write_text(BAD)
    return Site.load(tmp_path / "site.toml")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://h/a", ["[storage.http] tokn_file: there is no such field", "[storage.http] connect_seconds: "]),
        ("davs://h/a", ["[storage.http] tokn_file: there is no such field", "[storage.http] connect_seconds: "]),
        ("s3://b/a", ["[storage.s3] endpoint: must be an http:// or https:// URL"]),
        ("gs://b/a", ["[storage.gs] anonymus: there is no such field"]),
    ],
)
async def test_a_bad_word_is_told_once_by_file_table_and_field(
    tmp_path: Path, bad_site: Site, url: str, told: list[str]
) -> None:
    """It came out of the group the storages are kept open in, and everything else that moved ended with it."""
    pytest.importorskip("obstore" if url.startswith("gs") else "pycurl")
    (tmp_path / "a").write_bytes(b"cargo")
    ended: list[Moved] = []

    async def hear(moved: Moved) -> None:
        ended.append(moved)

    async with open_transfers(bad_site.model_copy(update={"retry_seconds": 0.001})) as transfers:
        with pytest.raises(InvalidSite) as caught:
            await transfers.storage(url)
        assert str(caught.value).startswith(f"{tmp_path}/site.toml: [storage.")
        assert [each for each in told if each not in str(caught.value)] == []
        there = Wanted(f"file://{tmp_path}/a", f"file://{tmp_path}/b")
        await transfers.move([Wanted(url, f"file://{tmp_path}/c"), there], hear)
        errors = {moved.wanted.source: str(moved.error) for moved in ended}
        assert errors == {url: f"{url}: {caught.value}", there.source: "None"}, "others go on"


async def test_a_job_whose_file_is_at_a_badly_configured_storage_fails_with_the_word(
    fly: Fly, tmp_path: Path, bad_site: Site
) -> None:
    pytest.importorskip("pycurl")
    result = await fly({"site": bad_site}, input_data=["https://host.invalid/a"])
    assert (result.status, result.failure.kind) == (Status.FAILED, "StagingFailed")
    assert f"{tmp_path}/site.toml: [storage.http] " in result.failure.message
    assert "[storage.http] tokn_file: there is no such field" in result.failure.message


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """As if they were not installed: the modules that need them are imported anew."""
    for name in packages:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("http", "s3", "objects", "xrootd", "curl"):
        monkeypatch.delitem(sys.modules, f"loadmaster.storage.{name}", raising=False)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("https://h/a", "pycurl is not installed: pip install 'loadmaster[http]'"),
        ("dav://h/a", "pycurl is not installed: pip install 'loadmaster[http]'"),
        ("s3://b/a", "pycurl is not installed: pip install 'loadmaster[s3]' or pip install 'loadmaster[objects]'"),
        ("az://b/a", "obstore is not installed: pip install 'loadmaster[objects]'"),
        ("root://h//a", "XRootD is not installed: pip install 'loadmaster[xrootd]'"),
    ],
)
async def test_what_is_not_installed_is_named_with_how_to_have_it(
    monkeypatch: pytest.MonkeyPatch, url: str, told: str
) -> None:
    without(monkeypatch, "pycurl", "obstore", "XRootD")
    async with open_transfers(Site()) as transfers:
        for _ in range(2):
            with pytest.raises(StorageError) as caught:
                await transfers.storage(url)
            assert str(caught.value) == f"{url}: {told}"


async def test_s3_is_served_by_obstore_where_there_is_no_pycurl(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore")
    site = Site(storage={"s3": {"endpoint": "http://127.0.0.1:1", "path_style": True, "anonymous": True}})
    without(monkeypatch, "pycurl")
    async with open_transfers(site) as transfers:
        storage = await transfers.storage("s3://bucket/a")
        assert type(storage).__module__ == "loadmaster.storage.aside"
    async with open_transfers(Site(storage={"s3": {"endpiont": "x"}})) as transfers:
        with pytest.raises(InvalidSite, match=r"^\[storage.s3\] endpiont: there is no such field"):
            await transfers.storage("s3://bucket/a")


async def test_s3_is_served_by_pycurl_where_there_is_both() -> None:
    pytest.importorskip("pycurl")
    async with open_transfers(Site(storage={"s3": {"anonymous": True}})) as transfers:
        assert type(await transfers.storage("s3://bucket/a")).__name__ == "S3Storage"


async def test_a_kind_of_url_nobody_serves_is_named_each_time() -> None:
    async with open_transfers(Site()) as transfers:
        for _ in range(2):
            with pytest.raises(StorageError, match=r"gopher://host/a: no storage for gopher://; there is .*file://"):
                await transfers.storage("gopher://host/a")


async def test_the_local_one_may_have_words_too(tmp_path: Path) -> None:
    async with open_transfers(Site(storage={"file": {"sync": False}})) as transfers:
        storage = await transfers.storage("file:///a")
        assert isinstance(storage, LocalStorage)
        (tmp_path / "a").write_bytes(b"cargo")
        assert await storage.stat(f"file://{tmp_path}/a") == FileInfo(5)


def test_a_scheme_that_nobody_serves_is_told_with_those_that_somebody_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unserved("file") is unserved("https") is unserved("diracx") is None
    told = unserved("gopher")
    assert told is not None
    assert told.startswith("no storage for gopher://; there is abfs://, ")
    assert "diracx://" in told
    without(monkeypatch, "pycurl")
    assert unserved("https") == "pycurl is not installed: pip install 'loadmaster[http]'"

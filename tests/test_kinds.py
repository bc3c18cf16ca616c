"""Storages by the scheme of a URL: opened when needed, closed with the transfers, missing ones named."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from loadmaster import Site, open_transfers
from loadmaster.errors import StorageError
from loadmaster.storage.base import FileInfo, StorageOptions
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
    assert LOG == ["open ours 8 {}", "close ours"]
    with pytest.raises(LookupError, match="as it is"):
        async with open_transfers(Site()) as transfers:
            await transfers.storage("ours://se/a")
            raise LookupError("as it is")
    assert LOG[2:] == ["open ours 8 {}", "close ours"]


async def test_a_package_comes_before_ours_and_a_plain_schemes_words_count_for_the_other(package: None) -> None:
    async with open_transfers(Site(storage={"root": {"word": 2}})) as transfers:
        assert isinstance(await transfers.storage("roots://host//a"), MemoryStorage)
    assert LOG[0] == "open roots 8 {'word': 2}"


async def test_words_nobody_understands_are_told_with_the_table_they_are_in(package: None) -> None:
    async with open_transfers(Site(storage={"ours": {"bad": 1}, "file": {"synk": 1}})) as transfers:
        with pytest.raises(StorageError, match=r"ours://se/a: \[storage.ours\] bad: is nothing we know"):
            await transfers.storage("ours://se/a")
        with pytest.raises(StorageError, match=r"\[storage.file\] synk: there is `sync`"):
            await transfers.storage("file:///a")


async def test_what_is_not_installed_is_named_with_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "loadmaster.storage.curl", None)
    async with open_transfers(Site()) as transfers:
        with pytest.raises(StorageError, match=r"is not installed: pip install 'loadmaster\[http\]'"):
            await transfers.storage("https://host/a")


async def test_a_kind_of_url_nobody_serves_is_named_each_time() -> None:
    async with open_transfers(Site()) as transfers:
        for _ in range(2):
            with pytest.raises(StorageError, match="gopher://host/a: no storage for gopher://; there is file://"):
                await transfers.storage("gopher://host/a")


async def test_the_local_one_may_have_words_too(tmp_path: Path) -> None:
    async with open_transfers(Site(storage={"file": {"sync": False}})) as transfers:
        storage = await transfers.storage("file:///a")
        assert isinstance(storage, LocalStorage)
        (tmp_path / "a").write_bytes(b"cargo")
        assert await storage.stat(f"file://{tmp_path}/a") == FileInfo(5)

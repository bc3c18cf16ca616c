"""Storages over HTTP: what every storage promises, and what they do with servers that do not keep theirs."""

from __future__ import annotations

import base64
import hashlib
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import anyio
import pytest
from servers import Fault, HostileServer, Server, http_date, moto, nginx

from loadmaster import StorageError
from loadmaster.conformance import NAMES, LocalBytes, Place, StorageConformance, local_place
from loadmaster.errors import AccessDenied, ChecksumMismatch, InvalidSite, NoSpace, NotFound, StorageUnavailable
from loadmaster.storage.base import Direction, FileInfo, StorageOptions, Transfer
from loadmaster.storage.http import open_http
from loadmaster.storage.s3 import open_s3

KEYS = {"access_key": "AK", "secret_key": "SK"}


@pytest.fixture(scope="session")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with nginx(tmp_path_factory.mktemp("nginx") / "home") as server:
        yield server


@pytest.fixture(scope="session")
def plain_dav(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with nginx(tmp_path_factory.mktemp("nginx") / "home", makes_directories=False) as server:
        yield server


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with moto(tmp_path_factory.mktemp("moto")) as url:
        yield url


@pytest.fixture
def hostile() -> Iterator[HostileServer]:
    with HostileServer() as server:
        yield server


@pytest.fixture(autouse=True)
def no_credentials_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("AWS_", "BEARER_", "X509_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def served(server: Server, scheme: str) -> tuple[str, Path]:
    name = os.urandom(8).hex()
    (server.root / name).mkdir()
    return f"{server.url.replace('http', scheme, 1)}/{name}", server.root / name


class TestHttp(StorageConformance):
    @pytest.fixture
    async def place(self, web: Server) -> AsyncIterator[Place]:
        url, directory = served(web, "http")
        async with open_http(StorageOptions(scheme="http")) as storage:
            yield local_place(storage, directory, url)


class TestDav(StorageConformance):
    @pytest.fixture(params=["makes directories", "does not"])
    async def place(self, web: Server, plain_dav: Server, request: pytest.FixtureRequest) -> AsyncIterator[Place]:
        url, directory = served(web if request.param == "makes directories" else plain_dav, "dav")
        async with open_http(StorageOptions(scheme="dav")) as storage:
            yield local_place(storage, directory, url)


class TestS3(StorageConformance):
    @pytest.fixture
    async def place(self, s3: str) -> AsyncIterator[Place]:
        prefix = os.urandom(8).hex()
        words = {"endpoint": s3, "part_bytes": 5 * 1024**2, **KEYS}
        async with open_s3(StorageOptions(scheme="s3", words=words)) as storage:
            yield Place(storage, f"s3://bucket/{prefix}", lambda: objects(s3, f"{prefix}/"))


def objects(endpoint: str, prefix: str) -> list[str]:
    from urllib.request import urlopen

    with urlopen(f"{endpoint}/bucket?list-type=2&max-keys=1000&prefix={prefix}", timeout=30) as answer:
        tree = ElementTree.fromstring(answer.read())
    keys = [key.text or "" for key in tree.iter() if key.tag.endswith("}Key")]
    return sorted(key.removeprefix(prefix) for key in keys)

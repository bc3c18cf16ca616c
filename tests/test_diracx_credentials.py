"""A file of DiracX's credentials that several processes share."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from loadmaster.diracx.credentials import Credentials, Tokens, check_credentials
from loadmaster.diracx.errors import CredentialsRefused, DiracxUnavailable


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "credentials.json")


def write(path: Path, access: str = "old", refresh: str | None = "again", seconds: float = 3600) -> Path:
    words = {"access_token": access, "refresh_token": refresh, "expires_on": time.time() + seconds}
    path.write_text(json.dumps(words))
    return path


class Server:
    """Gives new tokens, each refresh token once."""

    def __init__(self, good: str = "again") -> None:
        self.good, self.asked = good, 0

    async def refresh(self, token: str) -> Tokens:
        await anyio.lowlevel.checkpoint()
        if token != self.good:
            raise CredentialsRefused("shown twice")
        self.asked += 1
        self.good = f"again{self.asked}"
        return Tokens(f"new{self.asked}", self.good, time.time() + 3600)


async def nobody(token: str) -> Tokens:
    raise AssertionError("nobody should be asked")


async def test_a_token_that_is_good_is_used_as_it_is(path: Path) -> None:
    assert await Credentials(path).token(nobody) == "old"


async def test_one_that_is_about_to_expire_is_refreshed_and_written(path: Path) -> None:
    write(path, seconds=30)
    server, credentials = Server(), Credentials(path)
    assert await credentials.token(server.refresh) == "new1"
    assert await credentials.token(nobody) == "new1"
    words = json.loads(path.read_text())
    assert (words["access_token"], words["refresh_token"]) == ("new1", "again1")
    assert 3500 < words["expires_on"] - time.time() <= 3600
    assert await Credentials(path).token(nobody) == "new1"


async def test_one_the_server_refused_is_refreshed_once_for_all_who_had_it(path: Path) -> None:
    server, credentials = Server(), Credentials(path)
    found = []

    async def ask() -> None:
        found.append(await credentials.token(server.refresh, refused="old"))

    async with anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(ask)
    assert found == ["new1"] * 10
    assert server.asked == 1


async def test_what_somebody_else_has_renewed_is_used(path: Path) -> None:
    credentials = Credentials(path)
    assert await credentials.token(nobody) == "old"
    write(path, "renewed by a proxy daemon")  # a blank: no token
    with pytest.raises(CredentialsRefused):
        await credentials.token(nobody, refused="old")
    write(path, "renewed")
    assert await credentials.token(nobody, refused="old") == "renewed"


OTHER = """
import fcntl, sys
with open(sys.argv[1], "r+") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("locked", flush=True)
    text = sys.stdin.read()
    if text:
        file.truncate()
        file.write(text)
        file.flush()
"""


@contextmanager
def locked_by_another(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process refreshes; it ends with what it is told to write."""
    words = [sys.executable, "-c", OTHER, str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        yield other


async def test_who_waits_for_another_process_to_refresh_uses_what_it_got(path: Path, tmp_path: Path) -> None:
    """A refresh token that is shown twice costs both of them all they have."""
    write(path, seconds=-1)
    renewed = write(tmp_path / "other", "renewed", "again, too").read_text()
    found = []

    async def ask() -> None:
        found.append(await Credentials(path).token(nobody))

    with locked_by_another(path) as other:
        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await anyio.wait_all_tasks_blocked()
            assert found == []
            await anyio.to_thread.run_sync(other.communicate, renewed)
    assert found == ["renewed"]


async def test_waiting_for_a_process_that_hangs_can_be_given_up(path: Path) -> None:
    write(path, seconds=-1)
    server, credentials = Server(), Credentials(path)
    with locked_by_another(path) as other:
        with anyio.move_on_after(0.1) as waiting:
            await credentials.token(server.refresh)
        assert waiting.cancelled_caught
        await anyio.to_thread.run_sync(other.communicate, "")
    with anyio.fail_after(10):
        assert await credentials.token(server.refresh) == "new1"


async def test_a_refresh_that_fails_leaves_the_file_as_it_was(path: Path) -> None:
    write(path, seconds=-1)
    before = path.read_text()

    async def unavailable(token: str) -> Tokens:
        raise DiracxUnavailable("no answer")

    with pytest.raises(DiracxUnavailable):
        await Credentials(path).token(unavailable)
    assert path.read_text() == before


async def test_where_the_file_cannot_be_written_new_tokens_are_kept_in_memory(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(small_disk / "credentials.json", seconds=-1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    server, credentials = Server(), Credentials(path)
    assert await credentials.token(server.refresh) == "new1"
    assert await credentials.token(server.refresh, refused="new1") == "new2"
    assert f"{path}: cannot be written to: new tokens are kept in memory only" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "7", '{"access_token": 7}', '{"refresh_token": "SECRET"}', '"SECRET"', "[" * 100_000,
        '{"access_token": "SECRET\\r\\nHost: elsewhere", "expires_on": 99999999999}',
        '{"access_token": "SECRET", "expires_on": "tomorrow"}',
    ],
)  # fmt: skip
async def test_a_file_that_is_none_is_refused_without_a_word_of_what_is_in_it(
    path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    path.write_text(text)
    with pytest.raises(CredentialsRefused, match=f"{path}: not a file of DiracX's credentials") as refused:
        await Credentials(path).token(nobody)
    assert "SECRET" not in str(refused.value) + caplog.text


async def test_no_file_and_nothing_to_refresh_with_are_told(path: Path) -> None:
    write(path, refresh=None, seconds=-1)
    with pytest.raises(CredentialsRefused, match="no longer good, and cannot be refreshed"):
        await Credentials(path).token(nobody)
    path.unlink()
    with pytest.raises(CredentialsRefused, match="No such file"):
        await Credentials(path).token(nobody)


def test_tokens_are_not_shown(path: Path) -> None:
    assert "SECRET" not in repr(Tokens("SECRET", "SECRET", 7.0)) + repr(Credentials(path))


@pytest.mark.parametrize("seconds", [3600, 5, -5])
def test_credentials_that_are_good_or_may_become_so_are_looked_at_and_left_alone(path: Path, seconds: float) -> None:
    write(path, seconds=seconds)
    before = path.read_bytes()
    check_credentials(path)
    check_credentials(write(path.with_name("short"), refresh=None, seconds=5))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "No such file or directory"),
        ("", "not a file of DiracX's credentials"),
        ("{}", "not a file of DiracX's credentials"),
        ('{"access_token": "se\\ncret"}', "not a file of DiracX's credentials"),
        ('{"access_token": "", "expires_on": 9000000000}', "the token is no longer good, and cannot be refreshed"),
        (
            '{"access_token": "secret", "expires_on": 1000000000}',
            "the token is no longer good, and cannot be refreshed",
        ),
    ],
)
def test_credentials_that_can_never_do_are_named_with_the_reason(path: Path, text: str | None, told: str) -> None:
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(CredentialsRefused) as caught:
        check_credentials(path)
    assert str(caught.value) == f"{path}: {told}"

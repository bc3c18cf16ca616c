"""Asking a server that may answer anything, and where it is told of."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadmaster import InvalidSite
from loadmaster.diracx.client import open_diracx
from loadmaster.diracx.errors import CredentialsRefused, DiracxError, DiracxRefused, DiracxUnavailable
from loadmaster.diracx.pace import LONGEST_WAIT_SECONDS, MOST_TOLD_SECONDS, wait_seconds
from loadmaster.diracx.preferences import Preferences
from servers import Fault, HostileServer, http_date, make_certificates

JSON = ("Content-Type: application/json",)


@pytest.fixture
def hostile() -> Iterator[HostileServer]:
    with HostileServer() as server:
        yield server


@pytest.fixture
def credentials(tmp_path: Path) -> Path:
    path = tmp_path / "credentials.json"
    words = {"access_token": "SECRET-access", "refresh_token": "SECRET-refresh", "expires_on": time.time() + 3600}
    path.write_text(json.dumps(words))
    return path


@pytest.fixture
def preferences(hostile: HostileServer, credentials: Path) -> Preferences:
    return Preferences(url=hostile.url, credentials_path=credentials)


def answers(hostile: HostileServer, status: int, body: str, *headers: str) -> None:
    hostile.orders = lambda asked: Fault(str(status), (*JSON, *headers), body.encode())


# -- answers -------------------------------------------------------------------------------------------------------------


async def test_a_command_is_understood(hostile: HostileServer, preferences: Preferences) -> None:
    answers(hostile, 200, '[{"job_id": 7, "command": "Kill", "arguments": null}, {"job_id": 8, "command": "Dance"}]')
    async with open_diracx(preferences) as diracx:
        commands = await diracx.beat({7: {"LoadAverage": 0.5}})
    assert [(each.job_id, each.command, each.arguments) for each in commands] == [(7, "Kill", ""), (8, "Dance", "")]
    (asked,) = hostile.asked
    assert (asked.method, asked.path) == ("PATCH", "/api/jobs/heartbeat")
    assert asked.headers["authorization"] == "Bearer SECRET-access"
    assert json.loads(asked.body) == {"7": {"LoadAverage": 0.5}}


@pytest.mark.parametrize(
    "body", ["", "{", "null", '{"job_id": 7}', '[{"command": "Kill"}]', "[[]]", "\\ud800", "[" * 100_000]
)
async def test_an_answer_that_makes_no_sense_is_none(
    hostile: HostileServer, preferences: Preferences, body: str
) -> None:
    answers(hostile, 200, body)
    async with open_diracx(preferences) as diracx:
        with pytest.raises(DiracxUnavailable, match="makes no sense") as error:
            await diracx.beat({7: {}})
    assert error.value.answered


@pytest.mark.parametrize(
    "kind", ["reset", "empty", "nonsense", "half a head", "truncated", "endless headers", "endless"]
)
async def test_an_answer_that_never_comes_whole_is_none(
    hostile: HostileServer, preferences: Preferences, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "loadmaster")
    hostile.files["/api/jobs/metadata"] = b"x" * 100
    hostile.orders = lambda asked: Fault(kind)
    async with open_diracx(preferences) as diracx:
        with pytest.raises(DiracxError) as error:
            await diracx.set_parameters({7: {"a": "b"}})
    if kind not in {"truncated", "endless"}:  # whose status says no already
        assert isinstance(error.value, DiracxUnavailable)
    assert "SECRET" not in str(error.value) + caplog.text


async def test_a_server_that_is_not_there_is_unavailable(preferences: Preferences) -> None:
    async with open_diracx(preferences.model_copy(update={"url": "http://127.0.0.1:9"})) as diracx:
        with pytest.raises(DiracxUnavailable, match=r"PATCH /api/jobs/metadata: ConnectError"):
            await diracx.set_parameters({7: {"a": "b"}})


@pytest.mark.parametrize(
    ("status", "kind", "answered"),
    [
        (500, DiracxUnavailable, True), (503, DiracxUnavailable, True), (429, DiracxUnavailable, True),
        (302, DiracxUnavailable, True), (400, DiracxRefused, None), (403, DiracxRefused, None),
        (404, DiracxRefused, None), (422, DiracxRefused, None), (401, CredentialsRefused, None),
    ],
)  # fmt: skip
async def test_a_status_says_whether_the_same_may_be_done_later(
    hostile: HostileServer, preferences: Preferences, status: int, kind: type[DiracxError], answered: bool | None
) -> None:
    answers(hostile, status, '{"detail": "because"}', "Retry-After: 7", "Location: http://127.0.0.1:9/elsewhere")
    async with open_diracx(preferences) as diracx:
        with pytest.raises(kind) as error:
            await diracx.set_parameters({7: {"a": "b"}})
    assert error.value.retryable == (kind is not DiracxRefused)
    if isinstance(error.value, DiracxUnavailable):
        assert (error.value.answered, error.value.retry_after) == (answered, 7.0)
    if kind is DiracxRefused:
        assert str(error.value).endswith(f"HTTP {status} (because)")


async def test_what_we_sent_is_not_in_the_words_of_a_refusal(hostile: HostileServer, preferences: Preferences) -> None:
    detail = [{"loc": ["body", "7", "Vsize"], "msg": "Field required", "input": {"Token": "SECRET"}}]
    answers(hostile, 422, json.dumps({"detail": detail}))
    async with open_diracx(preferences) as diracx:
        with pytest.raises(DiracxRefused) as error:
            await diracx.beat({7: {"Token": "SECRET"}})
    assert "Vsize" in str(error.value)
    assert "SECRET" not in str(error.value)


async def test_refused_credentials_are_told_without_them(hostile: HostileServer, preferences: Preferences) -> None:
    answers(hostile, 401, '{"detail": "SECRET-refresh is no token"}')
    async with open_diracx(preferences) as diracx:
        with pytest.raises(CredentialsRefused, match=r"to refresh the credentials: refused: HTTP 401") as error:
            await diracx.set_parameters({7: {"a": "b"}})
    assert "SECRET" not in str(error.value)
    assert [asked.path for asked in hostile.asked] == ["/api/jobs/metadata", "/api/auth/token"]


@pytest.mark.parametrize(("seconds", "skew"), [(3600, 3600), (-3600, -3600), (1, 0), (0, 0)])
async def test_the_server_s_clock_counts(
    hostile: HostileServer, preferences: Preferences, seconds: int, skew: int
) -> None:
    answers(hostile, 200, "[]", f"Date: {http_date(seconds)}")
    async with open_diracx(preferences) as diracx:
        await diracx.beat({7: {}})
        assert abs(diracx.skew - timedelta(seconds=skew)) < timedelta(seconds=5 if skew else 0.001)


async def test_only_authorities_we_trust_speak_for_a_server(tmp_path: Path, credentials: Path) -> None:
    certificates = make_certificates(tmp_path)
    with HostileServer(tls=certificates.for_server()) as server:
        answers(server, 200, "[]")
        trusting = Preferences(url=server.url, credentials_path=credentials, ca_path=certificates.authority)
        async with open_diracx(trusting) as diracx:
            assert await diracx.beat({7: {}}) == []
        async with open_diracx(trusting.model_copy(update={"ca_path": None})) as diracx:
            with pytest.raises(DiracxUnavailable, match="ConnectError"):
                await diracx.beat({7: {}})
        with pytest.raises(DiracxRefused, match="nowhere"):
            async with open_diracx(trusting.model_copy(update={"ca_path": tmp_path / "nowhere"})):
                pass


@given(st.integers(0, 10_000), st.none() | st.floats(0, 1e9), st.floats(0, 1))
def test_waiting_is_bounded_and_heeds_the_server(tries: int, told: float | None, chance: float) -> None:
    wait = wait_seconds(tries, told, chance)
    assert 0.25 <= wait <= MOST_TOLD_SECONDS
    if told is not None and told <= LONGEST_WAIT_SECONDS:
        assert wait >= told


# -- where it is -----------------------------------------------------------------------------------------------------------


def test_it_is_told_by_dirac_s_own_variables(tmp_path: Path) -> None:
    found = Preferences.load({"DIRACX_URL": "https://diracx.example.org/", "HOME": "/home/me"})
    assert found.url == "https://diracx.example.org"
    assert found.credentials_path == Path("/home/me/.cache/diracx/credentials.json")
    assert found.owner_credentials_path is None


def test_files_of_settings_are_read_a_variable_counts_before_them(tmp_path: Path) -> None:
    (tmp_path / "first").write_text(
        "# a site's\nexport DIRACX_URL='https://first.example.org'  # of old\nDIRACX_CA_PATH=/etc/first\nnonsense\n"
    )
    (tmp_path / "second").write_text('DIRACX_URL="https://second.example.org"\nDIRACX_CREDENTIALS_PATH=/run/it\n')
    environ = {
        "DIRACX_DOTENV": str(tmp_path / "first"), "DIRACX_DOTENV_1": str(tmp_path / "second"),
        "LOADMASTER_OWNER_CREDENTIALS_PATH": "/run/owner",
    }  # fmt: skip
    assert Preferences.load(environ) == Preferences(
        url="https://second.example.org", credentials_path=Path("/run/it"), ca_path=Path("/etc/first"),
        owner_credentials_path=Path("/run/owner"),
    )  # fmt: skip
    assert Preferences.load({**environ, "DIRACX_URL": "http://mine"}).url == "http://mine"


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({}, "DIRACX_URL is not set"),
        ({"DIRACX_URL": "diracx.example.org"}, "the URL of a server is expected"),
        ({"DIRACX_URL": "ftp://example.org"}, "the URL of a server is expected"),
        ({"DIRACX_URL": "https://me:SECRET@example.org"}, "credentials are in a file"),
        ({"DIRACX_DOTENV": "/nowhere"}, "/nowhere: No such file"),
    ],
)
def test_what_is_wrong_with_them_is_told(environ: dict[str, str], told: str) -> None:
    with pytest.raises(InvalidSite, match=told) as error:
        Preferences.load(environ)
    assert "SECRET" not in str(error.value)

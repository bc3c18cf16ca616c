"""Asking a DiracX server: one request, one answer, with the right credentials, and nothing secret in a log or an error."""

from __future__ import annotations

import json
import logging
import os
import ssl
import time
from base64 import urlsafe_b64decode
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote

import anyio
from anyio import to_thread
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from loadmaster.diracx.credentials import Credentials, Tokens
from loadmaster.diracx.errors import CredentialsRefused, DiracxError, DiracxRefused, DiracxUnavailable
from loadmaster.diracx.exchange import ANSWER_SECONDS, Answer, exchange, httpx
from loadmaster.diracx.pace import any_chance, wait_seconds
from loadmaster.diracx.preferences import Preferences
from loadmaster.storage.credentials import authorities

log = logging.getLogger(__name__)

T = TypeVar("T")

CLIENT_ID: Final = "myDIRACClientID"
"""What DiracX knows programs without a secret of their own by."""

CONNECT_SECONDS: Final = 15.0

SKEW_SECONDS: Final = 2.0
"""Clocks that differ by less may be the same: a server tells its own in whole seconds."""

MOST_DETAIL: Final = 300

PATIENCE_SECONDS: Final = 120.0
"""For how long something is tried again that a job waits for: a sandbox, a pilot's registration."""


@dataclass(frozen=True, slots=True)
class Command:
    """What DiracX wants done with a job; it knows but one."""

    job_id: int
    command: str
    arguments: str


class _Command(BaseModel):
    model_config = ConfigDict(extra="ignore")

    job_id: int
    command: str
    arguments: str | None = None


class _Statuses(BaseModel):
    model_config = ConfigDict(extra="ignore")

    success: dict[int, dict[str, Any]] = Field(default_factory=dict)
    failed: dict[int, Any] = Field(default_factory=dict)


class _Tokens(BaseModel):
    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    access_token: str = Field(pattern=r"^[!-~]+$")
    expires_in: float
    refresh_token: str | None = None


_COMMANDS: Final = TypeAdapter(list[_Command])


@dataclass(frozen=True, slots=True)
class StatusAnswer:
    """What the server holds after an update: of each job its Status, or None where it took the update for an old one;
    and the jobs it does not have."""

    status: Mapping[int, str | None]
    unknown: frozenset[int]


@asynccontextmanager
async def open_diracx(preferences: Preferences) -> AsyncIterator[DiracX]:
    """The server, for as long as it is needed. Nothing is asked yet. Raises `DiracxError` when the authorities cannot be
    read."""
    context = await to_thread.run_sync(_trusting, preferences.ca_path, preferences.url.startswith("https:"))
    limits = httpx.Limits(max_connections=16, max_keepalive_connections=8, keepalive_expiry=30.0)
    timeout = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
    http = await to_thread.run_sync(
        lambda: httpx.AsyncClient(verify=context, limits=limits, timeout=timeout, follow_redirects=False)
    )
    try:
        yield DiracX(preferences, http)
    finally:
        with anyio.move_on_after(5, shield=True):
            await http.aclose()


class DiracX:
    """A DiracX server, as its API is. Every method raises `DiracxError`; those of jobs try once, and leave it to the caller
    to try again, the others are tried for two minutes."""

    def __init__(self, preferences: Preferences, http: httpx.AsyncClient) -> None:
        self.url = preferences.url
        self.http = http
        self._pilot = Credentials(preferences.credentials_path)
        owner = preferences.owner_credentials_path
        self._owner = self._pilot if owner is None else Credentials(owner)
        self.skew = timedelta(0)
        """The server's clock less ours, if they differ."""

    def __repr__(self) -> str:
        return f"<DiracX {self.url}>"

    def now(self) -> datetime:
        """The time by the server's clock."""
        return datetime.now(UTC) + self.skew

    # -- jobs ----------------------------------------------------------------------------------------------------------

    async def set_statuses(self, updates: Mapping[int, Mapping[str, Mapping[str, str]]]) -> StatusAnswer:
        """Set statuses of many jobs, by their times."""
        try:
            answer = await self._ask("PATCH", "/api/jobs/status", updates)
        except DiracxRefused as exc:
            if exc.status != 404 or len(updates) != 1:
                raise
            return StatusAnswer({}, frozenset(updates))
        found = _understood(TypeAdapter(_Statuses), answer)
        held = {job: _text(said.get("Status")) for job, said in found.success.items()}
        return StatusAnswer(held, frozenset(found.failed))

    async def beat(self, beats: Mapping[int, Mapping[str, object]]) -> list[Command]:
        """Tell how jobs are doing; what is to be done with them. A command comes once."""
        commands = _understood(_COMMANDS, await self._ask("PATCH", "/api/jobs/heartbeat", beats))
        return [Command(each.job_id, each.command, each.arguments or "") for each in commands]

    async def set_parameters(self, parameters: Mapping[int, Mapping[str, object]]) -> None:
        """Keep facts about jobs."""
        await self._ask("PATCH", "/api/jobs/metadata", parameters)

    async def reschedule(self, job_ids: Sequence[int]) -> None:
        """Have jobs run again, elsewhere or later."""
        await self._ask("POST", "/api/jobs/reschedule", {"job_ids": list(job_ids)})

    # -- sandboxes, which are their owners' ------------------------------------------------------------------------------

    async def announce_sandbox(self, checksum: str, size_bytes: int, sandbox_format: str) -> dict[str, Any]:
        """Where a sandbox goes: its `pfn`; `url` and `fields` of the upload, unless it is there already."""
        words = {"checksum_algorithm": "sha256", "checksum": checksum, "size": size_bytes, "format": sandbox_format}
        answer = await self._ask_patiently("POST", "/api/jobs/sandbox", words, owner=True)
        found: dict[str, Any] = _understood(TypeAdapter(dict[str, Any]), answer)
        if not isinstance(found.get("pfn"), str):
            raise DiracxUnavailable(f"{self.url}: an answer that makes no sense to POST /api/jobs/sandbox")
        return found

    async def sandbox_url(self, pfn: str) -> str:
        """A URL from which a sandbox can be had, for some minutes. It is a secret."""
        answer = await self._ask_patiently("GET", "/api/jobs/sandbox", owner=True, params={"pfn": pfn})
        url = _understood(TypeAdapter(dict[str, Any]), answer).get("url")
        if not isinstance(url, str):
            raise DiracxUnavailable(f"{self.url}: an answer that makes no sense to GET /api/jobs/sandbox")
        return url

    async def assign_output(self, job_id: int, pfn: str) -> None:
        """Make a sandbox the output of a job; done already is done, too."""
        path = f"/api/jobs/{job_id}/sandbox/output"
        try:
            await self._ask_patiently("PATCH", path, pfn, owner=True)
        except DiracxRefused as exc:
            if exc.status != 400:
                raise
            bare = pfn.rpartition("|")[2]
            answer = await self._ask_patiently("GET", path, owner=True)  # the answer to an earlier try may be lost
            if not any(str(each).rpartition("|")[2] == bare for each in _understood(TypeAdapter(list[Any]), answer)):
                raise

    async def vo(self) -> str:
        """The virtual organization of our own token, as it says itself; empty when it does not."""
        token = await self._pilot.token(self._refresh)
        try:
            part = token.split(".")[1]
            return str(json.loads(urlsafe_b64decode(part + "=" * (-len(part) % 4))).get("vo") or "")
        except (ValueError, IndexError, AttributeError, RecursionError):
            return ""

    # -- pilots ----------------------------------------------------------------------------------------------------------

    async def register_pilot(self, stamp: str, vo: str, **words: str) -> None:
        """Make a pilot known; one that is known already is no fault. `words`: `grid_type`, `grid_site`,
        `destination_site`, `pilot_reference`, `pilot_status`."""
        try:
            await self._ask_patiently("POST", "/api/pilots/", {"pilot_stamp": stamp, "vo": vo, **words})
        except DiracxRefused as exc:
            if exc.status != 409:
                raise

    async def set_pilot(self, stamp: str, **words: object) -> None:
        """Keep facts about a pilot: `Status`, `StatusReason`, `BenchMark`, `DestinationSite`, `Queue`, `GridSite`,
        `GridType`, `AccountingSent`, `CurrentJobID`."""
        await self._ask_patiently("PATCH", "/api/pilots/metadata", {stamp: words})

    # -- one request -----------------------------------------------------------------------------------------------------

    async def _ask_patiently(
        self, method: str, path: str, words: Any = None, *, owner: bool = False, params: Mapping[str, str] | None = None
    ) -> Answer:
        """Ask again, ever later, for as long as that may help."""
        return await patiently(lambda: self._ask(method, path, words, owner=owner, params=params))

    async def _ask(
        self, method: str, path: str, words: Any = None, *, owner: bool = False, params: Mapping[str, str] | None = None
    ) -> Answer:
        """Ask once; with new credentials once more, if the server did not take the ones we had."""
        credentials = self._owner if owner else self._pilot
        body = None if words is None else _as_json(words)
        refused: str | None = None
        while True:
            token = await credentials.token(self._refresh, refused=refused)
            answer = await self._once(method, path, body, params, {"Authorization": f"Bearer {token}"})
            if answer.status != 401:
                return _checked(f"{self.url}: {method} {path}", answer)
            if refused is not None:
                raise CredentialsRefused(f"{self.url}: {method} {path}: new credentials are refused, too: HTTP 401")
            refused = token

    async def _refresh(self, token: str) -> Tokens:
        form = f"grant_type=refresh_token&client_id={CLIENT_ID}&refresh_token={quote(token, safe='')}"
        what = f"{self.url}: to refresh the credentials"
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        asked = time.time()
        try:
            answer = await self._once("POST", "/api/auth/token", form.encode(), None, headers)
            found = _understood(TypeAdapter(_Tokens), _checked(what, answer))
        except DiracxRefused as exc:
            raise CredentialsRefused(f"{what}: refused: HTTP {exc.status}") from None  # who knows what it quotes
        return Tokens(found.access_token, found.refresh_token or token, asked + found.expires_in)

    async def _once(
        self, method: str, path: str, body: bytes | None, params: Mapping[str, str] | None, headers: Mapping[str, str]
    ) -> Answer:
        """One request and its whole answer. Raises `DiracxUnavailable` when there is none."""
        what = f"{self.url}: {method} {path}"
        headers = {"Accept": "application/json", "Content-Type": "application/json", **headers}
        request = self.http.build_request(method, self.url + path, params=params, headers=headers, content=body)
        before = datetime.now(UTC)
        answer = await exchange(self.http, request, what)
        self._set_clock(before, answer)
        return answer

    def _set_clock(self, before: datetime, answer: Answer) -> None:
        try:
            told = parsedate_to_datetime(answer.headers["date"]) + timedelta(seconds=0.5)  # it was cut to the second
            skew = told - (before + (datetime.now(UTC) - before) / 2)
        except (KeyError, ValueError, TypeError):
            return
        self.skew = skew if abs(skew) > timedelta(seconds=SKEW_SECONDS) else timedelta(0)


async def patiently(ask: Callable[[], Awaitable[T]], *, seconds: float = PATIENCE_SECONDS) -> T:
    """What a question gets, when it is asked again after each error that may pass, for that long."""
    until, tries = anyio.current_time() + seconds, 0
    while True:
        try:
            return await ask()
        except DiracxError as exc:
            wait = wait_seconds(tries, getattr(exc, "retry_after", None), any_chance())
            tries += 1
            if not exc.retryable or anyio.current_time() + wait > until:
                raise
            await anyio.sleep(wait)


def _checked(what: str, answer: Answer) -> Answer:
    """The answer, if it is one that says yes."""
    if 200 <= answer.status < 300:
        return answer
    detail = _detail(answer.body)
    message = f"{what}: HTTP {answer.status}{f' ({detail})' if detail else ''}"
    if answer.status >= 500 or answer.status in {408, 425, 429} or answer.status < 400:
        raise DiracxUnavailable(message, answered=True, retry_after=_retry_after(answer.headers))
    raise DiracxRefused(message, status=answer.status, detail=detail)


def _detail(body: bytes) -> str:
    """What the server said of its reasons, in one line."""
    try:
        said = json.loads(body[:65536])["detail"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    if isinstance(said, list):  # of a body it did not understand: where, and why; what we sent is left out
        said = "; ".join(f"{each.get('loc')}: {each.get('msg')}" for each in said[:3] if isinstance(each, dict))
    text = " ".join(str(said).split())
    return (text if text.isprintable() else ascii(text))[:MOST_DETAIL]


def _retry_after(headers: Mapping[str, str]) -> float | None:
    told = headers.get("retry-after", "").strip()
    return float(told) if told.isdecimal() and len(told) < 8 else None


def _understood(kind: TypeAdapter[Any], answer: Answer) -> Any:
    try:
        return kind.validate_json(answer.body)
    except ValidationError as exc:
        raise DiracxUnavailable(
            f"an answer that makes no sense: {exc.error_count()} errors in it", answered=True
        ) from None


def _as_json(words: Any) -> bytes:
    return json.dumps(words, allow_nan=False).encode("ascii")


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _trusting(told: Path | None, needed: bool) -> ssl.SSLContext | bool:
    """Who may speak for a server: those we were told of, else those of the system and of the grid. Blocks."""
    if not needed:
        return True
    file: Path | None = None
    try:
        if told is not None:
            if told.is_dir():
                return ssl.create_default_context(capath=str(told))
            return ssl.create_default_context(cafile=str(told))
        context = ssl.create_default_context()
        file, directory = authorities(os.environ)
        if file is not None or directory is not None:
            context.load_verify_locations(file and str(file), directory and str(directory))
    except OSError as exc:
        raise DiracxRefused(f"{told or file}: {exc.strerror or exc}", status=0) from exc
    return context

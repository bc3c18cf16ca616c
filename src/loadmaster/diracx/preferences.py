"""Which DiracX to talk to and with whose credentials, told as DiracX's own client is: by variables DIRACX_..., or by the
files of such lines that DIRACX_DOTENV, DIRACX_DOTENV_1, ... name; a variable counts before a file.

    DIRACX_URL                          https://diracx.example.org
    DIRACX_CREDENTIALS_PATH             ~/.cache/diracx/credentials.json if it is not said
    DIRACX_CA_PATH                      the authorities to be trusted: a file, or a directory
    LOADMASTER_OWNER_CREDENTIALS_PATH   of whoever owns the jobs: sandboxes are theirs, and no pilot's
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from loadmaster.description import complaints
from loadmaster.errors import InvalidSite

CREDENTIALS: Final = "DIRACX_CREDENTIALS_PATH"
OWNER: Final = "LOADMASTER_OWNER_CREDENTIALS_PATH"
"""Not one of DiracX's: its own client refuses files with variables DIRACX_... that it does not know."""

MOST_BYTES: Final = 1024**2
"""No file of settings is larger."""

_LINE: Final = re.compile(r"\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*?)\s*")


def _server(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("the URL of a server is expected, as https://diracx.example.org")
    if parts.username is not None or parts.password is not None:
        raise ValueError("has a name or a password in it: credentials are in a file")
    return url.rstrip("/")


class Preferences(BaseModel):
    """A server, and where our credentials for it are."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    url: Annotated[str, AfterValidator(_server)]
    credentials_path: Path
    owner_credentials_path: Path | None = None
    ca_path: Path | None = None

    @classmethod
    def load(cls, environ: Mapping[str, str]) -> Self:
        """What the environment says, and the files it names. Raises `InvalidSite`. Blocks."""
        said = {**_files(environ), **environ}
        words = {
            "url": said.get("DIRACX_URL"),
            "credentials_path": said.get(CREDENTIALS)
            or Path(environ.get("HOME", "/"), ".cache", "diracx", "credentials.json"),
            "owner_credentials_path": said.get(OWNER),
            "ca_path": said.get("DIRACX_CA_PATH"),
        }
        if not words["url"]:
            raise InvalidSite("DIRACX_URL is not set: the URL of the DiracX server")
        try:
            return cls.model_validate({name: word for name, word in words.items() if word})
        except ValidationError as exc:
            raise InvalidSite("DIRACX_... " + "; ".join(complaints(exc))) from None


def _files(environ: Mapping[str, str]) -> dict[str, str]:
    """What is in the files of settings, a later one before an earlier one."""
    numbered = {
        int(found[1] or -1): Path(name)
        for key, name in environ.items()
        if (found := re.fullmatch(r"DIRACX_DOTENV(?:_([0-9]{1,9}))?", key)) is not None and name
    }
    said: dict[str, str] = {}
    for _, path in sorted(numbered.items()):
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(MOST_BYTES)
        except (OSError, UnicodeDecodeError) as exc:
            raise InvalidSite(f"{path}: {getattr(exc, 'strerror', None) or 'not text'}") from exc
        for line in text.splitlines():
            if (found := _LINE.fullmatch(line)) is not None:
                said[found[1]] = _bare(found[2])
    return said


def _bare(value: str) -> str:
    """A value without its quotes, or the comment after it."""
    try:
        return "".join(shlex.split(value, comments=True)[:1])
    except ValueError:
        return value

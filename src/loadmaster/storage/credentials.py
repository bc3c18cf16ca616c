"""Who we are to a storage: bearer tokens, grid proxies, keys of S3. Looked for where everybody else's tools look.

Secrets are never part of a `repr` or of an error's words.
"""

from __future__ import annotations

import configparser
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

LOOK_SECONDS: Final = 5.0
"""Between two looks whether a file of credentials has been renewed; a refused request looks at once."""

MAX_TOKEN_BYTES: Final = 64 * 1024

_BUNDLES: Final = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian
    "/etc/pki/tls/certs/ca-bundle.crt",  # Red Hat
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/ssl/cert.pem",  # Alpine
)


class Token:
    """A bearer token, read again when its file is renewed."""

    __slots__ = ("_file", "_looked", "_seen", "_text")

    def __init__(self, text: str = "", file: Path | None = None) -> None:
        self._text, self._file = _bare(text), file
        self._seen: tuple[int, int, int] | None = None
        self._looked = -LOOK_SECONDS

    def __repr__(self) -> str:
        return f"<Token {'of ' + str(self._file) if self._file else 'given' if self._text else 'none'}>"

    @property
    def renewable(self) -> bool:
        """Whether a later one may be better."""
        return self._file is not None

    def text(self, *, look: bool = False) -> str:
        """The token, or nothing. `look`: whether there is a newer one, now. Blocks for a small file at most."""
        now = time.monotonic()
        if self._file is not None and (look or now - self._looked >= LOOK_SECONDS):
            self._looked = now
            try:
                found = self._file.stat()
                seen = (found.st_mtime_ns, found.st_ino, found.st_size)
                if seen != self._seen and found.st_size <= MAX_TOKEN_BYTES:
                    self._text, self._seen = _bare(self._file.read_text(encoding="ascii")), seen
            except (OSError, ValueError):
                pass  # being renewed, or gone: what we have may still do, and the server will say
        return self._text


def _bare(text: str) -> str:
    """Without the white space around it. One with anything else in it than a token has is none: it would end a header."""
    token = text.strip()
    return token if token.isascii() and token.isprintable() and " " not in token else ""


def discovered_token(environ: Mapping[str, str], user: int) -> Token:
    """By WLCG's bearer token discovery: BEARER_TOKEN, BEARER_TOKEN_FILE, $XDG_RUNTIME_DIR/bt_u<uid>, /tmp/bt_u<uid>."""
    if token := _bare(environ.get("BEARER_TOKEN", "")):
        return Token(token)
    if file := environ.get("BEARER_TOKEN_FILE"):
        return Token(file=Path(file))
    for directory in (environ.get("XDG_RUNTIME_DIR"), "/tmp"):  # noqa: S108 - the specification's place
        if directory and _is_ours(path := Path(directory, f"bt_u{user}"), user):
            return Token(file=path)
    return Token()


def discovered_proxy(environ: Mapping[str, str], user: int) -> Path | None:
    """A grid proxy: X509_USER_PROXY, or /tmp/x509up_u<uid>."""
    if named := environ.get("X509_USER_PROXY"):
        return Path(named)
    path = Path(f"/tmp/x509up_u{user}")  # noqa: S108 - where every grid tool puts it
    return path if _is_ours(path, user) else None


def authorities(environ: Mapping[str, str]) -> tuple[Path | None, Path | None]:
    """The file and the directory of the certificates of those whom we trust."""
    files = (environ.get("SSL_CERT_FILE"), *_BUNDLES)
    directories = (environ.get("X509_CERT_DIR"), "/etc/grid-security/certificates", environ.get("SSL_CERT_DIR"))
    file = next((Path(name) for name in files if name and Path(name).is_file()), None)
    directory = next((Path(name) for name in directories if name and Path(name).is_dir()), None)
    return file, directory


def _is_ours(path: Path, user: int) -> bool:
    """Whether it is the user's own: in a directory that everybody writes to, somebody else may have put it there."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return found.st_uid == user and not path.is_symlink() and path.is_file()


# -- S3 --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Keys:
    """What S3 knows us by."""

    access_key: str
    secret_key: str = field(repr=False)
    session_token: str = field(default="", repr=False)


class KeyRing:
    """Keys that were given, or those of the environment or of the usual file, read again when it is renewed."""

    __slots__ = ("_file", "_keys", "_looked", "_profile", "_seen")

    def __init__(self, keys: Keys | None = None, file: Path | None = None, profile: str = "default") -> None:
        self._keys, self._file, self._profile = keys, file, profile
        self._seen: tuple[int, int, int] | None = None
        self._looked = -LOOK_SECONDS

    @property
    def renewable(self) -> bool:
        """Whether later ones may be better."""
        return self._file is not None

    def keys(self, *, look: bool = False) -> Keys | None:
        """The keys, or None. The same object for as long as they are the same. Blocks for a small file at most."""
        now = time.monotonic()
        if self._file is not None and (look or now - self._looked >= LOOK_SECONDS):
            self._looked = now
            try:
                found = self._file.stat()
                seen = (found.st_mtime_ns, found.st_ino, found.st_size)
                if seen != self._seen:
                    self._keys, self._seen = _read_keys(self._file, self._profile) or self._keys, seen
            except (OSError, ValueError, configparser.Error):
                pass  # as with tokens
        return self._keys


def discovered_keys(environ: Mapping[str, str], *, profile: str | None = None, file: Path | None = None) -> KeyRing:
    """AWS_ACCESS_KEY_ID and its like, else the credentials file (~/.aws/credentials or AWS_SHARED_CREDENTIALS_FILE)."""
    access, secret = environ.get("AWS_ACCESS_KEY_ID"), environ.get("AWS_SECRET_ACCESS_KEY")
    if access and secret and profile is None and file is None:
        return KeyRing(Keys(access, secret, environ.get("AWS_SESSION_TOKEN", "")))
    named = environ.get("AWS_SHARED_CREDENTIALS_FILE")
    path = file or (Path(named) if named else Path(environ.get("HOME", "/"), ".aws", "credentials"))
    return KeyRing(file=path, profile=profile or environ.get("AWS_PROFILE") or "default")


def _read_keys(file: Path, profile: str) -> Keys | None:
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    parser.read_string(file.read_text(encoding="utf-8"))
    if not parser.has_section(profile):
        return None
    words = parser[profile]
    access, secret = words.get("aws_access_key_id", ""), words.get("aws_secret_access_key", "")
    return Keys(access, secret, words.get("aws_session_token", "")) if access and secret else None


def own_user() -> int:
    """Whose files of credentials are ours."""
    return os.geteuid()

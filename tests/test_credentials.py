"""Who we are to a storage."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loadmaster.storage import credentials
from loadmaster.storage.credentials import Keys, Token, authorities, discovered_keys, discovered_proxy, discovered_token

ME = os.geteuid()


def test_a_token_is_found_in_the_order_of_the_specification(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(" from-file\n")
    (tmp_path / f"bt_u{ME}").write_text("from-runtime")
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    assert discovered_token(environ, ME).text() == "from-runtime"
    environ["BEARER_TOKEN_FILE"] = str(tmp_path / "file")
    assert discovered_token(environ, ME).text() == "from-file"
    environ["BEARER_TOKEN"] = "given"
    assert discovered_token(environ, ME).text() == "given"
    assert not discovered_token(environ, ME).renewable


@pytest.mark.parametrize("text", ["", " \n", "two words", "a\r\nX-Evil: yes", "\0", "ü"])
def test_what_could_not_stand_in_a_header_is_no_token(tmp_path: Path, text: str) -> None:
    file = tmp_path / "token"
    file.write_text(text, encoding="utf-8")
    assert Token(file=file).text() == Token(text).text() == ""


def test_a_token_of_somebody_else_is_not_taken(tmp_path: Path) -> None:
    """In /tmp anybody may have put one, or a link to one."""
    file = tmp_path / f"bt_u{ME + 1}"
    file.write_text("theirs")
    assert discovered_token({"XDG_RUNTIME_DIR": str(tmp_path)}, ME + 1).text() != "theirs"
    (tmp_path / f"bt_u{ME}").symlink_to(file)
    assert discovered_token({"XDG_RUNTIME_DIR": str(tmp_path)}, ME).text() != "theirs"


def test_a_renewed_token_is_seen_and_a_lost_one_kept(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("old")
    token = Token(file=file)
    assert token.text() == "old"
    file.write_text("newer")
    assert token.text() == "old", "it is looked at now and then"
    assert token.text(look=True) == "newer"
    file.unlink()
    assert token.text(look=True) == "newer"


def test_secrets_are_in_no_repr(tmp_path: Path) -> None:
    assert "secret" not in repr(Token("secret"))
    assert "secret" not in repr(Keys("AK", "secret", "secret"))


def test_a_proxy_is_where_it_is_said_to_be() -> None:
    assert discovered_proxy({"X509_USER_PROXY": "/x"}, ME) == Path("/x")


def test_authorities_are_those_of_the_grid_and_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "bundle").write_text("")
    found = authorities({"X509_CERT_DIR": str(tmp_path), "SSL_CERT_FILE": str(tmp_path / "bundle")})
    assert found == (tmp_path / "bundle", tmp_path)


def test_keys_are_those_of_the_environment_or_of_a_profile(tmp_path: Path) -> None:
    environ = {"AWS_ACCESS_KEY_ID": "AK", "AWS_SECRET_ACCESS_KEY": "SK", "HOME": str(tmp_path)}
    assert discovered_keys(environ).keys() == Keys("AK", "SK")
    (tmp_path / ".aws").mkdir()
    file = tmp_path / ".aws" / "credentials"
    file.write_text("[default]\naws_access_key_id=D\naws_secret_access_key=%S=\n[grid]\naws_access_key_id=G\n")
    assert discovered_keys({"HOME": str(tmp_path)}).keys() == Keys("D", "%S=")
    assert discovered_keys(environ, profile="grid").keys() is None
    assert discovered_keys({"HOME": str(tmp_path / "nowhere")}).keys() is None
    file.write_bytes(b"\xff[[[")
    assert discovered_keys({"HOME": str(tmp_path)}).keys() is None


def test_the_same_keys_are_the_same_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a request is signed anew only when they change."""
    monkeypatch.setattr(credentials, "LOOK_SECONDS", 0.0)
    file = tmp_path / "credentials"
    file.write_text("[default]\naws_access_key_id=A\naws_secret_access_key=S\n")
    ring = discovered_keys({}, file=file)
    assert ring.keys() is ring.keys()
    file.write_text("[default]\naws_access_key_id=BB\naws_secret_access_key=S\n")
    assert ring.keys() == Keys("BB", "S")

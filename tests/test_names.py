"""Names of files: what is taken, what is refused, and that a name means the same on both ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadmaster.names import (
    as_url,
    base_name,
    check_local_name,
    file_url,
    is_lfn,
    is_url,
    join_url,
    local_path,
    parse_lfn,
    user_lfn,
)

# -- names inside a work directory -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "a/b", "a b", "…", "...", "..a", "a..", "-rf", "~", "a\\b", "x" * 255, "*.root"])
def test_a_name_that_stays_inside_comes_back_as_it_was(name: str) -> None:
    assert check_local_name(name) == name


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("", "is empty"),
        ("/etc/passwd", "absolute"),
        ("..", "'..' as a part"),
        ("a/../b", "'..' as a part"),
        ("a/..", "'..' as a part"),
        ("./a", "'.' as a part"),
        ("a//b", "'' as a part"),
        ("a/", "'' as a part"),
        ("a\nb", "control characters"),
        ("a\0", "control characters"),
        ("\x1b[2J", "control characters"),
        ("x" * 256, "more than 255 bytes"),
        ("é" * 128, "more than 255 bytes"),
        ("/".join(["x" * 200] * 6), "more than 1024 bytes"),
    ],
)
def test_a_name_that_could_lead_out_is_refused_with_the_reason(name: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_local_name(name)


def test_the_complaint_about_a_long_name_is_short() -> None:
    with pytest.raises(ValueError, match="…") as caught:
        check_local_name("x" * 100_000)
    assert len(str(caught.value)) < 120


# -- logical names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["/vo/a", "LFN:/vo/a", "lfn:/vo/a", "Lfn:/vo/a"])
def test_an_lfn_means_the_same_in_every_spelling(text: str) -> None:
    assert parse_lfn(text) == "/vo/a"


@pytest.mark.parametrize(
    "text", ["", "LFN:", "LFN:/", "LFN:vo/a", "LFN:lfn:/a", "//vo/a", "/vo/../a", "/vo/a/", "/a\n"]
)
def test_what_is_not_a_normal_absolute_path_is_no_lfn(text: str) -> None:
    with pytest.raises(ValueError, match=r"LFN|file name"):
        parse_lfn(text)


def test_only_the_prefix_makes_an_lfn() -> None:
    assert is_lfn("lfn:/vo/a")
    assert not is_lfn("/vo/a")
    assert not is_lfn("file:///LFN:/vo/a")


@pytest.mark.parametrize(
    ("job_id", "output_path", "expected"),
    [
        ("123456", None, "/vo/user/a/alice/123/123456/x.root"),
        ("12", None, "/vo/user/a/alice/0/12/x.root"),
        ("local-1f", None, "/vo/user/a/alice/local-1f/x.root"),
        ("12", "run7/sim", "/vo/user/a/alice/run7/sim/x.root"),
        ("12", "/run7/", "/vo/user/a/alice/run7/x.root"),
        ("12", "LFN:/vo/prod/", "/vo/prod/x.root"),
        ("12", "lfn:/vo/prod", "/vo/prod/x.root"),
    ],
)
def test_an_output_without_an_lfn_gets_the_one_dirac_would_give_it(
    job_id: str, output_path: str | None, expected: str
) -> None:
    assert user_lfn("out/x.root", vo="vo", owner="alice", job_id=job_id, output_path=output_path) == expected


@pytest.mark.parametrize("output_path", ["..", "a/../..", "LFN:/..", "LFN:vo", "a\nb"])
def test_an_output_path_cannot_lead_out_of_its_owners_directory(output_path: str) -> None:
    with pytest.raises(ValueError, match=r"LFN|file name"):
        user_lfn("x", vo="vo", owner="alice", job_id="1", output_path=output_path)


# -- URLs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["file:///a", "root://host//a", "s3+http://b/k", "https://h/"])
def test_what_has_a_scheme_is_a_url(text: str) -> None:
    assert is_url(text)
    assert as_url(text) == text


@pytest.mark.parametrize("text", ["/a", "a", "LFN:/a", "://a", "a b://c", "file:/a", "é://a", ""])
def test_what_has_no_scheme_is_no_url(text: str) -> None:
    assert not is_url(text)


@pytest.mark.parametrize("path", ["/a", "/a b", "/a%20b", "/a?b#c", "/a\udcff", "/é/…", "/a:b@c", "/a/[1]*", "//a"])
def test_a_path_survives_being_a_url(path: str) -> None:
    assert str(local_path(file_url(path))) == path


@pytest.mark.parametrize(
    "url", ["file://other/a", "file:/a", "http://x/a", "file:///a%00b", "file://", "/a", "file://a"]
)
def test_only_absolute_file_urls_of_this_host_are_paths(url: str) -> None:
    with pytest.raises(ValueError, match=r"not a file:// URL|not an absolute path"):
        local_path(url)


def test_localhost_is_this_host() -> None:
    assert local_path("file://localhost/a") == Path("/a")


def test_a_relative_path_is_no_url_and_says_so() -> None:
    with pytest.raises(ValueError, match="'data/a': neither a URL nor an absolute path"):
        as_url("data/a")


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("file:///se", "file:///se/vo/a"),
        ("file:///se/", "file:///se/vo/a"),
        ("file:///", "file:///vo/a"),
        ("root://host//", "root://host//vo/a"),
        ("https://h/dav/", "https://h/dav/vo/a"),
    ],
)
def test_a_name_is_joined_to_any_base(base: str, expected: str) -> None:
    """A storage element at the root of the file system had `file:/vo/a` as the URL of its files, which is no path."""
    assert join_url(base, "vo/a") == expected
    assert join_url(base, "/vo/a") == expected


def test_what_means_something_in_a_url_is_quoted() -> None:
    assert join_url("https://h/d", "a?b#c%2e d") == "https://h/d/a%3Fb%23c%252e%20d"


@pytest.mark.parametrize("name", ["..", "a/../b", "", "a\n"])
def test_nothing_is_joined_that_leads_out_of_the_base(name: str) -> None:
    with pytest.raises(ValueError, match="file name"):
        join_url("file:///se", name)


# -- the name of a source ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("a", "a"),
        ("../data/a", "a"),
        ("/data/a/", "a"),
        ("LFN:/vo/a", "a"),
        ("SB:STORE|/S/u/a.tar.bz2", "a.tar.bz2"),
        ("https://h/a/b.root?token=x/y#z", "b.root"),
        ("https://h/a%20b", "a b"),
        ("https://h/a%2fb", "b"),
    ],
)
def test_a_source_is_called_by_the_last_part_of_its_path(source: str, name: str) -> None:
    assert base_name(source) == name


@pytest.mark.parametrize("source", ["", "/", "https://h", "https://h/", "SB:STORE|", "SB:STORE/a"])
def test_a_source_without_a_last_part_is_named_in_the_complaint(source: str) -> None:
    with pytest.raises(ValueError, match="does not name a file") as caught:
        base_name(source)
    assert repr(source) in str(caught.value)


@pytest.mark.parametrize("source", ["..", "a/..", "https://h/%2e%2e", "https://h/a%00", "/a\nb", "SB:STORE|/a/.."])
def test_a_source_cannot_choose_a_name_that_leads_out(source: str) -> None:
    with pytest.raises(ValueError, match="file name"):
        base_name(source)

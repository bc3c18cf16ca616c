"""A site's configuration: what is read from it, and what is refused by file and field."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from loadmaster import InvalidSite, Site

FULL = """
name = "LCG.Example.org"
catalog = "catalog.sqlite"
default_se = ["DISK"]
failover_se = ["BUFFER"]
sandbox_store = "sandboxes"
vo = "example"

[storage_elements]
DISK = "se/disk"
BUFFER = "root://buffer.example.org//data"
"""


def site(tmp_path: Path, text: str) -> Site:
    path = tmp_path / "site.toml"
    path.write_text(text, encoding="utf-8")
    return Site.load(path)


def test_the_example_of_the_documentation_is_read(tmp_path: Path) -> None:
    found = site(tmp_path, FULL)
    assert (found.name, found.vo, found.default_se, found.failover_se) == (
        "LCG.Example.org",
        "example",
        ("DISK",),
        ("BUFFER",),
    )


def test_relative_paths_are_taken_from_the_files_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    found = site(tmp_path, FULL)
    assert found.catalog == f"file://{tmp_path}/catalog.sqlite"
    assert found.sandbox_store == f"file://{tmp_path}/sandboxes"
    assert found.storage_elements["DISK"] == f"file://{tmp_path}/se/disk"


def test_urls_and_absolute_paths_are_taken_as_they_are(tmp_path: Path) -> None:
    found = site(tmp_path, 'output_directory = "/data/a b"\n' + FULL)
    assert found.output_directory == "file:///data/a%20b"
    assert found.storage_elements["BUFFER"] == "root://buffer.example.org//data"


def test_a_site_of_nothing_is_a_site() -> None:
    assert Site().storage_elements == {}
    assert Site().output_directory is None


@pytest.mark.parametrize("place", ["out", "../out", ""])
def test_a_relative_path_that_is_in_no_file_is_refused(place: str) -> None:
    """It was taken from `/`: `Site(output_directory="out")` wrote to /out."""
    with pytest.raises(ValidationError, match="neither a URL nor an absolute path"):
        Site(output_directory=place)


def test_a_list_may_be_written_as_a_string(tmp_path: Path) -> None:
    assert site(tmp_path, FULL.replace('["DISK"]', '"BUFFER; DISK"')).default_se == ("BUFFER", "DISK")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("name = ", "not TOML"),
        ('nmae = "x"', "nmae: there is no such field; there is name"),
        ("kept_output_byte = 5", "kept_output_byte: there is no such field; there is payload.kept_output_bytes"),
        ("streams = 0", "streams: Input should be greater than or equal to 1"),
        ("element_streams = {DISK = 0}", "element_streams.DISK: Input should be greater than or equal to 1"),
        ("retries = -1", "retries: "),
        ("stall_seconds = 0", "stall_seconds: "),
        ('sandbox_format = "zip"', "sandbox_format: "),
        ("sandbox_limit_bytes = 0", "sandbox_limit_bytes: "),
        ('storage = {s3 = "x"}', "storage.s3: "),
        ('streams = "many"', "streams: "),
        ('default_se = ["TAPE"]', "default_se: 'TAPE' is not one of the storage_elements"),
        ('failover_se = ["TAPE"]', "failover_se: 'TAPE' is not one of the storage_elements"),
        ("storage_elements = 5", "storage_elements: "),
        ("[storage_elements]\nDISK = 5", "storage_elements.DISK: "),
        ('catalog = ""', "catalog: '': neither a URL nor an absolute path"),
        ('vo = ".."', "vo: '..'"),
        ('vo = "a/b"', "vo: 'a/b': may not have a '/' in it"),
        ('user_prefix = "../x"', "user_prefix: '../x'"),
    ],
)
def test_what_cannot_be_used_is_refused_by_file_and_field(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(InvalidSite) as caught:
        site(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path}/site.toml: ")
    assert complaint in str(caught.value)


def test_every_field_at_fault_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidSite, match=r"streams: .*; nmae: "):
        site(tmp_path, 'nmae = "x"\nstreams = 0')


def test_what_hides_behind_another_fault_is_named_too(tmp_path: Path) -> None:
    """A table of the wrong shape hid that an element was nowhere, which was told when the first was mended."""
    with pytest.raises(InvalidSite) as caught:
        site(
            tmp_path,
            'default_se = ["DISK", "TAPE", "CASTOR"]\nfailover_se = 5\n[storage_elements]\nDISK = 5\n'
            '[payload]\nisolation = "nothing"\ncontainmnt = []\n[element_streams]\nDISK = 0\n',
        )
    assert [line.partition(":")[0] for line in str(caught.value).removeprefix(f"{tmp_path}/site.toml: ").split("; ")] == [
        "storage_elements.DISK", "failover_se", "payload.isolation", "payload.containmnt", "there is payload.containment",
        "element_streams.DISK", "default_se", "default_se",
    ]  # fmt: skip
    found, problems = Site.understand(tmp_path / "site.toml")
    assert (found.default_se, len(problems)) == ((), 6)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidSite, match=r"nowhere\.toml: No such file"):
        Site.load(tmp_path / "nowhere.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(InvalidSite, match=r"latin\.toml: not TOML"):
        Site.load(tmp_path / "latin.toml")


def test_servers_have_more_streams_than_the_disk_unless_the_site_says_how_many() -> None:
    assert [Site().streams_of(scheme) for scheme in ("file", "https", "s3")] == [8, 32, 32]
    assert [Site(streams=4).streams_of(scheme) for scheme in ("file", "https")] == [4, 4]
    assert (Site().most_streams, Site(streams=4).most_streams) == (32, 4)

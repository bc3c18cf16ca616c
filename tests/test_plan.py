"""What is moved where: decisions of a description, a site and a catalog's answers."""

from __future__ import annotations

from typing import Any

import pytest

from loadmaster import InputFile, InvalidJob, JobDescription, OutputFile, Site, StagingFailed
from loadmaster.staging.plan import (
    Delivery,
    Fetch,
    check_outputs,
    lfns_of,
    plan_delivery,
    plan_fetches,
    sandbox_directory,
    without_collisions,
)
from loadmaster.storage.base import CatalogEntry, FileInfo, Replica
from loadmaster.storage.checksums import Checksum

SITE = Site(
    catalog="/catalog.sqlite",
    storage_elements={"DISK": "/se/disk", "TAPE": "/se/tape", "BUFFER": "/se/buffer"},
    default_se=("DISK",),
    failover_se=("BUFFER",),
    sandbox_store="/sandboxes",
    vo="vo",
)


def job(**words: Any) -> JobDescription:
    return JobDescription.load({"executable": "/bin/true", "job_id": "1234", "owner": "alice", **words})


def plan(output: object, name: str, site: Site = SITE, **words: Any) -> Delivery:
    description = job(output_data=[output], **words)
    return plan_delivery(description.output_data[0], name, description, site)


def urls(delivery: Delivery) -> list[str]:
    return [target.url for target in delivery.targets]


# -- inputs ------------------------------------------------------------------------------------------------------


def test_the_catalog_is_asked_for_lfns_and_for_paths_that_may_be_some() -> None:
    files = job(input_data=["LFN:/vo/a", "/vo/b", "/x/../c", "file:///d", "e"]).input_data
    assert lfns_of(files) == ["/vo/a", "/vo/b"]


def test_a_file_of_the_catalog_comes_from_this_sites_storage_first() -> None:
    far, near = Replica("root://far//vo/a", "FAR"), Replica("file:///se/disk/vo/a", "DISK")
    known = {"/vo/a": CatalogEntry("/vo/a", FileInfo(7, Checksum("adler32", "000000ab")), (far, near))}
    assert plan_fetches([InputFile(source="LFN:/vo/a")], known, SITE) == [
        Fetch("a", (near, far), 7, Checksum("adler32", "000000ab"), "/vo/a")
    ]


def test_what_the_user_says_of_a_file_wins_over_the_catalog() -> None:
    known = {"/vo/a": CatalogEntry("/vo/a", FileInfo(7, Checksum("adler32", "00000001")), (Replica("file:///a"),))}
    [fetch] = plan_fetches([InputFile(source="LFN:/vo/a", size_bytes=0, adler32="F")], known, SITE)
    assert (fetch.size_bytes, str(fetch.checksum)) == (0, "adler32:0000000f")


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("F", "adler32:0000000f"),
        ("ADLER32:0a1b2c3d", "adler32:0a1b2c3d"),
        ("md5:" + "Ab" * 16, "md5:" + "ab" * 16),
        ("1220" + "0c" * 32, "sha256:" + "0c" * 32),
        ("crc32c:01020304", "crc32c:01020304"),
    ],
)
def test_a_checksum_is_read_in_all_its_spellings(said: str, meant: str) -> None:
    [fetch] = plan_fetches([InputFile(source="/a", checksum=said)], {}, SITE)
    assert str(fetch.checksum) == meant


def test_paths_urls_and_sandboxes_are_fetched_from_where_they_are() -> None:
    files = job(input_data=["/data/a b", "https://h/c", "SB:STORE|/S/u/d.tar"]).input_data
    places = [fetch.sources[0].url for fetch in plan_fetches(files, {}, SITE)]
    assert places == ["file:///data/a%20b", "https://h/c", "file:///sandboxes/S/u/d.tar"]


def test_every_input_that_cannot_be_had_is_named_at_once() -> None:
    files = job(input_data=["LFN:/vo/a", "LFN:/vo/b", "c", "SB:S|/d", "/e"]).input_data
    known = {"/vo/b": CatalogEntry("/vo/b", FileInfo(1), ())}
    with pytest.raises(StagingFailed) as caught:
        plan_fetches(files, known, Site())
    assert [problem.partition(": ")[0] for problem in caught.value.problems] == [
        "LFN:/vo/a",
        "LFN:/vo/b",
        "'c'",
        "SB:S|/d",
    ]


# -- outputs -----------------------------------------------------------------------------------------------------


def test_an_output_goes_to_the_wanted_storage_elements_in_order_and_has_a_way_out() -> None:
    delivery = plan("x.root", "x.root", output_se=["TAPE", "DISK"])
    lfn = "/vo/user/a/alice/1/1234/x.root"
    assert delivery.targets == (Replica(f"file:///se/tape{lfn}", "TAPE"), Replica(f"file:///se/disk{lfn}", "DISK"))
    assert delivery.failover == (Replica(f"file:///se/buffer{lfn}", "BUFFER"),)
    assert delivery.lfn == lfn


def test_no_storage_element_is_its_own_way_out() -> None:
    assert plan("x", "x", output_se="BUFFER").failover == ()


@pytest.mark.parametrize(
    ("words", "site", "url"),
    [
        ({"output_se": "/data"}, SITE, "file:///data/x"),
        ({"output_se": "/data", "output_path": "run7/"}, SITE, "file:///data/run7/x"),
        ({"output_se": "/data", "output_path": "LFN:/vo/run7"}, SITE, "file:///data/vo/run7/x"),
        ({"output_se": "root://h//data"}, SITE, "root://h//data/x"),
        ({}, Site(output_directory="/out"), "file:///out/x"),
        ({"output_path": "file:///mine"}, Site(output_directory="/out"), "file:///mine/x"),
    ],
)
def test_a_directory_needs_neither_catalog_nor_owner(words: dict[str, Any], site: Site, url: str) -> None:
    delivery = plan("x", "x", site, owner=None, **words)
    assert (urls(delivery), delivery.lfn) == ([url], None)


@pytest.mark.parametrize(
    ("output", "name", "url"),
    [
        ("/data/x", "x", "file:///data/x"),
        ("/data/*.root", "a.root", "file:///data/a.root"),
        ("/*.root", "a.root", "file:///a.root"),
        ("root://h//d/h?.root", "h1.root", "root://h//d/h1.root"),
        ("/data/d", "d/sub/x", "file:///data/d/x"),
        ({"pattern": "d/*.root", "target": "/data/out"}, "d/a.root", "file:///data/out/a.root"),
        ({"pattern": "x", "target": "/data/y"}, "x", "file:///data/y"),
    ],
)
def test_a_target_is_the_file_itself_or_where_several_go(output: object, name: str, url: str) -> None:
    """`/data/*.root` put its files into a directory that was called `*.root`."""
    assert urls(plan(output, name)) == [url]


@pytest.mark.parametrize(
    ("output", "name", "lfn"),
    [
        ("LFN:/vo/d/x", "vo/d/x", "/vo/d/x"),
        ("LFN:/vo/d/*.root", "vo/d/a.root", "/vo/d/a.root"),
        ("LFN:/vo/*/x", "vo/a/x", "/vo/a/x"),
        ("LFN:/vo/d", "vo/d/sub/x", "/vo/d/sub/x"),
        ({"pattern": "*.root", "target": "LFN:/vo/d/*.root"}, "a.root", "/vo/d/a.root"),
        ({"pattern": "*.root", "target": "LFN:/vo/d"}, "a.root", "/vo/d/a.root"),
        ({"pattern": "x", "target": "LFN:/vo/y"}, "x", "/vo/y"),
    ],
)
def test_an_lfn_that_stands_for_several_files_gives_each_its_own(output: object, name: str, lfn: str) -> None:
    """`LFN:/vo/*/x` registered one file called `/vo/*/x`, and every match was a collision with the first."""
    delivery = plan(output, name)
    assert (delivery.lfn, urls(delivery)) == (lfn, [f"file:///se/disk{lfn}"])


@pytest.mark.parametrize(
    ("words", "site", "complaint"),
    [
        ({"output_data": "x"}, Site(), "output_data: nowhere to put it"),
        ({"output_data": "*"}, Site(), "output_data: nowhere to put it"),
        ({"output_data": "x", "output_se": "NONE"}, SITE, "output_se: no storage element 'NONE' (DISK, TAPE, BUFFER)"),
        ({"output_data": "x", "output_se": "NONE", "owner": None}, SITE, "output_se: no storage element 'NONE'"),
        ({"output_data": "x", "owner": None}, SITE, "owner: is needed"),
        ({"output_data": "x", "output_se": "/d", "output_path": "file:///x"}, SITE, "output_path: file:///x: a URL"),
        ({"output_data": "x", "output_path": "file:///x"}, SITE, "output_path: "),
        ({"output_data": "LFN:/vo/x"}, Site(), "output_data: LFN:/vo/x: no storage element"),
        ({"output_sandbox": "x"}, Site(), "output_sandbox: nowhere to put it"),
    ],
)
def test_an_output_with_nowhere_to_go_is_refused_before_anything_is_computed(
    words: dict[str, Any], site: Site, complaint: str
) -> None:
    with pytest.raises(InvalidJob) as caught:
        check_outputs(job(**words), site)
    assert str(caught.value).startswith(complaint)


def test_a_site_with_places_takes_every_output() -> None:
    check_outputs(job(output_data=["x", "*", "d/", "LFN:/vo/[ab]"], output_sandbox="std.out"), SITE)


def test_sandboxes_go_to_the_store_or_else_to_the_output_directory() -> None:
    assert sandbox_directory(job(), SITE) == "file:///sandboxes/1234"
    assert sandbox_directory(job(), Site(output_directory="/out")) == "file:///out"


def test_of_two_files_that_would_become_one_the_second_is_refused_and_the_rest_goes() -> None:
    a, b, y = (plan("*/x", name, output_se="/data") for name in ("a/x", "b/x", "c/y"))
    assert without_collisions([a, b, y], {}) == ([a, y], {"b/x": "would take the place of a/x at file:///data/x"})
    assert without_collisions([a, a, y], {}) == ([a, a, y], {})


def test_a_file_may_not_take_the_place_of_one_delivered_by_an_earlier_step() -> None:
    delivered: dict[str, str] = {}
    without_collisions([plan("a/x", "a/x", output_se="/data")], delivered)
    assert "b/x" in without_collisions([plan("b/x", "b/x", output_se="/data")], delivered)[1]


def test_an_output_directory_may_be_each_jobs_own() -> None:
    site = Site(output_directory="/out/{job_id}")
    assert sandbox_directory(job(), site) == "file:///out/1234"
    assert plan_delivery(OutputFile(pattern="x"), "x", job(), site).targets[0].url == "file:///out/1234/x"


def test_a_target_that_ends_in_a_slash_is_a_directory() -> None:
    file = OutputFile(pattern="x", target="file:///data/")
    assert plan_delivery(file, "x", job(), SITE).targets[0].url == "file:///data/x"


def test_a_name_that_is_too_long_for_its_place_is_refused_by_its_field() -> None:
    with pytest.raises(InvalidJob, match="output_data: x: "):
        plan_delivery(OutputFile(pattern="x"), "x", job(output_path="a/" * 511 + "a", output_se="/data"), SITE)

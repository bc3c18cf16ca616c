"""The world a payload runs in: what a site may say of it, and what it means for the payload."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from conftest import Fly, sh
from loadmaster import InvalidSite, Site, Status
from loadmaster.description import Containment, Isolation
from loadmaster.world import BEST_FIRST, World


def test_a_site_says_it_in_its_file(tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    file.write_text(
        '[payload]\ncontainment = "subreaper"\nisolation = "bubblewrap"\ninherit = ["X509_*"]\nnice = 5\numask = "077"\n'
    )
    world = Site.load(file).payload
    assert world == World(
        containment=(Containment.SUBREAPER,), isolation=Isolation.BUBBLEWRAP, inherit=("X509_*",), nice=5, umask=0o77
    )


def test_without_a_word_the_surest_that_the_node_allows_is_taken() -> None:
    assert Site().payload.containment == BEST_FIRST == tuple(Containment)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("containment = []", "payload.containment: name at least one of pid-namespace, cgroup, subreaper"),
        ('containment = "jail"', "payload.containment.0: Input should be 'pid-namespace'"),
        ('umask = "rwx"', "payload.umask: 'rwx' is not an octal number such as 022"),
        ("nice = -5", "payload.nice: Input should be greater than or equal to 0"),
        ("kept_output_bytes = 10", "payload.kept_output_bytes: Input should be greater than or equal to 1000000"),
        ('isolation = "apptainer"', 'payload: isolation = "apptainer" needs an image'),
        ('image = "centos7.sif"', "needs an image, a path or docker://..., and nothing else takes one"),
        ("niceness = 5", "payload.niceness: there is no such field"),
    ],
)
def test_what_it_cannot_mean_is_named(tmp_path: Path, words: str, complaint: str) -> None:
    file = tmp_path / "site.toml"
    file.write_text(f"[payload]\n{words}\n")
    with pytest.raises(InvalidSite) as caught:
        Site.load(file)
    assert complaint in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("inherit", "seen"),
    [
        ((), set()),
        (("X509_*",), {"X509_USER_PROXY", "X509_CERT_DIR"}),
        (("X509_USER_PROX?",), {"X509_USER_PROXY"}),
        (("*",), {"X509_USER_PROXY", "X509_CERT_DIR", "BEARER_TOKEN"}),
    ],
)
def test_of_the_pilots_variables_a_payload_gets_those_the_site_names(inherit: tuple[str, ...], seen: set[str]) -> None:
    pilots = dict.fromkeys(("X509_USER_PROXY", "X509_CERT_DIR", "BEARER_TOKEN"), "secret") | {"PATH": "/bin"}
    assert World(inherit=inherit).environment(pilots).keys() == {"PATH", *seen}


@pytest.mark.parametrize("kind", BEST_FIRST)
async def test_the_payload_finds_it_so(fly: Fly, out: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("X509_USER_PROXY", "/proxy")
    monkeypatch.setenv("BEARER_TOKEN", "secret")
    world: dict[str, Any] = {"containment": kind, "inherit": ["X509_*"], "nice": 3, "umask": 0o077}
    result = await fly(
        world=world, **sh("env; nice; touch made; stat -c %a made"), output_sandbox=["std.out"],
    )  # fmt: skip
    assert result.status is Status.DONE
    *environment, nice, mode = (out / "std.out").read_text().splitlines()
    assert "X509_USER_PROXY=/proxy" in environment
    assert not any("secret" in line for line in environment)
    assert (int(nice) - os.nice(0), mode) == (3, "600")


async def test_a_payload_may_print_without_end_and_its_log_is_kept_short(fly: Fly, out: Path) -> None:
    script = "i=0; while [ $i -lt 30 ]; do yes | head -c 1000000; sleep 0.05; i=$((i+1)); done; echo the end"
    result = await fly(
        {"heartbeat_seconds": 0.1}, world={"kept_output_bytes": 2_000_000}, **sh(script), output_sandbox=["std.out"]
    )
    assert result.status is Status.DONE
    log = (out / "std.out").read_bytes()
    assert len(log) < 12_000_000
    assert log.endswith(b"y\nthe end\n")
    assert b" bytes left out ...]\n" in log

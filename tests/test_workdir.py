"""A job's directory: nobody else's while it lives, confined while it is used, gone afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from loadmaster import WorkdirFault
from loadmaster.workdir import NotDeliverable, Workdir, open_workdir

DEPTH = 5_000


def plant_deep_tree(path: Path, depth: int) -> None:
    """Deeper than any path may be long, a file at the bottom."""
    descriptor = os.open(path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=descriptor)
        below = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(os.open("bottom", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor))
    os.close(descriptor)


def plant_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.open(path.parent, os.O_RDONLY)
        listener.bind(f"/proc/self/fd/{here}/{path.name}")  # a socket's path may have 108 bytes only
        os.close(here)


# -- made --------------------------------------------------------------------------------------------------------


def test_a_work_directory_is_empty_and_nobody_else_may_enter_it(root: Path, workdir: Workdir) -> None:
    assert workdir.path == root / "job"
    assert list(workdir.path.iterdir()) == []
    assert workdir.path.stat().st_mode & 0o777 == 0o700


def test_the_directories_above_are_made(tmp_path: Path) -> None:
    workdir = Workdir.make(tmp_path / "a" / "b", "job")
    workdir.close()
    assert (tmp_path / "a" / "b").is_dir()
    assert not workdir.path.exists()


def test_what_a_dead_job_left_is_removed(root: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from loadmaster.workdir import Workdir\n"
        "w = Workdir.make(Path(sys.argv[1]), 'job')\n"
        "(w.path / 'half a file').write_text('x'); (w.path / 'd').mkdir()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    dead = subprocess.run([sys.executable, "-c", script, str(root)])
    assert dead.returncode == -signal.SIGKILL
    assert len(list((root / "job").iterdir())) == 2
    workdir = Workdir.make(root, "job")
    assert list(workdir.path.iterdir()) == []
    workdir.close()


def test_a_live_jobs_directory_is_refused_and_left_as_it_is(root: Path, workdir: Workdir) -> None:
    (workdir.path / "precious").touch()
    with pytest.raises(WorkdirFault, match="another running job"):
        Workdir.make(root, "job")
    assert (workdir.path / "precious").exists()


def test_a_live_jobs_directory_is_refused_to_another_process_too(root: Path, workdir: Workdir) -> None:
    script = (
        "import sys; from pathlib import Path; from loadmaster.workdir import Workdir\n"
        "Workdir.make(Path(sys.argv[1]), 'job')"
    )
    other = subprocess.run([sys.executable, "-c", script, str(root)], capture_output=True, text=True)
    assert other.returncode == 1
    assert "another running job has this work directory" in other.stderr


def test_a_kept_directory_is_free_for_the_next_job(root: Path) -> None:
    first = Workdir.make(root, "job")
    (first.path / "kept").touch()
    first.close(keep=True)
    assert (root / "job" / "kept").exists()
    Workdir.make(root, "job").close()


@pytest.mark.parametrize("plant", [Path.touch, os.mkfifo, lambda path: path.symlink_to(path.parent)])
def test_something_else_in_its_place_is_a_fault_and_stays(root: Path, plant: Callable[[Path], object]) -> None:
    plant(root / "job")
    with pytest.raises(WorkdirFault, match="cannot make the work directory"):
        Workdir.make(root, "job")
    assert os.path.lexists(root / "job")
    (root / "job").unlink()


@pytest.mark.parametrize("name", ["../job", "/job", "", ".", "a\nb"])
def test_a_name_that_leads_elsewhere_is_refused(root: Path, name: str) -> None:
    with pytest.raises(ValueError, match="file name"):
        Workdir.make(root, name)


# -- removed -----------------------------------------------------------------------------------------------------


def test_a_tree_deeper_than_any_path_is_removed(root: Path) -> None:
    workdir = Workdir.make(root, "job")
    plant_deep_tree(workdir.path, DEPTH)
    workdir.close()
    assert not workdir.path.exists()


def test_a_wide_tree_of_deep_ones_is_removed(root: Path) -> None:
    workdir = Workdir.make(root, "job")
    for number in range(20):
        (workdir.path / str(number)).mkdir()
        plant_deep_tree(workdir.path / str(number), 50)
    workdir.close()
    assert not workdir.path.exists()


def test_links_are_removed_and_what_they_point_to_survives(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("gold")
    outside.chmod(0o755)
    workdir = Workdir.make(root, "job")
    (workdir.path / "to a directory").symlink_to(outside)
    (workdir.path / "to a file").symlink_to(outside / "precious")
    (workdir.path / "to itself").symlink_to("to itself")
    (workdir.path / "below").mkdir()
    (workdir.path / "below" / "up").symlink_to(outside)
    workdir.close()
    assert not workdir.path.exists()
    assert (outside / "precious").read_text() == "gold"
    assert outside.stat().st_mode & 0o777 == 0o755


def test_fifos_and_sockets_are_removed_without_hanging(root: Path) -> None:
    workdir = Workdir.make(root, "job")
    os.mkfifo(workdir.path / "fifo")
    plant_socket(workdir.path / "socket")
    workdir.close()
    assert not workdir.path.exists()


def test_names_no_text_can_hold_are_removed(root: Path) -> None:
    workdir = Workdir.make(root, "job")
    for name in [b"\xff\xfe", b"line\nbreak", b"-rf", b" ", b"x" * 255]:
        (workdir.path / os.fsdecode(name)).mkdir()
        (workdir.path / os.fsdecode(name) / os.fsdecode(name)).touch()
    workdir.close()
    assert not workdir.path.exists()


def test_an_ordinary_user_removes_what_the_payload_closed(as_ordinary_user: Callable[[str], str]) -> None:
    """Directories nobody may enter, list or write to, in each other; the work directory itself among them."""
    script = """
import os
from pathlib import Path
from loadmaster.workdir import Workdir

def plant(path):
    for mode in (0o000, 0o500, 0o300, 0o600):
        for inner in (0o000, 0o500):
            folder = path / f"{mode:o}-{inner:o}" / "in" / "deep"
            folder.mkdir(parents=True)
            (folder / "file").touch(mode=0)
            folder.chmod(inner)
            folder.parent.chmod(inner)
            folder.parent.parent.chmod(mode)

assert os.geteuid() != 0
for own in (0o000, 0o500, 0o300):
    root = Path.cwd() / "root"
    workdir = Workdir.make(root, "job")
    plant(workdir.path)
    workdir.path.chmod(own)
    workdir.close()
    assert not workdir.path.exists(), oct(own)
    dead = Workdir.make(root, "job")
    plant(dead.path)
    dead.path.chmod(own)
    dead.close(keep=True)
    Workdir.make(root, "job").close()
print("all removed")
"""
    assert as_ordinary_user(script) == "all removed\n"


def test_a_payload_that_removed_its_own_directory_is_no_fault(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    workdir = Workdir.make(root, "job")
    shutil.rmtree(workdir.path)
    workdir.close()
    assert "removed its own work directory" in caplog.text


def test_a_payload_that_moved_its_own_directory_leaves_nothing_in_it(root: Path, tmp_path: Path) -> None:
    workdir = Workdir.make(root, "job")
    (workdir.path / "file").touch()
    workdir.path.rename(tmp_path / "elsewhere")
    workdir.close()
    assert list((tmp_path / "elsewhere").iterdir()) == []


async def test_an_open_directory_is_gone_after_the_block_also_when_cancelled(root: Path) -> None:
    with anyio.CancelScope() as scope:
        async with open_workdir(root, "job") as workdir:
            os.mkfifo(workdir.path / "fifo")
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert not workdir.path.exists()


async def test_an_open_directory_is_gone_after_an_error(root: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with open_workdir(root, "job") as workdir:
            raise ZeroDivisionError
    assert not workdir.path.exists()


async def test_a_directory_that_is_to_be_kept_is_kept_and_unlocked(root: Path) -> None:
    async with open_workdir(root, "job", keep=True) as workdir:
        (workdir.path / "file").touch()
    assert (workdir.path / "file").exists()
    async with open_workdir(root, "job") as again:
        assert list(again.path.iterdir()) == []


# -- files in it -------------------------------------------------------------------------------------------------


def read(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def test_an_output_is_read_by_its_name_and_through_links_inside(workdir: Workdir) -> None:
    (workdir.path / "d").mkdir()
    (workdir.path / "d" / "file").write_text("content")
    (workdir.path / "link").symlink_to("d/file")
    (workdir.path / "absolute").symlink_to(workdir.path / "d" / "file")
    (workdir.path / "e").symlink_to("d")
    for name in ("d/file", "link", "absolute", "e/file"):
        assert read(workdir.open_output(name)) == b"content"


def test_an_output_that_is_a_link_out_of_the_directory_is_refused(workdir: Workdir, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    (workdir.path / "absolute").symlink_to(secret)
    (workdir.path / "relative").symlink_to(f"../../{secret.name}")
    (workdir.path / "beside").symlink_to(f"{workdir.path}-of-another")
    (workdir.path / "itself").symlink_to(".")
    (workdir.path / "chain").symlink_to("absolute")
    for name in ("absolute", "relative", "beside", "itself", "chain"):
        with pytest.raises(NotDeliverable, match="link out of the work directory"):
            workdir.open_output(name)


def test_an_output_below_a_directory_that_is_a_link_out_is_refused(workdir: Workdir, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (workdir.path / "d").symlink_to(tmp_path)
    with pytest.raises(NotDeliverable, match="link out of the work directory"):
        workdir.open_output("d/secret")


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    ("plant", "reason"),
    [
        (os.mkfifo, "is a FIFO, not a file"),
        (plant_socket, "is a socket, not a file"),
        (os.mkdir, "is a directory, not a file"),
        (lambda path: path.symlink_to(path.name), "is a link, not a file"),
    ],
    ids=["fifo", "socket", "directory", "loop"],
)
def test_an_output_that_is_not_a_file_is_refused_with_the_reason(
    workdir: Workdir, plant: Callable[[Path], None], reason: str
) -> None:
    plant(workdir.path / "out")
    with pytest.raises(NotDeliverable, match=reason):
        workdir.open_output("out")


@pytest.mark.skipif(os.geteuid() != 0, reason="a device can only be made by root")
def test_an_output_that_is_a_device_is_refused(workdir: Workdir) -> None:
    os.mknod(workdir.path / "out", 0o20666, os.makedev(1, 5))  # zero: reading it never ends
    with pytest.raises(NotDeliverable, match="is a device, not a file"):
        workdir.open_output("out")


@pytest.mark.parametrize("name", ["\udcff", "a\nb", "../x", "/etc/passwd", "d/" * 600 + "x"])
def test_an_output_with_an_impossible_name_is_refused_as_any_other(workdir: Workdir, name: str) -> None:
    """It used to raise ValueError, which took the whole sandbox with it."""
    with pytest.raises(NotDeliverable, match="file name"):
        workdir.open_output(name)


def test_an_output_that_is_not_there_is_not_found(workdir: Workdir) -> None:
    (workdir.path / "dangling").symlink_to("nowhere")
    for name in ("nowhere", "no/where", "dangling"):
        with pytest.raises(FileNotFoundError):
            workdir.open_output(name)


def test_a_new_file_replaces_whatever_has_its_name(workdir: Workdir, tmp_path: Path) -> None:
    """A link's or a hard link's target is not touched, and a FIFO does not swallow what is written."""
    outside = tmp_path / "outside"
    outside.write_text("precious")
    (workdir.path / "link").symlink_to(outside)
    (workdir.path / "hard").hardlink_to(outside)
    os.mkfifo(workdir.path / "fifo")
    for name in ("link", "hard", "fifo", "new", "a/b/c"):
        descriptor = workdir.create(name)
        os.write(descriptor, b"ours")
        os.close(descriptor)
        assert (workdir.path / name).read_bytes() == b"ours"
        assert (workdir.path / name).lstat().st_nlink == 1
    assert outside.read_text() == "precious"


def test_a_new_file_is_not_made_through_a_directory_that_is_a_link(workdir: Workdir, tmp_path: Path) -> None:
    (workdir.path / "d").symlink_to(tmp_path)
    with pytest.raises(OSError, match=r"Not a directory|symbolic link"):
        workdir.create("d/file")
    assert not (tmp_path / "file").exists()


def test_a_file_gets_its_name_in_a_directory_that_is_not_there_yet(workdir: Workdir) -> None:
    os.close(workdir.create("part"))
    workdir.rename("part", "a/b/file")
    assert (workdir.path / "a" / "b" / "file").is_file()
    workdir.remove("a/b/file")
    workdir.remove("a/b/file")
    assert not (workdir.path / "a" / "b" / "file").exists()


def test_patterns_match_as_in_a_shell_and_exact_names_first(workdir: Workdir) -> None:
    for name in ("b.root", "a.root", "[x]", "x", ".hidden"):
        (workdir.path / name).touch()
    assert workdir.matches("*.root") == ["a.root", "b.root"]
    assert workdir.matches("[x]") == ["[x]"]
    assert workdir.matches("*") == ["[x]", "a.root", "b.root", "x"]
    assert workdir.matches("none*") == []


def test_the_files_below_a_directory_are_named_without_following_links(workdir: Workdir, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").touch()
    (workdir.path / "d" / "e").mkdir(parents=True)
    (workdir.path / "d" / "e" / "file").touch()
    (workdir.path / "d" / "out").symlink_to(tmp_path / "outside")
    assert list(workdir.files_below("d")) == ["d/out", "d/e/file"]
    assert workdir.is_directory("d")
    assert not workdir.is_directory("d/out")
    assert not workdir.is_directory("nowhere")


def test_a_directory_that_is_not_ours_is_never_emptied(tmp_path: Path) -> None:
    """A job called `docs` removed everything in <root>/docs."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "thesis.tex").touch()
    with pytest.raises(WorkdirFault, match="it is not empty, and loadmaster did not make it"):
        Workdir.make(tmp_path, "docs")
    assert (tmp_path / "docs" / "thesis.tex").exists()

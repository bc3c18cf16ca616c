"""Which GPUs are ours: from the variables of batch systems, and from the files of two drivers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from loadmaster.allocation import Tree
from loadmaster.gpus import find_gpus
from loadmaster.topology import Gpu

A, B = "GPU-9221d5d1-b60b-a624-bf14-0a1819cfda3b", "GPU-0c1d2e3f-0011-2233-4455-66778899aabb"

NVIDIA = """Model: \t\t NVIDIA H100 80GB HBM3
IRQ:   \t\t 10
GPU UUID: \t {uuid}
Video BIOS: \t 96.00.99.00.01
Bus Type: \t PCIe
Bus Location: \t {place}
Device Minor: \t {minor}
GPU Excluded:\t {excluded}
"""
AMD = "cpu_cores_count 0\nsimd_count {simd}\nlocation_id {place}\ndomain 0\ndrm_render_minor {minor}\nunique_id {unique}\n"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def nvidia(place: str, uuid: str, minor: int, node: int, excluded: str = "No") -> dict[str, str]:
    text = NVIDIA.format(uuid=uuid, place=place, minor=minor, excluded=excluded)
    return {
        f"proc/driver/nvidia/gpus/{place}/information": text,
        f"sys/bus/pci/devices/{place}/numa_node": f"{node}\n",
        f"dev/nvidia{minor}": "",
    }


@pytest.fixture
def two_nvidia(tmp_path: Path) -> Tree:
    """The second device of the node comes first by its place, as happens."""
    write(tmp_path, nvidia("0000:17:00.0", A, 1, 0) | nvidia("0000:ca:00.0", B, 0, 1))
    return Tree(tmp_path)


@pytest.fixture
def two_amd(tmp_path: Path) -> Tree:
    nodes = "sys/class/kfd/kfd/topology/nodes"
    write(tmp_path, {
        f"{nodes}/0/properties": AMD.format(simd=0, place=0, minor=0, unique=0),
        f"{nodes}/1/properties": AMD.format(simd=304, place=0x2F00, minor=128, unique=0x1F2E3D4C5B6A7988),
        f"{nodes}/2/properties": AMD.format(simd=304, place=0xC508, minor=129, unique=0),
        "dev/dri/renderD128": "", "dev/dri/renderD129": "",
        "sys/bus/pci/devices/0000:2f:00.0/numa_node": "0\n",
        "sys/bus/pci/devices/0000:c5:01.0/numa_node": "-1\n",
    })  # fmt: skip
    return Tree(tmp_path)


def test_a_machine_without_any_has_none_and_nobody_is_told(tmp_path: Path) -> None:
    found = find_gpus(Tree(tmp_path), {})
    assert (found.gpus, found.variables, found.source) == ((), (), "none found")


def test_nvidias_driver_names_them(two_nvidia: Tree) -> None:
    found = find_gpus(two_nvidia, {})
    assert found.gpus == (Gpu(A, 0), Gpu(B, 1))
    assert (found.variables, found.source) == (("CUDA_VISIBLE_DEVICES",), "NVIDIA's driver")


@pytest.mark.parametrize(
    ("value", "gpus"),
    [
        ("1", (Gpu("1"),)),
        ("1,0", (Gpu("1", 1), Gpu("0", 0))),
        (B, (Gpu(B, 1),)),
        ("MIG-3fa2c0d1-0000-1111-2222-333344445555", (Gpu("MIG-3fa2c0d1-0000-1111-2222-333344445555"),)),
        ("0, 1,-1,2", (Gpu("0", 0), Gpu("1", 1))),
        ("0,0", (Gpu("0"),)),
        ("", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("0;rm -rf /", ()),
    ],
)
def test_the_batch_system_has_the_last_word(value: str, gpus: tuple[Gpu, ...], two_nvidia: Tree) -> None:
    """Nearness is known by UUID, or when the variable names all there are: an index may count only what is visible."""
    found = find_gpus(two_nvidia, {"CUDA_VISIBLE_DEVICES": value})
    assert (found.gpus, found.variables) == (gpus, ("CUDA_VISIBLE_DEVICES",))


def test_a_device_that_is_not_ours_is_not_counted(tmp_path: Path) -> None:
    """A container sees the files of the driver, and the devices it was given."""
    write(tmp_path, nvidia("0000:17:00.0", A, 0, 0) | nvidia("0000:ca:00.0", B, 1, 1))
    os.unlink(tmp_path / "dev/nvidia0")
    assert find_gpus(Tree(tmp_path), {}).gpus == (Gpu(B, 1),)


def test_a_device_without_permission_is_not_counted(as_ordinary_user: Callable[[str], str]) -> None:
    information = NVIDIA.format(uuid=A, place="0000:17:00.0", minor=0, excluded="No")
    assert as_ordinary_user(f"""
from pathlib import Path
from loadmaster.allocation import Tree
from loadmaster.gpus import find_gpus
place = Path("proc/driver/nvidia/gpus/0000:17:00.0")
place.mkdir(parents=True)
(place / "information").write_text({information!r})
Path("dev").mkdir()
device = Path("dev/nvidia0")
for mode in (0o600, 0o000):
    device.touch()
    device.chmod(mode)
    print(len(find_gpus(Tree(Path.cwd()), {{}}).gpus))
""").split() == ["1", "0"]  # fmt: skip


def test_an_excluded_device_is_not_counted(tmp_path: Path) -> None:
    write(tmp_path, nvidia("0000:17:00.0", A, 0, 0, excluded="Yes"))
    assert find_gpus(Tree(tmp_path), {}).variables == ()


def test_a_device_nobody_has_used_yet_goes_by_its_index(tmp_path: Path) -> None:
    unknown = "GPU-????????-????-????-????-????????????"
    write(tmp_path, nvidia("0000:17:00.0", unknown, 0, 0) | nvidia("0000:ca:00.0", unknown, 1, 1))
    assert find_gpus(Tree(tmp_path), {}).gpus == (Gpu("0", 0), Gpu("1", 1))


def test_amds_driver_names_them(two_amd: Tree) -> None:
    found = find_gpus(two_amd, {})
    assert found.gpus == (Gpu("GPU-1f2e3d4c5b6a7988", 0), Gpu("1", None))
    assert (found.variables, found.source) == (("ROCR_VISIBLE_DEVICES",), "AMD's driver")


def test_amds_variable_goes_before_nvidias_where_the_gpus_are_amds(two_amd: Tree) -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "0", "ROCR_VISIBLE_DEVICES": "1"}
    assert find_gpus(two_amd, environ).variables == ("ROCR_VISIBLE_DEVICES",)
    assert find_gpus(two_amd, {"HIP_VISIBLE_DEVICES": "1"}).variables == ("HIP_VISIBLE_DEVICES",)
    assert find_gpus(two_amd, {"CUDA_VISIBLE_DEVICES": "1"}).gpus == (Gpu("1"),)

"""What a machine offers: each figure with its source, the smallest counts. Trees of files as real machines have them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from anyio import to_thread

from loadmaster import JobDescription
from loadmaster.machine import Machine, detect
from loadmaster.topology import Cpu

# Two sockets of four cores of two threads: siblings are n and n + 8.
BARE = {
    "proc/meminfo": "MemTotal:       65536000 kB\nMemFree:        60000000 kB\nHugePages_Total:       0\n",
    "sys/devices/system/cpu/online": "0-15\n",
    "sys/devices/system/node/node0/cpulist": "0-3,8-11\n",
    "sys/devices/system/node/node1/cpulist": "4-7,12-15\n",
    "sys/devices/system/node/has_cpu": "0-1\n",
} | {
    f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list": f"{number % 8},{number % 8 + 8}\n"
    for number in range(16)
}

# A Slurm node with the second version of control groups; the limits are set on the job, two levels up.
V2 = {
    "proc/self/cgroup": "0::/system.slice/slurmstepd.scope/job_4711/step_0/user/task_0\n",
    "proc/self/mountinfo": (
        "22 1 0:21 / /proc rw,nosuid - proc proc rw\n"
        "35 24 0:30 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
    ),
    "sys/fs/cgroup/system.slice/cpu.max": "max 100000\n",
    "sys/fs/cgroup/system.slice/memory.max": "max\n",
    "sys/fs/cgroup/system.slice/slurmstepd.scope/job_4711/cpu.max": "650000 100000\n",
    "sys/fs/cgroup/system.slice/slurmstepd.scope/job_4711/memory.max": f"{16000 * 2**20}\n",
    "sys/fs/cgroup/system.slice/slurmstepd.scope/job_4711/step_0/user/memory.high": f"{12000 * 2**20}\n",
    "sys/fs/cgroup/system.slice/slurmstepd.scope/job_4711/step_0/user/task_0/cpuset.cpus.effective": "0-3,8-11\n",
}

# A container in a Kubernetes pod, first version: of the tree of groups its own branch is mounted, and only that.
POD = "/kubepods/burstable/pod1b7/c0ffee"
V1 = {
    "proc/self/cgroup": f"11:memory:{POD}\n7:cpuset:{POD}\n4:cpu,cpuacct:{POD}\n1:name=systemd:{POD}\n0::/system.slice\n",
    "proc/self/mountinfo": (
        f"40 39 0:35 {POD} /sys/fs/cgroup/systemd ro - cgroup cgroup rw,xattr,name=systemd\n"
        f"41 39 0:36 {POD} /sys/fs/cgroup/cpu,cpuacct ro,nosuid - cgroup cgroup rw,cpu,cpuacct\n"
        f"42 39 0:37 {POD} /sys/fs/cgroup/memory ro,nosuid master:16 - cgroup cgroup rw,memory\n"
        f"43 39 0:38 {POD} /sys/fs/cgroup/cpuset ro,nosuid - cgroup cgroup rw,cpuset\n"
    ),
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/memory.stat": f"cache 0\nhierarchical_memory_limit {8192 * 2**20}\ntotal_rss 5\n",
    "sys/fs/cgroup/cpuset/cpuset.cpus": "0-15\n",
    "sys/fs/cgroup/cpuset/cpuset.effective_cpus": "0-11\n",
}


def machine(
    root: Path, *trees: dict[str, str], affinity: Collection[int] = range(16), environ: dict[str, str] | None = None
) -> Machine:
    for name, text in ((name, text) for tree in trees for name, text in tree.items()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return detect(root=root, environ=environ or {}, affinity=affinity, host="wn07")


def test_a_bare_machine_has_what_the_kernel_has(tmp_path: Path) -> None:
    found = machine(tmp_path, BARE)
    assert (str(found.cores), str(found.memory_mb)) == ("16 (affinity mask)", "64000 (MemTotal)")
    assert found.disk_bytes is None
    assert found.cpus[:2] == (Cpu(0, node=0, core=0), Cpu(1, node=0, core=1))
    assert found.cpus[12] == Cpu(12, node=1, core=4)


def test_limits_of_the_groups_above_count(tmp_path: Path) -> None:
    found = machine(tmp_path, BARE, V2)
    job = "/sys/fs/cgroup/system.slice/slurmstepd.scope/job_4711"
    assert [str(figure) for figure in found.core_figures] == [
        f"6 (cpu.max of {job})",
        f"8 (cpuset.cpus.effective of {job}/step_0/user/task_0)",
        "16 (affinity mask)",
    ]
    assert [str(figure) for figure in found.memory_figures] == [
        f"12000 (memory.high of {job}/step_0/user)",
        f"16000 (memory.max of {job})",
        "64000 (MemTotal)",
    ]
    assert [cpu.number for cpu in found.cpus] == [0, 1, 2, 3, 8, 9, 10, 11]


def test_in_a_container_the_mount_point_is_our_own_group(tmp_path: Path) -> None:
    found = machine(tmp_path, BARE, V1)
    assert [str(figure) for figure in found.core_figures] == [
        "2 (cpu.cfs_quota_us of /sys/fs/cgroup/cpu,cpuacct)",
        "12 (cpuset.effective_cpus of /sys/fs/cgroup/cpuset)",
        "16 (affinity mask)",
    ]
    assert str(found.memory_mb) == "8192 (hierarchical_memory_limit of /sys/fs/cgroup/memory)"


@pytest.mark.parametrize("own", ["/", "/../../elsewhere", "/not/below/the/mount"])
def test_a_group_outside_of_what_is_mounted_is_read_at_the_mount_point(own: str, tmp_path: Path) -> None:
    mount = "35 24 0:30 /kubepods/pod1 /sys/fs/cgroup rw - cgroup2 cgroup rw\n"
    tree = {"proc/self/cgroup": f"0::{own}\n", "proc/self/mountinfo": mount, "sys/fs/cgroup/cpu.max": "300000 100000"}
    assert str(machine(tmp_path, BARE, tree).cores) == "3 (cpu.max of /sys/fs/cgroup)"


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 1), ("20000 100000", 1), ("max 100000", 16)])
def test_a_quota_is_so_many_whole_cores_and_at_least_one(quota: str, cores: int, tmp_path: Path) -> None:
    tree = V2 | {"sys/fs/cgroup/system.slice/slurmstepd.scope/job_4711/cpu.max": quota}
    tree = {name: text for name, text in tree.items() if "cpuset" not in name}
    assert machine(tmp_path, BARE, tree).cores.value == cores


def test_no_quota_of_the_first_version_is_minus_one(tmp_path: Path) -> None:
    found = machine(tmp_path, BARE, V1 | {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n"})
    assert found.cores.value == 12


def test_a_batch_system_may_give_less_than_the_kernel_enforces(tmp_path: Path) -> None:
    (tmp_path / "ad").write_text("Cpus = 4\nMemory = 10000\nDisk = 1024\n")
    environ = {"_CONDOR_MACHINE_AD": "/ad"}
    found = machine(tmp_path, BARE, environ=environ)
    assert str(found.cores) == "4 (Cpus of HTCondor's machine ad)"
    assert str(found.memory_mb) == "10000 (Memory of HTCondor's machine ad)"
    here = detect(tmp_path, root=tmp_path, environ=environ, affinity=range(16))
    assert str(here.disk_bytes) == "1048576 (Disk of HTCondor's machine ad)"
    assert here.disk_figures[1].source == f"free on the disk of {tmp_path}"


@pytest.mark.parametrize(
    ("affinity", "environ", "asked", "assigned"),
    [
        (range(16), {}, None, 0),
        (range(16), {}, 16, 16),
        (range(8), {}, None, 8),
        (range(8), {}, 4, 0),
        (range(16), {"SLURM_JOB_ID": "1", "SLURM_CPUS_ON_NODE": "16"}, None, 16),
        (range(16), {"SLURM_JOB_ID": "1", "SLURM_CPUS_ON_NODE": "4"}, None, 0),
        (range(4), {"SLURM_JOB_ID": "1", "SLURM_CPUS_ON_NODE": "4"}, None, 4),
    ],
)
async def test_processors_are_assigned_by_number_only_where_they_are_ours(
    affinity: range, environ: dict[str, str], asked: int | None, assigned: int, tmp_path: Path
) -> None:
    """Sixteen pilots of four cores on one node would otherwise all take the first four."""
    found = await to_thread.run_sync(lambda: machine(tmp_path, BARE, affinity=affinity, environ=environ))
    ledger = found.ledger(cores=asked)
    everything = JobDescription(executable="/bin/true", whole_node=True)
    async with ledger.lease(everything) as slot:
        assert len(slot.cpus) == assigned
        assert (slot.cores, slot.memory_mb) == (ledger.cores, 64000)


def test_what_the_caller_says_has_the_last_word(tmp_path: Path) -> None:
    ledger = machine(tmp_path, BARE).ledger(cores=20, memory_mb=5, disk_bytes=7, extras={"licences": 1}, patience=0)
    assert (ledger.cores, ledger.memory_mb, ledger.disk_bytes) == (20, 5, 7)


async def test_gpus_come_with_their_variable(tmp_path: Path) -> None:
    found = await to_thread.run_sync(lambda: machine(tmp_path, BARE, environ={"CUDA_VISIBLE_DEVICES": "0,1"}))
    async with found.ledger().lease(JobDescription(executable="/bin/true", number_of_gpus=1)) as slot:
        assert (slot.gpus, slot.gpu_variables) == (("0",), ("CUDA_VISIBLE_DEVICES",))


NONSENSE = ["", "\0\1", "-", "-1", "9-", "a-b", "max", "1 2 3", "0::", ":::", " - ", "1e9", "0", "²", "\ud7ff" * 3]


@pytest.mark.parametrize("nonsense", NONSENSE, ids=repr)
def test_files_that_make_no_sense_say_nothing(nonsense: str, tmp_path: Path) -> None:
    own = {name: text for name, text in (V1 | V2).items() if name.startswith("proc/self")}
    found = machine(tmp_path, dict.fromkeys(BARE | V2 | V1, nonsense), own)
    assert 1 <= found.cores.value <= 16
    assert len(found.cpus) >= 1
    assert found.memory_figures == ()
    assert machine(tmp_path, dict.fromkeys(own, nonsense)).cores.value >= 1


def test_this_machine_is_found_out() -> None:
    found = detect(Path.cwd())
    assert 1 <= found.cores.value <= len(os.sched_getaffinity(0))
    assert {cpu.number for cpu in found.cpus} <= os.sched_getaffinity(0)
    assert found.memory_mb is not None
    assert found.memory_mb.value <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20
    assert found.disk_bytes is not None
    assert found.disk_bytes.value > 0


def test_the_kernel_is_asked_for_the_processors_we_may_run_on() -> None:
    one = max(os.sched_getaffinity(0))
    script = (
        f"import os; os.sched_setaffinity(0, {{{one}}}); from loadmaster.machine import detect\n"
        "found = detect(); print(found.cores.value, [cpu.number for cpu in found.cpus])"
    )
    done: Any = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == f"1 [{one}]\n"

"""What batch systems say: their variables as they document them, and nothing outside of their jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadmaster.allocation import Figure, Tree, allocation

SLURM = {"SLURM_JOB_ID": "4711", "SLURM_CPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "2", "SLURM_JOB_CPUS_PER_NODE": "8"}
LSF = {"LSB_JOBID": "5"}


def said(environ: dict[str, str], root: Path, host: str = "wn07.example.org") -> tuple[list[str], list[str]]:
    found = allocation(environ, Tree(root), host)
    return [str(figure) for figure in found.cores], [str(figure) for figure in found.memory_mb]


@pytest.mark.parametrize(
    ("environ", "cores", "memory"),
    [
        ({}, [], []),
        (SLURM, ["8 (SLURM_CPUS_ON_NODE)"], []),
        (
            {**SLURM, "SLURM_STEP_ID": "0", "SLURM_MEM_PER_NODE": "16000"},
            ["8 (SLURM_CPUS_ON_NODE)", "2 (SLURM_CPUS_PER_TASK)"],
            ["16000 (SLURM_MEM_PER_NODE)"],
        ),
        (
            {**SLURM, "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "2(x3)", "SLURM_MEM_PER_NODE": "16000"},
            ["4 (SLURM_CPUS_ON_NODE, one of 2 tasks)", "2 (SLURM_CPUS_PER_TASK)"],
            ["8000 (SLURM_MEM_PER_NODE, one of 2 tasks)"],
        ),
        (
            {**SLURM, "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "16", "SLURM_MEM_PER_CPU": "100"},
            ["1 (SLURM_CPUS_ON_NODE, one of 16 tasks)", "2 (SLURM_CPUS_PER_TASK)"],
            ["100 (SLURM_MEM_PER_CPU, for each of SLURM_CPUS_ON_NODE, one of 16 tasks)"],
        ),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2"}, ["8 (SLURM_CPUS_ON_NODE)"], []),
        ({**SLURM, "SLURM_STEP_ID": "4294967291"}, ["8 (SLURM_CPUS_ON_NODE)"], []),
        (
            {**SLURM, "SLURM_MEM_PER_CPU": "2000", "SLURM_MEM_PER_NODE": "0"},
            ["8 (SLURM_CPUS_ON_NODE)"],
            ["16000 (SLURM_MEM_PER_CPU, for each of SLURM_CPUS_ON_NODE)"],
        ),
        ({"SLURM_CPUS_ON_NODE": "8", "NCPUS": "3", "NSLOTS": "5", "LSB_DJOB_NUMPROC": "7"}, [], []),
        ({"PBS_JOBID": "1.head", "NCPUS": "6"}, ["6 (NCPUS)"], []),
        ({"PBS_JOBID": "1.head", "PBS_NUM_PPN": "12"}, ["12 (PBS_NUM_PPN)"], []),
        ({**LSF, "LSB_DJOB_NUMPROC": "4"}, ["4 (LSB_DJOB_NUMPROC)"], []),
        (
            {**LSF, "LSB_DJOB_NUMPROC": "20", "LSB_MCPU_HOSTS": "wn06 8 wn07 12"},
            ["12 (LSB_MCPU_HOSTS for wn07)"],
            [],
        ),
        ({"SGE_TASK_ID": "undefined", "NSLOTS": "5"}, ["5 (NSLOTS)"], []),
        ({"SGE_TASK_ID": "1", "NSLOTS": "24", "NHOSTS": "2", "PE_HOSTFILE": "/spool/pe"}, ["16 (PE_HOSTFILE for wn07)"], []),
        ({"SLURM_JOB_ID": "1", "SLURM_CPUS_ON_NODE": "many", "SLURM_MEM_PER_NODE": "-1"}, [], []),
        ({"SLURM_JOB_ID": "1", "SLURM_CPUS_ON_NODE": "9" * 5000}, [], []),
        ({"SGE_TASK_ID": "1", "NHOSTS": "2", "PE_HOSTFILE": "/nowhere\0"}, [], []),
    ],
)  # fmt: skip
def test_each_system_is_taken_at_its_word(
    environ: dict[str, str], cores: list[str], memory: list[str], tmp_path: Path
) -> None:
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool/pe").write_text(
        "wn06.example.org 8 all.q@wn06 UNDEFINED\nwn07 16 all.q@wn07 UNDEFINED\n\nwn08\n"
    )
    assert said(environ, tmp_path) == (cores, memory)


def test_htcondors_ad_has_cores_memory_and_disk(tmp_path: Path) -> None:
    (tmp_path / "machine.ad").write_text(
        'Name = "slot1_3@wn07.example.org"\nCpus = 8\nMemory = 24000\nDisk = 1048576\nTotalCpus = 64.0\nGPUs = 0\n'
        "Requirements = (Cpus = 9)\n"
    )
    found = allocation({"_CONDOR_MACHINE_AD": "/machine.ad"}, Tree(tmp_path), "wn07")
    assert found.cores == (Figure(8, "Cpus of HTCondor's machine ad"),)
    assert found.memory_mb == (Figure(24000, "Memory of HTCondor's machine ad"),)
    assert found.disk_bytes == (Figure(2**30, "Disk of HTCondor's machine ad"),)
    assert allocation({"_CONDOR_MACHINE_AD": "/gone"}, Tree(tmp_path), "wn07").cores == ()

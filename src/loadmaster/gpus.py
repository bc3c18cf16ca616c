"""The GPUs of a machine that are ours: as a batch system names them, or else as the kernel's drivers do."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from loadmaster.allocation import Tree
from loadmaster.topology import Gpu

NVIDIA_VARIABLE: Final = "CUDA_VISIBLE_DEVICES"
AMD_VARIABLES: Final = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")

_NAME = re.compile(r"[0-9]{1,4}|(GPU|MIG)-[A-Za-z0-9/-]{1,100}")
_UUID = re.compile(r"GPU-[0-9a-f-]{16,}")


@dataclass(frozen=True, slots=True)
class Gpus:
    """Which there are, who says so, and the variables that tell a payload which are its own.

    `variables` without `gpus`: the batch system gave us none of those the node has.
    """

    gpus: tuple[Gpu, ...] = ()
    variables: tuple[str, ...] = ()
    source: str = "none found"


@dataclass(frozen=True, slots=True)
class _Device:
    """A device a driver knows; `index` is its number among those the driver's library would count."""

    index: int
    uuid: str
    node: int | None

    @property
    def gpu(self) -> Gpu:
        return Gpu(self.uuid or str(self.index), self.node)


def find_gpus(tree: Tree, environ: Mapping[str, str]) -> Gpus:
    """The GPUs we may use. A variable of the batch system has the last word, also when it names none. Blocks."""
    nvidia, amd = _nvidia(tree), _amd(tree)
    order = (*AMD_VARIABLES, NVIDIA_VARIABLE) if amd and not nvidia else (NVIDIA_VARIABLE, *AMD_VARIABLES)
    for variable in order:
        if variable in environ:
            known = nvidia if variable == NVIDIA_VARIABLE else amd
            return Gpus(_named(environ[variable], known), (variable,), variable)
    if nvidia:
        return Gpus(tuple(device.gpu for device in nvidia), (NVIDIA_VARIABLE,), "NVIDIA's driver")
    if amd:
        return Gpus(tuple(device.gpu for device in amd), AMD_VARIABLES[:1], "AMD's driver")
    return Gpus()


def _named(value: str, known: list[_Device]) -> tuple[Gpu, ...]:
    """The devices of a variable, up to the first that is none, as CUDA reads it: `-1` and `NoDevFiles` are none at all."""
    names: list[str] = []
    for word in value.split(","):
        if not _NAME.fullmatch(word.strip()) or word.strip() in names:
            break
        names.append(word.strip())
    # An index may count all devices, or only those a control group lets us see: certain only when they are the same.
    nodes = {str(device.index): device.node for device in known} if len(names) == len(known) else {}
    nodes |= {device.uuid: device.node for device in known}
    return tuple(Gpu(name, nodes.get(name)) for name in names)


def _nvidia(tree: Tree) -> list[_Device]:
    """In the order of their places. The driver lists all of the node's; ours are those whose device we may open."""
    found: list[_Device] = []
    for index, place in enumerate(tree.names("/proc/driver/nvidia/gpus")):
        text = tree.text(f"/proc/driver/nvidia/gpus/{place}/information") or ""
        facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}
        minor = facts.get("Device Minor", str(index))
        if _may_open(tree, f"/dev/nvidia{minor}") and facts.get("GPU Excluded", "No") == "No":
            uuid = facts.get("GPU UUID", "")  # question marks until somebody has used the device
            found.append(_Device(len(found), uuid if _UUID.fullmatch(uuid) else "", _node(tree, place)))
    return found


def _amd(tree: Tree) -> list[_Device]:
    """The nodes of the driver's topology that compute; those that were not given to us cannot be read."""
    found: list[_Device] = []
    nodes = (name for name in tree.names("/sys/class/kfd/kfd/topology/nodes") if name.isdecimal())
    for name in sorted(nodes, key=int):
        text = tree.text(f"/sys/class/kfd/kfd/topology/nodes/{name}/properties") or ""
        facts = {words[0]: int(words[1]) for words in map(str.split, text.splitlines()) if _is_pair(words)}
        if facts.get("simd_count") and _may_open(tree, f"/dev/dri/renderD{facts.get('drm_render_minor', 0)}"):
            unique, place = facts.get("unique_id", 0), facts.get("location_id", 0)
            address = f"{facts.get('domain', 0):04x}:{place >> 8 & 0xFF:02x}:{place >> 3 & 0x1F:02x}.{place & 7}"
            found.append(_Device(len(found), f"GPU-{unique:016x}" if unique else "", _node(tree, address)))
    return found


def _is_pair(words: list[str]) -> bool:
    return len(words) == 2 and words[1].isdecimal()


def _may_open(tree: Tree, device: str) -> bool:
    return os.access(tree.path(device), os.R_OK | os.W_OK)


def _node(tree: Tree, place: str) -> int | None:
    """The NUMA node of a PCI device; the kernel writes -1 where there is none."""
    text = tree.text(f"/sys/bus/pci/devices/{place.lower()}/numa_node") or ""
    return int(text) if text.isdecimal() else None

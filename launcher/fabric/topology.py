"""How far two devices of a node are from each other, in the words of NCCL and nvidia-smi.

PIX: one PCIe switch between them at most; PXB: several switches, no host bridge; PHB: one host bridge; NODE: two host
bridges of one NUMA node; SYS: two NUMA nodes. The distance is read off the PCI tree: where the paths of both devices part.
(NCCL itself says PHB for all that stays within one NUMA node; NODE is nvidia-smi's finer word.)

Where the tree is not known (a VM that hides it, a flat sysfs) the NUMA nodes still bound the distance: same node is NODE at
worst, different nodes are SYS. Such an answer says that it is a bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from launcher.fabric.facts import NodeFacts, PciDevice


class Near(IntEnum):
    """A distance; smaller is nearer."""

    X = 0
    PIX = 1
    PXB = 2
    PHB = 3
    NODE = 4
    SYS = 5


@dataclass(frozen=True)
class Distance:
    near: Near | None
    """None: nothing is known about the two places."""
    is_bound: bool = False
    """True: the devices may be nearer than this, the PCI tree could not be read."""

    def __str__(self) -> str:
        if self.near is None:
            return "?"
        return f"{self.near.name}{'?' if self.is_bound else ''}"


UNKNOWN = Distance(None)


def distance(first: PciDevice | None, second: PciDevice | None, *, num_numa_nodes: int | None = None) -> Distance:
    """How far two PCI functions are apart.

    `num_numa_nodes` helps where the kernel gives a device no NUMA node: on a machine with one node, it is that one.
    """
    if first is None or second is None:
        return UNKNOWN
    if first.address == second.address:
        return Distance(Near.X)
    if _slot(first.address) == _slot(second.address):
        # Two functions of one card: nothing but the card's own bridge between them.
        return Distance(Near.PIX)
    if _tree_known(first) and _tree_known(second):
        below = _shared_below(first, second)
        if below is not None:
            return Distance(below)
    return _numa_distance(first, second, num_numa_nodes)


def _tree_known(device: PciDevice) -> bool:
    return device.root is not None and device.path is not None


def _shared_below(first: PciDevice, second: PciDevice) -> Near | None:
    """PIX, PXB or PHB when both hang below one host bridge; None when they do not.

    Where two paths part below a shared bridge, that bridge is the upstream port of a switch: a root port leads to one
    link only. Each path then continues through one downstream port if the device sits on this switch, through more
    bridges if there are further switches. Nothing shared below the host bridge: traffic passes through it.
    """
    assert first.path is not None
    assert second.path is not None
    if first.root != second.root:
        return None
    shared = 0
    for one, other in zip(first.path, second.path, strict=False):
        if one != other:
            break
        shared += 1
    if shared == 0:
        # A host bridge belongs to one memory node: if the nodes differ, the tree is a poor copy with all on one bus.
        is_contradicted = first.numa is not None and second.numa is not None and first.numa != second.numa
        return None if is_contradicted else Near.PHB
    return Near.PIX if len(first.path) - shared <= 1 and len(second.path) - shared <= 1 else Near.PXB


def _numa_distance(first: PciDevice, second: PciDevice, num_numa_nodes: int | None) -> Distance:
    # Different roots are two host bridges for certain; without the tree the two may still share a switch.
    certain = first.root is not None and second.root is not None and _tree_known(first) and _tree_known(second)
    if first.numa is not None and second.numa is not None:
        if first.numa != second.numa:
            return Distance(Near.SYS)
        return Distance(Near.NODE, is_bound=not certain)
    if num_numa_nodes == 1:
        return Distance(Near.NODE, is_bound=not certain)
    return UNKNOWN


def _slot(address: str) -> str:
    return address.rsplit(".", 1)[0]


@dataclass(frozen=True)
class Affinity:
    """The affinity matrix of a node: every GPU against every GPU and HCA, and HCAs among themselves."""

    gpu_hca: tuple[tuple[Distance, ...], ...]
    gpu_gpu: tuple[tuple[Distance, ...], ...]
    hca_hca: tuple[tuple[Distance, ...], ...]


def affinity(facts: NodeFacts) -> Affinity:
    """Rows and columns in the order of `facts.gpus` and `facts.hcas`."""
    gpus, hcas = _places(facts)
    return Affinity(gpu_hca(facts), _rows(facts, gpus, gpus), _rows(facts, hcas, hcas))


def gpu_hca(facts: NodeFacts) -> tuple[tuple[Distance, ...], ...]:
    """The GPU rows and HCA columns of the matrix alone: with a thousand virtual functions the rest is a million cells."""
    gpus, hcas = _places(facts)
    return _rows(facts, gpus, hcas)


def _places(facts: NodeFacts) -> tuple[list[PciDevice | None], list[PciDevice | None]]:
    return [facts.pci_of(gpu.pci) for gpu in facts.gpus], [facts.pci_of(hca.pci) for hca in facts.hcas]


def _rows(
    facts: NodeFacts, left: Sequence[PciDevice | None], right: Sequence[PciDevice | None]
) -> tuple[tuple[Distance, ...], ...]:
    num_numa_nodes = len(facts.cpus.numa) or None
    return tuple(tuple(distance(one, other, num_numa_nodes=num_numa_nodes) for other in right) for one in left)


def closest_hcas(facts: NodeFacts, names: Sequence[str]) -> dict[int, tuple[str, ...]]:
    """For each GPU index, all of the HCAs `names` at the smallest known distance; () where no distance is known."""
    matrix = gpu_hca(facts)
    wanted = set(names)
    found: dict[int, tuple[str, ...]] = {}
    for gpu, row in zip(facts.gpus, matrix, strict=True):
        known = [
            (cell.near, hca.name)
            for hca, cell in zip(facts.hcas, row, strict=True)
            if hca.name in wanted and cell.near is not None
        ]
        nearest = min((near for near, _ in known), default=None)
        found[gpu.index] = tuple(name for near, name in known if near == nearest)
    return found


def numa_of_gpu(facts: NodeFacts, gpu_index: int) -> int | None:
    """The memory node next to a GPU; None if the machine does not say."""
    gpu = next((gpu for gpu in facts.gpus if gpu.index == gpu_index), None)
    device = facts.pci_of(gpu.pci) if gpu is not None else None
    if device is not None and device.numa is not None:
        return device.numa
    return facts.cpus.numa[0].id if len(facts.cpus.numa) == 1 else None


def nearest_cpus(facts: NodeFacts, gpu_index: int) -> tuple[int, ...] | None:
    """The CPUs of the GPU's memory node that this process may use; None if unknown or if none of them is allowed."""
    node = numa_of_gpu(facts, gpu_index)
    cpus = next((numa.cpus for numa in facts.cpus.numa if numa.id == node), None)
    if node is None or cpus is None:
        return None
    allowed = None if facts.cpus.allowed is None else set(facts.cpus.allowed)
    usable = cpus if allowed is None else tuple(cpu for cpu in cpus if cpu in allowed)
    return usable or None

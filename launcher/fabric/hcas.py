"""Which RDMA ports shall carry the training traffic, and why each other one shall not.

NCCL takes every active port; storage, management and front-end cards look no different to it. Nothing on a card says what
it is for, so the choice weighs what can be seen: is it up, does it speak InfiniBand or RoCE, does it sit below a PCIe switch
with a GPU (vendors put compute NICs there and the others not), how fast is it, is it a virtual function of a card that is
here as well. No name, vendor id or machine type takes part.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from launcher.fabric.facts import Hca, HcaPort, NodeFacts
from launcher.fabric.nccl import usable_ports
from launcher.fabric.topology import Distance, Near, gpu_hca

Transport = Literal["infiniband", "roce", "efa", "socket"]

EFA_VENDOR = "0x1d0f"


@dataclass(frozen=True)
class PortName:
    hca: str
    port: int

    def value(self, facts: NodeFacts) -> str:
        """As NCCL_IB_HCA wants it: the port is named only where the device has several."""
        hca = next(hca for hca in facts.hcas if hca.name == self.hca)
        return self.hca if len(hca.ports) <= 1 else f"{self.hca}:{self.port}"


@dataclass(frozen=True)
class HcaChoice:
    """The ports to use on one node, and the reason for each that is left out."""

    transport: Transport
    ports: tuple[PortName, ...]
    excluded: dict[str, str]
    """HCA (or hca:port) → why not."""
    reason: str
    doubt: str | None = None
    """Set when locality and speed point to different cards: a person should look."""

    @property
    def hcas(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(port.hca for port in self.ports))


def is_efa(facts: NodeFacts, hca: Hca) -> bool:
    """Whether a device is an AWS EFA: by its driver, or by the vendor and the link layer that is neither IB nor Ethernet."""
    device = facts.pci_of(hca.pci)
    if "efa" in (hca.driver, device.driver if device else None):
        return True
    return device is not None and device.vendor == EFA_VENDOR


@dataclass(frozen=True)
class _Candidate:
    hca: Hca
    port: HcaPort
    nearest: Near | None
    """Smallest distance to any GPU."""
    local_gpus: frozenset[int]
    """GPUs below the same PCIe switch or switches."""
    is_far: bool
    """Known to be across the socket link from every GPU."""

    @property
    def label(self) -> str:
        return self.hca.name if len(self.hca.ports) <= 1 else f"{self.hca.name}:{self.port.port}"

    @property
    def rate(self) -> float | None:
        return self.port.rate_gbps


def choose(facts: NodeFacts) -> HcaChoice:
    """The choice for one node. Never empty when NCCL itself could use a port."""
    efa = tuple(hca for hca in facts.hcas if is_efa(facts, hca))
    excluded: dict[str, str] = {}
    candidates = _candidates(facts, excluded)
    if efa:
        return _choose_efa(facts, efa, candidates, excluded)
    if not candidates:
        reason = "no RDMA device here" if not facts.hcas else "no RDMA port here can be used"
        return HcaChoice("socket", (), excluded, reason)
    candidates = _without_far(_without_virtual(candidates, excluded, facts), excluded)
    candidates, how, doubt = _by_place_and_rate(facts, candidates, excluded)
    candidates = _one_link_layer(candidates, excluded)
    transport: Transport = "infiniband" if candidates[0].port.link_layer == "InfiniBand" else "roce"
    ports = tuple(PortName(item.hca.name, item.port.port) for item in candidates)
    return HcaChoice(transport, ports, excluded, how, doubt)


def _choose_efa(
    facts: NodeFacts, efa: tuple[Hca, ...], others: list[_Candidate], excluded: dict[str, str]
) -> HcaChoice:
    names = {hca.name for hca in efa}
    excluded = {name: why for name, why in excluded.items() if name.split(":")[0] not in names}
    for item in others:
        excluded[item.label] = "not an EFA device; on this machine the libfabric plugin carries the traffic"
    usable = [PortName(hca.name, port.port) for hca in efa for port in hca.ports if port.state in ("ACTIVE", None)]
    for hca in efa:
        if hca.ports and not any(port.hca == hca.name for port in usable):
            excluded[hca.name] = f"port is {hca.ports[0].state}"
    reason = f"{len(efa)} EFA devices: NCCL reaches them through libfabric (aws-ofi-nccl), not through NCCL_IB_HCA"
    return HcaChoice("efa", tuple(usable), excluded, reason)


def _candidates(facts: NodeFacts, excluded: dict[str, str]) -> list[_Candidate]:
    usable = {(name, port.port) for name, port in usable_ports(facts)}
    matrix = gpu_hca(facts)
    found: list[_Candidate] = []
    for hca_idx, hca in enumerate(facts.hcas):
        if not hca.ports:
            excluded[hca.name] = "it shows no port"
        for port in hca.ports:
            label = hca.name if len(hca.ports) <= 1 else f"{hca.name}:{port.port}"
            if (hca.name, port.port) not in usable:
                excluded[label] = _why_unusable(port)
            elif hca.has_device_node is False:
                excluded[label] = "it has no /dev/infiniband/uverbs device in this container"
            else:
                found.append(_placed(facts, hca, port, hca_idx, matrix))
    return found


def _why_unusable(port: HcaPort) -> str:
    if port.state is None:
        return "the state of its port is unknown"
    if port.state != "ACTIVE":
        return f"its port is {port.state} ({port.phys_state or 'physical state unknown'})"
    return f"its link layer is {port.link_layer or 'unknown'}, which NCCL does not use"


def _placed(
    facts: NodeFacts, hca: Hca, port: HcaPort, hca_idx: int, matrix: tuple[tuple[Distance, ...], ...]
) -> _Candidate:
    column = [row[hca_idx] for row in matrix]
    known = [cell.near for cell in column if cell.near is not None]
    local = frozenset(
        gpu.index
        for gpu, cell in zip(facts.gpus, column, strict=True)
        if cell.near is not None and cell.near <= Near.PXB
    )
    is_far = bool(column) and len(known) == len(column) and min(known) == Near.SYS
    return _Candidate(hca, port, min(known, default=None), local, is_far)


def _without_virtual(candidates: list[_Candidate], excluded: dict[str, str], facts: NodeFacts) -> list[_Candidate]:
    """Leave out virtual functions whose physical function is here: they share its port, and there can be a thousand."""
    here = {item.hca.pci for item in candidates if item.hca.pci is not None}
    kept = []
    for item in candidates:
        device = facts.pci_of(item.hca.pci)
        if device is not None and device.physfn is not None and device.physfn in here:
            excluded[item.label] = f"a virtual function of {device.physfn}, which is used itself"
        else:
            kept.append(item)
    return kept


def _without_far(candidates: list[_Candidate], excluded: dict[str, str]) -> list[_Candidate]:
    """Leave out ports that are SYS to every GPU while others are nearer (or: whose place is unknown while others' is known)."""
    if not any(item.nearest is not None and item.nearest < Near.SYS for item in candidates):
        return candidates
    kept = []
    for item in candidates:
        if item.is_far:
            excluded[item.label] = "SYS to every GPU while others are nearer: storage or front-end"
        else:
            kept.append(item)
    return kept


def _by_place_and_rate(
    facts: NodeFacts, candidates: list[_Candidate], excluded: dict[str, str]
) -> tuple[list[_Candidate], str, str | None]:
    """Ports below a GPU's PCIe switch if they serve the GPUs, else the fastest."""
    local = [item for item in candidates if item.local_gpus]
    fastest = max((item.rate for item in candidates if item.rate is not None), default=None)
    if not local:
        kept = _fastest(candidates, excluded)
        where = "no port shares a PCIe switch with a GPU" if facts.gpus else "no GPU is known here"
        return kept, f"{where}: all active ports of the fastest kind", None
    best_local = max((item.rate for item in local if item.rate is not None), default=None)
    served = frozenset().union(*(item.local_gpus for item in local if item.rate in (best_local, None)))
    is_slow = best_local is not None and fastest is not None and best_local < fastest
    if is_slow and 2 * len(served) < len(facts.gpus):
        # A management card that happens to sit beside one GPU must not win over the real fabric.
        kept = _fastest(candidates, excluded)
        doubt = (
            f"only {len(served)} of {len(facts.gpus)} GPUs share a PCIe switch with a port, and at {best_local:g} Gb/s; "
            f"the faster ports ({fastest:g} Gb/s) elsewhere were taken"
        )
        return kept, "the fastest active ports; those beside a GPU are slower and few", doubt
    for item in candidates:
        if not item.local_gpus:
            rate = "" if item.rate is None else f", {item.rate:g} Gb/s"
            place = "its place is unknown" if item.nearest is None else f"{item.nearest.name} at best"
            excluded[item.label] = f"no GPU beside it ({place}{rate}) while other ports have one: not a compute port"
    aside = None
    if is_slow:
        aside = f"ports away from the GPUs are faster ({fastest:g} Gb/s against {best_local:g}) and were left out"
    return _fastest(local, excluded), "the active ports that share a PCIe switch with a GPU", aside


def _fastest(candidates: list[_Candidate], excluded: dict[str, str]) -> list[_Candidate]:
    fastest = max((item.rate for item in candidates if item.rate is not None), default=None)
    kept = []
    for item in candidates:
        if fastest is not None and item.rate is not None and item.rate < fastest:
            excluded[item.label] = f"{item.rate:g} Gb/s, slower than the {fastest:g} Gb/s of the others"
        else:
            kept.append(item)
    return kept


def _one_link_layer(candidates: list[_Candidate], excluded: dict[str, str]) -> list[_Candidate]:
    """InfiniBand and Ethernet ports cannot be joined in one job: keep the kind with more bandwidth (InfiniBand on a tie)."""
    bandwidth: Counter[str] = Counter()
    for item in candidates:
        bandwidth[str(item.port.link_layer)] += int(item.rate or 1)
    if len(bandwidth) == 1:
        return candidates
    winner = max(bandwidth, key=lambda layer: (bandwidth[layer], layer == "InfiniBand"))
    kept = []
    for item in candidates:
        if item.port.link_layer == winner:
            kept.append(item)
        else:
            excluded[item.label] = f"{item.port.link_layer}; NCCL does not join it with the {winner} ports"
    return kept

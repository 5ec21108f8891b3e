"""Checks of the way between one node's GPUs and its NICs: PCIe, GPUDirect, what stands between them, who is near whom."""

from __future__ import annotations

from launcher.fabric.facts import NodeFacts
from launcher.fabric.findings import Finding, NodeCheck, Severity, View
from launcher.fabric.nccl import parse_version
from launcher.fabric.topology import Near, gpu_hca

DMA_BUF_KERNEL = (5, 12)
"""Kernels from here on can hand GPU memory to a NIC by DMA-BUF, with the open driver."""


def pcie(view: View) -> list[Finding]:
    """Links that run with fewer lanes than they have. Speed is not looked at: idle devices lower it."""
    facts = view.facts
    narrow = [
        f"GPU {gpu.index} x{gpu.pcie_width} of x{gpu.max_pcie_width}"
        for gpu in facts.gpus
        if gpu.pcie_width and gpu.max_pcie_width and gpu.pcie_width < gpu.max_pcie_width
    ]
    for hca in facts.hcas:
        device = facts.pci_of(hca.pci)
        if device is None or not device.link_width or not device.max_link_width or device.physfn is not None:
            continue
        if device.link_width < device.max_link_width:
            narrow.append(f"{hca.name} x{device.link_width} of x{device.max_link_width}")
    if not narrow or facts.platform.is_virtual is not False:
        # Virtual machines show whatever the hypervisor invents here.
        return []
    return [
        view.finding(
            "pcie-narrow",
            Severity.WARNING,
            ", ".join(narrow),
            "copies between host, GPU and NIC are slower than on other nodes",
            "reseat the card or riser; check the slot's wiring and the BIOS",
        )
    ]


def gpudirect(view: View) -> list[Finding]:
    """GPUDirect RDMA off: neither a peer-memory module nor what DMA-BUF needs."""
    facts = view.facts
    if not facts.gpus or view.env.hcas.transport not in ("infiniband", "roce") or not view.is_multi_node:
        return []
    platform, software = facts.platform, facts.software
    if platform.peer_memory == "nvidia_peermem" and platform.is_peer_memory_linked is False:
        return [
            view.finding(
                "peermem-unlinked",
                Severity.WARNING,
                "nvidia_peermem is loaded, but ib_core does not list it as a user",
                "it was loaded before the RDMA stack and does nothing: GPU memory goes through host memory",
                "reload it: modprobe -r nvidia_peermem && modprobe nvidia_peermem",
            )
        ]
    if platform.peer_memory != "absent":
        return []
    kernel = parse_version(software.kernel)
    if software.is_open_driver is True and (kernel is None or kernel >= DMA_BUF_KERNEL):
        return []
    if software.is_open_driver is None and (kernel is None or kernel >= DMA_BUF_KERNEL):
        return []
    why = (
        "the driver is the closed one"
        if software.is_open_driver is False
        else f"kernel {software.kernel} has no DMA-BUF for RDMA"
    )
    return [
        view.finding(
            "gpudirect-off",
            Severity.WARNING,
            f"no peer-memory module is loaded, and {why}",
            "GPUDirect RDMA stays off: every byte between nodes passes through host memory, about half the bandwidth",
            "modprobe nvidia_peermem on the host (the GPU operator does it with driver.rdma.enabled=true)",
        )
    ]


def acs_iommu(view: View) -> list[Finding]:
    facts, found = view.facts, []
    if facts.platform.is_virtual is not False or not facts.gpus:
        return []
    wanted = {gpu.pci for gpu in facts.gpus} | {hca.pci for hca in facts.hcas if hca.name in view.env.hcas.hcas}
    bridges = {bridge for address in wanted if (device := facts.pci_of(address)) for bridge in device.path or ()}
    redirecting = [device.address for device in facts.pci if device.address in bridges and device.acs_redirect]
    if redirecting:
        found.append(
            view.finding(
                "acs-on",
                Severity.WARNING,
                f"ACS sends peer traffic up to the root at {len(redirecting)} bridges ({', '.join(redirecting[:3])}, …)",
                "traffic between GPU and NIC below one switch takes the long way, or hangs",
                "switch ACS off in the BIOS, or clear it with setpci on these bridges (bare metal only)",
            )
        )
    if facts.platform.is_iommu_on and facts.platform.is_iommu_passthrough is False:
        found.append(
            view.finding(
                "iommu-on",
                Severity.WARNING,
                "the IOMMU translates (no iommu=pt on the kernel command line)",
                "peer-to-peer copies between GPUs and NICs are slowed, or fail with WC LOC_PROT_ERR",
                "boot with iommu=pt, or switch the IOMMU off in the BIOS",
            )
        )
    return found


def gpu_nic_affinity(view: View) -> list[Finding]:
    facts, choice = view.facts, view.env.hcas
    if not facts.gpus or choice.transport == "socket" or not view.is_multi_node:
        return []
    columns = [idx for idx, hca in enumerate(facts.hcas) if hca.name in choice.hcas]
    nearest: dict[int, Near | None] = {}
    for gpu, row in zip(facts.gpus, gpu_hca(facts), strict=True):
        known = [near for idx in columns if (near := row[idx].near) is not None]
        nearest[gpu.index] = min(known, default=None)
    if all(near is None for near in nearest.values()):
        if view.env.decision("NCCL_TOPO_FILE") is not None or "NCCL_TOPO_FILE" in view.user_env:
            return []
        return [
            view.finding(
                "affinity-unknown",
                Severity.WARNING,
                "neither the PCI tree nor NUMA nodes tell where GPUs and NICs sit" + _virtual(facts),
                "NCCL cannot pair each GPU with its own NIC; traffic may cross the sockets",
                "give NCCL the provider's topology file (NCCL_TOPO_FILE)",
            )
        ]
    far = [index for index, near in nearest.items() if near == Near.SYS]
    if not far or len(far) == len(nearest):
        return []
    return [
        view.finding(
            "affinity-far",
            Severity.WARNING,
            f"GPU {', '.join(map(str, far))}: the nearest usable port is on the other socket (SYS)",
            "their traffic crosses the link between the sockets and shares the other GPUs' ports",
            "check whether this node lost a NIC, or the pod was given devices of different sockets",
        )
    ]


def _virtual(facts: NodeFacts) -> str:
    return " (a virtual machine that hides them)" if facts.platform.is_virtual else ""


CHECKS: tuple[NodeCheck, ...] = (pcie, gpudirect, acs_iommu, gpu_nic_affinity)

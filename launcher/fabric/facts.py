"""What was seen on one node, as plain data.

Why: everything that the fabric room decides is a function of these values, so they can be recorded, shipped between nodes,
kept in the run directory and replayed in a test. What could not be read is None (unknown), never False or 0: a rule may
act on what is known only. Unbounded limits are the word "unlimited". How values are read (probe.py) and turned into JSON
(codec.py) is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

Unlimited = Literal["unlimited"]

ERROR_COUNTERS = (
    "link_downed",
    "symbol_error",
    "link_error_recovery",
    "port_rcv_errors",
    "local_link_integrity_errors",
    "local_ack_timeout_err",
    "packet_seq_err",
    "rnr_nak_retry_err",
    "out_of_sequence",
    "roce_adp_retrans",
)
"""Counters of a port whose growth means that a link loses or repeats packets."""


class FabricError(Exception):
    """Base of what the fabric room raises.

    FabricError
    └── FactsError    recorded facts cannot be used (the file's fault; retrying does not help)
    """


class FactsError(FabricError):
    """Facts that were read back are not facts of this version: says which file or field, and what to do."""


@dataclass(frozen=True)
class PciDevice:
    """One PCI function that matters here: a GPU, a NIC, an NVSwitch, or a bridge above one of them."""

    address: str
    """domain:bus:device.function in lower case, four digits of domain: "0000:0f:00.0"."""
    vendor: str | None = None
    device: str | None = None
    class_code: str | None = None
    """As sysfs shows it, "0x030200"."""
    driver: str | None = None
    numa: int | None = None
    """NUMA node; the kernel's -1 is unknown."""
    root: str | None = None
    """The host bridge above it, "pci0000:00"; None if its place in the tree could not be read."""
    path: tuple[str, ...] | None = None
    """Bridges between the host bridge and the device, from the root down: root port, then an upstream and a downstream
    port for each switch. None if unknown; () if the device sits on the root bus."""
    physfn: str | None = None
    """For an SR-IOV virtual function, the physical function's address, or "unknown" when only the link is seen."""
    num_vfs: int | None = None
    """For a physical function: virtual functions that are switched on."""
    link_gts: float | None = None
    """PCIe speed now, GT/s per lane; the device may lower it when idle."""
    max_link_gts: float | None = None
    link_width: int | None = None
    max_link_width: int | None = None
    acs_redirect: bool | None = None
    """Whether Access Control Services send peer-to-peer traffic up to the root (reading it takes root)."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, as NVML numbers them (or in bus order, when NVML was not at hand)."""

    index: int
    pci: str | None = None
    uuid: str | None = None
    name: str | None = None
    memory_bytes: int | None = None
    is_mig: bool | None = None
    num_nvlinks: int | None = None
    """NVLinks that the GPU has."""
    num_nvlinks_active: int | None = None
    fabric_state: str | None = None
    """State of the NVSwitch fabric for this GPU: not-supported, not-started, in-progress, completed."""
    cluster_uuid: str | None = None
    """Names the NVLink domain that the GPU belongs to; equal on several nodes for multi-node NVLink."""
    clique_id: int | None = None
    num_ecc_uncorrected: int | None = None
    is_remap_pending: bool | None = None
    is_remap_failed: bool | None = None
    recovery_action: str | None = None
    """What NVML says must be done before the GPU is healthy again: none, gpu-reset, node-reboot, … (driver ≥ 570)."""
    throttle_reasons: tuple[str, ...] | None = None
    pcie_gen: int | None = None
    max_pcie_gen: int | None = None
    pcie_width: int | None = None
    max_pcie_width: int | None = None


@dataclass(frozen=True)
class Xid:
    """One event that the NVIDIA driver wrote into the kernel's log."""

    code: int
    """NVIDIA's number of the kind of error."""
    pci: str | None = None
    text: str = ""


@dataclass(frozen=True)
class Gid:
    """One slot of a port's GID table that could be read and is not zero."""

    index: int
    gid: str
    """An IPv6 address in its canonical short form ("fe80::1", "::ffff:10.0.0.1")."""
    type: str | None = None
    """"IB/RoCE v1", "RoCE v2", …; None when the slot's type cannot be read (containers: EINVAL)."""
    netdev: str | None = None


@dataclass(frozen=True)
class HcaPort:
    port: int
    state: str | None = None
    """ACTIVE, DOWN, INIT, ARMED, …"""
    phys_state: str | None = None
    rate_gbps: float | None = None
    link_layer: str | None = None
    """InfiniBand, Ethernet, or what else the kernel prints (EFA: Unknown, Unspecified)."""
    lid: int | None = None
    sm_lid: int | None = None
    gids: tuple[Gid, ...] = ()
    unreadable_gids: tuple[int, ...] = ()
    """Slots whose content is not a GID at all."""
    counters: Mapping[str, int] = field(default_factory=dict)
    """Error counters since boot (link_downed, symbol_error, out_of_sequence, …); those that exist."""


@dataclass(frozen=True)
class Hca:
    """One RDMA device, by its name in /sys/class/infiniband."""

    name: str
    pci: str | None = None
    driver: str | None = None
    node_guid: str | None = None
    fw_version: str | None = None
    board_id: str | None = None
    netdevs: tuple[str, ...] = ()
    has_device_node: bool | None = None
    """Whether /dev/infiniband/uverbsN exists for it: without, no process here can use it."""
    ports: tuple[HcaPort, ...] = ()


@dataclass(frozen=True)
class Netdev:
    """One network interface of this network namespace, in kernel order."""

    name: str
    operstate: str | None = None
    has_carrier: bool | None = None
    speed_mbps: int | None = None
    mtu: int | None = None
    addresses: tuple[str, ...] = ()
    """With prefix length: "10.0.0.7/24"."""
    pci: str | None = None
    is_virtual: bool | None = None
    """No device stands behind it (bridges, veth, bonds, tunnels)."""
    bond_members: tuple[str, ...] = ()


@dataclass(frozen=True)
class NumaNode:
    id: int
    cpus: tuple[int, ...] | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Cpus:
    num_cpus: int | None = None
    allowed: tuple[int, ...] | None = None
    """CPUs that this process may run on."""
    smt_siblings: tuple[tuple[int, ...], ...] | None = None
    """CPUs that share a core, one group per core."""
    numa: tuple[NumaNode, ...] = ()
    model: str | None = None
    cgroup_cpus: float | Unlimited | None = None
    """CPU time that the cgroup allows, in CPUs."""


@dataclass(frozen=True)
class Memory:
    total_bytes: int | None = None
    cgroup_bytes: int | Unlimited | None = None
    num_oom_kills: int | None = None
    """Processes that the kernel's memory killer ended in this cgroup."""
    dev_shm_bytes: int | None = None
    dev_shm_free_bytes: int | None = None
    memlock_bytes: int | Unlimited | None = None
    huge_pages_free: int | None = None


@dataclass(frozen=True)
class Software:
    kernel: str | None = None
    driver: str | None = None
    is_open_driver: bool | None = None
    cuda: str | None = None
    """CUDA version that the driver supports."""
    nccl: str | None = None
    torch: str | None = None
    ofi_nccl: str | None = None
    python: str | None = None


@dataclass(frozen=True)
class Platform:
    """What this machine, VM or container is."""

    vendor: str | None = None
    product: str | None = None
    asset_tag: str | None = None
    is_virtual: bool | None = None
    is_container: bool | None = None
    capabilities: tuple[str, ...] | None = None
    """Effective Linux capabilities of those that matter here (ipc_lock, sys_admin, net_raw, sys_nice)."""
    peer_memory: str | Literal["absent"] | None = None
    """The kernel module that lets NICs reach GPU memory: nvidia_peermem, nv_mem, nv_mem_nc, or absent."""
    is_peer_memory_linked: bool | None = None
    """Whether ib_core knows nvidia_peermem; False when the module was loaded before the RDMA stack."""
    is_iommu_on: bool | None = None
    is_iommu_passthrough: bool | None = None
    port_range: tuple[int, int] | None = None
    """net.ipv4.ip_local_port_range, both ends included."""
    boot_id: str | None = None
    """Names this boot of this kernel: equal for two nodes only if they are one machine."""
    markers: tuple[str, ...] = ()
    """Well-known files and folders of vendors' network plugins that exist here."""


@dataclass(frozen=True)
class Kubernetes:
    """What the caller knows of the pod and its node; nothing of it is read from the machine."""

    labels: Mapping[str, str] = field(default_factory=dict)
    allocatable: Mapping[str, str] = field(default_factory=dict)
    """Resources that the node offers, by name."""
    requested: Mapping[str, str] = field(default_factory=dict)
    """Resources that the pod asked for."""
    is_host_network: bool | None = None


@dataclass(frozen=True)
class NodeFacts:
    """All that is known of one node, at one moment."""

    hostname: str
    node_ip: str | None = None
    """The address by which the gang reaches this node (under Ray: the node's Ray address)."""
    default_netdev: str | None = None
    """The interface of the default route."""
    unix_time: float | None = None
    gpus: tuple[Gpu, ...] = ()
    xids: tuple[Xid, ...] | None = None
    """Since boot; None where the kernel's log may not be read."""
    hcas: tuple[Hca, ...] = ()
    netdevs: tuple[Netdev, ...] = ()
    pci: tuple[PciDevice, ...] = ()
    cpus: Cpus = Cpus()
    memory: Memory = Memory()
    software: Software = Software()
    platform: Platform = Platform()
    kubernetes: Kubernetes = Kubernetes()
    unread: tuple[str, ...] = ()
    """What could not be read though it should be there, one sentence each ("nvml: driver not loaded")."""

    @cached_property
    def pci_by_address(self) -> Mapping[str, PciDevice]:
        return {device.address: device for device in self.pci}

    @cached_property
    def netdev_by_name(self) -> Mapping[str, Netdev]:
        return {netdev.name: netdev for netdev in self.netdevs}

    def pci_of(self, address: str | None) -> PciDevice | None:
        return None if address is None else self.pci_by_address.get(address)

"""Reads one node into facts: the only input of the fabric room's decisions, and the only place that does I/O for them.

Unprivileged, below a given root, and never failing: a strange machine gives facts with more unknowns in them. On the running
machine (root "/") NVML and a few system calls are asked as well; a copy of another machine's /sys and /proc gives what its
files tell.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from launcher.fabric import probe_devices, probe_gpus, probe_host, probe_kernel_log
from launcher.fabric.facts import Cpus, Hca, Kubernetes, Memory, Netdev, NodeFacts, PciDevice, Platform, Software
from launcher.fabric.root import Root

T = TypeVar("T")


def probe(
    root: str | Path = "/", *, node_ip: str | None = None, kubernetes: Kubernetes | None = None, nvml: Any = None
) -> NodeFacts:
    """The facts of the node whose files are below `root`.

    `node_ip`: the address by which the gang reaches this node, if the caller knows it. `kubernetes`: labels and resources,
    which only the caller can know. `nvml`: stands in for pynvml in tests. Takes some ten milliseconds; NVML's first call up to
    a second.
    """
    tree = Root(root)
    unread: list[str] = []
    hcas: tuple[Hca, ...] = _part("RDMA devices", lambda: probe_devices.read_hcas(tree), (), unread)
    wanted = {hca.pci for hca in hcas if hca.pci is not None}
    pci: tuple[PciDevice, ...] = _part("PCI devices", lambda: probe_devices.read_pci(tree, wanted), (), unread)
    addresses: dict[str, tuple[str, ...]] = _part("addresses", lambda: probe_host.read_addresses(tree), {}, unread)
    netdevs: tuple[Netdev, ...] = _part(
        "network interfaces", lambda: probe_devices.read_netdevs(tree, addresses), (), unread
    )
    software = _part("versions", lambda: _software(tree), Software(), unread)
    if tree.is_live or nvml is not None:
        reading = probe_gpus.read_nvml(nvml)
        gpus = reading.gpus
        software = replace(software, driver=reading.driver or software.driver, cuda=reading.cuda)
        # Without an NVIDIA card on the bus, a missing driver is no gap in what we know.
        if gpus or probe_gpus.gpus_on_the_bus(pci):
            unread += reading.unread
    else:
        gpus = probe_gpus.gpus_on_the_bus(pci)
    return NodeFacts(
        hostname=_hostname(tree),
        node_ip=node_ip,
        default_netdev=_part("default route", lambda: probe_host.default_netdev(tree), None, unread),
        unix_time=time.time() if tree.is_live else None,
        gpus=gpus,
        xids=_part("the kernel's log", lambda: probe_kernel_log.read_xids(tree), None, unread) if gpus else None,
        hcas=hcas,
        netdevs=netdevs,
        pci=pci,
        cpus=_part("CPUs", lambda: probe_host.read_cpus(tree), Cpus(), unread),
        memory=_part("memory", lambda: probe_host.read_memory(tree), Memory(), unread),
        software=software,
        platform=_part("platform", lambda: probe_host.read_platform(tree), Platform(), unread),
        kubernetes=kubernetes or Kubernetes(),
        unread=tuple(unread),
    )


def _part(name: str, read: Callable[[], T], nothing: T, unread: list[str]) -> T:
    """One part of the facts; a part that breaks is unknown and named, the others stay."""
    try:
        return read()
    except Exception as error:  # whatever a strange machine shows must not stop a job from starting
        unread.append(f"{name}: {type(error).__name__}: {error}")
        return nothing


def _hostname(root: Root) -> str:
    if root.is_live:
        return socket.gethostname()
    return root.text("proc/sys/kernel/hostname") or root.text("etc/hostname") or "unknown"


def _software(root: Root) -> Software:
    driver, is_open = probe_host.driver_version(root)
    if not root.is_live:
        return Software(kernel=root.text("proc/sys/kernel/osrelease") or None, driver=driver, is_open_driver=is_open)
    nccl_names = ("nvidia_nccl_cu13", "nvidia_nccl_cu12")
    installed = installed_versions(sys.path, {"torch", *nccl_names})
    return Software(
        kernel=os.uname().release,
        driver=driver,
        is_open_driver=is_open,
        nccl=next((installed[name] for name in nccl_names if name in installed), None),
        torch=installed.get("torch"),
        python=platform.python_version(),
    )


def installed_versions(path: Sequence[str], names: Collection[str]) -> dict[str, str]:
    """Versions of installed distributions, from the names of their folders on `path`, the first found of each.

    Importing torch would take a second, and importlib.metadata parses e-mail headers for a tenth of one; both are paid at every start.
    """
    found: dict[str, str] = {}
    for folder in path:
        try:
            entries = os.listdir(folder or ".")
        except (OSError, ValueError):
            continue
        for entry in entries:
            name, dash, version = entry.removesuffix(".dist-info").partition("-")
            if dash and entry.endswith(".dist-info") and name in names:
                found.setdefault(name, version)
    return found

"""Reading CPUs, memory, limits, addresses and the nature of a node from procfs and sysfs."""

from __future__ import annotations

import ctypes
import ipaddress
import os
import re
import socket
import struct

from launcher.fabric.binding import parse_cpu_list
from launcher.fabric.cloud import MARKERS
from launcher.fabric.facts import Cpus, Memory, NumaNode, Platform, Unlimited
from launcher.fabric.root import Root

CAPABILITIES = {"net_raw": 13, "ipc_lock": 14, "sys_admin": 21, "sys_nice": 23}


def read_cpus(root: Root) -> Cpus:
    online = parse_cpu_list(root.text("sys/devices/system/cpu/online") or "")
    status = root.text("proc/self/status") or ""
    allowed = re.search(r"^Cpus_allowed_list:\s*(\S+)", status, re.M)
    nodes = []
    for name in root.names("sys/devices/system/node") or []:
        match = re.fullmatch(r"node(\d{1,5})", name)
        if match is None:
            continue
        base = f"sys/devices/system/node/{name}"
        cpus = parse_cpu_list(root.text(f"{base}/cpulist") or "")
        total = re.search(r"MemTotal:\s*(\d+) kB", root.text(f"{base}/meminfo") or "")
        nodes.append(NumaNode(int(match.group(1)), cpus or None, int(total.group(1)) * 1024 if total else None))
    siblings = {
        group
        for cpu in online or ()
        if (group := parse_cpu_list(root.text(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or ""))
    }
    model = re.search(r"^model name\s*:\s*(.+)$", root.text("proc/cpuinfo") or "", re.M)
    return Cpus(
        num_cpus=len(online) if online else None,
        allowed=parse_cpu_list(allowed.group(1)) if allowed else None,
        smt_siblings=tuple(sorted(siblings)) or None,
        numa=tuple(nodes),
        model=model.group(1).strip() if model else None,
        cgroup_cpus=_cgroup_cpus(root),
    )


def read_memory(root: Root) -> Memory:
    total = re.search(r"^MemTotal:\s*(\d+) kB", root.text("proc/meminfo") or "", re.M)
    huge = re.search(r"^HugePages_Free:\s*(\d+)", root.text("proc/meminfo") or "", re.M)
    locked = re.search(r"^Max locked memory\s+(\S+)", root.text("proc/self/limits") or "", re.M)
    shm_bytes, shm_free = _dev_shm(root)
    return Memory(
        total_bytes=int(total.group(1)) * 1024 if total else None,
        cgroup_bytes=_cgroup_bytes(root),
        num_oom_kills=_oom_kills(root),
        dev_shm_bytes=shm_bytes,
        dev_shm_free_bytes=shm_free,
        memlock_bytes=_limit(locked.group(1)) if locked else None,
        huge_pages_free=int(huge.group(1)) if huge else None,
    )


def read_platform(root: Root) -> Platform:
    cmdline = root.text("proc/cmdline")
    iommus = root.names("sys/class/iommu")
    ports = (root.text("proc/sys/net/ipv4/ip_local_port_range") or "").split()
    is_pair = len(ports) == 2 and all(port.isdecimal() for port in ports)
    modules = root.text("proc/modules")
    return Platform(
        vendor=root.text("sys/class/dmi/id/sys_vendor") or None,
        product=root.text("sys/class/dmi/id/product_name") or None,
        asset_tag=root.text("sys/class/dmi/id/chassis_asset_tag") or None,
        is_virtual=_is_virtual(root),
        is_container=_is_container(root),
        capabilities=_capabilities(root),
        peer_memory=_peer_memory(root, modules),
        is_peer_memory_linked=_peer_memory_linked(modules),
        is_iommu_on=None if iommus is None else bool(iommus),
        is_iommu_passthrough=None if cmdline is None else _is_passthrough(cmdline),
        boot_id=root.text("proc/sys/kernel/random/boot_id") or None,
        port_range=(int(ports[0]), int(ports[1])) if is_pair else None,
        markers=tuple(path for path in MARKERS if root.exists(path.lstrip("/"))),
    )


def driver_version(root: Root) -> tuple[str | None, bool | None]:
    """(version, is it the open kernel module) of the NVIDIA driver."""
    text = root.text("proc/driver/nvidia/version")
    if text is None:
        return None, None
    version = re.search(r"Module\D*?(?:x86_64|aarch64)?\s+(\d+\.\d+(?:\.\d+)?)", text)
    return (version.group(1) if version else None), "Open Kernel Module" in text


def default_netdev(root: Root) -> str | None:
    """The interface of the default route with the lowest metric."""
    best: tuple[int, str] | None = None
    for line in (root.text("proc/net/route") or "").splitlines()[1:]:
        fields = line.split()
        if len(fields) >= 8 and fields[1] == "00000000" and fields[7] == "00000000" and fields[6].isdecimal():
            candidate = (int(fields[6]), fields[0])
            best = candidate if best is None else min(best, candidate)
    return best[1] if best else None


def read_addresses(root: Root) -> dict[str, tuple[str, ...]]:
    """Interface → addresses with prefix length.

    On the running machine the C library is asked; in a copy the routing tables are read, which show an address where its
    subnet is routed to an interface (a /32 without a connected route is not seen there).
    """
    if root.is_live:
        live = _getifaddrs()
        if live is not None:
            return live
    return _addresses_from_routes(root)


def _addresses_from_routes(root: Root) -> dict[str, tuple[str, ...]]:
    routes: list[tuple[ipaddress.IPv4Network, str]] = []
    for line in (root.text("proc/net/route") or "").splitlines()[1:]:
        fields = line.split()
        if (
            len(fields) < 8
            or fields[2] != "00000000"
            or not all(re.fullmatch("[0-9A-F]{8}", fields[i]) for i in (1, 7))
        ):
            continue
        address, mask = (socket.inet_ntoa(struct.pack("<I", int(fields[idx], 16))) for idx in (1, 7))
        try:
            routes.append((ipaddress.IPv4Network(f"{address}/{mask}"), fields[0]))
        except ValueError:
            continue
    locals_ = re.findall(r"\|-- (\d+\.\d+\.\d+\.\d+)\n\s+/32 host LOCAL", root.text("proc/net/fib_trie") or "")
    found: dict[str, list[str]] = {}
    for text in dict.fromkeys(locals_):
        try:
            local = ipaddress.IPv4Address(text)
        except ValueError:
            continue
        if local.is_loopback:
            found.setdefault("lo", []).append(f"{local}/8")
            continue
        fitting = [(network.prefixlen, name) for network, name in routes if local in network]
        if fitting:
            length, name = max(fitting)
            found.setdefault(name, []).append(f"{local}/{length}")
    for line in (root.text("proc/net/if_inet6") or "").splitlines():
        fields = line.split()
        if len(fields) == 6 and re.fullmatch("[0-9a-f]{32}", fields[0]) and re.fullmatch("[0-9a-f]{2}", fields[2]):
            address6 = ipaddress.IPv6Address(int(fields[0], 16))
            found.setdefault(fields[5], []).append(f"{address6}/{int(fields[2], 16)}")
    return {name: tuple(addresses) for name, addresses in found.items()}


class _SockAddr(ctypes.Structure):
    _fields_ = [("family", ctypes.c_ushort), ("data", ctypes.c_ubyte * 26)]


class _IfAddrs(ctypes.Structure):
    pass


_IfAddrs._fields_ = [
    ("next", ctypes.POINTER(_IfAddrs)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.POINTER(_SockAddr)),
    ("netmask", ctypes.POINTER(_SockAddr)),
]


def _getifaddrs() -> dict[str, tuple[str, ...]] | None:
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        head = ctypes.POINTER(_IfAddrs)()
        if libc.getifaddrs(ctypes.byref(head)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    found: dict[str, list[str]] = {}
    try:
        item = head
        while item:
            entry = item.contents
            text = _address_text(entry.address, entry.netmask)
            if text is not None:
                found.setdefault(entry.name.decode("utf-8", "replace"), []).append(text)
            item = entry.next
    finally:
        libc.freeifaddrs(head)
    return {name: tuple(addresses) for name, addresses in found.items()}


def _address_text(address: ctypes._Pointer[_SockAddr], netmask: ctypes._Pointer[_SockAddr]) -> str | None:
    if not address or not netmask:
        return None
    family = address.contents.family
    # sockaddr_in: 2 bytes port, then the address; sockaddr_in6: 2 bytes port, 4 bytes flow, then the address.
    first, length = (2, 4) if family == socket.AF_INET else (6, 16)
    if family not in (socket.AF_INET, socket.AF_INET6):
        return None
    raw = bytes(address.contents.data[first : first + length])
    mask = bytes(netmask.contents.data[first : first + length])
    prefix = bin(int.from_bytes(mask, "big")).count("1")
    return f"{socket.inet_ntop(family, raw)}/{prefix}"


def _limit(text: str) -> int | Unlimited | None:
    if text == "unlimited":
        return "unlimited"
    return int(text) if text.isdecimal() else None


def _dev_shm(root: Root) -> tuple[int | None, int | None]:
    if not root.is_live:
        # statvfs of a copy would tell about this machine's disk.
        return None, None
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return None, None
    return found.f_frsize * found.f_blocks, found.f_frsize * found.f_bavail


def _cgroup_folders(root: Root) -> list[str]:
    """The cgroup (version 2) of this process and those above it, innermost first."""
    match = re.search(r"^0::(/\S*)", root.text("proc/self/cgroup") or "", re.M)
    parts = [part for part in (match.group(1) if match else "/").split("/") if part not in ("", "..")]
    return ["/".join(["sys/fs/cgroup", *parts[:depth]]) for depth in range(len(parts), -1, -1)]


def _cgroup_cpus(root: Root) -> float | Unlimited | None:
    found: list[float] = []
    was_read = False
    for folder in _cgroup_folders(root):
        fields = (root.text(f"{folder}/cpu.max") or "").split()
        if len(fields) == 2 and fields[1].isdecimal() and int(fields[1]) > 0:
            was_read = True
            if fields[0].isdecimal():
                found.append(int(fields[0]) / int(fields[1]))
    quota = root.integer("sys/fs/cgroup/cpu/cpu.cfs_quota_us")
    period = root.integer("sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if quota is not None and period:
        was_read = True
        if quota > 0:
            found.append(quota / period)
    return min(found) if found else ("unlimited" if was_read else None)


def _cgroup_bytes(root: Root) -> int | Unlimited | None:
    found: list[int] = []
    was_read = False
    for folder in _cgroup_folders(root):
        text = root.text(f"{folder}/memory.max")
        if text == "max" or (text or "").isdecimal():
            was_read = True
            if text != "max":
                found.append(int(text or 0))
    old = root.integer("sys/fs/cgroup/memory/memory.limit_in_bytes")
    if old is not None:
        was_read = True
        # cgroup v1 writes "no limit" as the largest page-aligned number.
        if old < 1 << 60:
            found.append(old)
    return min(found) if found else ("unlimited" if was_read else None)


def _oom_kills(root: Root) -> int | None:
    for folder in _cgroup_folders(root):
        match = re.search(r"^oom_kill (\d+)", root.text(f"{folder}/memory.events") or "", re.M)
        if match:
            return int(match.group(1))
    match = re.search(r"^oom_kill (\d+)", root.text("sys/fs/cgroup/memory/memory.oom_control") or "", re.M)
    return int(match.group(1)) if match else None


def _is_virtual(root: Root) -> bool | None:
    flags = re.search(r"^flags\s*:\s*(.+)$", root.text("proc/cpuinfo") or "", re.M)
    if flags is not None:
        return "hypervisor" in flags.group(1).split()
    return True if root.exists("sys/hypervisor/type") else None


def _is_container(root: Root) -> bool | None:
    if root.exists(".dockerenv") or root.exists("run/.containerenv"):
        return True
    if root.is_live and "KUBERNETES_SERVICE_HOST" in os.environ:
        return True
    init = root.text("proc/1/comm")
    return False if init in ("systemd", "init") else None


def _capabilities(root: Root) -> tuple[str, ...] | None:
    match = re.search(r"^CapEff:\s*([0-9a-fA-F]{1,16})$", root.text("proc/self/status") or "", re.M)
    if match is None:
        return None
    mask = int(match.group(1), 16)
    return tuple(name for name, bit in CAPABILITIES.items() if mask >> bit & 1)


def _peer_memory(root: Root, modules: str | None) -> str | None:
    if root.exists("sys/module/nvidia_peermem/version"):
        return "nvidia_peermem"
    for name in ("nv_mem", "nv_mem_nc"):
        if root.exists(f"sys/kernel/mm/memory_peers/{name}/version"):
            return name
    # Absence means something only where the module list could be read at all.
    return "absent" if modules is not None and root.names("sys/module") is not None else None


def _peer_memory_linked(modules: str | None) -> bool | None:
    lines = {line.split()[0]: line.split() for line in (modules or "").splitlines() if len(line.split()) >= 4}
    if "nvidia_peermem" not in lines or "ib_core" not in lines:
        return None
    return "nvidia_peermem" in lines["ib_core"][3].split(",")


def _is_passthrough(cmdline: str) -> bool:
    words = cmdline.split()
    off = {"iommu=pt", "iommu.passthrough=1", "intel_iommu=off", "amd_iommu=off", "iommu=off"}
    return any(word in off for word in words)

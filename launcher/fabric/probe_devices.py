"""Reading the PCI tree, the RDMA devices and the network interfaces of a node from sysfs."""

from __future__ import annotations

import ipaddress
import re

from launcher.fabric.facts import ERROR_COUNTERS, Gid, Hca, HcaPort, Netdev, PciDevice
from launcher.fabric.root import Root

ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
HOST_BRIDGE = re.compile(r"pci[0-9a-f]{4,8}:[0-9a-f]{2}")

MANY_HCAS = 64
"""With more devices than this (virtual functions on a host), GID tables are read for active ports only: 256 slots each."""

_ACS_CAPABILITY = 0x0D
_ACS_REDIRECT = 0x0C
"""P2P request redirect and completion redirect (PCIe base specification, ACS control register)."""


def place_in_tree(resolved: str | None) -> tuple[str | None, tuple[str, ...] | None, str | None]:
    """(host bridge, bridges, PCI address) of a sysfs path.

    >>> place_in_tree("sys/devices/pci0000:00/0000:00:01.0/0000:05:00.0/virtio2/net/eth0")
    ('pci0000:00', ('0000:00:01.0',), '0000:05:00.0')
    """
    if resolved is None:
        return None, None, None
    parts = resolved.lower().split("/")
    chain = [part for part in parts if ADDRESS.fullmatch(part)]
    if not chain:
        return None, None, None
    root = next((part for part in parts if HOST_BRIDGE.fullmatch(part)), None)
    if root is None:
        # A flat copy of /sys/bus/pci/devices: the tree is not there.
        return None, None, chain[-1]
    return root, tuple(chain[:-1]), chain[-1]


def read_pci(root: Root, extra: set[str]) -> tuple[PciDevice, ...]:
    """GPUs, network devices, NVSwitches, the devices in `extra`, and all bridges above them."""
    listed = root.names("sys/bus/pci/devices") or []
    wanted: dict[str, PciDevice] = {}
    for name in listed:
        address = name.lower()
        if not ADDRESS.fullmatch(address):
            continue
        class_code = root.text(f"sys/bus/pci/devices/{name}/class")
        vendor = root.text(f"sys/bus/pci/devices/{name}/vendor")
        if address in extra or _matters(class_code, vendor):
            wanted[address] = _read_device(root, name)
    bridges = {bridge for device in wanted.values() for bridge in device.path or ()} - set(wanted)
    for bridge in sorted(bridges):
        wanted[bridge] = _read_device(root, bridge)
    return tuple(wanted[address] for address in sorted(wanted))


def _matters(class_code: str | None, vendor: str | None) -> bool:
    code = class_code or ""
    return code.startswith(("0x02", "0x0300", "0x0302")) or (code.startswith("0x0680") and vendor == "0x10de")


def _read_device(root: Root, name: str) -> PciDevice:
    base = f"sys/bus/pci/devices/{name}"
    host_bridge, path, address = place_in_tree(root.resolved(base))
    numa = root.integer(f"{base}/numa_node")
    driver = root.resolved(f"{base}/driver")
    physfn = place_in_tree(root.resolved(f"{base}/physfn"))[2] if root.exists(f"{base}/physfn") else None
    if physfn is None and root.exists(f"{base}/physfn"):
        physfn = "unknown"
    return PciDevice(
        address=address or name.lower(),
        vendor=_hex(root.text(f"{base}/vendor")),
        device=_hex(root.text(f"{base}/device")),
        class_code=_hex(root.text(f"{base}/class")),
        driver=driver.rsplit("/", 1)[-1] if driver else None,
        numa=numa if numa is not None and numa >= 0 else None,
        root=host_bridge,
        path=path,
        physfn=physfn,
        num_vfs=root.integer(f"{base}/sriov_numvfs"),
        link_gts=_leading_number(root.text(f"{base}/current_link_speed")),
        max_link_gts=_leading_number(root.text(f"{base}/max_link_speed")),
        link_width=_lanes(root.integer(f"{base}/current_link_width")),
        max_link_width=_lanes(root.integer(f"{base}/max_link_width")),
        acs_redirect=acs_redirect(root.binary(f"{base}/config")),
    )


def acs_redirect(config: bytes | None) -> bool | None:
    """Whether a bridge's configuration space says that ACS redirects peer traffic; None without the extended part.

    Without root the kernel shows 64 bytes only, so the answer is unknown.
    """
    if config is None or len(config) < 0x104:
        return None
    offset = 0x100
    for _ in range(96):
        if offset < 0x100 or offset + 8 > len(config):
            return False
        header = int.from_bytes(config[offset : offset + 4], "little")
        if header in (0, 0xFFFFFFFF):
            return False
        if header & 0xFFFF == _ACS_CAPABILITY:
            control = int.from_bytes(config[offset + 6 : offset + 8], "little")
            return bool(control & _ACS_REDIRECT)
        offset = header >> 20
    return None


def read_hcas(root: Root) -> tuple[Hca, ...]:
    names = root.names("sys/class/infiniband") or []
    nodes = _device_nodes(root)
    is_many = len(names) > MANY_HCAS
    return tuple(_read_hca(root, name, nodes, is_many) for name in names)


def _device_nodes(root: Root) -> dict[str, bool] | None:
    """RDMA device → whether its /dev node exists; None when that cannot be known."""
    verbs = root.names("sys/class/infiniband_verbs")
    if verbs is None:
        return {} if root.is_live and not root.exists("dev/infiniband") else None
    found: dict[str, bool] = {}
    for verb in verbs:
        device = root.text(f"sys/class/infiniband_verbs/{verb}/ibdev")
        if device:
            found[device] = root.exists(f"dev/infiniband/{verb}")
    return found


def _read_hca(root: Root, name: str, nodes: dict[str, bool] | None, is_many: bool) -> Hca:
    base = f"sys/class/infiniband/{name}"
    _, _, pci = place_in_tree(root.resolved(f"{base}/device"))
    driver = root.resolved(f"{base}/device/driver")
    netdevs = tuple(root.names(f"{base}/device/net") or ())
    numbers = [int(port) for port in root.names(f"{base}/ports") or [] if port.isdecimal() and port.isascii()]
    ports = tuple(_read_port(root, f"{base}/ports/{number}", number, is_many) for number in numbers)
    if not netdevs:
        netdevs = tuple(dict.fromkeys(gid.netdev for port in ports for gid in port.gids if gid.netdev))
    return Hca(
        name=name,
        pci=pci,
        driver=driver.rsplit("/", 1)[-1] if driver else None,
        node_guid=root.text(f"{base}/node_guid") or None,
        fw_version=root.text(f"{base}/fw_ver") or None,
        board_id=root.text(f"{base}/board_id") or None,
        netdevs=netdevs,
        has_device_node=None if nodes is None else nodes.get(name, False),
        ports=ports,
    )


def _read_port(root: Root, base: str, number: int, is_many: bool) -> HcaPort:
    state = _after_colon(root.text(f"{base}/state"))
    gids: list[Gid] = []
    unreadable: list[int] = []
    if not is_many or state == "ACTIVE":
        for slot in root.names(f"{base}/gids") or []:
            if slot.isdecimal() and slot.isascii():
                _read_gid(root, base, int(slot), gids, unreadable)
    counters = {}
    for counter in ERROR_COUNTERS:
        for folder in ("counters", "hw_counters"):
            value = root.integer(f"{base}/{folder}/{counter}")
            if value is not None:
                counters[counter] = value
                break
    return HcaPort(
        port=number,
        state=state,
        phys_state=_after_colon(root.text(f"{base}/phys_state")),
        rate_gbps=_leading_number(root.text(f"{base}/rate")),
        link_layer=root.text(f"{base}/link_layer") or None,
        lid=_any_base(root.text(f"{base}/lid")),
        sm_lid=_any_base(root.text(f"{base}/sm_lid")),
        gids=tuple(gids),
        unreadable_gids=tuple(unreadable),
        counters=counters,
    )


def _read_gid(root: Root, base: str, slot: int, gids: list[Gid], unreadable: list[int]) -> None:
    text = root.text(f"{base}/gids/{slot}")
    if text is None:
        # Containers: slots of other network namespaces give EINVAL.
        return
    try:
        gid = ipaddress.IPv6Address(text)
    except ValueError:
        unreadable.append(slot)
        return
    if int(gid) == 0:
        return
    gids.append(
        Gid(
            slot,
            _canonical(gid),
            root.text(f"{base}/gid_attrs/types/{slot}") or None,
            root.text(f"{base}/gid_attrs/ndevs/{slot}") or None,
        )
    )


def _canonical(gid: ipaddress.IPv6Address) -> str:
    mapped = gid.ipv4_mapped
    return str(gid) if mapped is None else f"::ffff:{mapped}"


def read_netdevs(root: Root, addresses: dict[str, tuple[str, ...]]) -> tuple[Netdev, ...]:
    """Interfaces in kernel order (ifindex), each with its addresses from `addresses`."""
    found: list[tuple[int, Netdev]] = []
    for position, name in enumerate(root.names("sys/class/net") or []):
        base = f"sys/class/net/{name}"
        if root.text(f"{base}/operstate") is None and root.text(f"{base}/mtu") is None:
            # Files such as bonding_masters.
            continue
        speed = root.integer(f"{base}/speed")
        carrier = root.text(f"{base}/carrier")
        _, _, pci = place_in_tree(root.resolved(f"{base}/device"))
        members = root.text(f"{base}/bonding/slaves")
        netdev = Netdev(
            name=name,
            operstate=root.text(f"{base}/operstate") or None,
            has_carrier={"1": True, "0": False}.get(carrier or ""),
            speed_mbps=speed if speed is not None and speed > 0 else None,
            mtu=root.integer(f"{base}/mtu"),
            addresses=addresses.get(name, ()),
            pci=pci,
            is_virtual=not root.exists(f"{base}/device"),
            bond_members=tuple(members.split()) if members else (),
        )
        found.append((root.integer(f"{base}/ifindex") or 1_000_000 + position, netdev))
    return tuple(netdev for _, netdev in sorted(found, key=lambda item: item[0]))


def _after_colon(text: str | None) -> str | None:
    """ "4: ACTIVE" → "ACTIVE"; anything else is unknown."""
    if text is None:
        return None
    match = re.fullmatch(r"\d+:\s*([A-Za-z_ ]+)", text)
    return match.group(1).strip() if match else None


def _leading_number(text: str | None) -> float | None:
    match = re.match(r"\d{1,6}(?:\.\d{1,3})?", text or "")
    return float(match.group(0)) if match else None


def _any_base(text: str | None) -> int | None:
    try:
        return int(text or "", 0)
    except ValueError:
        return None


def _hex(text: str | None) -> str | None:
    return text.lower() if text and re.fullmatch(r"0x[0-9a-fA-F]{1,8}", text) else None


def _lanes(value: int | None) -> int | None:
    # Virtual functions read 0 or 255 ("unknown").
    return value if value is not None and 0 < value <= 32 else None

"""Lays recorded machines out as a /sys and /proc below a folder, so that tests go through the real probe.

What a record does not say is invented in the least telling way (an unused bus number, an unused memory node) or left out.
Where no PCI path was published, the tree is built from the published matrix: whoever is PIX shares a switch, and so on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.fabric.facts import Kubernetes, NodeFacts
from launcher.fabric.probe import probe

FOLDER = Path(__file__).parents[2] / "fixtures" / "topologies"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
NEARNESS = {"PIX": 1, "PXB": 2, "PHB": 3, "NODE": 4, "SYS": 5}

UPSTREAM_PORTS_ONLY = {"oci-bm-gpu-h100-8"}
"""Its pcie_path comes from an NCCL dump, which names each switch by its upstream port and leaves the others out."""

NODE_IP = "10.20.30.7"


def record(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


@dataclass
class Place:
    """Where a device is put in the tree."""

    address: str
    numa: int | None
    path: tuple[str, ...] | None
    root: str | None


@dataclass
class Layout:
    """A machine below `root`, ready to be changed by a test and then probed."""

    machine: dict[str, Any]
    root: Path
    places: dict[str, Place] = field(default_factory=dict)

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def pci_folder(self, device: str) -> str:
        place = self.places[device]
        return "/".join(["sys/devices", place.root or "pciffff:ff", *(place.path or ()), place.address])

    def probe(self, **arguments: Any) -> NodeFacts:
        return probe(self.root, **arguments)


def lay_out(name: str | dict[str, Any], root: Path, *, flat: bool = False) -> Layout:
    """The machine's files below `root`. `flat`: PCI devices as plain folders without a tree, as in a poor copy."""
    machine = record(name) if isinstance(name, str) else name
    layout = Layout(machine, root)
    layout.places = dict(_places(machine))
    _write_system(layout)
    for gpu in machine["gpus"]:
        _write_pci(layout, f"GPU{gpu['index']}", "0x10de", "0x2330", "0x030200", flat)
    for hca in machine["hcas"]:
        _write_hca(layout, hca, flat)
    for netdev in machine["netdevs"]:
        if isinstance(netdev, dict):
            _write_netdev(layout, netdev)
    return layout


def facts_of(name: str, root: Path, **arguments: Any) -> NodeFacts:
    kubernetes = arguments.pop("kubernetes", None) or Kubernetes()
    return lay_out(name, root).probe(kubernetes=kubernetes, **arguments)


def _places(machine: dict[str, Any]) -> Iterator[tuple[str, Place]]:
    devices = [(f"GPU{gpu['index']}", gpu) for gpu in machine["gpus"]]
    devices += [(hca["name"], hca) for hca in machine["hcas"]]
    matrix = machine["matrix"] or {}
    columns = set((matrix.get("gpu_hca") or {}).get("columns", []))
    free_buses = (f"0000:{bus:02x}:00.0" for bus in range(0xE2, 0x100))
    free_nodes = iter(
        sorted(set(range(machine["system"]["numa_nodes"] or 1)) - {device.get("numa") for _, device in devices})
    )
    trees = _trees_from_matrix(machine)
    invented: dict[str, int] = {}
    for name, device in devices:
        if name not in columns and not name.startswith("GPU"):
            # A device that nobody saw on the bus has no place.
            continue
        address = device["pci"]
        if address is None:
            address = next(free_buses)
        elif address in {hca["pci"] for hca in machine["hcas"]} and name.startswith("GPU"):
            # A record with one address for two devices: the next bus keeps the GPUs in order.
            address = f"0000:{int(address[5:7], 16) + 1:02x}:00.0"
        numa = device["numa"]
        if numa is None:
            group = trees[name][-1] if trees[name] else name
            numa = invented[group] if group in invented else invented.setdefault(group, next(free_nodes))
        published = device.get("pcie_path")
        if published:
            path = _full_path(machine["id"], published)
            yield name, Place(address, numa, path, f"pci0000:{published[0][5:7]}")
        else:
            host, *bridges = trees[name]
            yield name, Place(address, numa, tuple(bridges), host)


def _full_path(machine_id: str, published: list[str]) -> tuple[str, ...]:
    root_port = f"0000:00:{published[0][5:7][1]}1.{int(published[0][5:7], 16) % 8}"
    if machine_id not in UPSTREAM_PORTS_ONLY:
        return (root_port, *published)
    path = [root_port]
    for depth, upstream in enumerate(published):
        # The downstream port is on the next bus; below the outer switch it leads to the inner one.
        below = published[depth + 1][5:7] if depth + 1 < len(published) else "ff"
        bus = int(upstream[5:7], 16) + 1
        path += [upstream, f"0000:{bus:02x}:{int(below, 16) % 32:02x}.0"]
    return tuple(path)


def _trees_from_matrix(machine: dict[str, Any]) -> dict[str, list[str]]:
    """For each device: host bridge, then bridges, so that the tree says what the matrix says."""
    near = _pairs(machine)
    names = [f"GPU{gpu['index']}" for gpu in machine["gpus"]] + [hca["name"] for hca in machine["hcas"]]
    groups = {level: _join(names, near, NEARNESS[level]) for level in ("PIX", "PXB", "PHB")}
    trees: dict[str, list[str]] = {}
    for number, name in enumerate(names):
        host = groups["PHB"][name]
        outer, inner = groups["PXB"][name], groups["PIX"][name]
        root_port = f"0000:{host:02x}:{outer % 32:02x}.1"
        path = [f"pci00{host:02x}:00", root_port]
        shares_outer = sum(groups["PXB"][other] == outer for other in names) > 1
        inners = {groups["PIX"][other] for other in names if groups["PXB"][other] == outer}
        if shares_outer and len(inners) > 1:
            path += [f"00a0:{outer:02x}:00.0", f"00a1:{outer:02x}:{inner % 32:02x}.0"]
        if shares_outer:
            path += [f"00b0:{inner:02x}:00.0", f"00b1:{inner:02x}:{number % 32:02x}.0"]
        trees[name] = path
    return trees


def _pairs(machine: dict[str, Any]) -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] = {}
    for part in ("gpu_hca", "hca_hca", "gpu_gpu"):
        table = (machine["matrix"] or {}).get(part) or {}
        for row, cells in table.get("rows", {}).items():
            for column, cell in zip(table["columns"], cells, strict=True):
                if cell in NEARNESS:
                    found[(row, column)] = NEARNESS[cell]
    return found


def _join(names: list[str], near: dict[tuple[str, str], int], limit: int) -> dict[str, int]:
    """Groups of devices that are at most `limit` apart; the group's number is its first member's position."""
    group = {name: position for position, name in enumerate(names)}
    for (one, other), value in near.items():
        if value <= limit and group[one] != group[other]:
            low, high = sorted((group[one], group[other]))
            group = {name: low if number == high else number for name, number in group.items()}
    return group


def _write_system(layout: Layout) -> None:
    system = layout.machine["system"]
    layout.write("proc/sys/kernel/hostname", layout.machine["id"] + "\n")
    for node in range(system["numa_nodes"] or 0):
        cpus = (system["numa_cpus"] or {}).get(str(node), "")
        layout.write(f"sys/devices/system/node/node{node}/cpulist", cpus + "\n")
    if system["cpus"]:
        layout.write("sys/devices/system/cpu/online", f"0-{system['cpus'] - 1}\n")
        layout.write("proc/self/status", f"Cpus_allowed_list:\t0-{system['cpus'] - 1}\nCapEff:\t0000000000004000\n")
    flags = "fpu sse2 hypervisor" if system["virtual"] else "fpu sse2"
    layout.write("proc/cpuinfo", f"model name\t: some CPU\nflags\t\t: {flags}\n")
    if system["vendor"]:
        layout.write("sys/class/dmi/id/sys_vendor", system["vendor"] + "\n")
        layout.write("sys/class/dmi/id/product_name", system["product"] + "\n")
    for device in system.get("pci", []):
        folder = f"sys/devices/pci0000:00/{device['pci']}"
        for name in ("vendor", "device", "class"):
            layout.write(f"{folder}/{name}", device[name] + "\n")
        layout.write(f"{folder}/numa_node", f"{device['numa']}\n")
        _link(layout, f"sys/bus/pci/devices/{device['pci']}", folder)


def _write_pci(layout: Layout, name: str, vendor: str, device: str, class_code: str, flat: bool) -> str:
    place = layout.places[name]
    folder = f"sys/bus/pci/devices/{place.address}" if flat else layout.pci_folder(name)
    values = {"vendor": vendor, "device": device, "class": class_code}
    values["numa_node"] = str(-1 if place.numa is None else place.numa)
    for file, text in values.items():
        layout.write(f"{folder}/{file}", text + "\n")
    if flat:
        return folder
    _link(layout, f"sys/bus/pci/devices/{place.address}", folder)
    bridges = folder.split("/")[3:-1]
    for depth, bridge in enumerate(bridges):
        bridge_folder = "/".join(folder.split("/")[: 4 + depth])
        layout.write(f"{bridge_folder}/class", "0x060400\n")
        _link(layout, f"sys/bus/pci/devices/{bridge}", bridge_folder)
    return folder


def _write_hca(layout: Layout, hca: dict[str, Any], flat: bool) -> None:
    base = f"sys/class/infiniband/{hca['name']}"
    port = f"{base}/ports/{hca['port']}"
    for file in ("state", "phys_state", "rate", "link_layer"):
        text = hca["sysfs"][file]
        layout.write(f"{port}/{file}", text + "\n") if text is not None else None
    if hca["link_layer"] == "InfiniBand":
        layout.write(f"{port}/sm_lid", "0x1\n")
    listed = {gid["index"]: gid for gid in hca["gids"]}
    for slot in range(max(listed, default=-1) + 3 if listed else 0):
        gid = listed.get(slot)
        layout.write(f"{port}/gids/{slot}", (gid["gid"] if gid else ":".join(["0000"] * 8)) + "\n")
        if gid is None:
            # An unused slot: the kernel answers EINVAL. A folder cannot be read as a file either.
            (layout.root / f"{port}/gid_attrs/types/{slot}").mkdir(parents=True)
            continue
        layout.write(f"{port}/gid_attrs/types/{slot}", gid["type"] + "\n")
        if gid["netdev"]:
            layout.write(f"{port}/gid_attrs/ndevs/{slot}", gid["netdev"] + "\n")
    if hca["name"] in layout.places:
        folder = _write_pci(layout, hca["name"], hca["vendor"], hca["device"] or "0x0000", "0x020700", flat)
        layout.write(f"sys/bus/pci/drivers/{hca['driver']}/new_id", "")
        _link(layout, f"{folder}/driver", f"sys/bus/pci/drivers/{hca['driver']}")
        _link(layout, f"{base}/device", folder)
        if hca["netdev"]:
            layout.write(f"{folder}/net/{hca['netdev']}/ifindex", "0\n")
    if hca["netdev"]:
        _write_netdev(layout, {"name": hca["netdev"], "operstate": "up" if hca["netdev_up"] else "down", "mtu": 9000})
        if hca["name"] in layout.places:
            _link(layout, f"sys/class/net/{hca['netdev']}/device", folder)


def _write_netdev(layout: Layout, netdev: dict[str, Any]) -> None:
    base = f"sys/class/net/{netdev['name']}"
    layout.write(f"{base}/operstate", netdev["operstate"] + "\n")
    layout.write(f"{base}/mtu", f"{netdev['mtu']}\n")
    if "speed" in netdev:
        layout.write(f"{base}/speed", f"{netdev['speed']}\n")
    if netdev.get("device"):
        folder = f"sys/devices/pci0000:00/{netdev['device']}"
        (layout.root / folder).mkdir(parents=True, exist_ok=True)
        _link(layout, f"{base}/device", folder)


def give_address(layout: Layout, netdev: str, address: str = NODE_IP) -> None:
    """Writes routing tables in which `netdev` owns `address` (a /24) and the default route."""
    raw = [int(part) for part in address.split(".")]
    subnet = f"00{raw[2]:02X}{raw[1]:02X}{raw[0]:02X}"
    gateway = f"01{raw[2]:02X}{raw[1]:02X}{raw[0]:02X}"
    head = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
    rows = f"{netdev}\t00000000\t{gateway}\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
    rows += f"{netdev}\t{subnet}\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
    layout.write("proc/net/route", head + rows)
    layout.write("proc/net/fib_trie", f"Local:\n  +-- 0.0.0.0/0 3 0 5\n     |-- {address}\n        /32 host LOCAL\n")


def healthy_facts(name: str, root: Path) -> NodeFacts:
    """Facts of a recorded machine whose node address is on its management interface: healthy as far as is known."""
    layout = lay_out(name, root)
    netdev = record(name)["expected"]["socket_ifname"] or "mgmt0"
    if netdev == "mgmt0":
        layout.write("sys/class/net/mgmt0/operstate", "up\n")
        layout.write("sys/class/net/mgmt0/mtu", "1500\n")
    give_address(layout, netdev)
    return layout.probe(node_ip=NODE_IP)


def _link(layout: Layout, name: str, target: str) -> None:
    path = layout.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        return
    # Relative, as in sysfs.
    path.symlink_to(Path(*[".."] * (len(Path(name).parts) - 1), target))

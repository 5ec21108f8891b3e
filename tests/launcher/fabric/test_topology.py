"""Distances over generated PCI trees, against an oracle that walks the tree edge by edge."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.fabric.facts import Cpus, Gpu, Hca, NodeFacts, NumaNode, PciDevice
from launcher.fabric.topology import Near, closest_hcas, distance, nearest_cpus


@dataclass
class Tree:
    """Host bridges with root ports; below each a device or a tree of switches."""

    devices: list[PciDevice] = field(default_factory=list)
    parents: dict[str, str] = field(default_factory=dict)
    upstream_ports: set[str] = field(default_factory=set)
    next_bus: int = 1

    def bus(self) -> int:
        self.next_bus += 1
        return self.next_bus


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    tree = Tree()
    for host in range(draw(st.integers(1, 3))):
        root, numa = f"pci00{host:02x}:00", draw(st.sampled_from([0, 1]))
        for port in range(draw(st.integers(1, 3))):
            root_port = f"0000:{host:02x}:{port:02x}.7"
            tree.parents[root_port] = root
            _grow(draw, tree, root, numa, (root_port,), draw(st.integers(0, 2)))
    return tree


def _grow(draw: st.DrawFn, tree: Tree, root: str, numa: int, path: tuple[str, ...], depth: int) -> None:
    if depth == 0:
        bus = tree.bus()
        for function in range(draw(st.integers(1, 2))):
            address = f"0001:{bus:02x}:00.{function}"
            tree.parents[address] = path[-1]
            tree.devices.append(PciDevice(address, numa=numa, root=root, path=path))
        return
    upstream = f"0002:{tree.bus():02x}:00.0"
    tree.parents[upstream] = path[-1]
    tree.upstream_ports.add(upstream)
    # A switch with one way down would be a bridge: real ones have several.
    for slot in range(draw(st.integers(2, 3))):
        downstream = f"0003:{tree.next_bus:02x}:{slot:02x}.{draw(st.integers(0, 6))}"
        tree.parents[downstream] = upstream
        _grow(draw, tree, root, numa, (*path, upstream, downstream), draw(st.integers(0, depth - 1)))


def _ancestors(tree: Tree, address: str) -> list[str]:
    chain = [address]
    while chain[-1] in tree.parents:
        chain.append(tree.parents[chain[-1]])
    return chain


def _oracle(tree: Tree, one: PciDevice, other: PciDevice) -> Near:
    """Counts the switches on the way from one device to the other."""
    if one.address == other.address:
        return Near.X
    up, down = _ancestors(tree, one.address), _ancestors(tree, other.address)
    if up[-1] != down[-1]:
        return Near.NODE if one.numa == other.numa else Near.SYS
    meeting = next(node for node in up if node in down)
    if meeting == up[-1]:
        return Near.PHB
    way = up[: up.index(meeting) + 1] + down[: down.index(meeting)]
    return Near.PIX if len(tree.upstream_ports.intersection(way)) <= 1 else Near.PXB


@settings(max_examples=150, deadline=None)
@given(trees())
def test_distance_is_the_number_of_switches_on_the_way(tree: Tree) -> None:
    """Nothing here is tuned to a machine: any tree of bridges must come out right."""
    for one in tree.devices:
        for other in tree.devices:
            found = distance(one, other)
            assert found.near == _oracle(tree, one, other), (one, other)
            assert not found.is_bound


@settings(max_examples=60, deadline=None)
@given(trees())
def test_distance_is_symmetric_and_nearness_is_a_tree_order(tree: Tree) -> None:
    """Of three devices the two larger distances are equal: what is near to mine is as far from yours as mine is."""
    some = tree.devices[:7]
    for a in some:
        for b in some:
            assert distance(a, b) == distance(b, a)
            for c in some:
                if len({a.address, b.address, c.address}) == 3:
                    ab, bc, ac = (distance(*pair).near for pair in ((a, b), (b, c), (a, c)))
                    assert ab is not None
                    assert bc is not None
                    assert ac is not None
                    assert ac <= max(ab, bc)


@settings(max_examples=60, deadline=None)
@given(trees())
def test_without_the_tree_the_answer_bounds_the_truth(tree: Tree) -> None:
    """A flat sysfs must not make things look nearer than they are, and says that it is a bound."""
    for one in tree.devices:
        for other in tree.devices:
            blind = distance(PciDevice(one.address, numa=one.numa), PciDevice(other.address, numa=other.numa))
            true = distance(one, other)
            assert blind.near is not None
            assert true.near is not None
            assert blind.near >= true.near or true.near in (Near.X, Near.PIX)
            if blind.near == Near.NODE:
                assert blind.is_bound


def test_one_bus_for_two_sockets_is_not_believed() -> None:
    """Poor copies of /sys put every device on the root bus; the NUMA nodes still tell them apart."""
    one = PciDevice("0000:01:00.0", numa=0, root="pci0000:00", path=())
    other = PciDevice("0000:02:00.0", numa=1, root="pci0000:00", path=())
    assert distance(one, other).near == Near.SYS


def test_unknown_numa_is_unknown_not_near() -> None:
    """The kernel writes -1 on small VMs; taking it for a node would make everything NODE."""
    one, other = PciDevice("0000:01:00.0"), PciDevice("0000:02:00.0", numa=0)
    assert distance(one, other).near is None
    assert distance(one, None).near is None
    assert distance(one, other, num_numa_nodes=1).near == Near.NODE


def _node() -> NodeFacts:
    gpu = PciDevice("0000:01:00.0", numa=0)
    near, far = PciDevice("0000:02:00.0", numa=0), PciDevice("0000:81:00.0", numa=1)
    return NodeFacts(
        "a",
        gpus=(Gpu(0, gpu.address),),
        hcas=(Hca("near0", near.address), Hca("far0", far.address), Hca("lost0")),
        pci=(gpu, near, far),
        cpus=Cpus(8, tuple(range(8)), None, (NumaNode(0, (0, 1, 2, 3)), NumaNode(1, (4, 5, 6, 7)))),
    )


def test_closest_leaves_out_what_has_no_known_place() -> None:
    assert closest_hcas(_node(), ["near0", "far0", "lost0"]) == {0: ("near0",)}
    assert closest_hcas(_node(), ["far0", "lost0"]) == {0: ("far0",)}
    assert closest_hcas(_node(), ["lost0"]) == {0: ()}


def test_nearest_cpus_are_those_that_may_be_used() -> None:
    """In a container with a cpuset, binding to the whole node would fail with EINVAL."""
    facts = _node()
    assert nearest_cpus(facts, 0) == (0, 1, 2, 3)
    limited = NodeFacts("a", gpus=facts.gpus, pci=facts.pci, cpus=Cpus(8, (2, 3, 4), None, facts.cpus.numa))
    assert nearest_cpus(limited, 0) == (2, 3)
    elsewhere = NodeFacts("a", gpus=facts.gpus, pci=facts.pci, cpus=Cpus(8, (6, 7), None, facts.cpus.numa))
    assert nearest_cpus(elsewhere, 0) is None

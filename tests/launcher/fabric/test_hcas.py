"""The choice of RDMA ports: properties over generated machines, and the cases that no recorded machine shows."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.fabric.facts import Gpu, Hca, HcaPort, NodeFacts, PciDevice
from launcher.fabric.hcas import choose
from launcher.fabric.nccl import parse_names, usable_ports
from launcher.fabric.rules import GangRequest, environment


def _device(bus: int, switch: int | None, numa: int = 0, **more: str) -> PciDevice:
    path = (f"0000:00:{bus % 32:02x}.0",)
    if switch is not None:
        path = (f"0000:00:{switch:02x}.1", f"00aa:{switch:02x}:00.0", f"00ab:{switch:02x}:{bus % 32:02x}.0")
    return PciDevice(f"0000:{bus:02x}:00.0", numa=numa, root=f"pci000{numa}:00", path=path, **more)


def _port(rate: float | None = 200.0, state: str | None = "ACTIVE", layer: str = "InfiniBand") -> HcaPort:
    return HcaPort(1, state, rate_gbps=rate, link_layer=layer)


def _machine(gpus: list[PciDevice], hcas: list[tuple[str, PciDevice | None, HcaPort]]) -> NodeFacts:
    return NodeFacts(
        "a",
        gpus=tuple(Gpu(idx, device.address) for idx, device in enumerate(gpus)),
        hcas=tuple(Hca(name, device.address if device else None, ports=(port,)) for name, device, port in hcas),
        pci=tuple(gpus) + tuple(device for _, device, _ in hcas if device),
    )


@st.composite
def machines(draw: st.DrawFn) -> NodeFacts:
    gpus = [
        _device(0x10 + idx, draw(st.sampled_from([None, 0, 1, 2])), draw(st.integers(0, 1)))
        for idx in range(draw(st.integers(0, 4)))
    ]
    hcas = []
    for idx in range(draw(st.integers(0, 6))):
        device = _device(0x40 + idx, draw(st.sampled_from([None, 0, 1, 2])), draw(st.integers(0, 1)))
        port = HcaPort(
            1,
            draw(st.sampled_from(["ACTIVE", "ACTIVE", "DOWN", None])),
            rate_gbps=draw(st.sampled_from([25.0, 200.0, 400.0, None])),
            link_layer=draw(st.sampled_from(["InfiniBand", "Ethernet", "Unknown", None])),
        )
        hcas.append((f"mlx5_{idx}", draw(st.sampled_from([device, device, None])), port))
    return _machine(gpus, hcas)


@settings(max_examples=80, deadline=None)
@given(machines())
def test_whatever_nccl_could_use_some_of_it_is_chosen(facts: NodeFacts) -> None:
    """Choosing none would send the job to TCP in silence."""
    choice = choose(facts)
    usable = {name for name, _ in usable_ports(facts)}
    assert set(choice.hcas) <= usable
    assert bool(choice.hcas) == bool(usable)
    assert (choice.transport == "socket") == (not usable)


@settings(max_examples=80, deadline=None)
@given(machines())
def test_each_device_is_either_chosen_or_left_out_with_a_reason(facts: NodeFacts) -> None:
    choice = choose(facts)
    assert set(choice.hcas) | set(choice.excluded) == {hca.name for hca in facts.hcas}
    assert not set(choice.hcas) & set(choice.excluded)
    assert all(choice.excluded.values())


@settings(max_examples=50, deadline=None)
@given(machines(), st.permutations(range(6)))
def test_names_and_order_carry_no_meaning(facts: NodeFacts, shuffle: list[int]) -> None:
    """mlx5_0 is a storage card on one machine and a compute card on the next."""
    names = {hca.name: f"dev{shuffle[idx]}" for idx, hca in enumerate(facts.hcas)}
    renamed = replace(
        facts, hcas=tuple(sorted((replace(hca, name=names[hca.name]) for hca in facts.hcas), key=lambda hca: hca.name))
    )
    assert {names[name] for name in choose(facts).hcas} == set(choose(renamed).hcas)


@settings(max_examples=60, deadline=None)
@given(machines())
def test_nccl_reads_the_value_as_the_choice(facts: NodeFacts) -> None:
    (node,) = environment([facts], GangRequest(num_nodes=2), {})
    decision = node.decision("NCCL_IB_HCA")
    assert decision is not None
    if node.hcas.transport == "socket":
        assert decision.value is None
        return
    names = parse_names(decision.value or "")
    assert {(hca, port.port) for hca, port in usable_ports(facts) if names.takes(hca, port.port)} == {
        (port.hca, port.port) for port in node.hcas.ports
    }


def test_a_management_card_beside_one_gpu_does_not_win() -> None:
    """Its place says compute, its speed and its loneliness say otherwise; the doubt is shown."""
    gpus = [_device(0x10 + idx, idx) for idx in range(4)]
    hcas = [("mgmt0", _device(0x40, 0), _port(25.0))]
    hcas += [(f"ib{idx}", _device(0x50 + idx, None), _port(400.0)) for idx in range(4)]
    choice = choose(_machine(gpus, hcas))
    assert set(choice.hcas) == {"ib0", "ib1", "ib2", "ib3"}
    assert choice.doubt is not None


def test_a_faster_storage_card_away_from_the_gpus_does_not_win() -> None:
    gpus = [_device(0x10 + idx, idx) for idx in range(4)]
    hcas = [(f"ib{idx}", _device(0x40 + idx, idx), _port(200.0)) for idx in range(4)]
    hcas.append(("store0", _device(0x60, None), _port(400.0)))
    choice = choose(_machine(gpus, hcas))
    assert set(choice.hcas) == {"ib0", "ib1", "ib2", "ib3"}
    assert choice.doubt is not None


def test_a_thousand_virtual_functions_give_way_to_their_physical_function() -> None:
    gpu, card = _device(0x10, 0), _device(0x20, 0)
    functions = [_device(0x21, 0, physfn=card.address) for _ in range(1000)]
    functions = [
        replace(device, address=f"0000:{0x21 + idx // 256:02x}:{idx % 256 // 8:02x}.{idx % 8}")
        for idx, device in enumerate(functions)
    ]
    hcas = [("pf", card, _port())] + [(f"vf{idx}", device, _port()) for idx, device in enumerate(functions)]
    choice = choose(_machine([gpu], hcas))
    assert choice.hcas == ("pf",)
    # In a pod only the function is there, and is taken.
    assert choose(_machine([gpu], [("vf0", functions[0], _port())])).hcas == ("vf0",)


def test_infiniband_and_ethernet_are_not_mixed() -> None:
    """NCCL refuses to join them; an Azure VM has eight InfiniBand cards and one Ethernet one without a known place."""
    hcas = [(f"ib{idx}", None, _port(400.0)) for idx in range(8)]
    hcas.append(("eth", None, _port(400.0, layer="Ethernet")))
    choice = choose(_machine([], hcas))
    assert choice.transport == "infiniband"
    assert "eth" in choice.excluded


def test_a_device_without_device_node_cannot_be_chosen() -> None:
    facts = _machine([], [("a", None, _port()), ("b", None, _port())])
    facts = replace(
        facts, hcas=(replace(facts.hcas[0], has_device_node=False), replace(facts.hcas[1], has_device_node=True))
    )
    assert choose(facts).hcas == ("b",)


def test_the_port_is_named_only_where_a_card_has_several() -> None:
    ports = (_port(), replace(_port(state="DOWN"), port=2))
    facts = NodeFacts("a", hcas=(Hca("two", ports=ports), Hca("one", ports=(_port(),))))
    assert [port.value(facts) for port in choose(facts).ports] == ["two:1", "one"]

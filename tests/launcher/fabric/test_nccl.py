"""What NCCL does by itself, replayed: name lists, GIDs, interfaces."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.fabric.facts import Gid, HcaPort, Netdev
from launcher.fabric.nccl import (
    default_interfaces,
    gid_index,
    gid_problem,
    is_routable_gid,
    names_value,
    parse_names,
    parse_version,
)


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        ("mlx5_1", {"mlx5_1", "mlx5_10"}),
        ("=mlx5_1", {"mlx5_1"}),
        ("^mlx5_1", {"mlx5_0"}),
        ("^=mlx5_1", {"mlx5_0", "mlx5_10"}),
        ("=mlx5_0,mlx5_10", {"mlx5_0", "mlx5_10"}),
        ("=mlx5_0:1,mlx5_1:2", {"mlx5_0"}),
        ("", {"mlx5_0", "mlx5_1", "mlx5_10"}),
    ],
)
def test_name_lists_are_read_as_nccl_reads_them(value: str, taken: set[str]) -> None:
    """Prefixes are the classic trap: mlx5_1 also takes mlx5_10."""
    names = parse_names(value)
    assert {name for name in ("mlx5_0", "mlx5_1", "mlx5_10") if names.takes(name, 1)} == taken


@given(st.lists(st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True), min_size=1, unique=True))
def test_what_we_write_is_read_back_exactly(names: list[str]) -> None:
    value = parse_names(names_value(names))
    assert all(value.takes(name, 1) for name in names)
    assert not value.takes("Z" + names[0], 1)
    assert not value.takes(names[0] + "Z", 1)


@given(st.text(max_size=30))
def test_any_text_is_some_name_list(value: str) -> None:
    assert parse_names(value).takes("x", 1) in (True, False)


LINK_LOCAL, V4, V6 = "fe80::1", "::ffff:10.0.0.1", "2001:db8::1"


def _port(*entries: tuple[int, str, str | None]) -> HcaPort:
    return HcaPort(1, "ACTIVE", link_layer="Ethernet", gids=tuple(Gid(*entry) for entry in entries))


@pytest.mark.parametrize(
    ("entries", "index"),
    [
        # The usual table of one address.
        (
            [
                (0, LINK_LOCAL, "IB/RoCE v1"),
                (1, LINK_LOCAL, "RoCE v2"),
                (2, V4, "IB/RoCE v1"),
                (3, V4, "RoCE v2"),
            ],
            3,
        ),
        # A pod with macvlan: the first slots belong to another namespace.
        ([(6, V4, "IB/RoCE v1"), (7, V4, "RoCE v2")], 7),
        # Version 2 listed before version 1.
        ([(0, LINK_LOCAL, "RoCE v2"), (4, V4, "RoCE v2"), (5, V4, "IB/RoCE v1")], 4),
        # The address family counts before the version: IPv6 is passed over.
        ([(1, V6, "RoCE v2"), (2, V4, "RoCE v2")], 2),
        # Nothing that fits: it stays at 0, and the connection fails.
        ([(0, LINK_LOCAL, "IB/RoCE v1"), (1, LINK_LOCAL, "RoCE v2")], 0),
        ([], 0),
    ],
)
def test_gid_is_the_one_that_nccl_arrives_at(entries: list[tuple[int, str, str]], index: int) -> None:
    assert gid_index(_port(*entries)) == index


def test_ipv6_fabric_needs_the_family() -> None:
    port = _port((0, LINK_LOCAL, "RoCE v2"), (1, V6, "IB/RoCE v1"), (2, V6, "RoCE v2"))
    assert gid_problem(port, gid_index(port)) is not None
    assert gid_index(port, family="AF_INET6") == 2
    assert gid_problem(port, 2) is None


gids = st.builds(
    lambda index, gid, kind: (index, gid, kind),
    st.integers(0, 20),
    st.one_of(
        st.ip_addresses(v=4).map(lambda ip: f"::ffff:{ip}"),
        st.ip_addresses(v=6).map(str),
        st.sampled_from([LINK_LOCAL, V4]),
    ),
    st.sampled_from(["IB/RoCE v1", "RoCE v2", None]),
)


@given(st.lists(gids, unique_by=lambda entry: entry[0], max_size=10))
def test_a_routable_v2_entry_with_ipv4_is_found_wherever_it_stands(
    entries: list[tuple[int, str, str | None]],
) -> None:
    """The order and the holes of the table differ from host to host."""
    port = _port(*entries)
    fitting = {
        index
        for index, gid, kind in entries
        if kind == "RoCE v2" and ipaddress.IPv6Address(gid).ipv4_mapped is not None and is_routable_gid(gid)
    }
    if fitting:
        assert gid_index(port) in fitting


def _netdev(name: str, *, operstate: str = "up", address: str | None = "10.0.0.1/24") -> Netdev:
    return Netdev(name, operstate=operstate, addresses=(address,) if address else ())


def test_interfaces_in_the_order_of_the_guide() -> None:
    """ib* first, then anything but docker, lo and virbr: a tailscale or cni interface can win."""
    lo, docker, tail, eth, ib = (_netdev(name) for name in ("lo", "docker0", "tailscale0", "eth0", "ib0"))
    assert default_interfaces([lo, docker, tail, eth, ib]) == ["ib0"]
    assert default_interfaces([lo, docker, tail, eth]) == ["tailscale0", "eth0"]
    assert default_interfaces([lo, docker]) == ["docker0"]
    assert default_interfaces([lo]) == ["lo"]
    assert default_interfaces([_netdev("eth0", operstate="down"), _netdev("eth1", address=None)]) == []


@pytest.mark.parametrize(
    ("text", "version"),
    [("2.27.5", (2, 27, 5)), ("2.18.5+cuda12.1", (2, 18, 5)), ("6.8.0-1021-aws", (6, 8, 0)), ("x", None), (None, None)],
)
def test_versions(text: str | None, version: tuple[int, ...] | None) -> None:
    assert parse_version(text) == version

"""The daemon's configuration and the numbers that people write."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.daemon.config import (
    AT_ONCE,
    AT_ONCE_WITH_PEERS,
    MAX_SOCKET_PATH_BYTES,
    MIN_CAPACITY_BYTES,
    DaemonConfig,
    format_bytes,
    parse_address,
    parse_bytes,
)
from cache.daemon.peerconfig import PeerConfig
from cache.errors import CacheConfigError


def config(**changes: object) -> DaemonConfig:
    values = {"dir": Path("/c"), "capacity_bytes": 1 << 30, "socket": Path("/c/s"), **changes}
    return DaemonConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0), ("4096", 4096), ("1_000", 1000), ("200GB", 200 * 10**9), ("200gb", 200 * 10**9), ("1.5TiB", 3 * 2**39),
        ("64 MiB", 64 * 2**20), ("64Mi", 64 * 2**20), ("1k", 1000), ("1Ki", 1024), (" 7 B ", 7), ("0.5KiB", 512),
    ],
)  # fmt: skip
def test_sizes_are_understood_as_people_write_them(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "GB", "-1", "1.2.3", "1 XB", "nan", "inf", "1e400", "0x10", "12 apples", "1ib", "5kk", "99999999TiB", "--1"],
)
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(CacheConfigError, match="write it like"):
        parse_bytes(text)


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_configuration_error(text: str) -> None:
    with contextlib.suppress(CacheConfigError):
        assert parse_bytes(text) >= 0


@given(st.integers(0, 2**60))
def test_a_size_that_we_print_is_understood_and_nearly_the_same(count: int) -> None:
    assert abs(parse_bytes(format_bytes(count)) - count) <= 0.006 * count


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:9400", ("127.0.0.1", 9400)),
        (":0", ("127.0.0.1", 0)),
        ("[::1]:80", ("::1", 80)),
        ("h:65535", ("h", 65535)),
    ],
)
def test_addresses_are_understood(text: str, expected: tuple[str, int]) -> None:
    assert parse_address(text) == expected


@pytest.mark.parametrize("text", ["", "host", "host:", "host:x", "host:65536", "host:-1", "host:²"])
def test_what_is_no_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(CacheConfigError, match="host:port"):
        parse_address(text)


def test_a_capacity_below_two_blocks_is_refused() -> None:
    assert config(capacity_bytes=MIN_CAPACITY_BYTES).capacity_bytes == MIN_CAPACITY_BYTES
    with pytest.raises(CacheConfigError, match="too small"):
        config(capacity_bytes=MIN_CAPACITY_BYTES - 1)


def test_a_socket_path_is_measured_in_bytes_as_the_kernel_does() -> None:
    """é is one character and two bytes; the kernel would cut the address silently."""
    fits = "/" + "é" * ((MAX_SOCKET_PATH_BYTES - 1) // 2)
    assert config(socket=Path(fits)).socket == Path(fits)
    with pytest.raises(CacheConfigError, match="the kernel allows 107"):
        config(socket=Path(fits + "é"))


@pytest.mark.parametrize("name", ["max_files", "num_workers", "max_in_flight"])
def test_counts_must_be_positive(name: str) -> None:
    with pytest.raises(CacheConfigError, match=name):
        config(**{name: 0})


def test_a_node_with_peers_asks_for_less_at_once_unless_told_otherwise() -> None:
    """What all nodes ask at once, the store and the other nodes have to hear."""
    peers = PeerConfig(("127.0.0.1", 0), (("127.0.0.1", 1),))
    assert config().fetches_at_once == AT_ONCE > config(peers=peers).fetches_at_once == AT_ONCE_WITH_PEERS
    assert config(peers=peers, max_in_flight=7).fetches_at_once == 7

"""One peer of the preflight over loopback: it answers who knows its token, and leaves nothing behind."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from launcher.fabric.conduct import Wishes, conduct
from launcher.fabric.peer import LocalPeer


@pytest.fixture
def peers() -> Iterator[tuple[LocalPeer, LocalPeer]]:
    pair = (LocalPeer("127.0.0.1"), LocalPeer("127.0.0.2"))
    yield pair
    for peer in pair:
        peer.close()


def test_peers_reach_each_other_both_ways(peers: tuple[LocalPeer, LocalPeer]) -> None:
    report = conduct(peers, ["a", "b"], Wishes(transfer_s=0.05))
    assert report.unreachable == ()
    assert {(item.source, item.target) for item in report.transfers} >= {(0, 1), (1, 0)}
    assert report.slow_nodes == ()


def test_datagrams_pass_on_loopback(peers: tuple[LocalPeer, LocalPeer]) -> None:
    (outcome,) = peers[0].datagrams([peers[1].endpoint()])
    assert (outcome.is_small_ok, outcome.is_large_ok) == (True, True)
    assert outcome.size > 1000


def test_a_wrong_token_gets_no_answer(peers: tuple[LocalPeer, LocalPeer]) -> None:
    """The port is open to the network for some seconds; nobody else may make it swallow data."""
    stranger = replace(peers[1].endpoint(), token="0" * 32)
    (outcome,) = peers[0].connect([stranger])
    assert not outcome.is_ok
    assert peers[0].transfer(stranger, 0.05) == 0.0


def test_garbage_does_not_end_the_listener(peers: tuple[LocalPeer, LocalPeer]) -> None:
    endpoint = peers[1].endpoint()
    for message in (b"\n", b"[]\n", b"{\n", b"\xff" * 9000):
        with socket.create_connection((endpoint.address, endpoint.tcp_port), 2) as connection:
            connection.sendall(message)
    assert peers[0].connect([endpoint])[0].is_ok


def test_a_closed_port_is_said_to_be_refused(peers: tuple[LocalPeer, LocalPeer]) -> None:
    gone = LocalPeer("127.0.0.3")
    endpoint = gone.endpoint()
    gone.close()
    (outcome,) = peers[0].connect([endpoint])
    assert not outcome.is_ok
    assert "refused" in outcome.problem


def test_names_are_looked_up_both_ways(peers: tuple[LocalPeer, LocalPeer]) -> None:
    """A name that leads to another address than the one that works sends the rendezvous astray."""
    right, astray, unknown = peers[0].lookup(
        [("localhost", "127.0.0.1"), ("localhost", "127.0.0.2"), ("no-such-host.invalid", "127.0.0.2")]
    )
    assert right == ""
    assert "resolves to" in astray
    assert "127.0.0.2" in astray
    assert "no-such-host.invalid" in unknown


def test_a_name_that_fails_everywhere_is_one_finding(peers: tuple[LocalPeer, LocalPeer]) -> None:
    report = conduct(peers, ["localhost", "no-such-host.invalid"], Wishes(transfer_s=0.05, names=True))
    found = [finding for finding in report.findings if finding.id == "name-lookup"]
    assert any("no-such-host.invalid" in finding.evidence for finding in found)
    assert len(found) == len({finding.evidence for finding in found})


def test_ipv6_is_measured_as_well() -> None:
    try:
        peer = LocalPeer("::1")
    except OSError as error:
        pytest.skip(f"no IPv6 on this machine: {error}")
    try:
        assert peer.connect([peer.endpoint()])[0].is_ok
        assert peer.datagrams([peer.endpoint()])[0].is_large_ok
        assert peer.transfer(peer.endpoint(), 0.05) > 0
    finally:
        peer.close()


def test_close_ends_every_thread() -> None:
    before = set(threading.enumerate())
    peer = LocalPeer("127.0.0.1")
    assert peer.connect([peer.endpoint()])[0].is_ok
    peer.close()
    assert set(threading.enumerate()) <= before


def test_the_process_ends_with_its_input() -> None:
    """A peer whose driver died must not go on listening."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher.fabric.serve", "127.0.0.1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["address"] == "127.0.0.1"
        process.communicate(timeout=20)
        assert process.returncode == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_an_address_of_another_machine_is_an_error_message() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launcher.fabric.serve", "192.0.2.77"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "cannot listen on 192.0.2.77" in done.stderr

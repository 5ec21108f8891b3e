"""What is wrong with an address is said in a sentence, within seconds; `ray.init` would retry for half a minute and end the process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from launcher.cluster.ray.agent_actor import AgentActor, user_environment
from launcher.cluster.ray.connection import connect_to_ray
from launcher.cluster.ray.outbox import Outbox
from launcher.cluster.ray.survey import ClusterNode, order_of_nodes
from launcher.errors import ClusterUnavailable


@contextmanager
def listener(answer: bytes) -> Iterator[int]:
    """A port where somebody else serves: takes one connection, reads a little, answers, hangs up."""
    with socket.create_server(("0.0.0.0", 0)) as server:

        def serve() -> None:
            with server.accept()[0] as connection:
                connection.recv(100)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join(5)


def test_a_port_where_nobody_listens_is_told_at_once() -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ClusterUnavailable, match=f"no Ray cluster at .*:{port}.*refused"):
        connect_to_ray(f"127.0.0.1:{port}")


def test_another_service_is_not_mistaken_for_a_cluster() -> None:
    """The dashboard's port instead of the head's is the usual mistake."""
    with listener(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port, pytest.raises(ClusterUnavailable) as caught:
        connect_to_ray(f"127.0.0.1:{port}")
    assert "is no Ray cluster's head" in caught.value.message
    assert "8265" in caught.value.advice


@pytest.mark.parametrize("address", ["localhost", "host:", "host:port", "127.0.0.1"])
def test_what_is_no_address_is_told_as_that(address: str) -> None:
    with pytest.raises(ClusterUnavailable, match="is no address of a Ray cluster"):
        connect_to_ray(address)


def test_a_name_that_does_not_resolve_is_told() -> None:
    with pytest.raises(ClusterUnavailable, match=r"no Ray cluster at no-such-host\.invalid:6379"):
        connect_to_ray("no-such-host.invalid:6379")


def test_nodes_are_in_the_order_in_which_people_count() -> None:
    """Rank 0 is where it was yesterday (vllm#6235 and others: bundle order is not node order)."""
    names = ["node-10", "node-2", "node-1", "alpha"]
    nodes = [ClusterNode(f"id-{name}", name, "10.0.0.1") for name in names]
    assert [node.hostname for node in sorted(nodes, key=order_of_nodes)] == ["alpha", "node-1", "node-2", "node-10"]
    assert sorted([ClusterNode("b", "1node", "2"), ClusterNode("a", "node", "1")], key=order_of_nodes)


def test_ranks_do_not_inherit_what_ray_sets_for_its_own_workers() -> None:
    now = {"OMP_NUM_THREADS": "64", "RAY_JOB_ID": "x", "CUDA_VISIBLE_DEVICES": "2,3", "HOME": "/root"}
    assert user_environment(now, {"HOME": "/root"}) == {"CUDA_VISIBLE_DEVICES": "2,3", "HOME": "/root"}


def test_what_an_answer_lost_with_the_connection_held_is_told_again() -> None:
    """A lost RankExited would be a job that waits for ever."""
    box: Outbox[str] = Outbox()
    box.put("a")
    box.put("b")
    assert box.take(0, 0.0) == ["a", "b"]
    assert box.take(0, 0.0) == ["a", "b"]
    box.put("c")
    assert box.take(2, 0.0) == ["c"]
    assert box.take(2, 0.0) == ["c"]
    assert box.take(3, 0.0) == []


def test_a_full_box_holds_up_the_writer_until_its_bytes_have_arrived() -> None:
    """The rank's file is not read on while the terminal is slow; nothing is dropped."""
    box: Outbox[str] = Outbox(max_bytes=10)
    box.put("a", 10)
    writer = threading.Thread(target=lambda: box.put("b", 10))
    writer.start()
    assert box.take(0, 0.0) == ["a"]
    assert writer.is_alive()
    while "b" not in box.take(1, 5.0):
        pass
    writer.join(5)
    assert not writer.is_alive()


def test_a_closed_box_holds_nobody_up() -> None:
    box: Outbox[str] = Outbox(max_bytes=1)
    box.put("a", 1)
    box.close()
    box.put("b", 1)
    assert box.take(0, 3600) == ["a", "b"]
    assert box.take(2, 3600) == []


def test_an_agent_that_has_not_begun_can_be_told_anything() -> None:
    """Commands may cross with a start that failed; they must not raise in the actor."""
    actor = AgentActor()
    actor.open_store(0)
    actor.close()
    assert actor.poll_events(0, 0, 0.0) == (1, [])
    assert actor.poll_outputs(0, 0.0) == []

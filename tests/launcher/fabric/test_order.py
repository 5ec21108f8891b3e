"""The order of nodes, against every order there is."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from ray.util.placement_group import _validate_topology_strategy

from launcher.fabric.facts import Gpu, Kubernetes, NodeFacts
from launcher.fabric.order import crossings, order_nodes, packing, place_of

PLACES = st.integers(1, 3).flatmap(
    lambda depth: st.lists(st.tuples(*[st.sampled_from(["a", "b", "c", None])] * depth), min_size=1, max_size=6)
)


@settings(max_examples=120, deadline=None)
@given(PLACES)
def test_no_order_has_fewer_edges_between_groups_at_any_level(places: list[tuple[str | None, ...]]) -> None:
    """An edge between racks costs a multiple of one within; brute force over all rings is the judge."""
    found = order_nodes(places)
    assert sorted(found.positions) == list(range(len(places)))
    for level in range(len(places[0])):
        best = min(crossings(places, order, level) for order in itertools.permutations(range(len(places))))
        assert crossings(places, found.positions, level) == best


@settings(max_examples=100, deadline=None)
@given(PLACES)
def test_the_order_is_stable_over_restarts(places: list[tuple[str | None, ...]]) -> None:
    """Ranks that move for nothing cost caches, logs and checkpoints their place."""
    first = order_nodes(places)
    previous = {position: rank for rank, position in enumerate(first.positions)}
    assert order_nodes(places, previous=previous).positions == first.positions


@settings(max_examples=100, deadline=None)
@given(PLACES, st.data())
def test_survivors_keep_their_order_when_a_node_is_lost(
    places: list[tuple[str | None, ...]], data: st.DataObject
) -> None:
    first = order_nodes(places).positions
    lost = data.draw(st.sampled_from(range(len(places))))
    kept = [position for position in range(len(places)) if position != lost]
    previous = {kept.index(position): rank for rank, position in enumerate(first) if position != lost}
    again = order_nodes([places[position] for position in kept], previous=previous).positions
    assert [kept[position] for position in again] == [position for position in first if position != lost]


def test_without_labels_the_given_order_stays() -> None:
    order = order_nodes([(None, None)] * 4)
    assert order.positions == (0, 1, 2, 3)
    assert "no label" in order.reason


def test_racks_are_put_side_by_side_and_the_reason_counts() -> None:
    nodes = [
        NodeFacts(f"n{idx}", kubernetes=Kubernetes(labels={"topology.kubernetes.io/rack": "ab"[idx % 2]}))
        for idx in range(6)
    ]
    order = order_nodes([place_of(node) for node in nodes])
    assert order.positions == (0, 2, 4, 1, 3, 5)
    assert "2 of 6 ring edges" in order.reason
    assert "(6 as given)" in order.reason


def test_nvlink_domain_is_the_narrowest_group() -> None:
    nodes = [NodeFacts(f"n{idx}", gpus=(Gpu(0, cluster_uuid=f"domain-{idx % 2}", clique_id=1),)) for idx in range(4)]
    assert order_nodes([place_of(node) for node in nodes]).positions == (0, 2, 1, 3)


def _labels(racks: str) -> list[dict[str, str]]:
    return [
        {"topology.kubernetes.io/zone": "z" + rack.lower()[0], "topology.kubernetes.io/rack": rack} for rack in racks
    ]


def test_the_narrowest_group_that_holds_the_gang_is_packed() -> None:
    """Four nodes fit in one rack; six need the zone; ten fit nowhere."""
    labels = _labels("AAAABBBB")
    assert packing(labels, 4).label == "topology.kubernetes.io/rack"
    labels = [{"topology.kubernetes.io/zone": "z1", **label} for label in _labels("AABBCC")]
    labels = [{**label, "topology.kubernetes.io/zone": "z1" if idx < 4 else "z2"} for idx, label in enumerate(labels)]
    assert packing(labels, 4).label == "topology.kubernetes.io/zone"
    assert packing(labels, 6).label is None
    assert packing([{}] * 4, 2).strategy() is None


def test_a_label_that_all_share_is_not_named() -> None:
    """It restricts nothing, and a node without it could never be used."""
    assert packing(_labels("AAAA"), 2).label is None


@given(st.lists(st.sampled_from("ABC"), min_size=1, max_size=8), st.integers(1, 8))
def test_ray_accepts_the_strategy_and_can_meet_it(racks: list[str], num_nodes: int) -> None:
    """A label that no group can meet would leave the placement group pending for ever."""
    found = packing(_labels("".join(racks)), num_nodes)
    strategy = found.strategy()
    if strategy is None:
        return
    _validate_topology_strategy(strategy)
    assert found.label is not None
    values = [label[found.label] for label in _labels("".join(racks))]
    assert max(values.count(value) for value in values) >= num_nodes

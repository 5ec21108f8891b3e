"""The question whether a gang fits is answered as trying every choice of nodes would answer it, and the advice given is true."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.gang.advice import find_change
from launcher.gang.offers import GangRequest, NodeGroup, NodeOffer, View
from launcher.gang.placement import Placement, Refusal, Waiting, place, resolve_procs_per_node


def offer(name: str, total: dict[str, float], free: dict[str, float] | None = None, group: str = "") -> NodeOffer:
    return NodeOffer(name, name, total, total if free is None else free, group)


# Against brute force: choose the nodes and hand out the ranks one by one.


def gives(amounts: dict[str, float], request: GangRequest) -> bool:
    """Hands out one rank after the other, as a scheduler would, in Ray's smallest units."""
    left = {name: round(amount * 10_000) for name, amount in amounts.items()}
    shares = [request.per_node, *[request.per_proc] * request.procs_per_node]
    for share in shares:
        for name, amount in share.items():
            if round(amount * 10_000) == 0:
                continue
            left[name] = left.get(name, 0) - round(amount * 10_000)
            if left[name] < 0:
                return False
    return True


def some_nodes_give(request: GangRequest, nodes: list[NodeOffer], view: View) -> bool:
    return any(
        all(gives(dict(view.of(node)), request) for node in chosen)
        for chosen in itertools.combinations(nodes, request.min_nodes)
    )


amounts = st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0, 2.0, 3.0, 4.0, 8.0])
names = st.sampled_from(["CPU", "GPU", "rdma"])


@st.composite
def offers(draw: st.DrawFn) -> NodeOffer:
    total = draw(st.dictionaries(names, amounts, max_size=3))
    free = {name: min(amount, draw(amounts)) for name, amount in total.items()}
    host = draw(st.sampled_from(["a", "b", "c"]))
    return NodeOffer(f"{host}-{draw(st.integers(0, 99))}", host, total, free)


@st.composite
def requests(draw: st.DrawFn) -> GangRequest:
    low = draw(st.integers(1, 4))
    return GangRequest(
        low,
        low + draw(st.integers(0, 2)),
        draw(st.integers(1, 5)),
        draw(st.dictionaries(names, amounts, max_size=3)),
        draw(st.dictionaries(names, amounts, max_size=2)),
    )


node_lists = st.lists(offers(), max_size=5)


@given(requests(), node_lists)
def test_placed_waiting_or_refused_as_trying_every_choice_of_nodes_says(
    request: GangRequest, nodes: list[NodeOffer]
) -> None:
    """The answer stands before the scheduler is asked, so it must be the scheduler's."""
    answer = place(request, nodes)
    if some_nodes_give(request, nodes, View.FREE):
        assert isinstance(answer, Placement)
    elif some_nodes_give(request, nodes, View.TOTAL):
        assert isinstance(answer, Waiting)
        assert not answer.for_growth
    else:
        assert isinstance(answer, Refusal)


@given(requests(), node_lists)
def test_a_placement_takes_as_many_nodes_as_fit_and_were_asked(request: GangRequest, nodes: list[NodeOffer]) -> None:
    answer = place(request, nodes)
    if isinstance(answer, Placement):
        fixed = replace(request, min_nodes=answer.num_nodes, max_nodes=answer.num_nodes)
        assert some_nodes_give(fixed, nodes, View.FREE)
        if answer.num_nodes < request.max_nodes:
            assert not some_nodes_give(
                replace(fixed, min_nodes=answer.num_nodes + 1, max_nodes=answer.num_nodes + 1), nodes, View.FREE
            )


@given(requests(), node_lists, st.sampled_from(View))
def test_the_advised_change_fits(request: GangRequest, nodes: list[NodeOffer], view: View) -> None:
    """Advice that is refused in its turn is worse than none."""
    if some_nodes_give(request, nodes, view):
        return
    change = find_change(request, nodes, view)
    if change is not None:
        assert some_nodes_give(change.request, nodes, view), change.flags


@given(requests(), node_lists, st.sampled_from(View))
def test_no_fewer_nodes_or_ranks_would_keep_more_ranks_than_the_advice(
    request: GangRequest, nodes: list[NodeOffer], view: View
) -> None:
    """Of all the smaller gangs that fit, the advice is at least as large as the largest that one flag gives."""
    if some_nodes_give(request, nodes, view):
        return
    by_ranks = [replace(request, procs_per_node=procs) for procs in range(1, request.procs_per_node)]
    by_nodes = [replace(request, min_nodes=count, max_nodes=count) for count in range(1, request.min_nodes)]
    fitting = [
        smaller.min_nodes * smaller.procs_per_node
        for smaller in by_ranks + by_nodes
        if some_nodes_give(smaller, nodes, view)
    ]
    if fitting:
        change = find_change(request, nodes, view)
        assert change is not None
        assert change.request.min_nodes * change.request.procs_per_node >= max(fitting)


@given(requests(), node_lists)
def test_the_shortfall_is_true(request: GangRequest, nodes: list[NodeOffer]) -> None:
    """What is said to lack, lacks on the node that is named."""
    answer = place(request, nodes)
    if isinstance(answer, Placement):
        return
    shortfall = answer.shortfall
    if shortfall.resource == "nodes":
        assert len(nodes) < request.min_nodes
        return
    have = shortfall.free if isinstance(answer, Waiting) else shortfall.total
    assert have < shortfall.asked == request.bundle[shortfall.resource]
    assert any(
        node.host == shortfall.host
        and node.total.get(shortfall.resource, 0) == shortfall.total
        and node.free.get(shortfall.resource, 0) == shortfall.free
        for node in nodes
    )


# Cases that people meet, and what they read.

GPU_NODES = [offer(f"gpu-{idx}", {"GPU": 8, "CPU": 96}) for idx in range(3)]


def test_a_refusal_names_resource_asked_total_free_nearest_node_and_a_change() -> None:
    nodes = [*GPU_NODES, offer("small", {"GPU": 6, "CPU": 32}, {"GPU": 2, "CPU": 32})]
    answer = place(GangRequest(4, 4, 8, {"GPU": 1, "CPU": 1}), nodes)
    assert isinstance(answer, Refusal)
    assert answer.reason == (
        "4 nodes × 8 ranks ask for 8 GPU and 8 CPU on each node, but 3 of 4 nodes could hold it: "
        "the nearest node small lacks GPU (asked 8, total 6, free 2)"
    )
    assert answer.advice == "`--nproc-per-node 6` would fit once others let go"


def test_too_few_nodes_are_called_nodes() -> None:
    answer = place(GangRequest(4, 4, 8, {"GPU": 1}), GPU_NODES)
    assert isinstance(answer, Refusal)
    assert answer.shortfall.resource == "nodes"
    assert "the cluster has 3 nodes, 4 are asked" in answer.reason
    assert answer.advice == "`--nnodes 3` would fit now"


def test_busy_nodes_mean_waiting_with_what_fits_now() -> None:
    nodes = [offer("a", {"CPU": 8}, {"CPU": 8}), offer("b", {"CPU": 8}, {"CPU": 2})]
    answer = place(GangRequest(2, 2, 4, {"CPU": 1}), nodes)
    assert isinstance(answer, Waiting)
    assert "2 of 2 nodes could hold it, 1 can now" in answer.reason
    assert "nearest node b lacks CPU (asked 4, total 8, free 2)" in answer.reason
    assert answer.change is not None


def test_fewer_cpus_per_rank_are_advised_before_fewer_ranks() -> None:
    """CPUs are a word given to the scheduler; a rank less changes the training."""
    answer = place(GangRequest(1, 1, 8, {"GPU": 1, "CPU": 16}), [offer("a", {"GPU": 8, "CPU": 96})])
    assert isinstance(answer, Refusal)
    assert answer.change is not None
    assert answer.change.flags == "--cpus-per-proc 12"


def test_a_resource_that_no_node_has_is_named_with_what_to_leave_out() -> None:
    answer = place(GangRequest(1, 1, 2, {"GPU": 1}), [offer("a", {"CPU": 8})])
    assert isinstance(answer, Refusal)
    assert answer.shortfall.resource == "GPU"
    assert answer.change is not None
    assert answer.change.flags == "--gpus-per-proc 0"


def test_nobody_is_advised_to_do_without_what_others_hold_for_now() -> None:
    """`--cpus-per-proc 0` would fit, onto CPUs on which somebody trains."""
    answer = place(GangRequest(1, 1, 1, {"CPU": 1}), [offer("a", {"CPU": 8}, {"CPU": 0})])
    assert isinstance(answer, Waiting)
    assert (answer.change, answer.advice) == (None, "")


def test_an_empty_cluster_refuses_without_advice() -> None:
    answer = place(GangRequest(1, 1, 1, {"CPU": 1}), [])
    assert isinstance(answer, Refusal)
    assert answer.change is None


def test_a_cluster_that_grows_waits_instead_of_refusing() -> None:
    groups = [NodeGroup("gpu", {"GPU": 8, "CPU": 96}, 4)]
    nodes = [offer("gpu-0", {"GPU": 8, "CPU": 96}, group="gpu")]
    answer = place(GangRequest(4, 4, 8, {"GPU": 1}), nodes, groups)
    assert isinstance(answer, Waiting)
    assert answer.for_growth
    assert "the autoscaler may add 3 more such nodes" in answer.reason


def test_pods_that_may_still_join_are_waited_for_and_it_is_said() -> None:
    """KubeRay starts the job when the head is ready: the workers are being pulled, and a refusal would be a lie."""
    request = GangRequest(min_nodes=2, max_nodes=2, procs_per_node=2, per_proc={"CPU": 1})
    head = NodeOffer("head", "head", {"CPU": 2}, {"CPU": 2})
    assert isinstance(place(request, [head]), Refusal)
    answer = place(request, [head], may_join=True)
    assert isinstance(answer, Waiting)
    assert "1 of the 1 node that joined could hold it, and more pods may still be starting" in answer.reason
    assert isinstance(place(request, [head, replace(head, node_id="worker")], may_join=True), Placement)


def test_growth_is_bounded_by_the_nodes_already_there() -> None:
    """A group of at most 4 with 1 there adds 3, so 5 will never be."""
    groups = [NodeGroup("gpu", {"GPU": 8}, 4)]
    nodes = [offer("gpu-0", {"GPU": 8}, group="gpu")]
    answer = place(GangRequest(5, 5, 8, {"GPU": 1}), nodes, groups)
    assert isinstance(answer, Refusal)
    assert "with all that the autoscaler may add 4 nodes could hold it at most" in answer.reason


def test_growth_without_a_bound_always_waits() -> None:
    answer = place(GangRequest(500, 500, 8, {"GPU": 1}), [], [NodeGroup("gpu", {"GPU": 8}, None)])
    assert isinstance(answer, Waiting)


def test_a_group_whose_nodes_are_too_small_does_not_count_as_growth() -> None:
    answer = place(GangRequest(1, 1, 8, {"GPU": 1}), [], [NodeGroup("cpu", {"CPU": 64}, None)])
    assert isinstance(answer, Refusal)


def test_nothing_asked_fits_any_node_but_not_none() -> None:
    assert isinstance(place(GangRequest(1, 1, 4), [offer("a", {})]), Placement)
    assert isinstance(place(GangRequest(2, 2, 4), [offer("a", {})]), Refusal)


@pytest.mark.parametrize(
    ("wish", "min_nodes", "expected"),
    [("gpu", 1, 8), ("gpu", 2, 4), ("gpu", 3, 0), ("cpu", 3, 2), ("auto", 2, 4), ("auto", 3, 2), ("cpu", 4, 0)],
)
def test_a_wished_number_is_what_that_many_nodes_can_each_give(wish: str, min_nodes: int, expected: int) -> None:
    nodes = [offer("a", {"GPU": 8, "CPU": 96}), offer("b", {"GPU": 4, "CPU": 96}), offer("c", {"CPU": 2})]
    assert resolve_procs_per_node(wish, nodes, min_nodes) == expected


def test_a_thousand_nodes_and_a_million_ranks_are_decided_by_arithmetic_not_by_trying() -> None:
    """A mistyped number must not freeze the command (this test would not end)."""
    nodes = [offer(f"n{idx}", {"CPU": 64, "GPU": 8}) for idx in range(1000)]
    assert isinstance(place(GangRequest(900, 1000, 1_000_000_000, {"CPU": 1}), nodes), Refusal)

"""Says whether a gang fits a cluster, and if not, why not and what would.

A placement group that stays pending says nothing (ray#47792, ray#24259, ray#47439), so the question is answered here before it is
asked there: from the nodes' total and free resources and the request comes a `Placement`, a `Waiting` (it would fit if others let
go, or if the cluster grew) or a `Refusal` (it never will), the last two with the resource, the nearest node and one change that
would fit. This module knows neither Ray nor the flags' parser: who asks translates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.gang.advice import Change, Shortfall, describe_shortfall, find_change, find_shortfall
from launcher.gang.offers import (
    CPU,
    GPU,
    GangRequest,
    NodeGroup,
    NodeOffer,
    View,
    count_holding,
    describe,
    describe_request,
    holds,
    plural,
    units,
)


@dataclass(frozen=True, slots=True)
class Placement:
    """The gang fits now on `num_nodes` nodes."""

    num_nodes: int
    bundle: Mapping[str, float]
    reason: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """The gang does not fit now, and may later."""

    shortfall: Shortfall
    change: Change | None
    for_growth: bool
    """True: only more nodes can help. False: others' ending helps."""
    reason: str
    advice: str
    """The change and what it would do, in a sentence; empty if none helps."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The gang will not fit, however long we wait."""

    shortfall: Shortfall
    change: Change | None
    reason: str
    advice: str


def place(
    request: GangRequest, nodes: Sequence[NodeOffer], groups: Sequence[NodeGroup] = (), *, may_join: bool = False
) -> Placement | Waiting | Refusal:
    """Decide for a cluster as it is now; `groups` is what an autoscaler says it may add (empty: the cluster does not grow).

    `may_join`: nodes that nobody has announced may still come (pods that are being pulled), so that nothing is refused for ever.
    """
    bundle = request.bundle
    num_free = count_holding(bundle, nodes, View.FREE)
    if num_free >= request.min_nodes:
        num_nodes = min(num_free, request.max_nodes)
        return Placement(
            num_nodes, bundle, f"{num_free} of {len(nodes)} nodes have {describe(bundle)} free; taking {num_nodes}"
        )
    num_total = count_holding(bundle, nodes, View.TOTAL)
    if num_total >= request.min_nodes:
        return _waiting_for_others(request, nodes, num_total, num_free)
    growth = growth_room(bundle, nodes, groups)
    if growth is None or num_total + growth >= request.min_nodes:
        return _waiting_for_growth(request, nodes, num_total, growth)
    if may_join:
        return _waiting_for_nodes(request, nodes, num_total)
    return _refusal(request, nodes, num_total + growth, groups)


def growth_room(bundle: Mapping[str, float], nodes: Sequence[NodeOffer], groups: Sequence[NodeGroup]) -> int | None:
    """How many more nodes that hold the bundle an autoscaler may add; None if it may add any number."""
    room = 0
    for group in groups:
        if not holds(bundle, group.resources):
            continue
        if group.max_nodes is None:
            return None
        room += max(0, group.max_nodes - sum(node.group == group.name for node in nodes))
    return room


def resolve_procs_per_node(wish: str, nodes: Sequence[NodeOffer], min_nodes: int) -> int:
    """`auto`, `gpu` or `cpu` as a number: the most that `min_nodes` nodes can each give; 0 if they cannot give one.

    torchrun asks each machine for itself; here the cluster is asked, because the command often runs on a machine without a GPU.
    """
    if wish == "gpu":
        return _most_on_each(GPU, nodes, min_nodes)
    if wish == "cpu":
        return _most_on_each(CPU, nodes, min_nodes)
    if wish == "auto":
        return _most_on_each(GPU, nodes, min_nodes) or _most_on_each(CPU, nodes, min_nodes)
    raise ValueError(f"{wish!r}: expected auto, gpu or cpu")


def default_gpus_per_proc(nodes: Sequence[NodeOffer], groups: Sequence[NodeGroup] = ()) -> float:
    """One GPU for each rank where any node has or may have one, else none: who has GPUs trains on them."""
    amounts = [node.total for node in nodes] + [group.resources for group in groups]
    return 1.0 if any(units(amount.get(GPU, 0)) > 0 for amount in amounts) else 0.0


def _most_on_each(resource: str, nodes: Sequence[NodeOffer], min_nodes: int) -> int:
    counts = sorted((int(node.total.get(resource, 0)) for node in nodes), reverse=True)
    return counts[min_nodes - 1] if len(counts) >= min_nodes else 0


def _waiting_for_others(request: GangRequest, nodes: Sequence[NodeOffer], num_total: int, num_free: int) -> Waiting:
    shortfall = find_shortfall(request, nodes, View.FREE)
    change = find_change(request, nodes, View.FREE)
    reason = (
        f"{describe_request(request)}; {num_total} of {len(nodes)} nodes could hold it, {num_free} can now: "
        f"{describe_shortfall(shortfall)}, others hold the rest"
    )
    return Waiting(shortfall, change, for_growth=False, reason=reason, advice=_advice(change, "would fit now"))


def _waiting_for_growth(
    request: GangRequest, nodes: Sequence[NodeOffer], num_total: int, growth: int | None
) -> Waiting:
    shortfall = find_shortfall(request, nodes, View.TOTAL)
    change = find_change(request, nodes, View.TOTAL)
    more = "more such nodes" if growth is None else f"{growth} more such node{plural(growth)}"
    reason = (
        f"{describe_request(request)}; {num_total} of {len(nodes)} nodes could hold it, and the autoscaler may add {more}: "
        f"{describe_shortfall(shortfall)}"
    )
    return Waiting(
        shortfall, change, for_growth=True, reason=reason, advice=_advice(change, "would fit without more nodes")
    )


def _waiting_for_nodes(request: GangRequest, nodes: Sequence[NodeOffer], num_total: int) -> Waiting:
    shortfall = find_shortfall(request, nodes, View.TOTAL)
    change = find_change(request, nodes, View.TOTAL)
    reason = (
        f"{describe_request(request)}; {num_total} of the {len(nodes)} node{plural(len(nodes))} that joined could hold it, "
        f"and more pods may still be starting: {describe_shortfall(shortfall)}"
    )
    return Waiting(
        shortfall, change, for_growth=True, reason=reason, advice=_advice(change, "would fit on what has joined")
    )


def _refusal(
    request: GangRequest, nodes: Sequence[NodeOffer], num_possible: int, groups: Sequence[NodeGroup]
) -> Refusal:
    shortfall = find_shortfall(request, nodes, View.TOTAL)
    change = find_change(request, nodes, View.TOTAL)
    bound = f"{num_possible} of {len(nodes)} nodes could hold it"
    if groups:
        bound = f"with all that the autoscaler may add {num_possible} node{plural(num_possible)} could hold it at most"
    reason = f"{describe_request(request)}, but {bound}: {describe_shortfall(shortfall)}"
    fits_now = change is not None and isinstance(place(change.request, nodes), Placement)
    claim = "would fit now" if fits_now else "would fit once others let go"
    return Refusal(shortfall, change, reason, _advice(change, claim))


def _advice(change: Change | None, claim: str) -> str:
    return f"{change} {claim}" if change else ""

"""Gets the gang's nodes: a placement group (all bundles or none, each on a node of its own), and an agent on each bundle.

Whether the gang fits is decided in `gang.placement`; here it is asked, said and waited for. Everything blocks: one thread runs it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from launcher.cluster.ports import EventSink
from launcher.cluster.ray import survey, topology
from launcher.cluster.ray.agent_actor import EVENT_GROUP, OUTPUT_GROUP, AgentActor, Hello, installed_version
from launcher.errors import RequestRefused
from launcher.gang.events import PlacementWaiting
from launcher.gang.offers import CPU, GPU, GangRequest, plural
from launcher.gang.placement import Placement, Refusal, Waiting, place
from launcher.spec import JobSpec

POLL_S = 0.05
SURVEY_EVERY_S = 1.0
SAY_AGAIN_S = 30.0
"""Whoever watches the terminal wants to see that it still waits; a line every half minute is calm."""
RACE_S = 3.0
"""Where the survey says that it fits and Ray does not place it for so long, somebody else was quicker."""
AGENT_START_S = 60.0
"""A worker process of Ray starts within seconds; on a node that unpacks a large runtime_env first, within tens."""


class Abandoned(Exception):
    """Asked to stop while waiting."""


@dataclass(frozen=True)
class Bundle:
    """A bundle of the group that is placed."""

    idx: int
    node: survey.ClusterNode


@dataclass(frozen=True)
class StartedAgent:
    """An agent that has said hello."""

    node: survey.ClusterNode
    actor: Any
    hello: Hello


class Group:
    """One placement group, and the wait for it."""

    def __init__(
        self,
        request: GangRequest,
        sink: EventSink,
        stop: threading.Event,
        deadline_s: float,
        left_out: Collection[str] = (),
    ) -> None:
        """left_out: ids of nodes that get no bundle."""
        self._request = request
        self._left_out = frozenset(left_out)
        self._sink = sink
        self._stop = stop
        self._deadline_s = deadline_s
        self._said: tuple[str, float] = ("", 0.0)
        self._fits_since_s: float | None = None
        self._group: Any = None
        self._may_pack = True
        self._is_packed = False

    def create(self) -> list[Bundle]:
        """Waits until the group is placed. Raises RequestRefused or Abandoned; then nothing is held."""
        try:
            answer = self._ask()
            num_nodes = answer.num_nodes if isinstance(answer, Placement) else self._request.min_nodes
            # Also where we must wait: a pending group is the demand that an autoscaler sees.
            self._ask_ray(num_nodes)
            asked_s = time.monotonic()
            while not self._is_created():
                answer = self._ask_every_second(answer)
                if self._is_packed and time.monotonic() - asked_s > RACE_S:
                    # Somebody took a node of the rack: better apart than not at all.
                    self.remove()
                    self._may_pack, asked_s = False, time.monotonic()
                    self._ask_ray(num_nodes)
                if num_nodes > self._request.min_nodes and time.monotonic() - asked_s > RACE_S:
                    self.remove()
                    num_nodes, asked_s = self._request.min_nodes, time.monotonic()
                    self._ask_ray(num_nodes)
                self._wait_a_little(answer)
            return self.bundles()
        except BaseException:
            self.remove()
            raise

    @property
    def amounts(self) -> Mapping[str, float]:
        """What an agent holds of its node."""
        return self._request.bundle

    def bundles(self) -> list[Bundle]:
        """What is placed on live nodes now."""
        nodes = survey.live_nodes()
        where = placement_group_table(self._group)["bundles_to_node_id"]
        return [Bundle(idx, nodes[node_id]) for idx, node_id in sorted(where.items()) if node_id in nodes]

    def remove(self) -> None:
        """Gives everything back; idempotent."""
        if self._group is not None:
            with contextlib.suppress(Exception):
                remove_placement_group(self._group)
            self._group = None

    def start_actor(self, bundle: Bundle) -> Any:
        """An AgentActor that holds the whole bundle, so that the GPUs that its ranks see are the bundle's."""
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle.idx)
        return make_actor(self._request.bundle, strategy)

    def _ask_ray(self, num_nodes: int) -> None:
        # A bundle must ask for something; a byte of memory is something that every node has.
        bundle = self._request.bundle or {"memory": 1.0}
        chosen = topology.choose_packing(self._request.bundle, num_nodes, self._left_out) if self._may_pack else None
        self._is_packed = chosen is not None and chosen.label is not None
        names = ",".join(sorted(self._left_out))
        selector = [{"ray.io/node-id": f"!in({names})"}] * num_nodes if names else None
        self._group = placement_group(
            [bundle] * num_nodes, bundle_label_selector=selector, **topology.arguments(chosen)
        )

    def _is_created(self) -> bool:
        return bool(placement_group_table(self._group)["state"] == "CREATED")

    def _ask(self) -> Placement | Waiting:
        answer = place(self._request, survey.offers(self._left_out), survey.groups(), may_join=survey.may_join())
        self._asked_s = time.monotonic()
        if isinstance(answer, Refusal):
            raise RequestRefused(answer.reason, advice=answer.advice or "`ray status` shows what the cluster has")
        return answer

    def _ask_every_second(self, answer: Placement | Waiting) -> Placement | Waiting:
        return self._ask() if time.monotonic() - self._asked_s >= SURVEY_EVERY_S else answer

    def _wait_a_little(self, answer: Placement | Waiting) -> None:
        """Raises at the deadline; says why we wait when that changes, and now and then."""
        now = time.monotonic()
        if isinstance(answer, Placement):
            reason = f"{answer.reason}, and Ray has not placed it yet"
            self._fits_since_s = self._fits_since_s or now
        else:
            reason = f"{answer.reason}. {answer.advice}".rstrip(". ")
            self._fits_since_s = None
        left_s = self._deadline_s - now
        if left_s <= 0:
            raise RequestRefused(
                f"the nodes did not come free in time: {reason}", advice="--place-timeout SECONDS waits longer"
            )
        text, said_s = self._said
        is_worth_saying = self._fits_since_s is None or now - self._fits_since_s > RACE_S
        if is_worth_saying and (reason != text or now - said_s > SAY_AGAIN_S):
            self._said = (reason, now)
            self._sink.put(PlacementWaiting(reason, left_s))
        if self._stop.wait(POLL_S):
            raise Abandoned


def start_actor_on(node_id: str, amounts: Mapping[str, float]) -> Any:
    """An AgentActor on this very node, without a placement group: for one node there is nothing to be all or none of."""
    return make_actor(amounts, NodeAffinitySchedulingStrategy(node_id, soft=False))


def make_actor(amounts: Mapping[str, float], strategy: Any) -> Any:
    others = {name: amount for name, amount in amounts.items() if name not in (CPU, GPU)}
    return (
        ray.remote(concurrency_groups={EVENT_GROUP: 1, OUTPUT_GROUP: 1})(AgentActor)
        .options(
            num_cpus=amounts.get(CPU, 0),
            num_gpus=amounts.get(GPU, 0),
            resources=others,
            max_restarts=0,
            scheduling_strategy=strategy,
        )
        .remote()
    )


def why_missing(request: GangRequest, num_missing: int, left_out: Collection[str]) -> str:
    """After a loss: what the nodes that are still lacking wait for, in a sentence."""
    lacking = replace(request, min_nodes=num_missing, max_nodes=num_missing)
    answer = place(lacking, survey.offers(left_out), survey.groups(), may_join=survey.may_join())
    return f"{num_missing} more node{plural(num_missing)} needed to go on: {answer.reason}"


def start_agents(group: Group, bundles: Sequence[Bundle], spec: JobSpec, stop: threading.Event) -> list[StartedAgent]:
    """An agent on each bundle, or none. Raises RequestRefused if one cannot run there, Abandoned if asked to stop."""
    use_own_cwd = in_submitted_job()
    actors = [group.start_actor(bundle) for bundle in bundles]
    try:
        hellos = [actor.hello.remote(spec.cwd, use_own_cwd) for actor in actors]
        _wait_for(hellos, bundles, stop)
        heard = [hear(ref, bundle.node) for ref, bundle in zip(hellos, bundles, strict=True)]
        # Ray may have moved a bundle meanwhile, from a node that it has just found dead: where an agent is, it says itself.
        nodes = survey.live_nodes()
        started = [
            StartedAgent(nodes.get(hello.node_id, bundle.node), actor, hello)
            for hello, bundle, actor in zip(heard, bundles, actors, strict=True)
        ]
        for agent in started:
            check(agent.hello, agent.node, spec)
    except BaseException:
        for actor in actors:
            with contextlib.suppress(Exception):
                ray.kill(actor)
        raise
    return started


def in_submitted_job() -> bool:
    """True in a job that Ray submitted: Ray has put its working directory on every node, at a path of its own."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _wait_for(refs: Sequence[Any], bundles: Sequence[Bundle], stop: threading.Event) -> None:
    deadline_s = time.monotonic() + AGENT_START_S
    pending = list(refs)
    while pending:
        _, pending = ray.wait(pending, num_returns=len(pending), timeout=0.2)
        if stop.is_set():
            raise Abandoned
        if pending and time.monotonic() > deadline_s:
            silent = ", ".join(
                bundle.node.hostname for ref, bundle in zip(refs, bundles, strict=True) if ref in pending
            )
            raise RequestRefused(
                f"no agent has started within {AGENT_START_S:g} s on {silent}",
                advice="ray status, and /tmp/ray/session_latest/logs on that node, say more",
            )


def hear(ref: Any, node: survey.ClusterNode) -> Hello:
    try:
        hello: Hello = ray.get(ref)
    except ray.exceptions.RayError as error:
        text = str(error)
        if "No module named 'launcher'" in text or "PackageNotFoundError" in text:
            raise RequestRefused(
                f"railhead is not installed on {node.hostname} ({node.addr})",
                advice=f"install railhead {installed_version()} in the environment in which Ray runs there",
            ) from error
        last = text.strip().splitlines()[-1] if text.strip() else type(error).__name__
        raise RequestRefused(f"no agent can run on {node.hostname} ({node.addr}): {last}") from error
    return hello


def check(hello: Hello, node: survey.ClusterNode, spec: JobSpec) -> None:
    ours = installed_version()
    if hello.railhead != ours:
        raise RequestRefused(
            f"{node.hostname} has railhead {hello.railhead}, this command is {ours}",
            advice=f"install railhead {ours} in the environment in which Ray runs there (here: Python {platform.python_version()})",
        )
    if hello.cwd is None:
        raise RequestRefused(
            f"{node.hostname} has no directory {spec.cwd}, in which the ranks shall run",
            advice="run from a directory that all nodes share, or let Ray bring it: ray job submit --working-dir . -- python -m launcher …",
        )

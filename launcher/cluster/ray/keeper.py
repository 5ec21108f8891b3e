"""After the start: looks for nodes that the gang still lacks, and for held ones that are told to leave.

Once a second it counts what is held against what is wanted (`max_nodes` and the spares). Where some are missing, an agent is tried on each
free node that may be used, several at once, each with a short deadline: a node may look alive to Ray for long after its link was
cut. The first group's bundles come first (Ray places those of lost nodes again, and they are what an autoscaler sees).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray

from launcher.cluster.ray import survey
from launcher.cluster.ray.acquire import Bundle, Group, StartedAgent, check, hear, in_submitted_job, start_actor_on
from launcher.errors import RequestRefused
from launcher.gang.offers import NodeOffer, View, holds
from launcher.spec import JobSpec

LOOK_EVERY_S = 1.0
TRY_S = 15.0
"""An agent starts in one or two seconds; where it takes so long, the node is out of reach or its resources went to somebody else."""
LEAVE_ALONE_S = 15.0
"""How long a node is not tried again after it was lost or could not start an agent."""


@dataclass(frozen=True)
class Wanted:
    """What the keeper needs to know each time."""

    num_missing: int
    held: frozenset[str]
    """Ray's ids of the nodes on which we have an agent."""


@dataclass
class _Trial:
    node: survey.ClusterNode
    actor: Any
    hello: Any
    deadline_s: float


class Keeper:
    """One thread. `wanted` is asked each time; `take` is called with each agent that has started."""

    def __init__(
        self,
        spec: JobSpec,
        group: Group,
        wanted: Callable[[], Wanted],
        take: Callable[[StartedAgent], None],
        on_draining: Callable[[str, float | None], None],
        left_out: Callable[[], Collection[str]],
        on_trouble: Callable[[str], None],
    ) -> None:
        self._spec = spec
        self._group = group
        self._wanted = wanted
        self._take = take
        self._on_draining = on_draining
        self._left_out = left_out
        self._on_trouble = on_trouble
        self._trials: dict[str, _Trial] = {}
        self._alone_until: dict[str, float] = {}
        self._alone_lock = threading.Lock()
        self._said: set[str] = set()
        self._look = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def look_now(self) -> None:
        """Something has changed: a node was lost."""
        self._look.set()

    def leave_alone(self, node_id: str) -> None:
        """The node was lost: it is not tried again for a while. From any thread."""
        with self._alone_lock:
            self._alone_until[node_id] = time.monotonic() + LEAVE_ALONE_S

    def close(self, timeout_s: float) -> None:
        """Ends what is being tried."""
        self._stop.set()
        self._look.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stop.is_set():
            # Whatever Ray says of a head that is away for a moment must not end the looking.
            with contextlib.suppress(Exception):
                self._once()
            # While something is being tried, its first word is waited for more closely.
            self._look.wait(0.05 if self._trials else LOOK_EVERY_S)
            self._look.clear()
        for trial in self._trials.values():
            _end(trial.actor)

    def _once(self) -> None:
        for node_id, deadline_s in survey.draining().items():
            self._on_draining(node_id, deadline_s)
        self._hear_trials()
        wanted = self._wanted()
        room = wanted.num_missing - len(self._trials)
        if room <= 0:
            return
        taken = {*wanted.held, *self._trials, *self._left_out(), *self._still_alone()}
        bundles = [bundle for bundle in self._group.bundles() if bundle.node.node_id not in taken]
        for bundle in bundles[:room]:
            self._try(bundle.node, self._group.start_actor(bundle))
        room -= len(bundles)
        taken |= {bundle.node.node_id for bundle in bundles}
        if room > 0:
            amounts = self._group.amounts
            for node in free_nodes(survey.offers(taken), amounts, survey.live_nodes())[:room]:
                self._try(node, start_actor_on(node.node_id, amounts))

    def _still_alone(self) -> set[str]:
        now = time.monotonic()
        with self._alone_lock:
            self._alone_until = {node_id: until for node_id, until in self._alone_until.items() if until > now}
            return set(self._alone_until)

    def _try(self, node: survey.ClusterNode, actor: Any) -> None:
        hello = actor.hello.remote(self._spec.cwd, in_submitted_job())
        self._trials[node.node_id] = _Trial(node, actor, hello, time.monotonic() + TRY_S)

    def _hear_trials(self) -> None:
        for node_id, trial in list(self._trials.items()):
            ready, _ = ray.wait([trial.hello], timeout=0)
            if ready:
                del self._trials[node_id]
                self._settle(trial)
            elif time.monotonic() >= trial.deadline_s:
                del self._trials[node_id]
                self.leave_alone(node_id)
                _end(trial.actor)

    def _settle(self, trial: _Trial) -> None:
        try:
            agent = StartedAgent(trial.node, trial.actor, hear(trial.hello, trial.node))
            check(agent.hello, agent.node, self._spec)
        except RequestRefused as refused:
            self.leave_alone(trial.node.node_id)
            _end(trial.actor)
            # A free node that cannot be used is said once: the person may have counted on it. Not where Ray could not reach it, for then it
            # is most likely dead, or somebody else was quicker.
            text = f"{trial.node.hostname} is free and cannot be used: {refused.message}"
            if isinstance(refused.__cause__, ray.exceptions.RayTaskError | None) and text not in self._said:
                self._said.add(text)
                self._on_trouble(text)
            return
        # Ray may have moved the bundle meanwhile, from a node that it has just found dead or draining: where an agent is, it says itself.
        where = survey.live_nodes().get(agent.hello.node_id)
        if where is None or (where.node_id != trial.node.node_id and where.node_id in self._wanted().held):
            self.leave_alone(trial.node.node_id)
            _end(trial.actor)
            return
        self._take(replace(agent, node=where))


def free_nodes(
    offers: Collection[NodeOffer], amounts: Mapping[str, float], nodes: Mapping[str, survey.ClusterNode]
) -> list[survey.ClusterNode]:
    """Nodes that hold the bundle now, in the order of the gang."""
    fitting = [
        nodes[offer.node_id] for offer in offers if holds(amounts, View.FREE.of(offer)) and offer.node_id in nodes
    ]
    return sorted(fitting, key=survey.order_of_nodes)


def _end(actor: Any) -> None:
    with contextlib.suppress(Exception):
        ray.kill(actor)


__all__ = ["Bundle", "Keeper", "Wanted", "free_nodes"]

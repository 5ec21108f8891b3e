"""The driver's side of one agent: commands go out without waiting, two threads fetch events and shown output."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import ray

from launcher.cluster.ports import EventSink
from launcher.cluster.ray.agent_actor import EVENT_GROUP, OUTPUT_GROUP
from launcher.gang.events import AttemptPlan, NodeLost
from launcher.gang.world import NodeInfo

HEARTBEAT_S = 1.0
"""How long a poll waits on the node when there is nothing to say."""
SILENCE_S = 10.0
"""A node that has not answered for so long is lost. Ray's own verdict on a silent link takes tens of seconds; a healthy agent answers
every second, and one on a node whose CPUs are all taken within a few."""
BROKEN_S = 3.0
"""The same for a node to which the connection broke: its agent's process has most likely ended, but a network may also recover."""


class RemoteNode:
    """A NodeHandle over an AgentActor."""

    def __init__(self, node: NodeInfo, actor: Any, sink: EventSink) -> None:
        self.node = node
        self._actor = actor
        self._sink = sink
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._fetch_events, name=f"events-{node.hostname}", daemon=True),
            threading.Thread(target=self._fetch_outputs, name=f"logs-{node.hostname}", daemon=True),
        ]

    def start(self) -> None:
        """Begins to fetch."""
        for thread in self._threads:
            thread.start()

    def open_store(self, attempt: int) -> None:
        self._tell("open_store", attempt)

    def start_ranks(self, plan: AttemptPlan) -> None:
        self._tell("start_ranks", plan)

    def stop_attempt(self, attempt: int, grace_s: float, signum: int) -> None:
        self._tell("stop_attempt", attempt, grace_s, signum)

    def ask_to_close(self) -> Any:
        """Asks the agent to end everything; returns what `ray.wait` can wait for, or None. Nothing is delivered after this."""
        self._over.set()
        with contextlib.suppress(ray.exceptions.RayError):
            return self._actor.close.remote()
        return None

    def kill(self) -> None:
        """Ends the actor; its guardian ends what is left of the ranks."""
        self._over.set()
        with contextlib.suppress(Exception):
            ray.kill(self._actor)

    def join(self, timeout_s: float) -> None:
        """Waits for the threads to notice the end."""
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(max(0.0, deadline_s - time.monotonic()))

    @property
    def is_over(self) -> bool:
        """True once the node is lost or closed."""
        return self._over.is_set()

    def _tell(self, method: str, *args: object) -> None:
        if self._over.is_set():
            return
        # What goes wrong over there comes back as an event, and a dead actor as NodeLost from the fetching thread.
        with contextlib.suppress(ray.exceptions.RayError):
            getattr(self._actor, method).remote(*args)

    def _fetch_events(self) -> None:
        heard_s, num_arrived = time.monotonic(), 0
        while not self._over.is_set():
            try:
                poll = self._actor.poll_events.options(concurrency_group=EVENT_GROUP).remote(num_arrived, HEARTBEAT_S)
                batch = ray.get(poll, timeout=SILENCE_S)
            except ray.exceptions.GetTimeoutError:
                self._lose(f"not heard of for {SILENCE_S:g} s")
                return
            except ray.exceptions.ActorUnavailableError:
                if time.monotonic() - heard_s >= BROKEN_S:
                    self._lose(f"the connection to its agent is broken, for {BROKEN_S:g} s already")
                    return
                self._over.wait(0.1)
                continue
            except ray.exceptions.RayError as error:
                self._lose(_why_gone(error))
                return
            heard_s = time.monotonic()
            num_arrived += len(batch)
            for event in batch:
                if not self._over.is_set():
                    self._sink.put(event)

    def _fetch_outputs(self) -> None:
        num_arrived = 0
        while not self._over.is_set():
            try:
                poll = self._actor.poll_outputs.options(concurrency_group=OUTPUT_GROUP)
                outputs = ray.get(poll.remote(num_arrived, HEARTBEAT_S))
            except ray.exceptions.ActorUnavailableError:
                self._over.wait(0.2)
                continue
            except ray.exceptions.RayError:
                return  # the other thread says so
            for output in outputs:
                self._sink.put_log(output)
            num_arrived += len(outputs)

    def _lose(self, reason: str) -> None:
        """Reports the loss, unless it was we who ended the agent."""
        if self._over.is_set():
            return
        self._over.set()
        self._sink.put(NodeLost(self.node.node_id, reason, time.time()))
        self.kill()


def _why_gone(error: Exception) -> str:
    """Ray's many lines in one.

    >>> _why_gone(ray.exceptions.RayError("The actor died.\\n  class_name: AgentActor"))
    'its agent is gone (The actor died.)'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, ray.exceptions.ActorDiedError):
        # "The actor died because its node has died. Node Id: …" stands after the actor's particulars
        for line in lines:
            if "its node has died" in line:
                return "the node has left the cluster"
    return f"its agent is gone ({lines[0] if lines else type(error).__name__})"

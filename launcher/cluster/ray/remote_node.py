"""The driver's side of one agent: commands go out without waiting, two threads fetch events and shown output."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import ray

from launcher.cluster.ports import EventSink
from launcher.cluster.ray.agent_actor import EVENT_GROUP, OUTPUT_GROUP
from launcher.cluster.ray.lease import Terms
from launcher.errors import NodeError
from launcher.gang.events import AttemptPlan, NodeLost
from launcher.gang.world import NodeInfo

OUTPUT_POLL_S = 1.0
"""How long a poll for output waits on the node when there is none."""
LAST_WORDS_S = 0.2
"""When an agent's process has ended, its actor may still say why; not for long."""


class RemoteNode:
    """A NodeHandle over an AgentActor."""

    def __init__(self, node: NodeInfo, actor: Any, sink: EventSink, terms: Terms) -> None:
        self.node = node
        self.lost_at_s: float | None = None
        """Monotonic."""
        self._terms = terms
        self._actor = actor
        self._sink = sink
        self._over = threading.Event()
        self._losing = threading.Lock()
        self._process_ended = threading.Event()
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

    def stop_attempt(self, attempt: int, grace_s: float, signum: int, can_save: bool = False) -> None:
        self._tell("stop_attempt", attempt, grace_s, signum, can_save)

    def share_cache(self, addresses: tuple[str, ...]) -> None:
        """Tells its cache daemon where the job's daemons are."""
        self._tell("share_cache", addresses)

    def take_stacks(self, attempt: int, look: int, is_final: bool) -> None:
        self._tell("take_stacks", attempt, look, is_final)

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

    def process_ended(self) -> None:
        """The agent's process is dead. What its actor says of it within a moment is the better reason."""
        self._process_ended.set()
        timer = threading.Timer(LAST_WORDS_S, self._lose, ["its agent's process is gone"])
        timer.daemon = True
        timer.start()

    def _fetch_events(self) -> None:
        heard_s, num_arrived, last_heard = time.monotonic(), 0, 0
        while not self._over.is_set():
            left_s = heard_s + self._terms.silence_s - time.monotonic()
            if left_s <= 0:
                self._lose(f"not heard of for {self._terms.silence_s:g} s")
                return
            try:
                poll = self._actor.poll_events.options(concurrency_group=EVENT_GROUP)
                last_heard, batch = ray.get(poll.remote(num_arrived, last_heard, self._terms.poll_s), timeout=left_s)
            except ray.exceptions.GetTimeoutError:
                continue
            except ray.exceptions.ActorUnavailableError:
                self._over.wait(0.1)
                continue
            except ray.exceptions.RayError as error:
                if not isinstance(getattr(error, "cause", None), NodeError):
                    # Ray may be wrong: it takes a node for dead that it alone cannot reach, and the ranks there run on. Either the
                    # process's end is seen, or the agent's lease has ended when our patience has.
                    self._process_ended.wait(max(0.0, heard_s + self._terms.silence_s - time.monotonic()))
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
                outputs = ray.get(poll.remote(num_arrived, OUTPUT_POLL_S))
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
        with self._losing:
            if self._over.is_set():
                return
            self.lost_at_s = time.monotonic()
            self._over.set()
        self._sink.put(NodeLost(self.node.node_id, reason, time.time()))
        self.kill()


def _why_gone(error: Exception) -> str:
    """Ray's many lines in one.

    >>> _why_gone(ray.exceptions.RayError("The actor died.\\n  class_name: AgentActor"))
    'its agent is gone (The actor died.)'
    """
    cause = getattr(error, "cause", None)
    if isinstance(cause, NodeError):
        return cause.message
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, ray.exceptions.ActorDiedError):
        # "The actor died because its node has died. Node Id: …" stands after the actor's particulars
        for line in lines:
            if "its node has died" in line:
                return "the node has left the cluster"
    return f"its agent is gone ({lines[0] if lines else type(error).__name__})"

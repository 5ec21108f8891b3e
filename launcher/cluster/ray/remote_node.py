"""The driver's side of one agent: commands go out without waiting, events and shown output are fetched by long-poll.

No thread of its own: one for the events of all nodes, one for their output (`waiter.py`). Output has another, because handing it over
blocks while the terminal is slow.
"""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import Future
from typing import Any

import ray

from launcher.cluster.ports import EventSink
from launcher.cluster.ray.agent_actor import EVENT_GROUP, OUTPUT_GROUP
from launcher.cluster.ray.lease import Terms
from launcher.cluster.ray.parcel import Packer
from launcher.cluster.ray.waiter import Waiter
from launcher.errors import NodeError
from launcher.gang.events import AttemptPlan, NodeLost
from launcher.gang.world import NodeInfo

OUTPUT_POLL_S = 1.0
"""How long a poll for output waits on the node when there is none."""
LAST_WORDS_S = 0.2
"""When an agent's process has ended, its actor may still say why; not for long."""


class RemoteNode:
    """A NodeHandle over an AgentActor."""

    def __init__(
        self, node: NodeInfo, actor: Any, sink: EventSink, terms: Terms, events: Waiter, outputs: Waiter, packer: Packer
    ) -> None:
        self.node = node
        self._terms = terms
        self._actor = actor
        self._sink = sink
        self._events = events
        self._outputs = outputs
        self._packer = packer
        self._over = threading.Event()
        self._losing = threading.Lock()
        # Owned by the thread of events:
        self._heard_s = 0.0
        self._num_arrived = 0
        self._last_heard = 0
        self._why_gone = ""
        self._has_process_ended = False
        # Owned by the thread of output:
        self._num_outputs_arrived = 0

    def start(self) -> None:
        """Begins to fetch."""
        self._heard_s = time.monotonic()
        self._events.after(0.0, self._poll)
        self._events.after(self._terms.silence_s, self._check_silence)
        self._outputs.after(0.0, self._poll_outputs)

    def open_store(self, attempt: int) -> None:
        self._tell("open_store", attempt)

    def start_ranks(self, plan: AttemptPlan) -> None:
        self._tell("start_ranks", self._packer.pack(plan))

    def stop_attempt(self, attempt: int, grace_s: float, signum: int, can_save: bool = False) -> None:
        self._tell("stop_attempt", attempt, grace_s, signum, can_save)

    def share_imports(self, names: tuple[str, ...]) -> None:
        """What ranks on another node have imported."""
        self._tell("share_imports", names)

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
        self._events.after(0.0, self._note_process_ended)

    # --- in the thread of events ----------------------------------------------------------------------------------------------------

    def _note_process_ended(self) -> None:
        self._has_process_ended = True
        if self._why_gone:
            self._lose(self._why_gone)
        else:
            self._events.after(LAST_WORDS_S, lambda: self._lose("its agent's process is gone"))

    def _poll(self) -> None:
        if self._over.is_set():
            return
        poll = self._actor.poll_events.options(concurrency_group=EVENT_GROUP)
        try:
            ref = poll.remote(self._num_arrived, self._last_heard, self._terms.poll_s)
        except ray.exceptions.RayError as error:
            self._is_gone(error)
            return
        self._events.when(ref, self._polled)

    def _polled(self, answer: Future[Any]) -> None:
        if self._over.is_set():
            return
        error = answer.exception()
        if isinstance(error, ray.exceptions.ActorUnavailableError):
            self._events.after(0.1, self._poll)
        elif error is not None:
            self._is_gone(error)
        else:
            self._last_heard, batch = answer.result()
            self._heard_s = time.monotonic()
            self._num_arrived += len(batch)
            for event in batch:
                if not self._over.is_set():
                    self._sink.put(event)
            self._poll()

    def _is_gone(self, error: BaseException) -> None:
        """Ray says so. It may be wrong: it takes a node for dead that it alone cannot reach, and the ranks there run on. Either the
        process's end is seen, or the agent's lease has ended when our patience has."""
        self._why_gone = why_gone(error)
        if isinstance(getattr(error, "cause", None), NodeError) or self._has_process_ended:
            self._lose(self._why_gone)

    def _check_silence(self) -> None:
        if self._over.is_set():
            return
        left_s = self._heard_s + self._terms.silence_s - time.monotonic()
        if left_s > 0:
            self._events.after(left_s, self._check_silence)
        else:
            self._lose(self._why_gone or f"not heard of for {self._terms.silence_s:g} s")

    # --- in the thread of output ----------------------------------------------------------------------------------------------------

    def _poll_outputs(self) -> None:
        if self._over.is_set():
            return
        poll = self._actor.poll_outputs.options(concurrency_group=OUTPUT_GROUP)
        with contextlib.suppress(ray.exceptions.RayError):  # the thread of events says so
            self._outputs.when(poll.remote(self._num_outputs_arrived, OUTPUT_POLL_S), self._polled_outputs)

    def _polled_outputs(self, answer: Future[Any]) -> None:
        error = answer.exception()
        if isinstance(error, ray.exceptions.ActorUnavailableError):
            self._outputs.after(0.2, self._poll_outputs)
        elif error is None:
            outputs = answer.result()
            for output in outputs:
                if not self._over.is_set():
                    self._sink.put_log(output)
            self._num_outputs_arrived += len(outputs)
            self._poll_outputs()

    def _lose(self, reason: str) -> None:
        """Reports the loss, unless it was we who ended the agent."""
        with self._losing:
            if self._over.is_set():
                return
            self._over.set()
        self._sink.put(NodeLost(self.node.node_id, reason, time.time()))
        # Not in this thread, which all nodes wait for: Ray may take its time.
        threading.Thread(target=self.kill, name=f"kill-{self.node.hostname}", daemon=True).start()


def why_gone(error: BaseException) -> str:
    """Ray's many lines in one.

    >>> why_gone(ray.exceptions.RayError("The actor died.\\n  class_name: AgentActor"))
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

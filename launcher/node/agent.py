"""One node's part of the gang: hosts the store if asked, starts ranks, watches them, stops them, follows their output, runs the cache.

A plain class: in the launcher's process on one machine, inside an actor on Ray. It decides nothing about the gang; it
reports facts and does what it is told. Commands return at once; the work is done by threads of the agent's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from launcher.gang.events import AttemptPlan, Event, LogChunk
from launcher.gang.world import NodeInfo
from launcher.spec import JobSpec


class NodeAgent:
    """Same contract as `cluster.ports.NodeHandle` for its commands (any thread may call them; none blocks or raises).

    node: who we are. run_dir: existing directory for logs and records. base_env: environment that ranks start from (usually
    `os.environ` of the agent's process). on_event must not block; on_log may, and while it does the ranks' files are not read on.
    Both are called from threads of the agent.
    """

    def __init__(
        self,
        node: NodeInfo,
        spec: JobSpec,
        run_dir: str,
        base_env: Mapping[str, str],
        on_event: Callable[[Event], None],
        on_log: Callable[[LogChunk], None],
    ) -> None:
        """Starts the agent's threads and, if the spec asks for it, the cache daemon (CacheServing or CacheFailed will follow)."""
        raise NotImplementedError

    def open_store(self, attempt: int) -> None:
        """Binds a port for a fresh TCPStore and starts its host. Answered by StoreOpened or NodeFailed."""
        raise NotImplementedError

    def start_ranks(self, plan: AttemptPlan) -> None:
        """Answered by RanksStarted or NodeFailed; later a RankExited for each rank."""
        raise NotImplementedError

    def stop_attempt(self, attempt: int, grace_s: float) -> None:
        """TERM, grace, KILL. Answered by exactly one AttemptEnded, when nothing of the attempt is alive here and all output is out."""
        raise NotImplementedError

    def close(self) -> None:
        """Kills what is left of any attempt, drains the cache daemon (2 s), ends the threads. Blocks at most some seconds; idempotent."""
        raise NotImplementedError

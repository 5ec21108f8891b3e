"""A node's look at its own hardware, once, in a thread: facts for the launcher, advice for the ranks that start here.

The cheap part of `python -m launcher doctor`. It never fails a job: what goes wrong becomes a sentence in the event. Ranks wait for it only
where their environment depends on it (`is_needed`), and not for ever: a driver that hangs would hang them all.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.gang.events import FabricSurveyed, Notice
from launcher.gang.rank_env import NO_ADVICE, Kept, NodeAdvice, Setting
from launcher.gang.world import NodeInfo
from launcher.node.nccl_logs import NcclPaths
from launcher.spec import JobSpec

if TYPE_CHECKING:
    from launcher.fabric.binding import Bind, Binding
    from launcher.fabric.facts import NodeFacts

PATIENCE_S = 20.0
"""A driver without its persistence daemon may take ten seconds to wake eight GPUs; one that needs longer is taken to hang."""

USER_PREFIXES = ("NCCL_", "GLOO_", "FI_", "RDMAV_", "UCX_", "TORCH_NCCL_", "TORCH_FR_")
USER_NAMES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
"""Variables of a person that bear on the fabric, and go to the launcher with the facts."""

_GPU_SIGNS = ("/dev/nvidiactl", "/dev/dxg", "/proc/driver/nvidia/version")


def is_needed(spec: JobSpec, num_nodes: int) -> bool:
    """Whether anything that ranks are given depends on the hardware: on a laptop without a GPU nothing does, and nobody waits."""
    return num_nodes > 1 or spec.bind == "numa" or spec.preflight or has_gpus()


def has_gpus() -> bool:
    """Whether a driver is loaded; it may have no GPU for us."""
    return any(os.path.exists(sign) for sign in _GPU_SIGNS)


@dataclass(frozen=True)
class Advice:
    """What the facts mean for the ranks of one attempt here."""

    environment: NodeAdvice
    bindings: tuple[Mapping[str, object] | None, ...] = ()
    """By local rank, as `GuardedProcess` takes it; None: not bound."""
    transport: str = ""
    """What should carry the traffic between nodes, where NCCL will and there is a log to prove it; empty: nothing to prove."""

    def binding_of(self, local_rank: int) -> Mapping[str, object] | None:
        return self.bindings[local_rank] if local_rank < len(self.bindings) else None


class Survey:
    """Runs once. `when_over` calls back from the survey's thread, or from the caller's at once when it is over already."""

    def __init__(
        self,
        node: NodeInfo,
        spec: JobSpec,
        base_env: Mapping[str, str],
        on_event: Callable[[FabricSurveyed | Notice], None],
    ) -> None:
        self._node = node
        self._spec = spec
        self._base_env = base_env
        self._on_event = on_event
        self._facts: NodeFacts | None = None
        self._lock = threading.Lock()
        self._has_begun = False
        self._is_over = False
        self._waiting: list[Callable[[], None]] = []

    def begin(self) -> None:
        """Starts the thread; later calls do nothing."""
        with self._lock:
            if self._has_begun:
                return
            self._has_begun = True
        threading.Thread(target=self._run, name="survey", daemon=True).start()

    def when_over(self, call: Callable[[], None]) -> None:
        """Calls once the facts are there, or there will be none; after PATIENCE_S in any case."""
        self.begin()
        with self._lock:
            if not self._is_over:
                self._waiting.append(call)
                if len(self._waiting) == 1:
                    timer = threading.Timer(PATIENCE_S, self._give_up)
                    timer.daemon = True
                    timer.start()
                return
        call()

    def advice(self, num_nodes: int, num_ranks: int, paths: NcclPaths) -> Advice:
        """For the ranks of an attempt on `num_nodes` nodes, `num_ranks` of them here. Nothing while there are no facts."""
        if self._facts is None:
            return Advice(NO_ADVICE)
        try:
            return advise(self._facts, self._spec, self._base_env, num_nodes, num_ranks, paths)
        except (
            Exception
        ):  # a rule that stumbles over strange facts must not cost the job; the launcher's page will show it
            return Advice(NO_ADVICE)

    def _run(self) -> None:
        began_s = time.monotonic()
        facts, text, problem = None, "", ""
        try:
            from launcher.fabric.codec import to_json
            from launcher.fabric.facts import Kubernetes
            from launcher.fabric.probe import probe

            facts = probe(node_ip=self._node.addr, kubernetes=Kubernetes(labels=dict(self._node.labels)))
            text = to_json(facts)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        self._facts = facts
        self._end()
        took_s = time.monotonic() - began_s
        # Only now: whoever waits for the advice does not wait for the news.
        self._on_event(FabricSurveyed(self._node.node_id, text, self._user_env(), took_s, problem))

    def _give_up(self) -> None:
        if not self._is_over:
            text = f"its GPUs and network have not answered for {PATIENCE_S:g} s; its ranks start without what they would have said"
            self._on_event(Notice(text, self._node.node_id))
            self._end()

    def _end(self) -> None:
        with self._lock:
            self._is_over = True
            waiting, self._waiting = self._waiting, []
        for call in waiting:
            call()

    def _user_env(self) -> tuple[tuple[str, str], ...]:
        return tuple(
            (name, value)
            for name, value in sorted(self._base_env.items())
            if name.startswith(USER_PREFIXES) or name in USER_NAMES
        )


def advise(
    facts: NodeFacts, spec: JobSpec, base_env: Mapping[str, str], num_nodes: int, num_ranks: int, paths: NcclPaths
) -> Advice:
    """The rules' decisions about this node in the words of a rank's environment. Pure."""
    from launcher.fabric.rules import GangRequest, environment

    request = GangRequest(
        local_world_size=num_ranks,
        num_nodes=num_nodes,
        bind=_bind(spec.bind),
        flight_recorder_prefix=paths.trace_prefix if facts.gpus else None,
        nccl_log=paths.log_pattern,
    )
    (node,) = environment([facts], request, base_env)
    settings = tuple(
        Setting(item.variable, item.value, item.reason, item.source)
        for item in node.decisions
        if item.is_ours and item.value is not None
    )
    kept = tuple(
        Kept(item.variable, item.user_value, item.value or "", item.reason, item.source)
        for item in node.decisions
        if item.is_overruled and item.user_value is not None
    )
    bindings = tuple(_for_guardian(binding) for binding in node.bindings)
    environment_advice = NodeAdvice(settings, kept, tuple(str(binding) for binding in node.bindings))
    return Advice(environment_advice, bindings, node.hcas.transport if facts.gpus and num_nodes > 1 else "")


def _for_guardian(binding: Binding) -> Mapping[str, object] | None:
    if binding.cpus is None:
        return None
    return {"cpus": list(binding.cpus), "memory_node": binding.memory_node}


def _bind(text: str) -> Bind:
    match text:
        case "numa":
            return "numa"
        case "none":
            return "none"
    return "auto"

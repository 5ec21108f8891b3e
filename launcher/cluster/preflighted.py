"""A cluster that measures its nodes before it hands them over (`--preflight`): the Cluster port around another one.

It lets everything pass but NodesReady: those nodes are measured first, whoever is broken or slow is left out where the job can do without,
told, and remembered (launcher/exclusion.py). Nodes that have been measured are not measured again, so a restart does not wait. Nodes that
join a running job are taken as they are.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from launcher.cluster.ports import Cluster, EventSink, NodeHandle
from launcher.exclusion import Cause, Verdict, excluded
from launcher.exclusion_file import ExclusionFile
from launcher.gang.events import Event, FabricFound, FabricSurveyed, NodesReady, Notice, Output, PlacementRefused
from launcher.gang.world import NodeInfo
from launcher.spec import JobSpec

if TYPE_CHECKING:
    from launcher.fabric.conduct import Peer, Wishes
    from launcher.fabric.verdict import Report
    from launcher.fabric.verdict import Verdict as Meaning

SURVEY_S = 20.0
"""How long the facts of the nodes are waited for; without them, the measuring goes on with what is there."""
CLOSE_S = 5.0
MAX_ROUNDS = 3
"""Of leaving out and measuring anew; a cluster that is still not sound then is used as it is, and said to be."""


class OpenPeer(Protocol):
    """A `launcher.fabric.conduct.Peer` that can be ended."""

    def close(self) -> object: ...
    def kill(self) -> None: ...


class Measurable(Cluster, Protocol):
    """A cluster that can measure from its nodes."""

    def open_peers(self, nodes: Sequence[NodeInfo]) -> Sequence[OpenPeer]:
        """Who measures from each of these nodes, in their order. May block for some seconds; raises OSError or ConnectionError."""
        ...


@dataclass(frozen=True)
class Decision:
    """What becomes of the nodes. Positions among those that were measured."""

    left_out: dict[int, str]
    refusal: str = ""
    """Why the job cannot run on what remains."""
    remark: str = ""
    """What a person should know of those that stay though they were named."""


def decide(meaning: Meaning, names: Sequence[str], needed: int, now: float) -> Decision:
    """Whom to leave out. Pure. Broken nodes never stay; slow ones do where the job needs them, or where too many are named."""
    if meaning.hopeless:
        return Decision({}, f"the preflight found a path that is broken: {meaning.hopeless}")
    if len(names) - len(meaning.broken) < needed:
        what = "; ".join(f"{names[node]}: {why}" for node, why in sorted(meaning.broken.items()))
        return Decision({}, f"the preflight found broken nodes, and the job needs {needed} of {len(names)}: {what}")
    sound = [name for node, name in enumerate(names) if node not in meaning.broken]
    slow = [Verdict(names[node], why, now) for node, why in meaning.slow.items()]
    chosen = excluded(slow, sound, needed=needed, now=now)
    left_out = meaning.broken | {node: why for node, why in meaning.slow.items() if names[node] in chosen.hosts}
    return Decision(left_out, remark=chosen.remark)


class Preflighted:
    """`exclusions`: where nodes that were named are remembered. Implements Cluster, and EventSink for the inner one."""

    def __init__(self, inner: Measurable, exclusions: ExclusionFile, clock: Callable[[], float] = time.time) -> None:
        self.description = inner.description
        self._inner = inner
        self._exclusions = exclusions
        self._clock = clock
        self._changed = threading.Condition()
        self._surveys: dict[str, FabricSurveyed] = {}
        self._measured: set[str] = set()
        self._left_out: set[str] = set()
        self._num_rounds = 0
        self._peers: Sequence[OpenPeer] = ()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def open(self, spec: JobSpec, run_dir: str, sink: EventSink) -> None:
        self._spec, self._run_dir, self._sink = spec, run_dir, sink
        self._inner.open(spec, run_dir, self)

    def acquire(self, keep: tuple[str, ...]) -> None:
        self._num_rounds = 0
        self._inner.acquire(keep)

    def node(self, node_id: str) -> NodeHandle:
        return self._inner.node(node_id)

    def let_go(self, node_id: str) -> None:
        self._inner.let_go(node_id)

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            peers = self._peers
        for peer in peers:
            peer.kill()
        if self._thread is not None:
            self._thread.join(CLOSE_S)
        self._inner.close()

    # --- EventSink for the inner cluster ------------------------------------------------------------------------------------------------

    def put(self, event: Event) -> None:
        if isinstance(event, FabricSurveyed):
            with self._changed:
                self._surveys[event.node_id] = event
                self._changed.notify_all()
        if not isinstance(event, NodesReady):
            self._sink.put(event)
            return
        nodes = [node for node in event.nodes if _machine_of(node.node_id) not in self._left_out]
        if all(node.node_id in self._measured for node in nodes) or self._num_rounds >= MAX_ROUNDS:
            self._sink.put(NodesReady(tuple(nodes)))
            return
        self._num_rounds += 1
        self._thread = threading.Thread(target=self._preflight, args=(nodes,), name="preflight", daemon=True)
        self._thread.start()

    def put_log(self, output: Output) -> None:
        self._sink.put_log(output)

    # --- in the thread ------------------------------------------------------------------------------------------------------------------

    def _preflight(self, nodes: Sequence[NodeInfo]) -> None:
        began_s = time.monotonic()
        names = _names(nodes)
        try:
            report = self._measure(nodes, names)
        except Exception as error:  # a tool that breaks must not cost the job
            if not self._is_closed:
                self._sink.put(
                    Notice(f"the preflight broke off ({type(error).__name__}: {error}); the job goes on without it")
                )
                self._sink.put(NodesReady(tuple(nodes)))
            return
        if self._is_closed:
            return
        self._tell(report, names, time.monotonic() - began_s)
        self._act(report, nodes, names)

    def _measure(self, nodes: Sequence[NodeInfo], names: Sequence[str]) -> Report:
        from launcher.fabric.conduct import conduct

        self._sink.put(
            Notice(f"preflight: {len(nodes)} nodes are measured" if len(nodes) > 1 else "preflight: 1 node is measured")
        )
        self._wait_for_surveys(nodes)
        wishes = self._wishes(nodes)
        peers = self._inner.open_peers(nodes)
        with self._changed:
            self._peers = peers
            if self._is_closed:
                for peer in peers:
                    peer.kill()
        try:
            return conduct(_as_peers(peers), names, wishes)
        finally:
            with self._changed:
                self._peers = ()
            for peer in peers:
                with contextlib.suppress(OSError):
                    peer.close()

    def _wait_for_surveys(self, nodes: Sequence[NodeInfo]) -> None:
        def are_there() -> bool:
            return self._is_closed or all(node.node_id in self._surveys for node in nodes)

        with self._changed:
            self._changed.wait_for(are_there, SURVEY_S)

    def _wishes(self, nodes: Sequence[NodeInfo]) -> Wishes:
        """What the nodes' facts say of how to measure them."""
        from launcher.fabric.codec import from_json
        from launcher.fabric.conduct import Wishes
        from launcher.fabric.facts import FactsError, NodeFacts
        from launcher.fabric.findings import share_a_machine
        from launcher.fabric.rules import GangRequest, environment

        seen, facts = [self._surveys.get(node.node_id) for node in nodes], []
        for node, survey in zip(nodes, seen, strict=True):
            try:
                facts.append(from_json(survey.facts if survey is not None else "", source=node.hostname))
            except FactsError:
                facts.append(NodeFacts(node.hostname, node_ip=node.addr))
        user = [dict(survey.user_env) if survey is not None else {} for survey in seen]
        request = GangRequest(local_world_size=nodes[0].num_ranks, num_nodes=len(nodes))
        decided = environment(facts, request, user)
        is_one_machine = share_a_machine(facts)
        return Wishes(
            # Nodes that share processors and a name would only measure each other.
            compute=not is_one_machine,
            names=not is_one_machine,
            reduce=True,
            environments=[{**env, **node.variables()} for env, node in zip(user, decided, strict=True)],
            transports=[node.hcas.transport for node in decided],
        )

    def _tell(self, report: Report, names: Sequence[str], took_s: float) -> None:
        from launcher.fabric.page import finding_lines
        from launcher.fabric.verdict import page, summary

        self._sink.put(Notice(f"preflight: {summary(report)} ({took_s:.1f} s)"))
        for finding in sorted(report.findings, key=lambda finding: -finding.severity):
            self._sink.put(
                FabricFound(finding.severity.name, finding.id, finding.nodes, finding.evidence, finding.cure)
            )
        folder = Path(self._run_dir) / "fabric"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "preflight.txt").write_text(page(report, names, finding_lines(report.findings)))
        except OSError as error:
            self._sink.put(Notice(f"the preflight's page could not be written to {folder}: {error.strerror}"))

    def _act(self, report: Report, nodes: Sequence[NodeInfo], names: Sequence[str]) -> None:
        from launcher.fabric.verdict import judge

        now = self._clock()
        meaning = judge(report, names)
        decision = decide(meaning, names, self._spec.min_nodes, now)
        verdicts = [Verdict(nodes[node].hostname, why, now, Cause.SLOW) for node, why in meaning.slow.items()]
        verdicts += [Verdict(nodes[node].hostname, why, now, Cause.LOST) for node, why in meaning.broken.items()]
        trouble = self._exclusions.remember(verdicts)
        for text in (trouble, decision.remark):
            if text:
                self._sink.put(Notice(text))
        if decision.refusal:
            page = os.path.join(self._run_dir, "fabric", "preflight.txt")
            self._sink.put(
                PlacementRefused(decision.refusal, f"{page} says more; without --preflight the job would try")
            )
            return
        remaining = tuple(node for idx, node in enumerate(nodes) if idx not in decision.left_out)
        self._measured.update(node.node_id for node in remaining)
        if not decision.left_out:
            self._sink.put(NodesReady(remaining))
            return
        told = "; ".join(f"{names[idx]} ({why})" for idx, why in sorted(decision.left_out.items()))
        self._sink.put(Notice(f"left out after the preflight: {told}"))
        self._left_out.update(_machine_of(nodes[idx].node_id) for idx in decision.left_out)
        # Lets go of the others; where the cluster has more, it may bring them, and they are measured as well.
        self._inner.acquire(tuple(node.node_id for node in remaining))


def _names(nodes: Sequence[NodeInfo]) -> list[str]:
    """What to call each node: its host name, with its position where several have the same."""
    hosts = [node.hostname for node in nodes]
    return [f"{host}-{idx}" if hosts.count(host) > 1 else host for idx, host in enumerate(hosts)]


def _machine_of(node_id: str) -> str:
    """A node that comes again has another number behind its name."""
    return node_id.partition("#")[0]


def _as_peers(peers: Sequence[OpenPeer]) -> Sequence[Peer]:
    return peers  # type: ignore[return-value]  # they are both; the types of launcher.fabric are not imported at a start

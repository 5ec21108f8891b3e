"""What the nodes saw of their hardware, together: kept in the run directory, looked through once, said where something is wrong.

A thread does the work, so that neither the start nor the news of a failure waits for it. Nothing here fails a job. The facts of each node
lie in RUN/fabric/HOST.json (`python -m launcher doctor --facts RUN/fabric` shows them again), the whole page in RUN/fabric/page.txt, and
what carries the traffic by NCCL's own logs in RUN/fabric/transport.txt.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.gang.events import Event, FabricFound, FabricSurveyed, Notice, TransportSeen
from launcher.gang.world import World
from launcher.spec import JobSpec

if TYPE_CHECKING:
    from launcher.fabric.findings import Finding

GATHER_S = 2.0
"""Nodes connect their channels together, and each tells of it within a second of the others."""
CLOSE_S = 2.0
"""Reading the facts of a thousand nodes through takes about a second; a job that ends at once does not wait longer."""


class Checkup:
    """`put` takes what is to be said. Fed by one thread, the controller's."""

    def __init__(self, spec: JobSpec, run_dir: str, put: Callable[[Event], None]) -> None:
        self._spec = spec
        self._folder = Path(run_dir) / "fabric"
        self._put = put
        self._surveys: dict[str, FabricSurveyed] = {}
        self._world: World | None = None
        self._examined: frozenset[str] = frozenset()
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._said: set[FabricFound] = set()
        self._transports: dict[str, TransportSeen] = {}
        """By node, the last word of its logs."""
        self._accused: set[tuple[str, str]] = set()
        """(finding, host) of the transport that have been said."""
        self._has_told_transport = False

    def surveyed(self, event: FabricSurveyed) -> None:
        """A node has looked."""
        self._surveys[event.node_id] = event
        self._look()

    def started(self, world: World) -> None:
        """An attempt runs on these nodes."""
        self._world = world
        self._look()

    def transport(self, event: TransportSeen) -> None:
        """NCCL's logs on a node have said what carries its traffic."""
        self._give(event)

    def close(self) -> None:
        """Lets what has arrived be written down; blocks CLOSE_S at most."""
        if self._thread is not None:
            self._work.put(None)
            self._thread.join(CLOSE_S)

    def _look(self) -> None:
        """Once all nodes of the world have said what they saw; again when other nodes have joined."""
        if self._world is None:
            return
        nodes = frozenset(self._world.node_ids())
        if not nodes <= self._surveys.keys() or nodes <= self._examined:
            return
        self._examined = nodes
        self._give((self._world, dict(self._surveys)))

    def _give(self, work: _Work) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="checkup", daemon=True)
            self._thread.start()
        self._work.put(work)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            try:
                if isinstance(item, TransportSeen):
                    if not self._gather_transports(item):
                        return
                else:
                    self._examine(*item)
            except Exception as error:  # strange facts of a strange machine; the job has nothing to do with it
                self._put(Notice(f"the check of GPUs and network broke off ({type(error).__name__}: {error})"))

    def _examine(self, world: World, surveys: dict[str, FabricSurveyed]) -> None:
        # Here, not above: a start does not wait for these imports.
        from launcher.fabric.codec import from_json
        from launcher.fabric.doctor import examine
        from launcher.fabric.facts import FactsError
        from launcher.fabric.page import text_page
        from launcher.fabric.recorded import save
        from launcher.fabric.rules import GangRequest

        told = []
        for survey in (surveys[node.node_id] for node in world.nodes):
            problem = survey.problem
            try:
                if not problem:
                    told.append((survey, from_json(survey.facts, source="what it says")))
            except FactsError as error:
                problem = str(error).replace("\n", " ")
            if problem:
                self._put(Notice(f"its GPUs and network could not be looked at: {problem}", survey.node_id))
        if not told:
            return
        request = GangRequest(
            local_world_size=world.nodes[0].num_ranks,
            num_nodes=len(world.nodes),
            bind=self._spec.bind,  # type: ignore[arg-type]  # JobSpec has checked it
        )
        nodes = [facts for _, facts in told]
        page = examine(
            nodes, request, [dict(survey.user_env) for survey, _ in told], remark="As the launcher saw it at the start."
        )
        self._say([finding_event(finding) for finding in page.findings if finding.severity >= 1])
        try:
            save(nodes, self._folder)
            (self._folder / "page.txt").write_text(text_page(page))
        except OSError as error:
            self._put(Notice(f"what the nodes' hardware is could not be written to {self._folder}: {error.strerror}"))

    def _gather_transports(self, first: TransportSeen) -> bool:
        """Takes what the other nodes say within moments, so that a thousand of them are one line. False: it was told to end meanwhile."""
        self._transports[first.node_id] = first
        until_s, goes_on = time.monotonic() + GATHER_S, True
        while goes_on and (left_s := until_s - time.monotonic()) > 0.0:
            try:
                item = self._work.get(timeout=left_s)
            except queue.Empty:
                break
            if item is None:
                goes_on = False
            elif isinstance(item, TransportSeen):
                self._transports[item.node_id] = item
            else:
                self._examine(*item)
        self._tell_transports()
        return goes_on

    def _tell_transports(self) -> None:
        from launcher.fabric.nccl_log import TransportEvidence, carried_by, transport_findings

        seen = {
            event.hostname: (
                event,
                TransportEvidence(event.version, event.network, event.devices, dict(event.channels), event.without_gdr),
            )
            for event in self._transports.values()
        }
        by_kind: dict[tuple[str, str, str], list[Finding]] = {}
        for host, (event, evidence) in sorted(seen.items()):
            for finding in transport_findings(evidence, event.expected, host):  # type: ignore[arg-type]  # a Transport, over the wire
                if (finding.id, host) not in self._accused:
                    self._accused.add((finding.id, host))
                    by_kind.setdefault((finding.id, finding.severity.name, finding.cure), []).append(finding)
        for (id_, severity, cure), found in by_kind.items():
            hosts = tuple(host for finding in found for host in finding.nodes)
            self._put(FabricFound(severity, id_, hosts, found[0].evidence, cure))
        lines = [
            f"{host}: {carried_by(evidence)}; the node has {event.expected}"
            for host, (event, evidence) in sorted(seen.items())
        ]
        told = {carried_by(evidence, with_counts=False) for _, evidence in seen.values() if evidence.network_channels}
        if told and not self._has_told_transport:
            self._has_told_transport = True
            self._put(Notice(f"NCCL's logs: between nodes {' and '.join(sorted(told))}"))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / "transport.txt").write_text("\n".join(lines) + "\n")
        except OSError as error:
            self._put(Notice(f"what carries the traffic could not be written to {self._folder}: {error.strerror}"))

    def _say(self, found: list[FabricFound]) -> None:
        """Each finding once in a job, whatever restarts."""
        for event in found:
            if event not in self._said:
                self._said.add(event)
                self._put(event)


_Work = tuple[World, dict[str, FabricSurveyed]] | TransportSeen


def finding_event(finding: Finding) -> FabricFound:
    """A finding in the words of the gang."""
    return FabricFound(finding.severity.name, finding.id, finding.nodes, finding.evidence, finding.cure)

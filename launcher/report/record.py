"""A run, folded from its journal one entry at a time: attempts, when they made which step, how each ended, which nodes came and went.

Pure. The same fold serves the live line (entries as they are written) and a report (entries read back), so both say the same. It takes
whatever a journal holds: entries that are missing, of an older version, out of order or of the wrong shape make a run less known, never
an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.journal import Entry
from launcher.report.failures import FailureFacts, failure_facts, signal_name
from launcher.report.fields import integer, number, text

_MAX_NOTES = 1000
"""Of node events; a fleet of spot machines may come and go for months."""
_SAME_MOVE_S = 0.1
"""The machine announces why it stops an attempt, then stops it, in one move."""


@dataclass(frozen=True)
class Point:
    """The gang's progress at one moment (`gang.tally.GangProgress`)."""

    at_s: float
    """Since the job began, as all times here."""
    steps: int | None
    """None: unknown."""
    waited_s: float = 0.0
    samples: int | None = None
    step_s: float | None = None
    step_age_s: float | None = None
    total_steps: int | None = None
    done_steps: int = 0
    num_alive: int = 0
    is_paused: bool = False
    stragglers: tuple[int, ...] = ()
    hung: tuple[int, ...] = ()

    @property
    def step_at_s(self) -> float:
        """When the last step ended."""
        return self.at_s - (self.step_age_s or 0.0)


@dataclass(frozen=True)
class Straggler:
    """A rank that was slower than the others for long (`gang.stragglers`)."""

    rank: int
    host: str
    own_s: float
    """Time of its own in each step, in which it waits for nobody."""
    others_s: float
    """That of the rank in the middle."""
    is_data: bool
    """Most of the difference is time that it waits for its data loader."""

    def __str__(self) -> str:
        what = ", mostly waiting for data" if self.is_data else ""
        return f"rank {self.rank} on {self.host}: {self.own_s:.3g} s of its own in each step{what}; the others {self.others_s:.3g} s"


@dataclass
class Attempt:
    """One try."""

    number: int
    began_s: float
    num_ranks: int = 0
    hosts: tuple[str, ...] = ()
    ranks_of_hosts: tuple[int, ...] = ()
    """How many ranks each of the hosts has; ranks are contiguous."""
    told_to_start: bool = False
    started_s: float | None = None
    """When the last node said that its ranks run."""
    points: list[Point] = field(default_factory=list)
    failure: FailureFacts | None = None
    """The root, also where it was learnt of later."""
    why_stopped: str = ""
    """In words, where it was not a failure."""
    stopped_s: float | None = None
    """When its ranks were told to stop, or it was found that none is left to be told."""
    ended_s: float | None = None
    named_hangs: list[float] = field(default_factory=list)
    """When somebody was found to hold up the job."""
    stragglers: dict[int, Straggler] = field(default_factory=dict)
    """By rank; also those that are no more."""
    num_exited: int = 0
    exit_steps: int | None = None
    """The most steps that a rank has reported at its end."""

    @property
    def steps(self) -> int | None:
        """Steps that it made, as far as is known."""
        seen = [point.steps for point in self.points if point.steps is not None]
        ended = [self.exit_steps] if self.exit_steps is not None else []
        return max(seen + ended, default=None)

    @property
    def last(self) -> Point | None:
        return self.points[-1] if self.points else None

    def host_of(self, rank: int) -> str:
        """Empty if it is not known."""
        first = 0
        for host, count in zip(self.hosts, self.ranks_of_hosts, strict=False):
            if first <= rank < first + count:
                return host
            first += count
        return ""

    @property
    def done_steps(self) -> int | None:
        """Steps of the job that were behind it as it began, as the script has said; None: it said nothing."""
        return next((point.done_steps for point in reversed(self.points) if point.total_steps is not None), None)


@dataclass(frozen=True)
class Ending:
    exit_code: int
    reason: str
    at_s: float


@dataclass(frozen=True)
class NodeEvent:
    at_s: float
    text: str


class RunRecord:
    """Feed it with `see`; read its fields at any time."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.run_dir = ""
        self.cluster = ""
        self.argv: tuple[str, ...] = ()
        self.pid: int | None = None
        self.hostname = ""
        self.began_wall_s = 0.0
        self.last_wall_s = 0.0
        self.last_s = 0.0
        """When the last entry was written."""
        self.num_entries = 0
        self.attempts: list[Attempt] = []
        self.node_events: list[NodeEvent] = []
        self.num_node_events = {"lost": 0, "joined": 0, "draining": 0}
        self.waiting_for = ""
        """Why there are no nodes yet."""
        self.ending: Ending | None = None
        self._began_mono_s: float | None = None
        self._said = "", -1.0
        self._hosts: dict[str, str] = {}
        for entry in entries:
            self.see(entry)

    @property
    def attempt(self) -> Attempt | None:
        """The newest."""
        return self.attempts[-1] if self.attempts else None

    @property
    def num_restarts(self) -> int:
        return max(0, len(self.attempts) - 1)

    @property
    def has_steps(self) -> bool:
        return any(attempt.steps is not None for attempt in self.attempts)

    def see(self, entry: Entry) -> None:
        """One more entry. Never raises."""
        if self._began_mono_s is None:
            self._began_mono_s, self.began_wall_s = entry.mono_s, entry.wall_s
        self.num_entries += 1
        self.last_wall_s = max(self.last_wall_s, entry.wall_s)
        self.last_s = max(self.last_s, entry.mono_s - self._began_mono_s)  # time never goes back, whatever a file says
        take = _TAKES.get(entry.kind)
        if take is not None:
            take(self, entry.fields, self.last_s)

    def host(self, node_id: str) -> str:
        return self._hosts.get(node_id, node_id)

    # --- what each kind of entry means ----------------------------------------------------------------------------------------------

    def _job_began(self, fields: Mapping[str, Any], at_s: float) -> None:
        self.run_dir, self.cluster = text(fields, "run_dir"), text(fields, "cluster")
        argv = fields.get("argv")
        self.argv = tuple(str(each) for each in argv) if isinstance(argv, list) else ()
        self.pid, self.hostname = integer(fields, "pid"), text(fields, "hostname")

    def _waiting(self, fields: Mapping[str, Any], at_s: float) -> None:
        self.waiting_for = text(fields, "reason")

    def _nodes_ready(self, fields: Mapping[str, Any], at_s: float) -> None:
        self.waiting_for = ""
        self._learn_hosts(fields.get("nodes"))

    def _learn_hosts(self, nodes: Any) -> tuple[str, ...]:
        found = []
        for node in nodes if isinstance(nodes, list) else ():
            if isinstance(node, dict):
                name = text(node, "hostname") or text(node, "node_id")
                self._hosts[text(node, "node_id")] = name
                found.append(name)
        return tuple(found)

    def _of(self, fields: Mapping[str, Any], at_s: float) -> Attempt | None:
        """The attempt that an entry is about; it begins with the first entry of its number."""
        number = integer(fields, "attempt")
        if number is None or number < 0:
            return None
        newest = self.attempt
        if newest is None or number > newest.number:
            if newest is not None and newest.stopped_s is None:
                newest.stopped_s = at_s
            self.attempts.append(Attempt(number, at_s))
            return self.attempts[-1]
        return next((attempt for attempt in reversed(self.attempts) if attempt.number == number), None)

    def _attempt_began(self, fields: Mapping[str, Any], at_s: float) -> None:
        self._of(fields, at_s)

    def _start_ranks(self, fields: Mapping[str, Any], at_s: float) -> None:
        plan = fields.get("plan")
        if not isinstance(plan, dict):
            return
        attempt = self._of(plan, at_s)
        world = plan.get("world")
        nodes = world.get("nodes") if isinstance(world, dict) else None
        if attempt is not None and isinstance(nodes, list):
            attempt.told_to_start = True
            attempt.hosts = self._learn_hosts(nodes)
            counts = (integer(node, "num_ranks") or 0 for node in nodes if isinstance(node, dict))
            attempt.ranks_of_hosts = tuple(max(0, count) for count in counts)
            attempt.num_ranks = sum(attempt.ranks_of_hosts)

    def _ranks_started(self, fields: Mapping[str, Any], at_s: float) -> None:
        attempt = self._of(fields, at_s)
        if attempt is not None and attempt.stopped_s is None:
            attempt.started_s = at_s

    def _progress(self, fields: Mapping[str, Any], at_s: float) -> None:
        attempt = self._of(fields, at_s)
        if attempt is None or attempt.stopped_s is not None:
            return
        attempt.num_ranks = attempt.num_ranks or integer(fields, "num_ranks") or 0
        attempt.points.append(
            Point(
                at_s,
                integer(fields, "steps"),
                number(fields, "waited_s") or 0.0,
                integer(fields, "samples"),
                number(fields, "step_s"),
                number(fields, "step_age_s"),
                integer(fields, "total_steps"),
                integer(fields, "done_steps") or 0,
                integer(fields, "num_alive") or 0,
                fields.get("is_paused") is True,
                _ranks(fields.get("stragglers")),
                _ranks(fields.get("hung")),
            )
        )

    def _hang_named(self, fields: Mapping[str, Any], at_s: float) -> None:
        attempt = self._of(fields, at_s) if integer(fields, "attempt") is not None else self.attempt
        if attempt is not None:
            attempt.named_hangs.append(at_s)

    def _straggling(self, fields: Mapping[str, Any], at_s: float) -> None:
        attempt, rank = self.attempt, integer(fields, "rank")
        if attempt is None or rank is None or fields.get("has_ended") is True:
            return
        own_s, others_s = number(fields, "own_s") or 0.0, number(fields, "others_s") or 0.0
        is_data = fields.get("is_data") is True
        attempt.stragglers[rank] = Straggler(rank, attempt.host_of(rank), own_s, others_s, is_data)

    def _rank_exited(self, fields: Mapping[str, Any], at_s: float) -> None:
        attempt = self._of(fields, at_s)
        if attempt is None:
            return
        attempt.num_exited += 1
        steps = integer(fields, "steps")
        if steps is not None:
            attempt.exit_steps = max(steps, attempt.exit_steps or 0)

    def _failed(self, fields: Mapping[str, Any], at_s: float) -> None:
        attempt = self._of(fields, at_s)
        if attempt is not None:
            attempt.failure = failure_facts(fields.get("failure"), self.host, at_s)
            attempt.stopped_s = at_s if attempt.stopped_s is None else attempt.stopped_s

    def _collateral(self, fields: Mapping[str, Any], at_s: float) -> None:
        attempt = self._of(fields, at_s)
        if attempt is not None and fields.get("is_new_root") is True:
            attempt.failure = failure_facts(fields.get("root"), self.host, at_s)

    def _stop(self, fields: Mapping[str, Any], at_s: float) -> None:
        attempt = self._of(fields, at_s)
        if attempt is not None and attempt.stopped_s is None:
            attempt.stopped_s = at_s
            said, said_s = self._said
            if at_s - said_s < _SAME_MOVE_S and not attempt.why_stopped:
                attempt.why_stopped = said.partition(": ")[0]

    def _attempt_ended(self, fields: Mapping[str, Any], at_s: float) -> None:
        attempt = self._of(fields, at_s)
        if attempt is not None:
            attempt.stopped_s = at_s if attempt.stopped_s is None else attempt.stopped_s
            attempt.ended_s = at_s

    def _announced(self, fields: Mapping[str, Any], at_s: float) -> None:
        self._said = text(fields, "text"), at_s

    def _signal(self, fields: Mapping[str, Any], at_s: float) -> None:
        attempt = self.attempt
        if attempt is not None and attempt.stopped_s is None:
            attempt.why_stopped = f"{signal_name(integer(fields, 'signum'))} to the launcher"

    def _node_event(self, verb: str, fields: Mapping[str, Any], at_s: float) -> None:
        node = fields.get("node")
        if isinstance(node, dict):
            self._learn_hosts([node])
        node_id = text(node if isinstance(node, dict) else fields, "node_id")
        reason = text(fields, "reason")
        self.node_events.append(
            NodeEvent(at_s, f"node {self.host(node_id)} {verb}" + (f": {reason}" if reason else ""))
        )
        del self.node_events[:-_MAX_NOTES]

    def _node_lost(self, fields: Mapping[str, Any], at_s: float) -> None:
        self.num_node_events["lost"] += 1
        self._node_event("lost", fields, at_s)

    def _node_joined(self, fields: Mapping[str, Any], at_s: float) -> None:
        self.num_node_events["joined"] += 1
        self._node_event("joined", fields, at_s)

    def _node_draining(self, fields: Mapping[str, Any], at_s: float) -> None:
        self.num_node_events["draining"] += 1
        self._node_event("told to leave", fields, at_s)

    def _blamed(self, fields: Mapping[str, Any], at_s: float) -> None:
        host, reason = text(fields, "host"), text(fields, "reason")
        self.node_events.append(NodeEvent(at_s, f"node {host} is remembered as bad: {reason}"))

    def _finished(self, fields: Mapping[str, Any], at_s: float) -> None:
        code = integer(fields, "exit_code")
        if code is not None:
            self.ending = Ending(code, text(fields, "reason"), at_s)


_TAKES = {
    "JobBegan": RunRecord._job_began,
    "PlacementWaiting": RunRecord._waiting,
    "NodesReady": RunRecord._nodes_ready,
    "OpenStore": RunRecord._attempt_began,
    "StartRanks": RunRecord._start_ranks,
    "RanksStarted": RunRecord._ranks_started,
    "GangProgress": RunRecord._progress,
    "Named": RunRecord._hang_named,
    "RankHung": RunRecord._hang_named,
    "Straggling": RunRecord._straggling,
    "RankExited": RunRecord._rank_exited,
    "ReportFailure": RunRecord._failed,
    "ReportCollateral": RunRecord._collateral,
    "StopAttempt": RunRecord._stop,
    "AttemptEnded": RunRecord._attempt_ended,
    "Announce": RunRecord._announced,
    "StopRequested": RunRecord._signal,
    "NodeLost": RunRecord._node_lost,
    "NodeJoined": RunRecord._node_joined,
    "NodeDraining": RunRecord._node_draining,
    "BlameNode": RunRecord._blamed,
    "JobEnded": RunRecord._finished,
}
"""Kinds of entries that say something about a run; all others are left alone."""


def _ranks(value: Any) -> tuple[int, ...]:
    return tuple(rank for rank in value if type(rank) is int) if isinstance(value, list) else ()

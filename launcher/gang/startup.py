"""Imports that never end, before the first step: where `health` has no steps to go by. Pure: `now` is monotonic seconds, samples come in.

A module that starts a thread and waits for it while that thread wants the module (two import locks, each held by who waits for the other)
stands still for good, on one rank or on all, and the job with it. From a slow import it is told by this: it uses no processor, reads
nothing, has no children that do, and its stack does not change. It is named when that has lasted for ten seconds at three looks, and

- another thread of the rank waits for an import lock: then it is certain, and given up like any other hang, or
- other ranks are past their imports: it may be a file system or a server that does not answer, so the job is left alone.

Whoever waits in a collective, or is known to be at work, is not named, wherever it was imported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from launcher.gang.diagnosis import MIN_LOOKS, Diagnosis, Kind
from launcher.gang.health import Finding, GivenUp, GoesOn, Named, NeedStacks
from launcher.gang.observations import NodeProgress, RankSample, RankStack, StacksTaken
from launcher.gang.patience import HangRules
from launcher.gang.work import IMPORT_MACHINERY, imports, is_collective

_LOOK_AT = (0.6, 0.75, 0.9)
_CPU_S, _BYTES = 0.2, 1 << 16
"""Less than that since it was last seen to do something is nothing: threads that poll, a heartbeat."""
_LASTS_S = {"S": None, "R": 1.5, "t": 25.0}
"""How long a process must be in a state for that to mean that it does something; None: it never does. At once in all others."""
_MAX_LOOKS = 60
"""In one attempt. A job without an optimizer may be idle often."""
_FIRST_LOOK = 1 << 20
"""Numbers of looks that `health` does not use."""


@dataclass
class _Rank:
    """What was seen of one rank since it last did something."""

    sample: RankSample
    idle_since_s: float
    state: str
    state_since_s: float
    num_asked: int = 0
    stacks: list[RankStack] = field(default_factory=list)

    def has_done_something(self, now_seen: RankSample, now: float) -> bool:
        """A process that waits for a device (D) reads, however slowly; one that is stopped (T) is somebody else's business; one that would
        run (R) for long if the machine let it is not idle, nor is one in a debugger. (We read native stacks as debuggers do, for less.)"""
        if now_seen.state != self.state:
            self.state, self.state_since_s = now_seen.state, now
        before = self.sample
        if (
            before.child_cpu_s is None
        ):  # children are not looked at from the first moment on: what they did before is not known
            before = replace(before, child_cpu_s=now_seen.child_cpu_s, child_io_bytes=now_seen.child_io_bytes)
            self.sample = before
        cpu_s = now_seen.cpu_s - before.cpu_s + (now_seen.child_cpu_s or 0.0) - (before.child_cpu_s or 0.0)
        num_bytes = now_seen.io_bytes - before.io_bytes + (now_seen.child_io_bytes or 0) - (before.child_io_bytes or 0)
        lasts_s = _LASTS_S.get(now_seen.state, 0.0)
        is_state = lasts_s is not None and now - self.state_since_s >= lasts_s
        return cpu_s >= _CPU_S or num_bytes >= _BYTES or is_state or now_seen.paused_s is not None

    def is_to_be_looked_at(self, now: float, limit_s: float) -> bool:
        """At shares of the limit, then at twice, four times, … of it."""
        asked = self.num_asked
        share = _LOOK_AT[asked] if asked < len(_LOOK_AT) else 2.0 ** (asked - len(_LOOK_AT) + 1)
        return now - self.idle_since_s >= share * limit_s

    def is_still(self) -> bool:
        """It is in one place of an import, at each of the last looks."""
        if len(self.stacks) < MIN_LOOKS or len({stack.frames for stack in self.stacks[-MIN_LOOKS:]}) > 1:
            return False
        last = self.stacks[-1]
        return imports(last.frames) and not is_collective(last.frames) and not last.work


class Startup:
    """One attempt, until a rank of it has made a step or has taken a batch."""

    def __init__(self, rules: HangRules, num_ranks: int) -> None:
        self._rules = rules
        self._num_ranks = num_ranks
        self._ranks: dict[int, _Rank] = {}
        self._is_over = not rules.is_on
        self._num_looks = 0
        self._past: set[int] = set()
        """Ranks that were not in an import when they were last looked at."""
        self._named: Diagnosis | None = None
        self._longest_s = 0.0
        self.is_given_up = False

    def see(self, progress: NodeProgress, now: float) -> None:
        if self._is_over:
            return
        for sample in progress.samples:
            if sample.steps or sample.batches:
                self._is_over = True
            seen = self._ranks.get(sample.rank)
            if seen is None or seen.has_done_something(sample, now):
                self._ranks[sample.rank] = _Rank(sample, now, state=sample.state, state_since_s=now)

    def see_stacks(self, taken: StacksTaken) -> None:
        if taken.look < _FIRST_LOOK or taken.is_final:
            return
        for stack in taken.stacks:
            if stack.rank in self._ranks and stack.frames:
                self._ranks[stack.rank].stacks.append(stack)
                (self._past.discard if imports(stack.frames) else self._past.add)(stack.rank)

    def exited(self, rank: int) -> None:
        """It has ended: whoever is still in an import is looked at without it."""
        self._ranks.pop(rank, None)
        self._num_ranks -= 1

    def judge(self, now: float) -> Sequence[Finding]:
        """To be called about once a second."""
        if self._is_over:
            return self._end()
        if len(self._ranks) < self._num_ranks or not self._ranks:
            return ()
        limit_s = self._rules.timeout_s or self._rules.limits.quick_s
        idle_s = max(now - rank.idle_since_s for rank in self._ranks.values())
        if idle_s < _LOOK_AT[0] * limit_s:
            return self._end()
        findings: list[Finding] = []
        due = [rank for rank in self._ranks.values() if rank.is_to_be_looked_at(now, limit_s)]
        if due and self._num_looks < _MAX_LOOKS:
            for rank in due:
                rank.num_asked += 1
            self._num_looks += 1
            findings.append(NeedStacks(_FIRST_LOOK + self._num_looks))
        diagnosis = self._diagnose()
        if diagnosis is None:
            return [*findings, *self._end()]
        quiet_s = min(now - self._ranks[culprit].idle_since_s for culprit in diagnosis.culprits)
        return [*findings, *self._conclude(diagnosis, quiet_s, limit_s)]

    def _diagnose(self) -> Diagnosis | None:
        still = {rank: seen.stacks[-1] for rank, seen in self._ranks.items() if seen.is_still()}
        locked = tuple(sorted(rank for rank, stack in still.items() if stack.is_import_locked))
        if locked:
            return Diagnosis(Kind.IMPORTING, locked)
        return Diagnosis(Kind.IMPORTING, tuple(sorted(still)), is_certain=False) if still and self._past else None

    def _conclude(self, diagnosis: Diagnosis, quiet_s: float, limit_s: float) -> Sequence[Finding]:
        give_up_s = math.inf
        if diagnosis.is_certain:
            give_up_s = self._rules.timeout_s or self._rules.limits.give_up_s
        self._longest_s = quiet_s
        findings: list[Finding] = []
        if quiet_s >= limit_s and self._named != diagnosis:
            self._named = diagnosis
            left_s = None if math.isinf(give_up_s) else max(0.0, give_up_s - quiet_s)
            findings.append(Named(diagnosis, quiet_s, limit_s, self._places(diagnosis.culprits), left_s))
        if quiet_s >= give_up_s and not self.is_given_up and self._named is not None:
            self.is_given_up = True
            frames = self._places(diagnosis.culprits)[0][0]
            place = next((frame for frame in frames if frame.startswith("<module> (")), frames[0])
            findings.append(GivenUp(diagnosis, quiet_s, give_up_s, place))
        return findings

    def _places(self, ranks: Sequence[int]) -> tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]:
        """Where the culprits stand, without the machinery: the modules with their files are what matters."""
        places: dict[tuple[str, ...], list[int]] = {}
        for rank in ranks:
            frames = self._ranks[rank].stacks[-1].frames
            shown = tuple(frame for idx, frame in enumerate(frames) if IMPORT_MACHINERY not in frame or idx == 0)
            places.setdefault(shown, []).append(rank)
        return tuple((frames, tuple(group)) for frames, group in places.items())

    def _end(self) -> Sequence[Finding]:
        named, self._named, self.is_given_up = self._named, None, False
        return () if named is None else (GoesOn(named, self._longest_s),)

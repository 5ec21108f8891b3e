"""Is the gang getting on? Hung ranks, from what is seen of all of them over time. Pure: `now` is monotonic seconds, samples come in.

A rank is *quiet* while no step and no batch of it is seen. Who is quiet for a good part of the limit is looked at more closely
(`NeedStacks`), then named (`Named`), and only then, when it is certain or has lasted long, given up (`GivenUp`): `patience.py` says when.
Who computes in one place while the others wait is told as a notice first (`Noticed`): it may be one long call.

Before the first step of an attempt nothing is judged (it may take its time, or never have an optimizer), but a stopped rank is, and
imports are by `startup.py`. A rank that makes no steps while others do is nobody's culprit.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launcher.gang import patience
from launcher.gang.diagnosis import MIN_LOOKS, Diagnosis, Frames, Kind, Looks, diagnose, group
from launcher.gang.observations import NodeProgress, RankSample, StacksTaken
from launcher.gang.patience import HangRules, sort_of
from launcher.gang.stragglers import Stragglers, Straggling
from launcher.gang.work import is_collective

_LOOK_AT = (0.6, 0.75, 0.9)
"""Shares of the limit at which stacks are taken: three looks tell standing from moving, and the last is fresh when a rank is named."""
_STALE_S = 5.0
"""Of a node not heard of for so long nothing is known; its heartbeat is somebody else's business."""
_TRACED_S = 25.0
"""A debugger. py-spy, reading native frames for us, traces for less."""
_NUM_DURATIONS = 1000


@dataclass(frozen=True)
class NeedStacks:
    """Take the stacks of all ranks."""

    look: int


@dataclass(frozen=True)
class Noticed:
    """The others wait for these ranks, which compute. Before `named_at_s` it is not called a hang."""

    diagnosis: Diagnosis
    quiet_s: float
    where: Frames
    named_at_s: float


@dataclass(frozen=True)
class Named:
    """These ranks (none: nobody stands out) hold up the job. `groups`: where ranks stand, most ranks first."""

    diagnosis: Diagnosis
    quiet_s: float
    limit_s: float
    groups: tuple[tuple[Frames, tuple[int, ...]], ...]
    gives_up_in_s: float | None
    """None: it is not given up."""


@dataclass(frozen=True)
class GivenUp:
    """It will not come back. `place`: a frame that says more than the diagnosis; may be empty."""

    diagnosis: Diagnosis
    quiet_s: float
    limit_s: float
    place: str = ""


@dataclass(frozen=True)
class GoesOn:
    """What was named has resolved itself."""

    diagnosis: Diagnosis
    quiet_s: float


Finding = NeedStacks | Noticed | Named | GivenUp | GoesOn | Straggling


@dataclass
class _Episode:
    """One time of quiet."""

    first_look: int
    looks: dict[int, Looks] = field(default_factory=dict)
    num_asked: int = 0
    noticed: Diagnosis | None = None
    named: Diagnosis | None = None
    is_given_up: bool = False
    longest_s: float = 0.0

    def is_looked_at(self) -> bool:
        """Often enough to tell standing from moving."""
        return min((len(looks.frames) for looks in self.looks.values()), default=0) >= MIN_LOOKS


class Health:
    """One job. What is learnt outlives attempts."""

    def __init__(self, rules: HangRules) -> None:
        self._rules = rules
        self._attempt = -1
        self._num_ranks = 0
        self._samples: dict[int, tuple[RankSample, float]] = {}
        self._gone: set[int] = set()
        self._frozen_since: dict[int, float] = {}
        self._traced_since: dict[int, float] = {}
        self._num_looks = 0
        self._longest_step_s = 0.0
        """Since it was last judged."""
        self._durations: deque[float] = deque(maxlen=_NUM_DURATIONS)
        self._last_steps: dict[str, int] = {}
        self._p99_s = 0.0
        self._healed: dict[Kind, float] = {}
        self._episode: _Episode | None = None
        self._excused_s = 0.0
        """Quiet before this moment does not count: a pause, a suspended job, a node not heard of."""
        self._stragglers = Stragglers()

    # --- what is seen -----------------------------------------------------------------------------------------------------------------

    def begin(self, attempt: int, num_ranks: int) -> None:
        """All ranks of an attempt are about to start."""
        self._attempt, self._num_ranks = attempt, num_ranks
        self._samples, self._gone, self._last_steps = {}, set(), {}
        self._frozen_since, self._traced_since = {}, {}
        self._episode, self._excused_s = None, 0.0
        self._stragglers = Stragglers()

    def exited(self, attempt: int, rank: int) -> None:
        """A rank has ended with 0."""
        if attempt == self._attempt:
            self._samples.pop(rank, None)
            self._frozen_since.pop(rank, None)
            self._traced_since.pop(rank, None)
            self._gone.add(rank)
            if self._episode is not None:
                self._episode.looks.pop(rank, None)

    def see(self, progress: NodeProgress, now: float) -> None:
        if progress.attempt != self._attempt:
            return
        for sample in progress.samples:
            if sample.rank in self._gone:
                continue
            self._samples[sample.rank] = (sample, now)
            for state, since in (("T", self._frozen_since), ("t", self._traced_since)):
                if sample.state == state:
                    since.setdefault(sample.rank, now)
                else:
                    since.pop(sample.rank, None)
            if self._episode is not None:
                self._episode.looks.setdefault(sample.rank, Looks()).see(sample)
        steps = max((sample.steps or 0 for sample in progress.samples), default=0)
        if steps > self._last_steps.get(progress.node_id, 0):
            self._last_steps[progress.node_id] = steps
            longest_s = max(sample.step_s or 0.0 for sample in progress.samples)
            self._longest_step_s = max(self._longest_step_s, longest_s)
        self._stragglers.see(progress.samples, now)

    def see_stacks(self, taken: StacksTaken) -> None:
        episode = self._episode
        if taken.attempt != self._attempt or episode is None or taken.is_final or taken.look < episode.first_look:
            return
        for stack in taken.stacks:
            if stack.rank in self._gone:
                continue
            episode.looks.setdefault(stack.rank, Looks()).see_stack(stack)

    @property
    def samples(self) -> Sequence[RankSample]:
        """The last of each rank that is alive."""
        return [sample for sample, _ in self._samples.values()]

    @property
    def stragglers(self) -> Sequence[int]:
        return tuple(self._stragglers.named)

    @property
    def hung(self) -> Sequence[int]:
        """Ranks that keep the others waiting now, as far as it was said."""
        told = (self._episode.named or self._episode.noticed) if self._episode is not None else None
        return told.culprits if told is not None else ()

    @property
    def is_given_up(self) -> bool:
        """It was given up, and nothing has moved since."""
        return self._episode is not None and self._episode.is_given_up

    @property
    def p99_step_s(self) -> float:
        """Of the steps seen so far; 0 before the first."""
        return self._p99_s

    # --- what is thought of it ----------------------------------------------------------------------------------------------------------

    def judge(self, now: float) -> Sequence[Finding]:
        """To be called about once a second."""
        self._learn()
        findings: list[Finding] = list(self._stragglers.judge(now))
        if not self._rules.is_on or not self._samples:
            return findings
        samples = {rank: sample for rank, (sample, _) in self._samples.items()}
        if self._is_excused(samples, now):
            self._episode, self._excused_s = None, now
            return findings
        frozen = self._frozen(now)
        base_s = patience.base_limit_s(
            self._rules, self._p99_s, has_stepped=any(sample.steps for sample in samples.values())
        )
        if len(self._frozen_since) == len(samples):
            self._excused_s = now  # as a whole: somebody may have wanted it, and when it goes on it begins afresh
        if base_s is None and not frozen:
            return [*findings, *self._end_episode()]
        limit_s = base_s if base_s is not None else self._rules.limits.quick_s
        longest_s = now - self._excused_s
        quiet_s_of = {rank: min(sample.quiet_s, longest_s) for rank, sample in samples.items()}
        bystanders = _bystanders(samples) - frozen
        quiet = {rank for rank, quiet_s in quiet_s_of.items() if quiet_s >= _LOOK_AT[0] * limit_s} - bystanders | frozen
        if not quiet:
            return [*findings, *self._end_episode()]
        if self._episode is None:
            self._episode = _Episode(self._num_looks + 1)
        episode = self._episode
        quiet_s = max([now - self._frozen_since[rank] for rank in frozen] or [quiet_s_of[rank] for rank in quiet])
        episode.longest_s = max(episode.longest_s, quiet_s)
        findings += self._ask_for_stacks(episode, quiet_s, limit_s)
        moving = set(samples) - quiet - bystanders
        diagnosis = diagnose(episode.looks, quiet, moving, self._gone, frozen, bystanders)
        if diagnosis is not None:
            findings += self._conclude(episode, diagnosis, quiet_s, limit_s, is_moving=bool(moving))
        return findings

    def _learn(self) -> None:
        if self._longest_step_s:
            self._durations.append(self._longest_step_s)
            self._longest_step_s = 0.0
            ordered = sorted(self._durations)
            self._p99_s = ordered[math.ceil(0.99 * len(ordered)) - 1]

    def _is_excused(self, samples: Mapping[int, RankSample], now: float) -> bool:
        """The script asked for it, a person has a debugger in a rank, or not all ranks are seen."""
        is_paused = any(sample.paused_s is not None for sample in samples.values())
        is_traced = any(now - since_s >= _TRACED_S for since_s in self._traced_since.values())
        is_fresh = all(now - seen_s < _STALE_S for _, seen_s in self._samples.values())
        is_complete = is_fresh and len(self._samples) + len(self._gone) >= self._num_ranks
        return is_paused or is_traced or not is_complete

    def _frozen(self, now: float) -> set[int]:
        """Stopped for long enough."""
        limit_s = self._rules.timeout_s or self._rules.limits.quick_s
        return {rank for rank, since_s in self._frozen_since.items() if now - since_s >= _LOOK_AT[0] * limit_s}

    def _ask_for_stacks(self, episode: _Episode, quiet_s: float, limit_s: float) -> Sequence[Finding]:
        """At shares of the limit, then at twice, four times, … of it: what is given up later must have stood still all the time."""
        asked = episode.num_asked
        share = _LOOK_AT[asked] if asked < len(_LOOK_AT) else 2.0 ** (asked - len(_LOOK_AT) + 1)
        if quiet_s < share * limit_s:
            return ()
        episode.num_asked += 1
        self._num_looks += 1
        return (NeedStacks(self._num_looks),)

    def _conclude(
        self, episode: _Episode, diagnosis: Diagnosis, quiet_s: float, base_s: float, *, is_moving: bool
    ) -> Sequence[Finding]:
        name_s, give_up_s = patience.limits_s(self._rules, diagnosis, base_s, self._healed, is_moving=is_moving)
        is_looked_at = diagnosis.kind is Kind.FROZEN or episode.is_looked_at()
        if not is_looked_at and quiet_s < name_s + self._rules.limits.looks_s:
            return ()
        findings: list[Finding] = list(self._notice(episode, diagnosis, quiet_s, base_s, name_s))
        if quiet_s >= name_s and (episode.named is None or _is_other(diagnosis, episode.named)):
            episode.named = diagnosis
            groups = _standing(episode.looks)
            left_s = None if math.isinf(give_up_s) else max(0.0, give_up_s - quiet_s)
            findings.append(Named(diagnosis, quiet_s, name_s, groups, left_s))
        if quiet_s >= give_up_s and not episode.is_given_up and episode.named is not None:
            episode.is_given_up = True
            findings.append(GivenUp(diagnosis, quiet_s, give_up_s))
        return findings

    def _notice(
        self, episode: _Episode, diagnosis: Diagnosis, quiet_s: float, base_s: float, name_s: float
    ) -> Sequence[Finding]:
        notice_s = patience.notice_s(self._rules, diagnosis, base_s, self._healed)
        if notice_s is None or not notice_s <= quiet_s < name_s or episode.noticed or episode.named:
            return ()
        episode.noticed = diagnosis
        frames = episode.looks[diagnosis.culprits[0]].frames
        return (Noticed(diagnosis, quiet_s, frames[-1] if frames else (), name_s),)

    def _end_episode(self) -> Sequence[Finding]:
        episode, self._episode = self._episode, None
        told = (episode.named or episode.noticed) if episode is not None else None
        if episode is None or told is None:
            return ()
        if told.kind is not Kind.FROZEN:
            sort = sort_of(told.kind)
            self._healed[sort] = max(self._healed.get(sort, 0.0), episode.longest_s)
        return (GoesOn(told, episode.longest_s),) if episode.named is not None else ()


def _bystanders(samples: Mapping[int, RankSample]) -> set[int]:
    """Ranks that have no steps while others have: a coordinator, an actor, or one that was never to train."""
    without = {rank for rank, sample in samples.items() if not sample.steps}
    return without if len(without) < len(samples) else set()


def _is_other(now: Diagnosis, before: Diagnosis) -> bool:
    """Worth saying again: somebody else's doing, not another word for the same."""
    return now.culprits != before.culprits and now.kind not in (Kind.WORKING, Kind.QUIET)


def _standing(looks: dict[int, Looks]) -> tuple[tuple[Frames, tuple[int, ...]], ...]:
    """Where ranks stand; the group that waits last, for it is the one that needs no reading."""
    frames = {rank: seen.frames[-1] for rank, seen in looks.items() if seen.frames}
    groups = [(where, tuple(ranks)) for where, ranks in group(frames)]
    return tuple(sorted(groups, key=lambda entry: (is_collective(entry[0]), len(entry[1]))))

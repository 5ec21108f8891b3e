"""Watches the gang of one job while it runs: feeds `gang.health`, and turns what it finds into words, commands and facts.

It owns no thread: the controller hands it the events of an attempt and performs what comes back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from launcher import hangwords
from launcher.gang import patience
from launcher.gang.events import RankExited, RankHung
from launcher.gang.health import Finding, GivenUp, GoesOn, Health, Named, NeedStacks, Noticed
from launcher.gang.observations import NodeProgress, StacksTaken
from launcher.gang.patience import HangRules, look_every_s
from launcher.gang.startup import Startup
from launcher.gang.stragglers import Straggling
from launcher.gang.world import World
from launcher.spec import JobSpec, OnHang

_STACKS_S = 5.0
"""How long the end of a hung attempt waits for its stacks to be on disk."""
_NATIVE_S = 1.5
"""When they are, native frames have so much more: reading torch's symbols takes a second, and with the ranks they are gone."""


@dataclass(frozen=True)
class TakeStacks:
    """On every node of the world."""

    attempt: int
    look: int
    is_final: bool


@dataclass(frozen=True)
class Say:
    """To the user and the journal."""

    text: str


Effect = TakeStacks | Say | RankHung | Finding


class Monitor:
    """One job. Called from the controller's thread only."""

    def __init__(self, spec: JobSpec, run_dir: str) -> None:
        self._spec = spec
        self._run_dir = run_dir
        is_on = spec.hang_timeout_s != float("inf")
        rules = HangRules(is_on, spec.hang_timeout_s if is_on else None, patience.LIMITS)
        self.health = Health(rules)
        self._rules = rules
        self._startup = Startup(rules, 0)
        self._judge_every_s = look_every_s(spec.hang_timeout_s) / 2
        """Half of how often each node is heard of: with a thousand nodes, not at each word."""
        self._judged_s = float("-inf")
        self._world: World | None = None
        self._attempt = -1
        self._due: tuple[RankHung, float] | None = None
        self._final: set[str] = set()

    def begin(self, attempt: int, world: World) -> None:
        """The ranks of this attempt are about to start."""
        self._attempt, self._world, self._due, self._final = attempt, world, None, set()
        self.health.begin(attempt, world.world_size)
        self._startup = Startup(self._rules, world.world_size)

    def stop(self) -> None:
        """The attempt is being stopped: nothing of it is judged any more."""
        self._world, self._due = None, None

    def exited(self, event: RankExited) -> None:
        if event.status.is_success:
            self.health.exited(event.attempt, event.rank)
            if event.attempt == self._attempt:
                self._startup.exited(event.rank)

    def see(self, event: NodeProgress | StacksTaken, now: float) -> Sequence[Effect]:
        """What follows from this, and from the time that has passed."""
        if self._world is None or event.attempt != self._attempt:
            return ()
        if isinstance(event, StacksTaken):
            self.health.see_stacks(event)
            self._startup.see_stacks(event)
            if event.is_final:
                self._final.add(event.node_id)
        else:
            self.health.see(event, now)
            self._startup.see(event, now)
        effects: list[Effect] = []
        is_due = now - self._judged_s >= self._judge_every_s
        self._judged_s = now if is_due else self._judged_s
        for finding in (*self.health.judge(now), *self._startup.judge(now)) if is_due else ():
            effects += self._follow(finding, self._world, now)
        return [*effects, *self._give_up_if_due(self._world, now)]

    def _follow(self, finding: Finding, world: World, now: float) -> Sequence[Effect]:
        match finding:
            case NeedStacks(look=look):
                return (TakeStacks(self._attempt, look, False),)
            case Noticed():
                return (finding, Say(hangwords.noticed(finding, world)))
            case Named():
                stacks = f"{self._run_dir}/attempt_{self._attempt}/stacks"
                text = hangwords.named(finding, world, stacks, self._spec.on_hang)
                return (finding, Say(text), TakeStacks(self._attempt, 0, True))
            case GivenUp() if self._spec.on_hang is OnHang.REPORT:
                return (finding,)
            case GivenUp(diagnosis=diagnosis):
                rank = diagnosis.culprits[0] if diagnosis.culprits else None
                node = world.member(rank).node if rank is not None else world.nodes[0]
                reason = hangwords.given_up(finding, world)
                may_restart = self._spec.on_hang is OnHang.RESTART
                hung = RankHung(self._attempt, node.node_id, rank, reason, time.time(), may_restart)
                self._due = (hung, now + _STACKS_S)
                return (finding,)
            case GoesOn():
                return (finding, Say(hangwords.goes_on(finding, world)))
            case Straggling():
                return (finding, Say(hangwords.straggling(finding, world)))

    def _give_up_if_due(self, world: World, now: float) -> Sequence[Effect]:
        if not (self.health.is_given_up or self._startup.is_given_up):
            self._due = None  # it went on while its stacks were being written
        if self._due is None:
            return ()
        hung, due_s = self._due
        if self._final >= set(world.node_ids()):
            due_s = min(due_s, now + _NATIVE_S)
            self._due = (hung, due_s)
        if now < due_s:
            return ()
        self._due = None
        return (hung,)

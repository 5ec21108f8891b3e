"""From findings to commands, words and facts: when stacks are asked for, how long they are waited for, and what the policy makes of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from launcher.gang.events import RankHung
from launcher.gang.observations import NodeProgress, RankSample, RankStack, StacksTaken
from launcher.gang.world import NodeInfo, arrange
from launcher.monitor import Effect, Monitor, Say, TakeStacks
from launcher.spec import JobSpec, OnHang, Program, ProgramKind

WAITS = ("_engine_run_backward (torch/autograd/graph.py:979)", "<module> (train.py:9)")
SPINS = ("spin (train.py:5)", "<module> (train.py:7)")


class Scene:
    """Two nodes of one rank each; the second's never comes back."""

    def __init__(
        self, on_hang: OnHang = OnHang.RESTART, *, answers: bool = True, timeout_s: float | None = 10.0
    ) -> None:
        spec = JobSpec(Program(ProgramKind.SCRIPT, "train.py"), on_hang=on_hang, hang_timeout_s=timeout_s)
        self.monitor = Monitor(spec, "runs/r")
        self.monitor.begin(0, arrange([NodeInfo(name, f"host-{name}", name, 1) for name in "ab"], None, 2))
        self.answers = answers
        self.now = 0.0
        self.quiet_s = 0.0
        self.effects: list[tuple[float, Effect]] = []

    def second(self, *, moves: bool = False) -> None:
        self.now += 1.0
        self.quiet_s = 0.1 if moves else self.quiet_s + 1.0
        for rank, name in enumerate("ab"):
            sample = RankSample(rank, self.now, steps=5, step_age_s=self.quiet_s, step_s=0.1, state="SR"[rank])
            self._take(self.monitor.see(NodeProgress(0, name, 0.0, (sample,)), self.now))

    def _take(self, effects: object) -> None:
        for effect in effects:  # type: ignore[attr-defined]
            self.effects.append((self.now, effect))
            if isinstance(effect, TakeStacks) and (self.answers or not effect.is_final):
                for rank, (name, frames) in enumerate((("a", WAITS), ("b", SPINS))):
                    taken = StacksTaken(0, name, effect.look, (RankStack(rank, frames),), effect.is_final)
                    self._take(self.monitor.see(taken, self.now))

    def when(self, what: Callable[[Effect], bool]) -> list[float]:
        return [at for at, effect in self.effects if what(effect)]


def is_hung(effect: Effect) -> bool:
    return isinstance(effect, RankHung)


def is_final(effect: Effect) -> bool:
    return isinstance(effect, TakeStacks) and effect.is_final


def test_a_hung_rank_is_said_with_its_host_and_is_a_failure_when_the_stacks_are_on_disk() -> None:
    scene = Scene()
    for _ in range(30):
        scene.second(moves=scene.now < 5)
    assert (scene.when(is_final), scene.when(is_hung)) == ([15.0], [17.0]), "native frames have a moment more"
    (hung,) = [effect for _, effect in scene.effects if isinstance(effect, RankHung)]
    assert (hung.rank, hung.node_id, hung.may_restart) == (1, "b", True)
    (said,) = [effect.text for _, effect in scene.effects if isinstance(effect, Say)]
    assert said.startswith("rank 1 on host-b spins in one place, and 1 other waits for it; nothing has moved for 10 s")
    assert "stacks of all threads: runs/r/attempt_0/stacks" in said


def test_who_computes_while_the_others_wait_is_a_line_and_nothing_is_done() -> None:
    """With learnt limits: it may be one long call."""
    scene = Scene(timeout_s=None)
    for _ in range(40):
        scene.second(moves=scene.now < 5)
    (said,) = [effect.text for _, effect in scene.effects if isinstance(effect, Say)]
    assert said == (
        "rank 1 on host-b computes in one place, and 1 other waits for it since 10 s: spin (train.py:5) ← <module> (train.py:7) "
        "(called a hang after 60 s)"
    )
    assert not scene.when(is_final) and not scene.when(is_hung)


def test_stacks_that_do_not_come_are_waited_for_five_seconds() -> None:
    """A node that cannot read them must not keep a hung job alive."""
    scene = Scene(answers=False)
    for _ in range(30):
        scene.second(moves=scene.now < 5)
    assert (scene.when(is_final), scene.when(is_hung)) == ([15.0], [20.0])


def test_what_goes_on_while_its_stacks_are_written_is_not_given_up() -> None:
    scene = Scene(answers=False)
    for _ in range(30):
        scene.second(moves=scene.now < 5 or scene.now >= 17)
    assert scene.when(is_final) == [15.0]
    assert scene.when(is_hung) == []


@pytest.mark.parametrize(("on_hang", "may_restart"), [(OnHang.STOP, [False]), (OnHang.REPORT, [])])
def test_the_users_policy_holds(on_hang: OnHang, may_restart: list[bool]) -> None:
    scene = Scene(on_hang)
    for _ in range(40):
        scene.second(moves=scene.now < 5)
    assert [effect.may_restart for _, effect in scene.effects if isinstance(effect, RankHung)] == may_restart
    assert len(scene.when(lambda effect: isinstance(effect, Say))) == 1


def test_news_of_an_older_attempt_and_of_one_that_is_being_stopped_are_ignored() -> None:
    scene = Scene()
    for _ in range(12):
        scene.second(moves=scene.now < 5)
    scene.monitor.stop()
    before = len(scene.effects)
    for _ in range(20):
        scene.second()
    assert len(scene.effects) == before

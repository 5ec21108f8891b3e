"""Hung or busy: what is concluded from what is seen of ranks. Time moves by hand, a second at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.gang.diagnosis import Kind
from launcher.gang.health import Finding, GivenUp, GoesOn, Health, Named, NeedStacks, Noticed
from launcher.gang.observations import NodeProgress, RankSample, RankStack, StacksTaken
from launcher.gang.patience import HangRules
from launcher.gang.stragglers import NUM_WINDOWS, WINDOW_S, Straggling
from launcher.gang.work import known_work

WAITS = (
    "_engine_run_backward (torch/autograd/graph.py:979)",
    "backward (torch/_tensor.py:623)",
    "<module> (train.py:9)",
)
LEARNT = HangRules()
SPINS = ("spin (train.py:5)", "<module> (train.py:7)")


@dataclass
class Rank:
    """One rank as a test moves it."""

    steps: int | None = 0
    quiet_s: float = 0.0
    frames: Callable[[int], tuple[str, ...]] = lambda look: WAITS
    state: str = "S"
    cpu_s: float = 0.0
    io_bytes: int = 0
    is_busy: bool = False
    io_per_s: int = 0
    child_cpu_per_s: float = 0.0
    work: str = ""
    is_paused: bool = False
    waits_for_data: bool = False
    own_s: float = 0.0


@dataclass
class Gang:
    """Ranks on one node, and what was found about them."""

    ranks: list[Rank]
    rules: HangRules = LEARNT
    step_s: float = 1.0
    now: float = 0.0
    found: list[tuple[float, Finding]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.health = Health(self.rules)
        self.health.begin(0, len(self.ranks))

    def second(self, moving: Sequence[int] = ()) -> None:
        """A second passes; these ranks make progress in it."""
        self.now += 1.0
        samples = []
        for idx, rank in enumerate(self.ranks):
            rank.quiet_s = 0.1 if idx in moving else rank.quiet_s + 1.0
            if idx in moving:
                rank.steps = (rank.steps or 0) + 1
            rank.cpu_s += 1.0 if rank.is_busy else 0.0
            rank.io_bytes += rank.io_per_s
            samples.append(
                RankSample(
                    idx,
                    age_s=self.now,
                    steps=rank.steps or None,
                    step_age_s=rank.quiet_s if rank.steps else None,
                    step_s=self.step_s if (rank.steps or 0) > 1 else None,
                    own_s=rank.own_s,
                    waiting_s=rank.quiet_s if rank.waits_for_data else None,
                    paused_s=1.0 if rank.is_paused else None,
                    state=rank.state,
                    cpu_s=rank.cpu_s,
                    io_bytes=rank.io_bytes,
                    child_cpu_s=rank.child_cpu_per_s * self.now,
                    child_io_bytes=0,
                )
            )
        self.health.see(NodeProgress(0, "n", self.now, tuple(samples)), self.now)
        for finding in self.health.judge(self.now):
            self.found.append((self.now, finding))
            if isinstance(finding, NeedStacks):
                looks = [(rank, rank.frames(finding.look)) for rank in self.ranks]
                stacks = tuple(
                    RankStack(idx, frames, work=rank.work or known_work(frames))
                    for idx, (rank, frames) in enumerate(looks)
                )
                self.health.see_stacks(StacksTaken(0, "n", finding.look, stacks))

    def train(self, seconds: int, moving: Sequence[int] | None = None) -> Gang:
        for _ in range(seconds):
            self.second(range(len(self.ranks)) if moving is None else moving)
        return self

    def stand_still(self, seconds: int, moving: Sequence[int] = ()) -> list[Finding]:
        """What is found meanwhile, besides looking."""
        self.found, began_s = [], self.now
        for _ in range(seconds):
            self.second(moving)
        self.began_s = began_s
        return [finding for _, finding in self.found if not isinstance(finding, NeedStacks)]

    def named_after_s(self) -> float | None:
        return next((at - self.began_s for at, finding in self.found if isinstance(finding, Named)), None)

    def given_up_after_s(self) -> float | None:
        return next((at - self.began_s for at, finding in self.found if isinstance(finding, GivenUp)), None)


def gang(num_ranks: int, culprit: int | None = None, rules: HangRules = LEARNT, **what: object) -> Gang:
    ranks = [Rank() for _ in range(num_ranks)]
    if culprit is not None:
        for name, value in what.items():
            setattr(ranks[culprit], name, value)
    return Gang(ranks, rules)


# --- who is to blame ----------------------------------------------------------------------------------------------------------------------


def test_a_livelocked_rank_is_told_in_ten_seconds_called_a_hang_in_sixty_and_given_up_in_ten_minutes() -> None:
    """A loop that never ends looks like one long call: a line says so at once, and nothing is done before it is too long for one."""
    job = gang(4, 2, frames=lambda look: SPINS, is_busy=True).train(60)
    noticed, named, given_up = job.stand_still(700)
    assert isinstance(noticed, Noticed) and isinstance(named, Named) and isinstance(given_up, GivenUp)
    assert (noticed.diagnosis.kind, noticed.diagnosis.culprits) == (Kind.SPINNING, (2,))
    assert noticed.where == SPINS
    at_s = {type(finding): at - job.began_s for at, finding in job.found}
    assert at_s[Noticed] <= 11
    assert noticed.named_at_s == 60 and 60 <= at_s[Named] <= 61
    assert 600 <= at_s[GivenUp] <= 602
    assert named.groups[0] == (SPINS, (2,)), "the odd one out is shown first"
    assert named.groups[1][1] == (0, 1, 3)


def test_one_long_call_without_io_is_a_line_once_and_no_hang() -> None:
    """A metric computed in C by rank 0 alone, every thousand steps, while the others wait."""
    job = gang(4, 0, frames=lambda look: SPINS, is_busy=True).train(60)
    (noticed,) = job.stand_still(25)
    assert isinstance(noticed, Noticed) and job.health.hung == (0,)
    job.found = []
    job.train(60)
    assert [finding for _, finding in job.found] == [] and job.health.hung == ()
    assert job.stand_still(30) == [], "the like, and not much longer, is no news"
    job.train(60)
    job.ranks[0].is_busy = False
    (named,) = job.stand_still(15)
    assert isinstance(named, Named) and job.named_after_s() is not None and job.named_after_s() <= 11, "but sleep is"


def test_who_waits_at_a_lock_file_waits_for_the_one_that_computes() -> None:
    """One rank of a node tokenises, the others wait for it at a lock file, those of other nodes in a barrier."""
    job = gang(4, 0, frames=lambda look: SPINS, is_busy=True)
    for rank in job.ranks[1:3]:
        rank.frames = lambda look: ("acquire (filelock/_api.py:344)", "load (data.py:9)", "<module> (train.py:9)")
    (noticed,) = job.train(60).stand_still(58)
    assert isinstance(noticed, Noticed) and noticed.diagnosis.culprits == (0,)


def test_a_long_call_of_all_ranks_or_of_the_only_one_is_no_hang_for_a_minute() -> None:
    """Nobody waits for anybody: each tokenises its part."""
    for num_ranks in (1, 4):
        job = gang(num_ranks)
        for rank in job.ranks:
            rank.frames, rank.is_busy = (lambda look: ("encode (train.py:20)", "<module> (train.py:9)")), True
        assert job.train(60).stand_still(58) == []
        (named,) = job.stand_still(10)
        assert (named.diagnosis.kind, len(named.diagnosis.culprits)) == (Kind.SPINNING, num_ranks)


def test_a_rank_that_stops_computing_and_sleeps_is_named_without_more_ado() -> None:
    job = gang(2, 1, frames=lambda look: SPINS, is_busy=True).train(60)
    assert [type(finding) for finding in job.stand_still(20)] == [Noticed]
    job.ranks[1].is_busy = False
    (named,) = job.stand_still(25)
    assert isinstance(named, Named) and named.diagnosis.kind is Kind.AWAY


def test_a_rank_that_waits_for_a_disk_is_told_later() -> None:
    """One write to a slow file system takes its time, and one that has gone away takes for ever: both are seen as state D."""
    job = gang(2, 0, frames=lambda look: ("keep (train.py:20)", "<module> (train.py:9)"), state="D").train(60)
    assert job.stand_still(28) == []
    (named,) = job.stand_still(10)
    assert isinstance(named, Named)
    assert (named.diagnosis.kind, named.diagnosis.culprits) == (Kind.DEVICE, (0,))
    job.stand_still(700)
    assert 560 <= (job.given_up_after_s() or 0) <= 570, "600 s since the last step"


def test_a_rank_that_sleeps_elsewhere_has_left_the_step() -> None:
    job = gang(2, 0, frames=lambda look: ("accept (socket.py:293)", "<module> (train.py:7)")).train(60)
    (named,) = job.stand_still(20)
    assert isinstance(named, Named)
    assert (named.diagnosis.kind, named.diagnosis.culprits) == (Kind.AWAY, (0,))


def test_a_stopped_rank_is_given_up_at_once_even_before_the_first_step() -> None:
    """State T leaves no doubt."""
    job = gang(2, 1)
    job.train(3, moving=[])
    job.ranks[1].state = "T"
    found = job.stand_still(12)
    assert [type(finding) for finding in found] == [Named, GivenUp]
    assert found[0].diagnosis.culprits == (1,)
    assert job.named_after_s() is not None and job.named_after_s() <= 12


def test_a_job_that_is_suspended_as_a_whole_is_named_and_left_alone_for_an_hour() -> None:
    """If all are stopped, somebody may have wanted it."""
    job = gang(3).train(60)
    for rank in job.ranks:
        rank.state = "T"
    (named,) = job.stand_still(3500)
    assert (named.diagnosis.kind, named.diagnosis.culprits) == (Kind.FROZEN, (0, 1, 2))
    assert [type(finding) for finding in job.stand_still(200)] == [GivenUp]


def test_a_rank_that_has_ended_while_the_others_wait_for_it_is_named() -> None:
    """Uneven data: one rank runs out of batches and leaves, the others stay in their collective for ever."""
    job = gang(3).train(60)
    job.health.exited(0, 1)
    found = job.stand_still(20)
    assert [finding.diagnosis.culprits for finding in found] == [(1,)]
    assert found[0].diagnosis.kind is Kind.GONE


def test_ranks_that_all_wait_for_each_other_are_told_later() -> None:
    job = gang(4).train(60)
    assert job.stand_still(25) == []
    (named,) = job.stand_still(10)
    assert named.diagnosis.kind is Kind.ALL_WAIT


def test_where_no_frame_tells_the_majority_is_taken_to_wait() -> None:
    """`loss.item()` waits for the GPU, which waits for the others, and no collective is to be seen."""
    job = gang(5, 3, frames=lambda look: SPINS)
    for idx in (0, 1, 2, 4):
        job.ranks[idx].frames = lambda look: ("train (train.py:40)", "<module> (train.py:60)")
    job.train(60)
    (named,) = job.stand_still(20)
    assert named.diagnosis.culprits == (3,)


def test_a_rank_that_called_another_collective_than_the_others_has_gone_astray() -> None:
    """All wait for each other, and one of them waits for something else: `if rank == 2: dist.barrier()`."""
    job = gang(4, 2, frames=lambda look: ("barrier (torch/distributed/distributed_c10d.py:9)", "<module> (train.py:7)"))
    job.train(60)
    (named,) = job.stand_still(20)
    assert (named.diagnosis.kind, named.diagnosis.culprits) == (Kind.ASTRAY, (2,))
    assert job.named_after_s() is not None and job.named_after_s() <= 11


def test_stages_of_a_pipeline_wait_in_different_places_and_none_is_accused() -> None:
    job = gang(4, 0, frames=lambda look: ("recv (torch/distributed/distributed_c10d.py:9)", "<module> (train.py:7)"))
    (named,) = job.train(60).stand_still(50)
    assert (named.diagnosis.kind, named.diagnosis.culprits) == (Kind.ALL_WAIT, ())


def test_two_ranks_that_both_stand_still_elsewhere_are_told_later_without_a_culprit() -> None:
    """`work.wait()` in the script: no frame says who waits for whom."""
    job = gang(2, 0, frames=lambda look: SPINS, is_busy=True)
    job.ranks[1].frames = lambda look: ("train (train.py:20)", "<module> (train.py:9)")
    (named,) = job.train(60).stand_still(60)
    assert (named.diagnosis.kind, named.diagnosis.culprits) == (Kind.STILL, ())
    assert 30 <= (job.named_after_s() or 0) <= 32


def test_looks_at_an_earlier_quiet_time_say_nothing_about_this_one() -> None:
    job = gang(2, 1, frames=lambda look: SPINS).train(60)
    job.stand_still(8)
    late = StacksTaken(0, "n", 2, (RankStack(0, WAITS), RankStack(1, ("other (train.py:1)",))))
    job.train(5).stand_still(7)
    job.health.see_stacks(late)
    (named,) = job.stand_still(10)
    assert named.diagnosis.kind is Kind.AWAY, "and not at work in two places"


# --- no false alarm -----------------------------------------------------------------------------------------------------------------------


WORK = {
    "checkpoint": {"frames": lambda look: (f"write{look} (train.py:9)",), "io_per_s": 200_000_000},
    "checkpoint-flushed": {"frames": lambda look: ("fsync (train.py:9)", "<module> (train.py:30)")},
    "checkpoint-in-one-call": {"frames": lambda look: ("save (torch/serialization.py:967)", "<module> (train.py:9)")},
    "upload": {"frames": lambda look: ("send (ssl.py:1180)", "<module> (train.py:9)")},
    "evaluation": {"frames": lambda look: (f"layer{look} (model.py:1)", "score (train.py:30)"), "is_busy": True},
    "evaluation-in-one-call": {"frames": lambda look: ("evaluate (train.py:30)",), "is_busy": True},
    "compilation": {"frames": lambda look: ("compile_fx (torch/_dynamo/convert_frame.py:9)",), "is_busy": True},
    "compilation-in-backward": {"frames": lambda look: WAITS, "work": "compiles"},
    "children": {"frames": lambda look: ("wait (popen.py:4)",), "child_cpu_per_s": 3.0},
}
"""What a healthy rank may do for long, while the others wait for it."""


@pytest.mark.parametrize("culprit", WORK.values(), ids=list(WORK))
def test_one_rank_at_work_for_minutes_while_the_others_wait_is_no_hang(culprit: dict[str, object]) -> None:
    """What rank 0 does alone: torchrun's users do it every thousand steps."""
    job = gang(4, 0, **culprit).train(60)
    assert job.stand_still(590) == []
    assert not [finding for finding in job.stand_still(2400) if isinstance(finding, GivenUp)]


def test_what_follows_the_last_step_may_take_as_long_as_it_takes() -> None:
    """A final evaluation, an export, texts that are generated: no step will come any more."""
    job = gang(2).train(60)
    for rank in job.ranks:
        rank.frames, rank.is_busy = (lambda look: (f"part{look % 7} (model.py:1)",)), True
    found = job.stand_still(5000)
    assert [type(finding) for finding in found] == [Named]
    assert found[0].gives_up_in_s is None


def test_a_long_backward_on_a_cpu_is_no_wait() -> None:
    job = gang(2).train(60)
    for rank in job.ranks:
        rank.is_busy = True
    assert job.stand_still(590) == []


def test_a_rank_that_makes_no_steps_is_nobodys_culprit() -> None:
    """A coordinator, an actor, a parameter server: it sleeps while the others train."""
    job = gang(3, 2, frames=lambda look: ("sleep (train.py:5)",))
    for _ in range(1000):
        job.second(moving=[0, 1])
    assert not [finding for _, finding in job.found if isinstance(finding, Named | GivenUp)]
    assert job.stand_still(500) == [], "nor are those that wait for its data hung"


def test_a_rank_that_stands_still_while_the_others_step_on_is_named_and_nothing_is_stopped() -> None:
    """They do not wait for it: to stop the job would cost what they do."""
    job = gang(3, 1, frames=lambda look: ("accept (socket.py:9)",)).train(60)
    found = job.stand_still(4500, moving=[0, 2])
    assert [(type(finding), finding.diagnosis.culprits) for finding in found] == [(Named, (1,))]


@pytest.mark.parametrize(("at_work", "given_up"), [(False, 600), (True, None)], ids=["idle", "at work"])
def test_a_loader_whose_workers_are_at_work_is_waited_for(at_work: bool, given_up: int | None) -> None:
    job = gang(2, 1, waits_for_data=True, child_cpu_per_s=2.0 if at_work else 0.0).train(60)
    job.ranks[1].frames = lambda look: ("_try_get_data (torch/utils/data/dataloader.py:1251)",)
    found = job.stand_still(3000)
    assert isinstance(found[0], Named) and found[0].diagnosis.culprits == (1,)
    assert 30 <= (job.named_after_s() or 0) <= 32
    after_s = job.given_up_after_s()
    assert after_s is None if given_up is None else given_up <= (after_s or 0) <= given_up + 3


def test_all_ranks_quiet_together_for_minutes_is_no_hang() -> None:
    job = gang(2).train(60)
    for rank in job.ranks:
        rank.frames = lambda look: (f"work{look % 7} (model.py:1)",)
    assert job.stand_still(500) == []


def test_a_job_without_steps_is_never_judged() -> None:
    """Inference, preprocessing, JAX, or a first step that compiles for an hour."""
    job = gang(3, 1, frames=lambda look: SPINS, is_busy=True)
    assert job.stand_still(4000) == []


def test_evaluation_through_a_data_loader_is_movement() -> None:
    job = gang(2).train(60)
    assert job.stand_still(500, moving=[0]) == [], "rank 0 moves, and rank 1 waits for it"


def test_a_pause_that_the_script_asked_for_is_not_judged_for_any_rank() -> None:
    job = gang(3, 1, frames=lambda look: SPINS, is_paused=True).train(60)
    assert job.stand_still(3000) == []


@pytest.mark.parametrize("how", ["paused", "suspended", "debugged"])
def test_what_was_quiet_for_a_reason_begins_afresh(how: str) -> None:
    """The last step is an hour ago when the pause ends, and the next one takes its second."""
    job = gang(2).train(60)
    for rank in job.ranks:
        rank.is_paused, rank.state = how == "paused", {"suspended": "T", "debugged": "t"}.get(how, "S")
    job.stand_still(3000)
    assert job.given_up_after_s() is None
    for rank in job.ranks:
        rank.is_paused, rank.state = False, "S"
    assert [type(finding) for finding in job.stand_still(25)] == ([GoesOn] if how == "suspended" else [])
    assert [type(finding) for finding in job.stand_still(10)] == [Named]


def test_slow_steps_have_a_limit_of_their_own() -> None:
    job = gang(2, 1, frames=lambda look: SPINS)
    job.step_s = 20.0
    for _ in range(30):
        job.train(1).stand_still(19)
    assert job.stand_still(35) == []
    (named,) = job.stand_still(10)
    assert isinstance(named, Named) and named.limit_s == 60.0


def test_what_resolved_itself_is_said_and_remembered() -> None:
    job = gang(2, 1, frames=lambda look: SPINS).train(60)
    assert [type(finding) for finding in job.stand_still(40)] == [Named]
    job.found = []
    job.train(1)
    assert [type(finding) for _, finding in job.found] == [GoesOn]
    job.train(60)
    assert job.stand_still(55) == [], "the same, for as long, is no news"
    assert [type(finding) for finding in job.stand_still(20)] == [Named]


def test_a_node_that_is_not_heard_of_is_not_judged() -> None:
    """Its silence is its heartbeat's business, and nothing is known of its ranks."""
    job = gang(2).train(60)
    assert list(job.health.judge(job.now + 100)) == []


# --- when it is given up ------------------------------------------------------------------------------------------------------------------


def test_being_named_is_quick_and_being_given_up_is_generous() -> None:
    job = gang(2, 1, frames=lambda look: SPINS).train(60)
    job.stand_still(400)
    assert job.given_up_after_s() is not None and 300 <= job.given_up_after_s() <= 302


def test_a_rank_that_moved_in_between_was_at_work_and_is_not_given_up() -> None:
    """Standing still is what was seen at every look, or it is not standing still."""
    job = gang(2, 1, frames=lambda look: SPINS if look < 6 else ("other (train.py:50)",), is_busy=True).train(60)
    job.stand_still(1000)
    assert job.given_up_after_s() is None


def test_a_limit_of_the_users_own_is_both() -> None:
    job = gang(2, 1, HangRules(timeout_s=30.0), frames=lambda look: SPINS).train(60)
    found = job.stand_still(40)
    assert [type(finding) for finding in found] == [Named, GivenUp]
    assert 30 <= (job.given_up_after_s() or 0) <= 31


def test_before_the_first_step_a_limit_of_the_users_own_is_ten_times_as_long() -> None:
    job = gang(2, 1, HangRules(timeout_s=30.0), frames=lambda look: SPINS)
    found = job.stand_still(320)
    assert [type(finding) for finding in found] == [Named, GivenUp]
    assert 300 <= (job.given_up_after_s() or 0) <= 301


def test_switched_off_is_off() -> None:
    job = gang(2, 1, HangRules(is_on=False), frames=lambda look: SPINS).train(60)
    assert job.stand_still(4000) == []


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_job_that_gets_on_is_never_named_or_given_up(data: st.DataObject) -> None:
    """Whatever ranks do in between, while none of them is quiet for as long as the limit."""
    job = gang(data.draw(st.integers(1, 4)))
    for _ in range(data.draw(st.integers(1, 30))):
        job.train(data.draw(st.integers(1, 5)))
        rank = job.ranks[data.draw(st.integers(0, len(job.ranks) - 1))]
        rank.frames = data.draw(st.sampled_from([lambda look: SPINS, lambda look: WAITS, lambda look: ()]))
        rank.is_busy = data.draw(st.booleans())
        job.stand_still(data.draw(st.integers(0, 8)))
        assert not [finding for _, finding in job.found if isinstance(finding, Named | GivenUp)]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 5), st.data())
def test_no_history_of_a_healthy_job_is_an_alarm(num_ranks: int, data: st.DataObject) -> None:
    """Steps of any length; in between all that healthy jobs do: one rank at work alone, all at work, batches of an evaluation, pauses,
    a debugger. Nothing of it is given up, and nothing is named in less than the ten minutes after which a word is no alarm."""
    job = gang(num_ranks)
    for _ in range(data.draw(st.integers(1, 8))):
        job.step_s = data.draw(st.sampled_from([0.1, 1.0, 7.0, 40.0]))
        for _ in range(data.draw(st.integers(1, 20))):
            job.train(1).stand_still(round(job.step_s) - 1)
        actor = job.ranks[data.draw(st.integers(0, num_ranks - 1))]
        seconds = data.draw(st.integers(1, 500))
        what = data.draw(st.sampled_from(["batches", "pause", "traced", "all", *WORK]))
        before = {name: getattr(actor, name) for name in vars(actor)}
        workers = job.ranks if what == "all" else [actor]
        for rank in workers:
            for name, value in WORK.get(what, {}).items():
                setattr(rank, name, value)
            rank.is_paused, rank.state = what == "pause", "t" if what == "traced" else "S"
            if what == "all":
                rank.frames = lambda look: (f"part{look} (model.py:1)",)
        moving = [job.ranks.index(actor)] if what == "batches" else []
        found = job.stand_still(min(seconds, 20) if what == "traced" else seconds, moving)
        assert not [finding for finding in found if isinstance(finding, Named | GivenUp)], (what, seconds)
        for rank in workers:
            for name in ("frames", "is_busy", "io_per_s", "child_cpu_per_s", "work", "is_paused", "state"):
                setattr(rank, name, before[name])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(2, 6), st.data())
def test_whoever_stands_still_for_ever_is_given_up_and_nobody_else(num_ranks: int, data: st.DataObject) -> None:
    culprit = data.draw(st.integers(0, num_ranks - 1))
    job = gang(num_ranks, culprit, frames=lambda look: SPINS, is_busy=data.draw(st.booleans()))
    job.train(data.draw(st.integers(20, 100)))
    found = job.stand_still(700)
    assert [finding.diagnosis.culprits for finding in found if isinstance(finding, Named)] == [(culprit,)]
    assert [finding.diagnosis.culprits for finding in found if isinstance(finding, GivenUp)] == [(culprit,)]


# --- stragglers ---------------------------------------------------------------------------------------------------------------------------


def straggle(own_s: Sequence[float], seconds: int) -> Gang:
    job = Gang([Rank() for _ in own_s])
    for _ in range(seconds):
        for rank, own in zip(job.ranks, own_s, strict=True):
            rank.own_s += own
        job.train(1)
    return job


def test_a_rank_that_makes_the_others_wait_for_minutes_is_named_once() -> None:
    job = straggle([0.2, 0.2, 0.7, 0.2], round((NUM_WINDOWS + 4) * WINDOW_S))
    (straggling,) = [finding for _, finding in job.found if isinstance(finding, Straggling)]
    assert (straggling.rank, round(straggling.own_s, 2), round(straggling.others_s, 2)) == (2, 0.7, 0.2)
    assert list(job.health.stragglers) == [2]
    for _ in range(round(2 * WINDOW_S)):
        for rank in job.ranks:
            rank.own_s += 0.2
        job.train(1)
    assert [finding.has_ended for _, finding in job.found if isinstance(finding, Straggling)] == [False, True]


@pytest.mark.parametrize("own_s", [[0.2, 0.2, 0.2], [0.01, 0.01, 0.08], [0.3, 0.35, 0.4]])
def test_small_differences_are_not_worth_a_line(own_s: Sequence[float]) -> None:
    assert not [finding for _, finding in straggle(own_s, 300).found if isinstance(finding, Straggling)]

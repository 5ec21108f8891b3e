"""Where the time of a run went: by hand for what matters, and for any journal at all that it adds up."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.journal import Entry
from launcher.report.data import report_data
from launcher.report.goodput import KINDS, Goodput, goodput
from launcher.report.metrics import values
from launcher.report.page import page
from launcher.report.record import _TAKES, RunRecord
from launcher.report.state import state_of
from launcher.report.text import report_text, status_text
from tests.launcher.report.journals import Story


def account(story: Story, until_s: float | None = None) -> Goodput:
    good = goodput(RunRecord(story.entries), until_s)
    assert sum(good.seconds.values()) == pytest.approx(good.total_s)
    return good


def test_an_even_run_is_a_start_then_steps_then_what_comes_after() -> None:
    story = Story().begin().attempt(2, 0).steps(10, 0, 1).steps(20, 0, 11).steps(30, 0, 21)
    story.stop(33, 0).end(34)
    good = account(story)
    assert good.seconds == pytest.approx(
        {"start": 10, "steps": 20, "data_wait": 0, "hang": 0, "restart": 0, "other": 4}
    )


def test_the_first_step_is_dated_back_from_when_it_was_first_seen() -> None:
    """Progress is looked at once a second, and many steps may be done by then."""
    story = Story().begin().attempt(2, 0).steps(10, 0, 41, step_s=0.1, step_age_s=0.05).steps(20, 0, 141, step_s=0.1)
    assert account(story).seconds["start"] == pytest.approx(10 - 0.05 - 4.0)


def test_waits_for_data_are_taken_out_of_the_steps_and_the_first_batch_belongs_to_the_start() -> None:
    story = Story().begin().attempt(2, 0).steps(10, 0, 1, waited_s=5.0).steps(30, 0, 21, waited_s=11.0).end(30)
    good = account(story)
    assert (good.seconds["start"], good.seconds["data_wait"], good.seconds["steps"]) == pytest.approx((10, 6, 14))


def test_a_failure_costs_until_the_next_attempts_first_step() -> None:
    story = Story().begin().attempt(2, 0).steps(10, 0, 1).steps(20, 0, 11).fail(20, 0)
    story.attempt(21, 1).steps(25, 1, 1).steps(45, 1, 21).end(45)
    assert account(story).seconds == pytest.approx(
        {"start": 10, "steps": 30, "data_wait": 0, "hang": 0, "restart": 5, "other": 0}
    )


def test_steps_that_were_made_twice_count_as_restart_where_the_script_says_where_it_resumed() -> None:
    """Goodput is what counted: 10 of these 20 steps were lost with the attempt."""
    told = {"total_steps": 100}
    story = Story().begin().attempt(2, 0).steps(10, 0, 1, **told).steps(30, 0, 21, **told).fail(30, 0)
    story.attempt(31, 1).steps(35, 1, 1, done_steps=11, **told).steps(45, 1, 11, done_steps=11, **told).end(45)
    good = account(story)
    assert good.redone_steps == 10
    assert good.redone_s == pytest.approx(20 * 10 / 21)
    assert good.seconds["restart"] == pytest.approx(5 + good.redone_s)


def test_a_long_time_without_a_step_is_not_training() -> None:
    """An evaluation of 60 s between steps of 1 s."""
    story = Story().begin().attempt(2, 0).steps(10, 0, 1).steps(20, 0, 11)
    for at_s in (30, 40, 50, 60, 70, 80):
        story.steps(at_s, 0, 11, step_age_s=at_s - 20.0)
    story.steps(90, 0, 20).end(90)
    good = account(story)
    assert good.seconds["other"] == pytest.approx(61, abs=2)
    assert good.seconds["steps"] == pytest.approx(19, abs=2)


def test_long_steps_are_training_where_all_steps_are_long() -> None:
    story = Story().begin().attempt(2, 0)
    for num in range(1, 20):
        for half in (0.0, 30.0):
            story.steps(60 * num + half, 0, num, step_s=60.0, step_age_s=half)
    assert account(story).seconds["other"] == 0


def test_what_is_within_pause_watch_is_not_training_however_short() -> None:
    story = Story().begin().attempt(2, 0).steps(10, 0, 1).steps(13, 0, 1, step_age_s=3.0, is_paused=True)
    story.steps(16, 0, 2, step_age_s=0.0).end(16)
    assert account(story).seconds["other"] == pytest.approx(5)


def test_a_hang_counts_from_the_last_step_to_its_end() -> None:
    story = Story().begin().attempt(2, 0).steps(10, 0, 1).steps(20, 0, 11).steps(30, 0, 11, step_age_s=10.0)
    story.hang(50, 0).attempt(51, 1).steps(55, 1, 1).end(55)
    good = account(story)
    assert (good.seconds["hang"], good.seconds["restart"]) == pytest.approx((30, 5))


def test_a_hang_that_was_named_and_passed_is_one_too() -> None:
    story = Story().begin().attempt(2, 0).steps(10, 0, 1).steps(20, 0, 11).steps(60, 0, 11, step_age_s=40.0)
    story.tell(61, "Named", attempt=0).steps(80, 0, 12).end(80)
    assert account(story).seconds["hang"] == pytest.approx(59)


def test_a_job_whose_steps_cannot_be_seen_has_start_restart_and_other() -> None:
    story = Story().begin().attempt(2, 0).fail(20, 0).attempt(21, 1, started_after_s=2).stop(40, 1).end(41)
    good = account(story)
    assert good.seconds == pytest.approx({"start": 3, "steps": 0, "data_wait": 0, "hang": 0, "restart": 3, "other": 35})


def test_the_goodput_of_a_job_whose_steps_cannot_be_seen_is_unknown_and_not_zero() -> None:
    """It may have trained all the time."""
    run = RunRecord(Story().begin().attempt(2, 0).stop(40, 0).end(41).entries)
    good, state = goodput(run), state_of(run, None)
    assert "goodput unknown: no optimizer step was seen" in report_text(run, state, good)
    assert report_data(run, state, good)["goodput"]["share"] is None
    assert "goodput_ratio" not in {value.name for value in values(run, state, good, None)}


def test_a_run_in_progress_is_accounted_for_until_now() -> None:
    story = Story().begin().attempt(2, 0).steps(10, 0, 1).steps(20, 0, 11)
    assert account(story, until_s=25.0).seconds["steps"] == pytest.approx(15)
    assert account(story, until_s=100.0).seconds["other"] == pytest.approx(80), "no step for 80 s is no training"


numbers = st.one_of(st.integers(-3, 2000), st.floats(0, 1e4), st.none(), st.just("x"), st.just("inf"), st.booleans())
fields = st.dictionaries(
    st.sampled_from(
        [
            "steps",
            "waited_s",
            "samples",
            "step_s",
            "step_age_s",
            "total_steps",
            "done_steps",
            "num_alive",
            "is_paused",
            "exit_code",
            "reason",
            "node_id",
            "text",
            "hung",
            "signum",
            "failure",
            "root",
            "is_new_root",
            "plan",
            "nodes",
            "rank",
            "own_s",
            "is_data",
        ]
    ),
    st.one_of(
        numbers,
        st.just({"status": {"code": 1, "signum": None}, "node_id": "n", "rank": 0, "exception": {"message": "m"}}),
        st.just({"reason": "r", "may_restart": True}),
        st.just({"attempt": 1, "world": {"nodes": [{"node_id": "n", "num_ranks": 2}, 3]}}),
        st.just([{"node_id": "n", "hostname": "h"}, None]),
        st.just([1, "a"]),
    ),
)


@st.composite
def entries(draw: Any) -> list[Entry]:
    """Journals as they might be: with lines lost, twice, out of order, of other versions."""
    found, at_s = [], 0.0
    for _ in range(draw(st.integers(1, 40))):
        at_s += draw(st.floats(-1.0, 100.0))
        kind = draw(st.sampled_from([*_TAKES, "GangProgress", "GangProgress", "Unknown"]))
        found.append(Entry(kind, 1e9 + at_s, at_s, {**draw(fields), "attempt": draw(st.integers(-1, 4))}))
    return found


@settings(max_examples=120, deadline=None)
@given(entries(), st.one_of(st.none(), st.floats(0, 1e5)))
def test_whatever_a_journal_holds_the_shares_add_up_to_all_of_its_time(
    journal: list[Entry], until_s: float | None
) -> None:
    """The promise of the report, and that no journal makes it fail."""
    run = RunRecord(journal)
    good = goodput(run, until_s)
    assert all(seconds >= 0 for seconds in good.seconds.values())
    if good.total_s > 0:
        assert sum(good.shares.values()) == pytest.approx(1.0, abs=0.001)
    state = state_of(run, None, 1.0)
    assert status_text(run, state, good.total_s, 1.0)
    assert report_text(run, state, good)
    assert page(run, state, good).startswith("<!doctype html>")
    assert all(value.value >= 0 for value in values(run, state, good, None))
    assert set(report_data(run, state, good)["goodput"]["shares"]) == set(KINDS)


@st.composite
def histories(draw: Any) -> tuple[Story, float]:
    """Whole jobs, some attempts long, with waits, gaps and ends of every kind."""
    story, at_s = Story().begin(), draw(st.floats(0.1, 5))
    num_attempts = draw(st.integers(1, 5))
    for number in range(num_attempts):
        story.attempt(at_s, number)
        at_s += draw(st.floats(1, 30))
        step_s, steps, waited_s = draw(st.floats(0.01, 5)), 0, 0.0
        for _ in range(draw(st.integers(0, 12))):
            took_s = draw(st.floats(1, 60))
            made = draw(st.integers(0, max(1, int(took_s / step_s))))
            steps, at_s = steps + made, at_s + took_s
            waited_s += draw(st.floats(0, 1)) * took_s if made else 0.0
            story.steps(at_s, number, steps or None, waited_s=waited_s, step_s=step_s, step_age_s=draw(st.floats(0, 1)))
        how = draw(st.sampled_from([story.fail, story.hang, story.stop]))
        at_s += draw(st.floats(0, 100))
        how(at_s, number)
        at_s += draw(st.floats(0.5, 20))
    return story.end(at_s), at_s


@settings(max_examples=100, deadline=None)
@given(histories())
def test_every_history_of_a_job_adds_up(history: tuple[Story, float]) -> None:
    story, total_s = history
    good = account(story)
    assert good.total_s == pytest.approx(total_s)
    assert all(seconds >= 0 for seconds in good.seconds.values())
    ends = [0.0, *(piece.end_s for piece in good.pieces)]
    assert [piece.begin_s for piece in good.pieces] == pytest.approx(ends[:-1]), (
        "pieces follow each other without a gap"
    )

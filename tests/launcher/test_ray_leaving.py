"""A node that was told to leave is held until its ranks have ended and their output is shown, and no longer."""

from __future__ import annotations

import pytest

from launcher.cluster.ray.leaving import Leaving
from launcher.gang.events import AttemptEnded, Event, Output, OutputEnded

NODE = "a#1"


def told(announced: bool = True) -> Leaving:
    leaving = Leaving()
    assert leaving.tell(NODE) and not leaving.tell(NODE) and NODE in leaving
    if announced:
        leaving.announced(NODE)
    return leaving


@pytest.mark.parametrize(
    "news",
    [
        (AttemptEnded(2, NODE), OutputEnded(2, NODE)),
        (OutputEnded(2, NODE), AttemptEnded(2, NODE)),
    ],
)
def test_it_may_go_when_its_ranks_have_ended_and_their_output_is_shown(news: tuple[Event | Output, ...]) -> None:
    """Events and output come on two roads, in either order; an agent that ended earlier would take the last lines with it."""
    leaving = told()
    assert [leaving.heard(one) for one in news] == [None, NODE]


def test_others_are_held() -> None:
    leaving = told()
    assert leaving.heard(AttemptEnded(0, "b#2")) is None and leaving.heard(OutputEnded(0, "b#2")) is None


def test_the_output_of_an_earlier_attempt_does_not_let_it_go() -> None:
    leaving = told()
    assert leaving.heard(OutputEnded(0, NODE)) is None
    assert leaving.heard(AttemptEnded(1, NODE)) is None
    assert leaving.heard(OutputEnded(1, NODE)) == NODE


def test_an_end_that_the_gang_hears_of_before_the_notice_lets_nothing_go() -> None:
    """The gang may begin the next attempt there at once: that one must find its agent."""
    leaving = told(announced=False)
    assert leaving.heard(AttemptEnded(0, NODE)) is None and leaving.heard(OutputEnded(0, NODE)) is None
    leaving.announced(NODE)
    assert leaving.heard(AttemptEnded(1, NODE)) is None
    assert leaving.heard(OutputEnded(1, NODE)) == NODE

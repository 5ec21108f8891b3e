"""What is foretold of a daemon whose origin is too slow: pure, from what readers say and from what came."""

from __future__ import annotations

import logging
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulate import bound
from cache.blocks import BLOCK_BYTES, EXTENT_BYTES, ObjectId
from cache.daemon.foretelling import Foretelling, sentence
from cache.order.lookahead import Lookahead, Visit
from cache.order.outline import Part, Table
from cache.order.prospect import Outline, Prospect
from cache.order.schedule import Schedule
from cache.order.shuffle import Full
from cache.residency.blockstate import BlockMove
from cache.residency.budget import Budget
from cache.residency.coming import share_here
from cache.residency.forecast import (
    FINE_AFTER_S,
    FINE_FROM,
    MIN_BUSY_S,
    MIN_COMPUTING_S,
    SHORT_AFTER_S,
    SHORT_BELOW,
    WINDOW_S,
    Alarm,
    Forecast,
    Reader,
    ReaderPace,
    SourcePace,
    expected_utilisation,
    forecast,
)
from cache.residency.machine import Residency
from cache.residency.residents import Residents
from cache.residency.slots import Slots

shares = st.floats(0, 1)
rates = st.floats(1e5, 1e10)
MB = 1e6


@given(rates, rates, rates, shares, shares, shares)
def test_more_from_the_origin_or_more_here_is_never_worse(
    gives: float, more: float, needs: float, here: float, other: float, borrowed: float
) -> None:
    low, high = sorted((here, other))
    assert 0 <= expected_utilisation(gives, needs, low, borrowed) <= 1
    assert expected_utilisation(gives, needs, low, borrowed) <= expected_utilisation(gives + more, needs, low, borrowed)
    assert expected_utilisation(gives, needs, low, borrowed) <= expected_utilisation(gives, needs, high, borrowed)
    assert expected_utilisation(gives, needs, low, 0.0) <= expected_utilisation(gives, needs, low, borrowed)


@given(shares, st.floats(0.01, 2.0))
def test_it_is_the_bound_that_the_simulator_measures_policies_by(here: float, origin: float) -> None:
    """One formula: what the daemon foretells is what the benchmarks hold it to."""
    told = forecast([Reader(100 * MB, here)], origin * 100 * MB, 0.0)
    assert told.utilisation == pytest.approx(bound(here, origin))


@given(rates, st.none() | rates, shares)
def test_nobody_waits_where_all_is_here(needs: float, gives: float | None, borrowed: float) -> None:
    """Whatever the origin gives, also where that is not known."""
    assert forecast([Reader(needs, 1.0)], gives, borrowed).utilisation == 1.0


READER = st.builds(Reader, st.none() | rates, st.none() | shares, st.booleans())


@given(st.lists(READER, max_size=4), st.none() | rates, shares)
def test_what_is_not_known_is_not_made_up(readers: list[Reader], gives: float | None, borrowed: float) -> None:
    told = forecast(readers, gives, borrowed)
    is_known = bool(readers) and all(r.needs is not None and r.here is not None and r.says_waits for r in readers)
    if told.utilisation is None:
        assert told.why
        assert not is_known or (gives is None and told.remains)
    else:
        assert is_known and (gives is not None or not told.remains)
    assert sentence(told)


@given(rates, rates, shares)
def test_what_would_be_enough_here_is_enough(gives: float, needs: float, here: float) -> None:
    enough = forecast([Reader(needs, here)], gives, 0.0).enough_here
    assert enough is None or expected_utilisation(gives * (1 + 1e-9), needs, enough) == pytest.approx(1.0)


def test_readers_count_by_what_they_read() -> None:
    """One with little need whose data is all here does not hide one with much whose data is not."""
    told = forecast([Reader(300 * MB, 0.0), Reader(100 * MB, 1.0)], 150 * MB, 0.0)
    assert (told.needs, told.here, told.remains, told.utilisation) == (400 * MB, 0.25, 300 * MB, 0.5)
    assert forecast([Reader(300 * MB, 0.0)], 150 * MB, 0.5).utilisation == 1.0  # Peers give the other half.


@given(st.floats(0.01, 0.5), st.floats(0, 20), st.integers(1, 2**20))
def test_a_need_is_what_is_read_while_it_computes(step_s: float, waits: float, step_bytes: int) -> None:
    """However long it waits for each step: else a starved reader would seem to need only what it is given."""
    pace, now, waited_s = ReaderPace(), 100.0, 0.0
    for step in range(int(3 * MIN_COMPUTING_S / step_s) + 2):
        pace.came(step * step_bytes, waited_s, now)
        now, waited_s = now + step_s * (1 + waits), waited_s + step_s * waits
        if step * step_s < MIN_COMPUTING_S - 0.01:
            assert pace.needs is None
    assert pace.needs == pytest.approx(step_bytes / step_s, rel=1e-3)


def test_a_reader_that_began_anew_or_does_not_know_its_waits_is_not_known() -> None:
    pace = ReaderPace()
    for second in range(10):
        pace.came(second * 100, 0.0, float(second))
    assert pace.needs == pytest.approx(100) and not pace.is_idle(10.0)
    pace.came(0, 0.0, 11.0)
    assert pace.needs is None
    pace.came(100, None, 12.0)
    assert pace.needs is None and not pace.says_waits
    assert pace.is_idle(12.0 + 2 * WINDOW_S)


def test_an_origin_is_known_once_it_was_busy_long_enough_and_only_by_that() -> None:
    """What came while little was asked for says nothing about what it can give."""
    pace = SourcePace()
    for half in range(20):
        pace.look(half * 1000, 0, half / 2, is_busy=False)
    assert pace.gives is None
    fetched = 20_000
    for half in range(20, 20 + int(MIN_BUSY_S * 2) + 1):
        assert pace.gives is None
        pace.look(fetched, 0, half / 2, is_busy=True)
        fetched += 50_000
    assert pace.gives == pytest.approx(100_000)
    pace.look(fetched, 0, 100.0, is_busy=False)
    assert pace.gives == pytest.approx(100_000), "still believed a minute later"
    pace.look(fetched, 0, 1000.0, is_busy=False)
    assert pace.gives is None, "but not for ever"


def test_waves_of_large_requests_are_not_taken_for_a_rate() -> None:
    """Little has landed beside what is on its way: where all of it lands at once, the seconds before would count for nothing."""
    pace = SourcePace()
    for half in range(10):
        pace.look(1000 if half else 0, 0, half / 2, is_busy=True, on_the_way=100_000)
    assert pace.gives is None


def test_the_share_of_peers_is_that_of_the_last_minute() -> None:
    pace = SourcePace()
    pace.look(0, 0, 0.0, is_busy=False)
    assert pace.borrowed == 0.0
    pace.look(100, 300, 30.0, is_busy=False)
    assert pace.borrowed == 0.75
    pace.look(200, 300, 95.0, is_busy=False)
    assert pace.borrowed == 0.0


@given(st.lists(st.none() | st.floats(0, 1), max_size=400), st.floats(0.2, 5.0))
def test_an_alarm_never_flaps(seen: list[float | None], every_s: float) -> None:
    """Between two sayings lies the whole time that the later one takes, in which all that was seen spoke for it."""
    alarm, now, said = Alarm(), 0.0, -1.0
    history: list[tuple[float, float | None]] = []
    for utilisation in seen:
        history.append((now, utilisation))
        if alarm.saw(utilisation, now):
            after_s = SHORT_AFTER_S if alarm.is_short else FINE_AFTER_S
            assert now - max(said, 0.0) >= after_s
            lately = [value for at_s, value in history if at_s >= now - after_s]
            assert all(v is not None and (v < SHORT_BELOW if alarm.is_short else v >= FINE_FROM) for v in lately)
            said = now
        now += every_s


@given(st.lists(st.floats(SHORT_BELOW, FINE_FROM, exclude_max=True), max_size=100))
def test_between_the_two_thresholds_nothing_is_said(seen: list[float]) -> None:
    alarm = Alarm()
    assert not any(alarm.saw(utilisation, float(now)) for now, utilisation in enumerate(seen))
    assert any(alarm.saw(0.5, 1000.0 + now) for now in range(60)) and alarm.is_short
    assert not any(alarm.saw(utilisation, 2000.0 + now) for now, utilisation in enumerate(seen))


class Here:
    """Eight objects of one extent each, of which the first `num` are on the disk; one reader that has announced `announced` of them."""

    def __init__(self, num: int, announced: list[int]) -> None:
        self.objects = [ObjectId(f"s3://b/{idx}", '"1"', EXTENT_BYTES) for idx in range(8)]
        self.blocks = EXTENT_BYTES // BLOCK_BYTES
        self.residents = Residents(Slots(1 << 16))
        for object_id in self.objects[:num]:
            extent = self.residents.add_extent(self.residents.learn(object_id), 0, 1, EXTENT_BYTES, 0.0)
            for block in extent.block_indices:
                extent.move(block, BlockMove.FETCH)
                extent.move(block, BlockMove.LANDED)
        self.lookahead = Lookahead()
        self.lookahead.announce("s", [Visit(self.objects[idx].content_id, 0, self.blocks) for idx in announced])
        self.prospect = Prospect(self.lookahead)

    def outline(self) -> None:
        table = Table(tuple(self.objects), tuple(Part(idx, 0, EXTENT_BYTES, 1) for idx in range(8)))
        self.prospect.outline("s", Outline(table, Schedule((1,) * 8, 1, 0, Full()), 0, 1, 0, 0, 1.0))

    @property
    def share(self) -> float | None:
        return share_here(self.lookahead, self.prospect, self.residents, ["s"])["s"]


@given(st.integers(0, 8), st.permutations(range(8)), st.integers(0, 8))
def test_of_announced_visits_those_count_that_are_on_the_disk(num: int, order: list[int], announced: int) -> None:
    here = Here(num, order[:announced])
    expected = sum(idx < num for idx in order[:announced]) / announced if announced else None
    assert here.share == expected


def test_what_was_fetched_ahead_does_not_hide_what_lies_beyond() -> None:
    """All that is announced is here, three quarters of the epoch are not; and the other way round."""
    ahead, behind = Here(2, [0, 1]), Here(6, [6, 7])
    assert ahead.share == 1.0 and behind.share == 0.0
    ahead.outline()
    behind.outline()
    assert ahead.share == 0.25 and behind.share == 0.0


def test_what_is_behind_the_reader_does_not_count_as_coming() -> None:
    """In the middle of a first epoch half of the data is here, and none of what this epoch has left; near its end the next counts."""
    here = Here(4, [*range(8), *range(8)])
    here.outline()
    assert here.share == 0.5
    for position, share in ((4, 0.0), (7, 4 / 9)):
        here.lookahead.advance("s", position)
        here.prospect.refresh("s")
        assert here.share == pytest.approx(share)


def test_demand_that_exceeds_the_origin_is_said_once_and_once_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    """With the figures that it follows from, and what to do."""
    residency = Residency(Budget(1 << 30, 1000), rng=random.Random(0))
    foretelling = Foretelling(residency)
    foretelling._foretell = lambda now: forecast([Reader(400 * MB, 0.25 if now < 60 else 0.9)], 150 * MB, 0.0)  # type: ignore[method-assign]
    with caplog.at_level(logging.INFO, logger="railhead.cache"):
        for second in range(200):
            foretelling.look(float(second))
    short, fine = (record.getMessage() for record in caplog.records)
    assert "demand exceeds" in short and "expect 50% utilisation" in short and "have 62% of it here" in short
    assert "again" in fine and "expect 100% utilisation" in fine
    assert not foretelling.account()["is_short"]


def test_a_forecast_that_is_not_known_says_why() -> None:
    assert sentence(Forecast("nobody reads")) == "not known yet: nobody reads"


@pytest.mark.parametrize(
    ("num_bytes", "waited_s"), [("much", 0.0), ([], 0.0), (1, {}), (10**400, 0), (1e999, 0), (1, 1e999)]
)
def test_what_is_no_number_is_refused(num_bytes: object, waited_s: object) -> None:
    """It comes from another process, and must not end up in what is foretold of all."""
    with pytest.raises(ValueError):
        Foretelling(Residency(Budget(1 << 30, 1000))).came("s", num_bytes, waited_s, 0.0)

"""Second requests for late blocks: late by what this origin usually takes, never more than one in twenty, none after a refusal."""

from __future__ import annotations

from cache.residency.hedging import QUIET_AFTER_THROTTLE_S, STALL_CEILING_S, STALL_FLOOR_S, Hedging

BLOCK = 4 << 20


def _fed(count: int, seconds: float = 0.1) -> Hedging:
    hedging = Hedging()
    for idx in range(count):
        hedging.landed(BLOCK, seconds * (1 + idx % 20 / 100), 0.03)
    return hedging


def test_nothing_is_late_before_enough_is_known() -> None:
    assert _fed(10).hedge_after_s(BLOCK) is None


def test_late_is_later_than_nineteen_of_twenty() -> None:
    hedging = _fed(200)
    assert 0.118 <= (hedging.hedge_after_s(BLOCK) or 0) <= 0.12


def test_small_blocks_are_judged_among_themselves() -> None:
    """The tail of an object takes a fraction of a block's time: by the measure of whole blocks it would never be late."""
    hedging = _fed(200)
    assert hedging.hedge_after_s(1000) is None


def test_hedges_are_at_most_a_twentieth_of_the_requests() -> None:
    """When all is slow at once, hedging everything would double the load that makes it slow."""
    hedging, taken = Hedging(), 0
    for idx in range(1000):
        hedging.landed(BLOCK, 0.1, 0.03)
        taken += hedging.take(now=float(idx))
    assert 45 <= taken <= 55


def test_no_hedge_after_a_refusal() -> None:
    hedging = _fed(100)
    hedging.throttled(now=50.0)
    assert not hedging.take(now=50.1)
    assert hedging.take(now=50.1 + QUIET_AFTER_THROTTLE_S)


def test_silence_is_judged_by_the_slowest_answers() -> None:
    """With a floor, because a fast store has pauses too, and a ceiling, because no answer is worth half a minute."""
    assert Hedging().stall_s == STALL_CEILING_S
    assert _fed(100).stall_s == STALL_FLOOR_S
    slow = Hedging()
    for _ in range(100):
        slow.landed(BLOCK, 5.0, 1.5)
    assert slow.stall_s == 6.0

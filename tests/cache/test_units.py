"""Unpacked units: bounded memory, the longest unused goes, and thrashing is said once."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from cache.client.units import Units


class Unit:
    num_samples = 1

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes

    def sample(self, number: int) -> dict[str, Any]:
        return {}


class Unpacked:
    """Counts how often each unit was unpacked."""

    def __init__(self, units: Units, size_bytes: int = 10) -> None:
        self.units, self.size_bytes = units, size_bytes
        self.log: list[int] = []

    def get(self, number: int) -> Unit:
        def unpack() -> Unit:
            self.log.append(number)
            return Unit(self.size_bytes)

        found = self.units.get((0, number), unpack)
        assert isinstance(found, Unit)
        return found


def test_what_fits_is_unpacked_once() -> None:
    found = Unpacked(Units(30))
    assert [found.get(number) for number in (0, 1, 2)] == [found.get(number) for number in (0, 1, 2)]
    assert found.log == [0, 1, 2]


def test_the_longest_unused_goes() -> None:
    found = Unpacked(Units(30))
    for number in (0, 1, 2, 0, 3, 0, 1):
        found.get(number)
    assert found.log == [0, 1, 2, 3, 1]


def test_a_unit_that_is_larger_than_all_room_is_kept_until_the_next() -> None:
    """Its samples are asked for one after the other: unpacking it for each would never end."""
    found = Unpacked(Units(5))
    for number in (0, 0, 0, 1, 1):
        found.get(number)
    assert found.log == [0, 1]


def test_thrashing_is_said_once_and_a_window_that_fits_is_not_thrashing(caplog: pytest.LogCaptureFixture) -> None:
    window = Unpacked(Units(20))
    for number in range(200):
        for _ in range(10):
            window.get(number)
            window.get(number + 1)
    assert caplog.text == ""
    shuffled = Unpacked(Units(20))
    for number in range(1000):
        shuffled.get(number % 10)
    assert caplog.text.count("use shuffle='windowed:W'") == 1


def test_a_failed_unpacking_leaves_nothing_behind() -> None:
    units = Units(30)

    def fail() -> Unit:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        units.get((0, 0), fail)
    found = Unpacked(units)
    found.get(0)
    assert found.log == [0]


def test_threads_may_ask_at_once() -> None:
    found = Unpacked(Units(50))
    threads = [
        threading.Thread(target=lambda: [found.get(number % 7) for number in range(300)], daemon=True) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found.units._size_bytes == sum(unit.size_bytes for unit in found.units._units.values()) <= 50


def test_negative_room_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 bytes"):
        Units(-1)

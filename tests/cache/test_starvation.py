"""Time that a process could not run is not time that its disk took."""

from __future__ import annotations

import asyncio
import time

from cache.daemon.starvation import Starvation


def test_what_the_process_could_not_run_is_taken_off_and_no_more() -> None:
    """A crowded machine had daemons take their disks for slow, and stop using them."""

    async def use() -> tuple[float, bool]:
        starvation = Starvation()
        with starvation.watch() as watch:
            time.sleep(0.3)  # noqa: ASYNC251  the loop cannot run, as if others had the processors
            after_a_stall = watch.without(0.3)
            await asyncio.sleep(0)
        began_s = time.monotonic()
        with starvation.watch() as watch:
            left_s = watch.without(1000.0)
        return after_a_stall, left_s >= 1000.0 - (time.monotonic() - began_s)

    after_a_stall, is_forgotten = asyncio.run(use())
    assert after_a_stall <= 0.06, "but for the tick that was not due yet"
    assert is_forgotten, "what was lost before is not taken off again"


def test_waiting_for_a_disk_is_not_lost_time() -> None:
    """A thread that waits for its disk leaves the loop alone: a slow disk stays a slow disk."""

    async def use() -> tuple[float, float]:
        starvation = Starvation()
        began_s = time.monotonic()
        with starvation.watch() as watch:
            await asyncio.to_thread(time.sleep, 0.2)
            return watch.without(1000.0), time.monotonic() - began_s

    left_s, took_s = asyncio.run(use())
    assert left_s > 1000.0 - took_s, "less than all of it, however crowded the machine"


def test_nothing_ticks_while_nobody_watches() -> None:
    async def use() -> int:
        starvation = Starvation()
        with starvation.watch(), starvation.watch():
            pass
        await asyncio.sleep(0)
        return len(asyncio.all_tasks()) - 1

    assert asyncio.run(use()) == 0

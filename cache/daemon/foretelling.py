"""The forecast of a running daemon (residency/forecast.py): looked at twice a second, said when it changes. From the event loop."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Any

from cache.daemon.config import format_bytes
from cache.residency.coming import share_here
from cache.residency.forecast import Alarm, Forecast, Reader, ReaderPace, SourcePace, forecast
from cache.residency.machine import Residency

log = logging.getLogger("railhead.cache")

LOOK_S = 0.5
FORECAST_EVERY_S = 1.0
"""A look at announced visits and extents takes some milliseconds, however many there are."""


class Foretelling:
    """`came` as readers come further, `run` all the time; `account` for whoever asks."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._paces: dict[str, ReaderPace] = {}
        self._sources = SourcePace()
        self._alarm = Alarm()
        self._forecast = Forecast("nobody reads in an announced order")
        self._next_s = 0.0

    def came(self, stream_id: str, num_bytes: object, waited_s: object, now: float) -> None:
        """A reader says that it has so many bytes of its order behind it, and for how long it has waited so far (None: it does not know).
        Raises ValueError for what is no such number."""
        try:
            num = float(num_bytes)  # type: ignore[arg-type]
            waited = None if waited_s is None else float(waited_s)  # type: ignore[arg-type]
        except (TypeError, OverflowError) as error:
            raise ValueError(f"a reader has {num_bytes!r} bytes behind it and waited for {waited_s!r} s") from error
        if not math.isfinite(num) or not math.isfinite(waited or 0.0):
            raise ValueError(f"a reader has {num} bytes behind it and waited for {waited} s")
        self._paces.setdefault(stream_id, ReaderPace()).came(num, waited, now)

    async def run(self) -> None:
        while True:
            self.look(time.monotonic())
            await asyncio.sleep(LOOK_S)

    def look(self, now: float) -> None:
        residency = self._residency
        counters, limits = residency.counters, residency.limits
        is_full = residency.in_flight >= limits.max_in_flight - limits.demand_reserve
        on_the_way = residency.origins.on_the_way_bytes
        is_busy = residency.origins.are_busy or (is_full and on_the_way > 0)
        fetched, borrowed = counters.fetched_bytes, counters.borrowed_bytes
        self._sources.look(fetched, borrowed, now, is_busy=is_busy, on_the_way=on_the_way)
        if now < self._next_s:
            return
        self._next_s = now + FORECAST_EVERY_S
        self._forecast = self._foretell(now)
        if self._alarm.saw(self._forecast.utilisation, now):
            level, what = (
                (logging.WARNING, "demand exceeds what the store gives")
                if self._alarm.is_short
                else (logging.INFO, "the store gives what training reads again")
            )
            log.log(level, "%s: %s", what, sentence(self._forecast))

    def _foretell(self, now: float) -> Forecast:
        lookahead = self._residency.lookahead
        self._paces = {key: pace for key, pace in self._paces.items() if lookahead.is_open(key)}
        at_work = {key: pace for key, pace in self._paces.items() if not pace.is_idle(now)}
        here = share_here(lookahead, self._residency.prospect, self._residency.residents, list(at_work))
        readers = [Reader(pace.needs, here[key], pace.says_waits) for key, pace in at_work.items()]
        return forecast(readers, self._sources.gives, self._sources.borrowed)

    def account(self) -> dict[str, Any]:
        """The last forecast, at most some seconds old. Documented in docs/cache.md."""
        last = self._forecast
        return {
            "utilisation": last.utilisation,
            "need_bytes_per_s": last.needs,
            "here_share": last.here,
            "peer_share": last.borrowed,
            "origin_need_bytes_per_s": last.remains,
            "origin_gives_bytes_per_s": last.gives,
            "enough_here_share": last.enough_here,
            "is_short": self._alarm.is_short,
            "unknown_because": last.why or None,
            "text": sentence(last),
        }


def sentence(last: Forecast) -> str:
    """For people: what is to be expected, from what, and what to do about it."""
    parts = []
    if last.needs is not None and last.here is not None:
        parts.append(f"training reads {format_bytes(last.needs)}/s while it computes")
        parts.append(f"{last.here:.0%} of what comes is here")
    if last.borrowed and last.needs is not None:
        parts.append(f"peers give {last.borrowed:.0%} of the rest")
    if last.gives is not None:
        parts.append(f"the store gives {format_bytes(last.gives)}/s")
    known = ", ".join(parts)
    if last.utilisation is None:
        return f"not known yet: {last.why}" + (f" ({known})" if known else "")
    text = f"{known}: expect {last.utilisation:.0%} utilisation"
    if last.utilisation < 1 and last.enough_here is not None:
        text += (
            f"; what to do: have {last.enough_here:.0%} of it here (preload, a larger --capacity), "
            "more of it from peers, or a faster link to the store"
        )
    return text

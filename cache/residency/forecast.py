"""Says in advance whether the origin gives what training will read: the share of its time that it will compute. Pure; `now` is an argument.

What is read comes from three places. A share of it is here; of the rest, peers give a share; what remains is the origin's. With perfect
overlap training computes for min(1, gives ÷ what remains) of its time: with f = origin ÷ need and b = the share that is here, the
min(1, f ÷ (1 − b)) of the simulator. Nothing here is guessed: what has not been seen for long enough is None, and so is all that follows
from it. That training can only read what its decoding lets through, or computes less when it waits for something else, is not in it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW_S = 60.0
"""What a reader did is looked at over so long. One that has read nothing for so long reads nothing."""
MARK_S = 0.5
LONGEST_S = 600.0
"""And over so long where it hardly ever computes."""
MIN_COMPUTING_S = 1.0
"""So long a reader must have computed, all waiting excluded, before its need is known."""
MIN_BUSY_S = 2.0
"""So long the origin must have been given all that it may, before it is known what it gives."""
SURE_S = 15.0
"""And for so long where what has landed is little beside what is on its way: that comes in waves."""
BUSY_SPANS = 40
"""Of the looks at a busy origin, the last ones count: half a second each."""
GIVES_MEMORY_S = 600.0
"""What the origin gave when it was busy last is believed for so long."""

SHORT_BELOW = 0.97
FINE_FROM = 0.99
SHORT_AFTER_S = 6.0
FINE_AFTER_S = 30.0


def expected_utilisation(gives: float, needs: float, here: float = 0.0, borrowed: float = 0.0) -> float:
    """Of training's time, how much it computes, where it needs `needs` bytes a second of which the share `here` is on the disk, the share
    `borrowed` of the rest comes from peers, and the origin gives `gives` bytes a second.

    >>> expected_utilisation(200, 400), expected_utilisation(200, 400, here=0.25), expected_utilisation(200, 400, here=0.5)
    (0.5, 0.6666666666666666, 1.0)
    """
    remains = needs * (1 - here) * (1 - borrowed)
    return 1.0 if remains <= gives else gives / remains


@dataclass(frozen=True)
class _Mark:
    at_s: float
    num_bytes: float
    waited_s: float


def _computing_s(first: _Mark, last: _Mark) -> float:
    return (last.at_s - first.at_s) - (last.waited_s - first.waited_s)


class ReaderPace:
    """What one reader consumes in a second of computing: from what it says, as it comes further, that is behind it and how long it has
    waited so far."""

    def __init__(self) -> None:
        self._marks: deque[_Mark] = deque()
        self._last_s = -WINDOW_S
        self.says_waits = True
        """Whether it knows for how long it waited: a process that neither reads nor is told by its loader does not."""

    def came(self, num_bytes: float, waited_s: float | None, now: float) -> None:
        self._last_s = now
        self.says_waits = waited_s is not None
        if waited_s is None:
            self._marks.clear()
            return
        marks, mark = self._marks, _Mark(now, num_bytes, waited_s)
        if marks and (num_bytes < marks[-1].num_bytes or waited_s < marks[-1].waited_s):
            marks.clear()  # It began anew.
        if len(marks) > 1 and now - marks[-2].at_s < MARK_S:
            marks[-1] = mark
        else:
            marks.append(mark)
        while len(marks) > 2 and now - marks[1].at_s > WINDOW_S:
            if _computing_s(marks[1], mark) < MIN_COMPUTING_S and now - marks[0].at_s < LONGEST_S:
                break  # It hardly computes: of the window alone nothing would be known.
            marks.popleft()

    def is_idle(self, now: float) -> bool:
        return now - self._last_s > WINDOW_S

    @property
    def needs(self) -> float | None:
        """Bytes for each second of computing; None: not known yet."""
        if len(self._marks) < 2:
            return None
        first, last = self._marks[0], self._marks[-1]
        computing_s = _computing_s(first, last)
        if computing_s < MIN_COMPUTING_S:
            return None
        return (last.num_bytes - first.num_bytes) / computing_s


class SourcePace:
    """What the origins give when they are busy, and how much of what came was given by peers. From looks at the totals, twice a second."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, int, int]] = deque()
        """When, bytes fetched from origins and from peers until then."""
        self._was_busy = False
        self._on_the_way = 0
        self._busy: deque[tuple[float, float, int]] = deque(maxlen=BUSY_SPANS)
        """When it ended, seconds, bytes."""

    def look(self, fetched: int, borrowed: int, now: float, *, is_busy: bool, on_the_way: int = 0) -> None:
        """`is_busy`: the origins are given all requests that they may have, `on_the_way` bytes of them."""
        if self._looks and is_busy and self._was_busy:
            at_s, before, _ = self._looks[-1]
            # Until its first bytes, what is on its way says nothing.
            if self._busy or fetched > before:
                self._busy.append((now, now - at_s, fetched - before))
        self._was_busy, self._on_the_way = is_busy, on_the_way
        self._looks.append((now, fetched, borrowed))
        while now - self._looks[0][0] > WINDOW_S:
            self._looks.popleft()
        while self._busy and now - self._busy[0][0] > GIVES_MEMORY_S:
            self._busy.popleft()

    @property
    def gives(self) -> float | None:
        """Bytes a second, of the last seconds in which it was busy; None: it was not for long enough."""
        seconds = sum(seconds for _, seconds, _ in self._busy)
        landed = sum(num for _, _, num in self._busy)
        is_known = seconds >= MIN_BUSY_S and (landed >= 2 * self._on_the_way or seconds >= SURE_S)
        return landed / seconds if is_known else None

    @property
    def borrowed(self) -> float:
        """Of what came lately, the share of peers; 0 where nothing came."""
        if not self._looks:
            return 0.0
        _, fetched, borrowed = (new - old for new, old in zip(self._looks[-1], self._looks[0], strict=True))
        return borrowed / (borrowed + fetched) if borrowed else 0.0


@dataclass(frozen=True)
class Reader:
    """What is known of one that reads just now. `needs`: bytes a second; `here`: the share of what it will read that is on the disk."""

    needs: float | None
    here: float | None
    says_waits: bool = True


@dataclass(frozen=True)
class Forecast:
    """What is to be expected with what is here now; None: not known. `why`: what is missing to know it all."""

    why: str = ""
    needs: float | None = None
    here: float | None = None
    borrowed: float = 0.0
    remains: float | None = None
    """What the origin would have to give."""
    gives: float | None = None
    utilisation: float | None = None

    @property
    def enough_here(self) -> float | None:
        """The share that would have to be here for training never to wait."""
        if self.needs is None or self.gives is None or not self.needs or self.borrowed >= 1:
            return None
        return max(0.0, 1 - self.gives / (self.needs * (1 - self.borrowed)))


def forecast(readers: Sequence[Reader], gives: float | None, borrowed: float) -> Forecast:
    """Of all who read on this node, together."""
    if not readers:
        return Forecast("nobody reads in an announced order", gives=gives)
    if not all(reader.says_waits for reader in readers):
        why = "a reader does not know how long it waits: ElasticLoader does"
        return Forecast(why, gives=gives)
    needs = here = 0.0
    for reader in readers:
        if reader.needs is None:
            return Forecast(f"a reader has computed for less than {MIN_COMPUTING_S:g} s", gives=gives)
        if reader.here is None:
            return Forecast("a reader has announced nothing more", gives=gives)
        needs += reader.needs
        here += reader.needs * reader.here
    share = here / needs if needs else 1.0
    remains = needs * (1 - share) * (1 - borrowed)
    if remains <= 0:
        return Forecast("", needs, share, borrowed, 0.0, gives, 1.0)
    if gives is None:
        why = f"the store has not been busy for {MIN_BUSY_S:g} s lately"
        return Forecast(why, needs, share, borrowed, remains)
    return Forecast("", needs, share, borrowed, remains, gives, expected_utilisation(gives, needs, share, borrowed))


class Alarm:
    """Whether the origin is said to give too little. It takes a while of the same, and two thresholds, until that changes: what hovers
    about one of them is said once."""

    def __init__(self) -> None:
        self.is_short = False
        self._since_s: float | None = None

    def saw(self, utilisation: float | None, now: float) -> bool:
        """True when it has changed. What is not known changes nothing."""
        speaks_against = utilisation is not None and (
            utilisation >= FINE_FROM if self.is_short else utilisation < SHORT_BELOW
        )
        if not speaks_against:
            self._since_s = None
            return False
        if self._since_s is None:
            self._since_s = now
        if now - self._since_s < (FINE_AFTER_S if self.is_short else SHORT_AFTER_S):
            return False
        self.is_short, self._since_s = not self.is_short, None
        return True

"""Which peers are members just now: who answers, who is out of use and until when, how long each may be silent. Pure; `now` is an argument.

A peer that is alive gives signs of it: it answers greetings, and says four times a second that it is at work on a request. How far apart
they come depends on how busy its machine is, so what counts as silence is learnt from each peer's own signs. Whoever is silent for longer
is out of use at once, is greeted at once, and is back with its answer: to be wrong about a peer costs what others fetch of its share in
that moment, and to wait for one that is frozen costs a stall.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

OUT_OF_USE = ("dead", "silent", "wrong-bytes")
"""Ways of failing (PeerError.reason) after which a peer is asked for nothing more for a while."""

MISSED_HELLOS = 3
"""So many unanswered greetings (one a second) make a member one no longer. A fetch that fails says it sooner."""

SILENCE_FACTOR = 4.0
"""A peer is silent when it has said nothing for so many times what it hardly ever (one time in a hundred) needs for a sign."""

MIN_SILENCE_S = 1.0
START_SILENCE_S = 2.0
MAX_SILENCE_S = 5.0
"""Bounds of it, and what holds while a peer is hardly known. The least is four times what lies between two signs of one that has nothing
else to do; the most is for machines with many times more to do than processors, whose daemons need a second to say anything."""

MIN_SIGNS = 10
MAX_SIGNS = 200

DISTRUST_S = 10.0
MAX_DISTRUST_S = 600.0


@dataclass
class _Member:
    weight: float
    greeted_s: float
    num_missed: int = 0
    out_until_s: float = 0.0
    num_lies: int = 0
    silent_since_s: float | None = None
    """Since when nothing was heard of it, if that is why it is out of use."""
    signs_s: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_SIGNS))
    """How long it took to give signs of life."""


class PeerHealth:
    def __init__(self) -> None:
        self._members: dict[str, _Member] = {}

    def greeted(self, name: str, weight: float, now: float, took_s: float = 0.0) -> None:
        """A peer has said who it is, and how much it can hold; it took so long to answer."""
        member = self._members.setdefault(name, _Member(weight, now))
        if member.silent_since_s is not None:
            took_s, member.silent_since_s = max(took_s, now - member.silent_since_s), None
        member.weight, member.greeted_s, member.num_missed = weight, now, 0
        member.signs_s.append(took_s)

    def heard(self, name: str, gap_s: float) -> None:
        """It was at work on a request, and gave no sign of life for at most so long."""
        if name in self._members:
            self._members[name].signs_s.append(gap_s)

    def silence_s(self, name: str) -> float:
        """After how long without a sign it is given up for now."""
        signs = self._members[name].signs_s if name in self._members else ()
        if len(signs) < MIN_SIGNS:
            return START_SILENCE_S
        rarely_s = sorted(signs)[min(len(signs) - 1, int(0.99 * len(signs)))]
        return min(MAX_SILENCE_S, max(MIN_SILENCE_S, SILENCE_FACTOR * rarely_s))

    def forget(self, name: str) -> None:
        """It has left the cluster."""
        self._members.pop(name, None)

    def missed(self, name: str) -> None:
        """A peer that was known did not answer."""
        if name in self._members:
            self._members[name].num_missed += 1

    def failed(self, name: str, reason: str, now: float, silent_for_s: float = 0.0) -> bool:
        """A fetch from it failed; True: it is out of use now. One that was silent about a block and has answered a greeting meanwhile is
        busy, not frozen. Wrong bytes count double each time: a broken machine does not mend itself in ten seconds."""
        member = self._members.get(name)
        if member is None:
            return True
        if reason not in OUT_OF_USE or (reason == "silent" and member.greeted_s > now - silent_for_s):
            return False
        if reason == "wrong-bytes":
            member.num_lies += 1
            out_s = min(MAX_DISTRUST_S, DISTRUST_S * 2.0 ** (member.num_lies - 1))
            member.out_until_s = max(member.out_until_s, now + out_s)
        else:
            # A greeting that is answered brings it back at once.
            member.num_missed = MISSED_HELLOS
            if reason == "silent" and member.silent_since_s is None:
                member.silent_since_s = now - silent_for_s
        return True

    def members(self, now: float) -> dict[str, float]:
        """Weights of those in use."""
        return {
            name: member.weight
            for name, member in sorted(self._members.items())
            if member.num_missed < MISSED_HELLOS and now >= member.out_until_s
        }

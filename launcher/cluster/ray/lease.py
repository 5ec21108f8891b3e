"""Who may go on when launcher and agent no longer hear each other: the agent stops first. Pure; `now` is monotonic, of its own side.

The launcher takes a node for lost when it has heard no answer of it for `silence_s`, and may start its ranks elsewhere at once. So the
agent must have ended them by then, also if it only cannot be reached. Its lease runs from the moment at which it handed over an answer
that the launcher is *known* to have heard (the next poll names it): the launcher heard it later than that, waits longer than the lease
lasts, and the difference is what killing takes. Nothing here depends on how long messages are on their way, or on the two clocks agreeing
(only on both running at the same speed).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

POLLS_PER_SILENCE = 8
LEASE_SHARE = 0.75
"""A quarter of the patience is left for ending the ranks: SIGKILL to the agent's process, which its guardians see at once."""
START_S = 90.0
"""Before its first answer an agent has no ranks that could collide with anything; the launcher may be waiting for other nodes."""
_NUM_KEPT = 16


@dataclass(frozen=True)
class Terms:
    """The patience of both sides.

    >>> Terms(4.0).lease_s, Terms(4.0).poll_s
    (3.0, 0.5)
    """

    silence_s: float
    """Launcher's: no answer for so long is a lost node."""

    @property
    def lease_s(self) -> float:
        """Agent's: no proof of being heard for so long ends its ranks."""
        return self.silence_s * LEASE_SHARE

    @property
    def poll_s(self) -> float:
        """How long a poll waits on the node when there is nothing to say."""
        return self.silence_s / POLLS_PER_SILENCE


class Lease:
    """The agent's side."""

    def __init__(self, terms: Terms, now: float) -> None:
        self.terms = terms
        self._ends_s = now + START_S
        self._answers: deque[tuple[int, float]] = deque(maxlen=_NUM_KEPT)

    @property
    def ends_s(self) -> float:
        """When everything must be ended."""
        return self._ends_s

    def answered(self, number: int, now: float) -> None:
        """Answer `number`, counted from 1, is handed over. The first that we see starts the lease: a launcher that does not hear it
        starts no ranks here."""
        if not self._answers:
            self._ends_s = now + self.terms.lease_s
        self._answers.append((number, now))

    def heard(self, last_heard: int) -> None:
        """A poll says which answer the launcher has heard last. (Its number, not how many: an answer may be lost.)"""
        for number, at_s in self._answers:
            if number == last_heard:
                self._ends_s = max(self._ends_s, at_s + self.terms.lease_s)

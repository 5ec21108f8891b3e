"""Which peers are members just now: who answers, and who is out of use and until when. Pure; `now` is an argument."""

from __future__ import annotations

from dataclasses import dataclass

OUT_OF_USE = ("dead", "silent", "wrong-bytes")
"""Ways of failing (PeerError.reason) after which a peer is asked for nothing more for a while."""

MISSED_HELLOS = 3
"""So many unanswered greetings (one a second) make a member one no longer. A fetch that fails says it sooner."""

GREETED_S = 2.0
"""A peer that was silent about one block and has answered a greeting within this time is busy, not frozen. On machines whose processors are
all taken this happens; to make others owners of all that is its own, and back again a second later, would have much of it fetched anew."""

DISTRUST_S = 10.0
MAX_DISTRUST_S = 600.0


@dataclass
class _Member:
    weight: float
    greeted_s: float
    num_missed: int = 0
    out_until_s: float = 0.0
    num_lies: int = 0


class PeerHealth:
    def __init__(self) -> None:
        self._members: dict[str, _Member] = {}

    def greeted(self, name: str, weight: float, now: float) -> None:
        """A peer has said who it is, and how much it can hold."""
        member = self._members.setdefault(name, _Member(weight, now))
        member.weight, member.greeted_s, member.num_missed = weight, now, 0

    def forget(self, name: str) -> None:
        """It has left the cluster."""
        self._members.pop(name, None)

    def missed(self, name: str) -> None:
        """A peer that was known did not answer."""
        if name in self._members:
            self._members[name].num_missed += 1

    def failed(self, name: str, reason: str, now: float) -> bool:
        """A fetch from it failed; True: it is out of use now. Wrong bytes count double each time: a broken machine does not mend itself in
        ten seconds."""
        member = self._members.get(name)
        if member is None:
            return True
        if reason not in OUT_OF_USE or (reason == "silent" and now - member.greeted_s < GREETED_S):
            return False
        if reason == "wrong-bytes":
            member.num_lies += 1
            out_s = min(MAX_DISTRUST_S, DISTRUST_S * 2.0 ** (member.num_lies - 1))
            member.out_until_s = max(member.out_until_s, now + out_s)
        else:
            # A greeting that is answered brings it back at once.
            member.num_missed = MISSED_HELLOS
        return True

    def members(self, now: float) -> dict[str, float]:
        """Weights of those in use."""
        return {
            name: member.weight
            for name, member in sorted(self._members.items())
            if member.num_missed < MISSED_HELLOS and now >= member.out_until_s
        }

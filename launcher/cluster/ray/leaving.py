"""Which nodes were told to leave, and from when on they need not be held. Bookkeeping alone, no Ray.

A node that leaves is held until its ranks have saved and what they wrote has been shown; then its agent may end, which is what the
node's pod waits for before it goes (launcher/k8s/leave.py). Held any longer, it would stay for all of its grace.
"""

from __future__ import annotations

from launcher.gang.events import AttemptEnded, Event, Output, OutputEnded


class Leaving:
    """Any thread may call: each method changes one set or mapping by one step.

    >>> leaving = Leaving()
    >>> leaving.tell("a#1"), leaving.tell("a#1")
    (True, False)
    >>> leaving.announced("a#1")
    >>> leaving.heard(AttemptEnded(0, "a#1")), leaving.heard(OutputEnded(0, "a#1"))
    (None, 'a#1')
    """

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._announced: set[str] = set()
        self._ended: dict[str, int] = {}
        self._shown: dict[str, int] = {}

    def __contains__(self, node_id: str) -> bool:
        return node_id in self._told

    def tell(self, node_id: str) -> bool:
        """False: it was told before."""
        is_new = node_id not in self._told
        self._told.add(node_id)
        return is_new

    def announced(self, node_id: str) -> None:
        """The gang has it among its events. What ends on this node from now on is the last that runs there: an attempt that ended before
        may be followed by another one, if the gang hears of its end first."""
        self._announced.add(node_id)

    def heard(self, what: Event | Output) -> str | None:
        """The node that may go now, because of this."""
        match what:
            case AttemptEnded(attempt=attempt, node_id=node_id) if node_id in self._announced:
                self._ended[node_id] = attempt
            case OutputEnded(attempt=attempt, node_id=node_id):
                self._shown[node_id] = attempt
            case _:
                return None
        is_over = node_id in self._ended and self._shown.get(node_id) == self._ended[node_id]
        return node_id if is_over else None

"""Events of the shelf: space of small files beside the extents, taken from the same budget. Functions over the machine's state."""

from __future__ import annotations

from cache.errors import CapacityError
from cache.residency import messages as m
from cache.residency.room import make_room
from cache.residency.state import State


def space_found(s: State, event: m.SpaceFound) -> None:
    s.budget.adopt(event.size_bytes)


def space_asked(s: State, event: m.SpaceAsked) -> None:
    """Given at once or refused: nobody waits for it."""
    if make_room(s, event.size_bytes, 1, own_next_use=0):
        s.budget.take(event.size_bytes)
        s.actions.append(m.Answer(event.request_id))
        return
    error = CapacityError(f"no room for {event.size_bytes} bytes beside the extents")
    s.actions.append(m.Answer(event.request_id, cause="error", error=error))


def space_returned(s: State, event: m.SpaceReturned) -> None:
    s.budget.give_back(event.size_bytes)

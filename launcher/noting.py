"""What is seen of the ranks, once a second and for each node, becomes one value: for the live line at once, for the journal now and then.

Pure but for what it remembers; called from the controller's thread only.
"""

from __future__ import annotations

from collections.abc import Sequence

from launcher.gang.observations import NodeProgress, RankSample
from launcher.gang.tally import GangProgress, tally
from launcher.gang.world import World

_FIRST_NOTE_S, _MAX_NOTE_S = 10.0, 60.0
_NOTES_IN_ALL = 360
"""A job that has run for an hour notes its progress every 10 s, later every minute: a journal of a month stays below 20 MB."""
_LOOK_S, _LOOK_S_PER_RANK = 0.4, 1 / 2000
"""Of 8,192 ranks every 4 s: that costs a controller half a per cent of its core."""


class ProgressNotes:
    """The attempt that runs now."""

    def __init__(self) -> None:
        self._began_s: float | None = None
        self._attempt = -1
        self._num_ranks = 0
        self._of_node: dict[str, tuple[RankSample, ...]] = {}
        self._next_s = 0.0
        self._next_look_s = 0.0
        self._has_stepped = False
        self.stragglers: Sequence[int] = ()
        self.hung: Sequence[int] = ()
        """Who is named now, as the monitor says."""

    def begin(self, attempt: int, world: World, now: float) -> None:
        """The ranks of this attempt are about to start."""
        self._began_s = now if self._began_s is None else self._began_s
        self._attempt, self._num_ranks = attempt, world.world_size
        self._of_node = {}
        self._next_s, self._next_look_s, self._has_stepped = 0.0, 0.0, False

    def see(self, event: NodeProgress) -> None:
        if event.attempt == self._attempt:
            self._of_node[event.node_id] = event.samples

    def stop(self) -> None:
        """The attempt is being stopped: nothing of it is looked at any more."""
        self._attempt, self._of_node = -1, {}

    def look(self, now: float) -> GangProgress | None:
        """As `progress`, but not again so soon: a thousand nodes are heard of a thousand times a second."""
        if now < self._next_look_s:
            return None
        self._next_look_s = now + max(_LOOK_S, self._num_ranks * _LOOK_S_PER_RANK)
        return self.progress

    @property
    def progress(self) -> GangProgress | None:
        """How far the attempt is; None while none runs, or before anything is seen of it."""
        if self._attempt < 0 or not self._of_node:
            return None
        samples = [sample for of_node in self._of_node.values() for sample in of_node]
        return tally(self._attempt, self._num_ranks, samples, self.stragglers, self.hung)

    def is_due(self, progress: GangProgress, now: float) -> bool:
        """Whether the journal shall have it. The first steps of an attempt are noted at once: they end what a start costs."""
        is_first = progress.steps is not None and not self._has_stepped
        if now < self._next_s and not is_first:
            return False
        self._has_stepped = progress.steps is not None
        age_s = 0.0 if self._began_s is None else now - self._began_s
        self._next_s = now + min(max(age_s / _NOTES_IN_ALL, _FIRST_NOTE_S), _MAX_NOTE_S)
        return True

"""What follows from the far future of the node's jobs: up to which next use an extent is worth keeping, and which extents are worth
fetching beyond what readers have announced. Looks again when enough has changed. No I/O, no clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container
from typing import NamedTuple

from cache.blocks import ExtentId, ObjectId
from cache.order.lookahead import Lookahead
from cache.order.prospect import Prospect

CHANGES_SHARE = 64
"""A look at the future costs 1 ms and 0.6 µs for each extent; it is repeated when so great a part of all extents has come or gone."""
LOOKS = 256
"""And when the readers have come this part of the way to the horizon."""
NEAR_SHARE = 1 / 16
"""Of an epoch. What is needed so soon displaces what is needed later, worth keeping or not, as it would a moment later when somebody waits
for it. It is what fetches may be ahead by where nothing has become dispensable yet, and costs at most as many bytes more in an epoch."""
NEAR_SHARE_OF_MANY = 1 / 64
"""The same where several jobs share the cache: what is worth keeping for one is displaced for the other. In the simulator two jobs over a
cache of half their data send 0.295 of their reads to the origin with it, 0.320 with a sixteenth, and neither waits."""
MAX_PLANNED = 1024
"""So many of the extents that are worth fetching are kept from one look to the next."""


class Planned(NamedTuple):
    """An extent that is not here and is worth fetching for a use `distance` visits from when it was planned."""

    object_id: ObjectId
    extent: ExtentId
    distance: float


class Foresight:
    def __init__(self, lookahead: Lookahead) -> None:
        self._lookahead = lookahead
        self.prospect = Prospect(lookahead)
        self.planned: deque[Planned] = deque()
        """Nearest first."""
        self._horizon = math.inf
        self.near = 0.0
        """What is needed within so many visits."""
        self._seen: tuple[int, float] | None = None
        self._num_changes = 0
        self._steps: dict[int, float] = {}

    @property
    def is_known(self) -> bool:
        """Whether anybody has told a far future that has been computed."""
        return any(group.epochs for group in self.prospect.groups)

    def close(self, stream_id: str) -> None:
        self.prospect.close(stream_id)

    def changed(self) -> None:
        """An extent came or went."""
        self._num_changes += 1

    def horizon(self, here: Container[ExtentId], capacity_bytes: float, bytes_beside: float) -> float:
        """The next use, in visits, beyond which an extent that is here need not be kept for a fetch ahead of its reader; 0 when
        nothing is known of the far future, so that only the order of uses decides. `bytes_beside`: what a file takes beyond its
        payload."""
        if not self.is_known:
            self.planned.clear()
            return 0.0
        come = self._visits_since()
        num_rows = sum({id(g.table): len(g.table.extents) for g in self.prospect.groups}.values())
        seen = (self.prospect.version, capacity_bytes)
        if seen != self._seen or self._num_changes > max(8, num_rows // CHANGES_SHARE) or come * LOOKS > self._horizon:
            self._look(here, capacity_bytes, bytes_beside)
            self._seen, self._num_changes, come = seen, 0, 0.0
        return max(0.0, self._horizon - come)

    def _visits_since(self) -> float:
        """How far the foremost group has come since the last look."""
        groups = self.prospect.groups
        return max((g.at_step - self._steps.get(g.number, g.at_step)) * g.visits_per_step for g in groups)

    def _look(self, here: Container[ExtentId], capacity_bytes: float, bytes_beside: float) -> None:
        groups = self.prospect.groups
        self._steps = {group.number: group.at_step for group in groups}
        share = NEAR_SHARE if len(groups) == 1 else NEAR_SHARE_OF_MANY
        self.near = share * min(group.num_steps * group.visits_per_step for group in groups)
        known = min((group.known_until - group.at_step) * group.visits_per_step for group in groups)
        if known <= 0:
            self._horizon = 0.0  # Of one of the jobs the epoch that it reads is still being worked out.
            self.planned.clear()
            return
        from cache.residency.keeping import look  # With numpy, which nobody else here needs.

        self._horizon, planned = look(groups, here, capacity_bytes, bytes_beside, known, MAX_PLANNED)
        self.planned = deque(Planned(object_id, extent, distance) for distance, object_id, extent in planned)

"""An attempt's plan as it is sent: it names every node and goes to every node, so it is pickled once and not a thousand times.

At 1,024 nodes it has 0.2 MB, more than Ray sends with a call without putting it into its object store each time; the names in it are
much alike, so it shrinks to a small part of that (benchmarks/scale.py).
"""

from __future__ import annotations

import pickle
import zlib

from launcher.gang.events import AttemptPlan


class Packer:
    """Remembers the last plan. Used by one thread, the controller's."""

    def __init__(self) -> None:
        self._plan: AttemptPlan | None = None
        self._data = b""

    def pack(self, plan: AttemptPlan) -> bytes:
        """The plan for one more node."""
        if self._plan is not plan:
            self._plan, self._data = plan, zlib.compress(pickle.dumps(plan, pickle.HIGHEST_PROTOCOL), 1)
        return self._data


def unpack(data: bytes) -> AttemptPlan:
    """What was packed; by our own launcher, as everything that Ray unpickles for us."""
    plan: AttemptPlan = pickle.loads(zlib.decompress(data))
    return plan

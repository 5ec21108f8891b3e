"""Which node of a cluster fetches an extent from the origin: its owner, by weighted rendezvous hashing. Pure.

Every node works it out alone, from the same members. When one comes or goes, only what it owns moves (to and from it), as evenly as it can
be. Sources: Thaler and Ravishankar 1998 (highest random weight); Schindelhauer and Schomaker 2005 (weights by -w / ln h).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

from cache.blocks import ExtentId


class Placement:
    """`weights`: of each member, by what it can hold. `own`: this node's name among them."""

    def __init__(self, own: str, weights: Mapping[str, float]) -> None:
        self.own = own
        self.weights = dict(weights)
        self._owners: dict[ExtentId, str] = {}

    def owner(self, extent: ExtentId) -> str:
        """The member that fetches this extent; this node where there is no other.

        >>> Placement("a", {"a": 1.0}).owner(ExtentId("00", 0))
        'a'
        """
        found = self._owners.get(extent)
        if found is None:
            found = max(
                self.weights, key=lambda name: (_score(name, self.weights[name], extent), name), default=self.own
            )
            if len(self._owners) > 1_000_000:
                self._owners.clear()
            self._owners[extent] = found
        return found

    def lender(self, extent: ExtentId) -> str | None:
        """Whom this node takes an extent from; None: it is its own."""
        owner = self.owner(extent)
        return None if owner == self.own else owner


def _score(name: str, weight: float, extent: ExtentId) -> float:
    digest = hashlib.blake2b(f"{name}\0{extent.content_id}\0{extent.extent_idx}".encode(), digest_size=8).digest()
    # In (0, 1), never at either end.
    uniform = (int.from_bytes(digest, "big") + 0.5) / 2**64
    return -weight / math.log(uniform)

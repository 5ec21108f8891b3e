"""How far into the future it is worth keeping what is here, and what is worth fetching far ahead. Pure.

Demand paging with Belady's rule (1966: evict what is needed last) fetches least. A prefetch that displaces whatever is needed later than
itself fetches more: it throws out what would have been a hit, early, for what could have waited. The cure is the *conservative* strategy of
Cao, Felten, Karlin and Li (SIGMETRICS 1995): make the same replacements as Belady's rule would, only earlier. So a prefetch may
displace what Belady's rule will evict anyway before its next use, and nothing else; then as many bytes are fetched as if nothing were
fetched ahead, and the link is never idle for want of knowledge.

Which extents that rule evicts is not found by playing it through. An extent stays from one use to the next if and only if that interval
fits beside all shorter-ending ones (Jain and Lin, ISCA 2016, section 3: intervals taken by their ends); so among extents that are here now,
whose intervals all begin now, those up to a certain next use stay and those beyond it go. That horizon is the end of the first interval
that does not fit: the first time v at which, for some earlier time, the extents that must be kept from before that time until their
use at v or sooner are more than the capacity. It is found with a histogram of intervals over (begin, end), summed up.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.blocks import ExtentId, ObjectId
from cache.order.outline import Table
from cache.order.prospect import Group

Floats = NDArray[np.float64]

NUM_BINS = 256
"""Of the time up to the end of what is known. The table of sums has the square of it: half a MB, 0.5 ms."""


@dataclass(frozen=True)
class Uses:
    """Of some extents: their uses in time, and what they take. `begins` and `ends`: one row for each use, one column for each extent, in
    visits from now; a use that is behind or does not happen is (inf, inf). `is_here`: resident now."""

    begins: Floats
    ends: Floats
    is_here: NDArray[np.bool_]
    bytes_each: Floats


def keep_horizon(all_uses: Iterable[Uses], capacity_bytes: float, known_visits: float) -> float:
    """The next use, in visits from now, up to which what is here is worth keeping. `known_visits`: how far the future is known; beyond, all
    is as good as unknown.

    Three extents of which two fit, used in turns; the one that is here and is used last goes:

    >>> begins = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    >>> uses = Uses(begins, begins, np.array([True, True, False]), np.ones(3))
    >>> 1 < keep_horizon([uses], 1.0, 8.0) <= 2, keep_horizon([uses], 3.0, 8.0)
    (True, 8.0)
    """
    width = known_visits / NUM_BINS
    covered = np.zeros(NUM_BINS * NUM_BINS)
    for uses in all_uses:
        for begin, end, sizes in _intervals(uses):
            fits = (end < known_visits) & (end > begin)
            first = (begin[fits] / width).astype(np.int64)
            last = (end[fits] / width).astype(np.int64)
            covered += np.bincount(first * NUM_BINS + last, weights=sizes[fits], minlength=covered.size)
    # kept[t, v]: bytes of the intervals that have begun by t and end after t, by v at the latest.
    summed = covered.reshape(NUM_BINS, NUM_BINS).cumsum(axis=0).cumsum(axis=1)
    kept = summed - np.diagonal(summed)[:, np.newaxis]
    most = kept.max(axis=0)
    too_much = np.flatnonzero(most > capacity_bytes)
    if not too_much.size:
        return known_visits
    v = int(too_much[0])
    before = float(most[v - 1]) if v else 0.0
    return (v + max(0.0, capacity_bytes - before) / (float(most[v]) - before)) * width


def _intervals(uses: Uses) -> Iterable[tuple[Floats, Floats, Floats]]:
    """From now to the first use of what is here; over each use; from each use to the next."""
    order = np.argsort(uses.begins, axis=0, kind="stable")
    begins = np.take_along_axis(uses.begins, order, axis=0)
    ends = np.maximum.accumulate(np.take_along_axis(uses.ends, order, axis=0), axis=0)
    here = uses.is_here
    yield np.zeros(int(here.sum())), begins[0, here], uses.bytes_each[here]
    for use in range(len(begins)):
        yield begins[use], ends[use], uses.bytes_each
        if use + 1 < len(begins):
            yield ends[use], begins[use + 1], uses.bytes_each


Worth = tuple[float, ObjectId, ExtentId]
"""An extent that is not here, and is worth fetching: visits until its use, its object, itself."""


def look(
    groups: Sequence[Group],
    here: Container[ExtentId],
    capacity_bytes: float,
    bytes_beside: float,
    known_visits: float,
    most: int,
) -> tuple[float, list[Worth]]:
    """The horizon, and at most `most` extents worth fetching beyond what is announced visit by visit, nearest first."""
    tables = list({id(group.table): group.table for group in groups}.values())
    all_uses = []
    for table in tables:
        is_here = np.fromiter((extent in here for extent in table.extents), dtype=np.bool_, count=len(table.extents))
        begins, ends = _uses_of([group for group in groups if group.table is table])
        all_uses.append(Uses(begins, ends, is_here, table.row_bytes + bytes_beside))
    horizon = keep_horizon(all_uses, capacity_bytes, known_visits)
    worth: list[Worth] = []
    for table, uses in zip(tables, all_uses, strict=True):
        for group in (group for group in groups if group.table is table):
            worth += _worth_fetching(table, group, uses.is_here, horizon, most)
    return horizon, sorted(worth, key=lambda one: one[0])[:most]


def _worth_fetching(
    table: Table, group: Group, is_here: NDArray[np.bool_], horizon: float, most: int
) -> Iterable[Worth]:
    nearest = np.full(len(is_here), np.inf)
    for epoch, spans in group.epochs.items():
        begins = epoch * group.num_steps + spans.first
        distance = np.where(begins >= group.told_until, (begins - group.at_step) * group.visits_per_step, np.inf)
        nearest = np.minimum(nearest, distance)
    rows = np.flatnonzero(~is_here & (nearest < horizon))
    for row in rows[np.argsort(nearest[rows], kind="stable")][:most].tolist():
        yield float(nearest[row]), table.row_objects[row], table.extents[row]


def _uses_of(groups: Sequence[Group]) -> tuple[Floats, Floats]:
    """All uses of one table's extents that are not behind, in visits from now."""
    begins, ends = [], []
    for group in groups:
        for epoch, spans in sorted(group.epochs.items()):
            begin = (epoch * group.num_steps + spans.first - group.at_step) * group.visits_per_step
            end = (epoch * group.num_steps + spans.last - group.at_step) * group.visits_per_step
            is_behind = end <= 0
            begins.append(np.where(is_behind, np.inf, np.maximum(begin, 0.0)))
            ends.append(np.where(is_behind, np.inf, end))
    return np.array(begins), np.array(ends)
